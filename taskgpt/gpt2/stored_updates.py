"""The part of the program that stores gradients: micro-batches added up, squares, the norm, and the updates that wait for it.

Here too, every function takes `spawn` and calls it with a kernel and tiles.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from taskgpt.gpt2.gradients import gradient_add, gradient_guard, gradient_norm, gradient_scale, sum_of_squares
from taskgpt.gpt2.grid import LINEAR
from taskgpt.gpt2.model import GPT2, MATRICES
from taskgpt.gpt2.replicas import Part, clear
from taskgpt.gpt2.updates import adamw_scaled_update, adamw_update
from taskgpt.tasks import Tensor, Tile

Spawn = Callable[..., object]
Index = int | slice | tuple


def part(gpt: GPT2, name: str) -> Tensor:
    """Return where the gradient of a micro-batch goes, of a parameter that is no factor of a product."""
    return gpt.g.tensors["d" + name if gpt.micro.is_first else "part_d" + name]


def add_part(spawn: Spawn, gpt: GPT2, name: str, indices: Iterable[Index]) -> None:
    """Add that to the gradient of the micro-batches before."""
    if not gpt.micro.is_first:
        for index in indices:
            spawn(gradient_add, gpt.g.tensors["d" + name][index], part(gpt, name)[index])


def stored_update(spawn: Spawn, gpt: GPT2, l: int, layer: str) -> None:
    """Square a gradient that is stored and complete, and update, unless that waits for the norm."""
    if gpt.micro.is_last:
        parts = stored_parts(gpt, l, layer)
        if gpt.replica:
            gpt.replica.reduce(spawn, partial(gradient, gpt), parts)
            return
        squares_of(spawn, gpt, parts)
        if not gpt.is_scaled:
            adamw(spawn, gpt, parts)


def squares_of(spawn: Spawn, gpt: GPT2, parts: Iterable[Part]) -> None:
    """Square parts of the gradient, a task for each."""
    for place, name, index in parts:
        spawn(sum_of_squares, gpt.s.squares[place : place + 1], gradient(gpt, name)[index])


def gradient(gpt: GPT2, name: str) -> Tensor:
    """Return where the gradient of a parameter is stored."""
    return gpt.g.tensors["d" + name]


def stored_parts(gpt: GPT2, l: int, layer: str) -> list[Part]:
    """Return (place of its squares, parameter, index) of each part of a layer's gradient: the parts that fused updates have."""
    if layer in LINEAR:
        columns = gpt.grid.columns(LINEAR[layer] * gpt.model.channels)
        indices = [[(layer + "w", (l, c)), (layer + "b", (slice(l, l + 1), c))] for c in columns]
    elif layer.startswith("ln"):
        indices = [[(name, slice(l, l + 1)) for name in norm_parameters(gpt, layer)]]
    else:
        indices = [[(layer, rows)] for rows in (gpt.grid.vocabulary() if layer == "wte" else gpt.grid.positions())]
    places = gpt.grid.squares(layer, l * len(indices), len(indices[0])).start
    return [(place, *part) for place, part in enumerate(itertools.chain.from_iterable(indices), places)]


def adamw(spawn: Spawn, gpt: GPT2, parts: Iterable[Part]) -> None:
    """Update parameters, a task for each part, from their stored gradient."""
    s = gpt.s
    for _, name, index in parts:
        tiles = *state(gpt, name, index), gpt.g.tensors["d" + name][index]
        if gpt.is_scaled:
            spawn(adamw_scaled_update, *tiles, s.scale[:], s.hyper[:], decays(gpt, name))
        else:
            spawn(adamw_update, *tiles, s.hyper[:], decays(gpt, name))


# The norm of the whole gradient, and the updates that wait for it -----------------------------------------------------------------------


def norm_of_gradient(spawn: Spawn, gpt: GPT2) -> None:
    """Compute the norm from the squares, and `scale`, if what becomes of the gradient depends on it."""
    if gpt.replica:
        squares_of_all(spawn, gpt)
    if gpt.stage:
        gpt.stage.reduce_numbers(spawn, gpt.slot, gpt.s.squares[:])
    spawn, s, w, options = partial(spawn, section=("update", -1)), gpt.s, gpt.w, gpt.options
    spawn(gradient_norm, s.norm[:], s.squares[:])
    found = s.loss[:], s.norm[:], options.clip_norm
    if options.is_guarded:
        seen = w.loss_window[:], w.norm_window[:], w.seen[:]
        spawn(gradient_guard, s.scale[:], s.verdict[:], s.z[:], *seen, *found, options.skip_loss_z, options.skip_norm_z)
    elif gpt.is_scaled:
        spawn(gradient_scale, s.scale[:], s.verdict[:], *found)


def scaled_updates(spawn: Spawn, gpt: GPT2) -> None:
    """Update everything, in the order in which backward found the gradients; of replicas with shards, what this rank owns."""
    for section, parts in every_part(gpt):
        adamw(partial(spawn, section=section), gpt, parts)
    if gpt.replica and gpt.replica.is_sharded:
        everything = [part for _, parts in every_part(gpt, owned=False) for part in parts]
        gpt.replica.spread(spawn, gpt.p.tensors.__getitem__, everything)


def squares_of_all(spawn: Spawn, gpt: GPT2) -> None:
    """Square the gradient that replicas have added up; with shards each rank its part, and 0 is added to that of others."""
    gpt.replica.flush(spawn)
    if gpt.replica.is_sharded:
        spawn(clear, gpt.s.squares[:], section=("update", -1))
    for section, parts in every_part(gpt):
        squares_of(partial(spawn, section=section), gpt, parts)
    if gpt.replica.is_sharded:
        gpt.replica.reduce_numbers(spawn, gpt.s.squares[:])


def every_part(gpt: GPT2, owned: bool = True) -> Iterator[tuple[tuple[str, int], list[Part]]]:
    """Yield (section, parts of a layer's gradient) in the order in which backward finds them; with `owned` those of this rank."""
    layers = ("fcproj", "fc", "ln2", "attproj", "qkv", "ln1")
    of_layers = [(l, layer) for l in reversed(gpt.layers) for layer in layers]
    for l, layer in [(0, "lnf"), *of_layers, (0, "wte"), (0, "wpe")] if gpt.has_vocabulary else of_layers:
        parts = stored_parts(gpt, l, layer)
        if owned and gpt.replica and gpt.replica.is_sharded:
            parts = [part for part in parts if gpt.replica.owns(part[1], part[2])]
        yield ("update", l if layer in layers else -1), parts


# What both ways need --------------------------------------------------------------------------------------------------------------------


def norm_parameters(gpt: GPT2, layer: str) -> list[str]:
    """Return the names of a norm's parameters: of ln1, ln1w and ln1b."""
    return [layer + suffix for suffix in gpt.model.norms.parameters]


def state(gpt: GPT2, name: str, index: Index) -> tuple[Tile, Tile, Tile]:
    """Return a tile of a parameter and of its two moments."""
    return gpt.p.tensors[name][index], gpt.m.tensors["m_" + name][index], gpt.v.tensors["v_" + name][index]


def is_stored(gpt: GPT2, name: str) -> bool:
    """Return True if the gradient of a parameter has a tensor."""
    return "d" + name in gpt.g.tensors


def decays(gpt: GPT2, name: str) -> int:
    return int(gpt.options.weight_decay_on == "all" or name in MATRICES)
