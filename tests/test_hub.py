"""OpenAI's models by name: downloaded once, whole and checked or not at all, and told in a line if not."""

import hashlib
import http.server
import os
import shutil
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from programs import started

from taskgpt.errors import UserError
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import hub
from taskgpt.gpt2.checkpoints.hub import PUBLISHED, Published
from taskgpt.gpt2.shape import Model
from taskgpt.programs.convert import main as convert

MODEL = Model(1, 2, 128, 257, 64)
FILES = ("config.json", "model.safetensors")
CUT = 100_000  # bytes, of some 900,000


class Server:
    """A hub of one model, in `files`: each file is a redirect to another path, which answers ranges. asked: (path, range) of each GET.

    break_after: bytes after which a connection is dropped. stalls: nothing comes after the first CUT bytes until `go_on` is set.
    """

    def __init__(self, folder: Path):
        self.files = {name: (folder / name).read_bytes() for name in FILES}
        self.asked: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        self.stalls, self.go_on = False, threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append((self.path, self.headers["Range"]))
                if self.path.startswith("/openai-community/gpt2/resolve/rev/"):
                    self.send_response(302)
                    self.send_header("Location", "/cdn/" + self.path.rpartition("/")[2])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = server.files.get(self.path.removeprefix("/cdn/"))
                if body is None:
                    self.send_error(404)
                    return
                start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
                if start >= len(body):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                if server.stalls and len(body) > CUT:
                    self.wfile.write(body[start:CUT])
                    server.go_on.wait(20)
                else:
                    self.wfile.write(body[start:][: server.break_after])

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # of a client that was killed, say
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self) -> list[str | None]:
        """Return what was asked for of the large file."""
        return [span for path, span in self.asked if path == "/cdn/model.safetensors"]

    def close(self):
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def source(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A model's folder and its parameters."""
    rng = np.random.default_rng(0)
    parameters = {name: rng.standard_normal(shape, np.float32) for name, shape in MODEL.parameter_shapes().items()}
    parameters["wte"][MODEL.vocabulary :] = 0
    checkpoints.save(tmp_path / "source", MODEL, parameters)
    return tmp_path / "source", parameters


@pytest.fixture
def server(source, tmp_path, monkeypatch):
    """A server that is the hub, whose gpt2 is the model of `source`; an empty cache; an empty folder to be in."""
    server = Server(source[0])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    digests = tuple(hashlib.sha256(server.files[name]).hexdigest() for name in FILES)
    monkeypatch.setitem(PUBLISHED, "gpt2", Published("gpt2", "rev", digests))
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "models" / "gpt2"


def refused(capsys, *words: str) -> str:
    assert convert([*words, "x.bin"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert not Path("x.bin").exists()
    return error


def test_a_name_is_a_download(server, source, folder, capsys):
    """Two files by way of a redirect, and what they hold; the next time the cache has them. Standard output has the result alone."""
    assert convert(["gpt2", "x.bin"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("x.bin: ") and shown.out.count("\n") == 1
    size = len(server.files["model.safetensors"]) / 1e6
    lines = shown.err.splitlines()
    assert lines[0].startswith("downloading gpt2/config.json: 0.0 MB, done after ")
    assert lines[1].startswith(f"downloading gpt2/model.safetensors: {size:.1f} MB, done after ")
    assert lines[2:] == [f"gpt2: model.safetensors has the published SHA-256; it stays in {folder}"]
    assert [path for path, _ in server.asked] == [
        path for name in FILES for path in (f"/openai-community/gpt2/resolve/rev/{name}", f"/cdn/{name}")
    ]
    assert sorted(os.listdir(folder)) == [".lock", *FILES]
    found = checkpoints.empty(MODEL)
    checkpoints.load("x.bin", MODEL, found)
    assert all(np.array_equal(found[name], array) for name, array in source[1].items())
    assert convert(["gpt2", "y.bin"]) == 0
    assert len(server.asked) == 4


def test_what_is_here_wins(server, source):
    """A folder, or a file, of that name is what is meant."""
    shutil.copytree(source[0], "gpt2")
    assert convert(["gpt2", "x.bin"]) == 0
    assert server.asked == []


def test_a_connection_that_breaks_is_taken_up(server, folder):
    """Where it broke, until all has come."""
    server.break_after = 3 * CUT
    hub.fetch(PUBLISHED["gpt2"])
    assert server.ranges() == [None, *(f"bytes={at}-" for at in range(3 * CUT, len(server.files["model.safetensors"]), 3 * CUT))]
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_a_killed_download_goes_on(server, folder, tmp_path, monkeypatch):
    """After kill -9 in the middle of the large file, the next run asks for the rest, and the small file is not asked for again."""
    server.stalls = True
    script = tmp_path / "script.py"
    of_test = f"Published('gpt2', 'rev', {PUBLISHED['gpt2'].sha256!r})"
    lines = ["import sys, platformdirs", f"platformdirs.user_cache_dir = lambda *_, **__: {str(tmp_path / 'cache')!r}"]
    lines += ["from taskgpt.gpt2.checkpoints.hub import PUBLISHED, Published, fetch", f"fetch({of_test})"]
    script.write_text("\n".join(lines))
    part = folder / "model.safetensors.part"
    with started([sys.executable, str(script)]) as program:
        until = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size == CUT) and time.monotonic() < until:
            time.sleep(0.01)
        program.kill()
    assert part.stat().st_size == CUT and not (folder / "model.safetensors").exists()
    server.go_on.set()
    server.stalls = False
    asked = len(server.asked)
    assert convert(["gpt2", "x.bin"]) == 0
    assert server.ranges() == [None, f"bytes={CUT}-"]
    assert len(server.asked) == asked + 2


def test_a_download_that_ended_before_it_was_checked(server, folder):
    """All of it is there, under its unfinished name: it is checked, and takes its name."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(server.files["model.safetensors"])
    assert convert(["gpt2", "x.bin"]) == 0
    assert sorted(os.listdir(folder)) == [".lock", *FILES]


@pytest.mark.parametrize("name", FILES)
def test_another_content_is_deleted(server, folder, capsys, name):
    """What has another SHA-256 than the published one never has the file's name; the next run begins that file anew."""
    good = server.files[name]
    server.files[name] = good[:-1] + bytes([good[-1] ^ 1])
    message = refused(capsys, "gpt2")
    assert f"resolve/rev/{name}: the download was damaged and is deleted: wanted SHA-256 " in message
    assert not {name, f"{name}.part"} & {*os.listdir(folder)}
    server.files[name] = good
    assert convert(["gpt2", "x.bin"]) == 0


def test_no_network_is_told(server, folder, capsys, monkeypatch):
    """Nobody listens, or the server has no such file: what to put where by hand, in a line and exit code 2."""
    server.files.pop("config.json")
    message = refused(capsys, "gpt2")
    assert (
        "resolve/rev/config.json: the server answers 404 Not Found; without a network, put config.json and model.safetensors of " in message
    )
    assert f"into {folder}, or name a folder that has them" in message
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused; without a network" in refused(capsys, "gpt2")
    for address in ("mirror", "file:///etc"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        assert f"HF_ENDPOINT={address}: wanted an address such as https://" in refused(capsys, "gpt2")


def test_files_put_by_hand_are_taken(server, source, folder):
    """Into the folder that the message names."""
    shutil.copytree(source[0], folder)
    assert convert(["gpt2", "x.bin"]) == 0
    assert server.asked == []


def test_a_server_that_stalls_is_given_up(server, folder):
    """After the seconds that were given; what came is kept."""
    server.stalls = True
    with pytest.raises(UserError, match=r"timed out; 100,000 of \d+,\d+ bytes are here, run again to go on"):
        hub.fetch(PUBLISHED["gpt2"], seconds=0.2)
    assert (folder / "model.safetensors.part").stat().st_size == CUT


def test_a_disk_without_room_is_told_before(server, folder, capsys, monkeypatch):
    """As soon as the server says how long the file is."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, 10_000))
    assert "bytes are still to come, the disk has 10,000 left; free some space" in refused(capsys, "gpt2")
    assert sorted(os.listdir(folder)) == [".lock", "config.json"]


def test_a_cache_that_cannot_be_written(server, tmp_path, capsys):
    """Where a file has the folder's name, say."""
    (tmp_path / "cache").touch()
    assert "cannot write" in refused(capsys, "gpt2")
    assert server.asked == []
