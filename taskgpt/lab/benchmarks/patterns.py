"""Task Bench's patterns: which tasks of the row before a task waits for, and what every task does."""

import math
import zlib
from collections.abc import Iterable

import numba
import numpy as np

from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.tasks import In, Out, kernel

PATTERNS = ("trivial", "chains", "stencil_1d", "fft", "nearest", "random", "tree", "fork_join")
RADIUS = 2  # of nearest and random: Task Bench's radix 5
CONNECTED = 0.25  # of random's edges, besides the one to the same column
LINE = 16  # float32: every task writes to a cache line of its own


def verify_patterns(patterns: Iterable[str]) -> None:
    """Raise UserError for a pattern that is none."""
    for pattern in patterns:
        if pattern not in PATTERNS:
            raise UserError(f"--patterns: unknown pattern '{shorten(pattern)}'{did_you_mean(pattern, PATTERNS)}")


def width_at(pattern: str, width: int, t: int) -> int:
    """Return the number of tasks in row t: a tree's rows double until they are `width` wide; of fork_join's, every second has one task."""
    if pattern == "fork_join":
        return 1 if t % 2 == 0 else width
    return min(width, 1 << min(t, 62)) if pattern == "tree" else width


def depends(pattern: str, width: int, t: int, i: int) -> list[int]:
    """Return the columns of row t - 1 that task i of row t waits for, as Task Bench defines them (its `no_comm` is `chains`).

    `fork_join` is ours: one task releases a whole row, which one task waits for.
    """
    if t == 0 or pattern == "trivial":
        return []
    if pattern == "chains":
        found = [i]
    elif pattern == "stencil_1d":
        found = [i - 1, i, i + 1]
    elif pattern == "fft":
        distance = 1 << (t - 1) % max(1, math.ceil(math.log2(width)))
        found = [i - distance, i, i + distance]
    elif pattern == "nearest":
        found = range(i - RADIUS, i + RADIUS + 1)
    elif pattern == "random":
        found = [j for j in range(i - RADIUS, i + RADIUS + 1) if j == i or zlib.crc32(f"{t} {i} {j}".encode()) < CONNECTED * 2**32]
    elif pattern == "tree":
        found = [i // 2]
    elif pattern == "fork_join":
        found = range(width)
    else:
        raise ValueError(f"no pattern '{pattern}'")
    return [j for j in found if 0 <= j < width_at(pattern, width, t - 1)]


@numba.njit(nogil=True)
def spin(iterations):
    """A chain of multiply-adds in a register."""
    x = np.float32(0)
    for _ in range(iterations):
        x = x * np.float32(0.5) + np.float32(0.5)
    return x


@kernel(compiled=True)
def busy(out: Out[1], iterations: In[1, np.int64]):
    """Spin; the number of iterations is read from memory, so that one graph serves for all."""
    out[0] = spin(iterations[0])
