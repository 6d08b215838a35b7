"""Traces as a still picture: SVG, a row a worker, a rectangle a task, for notebooks and documents. page.py has one to zoom.

Workers of each of several processes stand below its name.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from taskgpt import palette
from taskgpt.lab.traces.trace import Trace
from taskgpt.tasks.picture import legend

MOST_RUNS = 2  # that a Timeline shows: more are too narrow to read
_LEFT, _ROW, _GAP, _HEAD, _NAME, _AXIS = 70, 22, 3, 40, 18, 24  # pixels


class Timeline:
    """In a notebook: the timeline of at most two runs of a trace, from the middle on."""

    def __init__(self, trace: Trace):
        self.trace = trace

    def _repr_svg_(self) -> str:
        trace = self.trace
        runs = np.sort(trace.runs, order="begin_ns")  # which are in order for each process alone
        shown = runs[max(0, len(runs) - MOST_RUNS) // 2 :][:MOST_RUNS]
        if not len(shown):
            return to_svg([trace], 0, 0)
        begin, end = shown["begin_ns"].min() - trace.begin_ns, shown["end_ns"].max() - trace.begin_ns
        return to_svg([trace], begin / 1e6, (end - begin) / 1e6)


def to_svg(
    traces: Sequence[Trace], begin_ms: float = 0, length_ms: float | None = None, colour_by: str = "kernel", width: int = 1100
) -> str:
    """Return `length_ms` from `begin_ms` on (default: all), of each trace from its own beginning, one above the other, on one scale.

    `colour_by`: kernel, layer or phase. Pointing at a task shows its call. Tasks that begin within a pixel are one rectangle: it has the
    colour of the longest, and their time. Tasks of runs that were left out are grey.
    """
    begin = begin_ms * 1e6
    length = length_ms * 1e6 if length_ms is not None else max(trace.end_ns - trace.begin_ns for trace in traces) - begin
    per_pixel = max(1.0, length / (width - _LEFT))
    values = [_values(trace, colour_by) for trace in traces]
    key = palette.key(colour_by, (value for each in values for value in dict.fromkeys(each.tolist())))
    parts, y = [], 0
    for trace, value in zip(traces, values, strict=True):
        parts.append(f'<text x="4" y="{y + 16}" font-weight="bold">{escape(trace.about["scheduler"])}</text>')
        y += _HEAD
        place = np.arange(trace.workers) - np.searchsorted(trace.rank_of_worker, trace.rank_of_worker)
        of_several = zip(np.flatnonzero(place == 0).tolist(), trace.ranks, strict=True) if len(trace.ranks) > 1 else ()
        firsts = {worker: rank.name for worker, rank in of_several}
        for run in trace.runs:
            at = _LEFT + (run["begin_ns"] - trace.begin_ns - begin) / per_pixel
            if _LEFT <= at < width:
                parts.append(
                    f'<text x="{at + 3:.1f}" y="{y - 8}" fill="#666">{escape(trace.graphs[run["graph"]].name)} {run["step"]}</text>'
                )
                below = y + trace.workers * (_ROW + _GAP) + len(firsts) * _NAME
                parts.append(f'<path d="M{at:.1f},{y - 16}V{below}" stroke="#bbb"/>')
        for worker in range(trace.workers):
            if worker in firsts:
                parts.append(f'<text x="4" y="{y + 13}">{escape(firsts[worker])}</text>')
                y += _NAME
            parts.append(f'<text x="4" y="{y + 15}" fill="#666">worker {place[worker]}</text>')
            parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width - _LEFT}" height="{_ROW}" fill="#f0f2f4"/>')
            for other in trace.others[trace.others["worker"] == worker]:
                first, last = ((other[name] - trace.begin_ns - begin) / per_pixel for name in ("start_ns", "stop_ns"))
                if last > 0 and first < width - _LEFT:
                    x, wide = _LEFT + max(first, 0), min(last, width - _LEFT) - max(first, 0)
                    parts.append(f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{_ROW}" fill="{palette.REST}"/>')
            mine = np.flatnonzero(trace.records["worker"] == worker)
            parts += _rectangles(trace, mine, value, key, y, begin, begin + length, per_pixel)
            y += _ROW + _GAP
        y += _GAP
    parts += _axis(y, begin, length, per_pixel, width)
    keys, height = legend(dict(key.values()), 4, y + _AXIS, width)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, *keys, "</svg>"]) + "\n"


def _values(trace: Trace, colour_by: str) -> np.ndarray:
    """Return what gives each record its colour: a kernel's name, a layer's number, a phase's name."""
    column = trace.column(colour_by)
    return column if colour_by == "layer" else np.array(trace.names(colour_by), object)[column]


def _rectangles(trace: Trace, mine: np.ndarray, value: np.ndarray, key, y: int, begin: float, end: float, per_pixel: float) -> list[str]:
    """Return those of one worker."""
    r = trace.records
    start, stop = (r[name][mine] - trace.begin_ns for name in ("start_ns", "stop_ns"))
    seen = (stop > begin) & (start < end)
    mine, start, stop = mine[seen], np.maximum(start[seen], begin), np.minimum(stop[seen], end)
    pixel = (start - begin) // per_pixel
    parts = []
    for group in np.split(np.arange(len(mine)), np.flatnonzero(np.diff(pixel)) + 1):
        if not len(group):
            continue
        longest = mine[group[np.argmax(stop[group] - start[group])]]
        x, wide = _LEFT + (start[group[0]] - begin) / per_pixel, (stop[group] - start[group]).sum() / per_pixel
        title = f"{len(group)} tasks"
        if len(group) == 1:
            graph, task = trace.graphs[trace.runs["graph"][r["run"][longest]]], r["task"][longest]
            title = f"{task} {graph.calls[task]}: {(stop[group[0]] - start[group[0]]) / 1e3:.1f} us"
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(wide - 0.2, 0.3):.2f}" height="{_ROW}" fill="{key[value[longest]][1]}">'
            f"<title>{escape(title)}</title></rect>"
        )
    return parts


def _axis(y: int, begin: float, length: float, per_pixel: float, width: int) -> list[str]:
    """Return marks at round milliseconds."""
    rough = length / 8
    power = 10 ** np.floor(np.log10(max(rough, 1)))
    every = power * next(n for n in (1, 2, 5, 10) if n * power >= rough)
    parts = []
    for n in range(int(np.ceil(begin / every)), int((begin + length) // every) + 1):
        x = _LEFT + (n * every - begin) / per_pixel
        if x < width - 20:
            parts.append(
                f'<path d="M{x:.1f},{y}v4" stroke="#666"/><text x="{x:.1f}" y="{y + 15}" fill="#666">{n * every / 1e6:g} ms</text>'
            )
    return parts
