"""The declaration, enforced: run every call on copies of its tiles that show what it did.

Each tile is copied into the middle of a block whose border holds a pattern. An Out tile starts as NaN (or as the smallest integer), an In
tile is read-only. After the call, an In tile that changed, a border that changed and an Out element that is still NaN are reported with
kernel and parameter:

    gelu_forward wrote 'inp', declared In

Compiled twins run as `Kernel.bounds_checked`: numba checks every index, which nothing does otherwise. The border is for what numba does not
see, gemm and other intrinsics, arrays of invented shapes: as wide as the tile itself, so that one block too many lands in it.

A kernel that reads an Out tile or its scratch before writing it meets NaN, which then shows in the results. A kernel with a Reduction runs
twice more, on a tile that holds what changes nothing and on one that shows in every result: if it does not, the kernel overwrites. Costs
ten copies of each tile. Concurrent tasks of one tensor run one at a time, because each brings back a whole tile.
"""

import faulthandler
import math
import os
import select
import signal
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from taskgpt.tasks.combiners import Operator
from taskgpt.tasks.dependencies import Cell
from taskgpt.tasks.events import settle
from taskgpt.tasks.kernel import AccessError, Kernel
from taskgpt.tasks.reductions import ReductionKernel
from taskgpt.tasks.task import Call, Task
from taskgpt.tasks.task_graph import AnyGraph
from taskgpt.tasks.tensor import Tensor, Tile

_LEAST_BORDER = 8  # elements
_PATIENCE_S = 60  # for a child that runs one call, which takes less than a second or for ever


def check(graph: AnyGraph) -> AnyGraph:
    """Return a graph that runs the same calls checked. Runs under every scheduler, as the checks touch private copies alone.

    Its tasks raise TaskError from AccessError.
    """
    checked = graph.derived(f"{graph.name}, checked")
    cells: defaultdict[Tensor, Cell] = defaultdict(Cell)
    for task in graph.tasks:
        calls = tuple(
            call if isinstance(call.kernel, ReductionKernel) else CheckedCall(call.kernel.bounds_checked, call.args, call.where)
            for call in task.calls
        )
        twin = Task(task.number, calls, task.section)
        shared = [tile.tensor for c in calls for name, tile in c.tiles() if c.kernel.accesses[name].kind == "concurrent"]
        twin.locks = tuple(sorted({*task.locks, *(cells[tensor].numbered_lock() for tensor in shared)}))
        twin.priority = task.priority
        checked.append(twin, task.predecessors)
    return checked


class CheckedCall(Call):
    """A call whose accesses are compared with its kernel's declaration. Raises AccessError from `run`."""

    __slots__ = ()

    def run(self) -> Any:
        try:
            boxes, result = self._run_on_copies(is_read_only=True)
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            # NumPy does not say which array it refused to write: let the kernel write, and look.
            self._run_on_copies(is_read_only=False)
            inputs = ", ".join(f"'{name}'" for name, access in self.kernel.accesses.items() if not access.is_written)
            raise AccessError(f"{self.kernel.name} wrote one of {inputs}, declared In, with the values that it had") from None
        for name, access in self.kernel.accesses.items():
            if isinstance(access.combiner, Operator):
                self._verify_combined(name, access.combiner)
        for box in boxes:
            box.copy_back()
        return result

    def _verify_combined(self, name: str, operator: Operator) -> None:
        """Raise AccessError if a tile declared Reduction ends as it does when it begins with nothing, whatever it begins with."""
        found = []
        for begin in operator.neutral_of, operator.probe_of:
            copies = _Copies(self)
            inner = copies.boxes[name].inner
            inner[...] = begin(inner.dtype)
            self.kernel.run(*copies.arguments(is_read_only=True))
            found.append(inner)
        nothing, probed = found
        wanted = nothing.copy()
        with np.errstate(all="ignore"):
            operator.combine(wanted, operator.probe_of(wanted.dtype), out=wanted)
        wrong = (probed == nothing) & (wanted != nothing)
        if wrong.any():
            what = f"{wrong.sum()} of {wrong.size} elements of '{name}'"
            raise AccessError(f"{self.kernel.name} overwrote {what}, declared Reduction: combine with what is there, by '{operator}'")

    def _run_on_copies(self, is_read_only: bool) -> tuple[list["_Box"], Any]:
        copies = _Copies(self)
        try:
            result = self.kernel.run(*copies.arguments(is_read_only))
            settle()  # what happens later would happen to the copies
        except IndexError as error:
            if str(error) != "index is out of bounds":  # numba's words; NumPy's say which index, and kernels may have their own
                raise
            raise AccessError(self._written_outside() or f"{self.kernel.name} used an index outside of {copies.named()}") from None
        copies.verify()
        return list(copies.boxes.values()), result

    def _written_outside(self) -> str | None:
        """Return what the twin as it would run writes outside its arrays, as far as their borders reach.

        Numba does not say which array had the wrong index. The twin runs in a process of its own, which it may well damage.
        """
        if not hasattr(os, "fork"):
            return None
        self.kernel.unchecked.compile()
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads and forks: the child takes no lock and starts no thread
            child = os.fork()
        if child == 0:
            faulthandler.disable()  # it may crash, and nobody is to read of it
            try:
                copies = _Copies(self)
                self.kernel.unchecked.run(*copies.arguments(is_read_only=True))
                os.write(writing, (copies.written_outside() or "").encode())
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as answer:
            if not select.select([answer], [], [], _PATIENCE_S)[0]:
                os.kill(child, signal.SIGKILL)
            said = answer.read().decode()
        os.waitpid(child, 0)
        return said or None


class _Copies:
    """Private copies of a call's tiles and scratch, each in its border."""

    def __init__(self, call: Call):
        self.kernel, self.args = call.kernel, call.args
        self.boxes: dict[str, _Box] = {}  # by parameter; of a list by parameter[number]
        for name, argument in zip(call.kernel.accesses, [a for a in call.args if isinstance(a, (Tile, tuple))], strict=True):
            kind = call.kernel.accesses[name].kind
            if isinstance(argument, Tile):
                self.boxes[name] = _Box(kind, argument)
            else:
                self.boxes.update({f"{name}[{at}]": _Box(kind, tile) for at, tile in enumerate(argument)})
        self.scratch = {name: _Guarded(*each) for name, each in zip(call.kernel.scratch, call.scratch_shapes, strict=True)}

    def arguments(self, is_read_only: bool) -> list:
        given = zip(self.kernel.parameters, self.args, strict=True)
        views = {name: box.view(is_read_only) for name, box in self.boxes.items()}
        tiles = []
        for name, argument in given:
            is_list = isinstance(argument, tuple)
            tiles.append(tuple(views[f"{name}[{at}]"] for at in range(len(argument))) if is_list else views.get(name, argument))
        return [*tiles, *(each.inner for each in self.scratch.values())]

    def named(self) -> str:
        """Return the tiles and the scratch in words."""
        names = [f"'{name}', {box.tile!r}" for name, box in self.boxes.items()]
        names += [f"its scratch '{name}'" for name in self.scratch]
        return names[0] if len(names) == 1 else f"one of {'; '.join(names)}"

    def verify(self) -> None:
        for name, box in self.boxes.items():
            box.verify_not_written(self.kernel, name)
        outside = self.written_outside()
        if outside:
            raise AccessError(outside)
        for name, box in self.boxes.items():
            box.verify_written(self.kernel, name)

    def written_outside(self) -> str | None:
        for name, box in self.boxes.items():
            if not box.is_border_whole():
                return f"{self.kernel.name} wrote outside its tile '{name}', {box.tile!r}"
        for name, each in self.scratch.items():
            if not each.is_border_whole():
                return f"{self.kernel.name} wrote outside its scratch '{name}' of shape {each.inner.shape}"
        return None


class _Guarded:
    """Private memory that holds the pattern: `inner`, before and after it a border as large as itself, and after each row too."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape = shape or (1,)  # a single number is a row of one
        self.borders = [max(_LEAST_BORDER, n) for n in self.shape]
        first, *others = (n + border for n, border in zip(self.shape, self.borders, strict=True))
        self.pattern = (
            np.full(1, _pattern(dtype), dtype).view(np.uint8) if dtype.kind in "cfbiu" else np.full(dtype.itemsize, 0xA5, np.uint8)
        )
        # Whole elements: NumPy need not write the 6 bytes of a long double that hold nothing.
        self.block = np.tile(self.pattern, [first + self.borders[0], *others, 1]).view(dtype)[..., 0]
        self.starts = [self.borders[0]] + [0] * len(others)
        whole = self.block[tuple(slice(start, start + n) for start, n in zip(self.starts, self.shape, strict=True))]
        self.inner = whole if shape else whole.reshape(())

    def _border(self) -> Iterator[np.ndarray]:
        yield self.block[: self.starts[0]]
        part = self.block[self.starts[0] :]
        for axis, n in enumerate(self.shape):
            along = (slice(None),) * axis
            yield part[(*along, slice(n, None))]
            part = part[(*along, slice(0, n))]

    def is_border_whole(self) -> bool:
        """Compare bits, not values: NaN compares unequal to itself."""
        word = np.dtype(f"u{math.gcd(8, self.block.itemsize)}")
        pattern = self.pattern.view(word)
        return all((part.view(word)[..., at :: len(pattern)] == each).all() for part in self._border() for at, each in enumerate(pattern))


class _Box(_Guarded):
    """A private copy of a tile."""

    def __init__(self, kind: str, tile: Tile):
        super().__init__(tile.shape, tile.array.dtype)
        self.kind = kind
        self.tile = tile
        if kind != "out":
            _raw(self.inner)[...] = _raw(tile.array)

    def view(self, is_read_only: bool) -> np.ndarray:
        view = self.inner.view()
        view.flags.writeable = not (self.kind == "in" and is_read_only)
        return view

    def verify_not_written(self, kernel: Kernel, name: str) -> None:
        if self.kind == "in" and self.inner.tobytes() != self.tile.array.tobytes():  # bytes, not values, as above
            raise AccessError(f"{kernel.name} wrote '{name}', declared In")

    def verify_written(self, kernel: Kernel, name: str) -> None:
        if self.kind != "out":
            return
        letter = self.inner.dtype.kind
        if letter in "fc":
            missing, what = np.isnan(self.inner), "unwritten or NaN"
        elif letter == "i":
            missing, what = self.inner == _pattern(self.inner.dtype), "unwritten"
        else:  # in the other types every value is a likely one
            return
        if missing.any():
            raise AccessError(f"{kernel.name} left {missing.sum()} of {missing.size} elements of '{name}' {what}, declared Out")

    def copy_back(self) -> None:
        if self.kind != "in":
            self.tile.array[...] = self.inner


def _raw(array: np.ndarray) -> np.ndarray:
    """Return the array; of structures their bytes, for NumPy does not copy those between fields."""
    return array.view(f"V{array.itemsize}") if array.dtype.kind == "V" else array


def _pattern(dtype: np.dtype) -> complex | int:
    """Return what stands in numbers that nobody wrote: NaN, the smallest of signed and the largest of unsigned integers, True."""
    if dtype.kind == "c":
        return complex(math.nan, math.nan)
    if dtype.kind == "f":
        return math.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
