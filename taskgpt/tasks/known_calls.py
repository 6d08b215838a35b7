"""Known calls: what a graph, or a program, works out once for all calls of a kernel on tiles of the same forms."""

from array import array
from collections.abc import Callable, Iterator, Sequence

from taskgpt.tasks.dependencies import Cell
from taskgpt.tasks.grids import Grids
from taskgpt.tasks.kernel import AccessError, Kernel
from taskgpt.tasks.reductions import combining
from taskgpt.tasks.task import Call, Signature, plain, verify_writeable
from taskgpt.tasks.tensor import Tensor, Tile


class Place:
    """What is known of a tile: one object for all tiles of the same index, with its number, and the number of its form."""

    __slots__ = ("_cells", "_grids", "form", "number", "tile")

    def __init__(self, tile: Tile, number: int, form: int, grids: Grids):
        self.tile, self.number, self.form = tile, number, form
        self._grids = grids
        self._cells: tuple[Cell, ...] | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        if self._cells is None:
            self._cells = self._grids.cells_of(self.tile)
        return self._cells

    def forget_cells(self) -> None:
        """Ask for the cells anew: the grid has become finer."""
        self._cells = None


class PlacesOf(dict[tuple, Place]):
    """The places in a tensor, by the spans of the tile; and of each its number, and where it begins and ends on each axis."""

    __slots__ = ("ends", "numbers")

    def __init__(self):
        self.numbers, self.ends = array("q"), array("q")


class CallSignature(Signature):
    """How calls of a kernel on tiles of the same forms access them, too.

    Of each tile: `names`, of its parameter; `accesses`, as declared; `kinds`, as done. `written`: (number among the tiles, name).
    `reductions`: (number among the tiles, and among the arguments, combiner). Of each argument `layout` has None for a tile, for a list
    its length, for a constant its type; `constants`: (number among the arguments, whether it is a float).
    """

    __slots__ = ("accesses", "constants", "kinds", "layout", "names", "reductions", "written")

    def __init__(self, call: Call, allow_commutative: bool):
        kernel = call.kernel
        super().__init__(kernel)
        self.names = tuple(name for name, _ in call.tiles())
        self.accesses = tuple(kernel.accesses[name] for name in self.names)
        kinds = [access.kind for access in self.accesses]
        self.kinds = tuple("inout" if kind == "commutative" and not allow_commutative else kind for kind in kinds)
        self.written = tuple((at, name) for at, name in enumerate(self.names) if self.accesses[at].is_written)
        self.layout = tuple(None if isinstance(a, Tile) else len(a) if isinstance(a, tuple) else type(a) for a in call.args)
        self.constants = tuple((at, kind is float) for at, kind in enumerate(self.layout) if isinstance(kind, type))
        position = {name: at for at, name in enumerate(kernel.parameters)}
        found = zip(self.names, self.accesses, strict=True)
        self.reductions = tuple((at, position[name], each.combiner) for at, (name, each) in enumerate(found) if each.combiner)
        for access in self.accesses:
            if access.combiner:
                combining(access.combiner, access.dtype, len(access.dims))  # raises for a kernel that cannot


class KnownCalls:
    """Kernels, tensors and tiles as far as calls have named them.

    `verify_kernel(kernel)` raises for one that cannot be called here; `before_join()` is called before a tensor is taken in that shares the
    memory of another; `may_refine`: whether cells may become finer then. `grids`: of all tensors.
    """

    def __init__(
        self,
        verify_kernel: Callable[[Kernel], None],
        before_join: Callable[[], None],
        allow_commutative: bool = False,
        may_refine: bool = True,
    ):
        self._verify_kernel, self._before_join = verify_kernel, before_join
        self._allow_commutative, self._may_refine = allow_commutative, may_refine
        self.grids = Grids()
        self._kernels: set[Kernel] = set()
        self._places: dict[Tensor, PlacesOf] = {}
        self.place_of: list[Place] = []  # by number
        self._forms: dict[tuple, int] = {}  # of tiles: shape and type, numbered
        self._signatures: dict[tuple, CallSignature] = {}  # by the kernel and, for each argument, its form or, of a constant, its type

    def look_up(self, kernel: Kernel, args: tuple) -> tuple[CallSignature, Sequence[Place], tuple]:
        """Return what is known of a call and of its tiles, and its arguments with these tiles in them.

        Raises for a call of a new kind as `TaskGraph.spawn` does.
        """
        return self._look_up(kernel, args) or self._learn(Call(kernel, args))

    def _look_up(self, kernel: Kernel, args: tuple) -> tuple[CallSignature, list[Place], tuple] | None:
        """Return what is known of a call and of its tiles, and its arguments with these tiles in them; None for a new kind of call."""
        places: list[Place] = []
        known: list = []
        key: list = [kernel]
        for argument in args:
            if type(argument) is Tile:
                places_of = self._places.get(argument.tensor)
                if places_of is None:
                    return None
                place = places_of.get(argument.spans) or self.place(argument)
                places.append(place)
                known.append(place.tile)
                key.append(place.form)
            elif type(argument) in (tuple, list):
                found = self._look_up_list(argument)
                if found is None:
                    return None
                places += found
                known.append(tuple([place.tile for place in found]))
                key.append(tuple([place.form for place in found]))
            else:
                if type(argument) is int:
                    if argument.bit_length() > 63:
                        return None  # not every integer fits
                elif type(argument) is not float:
                    argument = plain(argument)
                known.append(argument)
                key.append(type(argument))
        signature = self._signatures.get(tuple(key))
        return None if signature is None else (signature, places, tuple(known))

    def _look_up_list(self, tiles: Sequence[Tile]) -> list[Place] | None:
        if not all(type(tile) is Tile and tile.tensor in self._places for tile in tiles):
            return None
        return [self.place(tile) for tile in tiles]

    def _learn(self, call: Call) -> tuple[CallSignature, list[Place], tuple]:
        """Verify a call of a new kind, and know it from now on. Return what `_look_up` does."""
        kernel = call.kernel
        call.verify()
        if any(type(a) is int and a.bit_length() > 64 for a in call.args):  # declared float
            call = Call(kernel, tuple([float(a) if type(a) is int else a for a in call.args]))
        if kernel not in self._kernels:
            self._verify_kernel(kernel)
            kernel.verify_sources()
            self._kernels.add(kernel)
        for _, tile in call.tiles():
            self.place(tile)
        places: list[Place] = []
        known: list = []
        key: list = [kernel]
        for argument in call.args:
            if isinstance(argument, (Tile, tuple)):
                found = [self.place(tile) for tile in (argument if isinstance(argument, tuple) else (argument,))]
                places += found
                tiles, forms = tuple(place.tile for place in found), tuple(place.form for place in found)
                known.append(tiles if isinstance(argument, tuple) else tiles[0])
                key.append(forms if isinstance(argument, tuple) else forms[0])
            else:
                known.append(argument)
                key.append(type(argument))
        if tuple(key) not in self._signatures:
            self._signatures[tuple(key)] = CallSignature(call, self._allow_commutative)
        return self._signatures[tuple(key)], places, tuple(known)

    def place(self, tile: Tile) -> Place:
        """Return what is known of a tile. Raises GridError if its memory has two grids, see grids.py."""
        if tile.tensor not in self._places:
            self._know(tile.tensor)
        places = self._places[tile.tensor]
        place = places.get(tile.spans)
        if place is None:
            form = self._forms.setdefault((tile.shape, tile.tensor.array.dtype), len(self._forms))
            place = places[tile.spans] = Place(tile, len(self.place_of), form, self.grids)
            self.place_of.append(place)
            places.numbers.append(place.number)
            for ends in tile.ranges:
                places.ends.extend(ends)
        return place

    def places(self) -> Iterator[tuple[Tensor, PlacesOf]]:
        """Yield all that is known of places, by their tensors."""
        yield from self._places.items()

    def verify_written(self, signature: CallSignature, places: Sequence[Place]) -> None:
        """Raise AccessError if a written tile overlaps another or is read-only."""
        finest = self.grids.finest
        for at, name in signature.written:
            tile = places[at].tile
            tensor = tile.tensor
            if not tensor.array.flags.writeable:
                verify_writeable(signature.kernel, name, tile)
            has_likes = tensor in finest
            for other_at, other in enumerate(places):
                if (other.tile.tensor is tensor or has_likes) and other_at != at and tile.overlaps(other.tile):
                    first, second = (signature.names[n] for n in sorted((at, other_at)))
                    where = f"{signature.kernel.name}: '{first}' and '{second}' overlap in {tensor.name}"
                    raise AccessError(f"{where}; declare one InOut instead")

    def know_private(self, tensor: Tensor) -> None:
        """Take in the grid of a tensor whose memory no other has."""
        self.grids.add(tensor, is_private=True)
        self._places[tensor] = PlacesOf()

    def _know(self, tensor: Tensor) -> None:
        """Take a tensor's grid in. Memory that another tensor cuts, too, goes by the finer of the two grids; if none is, it is refused."""
        other = self.grids.other(tensor)
        if other is None:
            self.grids.add(tensor)
        else:
            self.grids.verify_joins(tensor, other, self._may_refine)
            self._before_join()
            for each in self.grids.join(tensor, other):
                for place in self._places[each].values():
                    place.forget_cells()
        self._places[tensor] = PlacesOf()
