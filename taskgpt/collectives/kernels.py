"""Kernels that hand a tile to a communicator, and are done when the bucket of it is exchanged.

There is one for each kind of tile. `communicator`, `bucket` and `place` are numbers: constants of a graph name what no tile is.
"""

import numpy as np

from taskgpt.collectives.communicator import communicator as communicator_of
from taskgpt.tasks import In, InOut, Out, dims, event, kernel

R, C, N, A = dims("R C N A")


@kernel(flops=lambda: 0, tags=["network"])
def exchange_matrix(part: InOut[R, C], communicator: int, bucket: int, place: int):
    """Exchange a part of a bucket with the other ranks, as the bucket says: summed up, or as its owner has it."""
    communicator_of(communicator).hand_in(bucket, place, part, event())


@kernel(flops=lambda: 0, tags=["network"])
def exchange_vector(part: InOut[N], communicator: int, bucket: int, place: int):
    """The same of a vector."""
    communicator_of(communicator).hand_in(bucket, place, part, event())


@kernel(flops=lambda: 0, tags=["network"])
def exchange_numbers(part: InOut[N, np.float64], communicator: int, bucket: int, place: int):
    """The same of numbers in float64."""
    communicator_of(communicator).hand_in(bucket, place, part, event())


@kernel(flops=lambda: 0, tags=["network"])
def send_rows(part: In[R, C], communicator: int, bucket: int):
    """Send rows to the rank that a bucket of one part says."""
    communicator_of(communicator).hand_in(bucket, 0, part, event())


@kernel(flops=lambda: 0, tags=["network"])
def receive_rows(part: Out[R, C], communicator: int, bucket: int):
    """Receive the rows that another rank sends."""
    communicator_of(communicator).hand_in(bucket, 0, part, event())


@kernel(flops=lambda: 0, tags=["network"])
def gather_rows(out: Out[A, C], inp: In[R, C], communicator: int, bucket: int, place: int):
    """Put the rows of all ranks below each other: A = N * R."""
    _gather(out, inp, communicator, bucket, place)


@kernel(flops=lambda: 0, tags=["network"])
def gather_integers(out: Out[A, np.int32], inp: In[R, np.int32], communicator: int, bucket: int, place: int):
    """The same of integers."""
    _gather(out, inp, communicator, bucket, place)


@kernel(flops=lambda: 0, tags=["network"])
def gather_numbers(out: Out[A, np.float64], inp: In[R, np.float64], communicator: int, bucket: int, place: int):
    """The same of numbers in float64."""
    _gather(out, inp, communicator, bucket, place)


def _gather(out: np.ndarray, inp: np.ndarray, communicator: int, bucket: int, place: int) -> None:
    found = communicator_of(communicator)
    rows = len(inp)
    out[found.links.rank * rows : (found.links.rank + 1) * rows] = inp
    found.hand_in(bucket, place, out, event())
