"""What the code of a twin does not hold, but calls by a symbol; see symbols.py. Here is what sources.py must know of it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

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
