"""Tensors: named arrays, each cut once into a grid of cells. Indexing a tensor gives a tile: any rectangle of it.

    arena = Arena({"fch": TensorSpec((L, R, 4 * C), cuts=(1, 64, 256))})
    tile = arena.fch[3, 0:128, 256:512]          # plain NumPy indices; touches the cells 3 x (0..1) x 1

The grid is what dependencies are tracked by: two accesses conflict if they touch a common cell and one of them writes. Accesses need
not follow the grid; one that covers part of a cell counts as touching all of it, which is safe, and merely less parallel.
"""

import contextlib
import itertools
import math
import mmap
import operator
import os
import tempfile
import threading
import uuid
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from taskgpt.tasks.each import each_cell, each_inner, each_tile

_MOST_WORK = 10_000  # a millisecond, to find out whether arrays between each other's rows share memory
ALIGNMENT_BYTES = 64  # a cache line; the same offset in every process, so that BLAS takes the same path and gives the same bits


Span = tuple[int, int] | int  # of an axis: (start, stop), or an integer, which drops the axis
Bounds = tuple[tuple[int, ...], ...]  # of the cells of each axis: where they begin, and where the last ends
Cut = int | tuple[int, ...] | Sequence[int] | None  # see TensorSpec


class GridError(ValueError):
    """A grid that cannot be, or two grids over one memory of which none refines the other."""


@dataclass(frozen=True)
class TensorSpec:
    """The shape of a tensor, and where its grid is cut.

    `cuts` has an entry for each axis: None (one cell), n (a cut after every n elements; the last cell may be smaller), a tuple of such n
    (a cut wherever one of them asks for it), or a list or a range of the places themselves: `range(1, 257, 64)` cuts before elements 1, 65,
    129 and 193, so that the first cell is a border of one element.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    dtype: np.dtype = field(default=np.dtype(np.float32))

    def bounds(self) -> Bounds:
        """Return the cell boundaries of each axis, from 0 to its length. Raises GridError for a cut below 1 or outside of the axis."""
        cuts = self.cuts or (None,) * len(self.shape)
        if len(cuts) != len(self.shape):
            raise GridError(f"{len(cuts)} cuts for a tensor of {len(self.shape)} axes")
        return tuple(map(_bounds, self.shape, cuts))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _bounds(length: int, cut: Cut) -> tuple[int, ...]:
    if isinstance(cut, (list, range, np.ndarray)):
        places = sorted({operator.index(place) for place in cut})
        if places and not 0 <= places[0] <= places[-1] <= length:
            wrong = places[0] if places[0] < 0 else places[-1]
            raise GridError(f"cannot cut an axis of {length} elements before element {wrong}")
        return (0, *(place for place in places if 0 < place < length), length)
    steps = cut if isinstance(cut, tuple) else (length if cut is None else cut,)
    if not steps:
        raise GridError("no cuts in an empty tuple; None leaves an axis whole")
    if any(step < 1 for step in steps) and length > 0:
        raise GridError(f"cannot cut an axis of {length} elements every {min(steps)}: a tile has at least 1 element")
    points = set().union(*(range(0, length, step) for step in steps)) if length else {0}
    return (*sorted(points), length)


class Tensor:
    """A named array with a grid. `array` is its memory; `tensor[index]` is a Tile.

    Raises GridError for a grid that cannot be, for rows whose elements do not lie side by side, and for elements that are Python objects.
    """

    def __init__(self, name: str, array: np.ndarray, cuts: tuple = (), block: "_Block | None" = None):
        self.name = name
        self.array = array
        self.shape = array.shape
        self.bounds = TensorSpec(array.shape, tuple(cuts), array.dtype).bounds()
        self.grid = tuple(len(b) - 1 for b in self.bounds)
        self._block = block
        if array.dtype.hasobject:
            raise GridError(f"tensor '{name}': elements must be plain memory, and these are Python objects")
        if array.size and array.ndim and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
            order = "; in Fortran order, take the transpose, array.T" if array.flags.f_contiguous else "; take a copy, array.copy()"
            raise GridError(f"tensor '{name}': elements of the last axis must lie side by side, got strides {array.strides}{order}")

    def __getitem__(self, index) -> "Tile":
        try:
            return Tile(self, index)
        except IndexError:
            if (tiles := each_tile(self, index)) is not None:
                return tiles
            raise

    def cell(self, *position: int) -> "Tile":
        """Return the tile that is one cell of the grid: `x.cell(2, 0)`. Raises IndexError for one that the grid does not have."""
        if (tiles := each_cell(self, position)) is not None:
            return tiles
        is_one = len(position) == len(self.grid) and all(0 <= place < n for place, n in zip(position, self.grid, strict=True))
        if not is_one:
            raise IndexError(f"tensor '{self.name}' has a grid of {' x '.join(map(str, self.grid)) or 'one cell'}, got cell {position}")
        return Tile(self, tuple(slice(bounds[at], bounds[at + 1]) for at, bounds in zip(position, self.bounds, strict=True)))

    @cached_property
    def address(self) -> int:
        """Of the first element."""
        return self.array.__array_interface__["data"][0]

    @cached_property
    def places(self) -> tuple[np.ndarray, ...]:
        """The bounds as arrays of int64."""
        return tuple(np.array(bounds, np.int64) for bounds in self.bounds)

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The length of all cells but the last on each axis, if that is at most as long; 0 if they are not of one length."""
        lengths = [np.diff(bounds) for bounds in self.places]
        return tuple(int(each[0]) if (each[:-1] == each[0]).all() and each[-1] <= each[0] else 0 for each in lengths)

    def __repr__(self) -> str:
        return f"{self.name}{list(self.array.shape)} cut {' x '.join(map(str, self.grid))}"

    @property
    def is_shared(self) -> bool:
        return self._block is not None and self._block.is_shared

    @property
    def not_shared(self) -> str:
        """What to say where another process is given a tensor that is not shared."""
        return (
            f"tensor '{self.name}' lives in the memory of one process, and another would work on a copy; make it with "
            "Arena(..., shared=True) or GPT2(..., shared=True), or use threads"
        )

    def __reduce__(self):
        if not self.is_shared:
            raise TypeError(self.not_shared)
        return _Block.tensor, (self._block, self.name)

    def is_like(self, other: "Tensor") -> bool:
        """Return True if it is the same array in the same memory, perhaps under another name and with another grid."""
        mine, others = self.array, other.array
        if (mine.shape, mine.strides, mine.dtype) != (others.shape, others.strides, others.dtype):
            return False
        return self.address == other.address

    def shares_memory(self, other: "Tensor") -> bool:
        """Return True if the two have an element in common; also where that is too hard to find out."""
        (low, high), (other_low, other_high) = self.address_range(), other.address_range()
        if high <= other_low or other_high <= low:
            return False
        try:
            return np.shares_memory(self.array, other.array, max_work=_MOST_WORK)  # type: ignore[arg-type]  # any number, says its page
        except np.exceptions.TooHardError:
            return True

    def address_range(self) -> tuple[int, int]:
        """Return the first and the one-past-last byte address."""
        first = self.address
        if not self.array.size:
            return first, first
        reach = [(n - 1) * stride for n, stride in zip(self.array.shape, self.array.strides, strict=True)]
        return first + sum(r for r in reach if r < 0), first + sum(r for r in reach if r > 0) + self.array.itemsize


class Tile:
    """A rectangle of a tensor. `array` is the view (integer indices drop their axis, as in NumPy); `tile[index]` is a tile within it.

    `spans` has an entry for each axis of the tensor: (start, stop), or the integer of an axis that is dropped.

    Raises IndexError for an index that leaves the tensor, is no integer or slice, has a step, or selects nothing, and for an integer on the
    last axis unless all are: kernels may rely on elements of a row lying side by side.
    """

    __slots__ = ("_array", "spans", "tensor")  # the view is made when it is first wanted: many tiles are recorded, and never seen by Python

    def __init__(self, tensor: Tensor, index):
        index = index if isinstance(index, tuple) else (index,)
        shape = tensor.shape
        if len(index) != len(shape):
            if len(index) > len(shape):
                raise IndexError(f"tensor '{tensor.name}' has {len(shape)} axes, got {len(index)} indices")
            index += (slice(None),) * (len(shape) - len(index))
        spans = tuple(map(_span, index, shape))
        if _NOTHING in spans:
            raise _refused(f"tensor '{tensor.name}'", index, shape)
        self._hold(tensor, spans)

    @classmethod
    def of(cls, tensor: Tensor, spans: tuple[Span, ...]) -> "Tile":
        """Return the tile of spans that are known to lie within the tensor."""
        return cls.__new__(cls)._hold(tensor, spans)

    def _hold(self, tensor: Tensor, spans: tuple[Span, ...]) -> "Tile":
        if spans and not isinstance(spans[-1], tuple) and any(isinstance(span, tuple) for span in spans):
            last = spans[-1]
            axis = f"axis {len(spans) - 1} is the last and takes a slice, so that elements lie side by side"
            raise IndexError(f"tensor '{tensor.name}': {axis}: {last}:{last + 1}, got {last}")
        self.tensor = tensor
        self.spans = spans
        self._array: np.ndarray | None = None
        return self

    @property
    def array(self) -> np.ndarray:
        if self._array is None:
            self._array = self.tensor.array[(*self.index, ...)]  # without the dots, integers alone would give a number, not its place
        return self._array

    @property
    def index(self) -> tuple[int | slice, ...]:
        return tuple(slice(*span) if isinstance(span, tuple) else span for span in self.spans)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each axis of the tensor."""
        return tuple(span if isinstance(span, tuple) else (span, span + 1) for span in self.spans)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(span[1] - span[0] for span in self.spans if isinstance(span, tuple))

    def cells(self, grid: Bounds | None = None) -> Iterator[tuple[int, ...]]:
        """Yield the position of every cell that this tile touches, wholly or in part, of its tensor's grid or a finer one."""
        touched = []
        for span, bounds in zip(self.spans, grid or self.tensor.bounds, strict=True):
            start, stop = span if isinstance(span, tuple) else (span, span + 1)
            touched.append(range(bisect_right(bounds, start) - 1, bisect_left(bounds, stop)))
        return itertools.product(*touched)

    def __getitem__(self, index) -> "Tile":
        try:
            return self._inner(index)
        except IndexError:
            if (tiles := each_inner(self, index)) is not None:
                return tiles
            raise

    def _inner(self, index) -> "Tile":
        inner = index if isinstance(index, tuple) else (index,)
        spans: list[Span] = []
        at = 0
        for span in self.spans:
            if isinstance(span, tuple):
                if at < len(inner):
                    start, stop = span
                    own = _span(inner[at], stop - start)
                    if own == _NOTHING:
                        raise _refused(f"tile {self!r}", inner, self.shape)
                    span = (start + own[0], start + own[1]) if isinstance(own, tuple) else start + own
                at += 1
            spans.append(span)
        if len(inner) > at:
            raise IndexError(f"tile {self!r} has {at} axes, got {len(inner)} indices")
        return Tile.of(self.tensor, tuple(spans))

    def grown(self, *borders: int) -> "Tile":
        """Return the tile with a border of so many elements on both sides of each axis, as far as the tensor goes.

        One number is for all axes that the tile has; otherwise there is one for each.
        """
        axes = len(self.shape)
        widths = borders * axes if len(borders) == 1 else borders
        if len(widths) != axes or any(width < 0 for width in map(operator.index, widths)):
            raise ValueError(f"tile {self!r} has {axes} axes, and borders are not negative; got {borders}")
        width = iter(widths)
        spans: list[Span] = []
        for span, length in zip(self.spans, self.tensor.shape, strict=True):
            if isinstance(span, tuple):
                more = next(width)
                span = max(0, span[0] - more), min(length, span[1] + more)
            spans.append(span)
        return Tile.of(self.tensor, tuple(spans))

    def overlaps(self, other: "Tile") -> bool:
        """Return True if the two tiles have an element in common; of two tensors they must be alike, see `Tensor.is_like`."""
        if self.tensor is not other.tensor and not self.tensor.is_like(other.tensor):
            return False
        for own, others in zip(self.spans, other.spans, strict=True):
            start, stop = own if isinstance(own, tuple) else (own, own + 1)
            other_start, other_stop = others if isinstance(others, tuple) else (others, others + 1)
            if stop <= other_start or other_stop <= start:
                return False
        return True

    def __repr__(self) -> str:
        parts = []
        for span, (start, stop), length in zip(self.spans, self.ranges, self.tensor.array.shape, strict=True):
            parts.append(":" if (start, stop) == (0, length) else f"{start}:{stop}" if isinstance(span, tuple) else str(span))
        return f"{self.tensor.name}[{', '.join(parts)}]"

    def __reduce__(self):
        return Tile, (self.tensor, self.index)


_NOTHING = (0, 0)


def _span(index, length: int) -> Span:
    """Return (start, stop) of what a slice selects of an axis, or the integer; _NOTHING if it is neither, or leaves the axis."""
    try:
        if isinstance(index, slice):
            start = 0 if index.start is None else operator.index(index.start)
            stop = length if index.stop is None else operator.index(index.stop)
            return (start, stop) if 0 <= start < stop <= length and index.step in (None, 1) else _NOTHING
        place = operator.index(index)
    except TypeError:
        return _NOTHING
    return place if 0 <= place < length else _NOTHING


def _refused(where: str, index: Sequence, shape: Sequence[int]) -> IndexError:
    """Return what to raise for an index of which `_span` made nothing."""
    found = enumerate(zip(index, shape, strict=False))
    axis, (wrong, length) = next((axis, each) for axis, each in found if _span(*each) == _NOTHING)
    if isinstance(wrong, slice):
        is_one = wrong.step in (None, 1) and all(end is None or hasattr(end, "__index__") for end in (wrong.start, wrong.stop))
    else:
        is_one = hasattr(wrong, "__index__")
        if is_one and -length <= operator.index(wrong) < 0:
            return IndexError(f"{where}: axis {axis} counts from 0 to {length - 1}, got {wrong!r}; its element is {length + wrong}")
    wanted = f"has {length} elements" if is_one else "takes an integer or a slice without step"
    return IndexError(f"{where}: axis {axis} {wanted}, got {wrong!r}")


def wrap(array: Any, cuts: Cut | tuple[Cut, ...] = (), name: str = "x") -> Tensor:
    """Return a tensor on memory that is there: a NumPy array, a memoryview or another object with Python's buffer protocol, not copied.

    `cuts` are those of TensorSpec; of an array of one axis the cut alone will do. Read-only memory makes a tensor that can only be read.
    Raises TypeError for what has no memory to share, such as a list, and GridError as Tensor does.
    """
    if not isinstance(array, np.ndarray):
        try:
            array = np.asarray(memoryview(array))
        except TypeError:
            raise TypeError(f"wrap takes an array or a buffer, got a {type(array).__name__}; np.array() makes one") from None
    cuts = () if cuts is None else cuts
    is_one = array.ndim == 1 and not (isinstance(cuts, tuple) and len(cuts) < 2)
    return Tensor(name, array, (cuts,) if is_one or not isinstance(cuts, tuple) else cuts)


class Arena:
    """One block of zeroed memory that holds tensors, each an attribute under its name.

    `shared=True` puts it where other processes of this user on this machine can map it: pickling the arena, its tensors or its tiles
    sends the address alone. Freed with the last reference to the arena or a tensor of it; nothing stays behind when the process dies (on
    Linux; elsewhere the block is a temporary file, removed at exit). Raises MemoryError if there is not enough memory.
    """

    def __init__(self, specs: dict[str, TensorSpec], shared: bool = False):
        self._hold(_Block(specs, shared))

    def _hold(self, block: "_Block") -> "Arena":
        self._block = block
        self.tensors: dict[str, Tensor] = {name: block.tensor(name) for name in block.specs}
        return self

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"the arena has no tensor '{name}'") from None

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self._block.specs

    @property
    def is_shared(self) -> bool:
        return self._block.is_shared

    @property
    def nbytes(self) -> int:
        return self._block.nbytes

    def __reduce__(self):
        if not self.is_shared:
            raise TypeError("an arena in this process' own memory cannot be sent; make it with shared=True")
        return _arena_of, (self._block,)


def _arena_of(block: "_Block") -> Arena:
    return Arena.__new__(Arena)._hold(block)


class _Block:
    """The memory of an arena. Tensors hold their block and not the reverse, so that it is freed without waiting for the garbage collector.

    A shared block is known by `token` in every process: its path names a file descriptor, whose number is used again after it is closed.
    """

    def __init__(self, specs: dict[str, TensorSpec], shared: bool):
        self.specs = dict(specs)
        self.is_shared = shared
        descriptor = None
        if shared:
            self.token = uuid.uuid4().hex
            descriptor, self.path = _new_shared_block(self.nbytes)
            weakref.finalize(self, os.close, descriptor)
            _blocks[self.token] = self
        self._map(descriptor)

    @property
    def nbytes(self) -> int:
        return max(1, sum(aligned(spec.nbytes) for spec in self.specs.values()))

    def _map(self, descriptor: int | None) -> None:
        # Private memory must be MAP_PRIVATE (mmap's default is shared with forked children): Linux gives huge pages to that alone.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if descriptor is None and hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            self._memory = mmap.mmap(-1 if descriptor is None else descriptor, self.nbytes, **private)
        except OSError as error:
            raise MemoryError(f"no room for {self.nbytes / 2**20:.0f} MiB of memory: {error.strerror}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # kernels without huge pages
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # weights are streamed: fewer page-table walks
        starts = itertools.accumulate((aligned(spec.nbytes) for spec in self.specs.values()), initial=0)
        self._starts = dict(zip(self.specs, starts, strict=False))
        self._tensors: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()

    def tensor(self, name: str) -> Tensor:
        """Return the one Tensor of that name: dependencies and overlaps go by the identity of tensors."""
        with _lock:
            tensor = self._tensors.get(name)
            if tensor is None:
                spec = self.specs[name]
                array = np.frombuffer(self._memory, spec.dtype, math.prod(spec.shape), self._starts[name]).reshape(spec.shape)
                tensor = self._tensors[name] = Tensor(name, array, spec.cuts, self)
            return tensor

    def __reduce__(self):
        return _attach, (self.token, self.path, self.specs)


_blocks: "weakref.WeakValueDictionary[str, _Block]" = weakref.WeakValueDictionary()  # this process' shared blocks, by token
_lock = threading.Lock()


def _attach(token: str, path: str, specs: dict[str, TensorSpec]) -> _Block:
    """Map the shared block at `path`, once per process."""
    with _lock:
        block = _blocks.get(token)
        if block is None:
            block = _Block.__new__(_Block)
            block.token, block.path, block.specs, block.is_shared = token, path, specs, True
            descriptor = os.open(path, os.O_RDWR)
            try:
                block._map(descriptor)
            finally:
                os.close(descriptor)
            _blocks[token] = block
        return block


def _new_shared_block(size: int) -> tuple[int, str]:
    """Return (file descriptor, path) of new shared memory of `size` bytes, its room reserved."""
    if hasattr(os, "memfd_create"):
        # Not multiprocessing.shared_memory: containers often allow /dev/shm 64 MB, a memfd has no such limit and cannot be left behind.
        descriptor = os.memfd_create("taskgpt")
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        import atexit

        descriptor, path = tempfile.mkstemp(prefix="taskgpt-")
        atexit.register(os.unlink, path)
    try:
        os.ftruncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)  # without it, writing past the end of memory kills the process (SIGBUS)
    except OSError as error:
        os.close(descriptor)
        raise MemoryError(f"no room for {size / 2**20:.0f} MiB of shared memory: {error.strerror}") from None
    return descriptor, path


def aligned(nbytes: int) -> int:
    """Return the next multiple of ALIGNMENT_BYTES."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
