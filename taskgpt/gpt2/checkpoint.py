"""llm.c's model checkpoints: a header of 256 int32 and the 16 parameter tensors, in the order of `Model.parameter_shapes`.

Version 3 holds float32, version 5 bfloat16; both have the vocabulary padded to a multiple of 128. Source: llm.c, `train_gpt2.py`
(`write_model`) and `train_gpt2.c` (`gpt2_build_from_checkpoint`).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from taskgpt.errors import UserError
from taskgpt.gpt2.model import GPT2, Model
from taskgpt.gpt2.tokens import HEADER_BYTES, HEADER_WORDS, atomic_file, cannot_write, file_size, write_target

MAGIC, FLOAT32, BFLOAT16 = 20240326, 3, 5
_CHUNK = 1 << 22  # elements converted from bfloat16 at a time


def read_shape(path: str | Path) -> Model:
    """Return the model's shape from a checkpoint's header, having checked that the file is whole.

    Raises UserError for a missing, unreadable, truncated or foreign file, or an old version.
    """
    header = _header(path)
    fields = dict(
        zip(("max_seq_len", "vocabulary", "layers", "heads", "channels", "padded_vocabulary"), map(int, header[2:8]), strict=True)
    )
    for name, value in fields.items():
        if value < 1:
            raise UserError(f"{path}: damaged header: {name} = {value}; get the file again")
    try:
        model = Model(**fields)
    except ValueError as error:
        raise UserError(f"{path}: damaged header: {error}; get the file again") from None
    element = 4 if header[1] == FLOAT32 else 2
    wanted = HEADER_BYTES + element * sum(int(np.prod(shape)) for shape in model.parameter_shapes().values())
    with _reading(path):
        got = file_size(path)
    if got != wanted:
        what = "truncated" if got < wanted else "too long"
        raise UserError(f"{path}: {what}: a checkpoint of this shape has {wanted:,} bytes, got {got:,}; get the file again")
    return model


def load(path: str | Path, m: GPT2) -> None:
    """Fill the parameters from a checkpoint of the model's shape. Raises UserError as `read_shape` does."""
    version = _header(path)[1]
    offset = HEADER_BYTES
    with _reading(path):
        for tensor in m.p.tensors.values():
            flat = tensor.array.reshape(-1)
            if version == FLOAT32:
                flat[:] = np.memmap(path, "<f4", "r", offset, flat.shape)
                offset += 4 * flat.size
            else:
                halves = np.memmap(path, "<u2", "r", offset, flat.shape)
                for at in range(0, flat.size, _CHUNK):  # a bfloat16 is the upper half of a float32
                    flat[at : at + _CHUNK] = (halves[at : at + _CHUNK].astype(np.uint32) << 16).view(np.float32)
                offset += 2 * flat.size


def save(path: str | Path, m: GPT2) -> None:
    """Write the parameters as version 3; the file appears whole or not at all. Raises UserError if it cannot be written."""
    model = m.model
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:8] = [MAGIC, FLOAT32, model.max_seq_len, model.vocabulary, model.layers, model.heads, model.channels, model.padded_vocabulary]
    with atomic_file(path) as file:
        file.write(header.tobytes())
        for tensor in m.p.tensors.values():
            file.write(tensor.array.astype("<f4", copy=False).data)


def verify_can_save(path: str | Path, m: GPT2) -> None:
    """Raise UserError if `save` could not succeed now: better before the training than after it."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name the file to write, for example {path / 'model.bin'}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}; make it first")
        target = write_target(path)
        if target.exists() and np.fromfile(target, "<i4", 1).tolist() != [MAGIC]:
            raise UserError(f"{path}: is there already and is no checkpoint; name another file")
        probe = target.with_name(f".{target.name}.probe")
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise cannot_write(path, error) from None
    if free < m.p.nbytes + HEADER_BYTES:
        raise UserError(f"{path}: the checkpoint needs {m.p.nbytes:,} bytes, the disk has {free:,} left; free some space")


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Answer what the system refuses inside the block."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: from mmap, the file became shorter
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read the checkpoint: {reason}; name a checkpoint file that you may read") from None


def _header(path: str | Path) -> np.ndarray:
    with _reading(path):
        size = file_size(path)
        header = np.fromfile(path, "<i4", min(HEADER_WORDS, size // 4))
    if len(header) < HEADER_WORDS:
        raise UserError(f"{path}: truncated: a checkpoint begins with {HEADER_BYTES} bytes, got {size}; get the file again")
    if header[0] != MAGIC:
        raise UserError(f"{path}: not an llm.c checkpoint: wanted magic number {MAGIC}, got {header[0]}")
    if header[1] not in (FLOAT32, BFLOAT16):
        raise UserError(
            f"{path}: checkpoint version {header[1]}; wanted {FLOAT32} (float32) or {BFLOAT16} (bfloat16), both with a padded vocabulary; "
            "write it again with a current llm.c: python train_gpt2.py"
        )
    return header
