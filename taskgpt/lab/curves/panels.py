"""What there is to draw of several runs: a panel each for losses, validations, norms, learning rates and speeds.

A run has the same colour, dashes and letter in all panels. Of what is noisy there is a smoothed line, and every step in the background.
"""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from taskgpt import palette
from taskgpt.errors import UserError
from taskgpt.lab.curves.run_log import COLUMNS, VALIDATION_COLUMNS, RunLog

METRICS = ("loss", "validation", "norm", "lr", "speed")
ALONG = ("step", "tokens", "time")
COLOURS = palette.COLOURS
DASHES = ("", "7 3", "2 3")  # of runs beyond the colours, as SVG writes them
LETTERS = string.ascii_letters
MOST_RUNS = min(len(COLOURS) * len(DASHES), len(LETTERS))
SMOOTHED = 50  # parts of the longest run, one of which is what a smoothed line is the mean of
_TITLES = {"loss": "train loss", "validation": "validation loss", "norm": "gradient norm", "lr": "learning rate", "speed": "tok/s"}
_DIGITS = {"loss": 4, "validation": 4, "norm": 3, "lr": 6, "speed": 0}
_NOISY = ("loss", "norm", "speed")
_HOURS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Line:
    """A line of a run. thin: every step, behind the smoothed line; band: around the least and the greatest of many steps each, instead.

    dots: few points, which are seen; aside: another metric than the panel's own.
    """

    run: int
    name: str
    x: np.ndarray
    y: np.ndarray
    thin: bool = False
    band: bool = False
    dots: bool = False
    aside: bool = False

    @property
    def colour(self) -> str:
        return COLOURS[self.run % len(COLOURS)]

    @property
    def dash(self) -> str:
        return DASHES[self.run // len(COLOURS)]

    @property
    def letter(self) -> str:
        return LETTERS[self.run]


@dataclass(frozen=True)
class Panel:
    """A chart. caption: how to read it; along: what it goes along, "" for steps; digits: of a value; from0: its axis begins at 0."""

    metric: str
    title: str
    caption: str
    along: str
    digits: int
    from0: bool
    lines: list[Line]


def panels(logs: Sequence[RunLog], metrics: Sequence[str] | None, along: str, smooth: int | None) -> list[Panel]:
    """Return a panel for each of these metrics, of all that the logs have if none are named.

    `smooth`: steps that a smoothed line is the mean of, by default 1/SMOOTHED of the longest run. Raises UserError if there is nothing
    to draw, or if there are too many runs to tell apart.
    """
    if len(logs) > MOST_RUNS:
        raise UserError(f"wanted at most {MOST_RUNS} runs, which a picture can tell apart, got {len(logs)}; choose some of them")
    window = max(1, max(log.count for log in logs) // SMOOTHED) if smooth is None else smooth
    scale, unit = _unit(logs, along)
    found = [_panel(metric, logs, along, scale, unit, window) for metric in metrics or METRICS]
    for panel in found:
        if metrics and not panel.lines:
            names = ", ".join(log.name for log in logs)
            raise UserError(f"--only {panel.metric}: no number of it in {names}; choose others")
    found = [panel for panel in found if panel.lines]
    if not found:
        raise UserError(f"{', '.join(log.name for log in logs)}: no step yet; wait until one is done")
    return found


def _unit(logs: Sequence[RunLog], along: str) -> tuple[float, str]:
    """Return what numbers along the axis are divided by, and what they are then. Raises UserError if no log knows them."""
    if along == "step":
        return 1.0, ""
    most = max((_along(log.steps.means(), COLUMNS, along).max(initial=0.0) for log in logs), default=0.0)
    if not most > 0:
        raise UserError(f"--x {along}: no log says how long steps took; choose --x step")
    return next((each for each in _HOURS if most >= each[0]), _HOURS[-1]) if along == "time" else (1.0, "tokens")


def _along(values: np.ndarray, columns: Sequence[str], along: str) -> np.ndarray:
    return values[columns.index({"time": "seconds"}.get(along, along))]


def _panel(metric: str, logs: Sequence[RunLog], along: str, scale: float, unit: str, window: int) -> Panel:
    lines: list[Line] = []
    each = max(log.steps.each for log in logs)
    for run, log in enumerate(logs):
        if metric == "validation":
            lines += _validations(run, log, along, scale)
            continue
        at, values = COLUMNS.index(metric), log.steps.means()
        line = Line(run, log.name, _along(values, COLUMNS, along) / scale, values[at])
        if not np.isfinite(line.y).any():
            continue
        if metric in _NOISY and (window > 1 or log.steps.each > 1):
            lines.append(_band(line, *log.steps.extremes()[:, at]) if log.steps.each > 1 else replace(line, thin=True))
            line = replace(line, y=smoothed(line.y, log.steps.counts()[at], window))
        lines.append(line)
        if metric == "loss":
            lines += [replace(each, name=f"{log.name} validation", aside=True) for each in _validations(run, log, along, scale)]
    title = _TITLES[metric]
    caption = title
    if any(line.thin for line in lines):
        title += f", mean of {max(window, each):,} steps"
        caption = title + (f"; behind it the least and the greatest of every {each:,}" if each > 1 else "; behind it every step")
    caption += "; dots are validations" if any(line.aside for line in lines) else ""
    return Panel(metric, title, caption, unit, _DIGITS[metric], metric == "speed", lines)


def _band(line: Line, low: np.ndarray, high: np.ndarray) -> Line:
    is_there = np.isfinite(low)
    x, low, high = line.x[is_there], low[is_there], high[is_there]
    return replace(line, x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), thin=True, band=True)


def _validations(run: int, log: RunLog, along: str, scale: float) -> list[Line]:
    values = log.validations.means()
    loss = values[VALIDATION_COLUMNS.index("validation")]
    is_there = np.isfinite(loss).any()
    return [Line(run, log.name, _along(values, VALIDATION_COLUMNS, along) / scale, loss, dots=True)] if is_there else []


def smoothed(means: np.ndarray, counts: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` numbers at each bin of `counts` numbers with these means; at the beginning, of those so far."""
    total, count = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(counts > 0, means, 0.0) * counts, counts))
    last = np.arange(1, len(means) + 1)
    first = np.minimum(np.searchsorted(count, count[last] - window, side="right") - 1, last - 1).clip(0)
    found = count[last] - count[first]
    return np.divide(total[last] - total[first], found, out=np.full(len(means), math.nan), where=(found > 0) & (counts > 0))
