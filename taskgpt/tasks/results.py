"""Results: kernels write into their tiles, and return nothing unless they declare it. What a function returns is seen in its bytecode."""

import dis
import inspect
import itertools
from collections.abc import Callable


def verify_is_called(kernel: str, function: Callable, what: str) -> None:
    """Raise TypeError for a function whose call does not run it."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise TypeError(f"{kernel}: {what} is a generator or a coroutine, which would not run when it is called")


def verify_no_result(kernel: str, function: Callable, what: str) -> None:
    """Raise TypeError for a function that surely returns a value; the rest shows when it runs."""
    pairs = list(itertools.pairwise(dis.get_instructions(function)))
    unsure: set[str] = set()  # variables that may be None
    for before, store in pairs:
        if store.opname == "STORE_FAST_STORE_FAST" or (store.opname.startswith("STORE_FAST") and not _is_value(before)):
            unsure.update(_names(store))
    for before, last in pairs:
        is_value = _is_value(before) or (before.opname == "LOAD_CONST" and before.argval is not None)
        is_value = is_value or ("LOAD_FAST" in before.opname and _names(before)[-1] not in unsure)
        if (last.opname == "RETURN_VALUE" and is_value) or (last.opname == "RETURN_CONST" and last.argval is not None):
            raise TypeError(f"{kernel}: {what} returns a value, which nobody gets: kernels write into their tiles")


def _is_value(instruction: dis.Instruction) -> bool:
    """Return True for what never gives None, as a call, an attribute or a variable may."""
    return instruction.opname.startswith(("BINARY_", "UNARY_", "COMPARE_", "BUILD_"))


def _names(instruction: dis.Instruction) -> tuple[str, ...]:
    """Return the local variables of a load or a store: Python 3.13 has instructions of two."""
    return instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
