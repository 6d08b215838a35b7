"""A copy of all that a training step hands to the next one, made by tasks while training goes on.

A task copies a tile as soon as the step under way has updated it, and the next step's update of that tile waits for the copy. Nothing else
waits: the copies run beside the end of one step and the forward pass of the next.
"""

from collections.abc import Iterator

import numpy as np

from taskgpt.gpt2.grid import blocks
from taskgpt.gpt2.model import GPT2
from taskgpt.tasks import Arena, Graph, In, Out, Tensor, Tile, dense, dims, kernel

N, R, C = dims("N R C")
COPY_BYTES = 1 << 22  # of a task, at least: few tasks, and still one for each worker


@kernel(tags=["copy"])
def copy_rows(out: Out[R, C], inp: In[R, C]):
    """out = inp."""
    out[:] = inp


@copy_rows.compiled
def copy_rows_twin(out, inp):
    for r in range(out.shape[0]):
        o, i = dense(out[r]), dense(inp[r])
        for c in range(o.shape[0]):
            o[c] = i[c]


@kernel(tags=["copy"])
def copy_numbers(out: Out[N, np.float64], inp: In[N, np.float64]):
    """out = inp."""
    out[:] = inp


@copy_numbers.compiled
def copy_numbers_twin(out, inp):
    for n in range(out.shape[0]):
        out[n] = inp[n]


@kernel(tags=["copy"])
def copy_counts(out: Out[N, np.int64], inp: In[N, np.int64]):
    """out = inp."""
    out[:] = inp


@copy_counts.compiled
def copy_counts_twin(out, inp):
    for n in range(out.shape[0]):
        out[n] = inp[n]


COPIES = {np.dtype(np.float32): copy_rows, np.dtype(np.float64): copy_numbers, np.dtype(np.int64): copy_counts}


class Snapshot:
    """Room for a copy of a model's state, and the `graph` that makes one. The memory is taken when it is first written to."""

    def __init__(self, gpt: GPT2):
        self.graph = Graph("snapshot")
        self._copies = [Arena(arena.specs, arena.is_shared) for arena in gpt.state_arenas]
        for arena, copies in zip(gpt.state_arenas, self._copies, strict=True):
            for name, tensor in arena.tensors.items():
                for copy, tile in zip(tiles(copies.tensors[name]), tiles(tensor), strict=True):
                    self.graph.spawn(COPIES[tile.array.dtype], copy, tile, section=("snapshot", -1))

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The copies by name, as `GPT2.state` has them."""
        return {name: tensor.array for arena in self._copies for name, tensor in arena.tensors.items()}


def tiles(tensor: Tensor) -> Iterator[Tile]:
    """Cut a tensor along its cuts into tiles of COPY_BYTES or more, one layer at most; small ones, and those of one axis, stay whole."""
    if tensor.array.ndim == 3:
        for l in range(tensor.array.shape[0]):
            yield tensor[l]
        return
    count, nbytes = tensor.array.shape[0], tensor.array[0].nbytes
    cell = max(1, tensor.bounds[0][1])
    for rows in blocks(slice(0, count), cell * -(-COPY_BYTES // (cell * nbytes))):
        yield tensor[rows]
