"""Compiling numba functions once: machine code is kept on disk, and loaded as long as nothing has changed that it was made from.

Numba's own cache compares the function's file and closure (numba documents the limitation): a changed table, a helper in another file or
NUMBA_BOUNDSCHECK would go on running the old code, wrong numbers without a word. Here the name under which a function is kept carries a
digest of all its sources (sources.py), so that other code can never be found under it. What has no digest is not kept, with a warning that
says why; nor is anything where numba's cache is not built as this module expects. Trouble with the disk costs the time of compiling, and
not the run.
"""

import contextlib
import itertools
import linecache
import os
import re
import secrets
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

from taskgpt.tasks.linked import Referred
from taskgpt.tasks.sources import Sources, compiled_for_one, compiled_from

try:  # private to numba, all of it
    from numba.core.bytecode import FunctionIdentity
    from numba.core.caching import CompileResultCacheImpl, FunctionCache, NullCache

    _is_cache_known = hasattr(FunctionIdentity, "_unique_ids")
except ImportError:
    FunctionCache = CompileResultCacheImpl = object
    _is_cache_known = False


def compile_kept(function: Callable, signature: Any, name: str | None = None) -> tuple[Sources, bool]:
    """Compile a numba function for one signature and no others, or load it; return what it was made from, and whether it was loaded.

    To be called in `undisturbed`. `name` is what numba calls the function (its own by default). Raises what numba raises.
    """
    sources = Sources(function.py_func)
    name = name or function.py_func.__qualname__
    _verify_told_apart(sources.referred)
    for linked in (*sources.linked, *sources.referred):  # before it is loaded: LLVM ends the process where it finds a symbol unknown
        linked.link()
    if not _set_cache(function, sources, name):
        _prepare(sources)
    function.compile(signature)
    function.disable_compile()
    if not sources.are_untouched():  # compiling ran Python code, of intrinsics or overloads, which noted something
        sources = Sources(function.py_func)
    compiled_for_one.add(function)
    compiled_from[function] = sources.digest(), function.signatures
    is_loaded = bool(function.stats.cache_hits)
    if not is_loaded:  # else nothing was prepared, and helpers may be of other sources, which the next twin must not link
        for helper in sources.helpers:
            compiled_from[helper] = compiled_from[helper][0], helper.signatures
    return sources, is_loaded


def _verify_told_apart(referred: list[Referred]) -> None:
    """Raise TypeError if two would have one symbol: code would call one of them for the other."""
    of = dict.fromkeys(each.reference() for each in referred)
    if len(of) < len(referred):
        twice = next(each for each in referred if sum(other.reference() == each.reference() for other in referred) > 1)
        raise TypeError(f"it spawns two kernels that have the name {twice.name} and the same parameters; give one of them another name")


def _prepare(sources: Sources) -> None:
    """Do what must be done before anything is compiled from the sources."""
    for helper in sources.helpers:
        if _is_cache_known and not isinstance(helper._cache, NullCache):
            helper._cache = NullCache()  # njit(cache=True): numba's cache, which does not see all sources
        state = Sources(helper.py_func).digest(), helper.signatures
        if helper.signatures and compiled_from.get(helper) != state:
            helper.recompile()  # its machine code in this process may be of other sources, and would be linked
        compiled_from[helper] = state
    if _is_cache_known:
        # Numba numbers the functions of a process from 1 and writes the number into the names of their symbols. Two helpers of one name,
        # kept by two processes, could so meet in a third under one symbol, and one be called for the other.
        FunctionIdentity._unique_ids = itertools.count(secrets.randbits(48))


def compile_function(function: Callable, signature: Any) -> None:
    """Compile a numba function for one signature, or load it from the cache that the kernels use."""
    if not function.signatures:
        undisturbed(lambda: function.signatures or compile_kept(function, signature))


def reason_of(error: Exception) -> str:
    """Return what numba says of code that it cannot compile, and where, in one line instead of its sixty."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in itertools.takewhile(lambda line: not line.startswith(_NUMBA_DETAILS), lines) if line]
    said = [line.removeprefix("- ") for line in said if not line.startswith("Failed in ")] or [type(error).__name__]
    where = re.search(r"During: \w+ of .* at (?P<file>\S+) \((?P<line>\d+)\)", text) or re.search(
        r'File "(?P<file>.+?)", line (?P<line>\d+)', text
    )
    if ("Function(<intrinsic " in said[0] or "getitem(tile of" in said[-1]) and (
        raised := re.findall(r"raised a specific error:\s+(?:\w+: )?(.+)", text)
    ):
        said = raised[-1:]
    if "to none for" in text and "return_value" in text:
        said = ["it returns a value, which nobody gets: kernels write into their tiles"]
    if not where:
        return " ".join(said)
    source = linecache.getline(where["file"], int(where["line"])).strip()
    return f"{' '.join(said)}, in {os.path.basename(where['file'])}, line {where['line']}" + (f": {source}" if source else "")


_NUMBA_DETAILS = ("There are", "During:", "File ", "- argument", "This error", "For more")
_compiling = threading.Lock()


def undisturbed(work: Callable[[], Any]) -> Any:
    """Do work with numba in a thread, one at a time, and wait for it: LLVM calls back into Python, where a Ctrl-C would be lost.

    Interrupted, the caller may leave, and the work still goes on to its end.
    """

    def locked() -> Any:
        with _compiling:
            return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(locked).result()


@contextlib.contextmanager
def bounds_checked(are_checked: bool = True) -> Iterator[None]:
    """Let numba check indices in all that it compiles meanwhile, helpers too, as NUMBA_BOUNDSCHECK=1 does, or in none of it.

    Within `undisturbed`.
    """
    with global_compiler_lock:  # what other threads compile is none of ours
        before = numba.config.BOUNDSCHECK
        numba.config.BOUNDSCHECK = 1 if are_checked else None
        try:
            yield
        finally:
            numba.config.BOUNDSCHECK = before


# The files -----------------------------------------------------------------------------------------------------------------------------


_KEPT_S = 30 * 86_400  # since they were last used


class _Place(CompileResultCacheImpl):
    """Where numba keeps a function: NUMBA_CACHE_DIR, __pycache__ beside its file, or the user's cache folder, if there is one."""

    @property
    def _locator_classes(self) -> list[type]:
        has_home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") != "" and os.path.isabs(os.path.expanduser("~")))
        return [each for each in super()._locator_classes if has_home or "UserWide" not in each.__name__]


class _Cache(FunctionCache):
    """Numba's cache of one function on disk, where trouble costs the time of compiling, and not the run."""

    _impl_class = _Place

    def __init__(self, function: Callable, digest: str, before_compiling: Callable[[], None]):
        super().__init__(function)
        self._before_compiling = before_compiling
        name, found, _ = os.path.basename(self._cache_file._index_path).rpartition(digest)
        if not found:
            raise AttributeError("files are not named after functions")
        self._is_of_function = re.compile(re.escape(name) + r"([0-9a-f]{16})-.*\.nb[ic]").fullmatch  # of any digest

    def _index_key(self, signature, codegen) -> tuple:
        # Numba's own has the pickled closure in it, which is never the same twice if a dispatcher is among it. The digest knows closures.
        return signature, codegen.magic_tuple()

    def load_overload(self, *args):
        loaded = self._load(*args)
        if loaded is None:
            self._before_compiling()
        return loaded

    def _load(self, *args):
        try:
            loaded = super().load_overload(*args)
            if loaded is not None:
                with contextlib.suppress(OSError):
                    os.utime(self._cache_file._index_path)  # for `_prune`
            return loaded
        except OSError:  # saving will meet it again, and say so
            return None
        except Exception:  # damaged bytes make unpickling raise anything
            self._forget()
            _warn_once(self.cache_path, "damaged compiled kernels in numba's cache; compiling anew and replacing them, nothing needs doing")
            return None

    def save_overload(self, *args) -> None:
        try:
            super().save_overload(*args)
            self._prune()
        except Exception as error:
            self._forget()  # numba writes the index first: left alone, it could name a file that is not whole
            reason = getattr(error, "strerror", None) or type(error).__name__
            _warn_once(
                self.cache_path,
                f"cannot keep compiled kernels in numba's cache ({reason}), so every run compiles them anew; free space there, or set "
                "NUMBA_CACHE_DIR to another folder",
            )

    def _prune(self) -> None:
        """Remove what was made from other sources of the function, and has not been used for long.

        Other processes may be at it, too. One that has read an index, and then finds no code, compiles.
        """

        def last_use(files: list[os.DirEntry]) -> float:
            return max(file.stat().st_mtime for file in files)

        found: defaultdict[str, list[os.DirEntry]] = defaultdict(list)
        with contextlib.suppress(OSError):  # of what another process has removed meanwhile
            for file in os.scandir(self.cache_path):
                if is_of_function := self._is_of_function(file.name):
                    found[is_of_function[1]].append(file)
            for files in found.values():
                if last_use(files) < time.time() - _KEPT_S:
                    for file in sorted(files, key=lambda file: file.name, reverse=True):  # the index first
                        os.unlink(file)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._cache_file._index_path)


def _set_cache(dispatcher: Any, sources: Sources, name: str) -> bool:
    """Give the dispatcher its cache on disk; return False where there is no place for one, or where the sources do not tell all."""
    function = dispatcher.py_func
    file = function.__code__.co_filename
    if sources.unknown:
        _warn_once(file, f"{name} is compiled anew in every run: {sources.unknown[0]}")
        return False
    digest = sources.digest()
    function.__qualname__ = f"{name}_{digest}"  # numba names files and symbols after it
    try:
        if not (_is_cache_known and hasattr(dispatcher, "_cache")):
            raise AttributeError("no cache to replace")
        dispatcher._cache = _Cache(function, digest, lambda: _prepare(sources))
        return True
    except (OSError, RuntimeError):
        if os.path.exists(file):  # at the prompt there is no file to cache beside, and nothing wrong
            _warn_once(
                file,
                "numba's cache cannot keep compiled kernels, so every run compiles them anew: neither __pycache__ beside this file nor "
                "your cache folder can be written; set NUMBA_CACHE_DIR to a folder that can",
            )
    except (AttributeError, TypeError):
        _warn_once(
            file,
            f"compiled kernels are not kept, so every run compiles them anew: numba {numba.__version__} has another cache than expected",
        )
    return False


_warned: set[str] = set()


def _warn_once(path: str, text: str) -> None:
    """Warn in one line, for the first of many kernels. Python's own filter forgets what it showed whenever numba compiles."""
    if text not in _warned:
        warnings.warn_explicit(text, RuntimeWarning, path, 0)
        _warned.add(text)
