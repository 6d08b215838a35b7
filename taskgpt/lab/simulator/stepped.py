"""The native scheduler's own source, a step at a time: what it does to memory that threads share, on a clock or in any order one likes.

    memory = Memory()
    code = Stepped(memory)
    running = code.work(table, 3)       # worker 3: a generator
    step = next(running)                # its first step: ("load", (words, index))
    step = running.send(memory.do(step))

A compiled function becomes a generator that stops before each atomic operation, wait or call of a kernel, yields its name and arguments,
and goes on with what it is sent. The text of the functions is that of queues.py and worker.py; only their primitives, those of
pointers.py, are others. So what is counted, or explored in every interleaving, is the code that runs, and not a model of it.
"""

import ast
import ctypes
import inspect
import textwrap
from collections.abc import Callable, Generator
from types import FunctionType
from typing import Any

from numba.core.registry import CPUDispatcher

from taskgpt import pointers
from taskgpt.schedulers.native import heap, idle, nested, open_run, places, queues, regions, release, ring, table, worker
from taskgpt.sharing import layout, leases

Step = tuple[str, tuple]  # a primitive of pointers.py, and its arguments
Steps = Generator[Step, Any, Any]

MODULES = [layout, leases, table, ring, heap, idle, queues, release, places, open_run, regions, nested, worker]
ATOMIC = {"load", "store", "store_last", "fetch_add", "fetch_or", "fetch_and", "exchange", "compare_exchange"}
WAITS = {"relax", "sched_yield", "mutex_lock", "mutex_unlock", "condition_wait", "condition_timedwait", "condition_signal"}
WAITS |= {"condition_broadcast", "futex_wait", "futex_wake"}
STEPS = ATOMIC | WAITS | {"call_entry"}


class Words:
    """Words of this process' memory by their address; `touched` is told of every plain access."""

    def __init__(self, address: int, touched: Callable[[int, bool], None] | None):
        self.address, self._touched = address, touched
        self.raw = ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))

    def __getitem__(self, index: int) -> int:
        if self._touched:
            self._touched(self.address + pointers.WORD_BYTES * index, False)
        return self.raw[index]

    def __setitem__(self, index: int, value: int) -> None:
        if self._touched:
            self._touched(self.address + pointers.WORD_BYTES * index, True)
        self.raw[index] = value


class Memory:
    """What stepped code reaches by address: the memory that compiled code has, NumPy's arrays."""

    def __init__(self, touched: Callable[[int, bool], None] | None = None):
        self._touched = touched
        self._words: dict[int, Words] = {}

    def words_at(self, address: int) -> Words:
        if address not in self._words:
            self._words[address] = Words(int(address), self._touched)
        return self._words[address]

    @staticmethod
    def address_of(words: Words, index: int) -> int:
        return words.address + pointers.WORD_BYTES * int(index)

    @staticmethod
    def word(address: int) -> int:
        """Return the word at an address."""
        return ctypes.c_int64.from_address(address).value

    @staticmethod
    def do(step: Step) -> int:
        """Do an atomic step; return what it returns."""
        name, (words, index, *value) = step
        before = words.raw[index]
        if name in ("store", "store_last", "exchange"):
            words.raw[index] = value[0]
        elif name == "fetch_add":
            words.raw[index] = before + value[0]
        elif name == "fetch_or":
            words.raw[index] = before | value[0]
        elif name == "fetch_and":
            words.raw[index] = before & value[0]
        elif name == "compare_exchange":
            words.raw[index] = value[1] if before == value[0] else before
        elif name != "load":
            raise ValueError(f"no atomic operation '{name}'")
        return before


class Stepped:
    """The compiled functions of the scheduler by their names: generators, or plain functions where they have no step."""

    def __init__(self, memory: Memory):
        replaced = {
            "words_at": memory.words_at,
            "address_of": memory.address_of,
            "clock_gettime": lambda *_: 0,
            "sched_setaffinity": lambda *_: 0,
        }
        known = {name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, CPUDispatcher)}
        trees = {name: _tree(function) for name, function in known.items()}
        stepping = _that_step(trees)
        names = {id(function.py_func.__globals__): {} for function in known.values()}
        for name, function in known.items():
            space = names[id(function.py_func.__globals__)]
            if not space:
                space.update(function.py_func.__globals__, **replaced)
            setattr(self, name, _made(trees[name], space, stepping))
        for space in names.values():
            space.update({name: getattr(self, name) for name in known if name in space})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the scheduler has no compiled function '{name}'")


def _tree(function: CPUDispatcher) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.py_func))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    return tree


def _called(tree: ast.AST) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _that_step(trees: dict[str, ast.FunctionDef]) -> set[str]:
    """Return the functions that have a step, or call one that has."""
    found: set[str] = set()
    while more := {name for name, tree in trees.items() if _called(tree) & (STEPS | found)} - found:
        found |= more
    return found


class _Yields(ast.NodeTransformer):
    """Has steps yielded, and those of functions that are called."""

    def __init__(self, stepping: set[str]):
        self._stepping = stepping

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in STEPS:
            return ast.Yield(ast.Tuple([ast.Constant(name), ast.Tuple(node.args, ast.Load())], ast.Load()))
        return ast.YieldFrom(node) if name in self._stepping else node


def _made(tree: ast.FunctionDef, space: dict[str, Any], stepping: set[str]) -> FunctionType:
    body = ast.fix_missing_locations(ast.Module([_Yields(stepping).visit(tree)], []))
    made: dict[str, FunctionType] = {}
    exec(compile(body, f"<{tree.name}, a step at a time>", "exec"), space, made)
    return made[tree.name]
