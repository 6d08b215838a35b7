"""Token files of any texts: the tokens of the whole text wherever it was cut, whole files or none, and a killed run that goes on."""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import TINYSHAKESPEARE

from taskgpt.errors import UserError
from taskgpt.gpt2.text import documents, preparation
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.documents import Reading, spans_of, tokens_of
from taskgpt.gpt2.text.preparation import Settings, find_files, prepare_texts
from taskgpt.gpt2.text.tokenizer import GPT2_VOCAB_SIZE, byte_tokenizer, gpt2_tokenizer
from taskgpt.gpt2.text.tokens import TokenFile, write_tokens
from taskgpt.programs.data import main

SENTENCES = (
    "First Citizen:\n",
    "Before we proceed any further, ",
    "hear me   speak.\n\n",
    "It's 12,000 o'clock — né! ",
    "你好。\r\n",
    "\tx",
)


def made_up(nbytes: int, seed: int = 0) -> str:
    """A text of about so many bytes, which repeats nothing but its sentences."""
    rng = random.Random(seed)
    return "".join(rng.choice(SENTENCES) for _ in range(nbytes // 18))


def tokens_in(path: Path, **reading) -> list[int]:
    return [i for span in spans_of(str(path)) for ids in tokens_of(span, Reading(**reading)) for i in ids.tolist()]


def result(folder: Path) -> dict[str, str]:
    """SHA-256 of each token file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.bin"))}


def ids_of(folder: Path) -> list[int]:
    return [i for part in ("val", "train") for path in sorted(folder.glob(f"tokens_{part}_*.bin")) for i in TokenFile(path)[:].tolist()]


# Cutting a text

PARTS = st.sampled_from(
    [
        *"aZé你3٣.'-_",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\r",
        "\u3000",
        "\u00a0",
        "\u2028",
        "\x0b",
        "\x1c",
        "\x85",
        "'s",
        " 're",
        "I'll",
    ]
    + ["<|endoftext|>", "<|endof", "text|>", "🙂", "e\u0301", "\u200b", "word", " word", "12", "한국"]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PARTS, max_size=60).map("".join), st.integers(1, 24), st.booleans())
@example("<|endoftext|> a", 13, False)
@example("a \u3000 b\u3000\n c", 1, False)
@example("x\n\n\n\n\ny\n\n", 3, True)
def test_where_a_text_is_cut_is_not_seen_in_its_tokens(tmp_path_factory, text, span_bytes, sections):
    """Runs of any white space, line ends, contractions, digits, other scripts, end-of-text marks: the tokens of each whole document."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SPAN_BYTES", span_bytes)
        found = tokens_in(path, sections=sections)
    whole = text.replace("\r\n", "\n").replace("\r", "\n").split("<|endoftext|>")
    if sections:
        whole = [section for document in whole for section in documents.split_sections(document)]
    assert found == gpt2_tokenizer().encode_documents(filter(None, whole)).tolist()


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=60), st.integers(1, 24), st.integers(1, 8))
def test_what_has_no_good_place_is_cut_between_characters(tmp_path_factory, text, span_bytes, farthest):
    """Words longer than is looked for: other tokens perhaps, and never another text."""
    path = tmp_path_factory.getbasetemp() / "text.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SPAN_BYTES", span_bytes)
        patch.setattr(documents, "FARTHEST", farthest)
        ids = tokens_in(path, encoding="bytes")
    assert byte_tokenizer().decode(ids).removeprefix("<|endoftext|>") == text.removeprefix("\ufeff")


# What comes out


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with each kind of file, hidden and foreign ones, and an empty one; eleven documents in all."""
    folder = tmp_path / "corpus"
    (folder / "b" / ".git").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "b" / "c.md").write_text("\ufefftwo\r\n<|endoftext|>\nthree")
    (folder / "b" / "d.jsonl").write_text('{"text": "four", "n": NaN}\n\n{"text": "<|endoftext|>"}\n{"text": null}\n{"text": "s\\ud800x"}')
    with gzip.open(folder / "b" / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "five"}\n{"text": ""}\n{"text": "six"}\n')
    for name in ("b/.git/f.txt", "b/.g.txt", "h.html"):
        (folder / name).write_text("not this")
    (folder / "b-empty.txt").write_text("")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": [1, 2, 3, 4], "text": ["seven", None, "eight", "nine"]})
    parquet.write_table(table, folder / "z.parquet", row_group_size=2)
    (folder / "b" / "pipe.txt").symlink_to("/dev/zero")
    return folder


DOCUMENTS = ["one", "two\n", "\nthree", "four", "<|endoftext|>", "s\ufffdx", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_of_all_kinds_of_files(corpus, tmp_path, workers, monkeypatch, capsys):
    """Documents come in the order of their paths, each after an end of text; only in texts the mark is one. Any number of processes."""
    monkeypatch.setattr(preparation, "SPAN_BYTES", 10)  # a piece for nearly each file
    out = tmp_path / "out"
    assert main(["prepare", str(corpus), "--folder", str(out), "--workers", str(workers)]) == 0
    assert ids_of(out) == gpt2_tokenizer().encode_documents(DOCUMENTS).tolist()
    assert sorted(path.name for path in out.iterdir()) == [".lock", "prepared.json", "tokens_train_000001.bin", "tokens_val_000000.bin"]
    shown = capsys.readouterr()
    assert shown.out == f"wrote 29 train tokens in 1 and 3 val tokens in 1 files into {out}; train with: --data {out}\n"
    assert "tokenizing: 0.0 MB, done after" in shown.err
    before = result(out)
    assert main(["prepare", str(corpus), "--folder", str(out), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"already prepared in {out}; to prepare it anew, delete that folder first\n"
    assert result(out) == before


def test_tinyshakespeare_in_sections_is_llmcs(tmp_path):
    """From the real text, by the general way, come llm.c's two files to the byte."""
    text = next((path for path in TINYSHAKESPEARE if path.is_file()), None)
    if text is None:
        pytest.skip(f"no tinyshakespeare text; put it into {TINYSHAKESPEARE[1]}")
    assert main(["prepare", str(text), "--sections", "--val-tokens", "32768", "--folder", str(tmp_path / "out")]) == 0
    assert result(tmp_path / "out") == {
        "tokens_train_000001.bin": "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
        "tokens_val_000000.bin": "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
    }


@pytest.mark.parametrize(
    ("flags", "val", "train"),
    [
        (["--val-tokens", "100", "--shard-tokens", "300"], [100], [297, 297, 297]),
        (["--val-share", "0.5", "--shard-tokens", "250"], [248, 248], [247, 248]),
        (["--shard-tokens", "100000000"], [99], [892]),
    ],
)
def test_shards_have_nearly_the_same_length(tmp_path, flags, val, train):
    """None is longer than asked for, none so short that a batch would not fit; the first ones are for validation; numbers go on."""
    (tmp_path / "x.txt").write_text("a" * 990)
    out = tmp_path / "out"
    assert main(["prepare", str(tmp_path / "x.txt"), "--encoding", "bytes", "--folder", str(out), *flags]) == 0
    names = [f"tokens_{'val' if i < len(val) else 'train'}_{i:06d}.bin" for i in range(len(val + train))]
    assert [len(TokenFile(out / name)) for name in names] == val + train
    assert ids_of(out) == [256] + [97] * 990


def test_training_knows_the_encoding(tmp_path):
    """Bytes bring their tokenizer file, by which a model of any vocabulary decodes them; without one, tokens are GPT-2's."""
    (tmp_path / "x.txt").write_text("Hello world. " * 300)
    for encoding, vocab_size, tokenizer in (("bytes", 257, byte_tokenizer), ("bytes", GPT2_VOCAB_SIZE, byte_tokenizer)) + (
        ("gpt2", GPT2_VOCAB_SIZE, gpt2_tokenizer),
    ):
        prepare_texts([tmp_path / "x.txt"], tmp_path / encoding, Settings(Reading(encoding)))
        assert open_data(str(tmp_path / encoding), 1, 8, vocab_size).tokenizer is tokenizer()
    with pytest.raises(UserError, match="outside the model's vocabulary of 257"):
        open_data(str(tmp_path / "gpt2"), 1, 8, 257)


# Going on


def run(script: str, *words: object) -> subprocess.Popen:
    """Start `taskgpt data prepare` in a process group of its own, after a line of Python."""
    code = f"import sys; from taskgpt.gpt2.text import documents, preparation; {script}; from taskgpt.programs.data import main; "
    code = f"if __name__ == '__main__':\n    {code}sys.exit(main(['prepare', *sys.argv[1:]]))"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], start_new_session=True, stderr=subprocess.PIPE, text=True)


def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path):
    """Killed again and again: every file that has its name is whole, and at the end all are those of a run without a break."""
    (tmp_path / "x.txt").write_text(made_up(200_000))
    small = "documents.SPAN_BYTES = preparation.SPAN_BYTES = 2000"
    words = [tmp_path / "x.txt", "--shard-tokens", 5000, "--workers", 1, "--folder"]
    with run(small, *words, tmp_path / "whole") as process:
        assert process.wait(60) == 0
    out, rng, kills = tmp_path / "out", random.Random(1), 0
    for _ in range(30):
        process = run(small, *words, out)
        seen = len(list(out.rglob("*.bin")))
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(out.rglob("*.bin"))) < seen + 10 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.wait()
        process.stderr.close()
        for path in out.glob("tokens_*.bin"):
            assert result(tmp_path / "whole")[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills > 3
    assert process.returncode == 0
    assert result(out) == result(tmp_path / "whole")
    assert [path.name for path in out.iterdir() if ".tmp" in path.name or path.name == ".pieces"] == []


def test_processes_leave_with_the_one_that_started_them(tmp_path):
    """Killed while two processes tokenize: they end by themselves, and the next run has the bytes of a single process."""
    (tmp_path / "x.txt").write_text(made_up(14_000_000))
    words = [tmp_path / "x.txt", "--folder"]
    process = run("pass", *words, tmp_path / "out", "--workers", 2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.pieces/0*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    process.stderr.close()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert 1 <= len(list(tmp_path.glob("out/.pieces/0*.bin"))) < 4
    assert main(["prepare", *map(str, words), str(tmp_path / "out"), "--workers", "2"]) == 0
    assert main(["prepare", *map(str, words), str(tmp_path / "one"), "--workers", "1"]) == 0
    assert result(tmp_path / "out") == result(tmp_path / "one")


def test_ctrl_c_ends_all_and_says_how_to_go_on(tmp_path):
    """Also while processes tokenize: exit code 130, one line, nobody left."""
    (tmp_path / "x.txt").write_text(made_up(14_000_000))
    process = run("pass", tmp_path / "x.txt", "--folder", tmp_path / "out", "--workers", 2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.pieces/0*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "taskgpt data: interrupted; what is done stays, the same command goes on from there"
    assert "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    """Among the pieces or among the shards: one message, no half file, and the same call goes on when there is room again."""
    (tmp_path / "x.txt").write_text(made_up(30_000))
    monkeypatch.setattr(documents, "SPAN_BYTES", 2000)
    monkeypatch.setattr(preparation, "SPAN_BYTES", 2000)
    few = Settings(shard_tokens=1000)
    prepare_texts([tmp_path / "x.txt"], tmp_path / "whole", few)
    sync, room = os.fsync, 0

    def full(descriptor: int):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    for room in (3, 21, 21, 200):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with contextlib.nullcontext() if room == 200 else pytest.raises(UserError, match="the disk is full; free some space"):
                prepare_texts([tmp_path / "x.txt"], tmp_path / "out", few)
        assert not list((tmp_path / "out").rglob("*.tmp*"))
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_training_waits_until_all_shards_are_there(tmp_path):
    """A folder in which pieces still lie is refused, so that no run trains on a part of its text."""
    (tmp_path / "x.txt").write_text("word " * 100)
    prepare_texts([tmp_path / "x.txt"], tmp_path / "out", Settings())
    (tmp_path / "out" / ".pieces").mkdir()
    with pytest.raises(UserError, match=r"out: its token files are not all there: `taskgpt data prepare` is at work, or was interr"):
        open_data(str(tmp_path / "out"), 1, 8, GPT2_VOCAB_SIZE)
    prepare_texts([tmp_path / "x.txt"], tmp_path / "out", Settings())
    assert open_data(str(tmp_path / "out"), 1, 8, GPT2_VOCAB_SIZE).train.num_tokens == 92


def test_another_runs_work_is_never_taken(tmp_path, monkeypatch):
    """Other settings, another order, a changed, a new or a missing input: refused with what differs; before shards are there, they may be
    cut otherwise."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("word " * 100)
    out, sources = tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(UserError, match=r"the inputs have 204 tokens, and 500 of them for validation leave nothing"):
        prepare_texts(sources, out, Settings(val_tokens=500))
    prepare_texts(sources, out, Settings(val_tokens=50))
    before = result(out)
    for other, changes, message in (
        (sources, Settings(val_tokens=51), "val_tokens was 50, now 51"),
        (sources, Settings(Reading("bytes"), val_tokens=50), "encoding was gpt2, now bytes"),
        (sources[::-1], Settings(val_tokens=50), "the inputs had another order"),
        (sources[:1], Settings(val_tokens=50), "b.txt is no longer among the inputs"),
    ):
        with pytest.raises(UserError, match=f"out: was begun otherwise: .*{message}; choose another --folder, or delete this one"):
            prepare_texts(other, out, changes)
    sources[0].write_text("other words")
    with pytest.raises(UserError, match=r"a.txt has changed"):
        prepare_texts(sources, out, Settings(val_tokens=50))
    assert result(out) == before
    with pytest.raises(UserError, match=r"tokens_train_000001.bin: a file that is not of this preparation, and training would read it"):
        (out / "prepared.json").unlink()
        prepare_texts(sources, out, Settings(val_tokens=50))


def test_a_file_that_changes_meanwhile_is_told(tmp_path, monkeypatch):
    """Its documents are of no single state: no token of it is kept."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n')
    [span] = spans_of(str(path))
    with path.open("a") as file:
        file.write('{"text": "b"}\n')
    with pytest.raises(UserError, match=r"x.jsonl: it changed while it was read; prepare into another folder when nobody writes it"):
        list(tokens_of(span, Reading()))


def test_a_manifest_or_a_shard_that_lies_is_told(tmp_path):
    """A damaged manifest, one that names files elsewhere, and a shard cut short after the end: what to do, and nothing is touched."""
    (tmp_path / "x.txt").write_text("word " * 100)
    out = tmp_path / "out"
    prepare_texts([tmp_path / "x.txt"], out, Settings())
    manifest = out / "prepared.json"
    whole = json.loads(manifest.read_text())
    write_tokens(tmp_path / "outside.bin", [1])
    for change, message in (
        ({"shards": {"../outside.bin": 1}}, r"outside.bin: missing or not of 1 tokens; delete .*out, and prepare it again"),
        ({"version": 2}, "by version 2 of taskgpt's manifest, this is 1"),
        ({"inputs": [1]}, r"prepared.json: inputs\[0\]: wanted str, got 1"),
        ({"inputs": ["x"]}, "is no longer among the inputs"),
        ({"settings": {"reading": {"encoding": "x"}}}, r"settings.reading.encoding: wanted one of 'gpt2', 'bytes', got 'x'"),
    ):
        manifest.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=message):
            prepare_texts([tmp_path / "x.txt"], out, Settings())
    manifest.write_text(json.dumps(whole))
    with (out / "tokens_train_000001.bin").open("r+b") as file:
        file.truncate(1100)
    with pytest.raises(UserError, match=r"tokens_train_000001.bin: missing or not of 92 tokens"):
        prepare_texts([tmp_path / "x.txt"], out, Settings())


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "the line at byte 14 is no JSON: Expecting value: .*; mend or remove it"),
        ("x.jsonl", b"[1]", 'the line at byte 0 is no JSON object, such as {"text": ...}; mend'),
        ("x.jsonl", b'{"body": "a", "id": 1}', "the object at byte 0 has no 'text', but: body, id; choose with --field"),
        ("x.jsonl", b'{"text": ["a"]}', "'text' of the object at byte 0 is a list, no text; choose with --field"),
        ("x.jsonl", b'{"text": "\xff"}', "is no JSON: 'utf-8' codec"),
        ("x.jsonl", b"[" * 100_000, "is no JSON: it is nested too deeply"),
        ("x.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "is no JSON: Exceeds the limit"),
        ("x.jsonl", b'{"a": 1}\n' + b" " * (1 << 24) + b"\n", "the object at byte 0 has no 'text'"),
        (
            "x.jsonl",
            b"\n" + b" " * (1 << 24) + b"\n",
            "the line at byte 1 has more than 16,777,216 bytes; give so long a document as a text",
        ),
        ("x.jsonl", b"\x1f\x8b\x08" + bytes(10), "this is compressed by gzip, and JSONL is wanted; unpack it first"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "cannot read: Compressed file ended before"),
        ("x.jsonl.gz", b'{"text": "a"}', "cannot read: Not a gzipped file"),
        ("x.parquet", b"PAR1 and then nothing of that", "no Parquet table that can be read: "),
        ("x.txt", b"PAR1\x15\x04", "this is a Parquet table, and a text is wanted; give texts in UTF-8, JSONL or Parquet"),
        ("x.txt", b"a" * 20 + b"\xe9", "not a text in UTF-8: byte 0xe9 at position 20"),
        ("x.txt", b"a word " * 20 + b"\0", "byte 0x00 at position 140, which no text has"),
    ],
)
def test_what_is_not_what_its_name_says_is_told(tmp_path, capsys, name, content, message):
    """One line with the file, the place and what to do."""
    (tmp_path / name).write_bytes(content)
    assert main(["prepare", str(tmp_path / name), "--folder", str(tmp_path / "out"), "--workers", "1"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"taskgpt data: error: {tmp_path / name}: ")
    assert re.search(message, line), line
    assert not list((tmp_path / "out").glob("*.bin"))


def test_parquets_own_mistakes_are_told(tmp_path, monkeypatch):
    """A column that is not there or holds no text, and a machine without pyarrow."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"n": [1], "body": ["a"]}), path)
    for name, message in (("text", "no column 'text', but: n, body; choose with --field"), ("n", "column 'n' holds int64, no text")):
        with pytest.raises(UserError, match=f"x.parquet: {message}"):
            tokens_in(path, field=name)
    assert tokens_in(path, field="body") == [50256, 64]
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"x.parquet: Parquet needs pyarrow; install it with: pip install 'taskgpt\[parquet\]'"):
        tokens_in(path)


def test_mistakes_of_the_command_are_told(tmp_path, capsys):
    """Flags that do not go together, what is not there, what is given twice, a folder without a text: exit code 2 and one line."""
    (tmp_path / "empty").mkdir()
    text = tmp_path / "x.txt"
    text.write_text("word " * 9)
    out = ["--folder", str(tmp_path / "out")]
    for words, message in (
        ([text], "--folder: missing; say where to write the token files"),
        ([text, *out, "--from", "y"], "--from: is for datasets, these are texts; leave it out"),
        ([tmp_path / "none.txt"], "none.txt': no such file or folder, and no such dataset; known: tinyshakespeare, tinystories"),
        ([text, tmp_path / "none.txt", *out], "none.txt: cannot read: No such file or directory; choose a file that you may read"),
        (["tinyshakespeare", "--sections"], "--sections: is for texts, and tinyshakespeare is prepared as llm.c does; leave it out"),
        ([tmp_path / "empty", *out], "empty: no file in it ends in .txt, .md, .jsonl, .jsonl.gz, .parquet; choose with --suffixes"),
        ([tmp_path, tmp_path / "empty", *out, "--suffixes", ".txt"], "empty: no file in it ends in .txt; choose with --suffixes"),
        ([text, tmp_path, *out], "x.txt: given twice; give each file once"),
        (["/dev/zero", *out], "/dev/zero: cannot read: Not a regular file"),
        ([text, *out, "--shard-tokens", 2**31], "--shard-tokens: wanted at most 2,147,483,647, which a token file can hold"),
        ([text, *out, "--val-share", "1"], "the inputs have 11 tokens, and 1 of them for validation leave nothing"),
    ):
        assert main(["prepare", *map(str, words)]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_more_files_than_a_manifest_holds_are_refused(tmp_path, monkeypatch):
    """Before anything is tokenized: it could not be read again."""
    (tmp_path / "x.txt").write_text("word " * 9)
    monkeypatch.setattr(preparation, "MANIFEST_BYTES", 300)
    with pytest.raises(
        UserError, match=r"the inputs are 1 files, whose names take more than 300 bytes; put many small texts into a JSONL file"
    ):
        prepare_texts([tmp_path / "x.txt"], tmp_path / "out", Settings())
    assert sorted(os.listdir(tmp_path / "out")) == [".lock"]


def test_files_are_found_in_the_order_of_their_paths(tmp_path):
    """By folder names, and not by where the separator stands among letters; folders' links are not followed, files' are."""
    for name in ("a/z.txt", "a-b/c.txt", "a.txt", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    found = [os.path.relpath(path, tmp_path) for path in find_files([tmp_path], [".txt"])]
    assert found == ["a/b/c.txt", "a/z.txt", "a-b/c.txt", "a.txt", "link.txt"]


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    """Its texts would be missing, and nobody would know."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "x.txt").write_text("x")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="closed: cannot read: Permission denied; choose a folder that you may read"):
        find_files([tmp_path], [".txt"])


def test_memory_does_not_grow_with_the_document(tmp_path):
    """Of one document of 4 and one of 64 MB: the larger one takes no 100 MB more at its peak, which its text alone would fill."""
    peaks = []
    for megabytes in (4, 64):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write("a document without an end, " * 37037)
        words = [path, "--encoding", "bytes", "--workers", 1, "--folder", tmp_path / f"out{megabytes}"]
        tell = (
            "import atexit, resource; atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))"
        )
        _, said = run(tell, *words).communicate(timeout=120)
        peaks.append(int(said.splitlines()[-1]) // (1024 if sys.platform == "darwin" else 1))
        assert sum(len(TokenFile(file)) for file in (tmp_path / f"out{megabytes}").glob("tokens_*.bin")) == path.stat().st_size + 1
    assert peaks[1] < peaks[0] + 100_000
