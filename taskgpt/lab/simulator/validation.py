"""How right simulations are: what is predicted beside what is measured here, cell by cell, in turns.

rows = [...]                                  # a dictionary for each cell, with `step_ms`
measure(cells, rows, rounds=5, steps=10)      # adds measured_ms, q1_ms, q3_ms, ratio
median_error(rows), ranks(rows)
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from taskgpt.lab import machine
from taskgpt.lab.contests.cells import Cell
from taskgpt.lab.contests.turns import CellFailed, Turns
from taskgpt.lab.report import quartiles
from taskgpt.progress import Progress

Row = dict[str, Any]
NOT_MEASURED = dict.fromkeys(("measured_ms", "q1_ms", "q3_ms", "ratio"))


def measure(cells: Sequence[Cell], rows: Sequence[Row], rounds: int, steps: int) -> None:
    """Run the cells that this machine has the cores for, round after round, and put medians and quartiles into their rows."""
    real = [(cell, row, []) for cell, row in zip(cells, rows, strict=True) if cell.workers <= machine.usable_cores()]
    with Progress("measuring", rounds * len(real)) as progress, Turns() as turns:
        for done, (cell, _, taken) in enumerate(real * rounds):
            progress.show(done, f"round {done // len(real) + 1}/{rounds}: {cell}")
            try:
                taken.append(turns.timed(cell, steps))
            except CellFailed as error:
                with progress.aside():
                    print(f"failed     {cell}: {error}", file=sys.stderr)
    for _, row, taken in real:
        if taken:
            row["q1_ms"], row["measured_ms"], row["q3_ms"] = quartiles(taken)
            row["ratio"] = row["step_ms"] / row["measured_ms"]


def median_error(rows: Sequence[Row]) -> float | None:
    """Return the median distance of predicted / measured from 1."""
    errors = [abs(row["ratio"] - 1) for row in rows if row["ratio"] is not None]
    return statistics.median(errors) if errors else None


def ranks(rows: Sequence[Row]) -> tuple[int, list[str]]:
    """Return how many pairs differ by more than their spreads, and what there is to say of those that were predicted in another order.

    Pairs of schedulers and settings, with the same graph and number of workers. A spread is that from the first to the third quartile.
    """
    count, wrong = 0, []
    for a, b in itertools.combinations([row for row in rows if row["ratio"] is not None], 2):
        faster, slower = sorted((a, b), key=lambda row: row["measured_ms"])
        if (a["graph"], a["workers"]) == (b["graph"], b["workers"]) and faster["q3_ms"] < slower["q1_ms"]:
            count += 1
            if faster["step_ms"] >= slower["step_ms"]:
                times = f"measured {faster['measured_ms']:.2f} and {slower['measured_ms']:.2f} ms"
                predicted = f"predicted {faster['step_ms']:.2f} and {slower['step_ms']:.2f}"
                where = f"{a['graph']}, {a['workers']} workers"
                wrong.append(f"{faster['scheduler']} before {slower['scheduler']}, {where}: {times}, {predicted}")
    return count, wrong
