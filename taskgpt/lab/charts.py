"""Charts in pages: lines over the steps of a run, thinned to what a screen shows, whose values a pointer reads.

points = Thinned(2)
for step, loss in losses:
    points.add(step, loss)
page = html([{"caption": "loss", "digits": 4, "lines": [line("train", palette.BLUE, *points.means())]}])

A chart has a caption, the digits that values are told with, and lines; `from0`: its axis begins at 0; `along`: what it goes along, if
not steps; `legend`: whether it has one, by default where there are several lines. A line may be

    dots     few points, which are seen
    thin     in the background, where no pointer reads it; a `band`: a surface, which its points go around
    dash     dashed, as SVG writes it
    aside    beside what the chart is of: dots alone, and no legend
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_POINTS = 2000  # of a line: a screen shows no more
_BUFFER = 4096  # rows that are reduced at a time; a power of two, as `each` is

CSS, _SCRIPT = (Path(__file__).with_name(f"charts.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


class Thinned:
    """Rows of numbers, which come one after another, as at most `most` bins of `each` rows: their mean, least and greatest.

    Numbers that are not finite count for nothing; a bin without any other is NaN. What it takes does not grow with the number of rows.
    """

    def __init__(self, columns: int, most: int = MOST_POINTS):
        self.each = 1
        self._most, self._rows = most, []
        self._bins = np.zeros((4, 0, columns))  # count, sum, least, greatest

    def add(self, *row: float) -> None:
        self._rows.append(row)
        if len(self._rows) >= max(_BUFFER, self.each):
            self._take()

    def means(self) -> np.ndarray:
        """Return (columns, bins)."""
        self._take()
        count, total, _, _ = self._bins
        return np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0).T

    def counts(self) -> np.ndarray:
        """Return how many finite numbers there are in each bin: (columns, bins)."""
        self._take()
        return self._bins[0].T

    def extremes(self) -> np.ndarray:
        """Return the least and the greatest: (2, columns, bins)."""
        self._take()
        return np.where(self._bins[0] > 0, self._bins[2:], math.nan).transpose(0, 2, 1)

    def _take(self) -> None:
        if self._rows:
            rows, self._rows = np.array(self._rows, np.float64), []
            is_known = np.isfinite(rows)
            parts = [is_known, *(np.where(is_known, rows, other) for other in (0.0, math.inf, -math.inf))]
            self._bins = np.concatenate([self._bins, _merged(np.array(parts, np.float64), self.each)], axis=1)
        while self._bins.shape[1] > self._most:
            self._bins, self.each = _merged(self._bins, 2), 2 * self.each


def _merged(bins: np.ndarray, each: int) -> np.ndarray:
    """Return bins that hold as many of these each."""
    firsts = np.arange(0, bins.shape[1], each)
    adds, least, greatest = (how.reduceat(bins, firsts, axis=1) for how in (np.add, np.minimum, np.maximum))
    return np.stack([adds[0], adds[1], least[2], greatest[3]])


def line(name: str, colour: str, x: Iterable[float], y: Iterable[float], **how: Any) -> dict[str, Any]:
    """Return a line of a chart."""
    points = [(float(a), float(b) if math.isfinite(b) else None) for a, b in zip(x, y, strict=True)]
    return {"name": name, "colour": colour, "points": points, **how}


def told(points: Thinned) -> str:
    """Return what a caption says of points that stand for several steps, "" if they do not."""
    return f"; a point is a mean of {points.each} steps" if points.each > 1 else ""


def html(charts: Sequence[dict[str, Any]]) -> str:
    """Return the element that shows the charts, and its script; a page has them once, and CSS in its style."""
    data = json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # nothing ends the script early
    return f'<div id="charts"></div>\n<script id="data" type="application/json">{{"charts":{data}}}</script>\n<script>\n{_SCRIPT}</script>'
