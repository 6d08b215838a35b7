"""Mixtures: sequences of several sources in the proportions that were asked for, the same ones each time."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import batches

from taskgpt.errors import UserError
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.mixtures import Mixture, read_mixture
from taskgpt.gpt2.text.tokenizer import GPT2_VOCAB_SIZE
from taskgpt.gpt2.text.tokens import Loader, write_tokens


def mixture(weights: list[float], shuffle: bool, B: int = 4, lengths: tuple[int, ...] = (400, 90, 200)) -> Mixture:
    """Sources whose tokens tell which one they are of: source i has the ids from 1000 i on, in sequences of 8."""
    sources = [Loader([np.arange(1000 * i, 1000 * i + n, dtype=np.uint16)], 1, 8, 5000, shuffle=shuffle) for i, n in enumerate(lengths)]
    return Mixture(sources[: len(weights)], weights, B, shuffle=shuffle)


def sources_of(served: np.ndarray) -> np.ndarray:
    """The source of each sequence, in order."""
    return served[:, 0, :, 0].ravel() // 1000


def test_sequences_are_drawn_with_the_weights_as_probabilities():
    """4,000 draws of 6:3:1 have these counts within four standard deviations; they are no even turns, and depend on no other process."""
    found = sources_of(batches(mixture([6, 3, 1], shuffle=True), 1000))
    for source, share in enumerate((0.6, 0.3, 0.1)):
        assert abs((found == source).sum() - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5
    assert found[:24].tolist() == sources_of(batches(mixture([0.6, 0.3, 0.1], shuffle=True), 6)).tolist()
    runs = np.diff(np.flatnonzero(found == 2))
    assert runs.min() == 1
    assert runs.max() > 20


def test_each_source_serves_its_own_sequences_in_its_own_epochs():
    """What a mixture takes of a source is what that source serves alone, in its order, however often it begins anew."""
    served = batches(mixture([6, 3, 1], shuffle=True), 200)
    found = sources_of(served)
    for source, n in enumerate((400, 90, 200)):
        alone = Loader([np.arange(1000 * source, 1000 * source + n, dtype=np.uint16)], 1, 8, 5000, shuffle=True)
        mine = served.transpose(0, 2, 1, 3).reshape(-1, 2, 1, 8)[found == source]
        np.testing.assert_array_equal(mine, batches(alone, len(mine)))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=3), st.integers(1, 40))
def test_validation_takes_turns_as_evenly_as_weights_let_it(weights, count):
    """After any number of batches each source has had its share of the sequences, give or take a few, and the same after a reset."""
    val = mixture(weights, shuffle=False)
    first = batches(val, count)
    for source, weight in enumerate(weights):
        assert abs((sources_of(first) == source).sum() - 4 * count * weight / sum(weights)) < 4
    val.reset()
    np.testing.assert_array_equal(batches(val, count), first)


def test_one_pass_ends_where_a_source_would_begin_again():
    """49, 11 and 24 sequences at equal weights: 33 of them, which is 8 batches of 4; what has less than a batch counts as one."""
    assert mixture([1, 1, 1], shuffle=False).num_batches == 8
    assert mixture([1], shuffle=False).num_batches == 12
    assert mixture([1, 1], shuffle=False, B=1000).num_batches == 1


@settings(deadline=None)
@given(st.integers(0, 80), st.booleans())
def test_a_restored_mixture_goes_on_with_the_same_batches(served, shuffle):
    """Through JSON, from any place, into a mixture that has been elsewhere."""
    first, second = (mixture([3, 2, 1], shuffle) for _ in range(2))
    batches(first, served)
    cursor = json.dumps(first.cursor())
    expected = batches(first, 60)
    for _ in range(2):
        second.restore(json.loads(cursor))
        np.testing.assert_array_equal(batches(second, 60), expected)
    assert second.cursor() == first.cursor()


def test_a_cursor_that_does_not_fit_is_refused():
    """Of another number of sources, or whose second source is damaged: the mixture stays where it was, all of it."""
    mixed = mixture([1, 1], shuffle=True)
    batches(mixed, 3)
    before = mixed.cursor()
    other = mixture([1, 1], shuffle=True).cursor()
    for change, message in (
        ({"sources": before["sources"][:1]}, "of 1 sources, but this data has 2; give the data that the run had"),
        ({"sources": [other["sources"][0], before["sources"][1] | {"place": 99}]}, "turn 0, place 99 is behind the end"),
        ({"sources": [1, 2]}, r"sources\[0\]: wanted dict, got 1"),
        ({"batches": -1}, "batches: wanted at least 0, got -1"),
    ):
        with pytest.raises(UserError, match=f"^cursor: {message}"):
            mixed.restore(before | change)
        assert mixed.cursor() == before


@pytest.mark.parametrize("spec", ["a=", "a=x", "a=0", "a=-1", "a=nan", "a=inf", "=1", "a=1,b", "a=1,,b=2", "a=1,", "a=1e999", "a=1,b=1\n2"])
def test_what_is_no_mixture_is_told(spec):
    """The word that is wrong, and an example."""
    with pytest.raises(UserError, match=r"is no NAME=WEIGHT with a weight above 0; write for instance .* hold no comma"):
        read_mixture(spec)


def test_mixtures_are_opened_by_one_word(tmp_path, monkeypatch):
    """Texts and folders, with spaces or without; twice the same, or different encodings, are refused; a file of that name is the file."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50)
    Path("tokens").mkdir()
    for name in ("x_train_1.bin", "x_train_2.bin", "x_val.bin"):
        write_tokens(f"tokens/{name}", [7] * 200)
    opened = open_data("a.txt=1, tokens=3", 4, 16, GPT2_VOCAB_SIZE)
    assert opened.description.startswith("a mixture of 25.0% a.txt: ")
    assert "; 75.0% tokens: 400 train and 200 val tokens" in opened.description
    assert 0.6 < (batches(opened.train, 100)[:, 0, :, 0] == 7).mean() < 0.9
    assert 0.65 < (batches(opened.val, 5)[:, 0, :, 0] == 7).mean() < 0.85
    first = opened.fingerprint
    assert json.loads(json.dumps(first)) == first != open_data("a.txt=2,tokens=3", 4, 16, GPT2_VOCAB_SIZE).fingerprint
    assert [shard["name"] for shard in first["train"]["sources"][1]["shards"]] == ["x_train_1.bin", "x_train_2.bin"]
    with pytest.raises(UserError, match=r"data 'a.txt=1,a.txt=2': a.txt stands in it twice"):
        open_data("a.txt=1,a.txt=2", 4, 16, GPT2_VOCAB_SIZE)
    with pytest.raises(UserError, match="different encodings, bytes and none; prepare them with the same one"):
        open_data("a.txt=1,tokens=2", 4, 16, 300)
    with pytest.raises(UserError, match=r"data 'b.txt': no such file or folder"):
        open_data("a.txt=1,b.txt=2", 4, 16, GPT2_VOCAB_SIZE)
    Path("a.txt").rename("a=1")
    assert not isinstance(open_data("a=1", 4, 16, GPT2_VOCAB_SIZE).train, Mixture)
    assert not isinstance(open_data("tokens/x_*.bin", 4, 16, GPT2_VOCAB_SIZE).train, Mixture)
