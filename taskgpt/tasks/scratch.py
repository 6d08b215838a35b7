"""Working memory of kernels: one buffer for each thread, which grows to what the greediest kernel asks for and is used by all.

Where each array begins follows from the shapes alone, so that a scheduler that runs compiled code may bring buffers of its own.
"""

import itertools
import math
import threading

import numpy as np

from taskgpt.tasks.tensor import ALIGNMENT_BYTES, aligned

Shapes = tuple[tuple[tuple[int, ...], np.dtype], ...]  # (shape, type) of each array


def scratch_layout(shapes: Shapes) -> tuple[tuple[int, ...], int]:
    """Return (where each array begins, in bytes from the beginning of an aligned buffer; how long the buffer must be)."""
    *offsets, total = itertools.accumulate((aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes), initial=0)
    return tuple(offsets), total


class _Buffer(threading.local):
    """The calling thread's buffer, and the arrays that were made of it."""

    def __init__(self):
        self.memory = np.empty(0, np.uint8)
        self.arrays: dict[Shapes, list[np.ndarray]] = {}

    def cut(self, shapes: Shapes) -> list[np.ndarray]:
        offsets, total = scratch_layout(shapes)
        if total > self.memory.size:
            memory = np.empty(total + ALIGNMENT_BYTES, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT_BYTES
            self.memory, self.arrays = memory[start : start + total], {}
        return [np.ndarray(shape, dtype, self.memory, at) for (shape, dtype), at in zip(shapes, offsets, strict=True)]


_buffer = _Buffer()


def scratch_arrays(shapes: Shapes) -> list[np.ndarray]:
    """Return arrays in the calling thread's buffer, whatever is in it; the thread's next call gets the same memory."""
    arrays = _buffer.arrays.get(shapes)
    if arrays is None:
        arrays = _buffer.arrays[shapes] = _buffer.cut(shapes)
    return arrays
