"""A training as it stood after a step, to go on from: taskgpt's own format, a folder with two files.

tensors.safetensors   parameters, AdamW's moments and whatever else a step hands to the next one, under our own names
checkpoint.json       all that is no tensor, the SHA-256 of tensors.safetensors, and, as its last line, that of its own bytes before it

So a byte that differs anywhere is found. A folder of such folders, a run's, stands for the newest of them.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from taskgpt.downloads import sha256_of
from taskgpt.errors import UserError, shorten
from taskgpt.files import as_written, cannot_write, file_size, fill, parse_json, read_bytes, refuse_newer, replacing_folder
from taskgpt.gpt2.shape import Model

FORMAT = 1
ABOUT, TENSORS = "checkpoint.json", "tensors.safetensors"
NAME, PATTERN = "step-{:08}", "step-*"  # of a checkpoint in a run's folder
ABOUT_BYTES = 1 << 22
_CHUNK = 1 << 22  # bytes hashed and written at a time: they fit the cache
_SYNC_EVERY = 16  # chunks: what is written goes to the disk on the way, and does not take the place of other files in memory
_TYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}
_OTHERWISE = "use the checkpoint before it, or get this one again"


@dataclass(frozen=True)
class About:
    """What checkpoint.json says. step: how many are done; sampler: the state of its random numbers, in hexadecimal digits."""

    run: str
    step: int = field(metadata={"at_least": 0})
    model: Model
    train_data: dict[str, Any]
    sampler: str
    val_loss: float | None
    made: str
    format: int = FORMAT
    taskgpt: str = field(default_factory=lambda: version("taskgpt"))

    def __post_init__(self):
        if not re.fullmatch("(?=.*[1-9a-f])[0-9a-f]{1,16}", self.sampler):  # xorshift never leaves 0
            raise ValueError(f"sampler: wanted the hexadecimal digits of 64 bits that are not all 0, got {as_written(self.sampler)}")


@dataclass(frozen=True)
class _Tensors:
    """What checkpoint.json says of tensors.safetensors."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class _File:
    about: About
    tensors: _Tensors
    sha256: str


class Cancelled(Exception):
    """The checkpoint is not to be finished."""


def save(path: Path, about: About, state: Mapping[str, np.ndarray], is_cancelled: Callable[[], bool] = lambda: False) -> int:
    """Write a checkpoint; it appears whole or not at all. Return its size in bytes.

    Raises UserError if it cannot be written, Cancelled as soon as `is_cancelled` says so.
    """
    try:
        with replacing_folder(path) as folder:
            tensors = _write_tensors(folder / TENSORS, state, is_cancelled)
            text = sealed({"about": asdict(about), "tensors": asdict(tensors)})
            (folder / ABOUT).write_bytes(text)
    except OSError as error:
        raise cannot_write(path, error) from None
    return tensors.bytes + len(text)


def _write_tensors(path: Path, state: Mapping[str, np.ndarray], is_cancelled: Callable[[], bool]) -> _Tensors:
    """Write a safetensors file as a stream; the library would hold all of it in memory once more, and hash nothing."""
    table, at = {}, 0
    arrays = sorted(state.items(), key=lambda item: -item[1].itemsize)  # so that every number lies at a multiple of its size
    for name, array in arrays:
        table[name] = {"dtype": _TYPES[array.dtype.name], "shape": array.shape, "data_offsets": [at, at := at + array.nbytes]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for number, chunk in enumerate(_chunks([len(header).to_bytes(8, "little") + header, *(array for _, array in arrays)])):
            if is_cancelled():
                raise Cancelled
            digest.update(chunk)
            left = chunk
            while left:
                left = left[file.write(left) :]
            written += len(chunk)
            if number % _SYNC_EVERY == _SYNC_EVERY - 1:
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, written, os.POSIX_FADV_DONTNEED)
    return _Tensors(written, digest.hexdigest())


def _chunks(parts: list[Any]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for at in range(0, len(view), _CHUNK):
            yield view[at : at + _CHUNK]


def sealed(content: dict[str, Any]) -> bytes:
    """Return a JSON object whose last line is the SHA-256 of what stands before it."""
    return _seal(json.dumps(content, indent=1, allow_nan=False).encode().removesuffix(b"\n}"))


def _seal(text: bytes) -> bytes:
    return text + b',\n "sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'"\n}\n'


def is_one(path: str | Path) -> bool:
    """Return True for the folder of a checkpoint, or of a run."""
    return Path(path, ABOUT).exists() or bool(checkpoints_in(path))


def checkpoints_in(path: str | Path) -> list[Path]:
    """Return the folders of checkpoints in a run's folder, the newest last; whether they are whole is not looked at."""
    return sorted((each for each in Path(path).glob(PATTERN) if each.name[5:].isdecimal()), key=lambda each: int(each.name[5:]))


def _folder(path: str | Path) -> Path:
    """Return the checkpoint's folder that a path means."""
    found = [] if Path(path, ABOUT).exists() else checkpoints_in(path)
    return found[-1] if found else Path(path)


def read_about(path: str | Path) -> About:
    """Return what a checkpoint says of itself. Raises UserError if it is damaged, incomplete, or made by a newer taskgpt."""
    return _read(_folder(path)).about


def _read(folder: Path) -> _File:
    file = folder / ABOUT
    data = read_bytes(file, ABOUT_BYTES)
    beginning = data[: -len(_seal(b""))]
    if data != _seal(beginning):
        raise UserError(f"{shorten(file)}: damaged: its SHA-256 is another than its last line says; {_OTHERWISE}")
    try:
        content = parse_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shorten(file)}: not a JSON file: {shorten(error)}; {_OTHERWISE}") from None
    refuse_newer(content.get("about"), FORMAT, file)
    return fill(_File, content, f"{shorten(file)}: ")


def verify(path: str | Path) -> About:
    """Read all of a checkpoint, and return what it says of itself. Raises UserError if a single byte of it differs."""
    folder = _folder(path)
    found, file = _read(folder), folder / TENSORS
    with _answered(file):
        if (size := file_size(file)) != found.tensors.bytes:  # which also refuses what has no end
            raise UserError(f"{shorten(file)}: damaged: wanted {found.tensors.bytes:,} bytes, got {size:,}; {_OTHERWISE}")
    if sha256_of(file) != found.tensors.sha256:
        raise UserError(f"{shorten(file)}: damaged: its SHA-256 is another than {ABOUT} says; {_OTHERWISE}")
    return found.about


def read_shape(path: str | Path) -> Model:
    """Return the model's shape. Raises UserError as `read_about` does."""
    return read_about(path).model


def load(path: str | Path, model: Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Fill the parameters, having read all of the checkpoint. Raises UserError as `verify` does, or if it is another model's."""
    folder = _folder(path)  # once: the run may make another one meanwhile
    verify(folder)
    load_state(folder, parameters)


def load_state(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Fill arrays from a verified checkpoint. Raises UserError for one that is missing there, or has another shape or type."""
    file = _folder(path) / TENSORS
    with _answered(file), safe_open(file, framework="np", backend="pread") as tensors:
        there = set(tensors.keys())
        for name, array in state.items():
            if name not in there:
                raise UserError(f"{shorten(file)}: has no tensor {name}; the checkpoint is of another model")
            found = tensors.get_slice(name)
            wanted, got = (_TYPES[array.dtype.name], list(array.shape)), (found.get_dtype(), found.get_shape())
            if wanted != got:
                raise UserError(f"{shorten(file)}: {name}: wanted {wanted}, got {got}; the checkpoint is of another model")
            array[...] = tensors.get_tensor(name)


@contextmanager
def _answered(path: Path) -> Iterator[None]:
    """Answer what the system, or the library, refuses inside the block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{shorten(path)}: cannot read the checkpoint: {error.strerror or error}; {_OTHERWISE}") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{shorten(path)}: damaged: {shorten(error)}; {_OTHERWISE}") from None
