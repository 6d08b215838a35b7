"""Data by URL: copied once, whole, into the cache."""

import fsspec
import numpy as np
import pytest

from taskgpt.errors import UserError
from taskgpt.gpt2.text.data import open_data

TEXT = "To be, or not to be, that is the question.\n\n" * 200


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """A file system that is gone with the process, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_a_text_is_copied_once(memory, tmp_path):
    memory.pipe("/bucket/hamlet.txt", TEXT.encode())
    found = [open_data("memory://bucket/hamlet.txt", 2, 16, 257).fingerprint for _ in range(2)]
    assert found[0] == found[1]
    (tmp_path / "hamlet.txt").write_text(TEXT)
    assert open_data((tmp_path / "hamlet.txt").as_uri(), 2, 16, 257).fingerprint == found[0]
    [copy] = (tmp_path / "cache" / "taskgpt" / "urls").glob("*-*")
    assert (copy / "hamlet.txt").read_text() == TEXT


def test_other_content_is_another_copy(memory):
    memory.pipe("/bucket/a.txt", TEXT.encode())
    first = open_data("memory://bucket/a.txt", 2, 16, 257).fingerprint
    memory.pipe("/bucket/a.txt", TEXT.replace("be", "go").encode())
    assert open_data("memory://bucket/a.txt", 2, 16, 257).fingerprint != first


def test_a_folder_of_token_files(memory, tmp_path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 4000
    for name in ("a_train.bin", "a_val.bin"):
        memory.pipe(f"/tokens/{name}", header.tobytes() + np.arange(4000, dtype="<u2").tobytes())
    assert open_data("memory://tokens", 2, 16, 50257).train.num_tokens == 4000


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("memory://bucket/none.txt", r"none.txt: no such file or folder; name one that every host can read"),
        ("nosuch://bucket/x", r"nosuch://bucket/x: "),
        ("s3://bucket/x", r"s3://bucket/x: .*(s3fs|cannot read|no such)"),
    ],
)
def test_what_is_not_there(memory, url, says):
    with pytest.raises(UserError, match=says):
        open_data(url, 2, 16, 257)
