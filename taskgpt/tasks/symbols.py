"""Functions that compiled twins call by a symbol, as they call BLAS: compiled once for all of them, and kept on disk like twins.

A helper becomes part of every twin that calls it, and is optimised there anew. That is what small helpers want; loops of many lines make
compiling slow. By a symbol, a call with three tiles costs some 20 nanoseconds.

The symbol carries a digest of all that the function was made from. What a twin was made from includes the same sources, so a twin that is
found on disk never calls anything else. The function is compiled without checks of indices, also for twins that have them.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from taskgpt.tasks.cache import bounds_checked, compile_kept
from taskgpt.tasks.linked import Linked
from taskgpt.tasks.sources import Sources

_linked: dict[str, Any] = {}  # symbol -> what it stands for, as long as the process lives: compiled code calls it


def by_symbol(name: str, /, **parameters: types.Type) -> Callable:
    """Decorate a function that makes a numba function of these parameters; the result is called as f((argument, ...)) in a compiled twin.

    It takes all arguments as one tuple, and returns nothing. An exception that it raises is the twin's. What makes it is not called at
    import, but when something that calls it is compiled or loaded.
    """

    def decorate(make: Callable[[], Any]):
        return _call_of(Linked(name, parameters, make, _link))

    return decorate


def _link(linked: Linked) -> str:
    with bounds_checked(False):
        code = linked.function.py_func
        symbol = f"taskgpt_{linked.name}_{Sources(code).digest()}"
        if symbol not in _linked:
            function = numba.njit(nogil=True, error_model="numpy")(code)  # another one for other sources: the earlier one may be in use
            compile_kept(function, linked.signature, linked.name)
            [compiled] = function.overloads.values()
            llvmlite.binding.add_symbol(symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
            _linked[symbol] = function
    return symbol


def _call_of(linked: Linked):
    @intrinsic
    def call(typing_context, arguments):
        wanted = linked.signature.args
        if not (isinstance(arguments, types.BaseTuple) and len(arguments) == len(wanted)):
            raise TypingError(f"{linked.name} takes one tuple of {len(wanted)} arguments, got {arguments}")
        for name, given, declared in zip(linked.parameters, arguments, wanted, strict=True):
            if isinstance(declared, types.Array) and isinstance(given, types.Array) and declared.mutable and not given.mutable:
                raise TypingError(f"Cannot modify readonly array {name}")  # numba's words, where an In tile is written
            if typing_context.can_convert(given, declared) is None:
                raise TypingError(f"{linked.name}: '{name}' wants {declared}, got {given}")

        def codegen(context, builder, signature, args):
            given = zip(cgutils.unpack_tuple(builder, args[0], len(wanted)), signature.args[0], wanted, strict=True)
            values = [context.cast(builder, value, have, want) for value, have, want in given]
            kind = context.call_conv.get_function_type(types.none, wanted)
            function = cgutils.get_or_insert_function(builder.module, kind, linked.link())
            status, _ = context.call_conv.call_function(builder, function, types.none, wanted, values)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return context.get_dummy_value()

        return types.void(arguments), codegen

    return call
