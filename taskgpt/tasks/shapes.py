"""Shapes: the sizes that the dimension names of a kernel stand for in a call."""

import math
from collections.abc import Mapping
from typing import Any

from taskgpt.tasks.access import Access


class ShapeError(ValueError):
    """A tile does not have the shape or the type that its kernel declares."""


def sizes_of(kernel: str, accesses: Mapping[str, Access], shapes: Mapping[str, Any]) -> dict[str, int]:
    """Return the size that each dimension name stands for, given the shape of each tile, of Several a sequence of them.

    The name of such a list stands for how many tiles it has; dimensions of empty lists alone have the size 0. Raises ShapeError if a tile
    has another number of dimensions, or if one name would stand for two sizes.
    """
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    several: dict[str, int] = {}
    for name, access in accesses.items():
        if access.is_several:
            several[name] = len(shapes[name])
        for shape in shapes[name] if access.is_several else (shapes[name],):
            if len(shape) != len(access.dims):
                names = ", ".join(map(str, access.dims))
                raise ShapeError(f"{kernel}: '{name}' wants {len(access.dims)} dimensions ({names}), got shape {shape}")
            for dim, size in zip(access.dims, shape, strict=True):
                wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                first = origin.setdefault(str(dim), name)
                if size != wanted:
                    said = "" if isinstance(dim, int) else f" as in '{first}'"
                    raise ShapeError(f"{kernel}: '{name}' wants {dim} = {wanted}{said}, got shape {shape}")
    if not several:
        return sizes
    absent = {dim: 0 for access in accesses.values() for dim in access.dims if isinstance(dim, str)}
    return absent | sizes | several


def elements(name: str, access: Access, sizes: Mapping[str, int]) -> int:
    """Return how many elements a call touches of a tile, or of a list of tiles."""
    return math.prod(d if isinstance(d, int) else sizes[d] for d in access.dims) * (sizes[name] if access.is_several else 1)
