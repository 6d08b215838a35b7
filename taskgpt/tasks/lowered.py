"""Lowering: all calls of a graph as native code takes them, an entry and words each, see native_entry.py.

Many calls of one signature become words together, in compiled code and without an object for each: their words differ in where tiles
begin, in the strides of tensors, and in constants alone. Other calls are lowered one by one: those in Python, those of tasks that were
appended, and those of which there are few.
"""

from collections.abc import Callable, Iterable

import numba
import numpy as np
from numba import types

from taskgpt.tasks.access import Access
from taskgpt.tasks.cache import compile_function
from taskgpt.tasks.columns import FAMILY_BITS, Columns
from taskgpt.tasks.known_calls import CallSignature
from taskgpt.tasks.native_entry import Held, Words, has_native_entry, native_entry, python_entry
from taskgpt.tasks.recorded import Tasks
from taskgpt.tasks.scratch import Shapes, scratch_layout
from taskgpt.tasks.task import Call

_FEW = 32  # calls of a signature, which one by one take no longer
_TILE, _CONSTANT, _TO_DOUBLE = range(3)  # what a word of a task's row is in the words of its call

_LONGS, _INTS, _TABLE = types.int64[::1], types.int32[::1], types.int64[:, ::1]


class LoweredCalls:
    """The calls of a graph's tasks, whose kernels are compiled, in arrays of int64.

    Those of task n go from first[n] to first[n + 1]; call c has the entry entries[c], and its words begin at words[starts[c]].
    `seconds`: what each task may take, until it is measured. `scratch_bytes`: of the greediest. `kept_alive`: what the addresses are of.
    `held`: see python_entry.
    """

    def __init__(self, tasks: Tasks, held: Held):
        columns, self._held = tasks.columns, held
        recipes = _Recipes(columns)
        recipe = recipes.of_tasks(len(tasks))
        has_recipe = recipe >= 0
        alone = columns.begins | {number: tasks.calls_of(number) for number in np.flatnonzero(~has_recipe).tolist()}
        counts = has_recipe.astype(np.int64)
        self.seconds = np.zeros(len(tasks))
        for number, calls in alone.items():
            counts[number] += len(calls)
            self.seconds[number] = sum([call.estimated_seconds for call in calls])
        self.first = firsts(counts)
        self.entries, lengths = np.empty(self.first[-1], np.int64), np.empty(self.first[-1], np.int64)
        self.kept_alive: list = [columns.tensors(), alone]
        words, places = Words(), []
        for number in sorted(alone):
            for place, call in enumerate(alone[number], start=int(self.first[number])):
                known = len(words.words)
                self.entries[place] = self._lower(call, words)
                lengths[place] = len(words.words) - known
                places.append(place)
        if recipes.entries:
            last = self.first[1:] - 1
            for array, of_recipe in (self.entries, recipes.entries), (lengths, [len(each) for each in recipes.words]):
                array[last[has_recipe]] = np.array(of_recipe)[recipe[has_recipe]]
            ends = lengths.cumsum()
            self.starts, self.words = ends - lengths, np.empty(ends[-1], np.int64)
            moved = np.repeat(self.starts[places] - firsts(lengths[places])[:-1], lengths[places])
            self.words[moved + np.arange(len(moved))] = words.words
            recipes.fill(recipe, self.starts[last], self.words)
            recipes.add_seconds(recipe, self.seconds)
        else:
            self.starts, self.words = lengths.cumsum() - lengths, np.array(words.words)
        scratch = recipes.scratch_shapes | {call.scratch_shapes for calls in alone.values() for call in calls}
        self.scratch_bytes = max((scratch_layout(shapes)[1] for shapes in scratch), default=0)

    def _lower(self, call: Call, words: Words) -> int:
        """Return the entry of a call, after adding its words."""
        if has_native_entry(call):
            words.add(call)
            return native_entry(call.kernel)
        entry, callback = python_entry(call, self._held)
        self.kept_alive.append(callback)
        return entry


class _Recipes:
    """How the words of a task's call follow from its row in the columns, one for each signature that has compiled code and many calls.

    Of each recipe: `entries`; `words`, those of the first call; and `changes`, rows of (what a word of the row is, its number there, the
    number of the word where that is put, the axes of a tile).
    """

    def __init__(self, columns: Columns):
        self._columns = columns
        self.entries: list[int] = []
        self.words: list[np.ndarray] = []
        self.changes: list[list[tuple[int, int, int, int]]] = []
        self.scratch_shapes: set[Shapes] = set()
        self._seconds: list[float | None] = []  # None where constants have a say in it
        self._of_origin: np.ndarray | None = None  # -1 for an origin that has none
        if len(columns) > _FEW:
            self._of_origin = np.full(len(columns.table), -1)
            uses: dict[CallSignature, list[tuple[int, int]]] = {}
            for number, first in columns.first_uses():
                uses.setdefault(columns.table[number].signature, []).append((number, first))
            counts = np.bincount(columns.origins, minlength=len(columns.table))
            for signature, origins in uses.items():
                numbers = [number for number, _ in origins]
                if signature.kernel.has_machine_code and counts[numbers].sum() > _FEW:
                    self._of_origin[numbers] = len(self.entries)
                    self._add(columns.calls_of(origins[0][1])[-1], signature)

    def of_tasks(self, count: int) -> np.ndarray:
        """Return the recipe for the last call of each of so many tasks, or -1."""
        return np.full(count, -1) if self._of_origin is None else self._of_origin[np.array(self._columns.origins)]

    def _add(self, call: Call, signature: CallSignature) -> None:
        words, changes = Words(), []
        words.add(call)
        tile, constant, at = 0, len(signature.names), 0
        for declared, kind in zip(call.kernel.parameters.values(), signature.layout, strict=True):
            if isinstance(declared, Access):
                axes = len(declared.dims)
                changes.append((_TILE, tile, at, axes))
                tile, at = tile + 1, at + 1 + 2 * axes
            else:
                changes.append((_TO_DOUBLE if declared is float and kind is not float else _CONSTANT, constant, at, 0))
                constant, at = constant + 1, at + 1
        self.entries.append(native_entry(call.kernel))
        self.words.append(np.array(words.words))
        self.changes.append(changes)
        self.scratch_shapes.add(call.scratch_shapes)
        self._seconds.append(call.estimated_seconds if call.kernel.is_cost_of_shapes else None)

    def fill(self, recipe: np.ndarray, starts: np.ndarray, words: np.ndarray) -> None:
        """Write the words of all calls that have a recipe; those of task n begin at words[starts[n]]."""
        columns = self._columns
        changes = np.array([change for changes in self.changes for change in changes], np.int64).reshape(-1, 4)
        columns_of = np.array(columns.origins), np.array(columns.words), columns.rows()
        own = np.concatenate(self.words), firsts(map(len, self.words)), changes, firsts(map(len, self.changes))
        _compiled()(*columns_of, recipe, *own, *_tiles(columns), starts, words, words.view(np.float64))

    def add_seconds(self, recipe: np.ndarray, seconds: np.ndarray) -> None:
        """Add to what each task may take what its call with a recipe may."""
        known = [0.0 if each is None else each for each in self._seconds]
        seconds += np.array([*known, 0.0])[recipe]  # the last one for tasks without
        is_asked = np.array([*(each is None for each in self._seconds), False])
        for task in np.flatnonzero(is_asked[recipe]).tolist():
            seconds[task] += self._columns.calls_of(task)[-1].estimated_seconds


def firsts(counts: Iterable[int]) -> np.ndarray:
    """Return where each of consecutive groups begins, and where the last ends, int64."""
    counted = counts if isinstance(counts, np.ndarray) else np.fromiter(counts, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counted, dtype=np.int64)])


def _tiles(columns: Columns) -> tuple[np.ndarray, ...]:
    """Return (begins, addresses, kinds, first, strides).

    A place's tile n is tile n, the nth of family f is begins[f] + n. Tile t has the address addresses[t], and along its own axes the
    strides from first[kinds[t]] on.
    """
    begins = columns.tile_begins()
    addresses, kinds = np.empty(begins[-1], np.int64), np.empty(begins[-1], np.int32)
    known: dict[tuple[int, ...], int] = {}

    def kind(strides: tuple[int, ...], are_dropped) -> int:
        kept = tuple([stride for stride, is_dropped in zip(strides, are_dropped, strict=True) if not is_dropped])
        return known.setdefault(kept, len(known))

    for tensor, places in columns.calls.places():
        if not places:
            continue
        strides, numbers = tensor.array.strides, np.array(places.numbers)
        ends = np.array(places.ends).reshape(len(numbers), 2 * len(strides))
        addresses[numbers] = tensor.address + ends[:, ::2] @ np.array(strides, np.int64)
        kinds[numbers] = kind(strides, [False] * len(strides))
        if (ends[:, 1::2] - ends[:, ::2] == 1).any():  # as along an axis that is dropped
            kinds[numbers] = [kind(strides, [not isinstance(span, tuple) for span in spans]) for spans in places]
    for family, begin in zip(columns.families, begins.tolist(), strict=False):
        if family is not None:
            strides, found = family.tensor.array.strides, slice(begin, begin + family.size)
            offsets = sum([end * stride for end, stride in zip(family.ends[::2], strides, strict=True)], np.zeros(family.shape, np.int64))
            addresses[found] = family.tensor.address + offsets.reshape(-1)
            kinds[found] = kind(strides, family.drops)
    return begins, addresses, kinds, firsts(map(len, known)), np.array([stride for kept in known for stride in kept], np.int64)


def _compiled() -> Callable:
    if not numba.config.DISABLE_JIT:
        columns, recipes = (_INTS, _LONGS, _LONGS), (_LONGS, _LONGS, _LONGS, _TABLE, _LONGS)
        compile_function(_fill, (*columns, *recipes, _LONGS, _LONGS, _INTS, _LONGS, _LONGS, _LONGS, _LONGS, types.float64[::1]))
    return _fill


@numba.njit(nogil=True)
def _fill(
    origins,
    rows,
    row_lengths,
    recipes,
    own,
    own_first,
    changes,
    change_first,
    begins,
    addresses,
    kinds,
    first,
    strides,
    starts,
    words,
    doubles,
):
    """Do what _Recipes.fill says; `doubles` is the same memory as `words`."""
    row = 0
    for task in range(len(origins)):
        recipe, start = recipes[task], starts[task]
        if recipe >= 0:
            low, high = own_first[recipe], own_first[recipe + 1]
            for at in range(high - low):
                words[start + at] = own[low + at]
            for change in range(change_first[recipe], change_first[recipe + 1]):
                word, place = rows[row + changes[change, 1]], start + changes[change, 2]
                if changes[change, 0] == _CONSTANT:
                    words[place] = word
                elif changes[change, 0] == _TO_DOUBLE:
                    doubles[place] = word
                else:
                    if word < 0:
                        word = begins[-1 - word >> FAMILY_BITS] + (-1 - word & (1 << FAMILY_BITS) - 1)
                    axes, kind = changes[change, 3], kinds[word]
                    words[place] = addresses[word]
                    for axis in range(axes):
                        words[place + 1 + axes + axis] = strides[first[kind] + axis]
        row += row_lengths[origins[task]]
