"""The door of trace.npz: what comes in has the right form, and takes no more memory than the file's size allows.

A zip file of NumPy's .npy files, as `np.savez_compressed` writes it: arrays of one dimension, of integers or of fields of integers, and
JSON as arrays of bytes. Headers are compared with those of the types that may be there; nothing in them is evaluated, nothing is unpickled.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from taskgpt.errors import shorten
from taskgpt.files import parse_json

_MOST_TIMES = 64  # what is unpacked is so much larger than the file at most: traces of GPT-2 are 6 times as large
_SPARE_BYTES = 1 << 20  # small files compress better
_DEEPEST = 50  # JSON in JSON
_HEADER = re.compile(r"\{'descr': (.+), 'fortran_order': False, 'shape': \((\d{1,15}),\), \} *\n")


def unpacked(data: bytes, types: Iterable[np.dtype]) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name. Raises ValueError if it is no such file, or a damaged one."""
    known = {repr(np.lib.format.dtype_to_descr(each)): each for each in types}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            infos = members.infolist()
            unpacked, most = sum(info.file_size for info in infos), _MOST_TIMES * len(data) + _SPARE_BYTES
            if unpacked > most:
                raise ValueError(f"wanted at most {most:,} bytes of so small a file, got {unpacked:,}")
            if len({info.filename for info in infos}) < len(infos):
                raise ValueError("a name stands twice in it")
            if other := [info.filename for info in infos if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
                raise ValueError(f"{shorten(other[0])}: compressed in a way that NumPy never writes")
            found = {}
            for info in infos:
                with members.open(info) as member:
                    data = member.read(info.file_size)  # without a size, what a false one hides would be unpacked first
                found[info.filename.removesuffix(".npy")] = _array(data, info.filename, known)
            return found
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, struct.error) as error:
        raise ValueError(shorten(error) or type(error).__name__) from None


def _array(data: bytes, name: str, known: Mapping[str, np.dtype]) -> np.ndarray:
    """Return the array of an .npy file."""
    end = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:end].decode("latin-1"))
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None or header[1] not in known:
        raise ValueError(f"{shorten(name)}: wanted an array of one dimension, of a trace's types, got {shorten(data[10:end].strip())}")
    dtype, count = known[header[1]], int(header[2])
    if len(data) - end != count * dtype.itemsize:
        raise ValueError(f"{shorten(name)}: wanted {count:,} items of {dtype.itemsize} bytes, got {len(data) - end:,} bytes")
    return np.frombuffer(data, dtype, offset=end).copy()


def parsed(text: np.ndarray) -> Any:
    """Return what JSON in an array of bytes says. Raises ValueError; also if it is nested too deeply to be written again."""
    try:
        found = parse_json(text.tobytes().decode("utf-8"))
        pending = [(found, 0)]
        while pending:
            value, depth = pending.pop()
            if depth > _DEEPEST:
                raise RecursionError
            inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
            pending += [(each, depth + 1) for each in inner]
            if isinstance(value, str):
                value.encode()  # half a surrogate pair cannot be written
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    return found
