"""What Python's code objects say: whether two do the same, where they stand, and what they ask for outside themselves."""

import dis
import functools
import hashlib
import inspect
from types import CodeType


@functools.lru_cache(maxsize=1024)
def content_of_code(code: CodeType) -> str:
    def constant(value: object) -> str:
        if inspect.iscode(value):
            return content_of_code(value)
        if isinstance(value, (tuple, frozenset)):
            contents = list(map(constant, value))
            return f"{type(value).__name__} {contents if isinstance(value, tuple) else sorted(contents)}"
        return f"{type(value).__name__} {value!r}"

    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    parts = counts, names, code.co_code, code.co_exceptiontable, list(map(constant, code.co_consts))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def lines_of_code(code: CodeType) -> str:
    inner = [lines_of_code(constant) for constant in code.co_consts if inspect.iscode(constant)]
    return hashlib.sha256(repr((code.co_firstlineno, code.co_linetable, inner)).encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def names_in(code: CodeType) -> tuple[list[str], list[str], list[str]]:
    """Return the names of globals, of attributes and of imported modules that the code, and the functions in it, ask for."""
    found: tuple[dict, dict, dict] = {}, {}, {}
    operations = {"LOAD_GLOBAL": 0, "LOAD_NAME": 0, "LOAD_ATTR": 1, "LOAD_METHOD": 1, "IMPORT_NAME": 2}
    codes = [code]
    for each in codes:
        codes += [constant for constant in each.co_consts if inspect.iscode(constant)]
        for instruction in dis.get_instructions(each):
            kind = operations.get(instruction.opname)
            if kind is not None:
                found[kind][instruction.argval] = None
    if "getattr" in found[0]:
        found[1].update({constant: None for each in codes for constant in each.co_consts if isinstance(constant, str)})
    return list(found[0]), list(found[1]), list(found[2])
