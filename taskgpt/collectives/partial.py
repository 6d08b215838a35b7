"""Tensors of which a rank has a part: all of them have addresses, and memory is where something was written."""

import math
import mmap
import sys

import numpy as np

from taskgpt.tasks import Tensor, TensorSpec, Tile

_NOT_RESERVED = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: larger than the machine's memory is no reason to refuse


class PartialArena:
    """Zeroed tensors, each an attribute under its name, that take memory page by page as they are written.

    Where the elements of a tile lie side by side, as in `TensorSpec((rows, columns, R, C), (1, 1, None, None))`, tiles that are not here
    take none. Raises MemoryError if the system has not so many addresses.
    """

    def __init__(self, specs: dict[str, TensorSpec]):
        self.tensors: dict[str, Tensor] = {}
        self._memory: dict[Tensor, mmap.mmap] = {}
        for name, spec in specs.items():
            try:
                memory = mmap.mmap(-1, max(1, spec.nbytes), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NOT_RESERVED)
            except (OSError, ValueError, OverflowError) as error:
                raise MemoryError(f"tensor '{name}': no room for {spec.nbytes / 2**20:.0f} MiB of addresses: {error}") from None
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)  # a page of 2 MiB would bring tiles that are not here
            array = np.frombuffer(memory, spec.dtype, math.prod(spec.shape)).reshape(spec.shape)
            tensor = self.tensors[name] = Tensor(name, array, spec.cuts)
            self._memory[tensor] = memory

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"there is no tensor '{name}'") from None

    def forget(self, tile: Tile) -> None:
        """Give back the pages that a tile has for itself, if its elements lie side by side. What it holds is lost."""
        array, page = tile.array, mmap.PAGESIZE
        if array.flags.c_contiguous and hasattr(mmap, "MADV_DONTNEED"):
            start = array.__array_interface__["data"][0] - tile.tensor.address
            first, last = -(-start // page) * page, (start + array.nbytes) // page * page
            if first < last:
                self._memory[tile.tensor].madvise(mmap.MADV_DONTNEED, first, last - first)
