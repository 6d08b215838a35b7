"""Combiners: how copies of a reduced tile become one. OmpSs-2's operators by their signs, and reductions of one's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np


@dataclass(frozen=True, eq=False)
class Combiner:
    """A reduction of one's own: `Reduction[Combiner(neutral, combine), N]`.

    `neutral`: what a copy begins with, and changes nothing: a number, a tuple for a structured type, or an array that fits every tile.
    `combine`: a kernel of two tiles of the same sizes, `into: InOut[...], part: In[...]`, that brings the second into the first; or a
    function of two arrays that returns a new one, as NumPy's do: np.hypot. `part` is always of later tasks than `into`.
    """

    neutral: Any
    combine: Callable

    @property
    def name(self) -> str:
        function: Any = self.combine
        return function.name if hasattr(function, "name") else getattr(function, "__name__", "user")

    def neutral_of(self, dtype: np.dtype) -> Any:
        """Return what a copy of this type begins with."""
        del dtype
        return self.neutral

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Operator:
    """A combiner that Reduction knows by its sign.

    `combine`: its ufunc; `scalar`: the same of two numbers, compiled. `kinds`: of types that it takes, NumPy's letters. `neutral` and
    `probe` are functions of the type: what changes nothing, and a value that shows in whatever it is combined with, for `check`.
    """

    sign: str
    name: str
    combine: np.ufunc
    scalar: Callable
    kinds: str
    neutral: Callable[[np.dtype], Any]
    probe: Callable[[np.dtype], Any]

    def neutral_of(self, dtype: np.dtype) -> Any:
        """Return what a copy of this type begins with."""
        return self.neutral(dtype)

    def probe_of(self, dtype: np.dtype) -> Any:
        """Return what shows in whatever it is combined with."""
        return self.probe(dtype)

    def __str__(self) -> str:
        return self.sign

    def __reduce__(self):
        return as_combiner, (self.sign,)


def _least(dtype: np.dtype) -> Any:
    return False if dtype.kind == "b" else -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _greatest(dtype: np.dtype) -> Any:
    return True if dtype.kind == "b" else np.inf if dtype.kind == "f" else np.iinfo(dtype).max


def _all_bits(dtype: np.dtype) -> Any:
    return True if dtype.kind == "b" else -1 if dtype.kind == "i" else np.iinfo(dtype).max


@numba.njit
def _add(a, b):
    return a + b


@numba.njit
def _multiply(a, b):
    return a * b


@numba.njit
def _minimum(a, b):
    return a if a < b or a != a else b  # NaN stays, as in NumPy


@numba.njit
def _maximum(a, b):
    return a if a > b or a != a else b


@numba.njit
def _and(a, b):
    return a & b


@numba.njit
def _or(a, b):
    return a | b


OPERATORS = {
    each.sign: each
    for each in (
        Operator("+", "sum", np.add, _add, "biufc", lambda _: 0, lambda _: 1),
        Operator("*", "product", np.multiply, _multiply, "biufc", lambda _: 1, lambda _: 2),
        Operator("min", "min", np.minimum, _minimum, "biuf", _greatest, _least),
        Operator("max", "max", np.maximum, _maximum, "biuf", _least, _greatest),
        Operator("and", "and", np.bitwise_and, _and, "biu", _all_bits, lambda _: 0),  # of each bit, as & does; of booleans the logical one
        Operator("or", "or", np.bitwise_or, _or, "biu", lambda _: 0, _all_bits),
    )
}


def as_combiner(given: object) -> Operator | Combiner:
    """Return the operator of a sign, or the combiner itself. Raises TypeError for anything else."""
    if isinstance(given, Combiner):
        return given
    operator = OPERATORS.get(given) if isinstance(given, str) else None
    if operator is None:
        raise TypeError(f"Reduction[...] takes first one of {' '.join(OPERATORS)}, or a Combiner, then what In takes; got {given!r}")
    return operator
