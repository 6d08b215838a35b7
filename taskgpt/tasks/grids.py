"""Grids: the cells of all tensors that a graph, or a program, has met, each one object.

Tensors may share memory if they are the same array and one grid is cut wherever the other is, too: then the cells of both are those of the
finer one, for it tells apart whatever the other does.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from taskgpt.tasks.dependencies import Cell
from taskgpt.tasks.tensor import Bounds, GridError, Tensor, Tile


class Grids:
    """`finest`: of tensors that share memory with others, the grid that all of them go by."""

    def __init__(self):
        self._cells: dict[Tensor, defaultdict[tuple[int, ...], Cell]] = {}  # by their positions; one for all that share memory
        self._met: dict[Tensor, None] = {}  # those that the program brought
        self.finest: dict[Tensor, Bounds] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._cells

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._met)

    def cells_of(self, tile: Tile) -> tuple[Cell, ...]:
        """Return the cells that a tile touches; new ones of what nobody touched."""
        return tuple(map(self._cells[tile.tensor].__getitem__, tile.cells(self.finest.get(tile.tensor))))

    def finest_of(self, tensor: Tensor) -> Tensor:
        """Return the tensor whose cells a tensor goes by: itself, or one that shares its memory."""
        bounds = self.finest.get(tensor, tensor.bounds)
        return next(each for each in (tensor, *self._met) if each.bounds is bounds)

    def memory(self, tensor: Tensor) -> int:
        """Return a number that tensors which share memory have in common."""
        return id(self._cells[tensor])

    def add(self, tensor: Tensor, is_private: bool = False) -> None:
        """Add the grid of memory that no other tensor has; of private memory, none that the program will bring either."""
        self._cells[tensor] = defaultdict(Cell)
        if not is_private:
            self._met[tensor] = None

    def other(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor that shares memory with one that is not here."""
        if tensor in self._cells:
            return None
        return next((other for other in self._met if tensor.shares_memory(other)), None)

    def verify_joins(self, tensor: Tensor, other: Tensor, may_refine: bool) -> None:
        """Raise GridError unless one of two grids over one memory refines the other; and if the new one does, and may not."""
        known = self.finest.get(other, other.bounds)
        if not tensor.is_like(other) or not (_refines(known, tensor.bounds) or _refines(tensor.bounds, known)):
            raise GridError(
                f"'{tensor.name}' ({tensor}) and '{other.name}' ({other}) share memory: two grids over one buffer would hide dependencies, "
                "unless both are of the whole array, and one is cut wherever the other is; index one tensor in both places"
            )
        if not may_refine and not _refines(known, tensor.bounds):
            raise GridError(f"'{tensor.name}' cuts the memory of '{other.name}' finer, whose tasks may run: name the finer one first")

    def join(self, tensor: Tensor, other: Tensor) -> Sequence[Tensor]:
        """Add the grid of memory that another tensor has, too; return the tensors whose cells are others now, finer ones."""
        known = self.finest.get(other, other.bounds)
        refined: list[Tensor] = []
        if not _refines(known, tensor.bounds):
            refined, known = self._refine(other, tensor.bounds), tensor.bounds
        self._met[tensor] = None
        self._cells[tensor] = self._cells[other]
        self.finest[tensor] = self.finest[other] = known
        return refined

    def _refine(self, tensor: Tensor, finer: Bounds) -> list[Tensor]:
        """Cut the cells of a tensor and of those that share its memory further: new cells, of which nobody has had the lock."""
        whole = self._cells[tensor]
        pieces: defaultdict[tuple[int, ...], Cell] = defaultdict(Cell)
        sharing = [each for each in self._met if self._cells[each] is whole]
        for each in sharing:
            self._cells[each], self.finest[each] = pieces, finer
        return sharing


def _refines(finer: Bounds, other: Bounds) -> bool:
    """Return True if a grid is cut wherever another one is."""
    return all(set(mine) >= set(others) for mine, others in zip(finer, other, strict=True))
