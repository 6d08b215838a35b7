"""The picture of scaling: efficiency with a micro-batch for each rank, and speedup with the same batch for all, a line for each rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from taskgpt import palette
from taskgpt.files import write_whole
from taskgpt.lab.drawing import MARKERS, STYLE, WIDTH, to_svg


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the picture of the rows of scaling.rows as SVG. Raises OSError."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        weak, strong = figure.subplots(1, 2)
        ranks = sorted({row["ranks"] for row in rows})
        strong.plot(ranks, ranks, color=palette.REST, linewidth=1, linestyle="--", label="ideal")
        for at, gbits in enumerate(dict.fromkeys(row["gbits"] for row in rows)):
            mine = [row for row in rows if row["gbits"] == gbits]
            for axes, key, label in ((weak, "efficiency", f"{gbits:g} Gb/s"), (strong, "strong_speedup", None)):
                axes.plot(
                    [row["ranks"] for row in mine],
                    [row[key] for row in mine],
                    color=palette.COLOURS[at % len(palette.COLOURS)],
                    marker=MARKERS[at % len(MARKERS)],
                    markersize=4,
                    label=label,
                )
        _label(weak, "a micro-batch for each rank", "efficiency", ranks)
        weak.set_ylim(0, 1)
        weak.yaxis.set_major_formatter(PercentFormatter(1))
        _label(strong, f"a batch of {max(ranks):,} micro-batches for all", "speedup", ranks)
        strong.set_yscale("log", base=2)
        strong.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.legend(loc="outside lower center", ncols=4, fontsize=9)
        write_whole(path, to_svg(figure))


def _label(axes: Axes, title: str, what: str, ranks: Sequence[int]) -> None:
    axes.set_title(title)
    axes.set_xlabel("ranks")
    axes.set_ylabel(what)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks], rotation=45 if len(ranks) > 6 else 0)
