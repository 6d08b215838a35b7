"""Panels as a picture: PNG on white, or SVG that is light or dark as the reader's system is."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from taskgpt.lab.curves.panels import Panel
from taskgpt.lab.drawing import INK, STYLE, WIDTH, to_svg

TALL, SHORT = 3.6, 2.4  # inches: the first panel, the others
DPI = 150
_SCHEMES = (
    "<style>svg { color: #1f2328; background: #ffffff; max-width: 100%; height: auto; } "
    "@media (prefers-color-scheme: dark) { svg { color: #e6edf3; background: #0d1117; } }</style>"
)


def svg(title: str, found: Sequence[Panel]) -> str:
    """Return the picture as a file of its own."""
    with matplotlib.rc_context(STYLE):
        text = to_svg(_figure(title, found))
    head, _, rest = text.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n{_SCHEMES}{rest}'


def png(title: str, found: Sequence[Panel]) -> bytes:
    """Return the picture."""
    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        _figure(title, found).savefig(data, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def _figure(title: str, found: Sequence[Panel]) -> Figure:
    """Draw the first panel over the whole width, the others in two columns below it."""
    rows = len(found) // 2  # below the first
    figure = Figure(figsize=(WIDTH, 0.5 + TALL + SHORT * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[TALL, *[SHORT] * rows])
    for number, panel in enumerate(found):
        at = grid[0, :] if number == 0 else grid[1 + (number - 1) // 2, (number - 1) % 2]
        axes = figure.add_subplot(at)
        for line in panel.lines:
            if line.band:
                axes.fill(line.x, line.y, color=line.colour, alpha=0.3, linewidth=0)
                continue
            dashes = [float(length) / 2 for length in line.dash.split()]
            own = {"linewidth": 0.6, "alpha": 0.4} if line.thin else {"linewidth": 1.1, "marker": "o"} if line.dots else {"linewidth": 1.6}
            own |= {"markersize": 3.5 if len(line.x) <= 100 else 1.5} if line.dots else {}
            label = line.name if number == 0 and not line.thin and not line.aside else None
            style = "none" if line.aside else (0, dashes) if dashes else "solid"
            axes.plot(line.x, line.y, color=line.colour, linestyle=style, label=label, **own)
        axes.set_title(panel.caption if number == 0 else panel.title, loc="left", color=INK)
        axes.set_xlabel(panel.along or "steps")
        axes.grid(alpha=0.25, color=INK, linewidth=0.5)
        if panel.from0:
            axes.set_ylim(bottom=0)
    if len({line.run for line in found[0].lines}) > 1:
        figure.legend(loc="outside upper left", ncols=4, title=title, alignment="left")
    else:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
