"""What the code of a twin does not hold, but calls by a symbol; see symbols.py and nested.py. Here is what sources.py must know of it."""

import hashlib
from array import array
from collections.abc import Callable
from functools import cached_property
from typing import Any

import llvmlite.binding
from numba.core import types
from numba.core.typing import Signature


class Linked:
    """A function that is compiled once, for one signature, and that compiled code calls by a symbol. It returns nothing.

    Attributes: `name`; `signature`; `parameters`, their names; `function`, numba's dispatcher, made when somebody first asks.
    """

    def __init__(self, name: str, parameters: dict[str, types.Type], make: Callable[[], Any], link: Callable[["Linked"], str]):
        self.name = name
        self.parameters = tuple(parameters)
        self.signature: Signature = types.void(*parameters.values())
        self._make, self._link = make, link

    @cached_property
    def function(self) -> Any:
        return self._make()

    def link(self) -> str:
        """Return the symbol, which LLVM knows from now on: compile the function, or load it, if it is not in this process."""
        return self._link(self)


class Referred:
    """Something that compiled code calls through a word of this process, and of which it has the symbol of that alone.

    Attributes: `name`; `entry_word`, the address of what is called, 0 until it is there.
    """

    name: str

    def __init__(self) -> None:
        self.entry_word = array("q", [0])

    def reference(self) -> str:
        """Return all that such code takes from it, in words."""
        raise NotImplementedError

    def link(self) -> str:
        """Return the symbol of its word, for what is compiled or loaded next: another one of the same reference has the same symbol."""
        symbol = f"taskgpt_word_{hashlib.sha256(self.reference().encode()).hexdigest()[:16]}"
        llvmlite.binding.add_symbol(symbol, self.entry_word.buffer_info()[0])
        return symbol
