"""What a compiled function is made from: its code, its helpers', and every value outside them that numba freezes into machine code.

A dispatcher (njit function) compiles its Python code with the globals and closures that it finds at that moment, as constants. Nothing
tells it when one of them changes later, on disk or in the process. `Sources` reads what numba would read, so that two states of a program
can be compared: equal parts, equal machine code.
"""

import enum
import functools
import hashlib
import inspect
import itertools
import operator
import os
import sys
import sysconfig
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import NamedTuple

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import extending, types

from taskgpt.tasks.bytecode import content_of_code, lines_of_code, names_in
from taskgpt.tasks.linked import Linked, Referred

try:  # private to numba; `_are_registries_known` looks whether they are what this module takes them for
    from numba.core import entrypoints, imputils
    from numba.core.dispatcher import Dispatcher
    from numba.core.typing import templates
    from numba.np.ufunc.dufunc import DUFunc
except ImportError:
    entrypoints = imputils = templates = None
    Dispatcher = DUFunc = ()  # what is no Dispatcher has no content: nothing is kept

# dispatcher -> (the digest of what its machine code in this process was made from, its signatures), as far as cache.py has compiled it
compiled_from: "weakref.WeakKeyDictionary[Dispatcher, tuple[str, list]]" = weakref.WeakKeyDictionary()
# those that it compiled for one signature and no others; their author gave them none
compiled_for_one: "weakref.WeakSet[Dispatcher]" = weakref.WeakSet()

_NOTHING = object()  # what a name stands for that the namespace has not
_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, range, slice)
_LIBRARIES = ("numba", "numpy", "llvmlite")  # whose versions stand for what is in them, as Python's does for its own modules
_ARRAY_LIMIT_BYTES = 10**6  # numba does not copy larger global arrays into the code: it keeps their address, and sees their elements change
# Settings of numba that change no code.
_HARMLESS = ("CACHE_", "COLOR_", "CUDA_", "DEBUG_CACHE", "DISABLE_PERF", "FUNCTION_CACHE", "GDB_", "NUMBA_", "SHOW_HELP", "THREADING_")


class Sources:
    """All that numba compiles a function from.

    Attributes: `parts`, (what, content) in an order that the program gives; `lines`, where in its file each function stands, which machine
    code tells where it raises; `everywhere`, the sources of what is registered with numba for operators, libraries' functions and the like,
    to which any code may come; `unknown`, why the machine code cannot be kept, if it cannot; `helpers`, the dispatchers that it calls,
    directly or not; `linked`, what it calls by a symbol, whose sources are among `parts`, too; `referred`, what it knows by a symbol
    alone; `has_intrinsics`, whether an intrinsic is among what it calls.
    """

    def __init__(self, function: Callable, is_everywhere: bool = False):
        self.parts: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.unknown: list[str] = []
        self.helpers: list[Dispatcher] = []
        self.linked: list[Linked] = []
        self.referred: list[Referred] = []
        self.has_intrinsics = False
        self._open: list[object] = []  # the functions and containers that are being visited
        self._names: dict[tuple[int, str], tuple[dict, str, object]] = {}  # (namespace, name, what it stands for)
        self._insides: dict[int, tuple[object, list]] = {}  # (object that can change, what is in it) by its id
        self._numbers: dict[int, int] = {}  # id of a function, which what it belongs to keeps alive -> its number
        self._registrations = _registrations()
        if self._registrations is None:
            self.unknown.append(f"numba {numba.__version__} registers overloads in an unknown way")
            self._registrations = _Registrations({}, {}, [], set(), [])
        self._visit(function)
        others = () if is_everywhere else self._registrations.everywhere
        self.everywhere = {each: Sources(each.function, is_everywhere=True) for each in others}
        self.unknown += self._registrations.unknown
        for each in self.everywhere.values():
            self.unknown += each.unknown
            self.helpers += [helper for helper in each.helpers if helper not in self.helpers]
            self.linked += [linked for linked in each.linked if linked not in self.linked]
            self._watch_all_of(each)
        self._namespaces = tuple(zip(*self._names.values(), strict=True)) or ((), (), ())

    def digest(self) -> str:
        """Return 64 bits that differ when the machine code may: by the parts, numba's settings, or the versions of what compiles."""
        everywhere = [(each.purpose, sources.parts, sources.lines) for each, sources in self.everywhere.items()]
        parts = self.parts, self.lines, everywhere, sorted(self._registrations.versions)
        return hashlib.sha256(repr((parts, _environment())).encode()).hexdigest()[:16]

    def changed_since(self, earlier: "Sources") -> str | None:
        """Return what is not as it was, or None.

        Neither a function that only stands on other lines is a change, nor what was registered since for names that the code does not have.
        """
        for before, now in itertools.zip_longest(earlier.parts, self.parts, fillvalue=("", "")):
            if before != now:
                (was, _), (now_is, _) = before, now
                is_inserted = was in dict(self.parts) and now_is not in dict(earlier.parts)
                return now_is if is_inserted or not was else was
        if self.referred != earlier.referred:
            return "a kernel that it spawns"
        for each, sources in self.everywhere.items():
            if each in earlier.everywhere and (changed := sources.changed_since(earlier.everywhere[each])):
                return f"{changed} (of what is registered with numba for {each.key})"
        return None

    def are_untouched(self) -> bool:
        """Return True if every name stands for the very object that it stood for, and this has the bytes or the members that it had.

        To be asked before every run: a comparison takes a thousand times as long. It does not see what changes deeper, such as the
        attribute of a class.
        """
        namespaces, names, values = self._namespaces
        if not all(map(operator.is_, map(dict.get, namespaces, names, itertools.repeat(_NOTHING)), values)):
            return False
        return all(_are_same(_inside(value), before) for value, before in self._insides.values())

    def _visit(self, function: Callable) -> str:
        """Take in a function of Python code, once; return its number, in words; of a library's function the name."""
        if _is_library_function(function):
            return f"library {_name_of(function)} {[self._visit(each) for each in _functions_of_users(function)]}"
        if id(function) in self._numbers:
            return f"function {self._numbers[id(function)]}"
        number = self._numbers[id(function)] = len(self._numbers)
        self._open.append(function)
        code = function.__code__
        self.parts.append((f"{code.co_qualname}()", content_of_code(code)))
        self.lines.append(lines_of_code(code))
        for name, value in (("defaults", function.__defaults__), ("keyword defaults", function.__kwdefaults__)):
            self.parts.append((f"the {name} of {code.co_qualname}()", self._content(value, name)))
        for name, value in self._outside(function):
            self.parts.append((f"'{name}'", self._content(value, name)))
        for name in dict.fromkeys([*names_in(code)[0], *names_in(code)[1]]):
            for each in self._registrations.by_name.get(name, ()):
                self.parts.append((f"the overload of '{name}'", self._visit_registered(each)))
        self._open.pop()
        return f"function {number}"

    def _visit_registered(self, registered: "_Registered") -> str:
        return f"{self._visit(registered.function)} {registered.purpose}"

    def _outside(self, function: Callable) -> Iterator[tuple[str, object]]:
        """Yield (name, value) of what a function finds outside itself: globals, its closure, attributes of modules that it reaches."""
        names, attributes, imports = names_in(function.__code__)
        found = [(name, function.__globals__[name]) for name in names if name in function.__globals__]
        self._watch_names(function.__globals__, names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._watch(cell)
            found += [(name, value) for value in _inside(cell)]
            if not _inside(cell):
                self.unknown.append(f"'{name}' has no value yet")
        for name in imports:
            if not _is_of_library(name):
                self.unknown.append(f"it imports {name} while it is compiled")
        modules: list[ModuleType] = []
        asks = "getattr" in names
        for name, value in found:  # which grows
            if inspect.ismodule(value) and value not in modules and not _is_of_library(getattr(value, "__name__", None)):
                modules.append(value)
                if asks:
                    self.unknown.append(f"it may ask {name} for attributes by getattr()")
                reached = [attribute for attribute in attributes if attribute in vars(value)]
                found += [(f"{name}.{attribute}", vars(value)[attribute]) for attribute in reached]
                self._watch_names(vars(value), reached)
        yield from found

    def _watch_names(self, namespace: dict, names: Iterable[str]) -> None:
        self._names.update(((id(namespace), name), (namespace, name, namespace.get(name, _NOTHING))) for name in names)

    def _watch_all_of(self, other: "Sources") -> None:
        self._names.update(other._names)
        self._insides.update(other._insides)

    def _watch(self, value: object) -> None:
        self._insides[id(value)] = value, _inside(value)

    def _content(self, value: object, name: str) -> str:
        """Return text that differs when what numba makes of the value may; note in `unknown` that it has none."""
        try:
            return self._content_of(value, name)
        except Exception:  # of an object whose attributes raise
            return self._no_content(value, name)

    def _content_of(self, value: object, name: str) -> str:
        kind = type(value)
        if kind in _PLAIN:
            return f"{kind.__name__} {value!r}"
        if isinstance(value, enum.Enum):
            return f"{_name_of(kind)}.{value.name} {self._content(value.value, name)}"
        if isinstance(value, np.dtype):
            return f"dtype {value!r}"
        if isinstance(value, (np.generic, np.ndarray)):
            return self._array(value, name)
        if isinstance(value, (list, dict, set)):
            self._watch(value)
        if isinstance(value, (tuple, list, set, frozenset, dict)):
            if any(each is value for each in self._open):
                return self._no_content(value, name)  # it holds itself
            self._open.append(value)
            contents = [self._content(each, name) for each in (value.items() if isinstance(value, dict) else value)]
            self._open.pop()
            return f"{_name_of(kind)} {sorted(contents) if isinstance(value, (set, frozenset)) else contents}"
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, (types.Type, ir.Type)) and not isinstance(value, (types.ClassType, types.ClassInstanceType)):
            return f"{_name_of(kind)} {value}" if _is_of_library(kind.__module__) else self._no_content(value, name)
        overloads = [self._visit_registered(each) for each in self._registrations.by_key.get(id(value), ())]
        return f"{self._callable(value, name)} {overloads}"

    def _array(self, value: np.generic | np.ndarray, name: str) -> str:
        form = f"{_name_of(type(value))} {value.dtype!r} {value.shape}"
        if isinstance(value, np.generic):
            if isinstance(value, np.void):  # a row of an array, which can change
                self._watch(value)
            return f"{form} {value.tobytes().hex()}"
        flags = value.flags
        form += f" {flags.c_contiguous} {flags.f_contiguous} {flags.aligned} {flags.writeable}"
        if value.nbytes > _ARRAY_LIMIT_BYTES:
            self.unknown.append(f"'{name}' is so large an array that compiled code holds its address; pass it as a tile")
            return f"{form} at {value.ctypes.data} {value.strides}"
        if value.dtype.hasobject:
            return self._no_content(value, name)
        self._watch(value)
        return f"{form} {hashlib.sha256(value.tobytes()).hexdigest()}"

    def _callable(self, value: object, name: str) -> str:
        if isinstance(value, Dispatcher) and hasattr(value, "targetoptions"):
            if value.py_func in self._open:
                self.unknown.append(f"'{name}' calls itself, and numba crashes when it loads such code")
            options = tuple(value.targetoptions.items()), tuple(getattr(value, "locals", {}).items())
            text = f"njit {self._visit(value.py_func)} {self._content(options, name)}"
            if value not in self.helpers:
                self.helpers.append(value)
            # A helper that its author compiled for given types alone converts its arguments to them.
            is_lazy = getattr(value, "_can_compile", False) or value in compiled_for_one
            return text if is_lazy else f"{text} {sorted(map(str, value.signatures))}"
        definition = getattr(value, "_defn", None)  # of an intrinsic
        if isinstance(definition, FunctionType):
            self.has_intrinsics = True
            return f"intrinsic {self._visit(definition)} {_text_of((value._prefer_literal, sorted(value._ctor_kwargs.items())))}"
        if isinstance(value, Linked):
            return self._take_in(value)
        if isinstance(value, Referred):
            self.referred += [value] if value not in self.referred else []
            return value.reference()
        if isinstance(value, FunctionType):
            return self._visit(value)  # run when an intrinsic is compiled; or, with NUMBA_DISABLE_JIT, a helper
        if isinstance(value, np.ufunc) and getattr(np, value.__name__, None) is value:
            return f"ufunc {value.__name__}"
        if isinstance(value, BuiltinFunctionType) or _is_in_library(value):
            return f"library {_name_of(value)}"
        if isinstance(value, type) and issubclass(value, enum.Enum):
            return f"{_name_of(value)} {[self._content(member, name) for member in value]}"
        if isinstance(value, type) and issubclass(value, BaseException):
            return _name_of(value)  # raised by name
        if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
            return f"{_name_of(value)} {value._fields}"
        return self._no_content(value, name)

    def _take_in(self, linked: Linked) -> str:
        """Take in what is called by a symbol, once: not with its helpers, which are compiled apart."""
        if linked not in self.linked:
            inner = Sources(getattr(linked.function, "py_func", linked.function), is_everywhere=True)
            self.linked.append(linked)
            self.parts += inner.parts
            self.lines += inner.lines
            self.unknown += inner.unknown
            self._watch_all_of(inner)
        return f"linked {linked.name} {self.linked.index(linked)} {linked.signature}"

    def _no_content(self, value: object, name: str) -> str:
        self.unknown.append(f"'{name}' is a {_name_of(type(value))}, whose changes a cache would not see")
        text = f"{_name_of(type(value))} at {id(value)}"
        if isinstance(value, DUFunc):  # of numba.vectorize
            return f"{text} {self._visit(value._dispatcher.py_func)}"
        return text


def _inside(value: object) -> list:
    """Return what can change inside of an object while that stays the same object."""
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:
            return []
    if isinstance(value, (np.ndarray, np.void)):
        return [value.tobytes()]
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def _are_same(members: list, others: list) -> bool:
    return len(members) == len(others) and all(a is b or (type(a) is bytes and a == b) for a, b in zip(members, others, strict=True))


def _name_of(value) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _is_in_library(value: object) -> bool:
    """Return True for the very object that a library has under its name, such as a class: what is made of that class may be anybody's."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return isinstance(name, str) and _is_of_library(module) and getattr(sys.modules.get(module), name, None) is value


def _is_library_function(function: FunctionType) -> bool:
    return _is_of_library(function.__globals__.get("__name__"))  # __module__ says what it wraps, if it does


def _functions_of_users(function: FunctionType) -> list[FunctionType]:
    """Return the function, or, if it is a library's, those of others that it has been made of."""
    if not _is_library_function(function):
        return [function]
    inside = [value for cell in function.__closure__ or () for value in _inside(cell)]
    return [value for value in inside if isinstance(value, FunctionType) and not _is_library_function(value)]


@functools.cache
def _is_of_library(module: str | None) -> bool:
    """Return True for a module of Python or of a library that compiles: its version, which is in the digest, stands for its content."""
    top = (module or "").partition(".")[0]
    if top in _LIBRARIES or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    is_python = file is None or os.path.realpath(file).startswith(os.path.realpath(sysconfig.get_path("stdlib")) + os.sep)
    return top in sys.stdlib_module_names and is_python  # and not a user's file of the same name


def _environment() -> tuple:
    """Return what else decides about machine code. The processor is not here: numba's cache tells processors apart."""
    settings = [(k, repr(v)) for k, v in sorted(vars(numba.config).items()) if k.isupper() and not k.startswith(_HARMLESS)]
    return sys.version, numba.__version__, llvmlite.__version__, np.__version__, settings


# What is registered with numba: @overload and its kin, @type_callable, @lower_builtin and its kin -----------------------------------------


class _Registered(NamedTuple):
    """A function of Python code, not of a library, that numba runs to know what something is in compiled code."""

    function: Callable
    key: str  # what it is registered for
    options: str

    @property
    def purpose(self) -> str:
        return f"for {self.key} {self.options}"


class _Registrations(NamedTuple):
    """What is registered for a function of the user's own counts where that is reached. All else counts everywhere, under any name."""

    by_key: dict[int, list[_Registered]]  # by the id of that function, which numba keeps
    by_name: dict[str, list[_Registered]]  # of all else: by the name of the method, the attribute or the function
    everywhere: list[_Registered]
    versions: set[str]  # of installed packages that register something everywhere; they stand for it
    unknown: list[str]  # why nothing that is compiled can be kept


def _registrations() -> _Registrations | None:
    """Return what is registered now, or None if this numba has it in other places than this module knows."""
    if not _are_registries_known():
        return None
    entrypoints.init_all()  # which compiling would do first
    return _registrations_among(*map(len, _registries()))


def _registries() -> tuple[list, ...]:
    typing, lowering = templates.builtin_registry, imputils.builtin_registry
    lowered = lowering.functions, lowering.getattrs, lowering.setattrs, lowering.casts, lowering.constants
    return typing.functions, typing.attributes, typing.globals, *lowered


@functools.lru_cache(maxsize=1)
def _registrations_among(*_counts: int) -> _Registrations:
    found = _Registrations(defaultdict(list), defaultdict(list), [], set(), [])
    functions, attributes, typed, *lowered = _registries()
    classes = [*functions, *attributes, *(each for _, numba_type in typed for each in getattr(numba_type, "templates", ()))]
    for template in dict.fromkeys(classes):
        for function in _functions_in(template):
            _note(found, function, template.key, getattr(template, "_attr", None), _options_of(template))
        for each in _classes_of_users(template):
            if version := _installed_version(each.__module__):
                found.versions.add(version)
            else:
                found.unknown.append(f"{_name_of(each)} tells numba what functions are, and a cache would not see it change")
    for function, key, *arguments in itertools.chain(*lowered):
        for each in _functions_of_users(function):
            _note(found, each, key, None, arguments)
    return found


@functools.cache
def _functions_in(template: type) -> list[FunctionType]:
    """Return the functions of others than libraries that numba has made a template of, such as @overload does."""
    values = [getattr(value, "__func__", value) for name, value in vars(template).items() if name != "key"]
    return [function for value in values if isinstance(value, FunctionType) for function in _functions_of_users(value)]


@functools.cache
def _classes_of_users(template: type) -> list[type]:
    return [each for each in template.__mro__ if not _is_of_library(each.__module__)]


def _options_of(template: type) -> dict:
    options = {name: getattr(template, name, None) for name in ("_jit_options", "_strict", "prefer_literal", "metadata")}
    return options | {"inline": getattr(getattr(template, "_inline", None), "value", None)}


def _text_of(options: object) -> str:
    """Return the same text for equal options in any order."""
    if isinstance(options, Mapping):
        return str(sorted((name, _text_of(value)) for name, value in options.items()))
    return str(sorted(map(str, options)) if isinstance(options, (set, frozenset)) else options)


def _note(found: _Registrations, function: Callable, key: object, attribute: str | None, options: object) -> None:
    module, name = getattr(key, "__module__", None), getattr(key, "__name__", str(key))
    registered = _Registered(function, f"{module}.{name}{f'.{attribute}' if attribute else ''}", _text_of(options))
    if isinstance(module, str) and not _is_of_library(module) and attribute is None:
        found.by_key[id(key)].append(registered)
    elif version := _installed_version(function.__globals__.get("__name__")):
        found.versions.add(version)
    else:
        found.everywhere.append(registered)
        found.by_name[attribute or name].append(registered)


def _installed_version(module: str | None) -> str | None:
    """Return name and version of the installed package that the module belongs to, if it does."""
    top = (module or "").partition(".")[0]
    package = sys.modules.get(top)
    folders = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("purelib", "platlib"))
    is_installed = os.path.realpath(getattr(package, "__file__", None) or "").startswith(folders)
    return f"{top} {package.__version__}" if is_installed and hasattr(package, "__version__") else None


@functools.cache
def _are_registries_known() -> bool:
    """Return True if what a program registers would be found where this module looks for it."""

    def key(): ...

    def overload(): ...

    try:
        template = templates.make_overload_template(key, overload, {"fastmath": True}, True, "always", prefer_literal=True, target="cpu")
        options = {"_jit_options": {"fastmath": True}, "_strict": True, "prefer_literal": True, "metadata": {"target": "cpu"}}
        return (
            template.key is key
            and _options_of(template) == {**options, "inline": "always"}
            and _functions_in(template) == [overload]
            and types.Function(template).templates == (template,)
            and extending.infer.__self__ is extending.infer_getattr.__self__ is templates.builtin_registry
            and extending.lower_builtin.__self__ is imputils.builtin_registry
            and all(type(each) is list for each in _registries())
        )
    except (AttributeError, TypeError):
        return False
