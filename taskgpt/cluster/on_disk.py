"""Arrays in a file that has no name: the system takes their memory when it needs it, and what is gone in some seconds is seldom written."""

import errno
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 64


def empty_like(arrays: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """Return arrays of the same names, shapes and types, full of zeros, on the disk of a folder, which may be yet to be made.

    Their file goes with them. Raises OSError if the disk has no room for all of them, which later would end the process; and where a system
    cannot say that.
    """
    starts, size = {}, 0
    for name, array in arrays.items():
        starts[name] = size
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    if not size:
        return {name: np.zeros_like(array) for name, array in arrays.items()}
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOTSUP, "room for a file cannot be asked for")
    with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.absolute().parents) if each.is_dir())) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        memory = mmap.mmap(file.fileno(), size)
    return {name: np.ndarray(array.shape, array.dtype, memory, starts[name]) for name, array in arrays.items()}
