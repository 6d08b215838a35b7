"""Calling kernels from native code: an address per kernel, and a call's arguments as flat words. No Python, no GIL.

    int32 entry(int64 *words, char *scratch, int64 *worker)

`words` holds, for each array, its address, shape and strides; for scratch, its place in the worker's scratch instead of an address; for a
constant, the number (a double by its bits). The entry builds numba's arrays on the stack and calls the compiled twin. It returns 0, and
the twin's result in `worker[1]`, or 1 if the twin raised: then `worker[0]` is the exception, a reference that the caller owns.

An entry that runs Python may return HELD: the task waits for events (events.py), and who fulfils the last one releases it. `worker[2]` says
which task that is, -1 where it has to wait for them inside.

A twin that spawns is given a frame (frames.py): `worker[2]` is the place of its task, `worker[3]` where the scheduler has its functions.
"""

import ctypes
import itertools
import math
import struct
import time
import weakref
from array import array
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.np.arrayobj import populate_array

from taskgpt.tasks.access import Access
from taskgpt.tasks.cache import undisturbed
from taskgpt.tasks.events import Awaited, take_awaited, this_thread
from taskgpt.tasks.frames import CARRIED, END, WORD, call_scheduler, in_frame, new_frame
from taskgpt.tasks.kernel import Kernel, compile_kernels
from taskgpt.tasks.nested import TileType, as_tile
from taskgpt.tasks.scratch import Shapes, scratch_layout
from taskgpt.tasks.task import Call
from taskgpt.tasks.tensor import Tile

_BYTE_POINTER = ir.IntType(8).as_pointer()
PYTHON_ENTRY = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))  # takes the GIL

_RESULT, _PLACE, _NESTING = 1, 2, 3  # in `worker`
HELD = 2  # what an entry returns of a task that is not done when its body is
Held = Callable[[int, Awaited, int], bool]  # see python_entry


def waits_inside(_place: int, awaited: Awaited, _start_ns: int) -> bool:
    """The Held of who has nobody to release tasks later: wait, and say that it is released at once."""
    awaited.wait()
    return False


def has_native_entry(call: Call) -> bool:
    """Return True if the call runs as compiled code: a plain call (not a checked one) of a kernel with a compiled twin."""
    return type(call) is Call and call.kernel.has_machine_code


def native_entry(kernel: Kernel) -> int:
    """Return the address of the kernel's entry, made at the first call. The kernel must be compiled; the code lives as long as its twin."""
    twin = kernel._twin  # which the kernel may change for another one
    known = _entries.get(twin)
    if known is None:
        known = _entries[twin] = undisturbed(lambda: _build(kernel))
        kernel.entry_word[0] = known[1]
    return known[1]


def prepare_spawned(kernel: Kernel) -> None:
    """Have entries of all that a compiled kernel spawns, directly or not. Raises what `Kernel.compile` raises for one of them."""
    known, left = {kernel}, [kernel]
    while left:
        for each in left.pop().spawned:
            if each not in known:
                if each.is_compiled:
                    each.verify_untouched()
                else:
                    compile_kernels([each])
                native_entry(each)
                known.add(each)
                left.append(each)


def python_entry(call: Call, held: Held) -> tuple[int, object]:
    """Return (address, what keeps it alive) of an entry that takes the GIL and runs the call in Python.

    `held(place, awaited, start_ns)` is asked for a task whose body has made events, unless it has to wait for them: is it to be released
    later, by who fulfils the last one?
    """

    def run(_words, _scratch, error):
        this_thread.at = call
        try:
            start_ns = time.monotonic_ns()
            call.run()
            awaited = take_awaited()
            if awaited is not None:
                place = ctypes.c_int64(error[_PLACE] or 0).value
                if place < 0:
                    awaited.wait()
                elif held(place, awaited, start_ns):
                    return HELD
        except BaseException as raised:
            error[0] = give_exception(raised)
            return 1
        finally:
            this_thread.at = None
            take_awaited()  # of a body that failed
        return 0

    callback = PYTHON_ENTRY(run)
    return ctypes.cast(callback, ctypes.c_void_p).value, callback


def value_of(word: int, kind: type) -> int | float | bool:
    """Return a result that an entry left as a word."""
    return struct.unpack("d", struct.pack("q", word))[0] if kind is float else kind(word)


def told_words(kernel: Kernel, words: Sequence[int]) -> str:
    """Return the arguments of a call from its words: constants, and the shapes of tiles."""
    told, at = [], 0
    for name, declared in kernel.parameters.items():
        if isinstance(declared, Access):
            axes = len(declared.dims)
            told.append(f"{name}[{' x '.join(str(size) for size in words[at + 1 : at + 1 + axes])}]")
            at += 1 + 2 * axes
        else:
            told.append(f"{name}={value_of(int(words[at]), declared)}")
            at += 1
    return ", ".join(told)


def give_exception(error: BaseException) -> int:
    """Return a reference to an exception, which `take_exception` takes over."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
    return id(error)


def take_exception(address: int) -> BaseException:
    """Return the exception that an entry left, taking over its reference."""
    error = ctypes.cast(address, ctypes.py_object)
    exception = error.value
    ctypes.pythonapi.Py_DecRef(error)
    return exception


class Words:
    """The words of calls, one after another in `words`. What tiles and scratch have in common between calls is worked out once."""

    def __init__(self):
        self.words = array("q")
        self._known: dict[Tile | Shapes, tuple[int, ...]] = {}

    def add(self, call: Call) -> None:
        """Add the words of a call."""
        for declared, argument in zip(call.kernel.parameters.values(), call.args, strict=True):
            if isinstance(argument, Tile):
                self.words.extend(self._known.get(argument) or self._know(argument, _words_of_tile))
            else:
                self.words.append(_bits_of(argument) if declared is float else int(argument))
        if call.kernel.scratch:
            self.words.extend(self._known.get(call.scratch_shapes) or self._know(call.scratch_shapes, _words_of_scratch))

    def _know(self, what, words_of) -> tuple[int, ...]:
        self._known[what] = words = tuple(words_of(what))
        return words


def _words_of_tile(tile: Tile) -> list[int]:
    address, shape, strides = tile.tensor.address, [], []
    for span, stride in zip(tile.spans, tile.tensor.array.strides, strict=True):
        if isinstance(span, tuple):
            address += span[0] * stride
            shape.append(span[1] - span[0])
            strides.append(stride)
        else:
            address += span * stride
    return [address, *shape, *strides]


def _words_of_scratch(shapes: Shapes) -> list[int]:
    words: list[int] = []
    for (shape, dtype), offset in zip(shapes, scratch_layout(shapes)[0], strict=True):
        # Not those of an empty array of NumPy's, of which the one of a single axis is 0.
        words += (offset, *shape, *(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
    return words


def _bits_of(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


# The entry's code ---------------------------------------------------------------------------------------------------------------------


_numbers = itertools.count()
_entries: "weakref.WeakKeyDictionary[object, tuple[object, int]]" = weakref.WeakKeyDictionary()  # twin -> its code library, its address


def _build(kernel: Kernel) -> tuple[object, int]:
    """Return (library, address). Its few instructions are made anew in every process: 10 ms a kernel, nothing to keep on disk."""
    [compiled] = kernel._twin.overloads.values()
    context = kernel._twin.targetctx
    name = f"taskgpt_entry_{next(_numbers)}_{kernel.name}"
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    entry = ir.Function(module, ir.FunctionType(ir.IntType(32), [WORD.as_pointer(), _BYTE_POINTER, WORD.as_pointer()]), name)
    builder = ir.IRBuilder(entry.append_basic_block("entry"))
    declared = compiled.signature.args[: len(kernel.parameters) + len(kernel.scratch)]
    values = _arguments(context, builder, kernel, declared, *entry.args[:2])
    twin = context.declare_function(module, compiled.fndesc)  # by its symbol: the twin is in the process already
    frame = new_frame(builder, *(in_frame(builder, entry.args[2], at) for at in (_PLACE, _NESTING))) if kernel.spawns else None
    values += [builder.ptrtoint(frame, WORD)] if kernel.spawns else []
    kind = compiled.signature.return_type
    status, result = context.call_conv.call_function(builder, twin, kind, compiled.signature.args, values)
    error = builder.bitcast(entry.args[2], _BYTE_POINTER.as_pointer())
    if kernel.spawns:
        call_scheduler(builder, frame, END, [])
        carried = in_frame(builder, frame, CARRIED)
        with builder.if_then(cgutils.is_not_null(builder, builder.inttoptr(carried, _BYTE_POINTER))):
            builder.store(carried, entry.args[2])
            builder.ret(ir.Constant(ir.IntType(32), 1))
    with builder.if_then(status.is_ok, likely=True):
        if kind != types.none:  # which also a twin with a result has that always raises
            word = builder.bitcast(result, WORD) if kind == types.float64 else context.cast(builder, result, kind, types.int64)
            builder.store(word, cgutils.gep_inbounds(builder, entry.args[2], _RESULT))
        builder.ret(ir.Constant(ir.IntType(32), 0))
    _hand_over_exception(context, builder, status, error)
    builder.ret(ir.Constant(ir.IntType(32), 1))
    with global_compiler_lock:
        library.add_ir_module(module)
        library.finalize()
    return library, library.get_pointer_to_function(name)


def word_functions(functions: Sequence) -> tuple[object, list[int]]:
    """Return what keeps them alive, and the addresses, of compiled functions of words as C calls them."""
    context = functions[0].targetctx
    library = context.codegen().create_library("taskgpt_words")
    names = [f"taskgpt_words_{next(_numbers)}_{function.py_func.__name__}" for function in functions]
    module = library.create_ir_module("taskgpt_words")
    for name, function in zip(names, functions, strict=True):
        [compiled] = function.overloads.values()
        kinds = compiled.signature.args
        wrapper = ir.Function(module, ir.FunctionType(WORD, [WORD] * len(kinds)), name)
        builder = ir.IRBuilder(wrapper.append_basic_block("entry"))
        called = context.declare_function(module, compiled.fndesc)
        _, result = context.call_conv.call_function(builder, called, compiled.signature.return_type, kinds, wrapper.args)
        builder.ret(result)
    with global_compiler_lock:
        library.add_ir_module(module)
        library.finalize()
    return library, [library.get_pointer_to_function(name) for name in names]


def _arguments(context, builder, kernel: Kernel, declared: Sequence[types.Type], words, scratch) -> list:
    """Build the arguments of the compiled twin from words."""
    position = 0

    def next_word():
        nonlocal position
        position += 1
        return builder.load(cgutils.gep_inbounds(builder, words, position - 1))

    values = []
    first_scratch = len(kernel.parameters)
    for at, each in enumerate(declared):
        if each in (types.int64, types.float64):
            word = next_word()
            values.append(builder.bitcast(word, ir.DoubleType()) if each == types.float64 else word)
            continue
        is_tile = isinstance(each, TileType)
        each = each.array if is_tile else each
        array = context.make_array(each)(context, builder)
        place = next_word()
        data_type = context.get_data_type(each.dtype).as_pointer()
        is_scratch = at >= first_scratch
        data = builder.bitcast(builder.gep(scratch, [place]), data_type) if is_scratch else builder.inttoptr(place, data_type)
        shape = [next_word() for _ in range(each.ndim)]
        strides = [next_word() for _ in range(each.ndim)]
        item_bytes = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(each.dtype)))
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=item_bytes, meminfo=None)
        values.append(as_tile(context, builder, each, array._getvalue()) if is_tile else array._getvalue())
    return values


def _hand_over_exception(context, builder, status, error) -> None:
    """Make the exception that the status stands for, and put it into `*error`."""
    pyapi = context.get_python_api(builder)
    gil = pyapi.gil_ensure()
    context.call_conv.raise_error(builder, pyapi, status)
    nothing = ir.Constant(_BYTE_POINTER, None)
    kind, value, traceback = (cgutils.alloca_once_value(builder, nothing) for _ in range(3))
    pointer = _BYTE_POINTER.as_pointer()
    for function in ("PyErr_Fetch", "PyErr_NormalizeException"):
        call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer] * 3), function)
        builder.call(call, [kind, value, traceback])
    release = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [_BYTE_POINTER]), "Py_DecRef")
    builder.call(release, [builder.load(kind)])
    builder.call(release, [builder.load(traceback)])  # Py_DecRef takes null
    builder.store(builder.load(value), error)
    pyapi.gil_release(gil)
