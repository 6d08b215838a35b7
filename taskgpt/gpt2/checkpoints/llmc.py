"""llm.c's model checkpoints: a header of 256 int32 and the 16 parameter tensors, in the order of `Model.parameter_shapes`.

Version 3 holds float32, version 5 bfloat16; both have the vocabulary padded to a multiple of 128. Source: llm.c, `train_gpt2.py`
(`write_model`) and `train_gpt2.c` (`gpt2_build_from_checkpoint`).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import atomic_file, cannot_write, file_size, verify_can_write, verify_room, write_target
from taskgpt.gpt2.shape import Model
from taskgpt.gpt2.text.kinds import CHECKPOINT, refuse_another_kind
from taskgpt.gpt2.text.tokens import HEADER_BYTES, HEADER_WORDS

MAGIC, FLOAT32, BFLOAT16 = 20240326, 3, 5
ADVICE = "llm.c's train_gpt2.py writes one, also from Hugging Face's models: python train_gpt2.py --model gpt2"
_CHUNK = 1 << 22  # elements read at a time


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
            raise UserError(f"{shorten(path)}: damaged header: {name} = {value}; get the file again")
    try:
        model = Model(**fields)
    except ValueError as error:
        raise UserError(f"{shorten(path)}: damaged header: {error}; get the file again") from None
    element = 4 if header[1] == FLOAT32 else 2
    wanted = HEADER_BYTES + element * sum(map(math.prod, model.parameter_shapes().values()))
    with _reading(path):
        got = file_size(path)
    if got != wanted:
        what = "truncated" if got < wanted else "too long"
        raise UserError(f"{shorten(path)}: {what}: a checkpoint of this shape has {wanted:,} bytes, got {got:,}; get the file again")
    return model


def load(path: str | Path, model: Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Fill the parameters from a checkpoint of the model's shape. Raises UserError as `read_shape` does."""
    version = _header(path)[1]
    with _reading(path), open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        for name in model.parameter_shapes():
            flat = parameters[name].reshape(-1)
            for at in range(0, flat.size, _CHUNK):
                part = flat[at : at + _CHUNK]
                # Read, not mapped: where a mapped file became shorter, the system would kill the program.
                words = np.empty(part.size, "<f4" if version == FLOAT32 else "<u2")
                if file.readinto(words.data) < words.nbytes:
                    raise UserError(f"{shorten(path)}: truncated: it became shorter while it was read; get the file again")
                part[:] = words if version == FLOAT32 else from_bfloat16(words)


def from_bfloat16(words: np.ndarray) -> np.ndarray:
    """Return as float32 what uint16 words hold: a bfloat16 is the upper half of a float32."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def save(path: str | Path, model: Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Write the parameters as version 3; the file appears whole or not at all. Raises UserError if it cannot be written."""
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:8] = [MAGIC, FLOAT32, model.max_seq_len, model.vocabulary, model.layers, model.heads, model.channels, model.padded_vocabulary]
    with atomic_file(path) as file:
        file.write(header.tobytes())
        for name in model.parameter_shapes():
            file.write(parameters[name].astype("<f4", copy=False).data)


def verify_can_save(path: str | Path, nbytes: int) -> None:
    """Raise UserError if `save` of so many bytes could not succeed now."""
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{shorten(path)}: is a folder; name the file to write, for example {path / 'model.bin'}")
        if not path.parent.is_dir():
            raise UserError(f"{shorten(path)}: there is no folder {path.parent}; make it first")
        target = write_target(path)
        if target.exists() and np.fromfile(target, "<i4", 1).tolist() != [MAGIC]:
            raise UserError(f"{shorten(path)}: is there already and is no checkpoint; name another file")
        verify_can_write(path)
        verify_room(path, nbytes + HEADER_BYTES)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Answer what the system refuses inside the block."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shorten(path)}: cannot read the checkpoint: {error.strerror or error}; name a checkpoint file that you may read"
        ) from None


def _header(path: str | Path) -> np.ndarray:
    with _reading(path):
        size = file_size(path)
        with open(path, "rb") as file:
            beginning = file.read(HEADER_BYTES)
    refuse_another_kind(path, beginning, CHECKPOINT, ADVICE)
    if len(beginning) < HEADER_BYTES:
        raise UserError(f"{shorten(path)}: truncated: a checkpoint begins with {HEADER_BYTES} bytes, got {size}; get the file again")
    header = np.frombuffer(beginning, "<i4")
    if header[0] != MAGIC:
        raise UserError(f"{shorten(path)}: not an llm.c checkpoint: wanted magic number {MAGIC}, got {header[0]}; {ADVICE}")
    if header[1] not in (FLOAT32, BFLOAT16):
        raise UserError(
            f"{shorten(path)}: checkpoint version {header[1]}; wanted {FLOAT32} (float32) or {BFLOAT16} (bfloat16), both with a padded "
            "vocabulary; write it again with a current llm.c: python train_gpt2.py"
        )
    return header
