"""The colours of pictures, pages and dashboards: the same thing has the same colour everywhere.

A kernel's colour tells its family by hue, and by shade whether it works forward, backward (darker) or updates (lighter). Any two of COLOURS
stay apart for eyes that lack one kind of cone (simulated as Machado et al. 2009 do), on white and on black: tests/test_palette.py measures
it. There is no pair of red and green.
"""

import zlib
from collections.abc import Iterable
from typing import Any

BLUE, ORANGE, PINK, VERMILION, SKY, VIOLET, YELLOW, BROWN, GREY, MINT, INDIGO = COLOURS = (
    *("#0072B2", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9"),  # of Okabe and Ito 2008
    *("#8A63E8", "#E3D426", "#85321A", "#646A70", "#7FDCB4", "#3C28C8"),
)
REST = "#B0B8C0"  # what a picture does not tell apart: no layer, tasks of other runs, names beyond the number of colours
IDLE = {"barrier": VERMILION, "dependency": ORANGE, "scheduling": VIOLET, "between": REST}  # causes of idle time

_FAMILY_COLOURS = {
    "matmul": BLUE,
    "attention": ORANGE,
    "layernorm": VIOLET,
    "lmhead": SKY,
    "loss": VERMILION,
    "update": PINK,
    "encoder": BROWN,
    "gelu": YELLOW,
    "residual": GREY,
    "copy": MINT,
}
_PHASE_COLOURS = {"forward": BLUE, "backward": ORANGE}  # loss and update are those of the families
_SCHEDULER_COLOURS = {"native": BLUE, "loops": ORANGE, "sequential": GREY, "threads": VIOLET, "local-cluster": PINK}
_FIXED = _FAMILY_COLOURS | _PHASE_COLOURS | _SCHEDULER_COLOURS
# Kernels whose name begins with something else than their family.
_FAMILIES = {
    **dict.fromkeys(("softmax", "crossentropy"), "loss"),
    **dict.fromkeys(("adamw", "linear", "wte", "wpe", "gradient", "sum"), "update"),
}
_RAMP = ("#24529C", "#5E6E86", "#8A8678", "#B9A862", "#EFD653")
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_SHADES = {"": (_BLACK, 0.0), "backward": (_BLACK, 0.35), "update": (_WHITE, 0.45)}  # what is mixed in, and how much of it


def key(what: str, values: Iterable[Any]) -> dict[Any, tuple[str, str]]:
    """Return the label and the colour of each value, in the order that a legend has: `what` they are is kernel, layer or phase.

    Kernels of one family and direction share both: `matmul`, for those that work forward, and `matmul backward`. A layer is a number.
    """
    values = dict.fromkeys(values)
    if what == "kernel":
        colour = of_kernels(values)
        return {name: (" ".join(filter(None, _family_and_direction(name))), colour[name]) for name in values}
    if what == "layer":
        of_layer = of_layers(values)
        return {n: (f"layer {n}" if n >= 0 else "no layer", of_layer[n]) for n in sorted(values, key=lambda n: (n < 0, n))}
    colour = of_names(name for name in values if name)
    return {name: (name or f"no {what}", colour.get(name, REST)) for name in values}


def of_kernels(kernels: Iterable[str]) -> dict[str, str]:
    """Return the colour of each kernel: the hue of its family, in the shade of its direction."""
    parts = {kernel: _family_and_direction(kernel) for kernel in kernels}
    hues = of_names(family for family, _ in parts.values())
    return {kernel: _mixed(hues[family], *_SHADES[direction]) for kernel, (family, direction) in parts.items()}


def _family_and_direction(kernel: str) -> tuple[str, str]:
    first, *rest = kernel.split("_")
    family = _FAMILIES.get(first, first)
    return family, next((word for word in rest if word in _SHADES and word != family), "")


def of_names(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: families of kernels, phases, schedulers.

    Names that are not known here take the colour that a checksum of the name picks; where another name of the same picture has it, the next
    one that is free, in the alphabet's order. When none is free, REST.
    """
    wanted = sorted(set(names))
    found = {name: _FIXED[name] for name in wanted if name in _FIXED}
    for name in wanted:
        if name not in found:
            first = zlib.crc32(name.encode()) % len(COLOURS)
            taken = set(found.values())
            found[name] = next((c for c in (*COLOURS[first:], *COLOURS[:first]) if c not in taken), REST)
    return found


def of_layers(layers: Iterable[int]) -> dict[int, str]:
    """Return the colour of each layer, from blue to yellow as they go on (after cividis, Nunez et al. 2018); of -1, no layer, REST."""
    wanted = sorted(set(layers))
    found = {layer: REST for layer in wanted if layer < 0}
    last = max(1, len(wanted) - len(found) - 1)
    for place, layer in enumerate(layer for layer in wanted if layer >= 0):
        low, share = divmod(place * (len(_RAMP) - 1), last)
        found[layer] = _mixed(_RAMP[low], channels(_RAMP[min(low + 1, len(_RAMP) - 1)]), share / last)
    return found


def ink_on(colour: str) -> str:
    """Return black or white, whichever is read better on #rrggbb."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in channels(colour))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000000" if luminance > 0.179 else "#ffffff"  # there both have WCAG's contrast of 4.6


def _mixed(colour: str, other: Iterable[int], share: float) -> str:
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(channels(colour), other, strict=True))


def channels(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of #rrggbb, 0 to 255."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue
