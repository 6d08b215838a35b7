"""Data: datasets are llm.c's to the byte, downloads survive a break, and whatever a person names is opened or its mistake told."""

import dataclasses
import errno
import hashlib
import http.server
import io
import json
import os
import platform
import pwd
import random
import re
import signal
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import platformdirs
import psutil
import pytest
from programs import started
from test_tokens import batches, header

import taskgpt
from taskgpt import downloads
from taskgpt.downloads import download
from taskgpt.errors import UserError
from taskgpt.gpt2.text import datasets
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.datasets import DATASETS, UNPACKED, prepare, write_tinystories
from taskgpt.gpt2.text.tokenizer import GPT2_VOCAB_SIZE, byte_tokenizer, gpt2_tokenizer
from taskgpt.gpt2.text.tokens import TokenFile, TokenWriter, write_tokens
from taskgpt.programs.data import main

TINYSHAKESPEARE = (Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt", Path("tinyshakespeare.txt"))
V = GPT2_VOCAB_SIZE
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 3000


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, a dataset `small` of a text made up here, and no way out to the network: nobody listens on port 9 of this
    machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    whole = TEXT.encode()
    small = {"num_bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "token_sha256": {}}
    monkeypatch.setitem(DATASETS, "small", dataclasses.replace(DATASETS["tinyshakespeare"], name="small", **small))
    for name, dataset in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(dataset, url=f"http://127.0.0.1:9/{name}.txt"))
    return tmp_path / "cache"


@pytest.fixture
def shakespeare() -> Path:
    """The real text, where this machine has it."""
    for path in TINYSHAKESPEARE:
        if path.is_file():
            return path
    pytest.skip(f"no tinyshakespeare text; put it into {' or '.join(map(str, TINYSHAKESPEARE))}")


@pytest.fixture
def serve(cache, monkeypatch):
    """serve(body) makes a local server the source of the dataset `small`, and returns the list of ranges that it is asked for.

    drop_after: bytes after which it drops each connection.
    """
    servers = []

    def start(body: bytes, *, ranges: bool = True, drop_after: int | None = None, status: int = 200) -> list:
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.headers["Range"])
                start = int(self.headers["Range"][6:-1]) if ranges and self.headers["Range"] else 0
                self.send_response(206 if start else status)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:][:drop_after])

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setitem(DATASETS, "small", dataclasses.replace(DATASETS["small"], url=url))
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def prepared_text(folder: Path) -> str:
    ids = np.concatenate([TokenFile(folder / f"tiny_shakespeare_{part}.bin")[:] for part in ("val", "train")])
    return gpt2_tokenizer().decode(ids[ids != 50256])


# Preparing datasets


def test_tinyshakespeare_tokens_are_the_published_ones(shakespeare, tmp_path, capsys):
    """From the real text come llm.c's two files to the byte, and training's first shuffled batch begins as llm.c's."""
    folder = tmp_path / "tokens"
    prepare("tinyshakespeare", folder, shakespeare)
    assert f"wrote {folder / 'tiny_shakespeare_train.bin'}" in capsys.readouterr().out
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.bin")}
    assert hashes == {
        "tiny_shakespeare_train.bin": "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8",
        "tiny_shakespeare_val.bin": "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62",
    }
    assert TokenFile(folder / "tiny_shakespeare_val.bin")[:8].tolist() == [50256, 5962, 22307, 25, 198, 8421, 356, 5120]
    opened = open_data(str(folder), 4, 64, V)
    assert batches(opened.train, 1).ravel()[:6].tolist() == [673, 438, 13482, 1334, 477, 4302]
    as_text = open_data(str(shakespeare), 4, 64, V)
    np.testing.assert_array_equal(batches(as_text.train, 3), batches(open_data(str(folder), 4, 64, V).train, 3))


def test_a_download_is_fetched_checked_tokenized_and_removed(cache, capsys, serve):
    """One request brings the file; afterwards the two token files are there, and no download; a second prepare asks for nothing."""
    asked = serve(TEXT.encode())
    assert main(["prepare", "small"]) == 0
    folder = cache / "small"
    assert prepared_text(folder) == TEXT
    assert sorted(os.listdir(folder)) == [".lock", "tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"]
    assert main(["prepare", "small"]) == 0
    assert asked == [None]
    shown = capsys.readouterr()
    assert "already prepared" in shown.out
    assert "downloading: 0.2 MB, done after 0:00" in shown.err


def test_a_dropped_connection_is_taken_up_where_it_broke(cache, serve):
    """When the server drops every connection after 100,000 bytes, the rest is asked for from there, until all has come."""
    asked = serve(TEXT.encode(), drop_after=100_000)
    prepare("small")
    assert asked == [None, "bytes=100000-", "bytes=200000-"]
    assert prepared_text(cache / "small") == TEXT


def test_a_part_of_an_earlier_run_is_continued(cache, serve):
    """A `.part` file from before is kept, and only the rest is asked for."""
    part = DATASETS["small"].folder / "input.txt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(TEXT.encode()[:1000])
    asked = serve(TEXT.encode())
    prepare("small")
    assert asked == ["bytes=1000-"]
    assert prepared_text(cache / "small") == TEXT


def test_a_server_without_ranges_sends_all_again(cache, tmp_path, serve):
    """If the server ignores the range, the download starts clean; if it also breaks always at one place, that ends in an error."""
    part = tmp_path / "x.part"
    part.write_bytes(b"something else")
    serve(TEXT.encode(), ranges=False)
    download(DATASETS["small"].url, part, len(TEXT), "", seconds=5)
    assert part.read_text() == TEXT
    part.unlink()
    asked = serve(TEXT.encode(), ranges=False, drop_after=500)
    with pytest.raises(UserError, match=r"stopped sending; 500 of 2\d\d,\d+ bytes are here, run again to go on"):
        download(DATASETS["small"].url, part, len(TEXT), "", seconds=5)
    assert asked == [None, "bytes=500-"]


def test_a_damaged_download_is_deleted(cache, serve):
    """Content with another SHA-256 is not used and not kept, so that the next run begins clean."""
    serve(TEXT.upper().encode())
    with pytest.raises(UserError, match=r"damaged and is deleted: wanted SHA-256 .* got .* run again"):
        prepare("small")
    assert os.listdir(cache / "small") == [".lock"]


def test_no_answer_is_told(cache, capsys, serve):
    """A closed port and an error page end in exit code 2 and one line with the reason and the way out."""
    assert main(["prepare", "small"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("taskgpt data: error: http://127.0.0.1:9/small.txt: Connection refused; ")
    assert "--from FILE" in line
    serve(b"", status=404)
    assert main(["prepare", "small"]) == 2
    assert "the server answers 404 Not Found" in capsys.readouterr().err


def test_a_silent_server_is_given_up_in_time(cache, monkeypatch):
    """An address that never answers costs the seconds that were given, and no more."""
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: threading.Event().wait())
    with pytest.raises(UserError, match=r"no answer within 0\.1 seconds"):
        prepare("small", seconds=0.1)


def test_another_source_file_is_refused(cache, tmp_path):
    """--from takes only the file with the dataset's SHA-256, and never deletes it."""
    (tmp_path / "mine.txt").write_text(TEXT.upper())
    with pytest.raises(UserError, match=r"mine.txt: this is not small's small.txt: wanted SHA-256 "):
        prepare("small", source=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").is_file()
    with pytest.raises(UserError, match=r"none.txt: cannot read: No such file"):
        prepare("small", source=tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"/dev/zero: cannot read: Not a regular file"):
        prepare("small", source=Path("/dev/zero"))


def test_runs_started_together_prepare_once(cache, serve):
    """A second run waits for the first one and then finds its files."""
    asked, said = serve(TEXT.encode()), []
    waits = threading.Event()

    def say(line: str):
        said.append(line)
        waits.set()

    with downloads.only_one(cache / "small", print):
        second = threading.Thread(target=prepare, args=["small"], kwargs={"say": say})
        second.start()
        assert waits.wait(5)
        for part in ("train", "val"):
            write_tokens(cache / "small" / f"tiny_shakespeare_{part}.bin", [1])
    second.join(5)
    assert ["waiting for another run" in said[0], "already prepared" in said[1]] == [True, True]
    assert asked == []


def test_what_is_prepared_needs_no_writing(cache, monkeypatch, capsys, serve):
    """In a cache that can only be read, prepare says that all is there."""
    serve(TEXT.encode())
    prepare("small")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    assert main(["prepare", "small"]) == 0
    assert "already prepared" in capsys.readouterr().out


def stories(shard: int) -> list[dict]:
    return [{"story": f" Story {i} of shard {shard}.\n", "source": "made up"} for i in range(20)]


@pytest.fixture
def archive(tmp_path) -> Path:
    """A small TinyStories: three shards in another order than their names', with a folder, a wicked name and a stranger among them."""
    path = tmp_path / "stories.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [
            ("./data02.json", json.dumps(stories(2))),
            ("../../data00.json", json.dumps(stories(0))),
            ("readme.txt", "hello"),
            ("._data00.json", "an attribute file of a Mac"),
            ("data01.json", json.dumps(stories(1))),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


def test_tinystories_are_shuffled_as_in_llmc_and_in_the_order_of_names(archive, tmp_path):
    """Shard 0 is for validation; each shard is shuffled with seed 1337 + its place in its part; the rest of the archive goes nowhere."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_tinystories(archive, folder)
    for part, shards in (("val", [0]), ("train", [1, 2])):
        expected = []
        for place, shard in enumerate(shards):
            told = stories(shard)
            random.Random(1337 + place).shuffle(told)
            expected += [entry["story"].strip() for entry in told]
        ids = TokenFile(folder / f"TinyStories_{part}.bin")[:]
        assert gpt2_tokenizer().decode(ids).split("<|endoftext|>") == ["", *expected]
    assert sorted(os.listdir(folder)) == ["TinyStories_train.bin", "TinyStories_val.bin"]
    assert os.listdir(tmp_path / "a") == ["b"]


def test_tinystories_hold_one_shard_at_a_time(archive, tmp_path, monkeypatch):
    """A shard's tokens are written before the next shard is read."""
    steps = []
    loads, append = json.loads, TokenWriter.append
    monkeypatch.setattr(datasets.json, "loads", lambda text: steps.append("read") or loads(text))
    monkeypatch.setattr(TokenWriter, "append", lambda writer, ids: steps.append("write") or append(writer, ids))
    write_tinystories(archive, tmp_path)
    assert [step for step in steps if step] == ["read", "write"] * 3


def test_a_stopped_tokenization_leaves_nothing(archive, tmp_path, monkeypatch):
    """Ctrl-C among the stories removes the unpacked shards and the unfinished file; what a killed run left is removed by the next one."""
    whole = archive.read_bytes()
    source = {"num_bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    monkeypatch.setitem(DATASETS, "tinystories", dataclasses.replace(DATASETS["tinystories"], **source))
    folder = tmp_path / "out"
    (folder / UNPACKED).mkdir(parents=True)
    (folder / UNPACKED / "data00.json").write_text("[]")
    (folder / ".TinyStories_train.bin.tmp123").write_text("half")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random.Random, "shuffle", stop)
        assert main(["prepare", "tinystories", "--from", str(archive), "--folder", str(folder)]) == 130
    assert os.listdir(folder) == [".lock"]
    assert main(["prepare", "tinystories", "--from", str(archive), "--folder", str(folder)]) == 0
    assert len(os.listdir(folder)) == 3


# Opening data


@pytest.mark.parametrize("vocab_size", [V, 300])
def test_without_network_training_reads_pythons_reference(cache, vocab_size):
    """An empty cache and no network: tinyshakespeare gives way to pydoc_data.topics. One line says so, which Python's, and what to do."""
    said = []
    opened = open_data("tinyshakespeare", 4, 64, vocab_size, said.append)
    name = f"the language reference of Python {platform.python_version()}"
    assert len(said) == 1
    assert "Connection refused" in said[0]
    assert f"training on {name} (pydoc_data.topics) instead, so that losses compare only with those of this version of Python" in said[0]
    assert "taskgpt data prepare tinyshakespeare" in said[0]
    assert opened.description.startswith(f"{name}: ")
    assert opened.val.num_tokens == min(32768, (opened.val.num_tokens + opened.train.num_tokens) // 10)
    assert opened.tokenizer is (gpt2_tokenizer() if vocab_size == V else byte_tokenizer())


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_where_there_is_no_home(home, tmp_path, monkeypatch, capsys):
    """A user whom the system does not know, HOME unset, empty or relative: training has a text; the rest says in a line what to set."""

    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")  # which does not count
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.chdir(tmp_path)
    complaint = "no cache folder: HOME is not set, and user 0 has no home; set XDG_CACHE_HOME to a folder's full path".replace(
        "0", str(os.getuid())
    )
    said = []
    assert open_data("tinyshakespeare", 4, 64, V, said.append).train.num_tokens > 10_000
    assert complaint in said[0]
    with pytest.raises(UserError, match=complaint):
        open_data("tinystories", 4, 64, V)
    assert main(["prepare", "tinyshakespeare"]) == 2
    assert capsys.readouterr().err == f"taskgpt data: error: {complaint}\n"
    assert main(["list", "--wide"]) == 0
    assert capsys.readouterr().out.count(complaint) == 2
    assert os.listdir(tmp_path) == []


def test_a_large_dataset_is_never_downloaded_unasked(cache):
    """tinystories that is not prepared gives an error with the command and its size."""
    with pytest.raises(UserError, match=r"do: taskgpt data prepare tinystories \(downloads 1.6 GB\)"):
        open_data("tinystories", 4, 64, V)


def test_a_small_vocabulary_reads_bytes(cache, tmp_path, serve):
    """Below 50,257 ids, text is bytes with 256 between documents: a text file, a prepared dataset; below 257 ids, an error."""
    (tmp_path / "x.txt").write_text("é one\n\ntwo\n" * 100, "utf-8")
    opened = open_data(str(tmp_path / "x.txt"), 1, 8, 257)
    assert batches(opened.val, 1)[0, 0].ravel().tolist() == [256, *"é one\n".encode()]
    assert "in bytes, as a vocabulary of 257 is too small" in opened.description

    serve(TEXT.encode())
    prepare("small")
    opened = open_data("small", 1, 16, 300)
    assert batches(opened.val, 1)[0, 0].ravel().tolist() == [256, *b"First Citizen:\n"]
    assert opened.train.num_tokens + opened.val.num_tokens == len(TEXT) + TEXT.count("\n\n") + 1
    assert opened.tokenizer is byte_tokenizer()

    for spec in ("tinyshakespeare", str(tmp_path / "x.txt")):
        with pytest.raises(UserError, match="vocabulary of 256 is too small for GPT-2's encoding of 50257 ids, and even for bytes"):
            open_data(spec, 1, 8, 256)


def test_validation_gets_the_first_tenth_of_a_text_but_a_batch_at_least(tmp_path):
    """A long text gives its first tenth, a short one as much as a batch needs but half at most; both parts together are the text."""
    (tmp_path / "x.txt").write_text("a" * 999)  # 1,000 tokens in bytes
    sizes = {}
    for T in (8, 400):
        opened = open_data(str(tmp_path / "x.txt"), 1, T, 257)
        sizes[T] = opened.val.num_tokens, opened.train.num_tokens
    assert sizes == {8: (100, 900), 400: (401, 599)}
    with pytest.raises(UserError, match=r"x.txt, train part: 500 tokens, but .* need at least 1,025; batch size 1 with .* 499 would fit"):
        open_data(str(tmp_path / "x.txt"), 1, 1024, 257)


def test_text_as_people_have_it(tmp_path):
    """Line ends of Windows and of old Macs, and a byte-order mark, are taken as what they mean."""
    (tmp_path / "unix.txt").write_bytes(b"one\n\ntwo\n" * 50)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\n\r\ntwo\r\n" * 50)
    (tmp_path / "mac.txt").write_bytes(b"one\r\rtwo\r" * 50)
    unix, windows, mac = (batches(open_data(str(tmp_path / f"{name}.txt"), 2, 8, V).val, 5) for name in ("unix", "windows", "mac"))
    np.testing.assert_array_equal(unix, windows)
    np.testing.assert_array_equal(unix, mac)


@pytest.mark.parametrize(("vocab_size", "end"), [(V, 50256), (257, 256)])
def test_end_of_text_in_a_text_ends_a_document(tmp_path, vocab_size, end):
    """Where a text has `<|endoftext|>`, it is the token, empty lines are none, nothing is spelt out or doubled, and a line tells so."""
    (tmp_path / "x.txt").write_text("<|endoftext|>One.\n\nStill one.\n<|endoftext|>\nTwo.<|endoftext|>" * 40)
    said = []
    opened = open_data(str(tmp_path / "x.txt"), 1, 16, vocab_size, said.append)
    assert said == [f"{tmp_path / 'x.txt'}: documents end where <|endoftext|> is written, which is 120 times, and not at empty lines"]
    ids = opened.val._tokens[0].tolist() + opened.train._tokens[0].tolist()
    assert opened.tokenizer.decode(ids) == "<|endoftext|>One.\n\nStill one.\n<|endoftext|>\nTwo." * 40
    assert ids.count(end) == 80


LETTERS = "First Citizen:\nBefore we proceed, hear me speak.\n"


@pytest.mark.parametrize("mark", [False, True], ids=["without_mark", "with_mark"])
@pytest.mark.parametrize("text", [LETTERS * 40, LETTERS.translate({c: c + 0x390 for c in range(64, 128)}) * 40], ids=["latin", "greek"])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_a_text_in_wide_characters_is_named(tmp_path, encoding, text, mark):
    """UTF-16 and UTF-32 of both byte orders, with a byte-order mark or not: what it is, and the command that converts it."""
    (tmp_path / "x.txt").write_bytes(("\ufeff" * mark + text).encode(encoding))
    with pytest.raises(UserError, match=f"x.txt: not a text in UTF-8: it looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8$"):
        open_data(str(tmp_path / "x.txt"), 1, 8, V)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("né".encode("latin-1"), "byte 0xe9 at position 1; convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8$"),
        (b"\xef\xbb\xbf" + "né".encode("latin-1"), "byte 0xe9 at position 1; convert it"),
        (b"a\0b" + LETTERS.encode(), "byte 0x00 at position 1, which no text has"),
        (np.random.default_rng(0).zipf(1.3, 5000).clip(0, 50256).astype("<u2").tobytes(), r"byte 0x00 at position \d+, which no text has"),
    ],
    ids=["latin1", "latin1_after_a_mark", "zero", "nanogpt_tokens"],
)
def test_what_is_no_text_is_told(tmp_path, content, message):
    """Text in another encoding of single bytes, and binary files, token ids without llm.c's header among them."""
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"x.txt: not a text in UTF-8: {message}"):
        open_data(str(tmp_path / "x.txt"), 1, 8, V)


def test_a_text_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    """Before it is read: with the sizes, and what to do."""
    (tmp_path / "x.txt").write_bytes(b"text\n" * 1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 29_999}))
    with pytest.raises(UserError, match=r"x.txt: a text of 0.0 GB or more needs 6 times as much memory .* taskgpt data prepare FILE"):
        open_data(str(tmp_path / "x.txt"), 1, 8, V)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 30_000}))
    open_data(str(tmp_path / "x.txt"), 1, 8, V)


def test_a_text_comes_through_a_pipe(tmp_path):
    """What the shell makes of `--data <(zcat text.gz)` is read to its end; a pipe without a writer is an empty text, and waits for none."""
    reading, writing = os.pipe()
    os.write(writing, b"one\n\ntwo\n" * 50)
    os.close(writing)
    assert open_data(f"/dev/fd/{reading}", 1, 8, V).train.num_tokens > 50
    os.close(reading)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: the text is empty"):
        open_data(str(tmp_path / "pipe"), 1, 8, V)


def test_strange_file_names_stay_in_one_line(tmp_path):
    """Names with line ends, escapes and bytes that are no UTF-8: read, and shown as one printable line."""
    for name in (b"two\nlines", b"\x1b[31mred", b"\xff\xfe", "naïve name".encode()):
        path = os.fsdecode(os.path.join(os.fsencode(tmp_path), name))
        Path(path).write_bytes(LETTERS.encode() * 10)
        assert open_data(path, 1, 8, V).description.isprintable()
        Path(path).write_bytes(b"")
        with pytest.raises(UserError) as error:
            open_data(path, 1, 8, V)
        assert str(error.value).isprintable()


def test_folders_and_patterns_of_token_files(tmp_path):
    """A folder or a pattern gives its train and val files in the order of their names; without a tokenizer ids are shown as numbers."""
    for i, name in enumerate(["a_train_2.bin", "a_train_1.bin", "a_val_1.bin", "b_val_1.bin"]):
        write_tokens(tmp_path / name, [i] * 9)
    opened = open_data(str(tmp_path), 1, 8, 60)
    assert (opened.train.num_tokens, opened.val.num_tokens) == (18, 18)
    assert batches(opened.val, 2)[:, 0, 0, 0].tolist() == [2, 3]
    assert (opened.tokenizer.decode([7]), opened.tokenizer.end_of_text) == ("<|7|>", 0)
    assert open_data(str(tmp_path / "a_*.bin"), 1, 8, 60).val.num_tokens == 9
    assert open_data(str(tmp_path), 1, 8, V).tokenizer is gpt2_tokenizer()
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(header(20240328, 2, 2, 1) + b"\1a\1b")
    assert open_data(str(tmp_path), 1, 8, 60).tokenizer.decode([1, 0]) == "ba"
    with pytest.raises(UserError, match="end of text is 1, outside the model's vocabulary of 1"):
        open_data(str(tmp_path), 1, 8, 1)


def test_hidden_files_do_not_count(tmp_path):
    """A Mac's `._` files beside token files and tokenizers, and unfinished files, are passed over in folders and patterns."""
    for part in ("train", "val"):
        write_tokens(tmp_path / f"a_{part}.bin", [1] * 9)
        (tmp_path / f"._a_{part}.bin").write_bytes(b"\0\5\x16\7 attributes of a Mac")
    (tmp_path / "._tokenizer.bin").write_bytes(b"\0\5\x16\7 attributes of a Mac")
    for spec in (tmp_path, tmp_path / "*.bin", tmp_path / ".*.bin"):
        if spec.name == ".*.bin":
            with pytest.raises(UserError, match="found 0 and 0 of them among 0 files"):
                open_data(str(spec), 1, 8, V)
        else:
            assert open_data(str(spec), 1, 8, V).train.num_tokens == 9


def test_gpt2s_own_tokenizer_file_can_also_encode(tmp_path):
    """A folder with llm.c's gpt2_tokenizer.bin gets the tokenizer that encodes, too."""
    write_tokens(tmp_path / "train.bin", [1] * 9)
    write_tokens(tmp_path / "val.bin", [1] * 9)
    pieces = b"".join(bytes([len(piece)]) + piece for piece in gpt2_tokenizer().pieces)
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(header(20240328, 2, V, 50256) + pieces)
    assert open_data(str(tmp_path), 1, 8, V).tokenizer is gpt2_tokenizer()


def test_data_that_is_not_there_is_told(tmp_path, cache):
    """Each way to miss the data has its message: a misspelt name, no file, an empty or foreign text, half a folder, one file of two."""
    write_tokens(tmp_path / "train.bin", [1] * 9)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "nowhere.txt").symlink_to("none")
    (tmp_path / "folder").mkdir()
    (tmp_path / "both").mkdir()
    for name in ("train", "val", "train_val"):
        write_tokens(tmp_path / "both" / f"{name}.bin", [1] * 9)
    for spec, message in {
        "tinyshakespere": "no such file or folder, and no such dataset; did you mean 'tinyshakespeare'",
        "none.txt": "no such file or folder",
        f"{tmp_path}/empty.txt": "empty.txt: the text is empty",
        f"{tmp_path}/loop.txt": "loop.txt: cannot read: Too many levels of symbolic links",
        f"{tmp_path}/nowhere.txt": "no such file or folder",
        f"{tmp_path}/empty.txt/x": "cannot read: Not a directory",
        "/dev/zero": "/dev/zero: cannot read: Not a regular file",
        f"{tmp_path}/folder": r"looked for .*\*train\*.bin and \*val\*.bin, found 0 and 0 of them among 0 files",
        f"{tmp_path}": "found 1 and 0 of them among 1 files",
        f"{tmp_path}/val*.bin": "found 0 and 0 of them among 0 files",
        f"{tmp_path}/train.bin": "train.bin: this is an llm.c token file, and a text is wanted; give its folder to --data, or a pattern",
        f"{tmp_path}/both": "both/train_val.bin: is it for training or for validation",
        "~nosuchuser/x.txt": "no such file or folder",
        "x" * 300: "File name too long",
    }.items():
        with pytest.raises(UserError, match=message):
            open_data(spec, 1, 8, V)


def test_data_that_may_not_be_read_is_told(tmp_path, cache, monkeypatch):
    """No permission for a file or for the folder that it is in; a dataset in such a folder counts as not prepared."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "x.txt").write_text("x")
    for module, function in ((os, "open"), (Path, "stat")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"x\.txt: cannot read: Permission denied; choose"):
            patch.setattr(module, function, refuse)
            open_data(str(tmp_path / "x.txt"), 1, 8, V)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="tinystories is not in"):
        patch.setattr(os, "stat", refuse)
        open_data("tinystories", 1, 8, V)


@pytest.mark.parametrize("name", ["x.txt", "train.bin", "tokenizer.bin"])
def test_garbage_is_a_users_mistake(tmp_path, name):
    """Random bytes in place of a text, of tokens or of a tokenizer are refused."""
    for part in ("train", "val"):
        write_tokens(tmp_path / f"{part}.bin", [1] * 9)
    (tmp_path / name).write_bytes(random.Random(1).randbytes(5000))
    with pytest.raises(UserError, match=name):
        open_data(str(tmp_path / name if name == "x.txt" else tmp_path), 1, 8, V)


# The program


def test_mistakes_end_with_code_2(capsys):
    """An unknown dataset gives one line on stderr with a guess; no command gives the usage."""
    assert main(["prepare", "tinystory"]) == 2
    assert capsys.readouterr().err == (
        "taskgpt data: error: 'tinystory': no such file or folder, and no such dataset; did you mean 'tinystories'?\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_list_shows_what_is_where(cache, capsys):
    """`list` tells for each dataset whether it is prepared, how much of it is downloaded, and its folder."""
    folder = cache / "tinystories"
    folder.mkdir(parents=True)
    DATASETS["tinystories"].part(folder).write_bytes(bytes(2_500_000))
    assert main(["list", "--wide"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^tinyshakespeare +not prepared; a download of 1.1 MB  ", shown, re.M)
    assert re.search(r"^small +not prepared; a download of 0.2 MB  ", shown, re.M)
    assert re.search(r"^tinystories +not prepared; a download of 1,608.0 MB, of which 2.5 MB are here", shown, re.M)
    write_tokens(folder / "TinyStories_train.bin", [1, 2, 3])
    write_tokens(folder / "TinyStories_val.bin", [1])
    assert main(["list", "--wide"]) == 0
    assert re.search(rf"3 train and 1 val tokens +{folder}$", capsys.readouterr().out, re.M)


def test_ctrl_c_ends_with_code_130(tmp_path):
    """A real interrupt of the real program, while it waits for another run, ends with a line and code 130."""
    with downloads.only_one(tmp_path, print):
        command = [sys.executable, "-um", "taskgpt", "data", "prepare", "tinyshakespeare", "--folder", str(tmp_path)]
        root = Path(taskgpt.__file__).parents[1]
        with started(command, cwd=root) as program:
            assert "waiting for another run" in program.stdout.readline()
            program.send_signal(signal.SIGINT)
            assert "interrupted" in program.communicate(timeout=10)[1]
    assert program.returncode == 130
