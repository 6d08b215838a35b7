"""Checkpoints are llm.c's: read, written byte for byte, and refused with a reason."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from taskgpt.errors import UserError
from taskgpt.gpt2.checkpoints import llmc
from taskgpt.gpt2.model import GPT2


@pytest.fixture
def damaged(parity_folder, tmp_path):
    """Return a function that writes the parity checkpoint with some header words changed, cut to `size` bytes, and returns its path."""

    def write(size: int | None = None, **words: int):
        data = bytearray((parity_folder / "model.bin").read_bytes())
        for word, value in words.items():
            at = 4 * int(word.removeprefix("w"))
            data[at : at + 4] = np.int32(value).tobytes()
        path = tmp_path / "model.bin"
        path.write_bytes(data[:size])
        return path

    return write


def test_shape_comes_from_the_header(parity_folder):
    """All six numbers, the padded vocabulary included."""
    model = llmc.read_shape(parity_folder / "model.bin")
    assert (model.layers, model.heads, model.channels, model.vocabulary, model.max_seq_len, model.padded_vocabulary) == (
        2,
        2,
        32,
        200,
        64,
        256,
    )


def test_saving_what_was_loaded_gives_the_same_file(parity_folder, parity_model, tmp_path):
    """Byte for byte, and nothing else is left in the folder."""
    llmc.save(tmp_path / "copy.bin", parity_model.model, parity_model.parameters)
    assert (tmp_path / "copy.bin").read_bytes() == (parity_folder / "model.bin").read_bytes()
    assert os.listdir(tmp_path) == ["copy.bin"]


def test_bfloat16_checkpoints_are_converted(parity_folder, parity_model, tmp_path):
    """Version 5: each value is a float32's upper half."""
    words = np.fromfile(parity_folder / "model.bin", "<u4")
    header = words[:256].copy()
    header[1] = 5
    path = tmp_path / "half.bin"
    path.write_bytes(header.tobytes() + (words[256:] >> 16).astype("<u2").tobytes())
    half = GPT2(llmc.read_shape(path), parity_model.batch, parity_model.grid.tiles, parity_model.options)
    llmc.load(path, half.model, half.parameters)
    for name, tensor in parity_model.p.tensors.items():
        want = (np.ascontiguousarray(tensor.array).view(np.uint32) >> 16 << 16).view(np.float32)
        np.testing.assert_array_equal(half.p.tensors[name].array, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w0": 1}, "not an llm.c checkpoint: wanted magic number 20240326, got 1"),
        ({"w1": 1}, "version 1; wanted 3"),
        ({"w1": 2}, "train_gpt2.py"),
        ({"size": 100}, "truncated: a checkpoint begins with 1024 bytes, got 100"),
        ({"size": 5000}, "truncated: a checkpoint of this shape has 143,872 bytes, got 5,000"),
        ({"w4": 1}, "too long"),
        ({"w4": 0}, "damaged header: layers = 0"),
        ({"w5": 5}, "damaged header: channels = 32 is not a multiple of heads = 5"),
        ({"w7": 100}, "damaged header: padded_vocabulary = 100 is smaller"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_the_reason(damaged, change, message):
    """One message that names the file, what was wanted and what was found."""
    path = damaged(**change)
    with pytest.raises(UserError, match=r"model\.bin") as error:
        llmc.read_shape(path)
    assert message in str(error.value)


def test_what_cannot_be_read_is_a_users_mistake(parity_folder, parity_model, tmp_path, monkeypatch):
    """No traceback: the system's reason. Missing, a folder, empty, a device, without permission, shortened after its header was read."""
    (tmp_path / "empty.bin").touch()
    for path, reason in {
        tmp_path / "none.bin": "cannot read the checkpoint: No such file",
        tmp_path: "cannot read the checkpoint: Is a directory",
        tmp_path / "empty.bin": "truncated: a checkpoint begins with 1024 bytes, got 0",
        os.devnull: "cannot read the checkpoint: Not a regular file",
    }.items():
        for read in (llmc.read_shape, lambda path: llmc.load(path, parity_model.model, parity_model.parameters)):
            with pytest.raises(UserError, match=f"{path}: {reason}"):
                read(path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Permission denied; name a checkpoint file"):
        patch.setattr(os, "stat", refuse)
        llmc.read_shape(parity_folder / "model.bin")
    (tmp_path / "short.bin").write_bytes((parity_folder / "model.bin").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"short\.bin: truncated: it became shorter while it was read"):
        llmc.load(tmp_path / "short.bin", parity_model.model, parity_model.parameters)


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_where_saving_cannot_succeed_it_is_refused_beforehand(parity_model, tmp_path, monkeypatch):
    """A folder or a device in place of a file, a folder that does not exist or may not be searched, a disk without room."""
    with pytest.raises(UserError, match="is a folder"):
        llmc.verify_can_save(tmp_path, parity_model.p.nbytes)
    with pytest.raises(UserError, match="there is no folder"):
        llmc.verify_can_save(tmp_path / "none" / "model.bin", parity_model.p.nbytes)
    with pytest.raises(UserError, match="null: cannot write: Not a regular file"):
        llmc.verify_can_save(os.devnull, parity_model.p.nbytes)
    with pytest.raises(UserError, match="null: cannot write: Not a regular file"):
        llmc.save(os.devnull, parity_model.model, parity_model.parameters)
    for module, function in ((Path, "is_dir"), (os, "stat")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=r"model\.bin: cannot write: Permission denied"):
            patch.setattr(module, function, refuse)
            llmc.verify_can_save(tmp_path / "model.bin", parity_model.p.nbytes)
    llmc.verify_can_save(tmp_path / "model.bin", parity_model.p.nbytes)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="the disk has 10 left"):
        llmc.verify_can_save(tmp_path / "model.bin", parity_model.p.nbytes)


def test_a_disk_that_fills_up_leaves_no_half_file_and_keeps_the_old_one(parity_model, tmp_path, monkeypatch):
    """The write is atomic: the old checkpoint survives."""
    path = tmp_path / "model.bin"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        llmc.save(path, parity_model.model, parity_model.parameters)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_only_a_checkpoint_is_overwritten(parity_model, parity_folder, tmp_path):
    """A text or the training data in --save's place is refused; an earlier checkpoint is not."""
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "model.bin").write_bytes((parity_folder / "model.bin").read_bytes())
    llmc.verify_can_save(tmp_path / "model.bin", parity_model.p.nbytes)
    with pytest.raises(UserError, match="is no checkpoint; name another file"):
        llmc.verify_can_save(tmp_path / "notes.txt", parity_model.p.nbytes)
