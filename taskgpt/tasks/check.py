"""The declaration, enforced: run every call on copies of its tiles that show what it did.

Each tile is copied into the middle of a block whose border holds a pattern. An Out tile starts as NaN (or as the smallest integer), an In
tile is read-only. After the call, an In tile that changed, a border that changed and an Out element that is still NaN are reported with
kernel and parameter:

    gelu_forward wrote 'inp', declared In

A kernel that reads outside its tile, or an Out tile or its scratch before writing it, meets NaN, which then shows in the results.
Costs a few copies of each tile.
"""

import numpy as np

from taskgpt.tasks.graph import Call, Graph, Task
from taskgpt.tasks.kernel import AccessError, Kernel
from taskgpt.tasks.tensor import Tile

_BORDER = 8  # elements on every side


def check(graph: Graph) -> Graph:
    """Return a graph that runs the same calls checked. Runs under every scheduler, as the checks touch private copies alone.

    Its tasks raise TaskError from AccessError.
    """
    checked = Graph(f"{graph.name}, checked", graph.allow_commutative)
    for task in graph.tasks:
        calls = tuple(CheckedCall(call.kernel, call.args) for call in task.calls)
        twin = Task(task.number, calls, task.section, task.predecessors, task.name)
        twin.flops, twin.bytes, twin.locks, twin.priority = task.flops, task.bytes, task.locks, task.priority
        checked.append(twin)
    return checked


class CheckedCall(Call):
    """A call whose accesses are compared with its kernel's declaration. Raises AccessError from `run`."""

    __slots__ = ()

    def run(self) -> None:
        try:
            boxes = self._run_on_copies(is_read_only=True)
        except ValueError as error:
            if "read-only" not in str(error):
                raise
            # NumPy does not say which array it refused to write: let the kernel write, and look.
            self._run_on_copies(is_read_only=False)
            inputs = ", ".join(f"'{name}'" for name, access in self.kernel.accesses.items() if not access.is_written)
            raise AccessError(f"{self.kernel.name} wrote one of {inputs}, declared In, with the values that it had") from None
        for box in boxes:
            box.copy_back()

    def _run_on_copies(self, is_read_only: bool) -> list["_Box"]:
        boxes = {name: _Box(self.kernel.accesses[name].kind, tile) for name, tile in self.tiles()}
        given = [boxes[name].view(is_read_only) if name in boxes else a for name, a in zip(self.kernel.parameters, self.args, strict=True)]
        scratch = {name: _Guarded(*each) for name, each in zip(self.kernel.scratch, self.scratch_shapes, strict=True)}
        self.kernel.run(*given, *(each.inner for each in scratch.values()))
        for name, box in boxes.items():
            box.verify(self.kernel, name)
        for name, each in scratch.items():
            if not each.is_border_whole():
                raise AccessError(f"{self.kernel.name} wrote outside its scratch '{name}' of shape {each.inner.shape}")
        return list(boxes.values())


class _Guarded:
    """Private memory that holds the pattern, `inner` with a border around it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.block = np.full([n + 2 * _BORDER for n in shape], _pattern(dtype), dtype)
        self.inner = self.block[(slice(_BORDER, -_BORDER),) * len(shape)]
        self.before = self.block.copy()

    def is_border_whole(self) -> bool:
        self.before[(slice(_BORDER, -_BORDER),) * self.inner.ndim] = self.inner
        return _bytes_of(self.before) == _bytes_of(self.block)


class _Box(_Guarded):
    """A private copy of a tile."""

    def __init__(self, kind: str, tile: Tile):
        super().__init__(tile.shape, tile.array.dtype)
        self.kind = kind
        self.tile = tile
        if kind != "out":
            self.inner[...] = tile.array

    def view(self, is_read_only: bool) -> np.ndarray:
        view = self.inner.view()
        view.flags.writeable = not (self.kind == "in" and is_read_only)
        return view

    def verify(self, kernel: Kernel, name: str) -> None:
        if self.kind == "in" and _bytes_of(self.inner) != _bytes_of(self.tile.array):
            raise AccessError(f"{kernel.name} wrote '{name}', declared In")
        if self.kind == "out":
            self._verify_written(kernel, name)
        if not self.is_border_whole():
            raise AccessError(f"{kernel.name} wrote outside its tile '{name}', {self.tile!r}")

    def _verify_written(self, kernel: Kernel, name: str) -> None:
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


def _pattern(dtype: np.dtype) -> float | int:
    """Return what stands where nothing was written: NaN, the smallest of signed and the largest of unsigned integers, True."""
    if dtype.kind in "fc":
        return np.nan
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max


def _bytes_of(array: np.ndarray) -> bytes:
    """Bytes, not values: NaN compares unequal to itself, and -0 equal to 0."""
    return array.tobytes()
