"""Multiple choice from llm.c's evaluation files: the right numbers, and what is no such file is refused in a line."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_huggingface import logits_of
from test_tokens import header

from taskgpt.errors import UserError
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.shape import Model
from taskgpt.gpt2.text.choices import Example, Score, judged, read_choices
from taskgpt.programs import eval as program

MODEL = Model(2, 2, 32, 257, 64)
SEED = 1  # of examples of which some are right, others by sum than by mean
Plain = tuple[list[int], list[list[int]], int]  # context, completions, label


def words_of(number: int, example: Plain) -> list[int]:
    """Return an example's words as llm.c's write_evalfile writes them."""
    context, completions, label = example
    words = [65535, 0, number, label, len(completions), len(context), *context]
    for completion in completions:
        words += [len(completion), *completion]
    words[1] = 2 * len(words)
    return words


def write(path: Path, examples: list[Plain], change=lambda words: words, head=lambda *fields: fields) -> Path:
    """Write a file. change: of each example's words; head: of the header's fields."""
    found = [change(words_of(number, example)) for number, example in enumerate(examples)]
    stream = np.array([word for words in found for word in words], "<u2").tobytes()
    fields = head(20240522, 1, len(examples), max((2 * len(words) for words in found), default=0))
    path.write_bytes(header(*fields) + stream)
    return path


def drawn(count: int, seed: int = 0) -> list[Plain]:
    """Return random examples, of 2 to 5 completions of 1 to 12 tokens."""
    rng = np.random.default_rng(seed)

    def some(least: int, most: int) -> list[int]:
        return rng.integers(0, 257, rng.integers(least, most)).tolist()

    def one() -> Plain:
        completions = [some(1, 13) for _ in range(rng.integers(2, 6))]
        return some(1, 20), completions, int(rng.integers(len(completions)))

    return [one() for _ in range(count)]


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {name: rng.standard_normal(shape, np.float32) * np.float32(0.3) for name, shape in MODEL.parameter_shapes().items()}
    found["wte"][MODEL.vocabulary :] = 0
    return found


@pytest.fixture
def model(tmp_path, parameters) -> Path:
    checkpoints.save(tmp_path / "model.bin", MODEL, parameters)
    return tmp_path / "model.bin"


def expected(examples: list[Plain], parameters: dict[str, np.ndarray]) -> tuple[int, int]:
    """Return how many are right by sum and by mean, from the logits of each completion alone behind its context, in float64."""
    right = right_norm = 0
    for context, completions, label in examples:
        totals, means = [], []
        for completion in completions:
            row = np.array([context + completion])
            logits = logits_of(MODEL, parameters, row)[0].astype(np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses = [-logs[len(context) - 1 + n, token] for n, token in enumerate(completion)]
            totals.append(np.sum(losses))
            means.append(np.mean(losses))
        right += int(np.argmin(totals) == label)
        right_norm += int(np.argmin(means) == label)
    return right, right_norm


def run(tmp_path, *words: str) -> dict:
    assert program.main(["--graph", "tiny", "--json", str(tmp_path / "e.json"), *words]) == 0
    return json.loads((tmp_path / "e.json").read_text())


@pytest.mark.parametrize(("scheduler", "B"), [("native", 4), ("native", 3), ("loops", 16), ("threads", 1)])
def test_the_accuracies_are_those_of_the_logits(tmp_path, model, parameters, capsys, scheduler, B):
    """By sum and by mean, as NumPy computes them; under every scheduler, and where the completions of an example are in two batches."""
    examples = drawn(30, seed=SEED)
    right, right_norm = expected(examples, parameters)
    assert 0 < right < 30 and 0 < right_norm < 30 and right != right_norm
    path = write(tmp_path / "c.bin", examples)
    words = ["--init", str(model), "--choices", str(path), "--set", f"batch.batch_size={B}", "--scheduler", scheduler, "--workers", "2"]
    found = run(tmp_path, *words)
    assert (found["correct"], found["correct_norm"]) == (right, right_norm)
    assert (found["acc"], found["acc_norm"]) == (right / 30, right_norm / 30)
    assert (found["examples"], found["examples_of_file"]) == (30, 30)
    assert found["tokens"] == sum(len(context) + len(completion) - 1 for context, completions, _ in examples for completion in completions)
    shown = capsys.readouterr().out
    longest = max(len(context) + max(map(len, completions)) - 1 for context, completions, _ in examples)
    assert f"c.bin: 30 examples, T {longest}" in shown
    assert f"acc_norm   {right_norm / 30:.4f}, {right_norm} of 30 examples, by the mean" in shown


def test_some_batches(tmp_path, model, parameters):
    """As many examples as have all of their completions in so many batches."""
    examples = [(context, completions[:2], 0) for context, completions, _ in drawn(10)]
    words = ["--init", str(model), "--choices", str(write(tmp_path / "c.bin", examples)), "--set", "batch.batch_size=3"]
    found = run(tmp_path, *words, "--batches", "3")
    assert (found["examples"], found["examples_of_file"]) == (4, 10)
    assert (found["correct"], found["correct_norm"]) == expected(examples[:4], parameters)


def test_of_equals_the_first_counts():
    """As in llm.c, for which a later one must have a smaller loss."""
    example = Example(np.array([1]), (np.array([2]),) * 3, 1)
    scores = [Score(2.0, 1.0), Score(1.0, 1.0), Score(1.0, 2.0)]
    assert list(judged([example], iter(scores))) == [(True, False)]


def test_what_is_written_is_read(tmp_path):
    """Contexts, completions, labels, in order."""
    examples = drawn(50, seed=3)
    found = read_choices(write(tmp_path / "c.bin", examples), 257)
    assert [(list(each.context), [list(part) for part in each.completions], each.label) for each in found] == examples


def changed(at: int, value: int):
    """Return a change of one word of each example."""
    return lambda words: [*words[:at], value, *words[at + 1 :]]


EXAMPLES: list[Plain] = [([1, 2, 3], [[4, 5], [6]], 1), ([7], [[8], [9, 10, 11]], 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(0, 3), "example 1: wanted the words 65535, bytes up to 28, 0; got 3, 28, 0"),
        (changed(2, 1), "example 1: wanted the words 65535, bytes up to 28, 0; got 65535, 28, 1"),
        (changed(1, 20), "example 1: ends before what it should hold"),
        (changed(1, 27), "wanted the words 65535, bytes up to 28, 0; got 65535, 27, 0"),
        (changed(3, 2), "example 1: number 2 of 2 completions is said to be right"),
        (changed(4, 1), "example 1: number 1 of 1 completions is said to be right"),
        (changed(4, 9), "example 1: ends before what it should hold"),
        (changed(5, 0), "example 1: "),
        (changed(8, 300), "example 1: token 300 is outside the model's vocabulary of 257"),
        (lambda words: [*words, 0], "example 1: wanted the words 65535, bytes up to 30"),
    ],
)
def test_a_damaged_example_is_named(tmp_path, change, message):
    """Which one, what was wanted, what was found."""
    if message.endswith("bytes up to 30"):
        message = "example 2: wanted the words 65535"
    with pytest.raises(UserError) as caught:
        read_choices(write(tmp_path / "c.bin", EXAMPLES, change), 257)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda magic, *rest: (20240520, *rest), "this is an llm.c token file, and an llm.c evaluation file (HellaSwag, MMLU) is wanted"),
        (lambda magic, *rest: (7, *rest), "no llm.c evaluation file, which begins with 20240522, not 7"),
        (lambda magic, version, *rest: (magic, 2, *rest), "evaluation file version 2, wanted 1"),
        (lambda magic, version, count, longest: (magic, version, 0, longest), "the header counts 0 examples of at most 28 bytes"),
        (lambda magic, version, count, longest: (magic, version, 1, longest), "are not 1 examples of at most 28 bytes"),
        (lambda magic, version, count, longest: (magic, version, 3, longest), "example 3: ends before what it should hold"),
        (lambda magic, version, count, longest: (magic, version, count, 26), "are not 2 examples of at most 26 bytes"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, head, message):
    """Another kind of file, another version, and what does not fit the file's size."""
    with pytest.raises(UserError) as caught:
        read_choices(write(tmp_path / "c.bin", EXAMPLES, head=head), 257)
    assert message in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 1023, 1024, 1030])
def test_a_cut_file_is_refused(tmp_path, size):
    """At any place."""
    path = write(tmp_path / "c.bin", EXAMPLES)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"c\.bin: "):
        read_choices(path, 257)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--choices", "none.bin"], "none.bin: cannot read the evaluation file: No such file or directory"),
        (
            ["--choices", "c.bin", "--set", "batch.seq_len=10"],
            "c.bin: example 1 needs 30 positions, a sequence has 10; leave out batch.seq_len",
        ),
        (["--choices", "long.bin"], "long.bin: example 1 needs 90 positions, the model has 64; choose a model with 90"),
        (
            ["--choices", "c.bin", "--set", "batch.batch_size=1", "--batches", "3"],
            "no room for the 4 completions of an example; choose at least 4",
        ),
        (["--choices", "c.bin", "--part", "val"], "--part val: is a part of --data"),
        (["--choices", "big.bin"], "big.bin: example 1: token 50000 is outside the model's vocabulary of 257"),
        (
            ["--data", "c.bin"],
            "this is an llm.c evaluation file (HellaSwag, MMLU), and a text is wanted; give it to `taskgpt eval --choices`",
        ),
    ],
)
def test_a_mistake_is_answered_in_one_line(tmp_path, model, monkeypatch, capsys, words, message):
    """And exit code 2."""
    monkeypatch.chdir(tmp_path)
    for name, tokens, length in (("c.bin", 5, 27), ("long.bin", 5, 87), ("big.bin", 50000, 3)):
        write(Path(name), [([tokens] * length, [[tokens] * 4] * 4, 0)])
    assert program.main(["--graph", "tiny", "--init", str(model), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_model_is_named(tmp_path, parameters, capsys):
    """No accuracy of losses that are no numbers."""
    checkpoints.save(tmp_path / "nan.bin", MODEL, {name: np.full_like(array, np.nan) for name, array in parameters.items()})
    path = write(tmp_path / "c.bin", EXAMPLES)
    assert program.main(["--graph", "tiny", "--init", str(tmp_path / "nan.bin"), "--choices", str(path)]) == 2
    assert "the loss of a completion is nan; the model is damaged" in capsys.readouterr().err
