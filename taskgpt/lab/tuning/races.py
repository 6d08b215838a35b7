"""Races: a challenger's steps and the champion's in turns, until it is clear which is faster; and a search that is decided by them.

A shared machine's noise drifts, and hits whoever runs: so what counts is the ratio of the two within a round, challenger over champion,
never a time of one against a time of another minute. A challenger wins only by more than MARGIN: what is as fast stays as it was shipped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from taskgpt.lab.contests.cells import Cell
from taskgpt.lab.contests.turns import CellFailed
from taskgpt.lab.report import median_interval, quartiles

MARGIN = 0.01  # of the champion's time, which a challenger must win to take its place
HOPELESS = 1.08  # a ratio that needs no further round
ROUNDS = 5  # of a race; then who is not faster has lost
FINAL_ROUNDS = 10  # of the race that counts: default against winner, all of it
TURN_MS, LEAST_STEPS, MOST_STEPS = 1000.0, 2, 50  # how long a turn is, after warm-up, and between these numbers of steps

FASTER, SLOWER, NO_FASTER, OUT_OF_TIME = "faster", "slower", "no faster", "out of time"


def verdict(ratios: list[float]) -> str | None:
    """Return FASTER or SLOWER, or None while it is not clear. Ratios are a challenger's time over the champion's, a round each."""
    if ratios and (median(ratios) > HOPELESS or (len(ratios) > 1 and min(ratios) > 1)):
        return SLOWER
    if len(ratios) >= 3 and median(ratios) < 1 - MARGIN and quartiles(ratios)[2] < 1:
        return FASTER
    return None


def final_verdict(ratios: list[float]) -> str | None:
    """Return FASTER if the median, which six rounds tell to 95 %, is below 1 beyond noise, and by more than the margin; or None."""
    interval = median_interval(ratios)
    return FASTER if interval and interval[1] < 1 and median(ratios) < 1 - MARGIN else None


@dataclass
class Race:
    """phase: of the search. ms: what steps of the challenger took in each round, and of the champion."""

    phase: str
    challenger: Cell
    champion: Cell
    ms: list[float] = field(default_factory=list)
    champion_ms: list[float] = field(default_factory=list)
    outcome: str = NO_FASTER

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.ms, self.champion_ms, strict=False)]

    def row(self, forecast_ms: float | None) -> dict[str, Any]:
        """Return what a table shows of it, and all that was measured."""
        low, middle, high = quartiles(self.ratios) if self.ratios else (None, None, None)
        return {
            "phase": self.phase,
            "cell": changes_of(self.challenger),
            "champion": changes_of(self.champion),
            "forecast_ms": forecast_ms,
            "median_ms": median(self.ms) if self.ratios else None,
            "ratio": middle,
            "quartiles": f"{low:.3f}-{high:.3f}" if self.ratios else None,
            "rounds": len(self.ratios),
            "outcome": self.outcome,
            "ms": self.ms,
            "champion_ms": self.champion_ms,
        }


def changes_of(cell: Cell) -> str:
    return " ".join(f"{key}={value}" for key, value in (*cell.tiles, *cell.settings)) or "as shipped"


class Track:
    """Where races are run. `timed(cell, steps)` returns ms a step, or raises CellFailed; `clock` counts seconds."""

    def __init__(self, timed: Callable[[Cell, int], float], clock: Callable[[], float] = time.monotonic):
        self._timed, self.clock = timed, clock
        self.steps = LEAST_STEPS  # of a turn
        self._rounds_s: list[float] = []

    @property
    def round_s(self) -> float:
        """How long a round takes: the median so far, as the first of a cell also makes its graph."""
        return median(self._rounds_s)

    def begin(self, cell: Cell) -> float:
        """Run a short turn, and choose the steps of those that follow; return ms a step. Raises CellFailed."""
        start = self.clock()
        ms = self._timed(cell, LEAST_STEPS)
        self._rounds_s.append(2 * (self.clock() - start))
        self.steps = max(LEAST_STEPS, min(MOST_STEPS, round(TURN_MS / ms)))
        return ms

    def race(
        self,
        phase: str,
        challenger: Cell,
        champion: Cell,
        until: float,
        rounds: int = ROUNDS,
        judge: Callable[[list[float]], str | None] = verdict,
        may_stop: bool = True,
    ) -> Race:
        """Run a race. It ends early when its judge is sure, and before a round that would not be over in time."""
        race = Race(phase, challenger, champion)
        turns = [(challenger, race.ms), (champion, race.champion_ms)]
        while len(race.ms) < rounds and not (may_stop and judge(race.ratios)):
            start = self.clock()
            if start + self.round_s > until:
                race.outcome = OUT_OF_TIME
                break
            try:
                for cell, taken in turns:
                    taken.append(self._timed(cell, self.steps))
            except CellFailed as error:
                race.outcome = f"skipped: {error}"
                return race
            self._rounds_s.append(self.clock() - start)
            turns.reverse()  # who comes second meets the other's leavings
        race.outcome = judge(race.ratios) or race.outcome
        return race


class Search:
    """Climbs from the cell that is shipped, by forecasts where they are cheap and by races where it counts. `champion`: the best so far."""

    def __init__(self, start: Cell, track: Track, forecast: Callable[[Cell], float | None], say: Callable[[str], None]):
        self.start = self.champion = start
        self.races: list[Race] = []
        self.forecasts: dict[Cell, float | None] = {}
        self._raced = {start}
        self._track, self._forecast, self._say = track, forecast, say

    def forecast(self, cell: Cell) -> float:
        """Return the forecast of ms a step; infinity where there is none."""
        if cell not in self.forecasts:
            self.forecasts[cell] = self._forecast(cell)
        return float("inf") if self.forecasts[cell] is None else self.forecasts[cell]

    def explore(self, lines: Sequence[Callable[[Cell], list[Cell]]], until: float) -> None:
        """Follow one line of cells after the other, each from the best that was forecast before, until that hardly gets better."""
        best, before_ms = self.start, float("inf")
        self._say(f"simulated as shipped: {self.forecast(best):.1f} ms")
        while self.forecast(best) < before_ms * (1 - MARGIN):
            before_ms = self.forecast(best)
            for line in lines:
                known = len(self.forecasts)
                for cell in line(best):
                    if self._track.clock() > until:
                        return
                    best = min(best, cell, key=self.forecast)
                if len(self.forecasts) > known:
                    self._say(f"simulated {len(self.forecasts)} tilings: best {self.forecast(best):.1f} ms, {changes_of(best)}")

    def climb(self, phase: str, near: Callable[[Cell], list[Cell]], until: float) -> None:
        """Race what is near the champion and was not raced yet, the best forecast first, until nothing is left or time is up."""
        while untried := [cell for cell in near(self.champion) if cell not in self._raced]:
            for cell in untried:
                if self._track.clock() + self._track.round_s > until:
                    return
                self.forecast(cell)
            challenger = min(untried, key=self.forecast)  # the first of equals
            self._say(f"{phase}: {changes_of(challenger)} against {self._whose(self.champion)}")
            race = self._track.race(phase, challenger, self.champion, until)
            self._keep(race)
            if race.outcome == FASTER:
                self.champion = challenger

    def finish(self, until: float) -> Race | None:
        """Race the champion against the start once more; if it is not faster now, the start is the champion again."""
        if self.champion == self.start:
            return None
        self._say(f"final: {changes_of(self.champion)} against {self._whose(self.start)}")
        race = self._track.race("final", self.champion, self.start, until, FINAL_ROUNDS, final_verdict, may_stop=False)
        self._keep(race)
        if race.outcome != FASTER:
            self.champion = self.start
        return race

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each race, numbered; the champion that it was run against is known by the race that it won."""
        numbers = {self.start: "shipped"}
        rows = []
        for number, race in enumerate(self.races, 1):
            forecast_ms = self.forecasts.get(race.challenger)
            rows.append({"race": str(number), "against": numbers[race.champion], **race.row(forecast_ms)})
            numbers.setdefault(race.challenger, str(number))
        return rows

    def _whose(self, champion: Cell) -> str:
        return "what is shipped" if champion == self.start else "the best so far"

    def _keep(self, race: Race) -> None:
        self.races.append(race)
        self._raced.add(race.challenger)
        ratio = f"{median(race.ratios):.3f} of {self._whose(race.champion)}, " if race.ratios else ""
        self._say(f"{race.phase}: {changes_of(race.challenger)}: {ratio}{race.outcome}")
