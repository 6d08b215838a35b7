"""Accesses: the words in which a kernel declares what it does to each tile, `out: Out[R, OC], inp: In[R, C]`."""

from dataclasses import dataclass, replace
from typing import Any

import numba
import numpy as np
from numba import types

from taskgpt.tasks.combiners import Combiner, Operator, as_combiner


class Dim(str):
    """The name of a dimension: within one call of a kernel it stands for one size."""


def dims(names: str) -> list[Dim]:
    """Return a Dim for each of the space-separated names: `R, C = dims("R C")`."""
    return [Dim(name) for name in names.split()]


@dataclass(frozen=True)
class Access:
    """How a kernel uses one tile: `kind`, its dimensions and its element type; of a reduction also how it is combined.

    `kind`: in, out, inout, commutative, concurrent or reduction, weakin, weakout or weakinout; scratch for no tile. `is_several`: of each
    of a list of tiles.
    """

    kind: str
    dims: tuple[Dim | int, ...]
    dtype: np.dtype
    combiner: Operator | Combiner | None = None
    is_several: bool = False

    @property
    def is_read(self) -> bool:
        return self.kind not in ("out", "weakout")

    @property
    def is_written(self) -> bool:
        return self.kind not in ("in", "weakin")

    @property
    def is_weak(self) -> bool:
        return self.kind.startswith("weak")

    @property
    def numba_type(self) -> types.Array:
        """One type per declaration, so that one compiled version serves every tile: rows of any distance, elements side by side."""
        layout = "C" if len(self.dims) <= 1 else "A"
        return types.Array(numba.from_dtype(self.dtype), len(self.dims), layout, readonly=not self.is_written)


class _Declaration(Any):  # to a type checker a tile is an array in a body, and whatever else a twin does with it
    kind: str

    def __class_getitem__(cls, items) -> Access:
        """`In[R, C]`: a float32 tile of R x C; a NumPy type as last item names another: `In[R, np.int32]`; `In[()]`: one number."""
        *sizes, last = items if isinstance(items, tuple) and items else (items,)
        has_type = isinstance(last, np.dtype) or (isinstance(last, type) and issubclass(last, np.generic))
        if not has_type:
            sizes.append(last)
        if sizes == [()]:
            return Access(cls.kind, (), np.dtype(last if has_type else np.float32))
        if not sizes or not all(isinstance(s, str) or (type(s) is int and s > 0) for s in sizes):
            raise TypeError(f"{cls.__name__}[...] takes dimension names or sizes, then perhaps a NumPy type; got {items!r}")
        return Access(cls.kind, tuple(sizes), np.dtype(last if has_type else np.float32))


class In(_Declaration):
    """Read, never written."""

    kind = "in"


class Out(_Declaration):
    """Written whole, never read before that."""

    kind = "out"


class InOut(_Declaration):
    """Read and written, in program order."""

    kind = "inout"


class Commutative(_Declaration):
    """Read and written; tasks that declare it may run in any order, one at a time. In program order unless the graph allows otherwise."""

    kind = "commutative"


class Concurrent(_Declaration):
    """Read and written by tasks that may run at the same time, as the program says: each has its own elements, or uses atomics."""

    kind = "concurrent"


class Reduction(_Declaration):
    """Something is combined with what is there: `Reduction["+", N]` adds, `total[:] += ...`, and never asks for what it has become.

    Before the dimensions stands "+", "*", "min", "max", "and", "or", or a Combiner. In a graph, neighbouring tasks on the same tile run at
    the same time, on copies, which are then combined in an order that the program alone fixes: same bits under every scheduler.
    """

    kind = "reduction"

    def __class_getitem__(cls, items) -> Access:
        operator, *rest = items if isinstance(items, tuple) and items else (items,)
        combiner = as_combiner(operator)
        if not rest:
            raise TypeError(f"Reduction[...] takes dimensions after '{combiner}': Reduction['+', N], or Reduction['+', ()] of one number")
        plain = super().__class_getitem__(tuple(rest))
        if isinstance(combiner, Operator) and plain.dtype.kind not in combiner.kinds:
            raise TypeError(f"Reduction[...]: '{combiner}' is not for {plain.dtype}; a Combiner of your own may be")
        return replace(plain, combiner=combiner)


class Several(Any):
    """A list of tiles as one argument, each declared alike: `parts: Several[In[R, C]]`. The body gets a tuple of arrays, perhaps of none.

    OmpSs-2's multidependencies. Such a kernel has no compiled twin. Its formulas may ask for the parameter: how many tiles there are.
    """

    def __class_getitem__(cls, declared) -> Access:
        if not isinstance(declared, Access) or declared.is_several or declared.kind in ("reduction", "scratch"):
            raise TypeError(f"Several[...] takes In, Out, InOut, Commutative or Concurrent of one tile, got {declared!r}")
        return replace(declared, is_several=True)


class WeakIn(_Declaration):
    """Read by tasks that this one spawns, and not by itself: it need not wait for who writes it, as they do. For kernels that spawn."""

    kind = "weakin"


class WeakOut(_Declaration):
    """Written whole by tasks that this one spawns, and not by itself."""

    kind = "weakout"


class WeakInOut(_Declaration):
    """Read and written by tasks that this one spawns, and not by itself."""

    kind = "weakinout"


class Scratch(_Declaration):
    """Working memory, not a tile: undefined on entry and lost at exit. Stands last in the signature, and no caller passes it."""

    kind = "scratch"
