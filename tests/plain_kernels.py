"""Kernels that do as little as kernels can, and a tensor for them: for tests of what waits for what."""

import numpy as np

from taskgpt.tasks import In, InOut, Out, Tensor, dims, kernel

(N,) = dims("N")


@kernel
def make(out: Out[N]):
    out[:] = 1


@kernel
def read(inp: In[N]):
    pass


@kernel
def change(x: InOut[N]):
    x *= 2


def tensor(length: int = 8, cut: int | None = None, name: str = "x") -> Tensor:
    return Tensor(name, np.zeros(length, np.float32), (cut,))
