"""Panels as text: lines of braille dots, in colours where there are any, and a run's letter along its line where there are several runs.

plotille draws the dots, and heeds NO_COLOR and where standard output goes. A terminal without braille gets another character for it.
"""

import itertools
import os
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator
from plotille import Canvas

from taskgpt.lab.curves.panels import Line, Panel
from taskgpt.palette import channels

TALL, SHORT = 14, 7  # lines: the first panel, the others
LEAST_COLUMNS, LEAST_BESIDE = 30, 70  # of a panel; of two beside each other
GAP = "  "
LETTERS_APART = 24  # columns between two letters on a line
EMPTY, FULL = "\u2800", "\u28ff"  # braille's first and last


def draw(found: Sequence[Panel], columns: int) -> str:
    """Return the first panel over the whole width, the others below it, two in a row where they fit."""
    columns = max(LEAST_COLUMNS, columns)
    first, *others = found
    parts = [_panel(first, columns, TALL)]
    beside = 2 if columns >= LEAST_BESIDE else 1
    each = (columns - len(GAP) * (beside - 1)) // beside
    for at in range(0, len(others), beside):
        drawn = [_panel(panel, each, SHORT) for panel in others[at : at + beside]]
        parts.append([GAP.join(lines) for lines in zip(*drawn, strict=True)])
    text = "\n\n".join("\n".join(line.rstrip() for line in part) for part in parts)
    return text if _has_braille() else "".join("*" if EMPTY < c <= FULL else c for c in text)


def _has_braille() -> bool:
    try:
        FULL.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _panel(panel: Panel, columns: int, rows: int) -> list[str]:
    """Return lines of exactly so many columns: a caption, the dots beside an axis, an axis below them."""
    lines = [line for line in panel.lines if not line.thin and not line.aside]
    xs, ys = (np.concatenate([getattr(line, name)[np.isfinite(line.y)] for line in lines]) for name in "xy")
    (x0, x1), (y0, y1) = _limits(xs, False), _limits(ys, panel.from0)
    marks = _ticks(y0, y1, rows // 3)
    labels = {_row(value, y0, y1, rows): _told(value, marks) for value in marks}
    margin = max(map(len, labels.values()), default=0)
    width = columns - margin - 1
    canvas = Canvas(width, rows, x0, y0, _beyond(x0, x1, 2 * width), _beyond(y0, y1, 4 * rows), mode=_mode())
    for line in lines:
        _draw(canvas, line)
    runs = {line.run: line for line in lines}
    for place, line in enumerate(runs.values()) if len(runs) > 1 else ():
        _letter(canvas, line, width, (place + 1) / (len(runs) + 1))
    dots = canvas.plot("\n").replace(EMPTY, " ").split("\n")
    found = [f"{panel.title[:columns]:{columns}}"]
    found += [f"{labels.get(number, ''):>{margin}}{'┤' if number in labels else '│'}{row}" for number, row in enumerate(dots)]
    return [*found, " " * (margin + 1) + _axis(x0, x1, width, panel.along or "steps")]


def _draw(canvas: Canvas, line: Line) -> None:
    is_there, colour = np.isfinite(line.y), _colour(line)
    points = list(zip(line.x[is_there].tolist(), line.y[is_there].tolist(), strict=True))
    for (xa, ya), (xb, yb) in itertools.pairwise(points):
        canvas.line(xa, ya, xb, yb, color=colour)
    if len(points) == 1:
        canvas.point(*points[0], color=colour)


def _letter(canvas: Canvas, line: Line, width: int, share: float) -> None:
    """Put a run's letter on its line now and then; those of other runs stand elsewhere."""
    is_there, colour = np.isfinite(line.y), _colour(line)
    x, y = line.x[is_there], line.y[is_there]
    count = max(1, width // LETTERS_APART)
    span = canvas.xmax_inside - canvas.xmin
    for number in range(count):
        at = canvas.xmin + (number + share) / count * span
        if x[0] <= at <= x[-1] or count == 1:
            at = min(max(at, x[0]), x[-1])
            canvas.point(at, float(np.interp(at, x, y)), color=colour, marker=line.letter)


def _colour(line: Line) -> tuple[int, int, int] | int:
    """Return the colour as `_mode` wants it: of 256, those from 16 on are a cube of 6 levels a channel."""
    red, green, blue = channels(line.colour)
    if _mode() == "rgb":
        return red, green, blue
    return 16 + sum(weight * max(0, round((channel - 55) / 40)) for weight, channel in ((36, red), (6, green), (1, blue)))


def _mode() -> str:
    """Return how the terminal is told colours: all of them, where it says so, or its 256."""
    return "rgb" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "byte"


def _limits(values: np.ndarray, from0: bool) -> tuple[float, float]:
    low, high = float(values.min(initial=0.0 if from0 else np.inf)), float(values.max())  # no line leaves the canvas: plotille follows it
    return (low, high) if high > low else (low - abs(low) / 20 - 1e-9, high + abs(high) / 20 + 1e-9)


def _beyond(low: float, high: float, dots: int) -> float:
    """Return where a canvas of so many dots must end, so that its last one is `high`."""
    return low + (high - low) * dots / (dots - 1)


def _ticks(low: float, high: float, count: int) -> list[float]:
    return [value for value in MaxNLocator(max(1, count)).tick_values(low, high).tolist() if low <= value <= high]


def _row(value: float, low: float, high: float, rows: int) -> int:
    """Return in which line from above a value is."""
    return rows - 1 - round((value - low) / (high - low) * (4 * rows - 1)) // 4


def _told(value: float, others: Sequence[float]) -> str:
    """Return a number beside an axis, with as many digits as tell it apart from the others."""
    size = max(map(abs, others), default=0.0)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.6g}{name}" if value else "0"
    return f"{value:.1e}" if 0 < size < 1e-3 and value else f"{value:.6g}"


def _axis(low: float, high: float, width: int, along: str) -> str:
    """Return the numbers below the dots, and in the end what they are."""
    name = f" {along}"
    line = [" "] * width
    marks = _ticks(low, high, max(1, width // 12))
    for value in marks:
        word = _told(value, marks)
        at = min(round((value - low) / (high - low) * (width - 1)), width - len(name) - len(word))
        at = max(0, at - len(word) // 2) if at - len(word) // 2 + len(word) + len(name) <= width else at
        if at >= 0 and all(c == " " for c in line[max(0, at - 1) : at + len(word) + 1]):
            line[at : at + len(word)] = word
    line[width - len(name) :] = name
    return "".join(line)
