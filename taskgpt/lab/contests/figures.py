"""The pictures of a comparison, as SVG: times, where the workers' time went, scaling, and heat maps over tiles and over settings."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from taskgpt import palette
from taskgpt.lab.contests.results import Result, Results
from taskgpt.lab.drawing import INK, MARKERS, STYLE, WIDTH, to_svg

IDLE = {cause: colour for cause, colour in palette.IDLE.items() if cause != "between"}
ROW_INCHES = 0.27  # of a bar


_MAP_CAPTION = "Medians of ms a step; the fastest has a frame."


class Picture(NamedTuple):
    """caption: how to read it."""

    title: str
    caption: str
    svg: str


def figures(results: Results) -> list[Picture]:
    """Return every picture that these cells have something to show in."""
    with matplotlib.rc_context(STYLE):
        return list(_figures(results))


def _figures(results: Results) -> Iterator[Picture]:
    for graph in dict.fromkeys(r.cell.graph for r in results.measured):
        cells = [r for r in results.measured if r.cell.graph == graph]
        sure = "The thin line is where the median lies with 95 % confidence" if any(r.interval for r in cells) else "Too few turns"
        sure += "; shorter is better." if any(r.interval for r in cells) else " to say how sure it is; shorter is better."
        yield Picture(f"{graph}: median of ms a step", f"Of each scheduler and number of workers. {sure}", bars(cells))
        if traced := [r for r in cells if r.first and r.first.trace]:
            caption = "Of the first steps, with every task on record. Idle at a barrier: a task is ready, of a loop that has not begun; "
            caption += "for a dependency: none is ready; for scheduling: one is ready, and nobody has begun it."
            yield Picture(f"{graph}: where the workers' time goes", caption, shares(traced))
        if lines := _lines(cells):
            base = results.sequential_ms(graph)
            caption = f"Speedup over the fastest sequential, {base:.4g} ms." if base else "In ms a step: no sequential was measured."
            yield Picture(f"{graph}: scaling", f"{caption} Each scheduler with the fastest of its tiles.", scaling(lines, base))
        yield from _tile_maps(graph, cells)
        yield from _setting_maps(graph, cells)


def bars(cells: Sequence[Result]) -> str:
    """Draw the median of each cell, with its interval where that is known."""
    figure, axes = _rows(cells)
    longest, colours = max(r.median for r in cells), _colours(cells)
    end = max(min(r.interval[1], 1.6 * longest) if r.interval else r.median for r in cells)  # longer intervals end in an arrow
    for at, r in enumerate(cells):
        low, high = r.interval or (r.median, r.median)
        axes.barh(at, r.median, color=colours[r.cell.label], height=0.75)
        if r.interval:
            axes.plot([low, min(high, end)], [at, at], color=INK, linewidth=1.2, marker=">", markevery=[1] * (high > end), markersize=4)
        axes.annotate(f"{r.median:.4g}", (min(high, end), at), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlabel("ms a step")
    axes.set_xlim(0, 1.1 * end)
    return to_svg(figure)


def shares(cells: Sequence[Result]) -> str:
    """Draw how much of all workers' time of a traced run was in tasks, and what the rest was lost to."""
    figure, axes = _rows(cells)
    for at, r in enumerate(cells):
        trace = r.first.trace
        parts = {"in tasks": trace.useful_ms} | {f"idle: {cause}": trace.idle_ms[cause] for cause in IDLE}
        total, left = sum(parts.values()), 0.0
        for name, colour in zip(parts, (palette.BLUE, *IDLE.values()), strict=True):
            wide = parts[name] / total
            axes.barh(at, wide, left=left, color=colour, height=0.75, label=name if at == 0 else None)
            left += wide
    axes.set_xlabel("all workers' time")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper right", ncols=4)
    return to_svg(figure)


def scaling(lines: dict[str, list[Result]], sequential_ms: float | None) -> str:
    """Draw each scheduler by workers, of its fastest tiling: speedups over these ms of sequential, or, where there is no such base, ms.

    A line's own fewest workers are no base: a scheduler that is slow alone would look better than one that is fast.
    """
    figure = Figure(figsize=(WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    counts = sorted({r.cell.workers for line in lines.values() for r in line})
    if sequential_ms:
        axes.plot([1, counts[-1]], [1, counts[-1]], color=palette.REST, linewidth=1, linestyle="--", label="ideal")
    colours = _colours([line[0] for line in lines.values()])
    for (name, line), marker in zip(lines.items(), itertools.cycle(MARKERS), strict=False):
        values = [sequential_ms / r.median if sequential_ms else r.median for r in line]
        axes.plot([r.cell.workers for r in line], values, marker=marker, markersize=5, color=colours[name], label=name)
    axes.set_xlabel("workers")
    axes.set_ylabel("speedup over sequential" if sequential_ms else "ms a step")
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return to_svg(figure)


def heat_map(rows: Sequence[str], columns: Sequence[str], ms: np.ndarray, row_title: str, column_title: str) -> str:
    """Draw ms a step; of NaN nothing. The least has a frame."""
    figure = Figure(figsize=(2.2 + 0.95 * len(columns), 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(ms, cmap="viridis_r", aspect="auto")
    best = np.unravel_index(np.nanargmin(ms), ms.shape)
    middle = (np.nanmin(ms) + np.nanmax(ms)) / 2
    for (row, column), value in np.ndenumerate(ms):
        if np.isfinite(value):
            weight = "bold" if (row, column) == best else "normal"
            ink = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.4g}", ha="center", va="center", weight=weight, color=ink, fontsize=9)
    axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor=palette.VERMILION, linewidth=2.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_title)
    axes.set_ylabel(row_title)
    return to_svg(figure)


def _lines(cells: Sequence[Result]) -> dict[str, list[Result]]:
    """Return, for each scheduler of which there are several numbers of workers, its fastest tiling for each."""
    best: dict[str, dict[int, Result]] = {}
    for r in sorted(cells, key=lambda r: -r.median):
        best.setdefault(r.cell.label, {})[r.cell.workers] = r
    in_order = dict.fromkeys(r.cell.label for r in cells)
    return {name: [best[name][n] for n in sorted(best[name])] for name in in_order if len(best[name]) > 1}


def _tile_maps(graph: str, cells: Sequence[Result]) -> Iterator[Picture]:
    """Yield a map for each scheduler and number of workers of which there are several tilings; over two keys, the best of all others."""
    tiled = [r for r in cells if r.cell.tiles]
    values: dict[str, set[str]] = {}
    for key, value in (change for r in tiled for change in r.cell.tiles):
        values.setdefault(key, set()).add(value)
    keys = [key for key, found in values.items() if len(found) > 1]
    for label, workers in dict.fromkeys((r.cell.label, r.cell.workers) for r in tiled):
        mine = [r for r in tiled if (r.cell.label, r.cell.workers) == (label, workers)]
        if not keys or len(mine) < 2:
            continue
        down, across = (keys[0], keys[1]) if len(keys) > 1 else ("", keys[0])
        svg = _map(mine, lambda r, key=down: dict(r.cell.tiles).get(key, ""), lambda r, key=across: dict(r.cell.tiles)[key], down, across)
        caption = f"{_MAP_CAPTION} Of all other tiles, the fastest." if len(keys) > 2 else _MAP_CAPTION
        yield Picture(f"{graph}: tiles, {label}, {workers} worker{'s' * (workers > 1)}", caption, svg)


def _setting_maps(graph: str, cells: Sequence[Result]) -> Iterator[Picture]:
    """Yield a map of settings and workers for each scheduler and tiling of which there are several settings."""
    for word, scheduler in dict.fromkeys((r.cell.graph_word, r.cell.scheduler) for r in cells if r.cell.settings):
        mine = [r for r in cells if (r.cell.graph_word, r.cell.scheduler) == (word, scheduler) and r.cell.settings]
        if len({r.cell.settings for r in mine}) > 1:
            svg = _map(mine, lambda r: " ".join(f"{k}={v}" for k, v in r.cell.settings), lambda r: str(r.cell.workers), "", "workers")
            yield Picture(f"{word}: settings of {scheduler} and workers", _MAP_CAPTION, svg)


def _map(cells: Sequence[Result], row_of: Callable[[Result], str], column_of: Callable[[Result], str], down: str, across: str) -> str:
    rows, columns = (sorted(dict.fromkeys(map(of, cells)), key=_by_size) for of in (row_of, column_of))
    ms = np.full((len(rows), len(columns)), np.nan)
    for r in cells:
        at = rows.index(row_of(r)), columns.index(column_of(r))
        ms[at] = np.nanmin([ms[at], r.median])
    return heat_map(rows, columns, ms, down, across)


def _by_size(word: str) -> tuple[int, str]:
    return (int(word), "") if word.isdigit() else (0, word)


def _name(r: Result, cells: Sequence[Result]) -> str:
    """Return the scheduler, and the tiles if they differ among these cells."""
    tiles = " ".join(f"{key}={value}" for key, value in r.cell.tiles)
    return f"{r.cell.label} {tiles}".rstrip() if len({each.cell.tiles for each in cells}) > 1 else r.cell.label


def _colours(cells: Sequence[Result]) -> dict[str, str]:
    """Return the colour of each label: its scheduler's own for the first variant of a scheduler."""
    labels = dict.fromkeys(r.cell.label for r in cells)
    first: dict[str, str] = {}
    for label in labels:
        first.setdefault(label.partition(" ")[0], label)
    names = {label: scheduler if first[scheduler := label.partition(" ")[0]] == label else label for label in labels}
    colour = palette.of_names(names.values())
    return {label: colour[name] for label, name in names.items()}


def _rows(cells: Sequence[Result]) -> tuple[Figure, Axes]:
    """Return axes with a row for each cell, the first on top."""
    figure = Figure(figsize=(WIDTH, 0.9 + ROW_INCHES * len(cells)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(cells)), [f"{_name(r, cells)}, {r.cell.workers}" for r in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)
    return figure, axes
