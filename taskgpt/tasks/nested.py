"""`spawn` in compiled twins: what numba makes of a kernel's last parameter, and of the tiles and futures beside it.

    @kernel(compiled=True)
    def fib(n: int, spawn: Spawn) -> int:
        if n < 2:
            return n
        first, second = spawn(fib, n - 1), spawn(fib, n - 2)
        return first.result() + second.result()

The text is the body's: `tile.array`, `tile.shape` and `tile[index]` are what they are in Python, and refuse what Tile does. A twin spawns
kernels that have twins, with arguments alone, and waits with `taskwait()` and `result()`; what else Spawn has is for bodies in Python.

Numba is told in registries of our own, which it sees besides its own: those all twins' sources are searched for (sources.py).
"""

import functools
import hashlib
import inspect
import operator
import sys
from concurrent.futures import CancelledError
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, imputils
from numba.core.datamodel import models, register_default
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.core.typing import signature, templates
from numba.extending import typeof_impl
from numba.np.arrayobj import populate_array

from taskgpt.tasks import frames
from taskgpt.tasks.access import Access
from taskgpt.tasks.frames import MOST_AXES, OVER, RAN, SPAWN, VALUE, WAIT, WAIT_FOR_ALL, WORD, call_scheduler, in_frame
from taskgpt.tasks.linked import Referred

_MOST_WORDS = 64  # of a call: what a scheduler has room for
_SPAWN_KEY = "taskgpt.spawn"

_typing, _lowering = templates.Registry(), imputils.Registry("taskgpt")


@functools.cache
def tell_numba() -> None:
    """Have numba know the types of this file."""
    for context, registry in ((cpu_target.typing_context, _typing), (cpu_target.target_context, _lowering)):
        context.refresh()  # numba's own come first: intrinsics are noted in the first of all
        context.install_registry(registry)


# Types ----------------------------------------------------------------------------------------------------------------------------------


class TileType(types.Type):
    """A tile: `array` is the type of its array."""

    def __init__(self, array: types.Array):
        self.array = array
        super().__init__(f"tile of {array}")


class KernelType(types.Type):
    """A kernel, as a global."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        super().__init__(f"kernel {kernel.name} at {id(kernel)}")


class FutureType(types.Type):
    """A task that was spawned; `result` is the type of what it returns, void if nothing."""

    def __init__(self, result: types.Type):
        self.result = result
        super().__init__(f"future of {result}")


class SpawnType(types.Callable):
    """What a body spawns with. Its name tells what is made of it here, as a twin that is kept must not be found when that changes."""

    def __init__(self):
        made_of = "".join(inspect.getsource(module) for module in (sys.modules[__name__], frames))
        super().__init__(f"spawn {hashlib.sha256(made_of.encode()).hexdigest()[:16]}")

    def get_call_type(self, context, args, kws):
        if kws:
            raise TypingError(f"compiled code spawns with arguments alone, without {', '.join(f'{name}=' for name in kws)}")
        if not args or not isinstance(args[0], KernelType):
            raise TypingError("compiled code spawns a kernel that is a global name, and its arguments after it")
        kernel, given = args[0].kernel, args[1:]
        _verify_spawnable(kernel)
        if len(given) != len(kernel.parameters):
            raise TypingError(f"{kernel.name} takes {len(kernel.parameters)} arguments ({', '.join(kernel.parameters)}), got {len(given)}")
        wanted = [_argument(kernel, name, declared, each) for (name, declared), each in zip(kernel.parameters.items(), given, strict=True)]
        return signature(FutureType(kernel.result_type), args[0], *wanted, recvr=self)

    def get_call_signatures(self):
        return (), False

    def get_impl_key(self, sig):
        return _SPAWN_KEY


def _verify_spawnable(kernel: Any) -> None:
    reasons = {
        "has no compiled twin": kernel._twin is None,
        "has Scratch, whose size only Python works out": bool(kernel.scratch),
        f"has a tile of more than {MOST_AXES} axes": any(len(each.dims) > MOST_AXES for each in kernel.accesses.values()),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise TypingError(f"compiled code cannot spawn {kernel.name}, which {reason}")
    if (count := sum(_word_count(declared) for declared in kernel.parameters.values())) > _MOST_WORDS:
        raise TypingError(f"compiled code cannot spawn {kernel.name}, whose arguments take {count} words of {_MOST_WORDS}")


def _word_count(declared: Any) -> int:
    return 1 + 2 * len(declared.dims) if isinstance(declared, Access) else 1


def _argument(kernel: Any, name: str, declared: Any, given: types.Type) -> types.Type:
    """Return the type that an argument is converted to."""
    where = f"{kernel.name}: '{name}' wants"
    if declared is int and isinstance(given, (types.Integer, types.Boolean)):
        return types.int64
    if declared is float and isinstance(given, (types.Integer, types.Boolean, types.Float)):
        return types.float64
    if not isinstance(declared, Access):
        raise TypingError(f"{where} a constant ({declared.__name__}), got {given}")
    if not isinstance(given, TileType):
        raise TypingError(f"{where} a tile, got {given}")
    wanted = declared.numba_type
    if (given.array.dtype, given.array.ndim) != (wanted.dtype, wanted.ndim):
        raise TypingError(f"{where} {declared.dtype} of {wanted.ndim} dimensions, got {given.array.dtype} of {given.array.ndim}")
    if declared.is_written and not given.array.mutable:
        raise TypingError(f"Cannot modify readonly array {name}")  # numba's words, where an In tile is written
    return given


@register_default(SpawnType)
class _SpawnModel(models.PrimitiveModel):
    """The address of the frame."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, WORD)


@register_default(TileType)
class _TileModel(models.StructModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, [("array", kind.array)])


@register_default(FutureType)
class _FutureModel(models.StructModel):
    """`value`: the result, if the task was done at once, and `place` is RAN."""

    def __init__(self, manager, kind):
        super().__init__(manager, kind, [("frame", types.int64), ("place", types.int64), ("value", types.int64)])


register_default(KernelType)(models.OpaqueModel)


@typeof_impl.register(Referred)
def _(value: Any, context: Any) -> KernelType:
    return KernelType(value)


@_lowering.lower_constant(KernelType)
def _(context, builder, kind, value):
    return context.get_dummy_value()


def as_tile(context, builder, array_type: types.Array, array):
    """Return a tile with this array."""
    tile = cgutils.create_struct_proxy(TileType(array_type))(context, builder)
    tile.array = array
    return tile._getvalue()


# Spawning -------------------------------------------------------------------------------------------------------------------------------


@_lowering.lower(_SPAWN_KEY, types.VarArg(types.Any))
def _(context, builder, sig, args, loc=None):
    frame, kernel = builder.inttoptr(args[0], WORD.as_pointer()), sig.args[1].kernel
    words: list = []
    tiles: list[int] = []
    sizes: dict[str, tuple[Any, str]] = {}  # of each dimension: how long it is, and of which tile
    for (name, declared), kind, given in zip(kernel.parameters.items(), sig.args[2:], args[2:], strict=True):
        if not isinstance(declared, Access):
            words.append(builder.bitcast(given, WORD) if declared is float else given)
            continue
        tiles += [len(words), len(declared.dims), declared.dtype.itemsize, int(declared.is_written)]
        array = _array_of(context, builder, kind, given)
        shape = cgutils.unpack_tuple(builder, array.shape, kind.array.ndim)
        for dim, size in zip(declared.dims, shape, strict=True):
            wanted, of = (
                (context.get_constant(types.intp, dim), "declared") if isinstance(dim, int) else sizes.setdefault(dim, (size, name))
            )
            with cgutils.if_unlikely(builder, builder.icmp_signed("!=", size, wanted)):
                told = f"{kernel.name}: '{name}' has another size {dim} than {of if of == 'declared' else repr(of)}, line {loc.line}"
                context.call_conv.return_user_exc(builder, ValueError, (told,))
        words += [builder.ptrtoint(array.data, WORD), *shape, *cgutils.unpack_tuple(builder, array.strides, kind.array.ndim)]
    buffer = cgutils.alloca_once(builder, WORD, max(1, len(words)))
    for at, word in enumerate(words):
        builder.store(word, cgutils.gep_inbounds(builder, buffer, at))
    entry = _global(builder.module, kernel.link())
    described = [len(words), int(kernel.result is not None), len(tiles) // 4, *tiles]
    passed = [builder.load(entry), builder.ptrtoint(buffer, WORD), _constant_words(builder, described), ir.Constant(WORD, loc.line)]
    place = call_scheduler(builder, frame, SPAWN, passed)
    _raise_status(context, builder, place)
    future = cgutils.create_struct_proxy(sig.return_type)(context, builder)
    future.frame, future.place, future.value = args[0], place, in_frame(builder, frame, VALUE)
    return future._getvalue()


def _global(module, symbol: str):
    if symbol not in module.globals:
        word = ir.GlobalVariable(module, WORD, symbol)
        word.linkage = "external"
    return module.globals[symbol]


def _constant_words(builder, words: list[int]):
    kind = ir.ArrayType(WORD, len(words))
    constant = cgutils.global_constant(builder.module, "described", ir.Constant(kind, words))
    return builder.ptrtoint(constant, WORD)


def _raise_status(context, builder, status) -> None:
    """Raise what a status of the scheduler means."""
    with cgutils.if_unlikely(builder, builder.icmp_signed("<", status, ir.Constant(WORD, RAN))):
        with builder.if_then(builder.icmp_signed("==", status, ir.Constant(WORD, OVER))):
            context.call_conv.return_user_exc(builder, CancelledError, ("the program has ended: a task failed, or it was interrupted",))
        told = "tasks wait inside of each other too deeply; have small ones do their work without spawning"
        context.call_conv.return_user_exc(builder, RecursionError, (told,))


# Waiting --------------------------------------------------------------------------------------------------------------------------------


@_typing.register_attr
class _OfSpawn(templates.AttributeTemplate):
    key = SpawnType

    @templates.bound_function("spawn.taskwait")
    def resolve_taskwait(self, spawn, args, kws):
        return signature(types.void) if not args and not kws else None


@_typing.register_attr
class _OfFuture(templates.AttributeTemplate):
    key = FutureType

    @templates.bound_function("future.result")
    def resolve_result(self, future, args, kws):
        return signature(future.result) if not args and not kws else None


@_lowering.lower("spawn.taskwait", SpawnType)
def _(context, builder, sig, args):
    _raise_status(context, builder, call_scheduler(builder, builder.inttoptr(args[0], WORD.as_pointer()), WAIT_FOR_ALL, []))
    return context.get_dummy_value()


@_lowering.lower("future.result", FutureType)
def _(context, builder, sig, args):
    future = cgutils.create_struct_proxy(sig.args[0])(context, builder, args[0])
    frame = builder.inttoptr(future.frame, WORD.as_pointer())
    value = cgutils.alloca_once_value(builder, future.value)
    with builder.if_then(builder.icmp_signed("!=", future.place, ir.Constant(WORD, RAN))):
        _raise_status(context, builder, call_scheduler(builder, frame, WAIT, [future.place]))
        builder.store(in_frame(builder, frame, VALUE), value)
    word, kind = builder.load(value), sig.return_type
    if kind == types.void:
        return context.get_dummy_value()
    return builder.bitcast(word, ir.DoubleType()) if kind == types.float64 else context.cast(builder, word, types.int64, kind)


# Tiles ----------------------------------------------------------------------------------------------------------------------------------


@_typing.register_attr
class _OfTile(templates.AttributeTemplate):
    key = TileType

    def resolve_array(self, tile):
        return tile.array

    def resolve_shape(self, tile):
        return types.UniTuple(types.intp, tile.array.ndim)


@_lowering.lower_getattr(TileType, "array")
def _(context, builder, kind, value):
    return _array_of(context, builder, kind, value)._getvalue()


@_lowering.lower_getattr(TileType, "shape")
def _(context, builder, kind, value):
    return _array_of(context, builder, kind, value).shape


def _array_of(context, builder, kind: TileType, value):
    tile = cgutils.create_struct_proxy(kind)(context, builder, value)
    return context.make_array(kind.array)(context, builder, tile.array)


@_typing.register_global(operator.getitem)
class _Part(templates.AbstractTemplate):
    """tile[index]: a tile."""

    key = operator.getitem

    def generic(self, args, kws):
        if len(args) != 2 or not isinstance(args[0], TileType):
            return None
        tile, index = args
        kinds = list(index) if isinstance(index, types.BaseTuple) else [index]
        if len(kinds) > tile.array.ndim:
            raise TypingError(f"a tile of {tile.array.ndim} axes got {len(kinds)} indices")
        for kind in kinds:
            if not isinstance(kind, types.Integer) and not (isinstance(kind, types.SliceType) and not kind.has_step):
                raise TypingError(f"a tile takes integers and slices without step, got {kind}")
        axes = tile.array.ndim - sum(isinstance(kind, types.Integer) for kind in kinds)
        if axes and len(kinds) == tile.array.ndim and isinstance(kinds[-1], types.Integer):
            raise TypingError("the last axis of a tile takes a slice, so that elements lie side by side")
        kept = tile.array.copy(ndim=axes, layout="C" if axes <= 1 else "A")
        wanted = types.Tuple([kind if isinstance(kind, types.SliceType) else types.intp for kind in kinds])
        return signature(TileType(kept), tile, wanted if isinstance(index, types.BaseTuple) else wanted[0])


@_lowering.lower(operator.getitem, TileType, types.Any)
def _(context, builder, sig, args):
    of, part, index_type = sig.args[0].array, sig.return_type.array, sig.args[1]
    array = _array_of(context, builder, sig.args[0], args[0])
    is_tuple = isinstance(index_type, types.BaseTuple)
    kinds = list(index_type) if is_tuple else [index_type]
    indices = cgutils.unpack_tuple(builder, args[1], len(kinds)) if is_tuple else [args[1]]
    sizes, steps = (cgutils.unpack_tuple(builder, each, of.ndim) for each in (array.shape, array.strides))
    zero = ir.Constant(WORD, 0)
    at, shape, strides = builder.ptrtoint(array.data, WORD), [], []
    for axis, (size, step) in enumerate(zip(sizes, steps, strict=True)):
        kind = kinds[axis] if axis < len(kinds) else None
        if isinstance(kind, types.Integer):
            start, stop = indices[axis], builder.add(indices[axis], ir.Constant(WORD, 1))
        elif kind is not None:
            chosen = context.make_helper(builder, kind, indices[axis])
            start = chosen.start
            is_open = builder.icmp_signed("==", chosen.stop, context.get_constant(types.intp, types.intp.maxval))
            stop = builder.select(is_open, size, chosen.stop)
        else:
            start, stop = zero, size
        if kind is not None:
            is_inside = builder.and_(builder.icmp_signed(">=", start, zero), builder.icmp_signed("<=", stop, size))
            is_inside = builder.and_(is_inside, builder.icmp_signed("<", start, stop))
            with cgutils.if_unlikely(builder, builder.not_(is_inside)):
                told = f"axis {axis} of a tile: an index leaves it, or selects nothing"
                context.call_conv.return_user_exc(builder, IndexError, (told,))
        at = builder.add(at, builder.mul(start, step))
        if not isinstance(kind, types.Integer):
            shape.append(builder.sub(stop, start))
            strides.append(step)
    made = context.make_array(part)(context, builder)
    item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(part.dtype)))
    data = builder.inttoptr(at, context.get_data_type(part.dtype).as_pointer())
    populate_array(made, data=data, shape=shape, strides=strides, itemsize=item, meminfo=None)
    return as_tile(context, builder, part, made._getvalue())
