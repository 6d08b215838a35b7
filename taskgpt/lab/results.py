"""What `taskgpt compare` measured: the turns of each cell, in one file, from which a later run goes on and every report is made.

results = Results.begin(folder, cells, resume=False)
results.found[cell].ms.append(...)
results.save()                       # after every turn: nothing measured is lost
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from taskgpt.errors import UserError
from taskgpt.lab import machine
from taskgpt.lab.cells import WHOLE_TENSOR, Cell
from taskgpt.lab.named import make_config
from taskgpt.lab.report import median_interval, write_whole

VERSION = 1
FILE = "compare.json"
LEAST_TURNS = 6  # with fewer, no interval of the median holds 95 %
FORGOTTEN = ("system", "memory")  # of a machine's description: what may differ from day to day


@dataclass
class Result:
    """A cell's measurements. `first`: see turns.py, None until it ran. `steps`: in a turn. `ms`: a step, of each turn. `failed`: why."""

    cell: Cell
    first: dict[str, Any] | None = None
    steps: int = 0
    ms: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def interval(self) -> tuple[float, float]:
        """The median's confidence interval, 95 %."""
        return median_interval(self.ms)

    @property
    def interval_text(self) -> str:
        low, high = self.interval
        return f"{low:.2f}-{high:.2f}"

    @property
    def precision(self) -> float:
        """Half of the interval, as a part of the median."""
        low, high = self.interval
        return (high - low) / 2 / self.median

    def is_tight(self, precision: float) -> bool:
        return len(self.ms) >= LEAST_TURNS and self.precision <= precision


@dataclass
class Results:
    """All cells of a comparison, in order, and the machine that they were measured on."""

    path: Path
    machine: dict[str, str]
    found: dict[Cell, Result]

    @classmethod
    def begin(cls, folder: str, cells: Sequence[Cell], resume: bool) -> Self:
        """Return the cells, unmeasured; with `resume`, with the turns that the folder has of them, and its other cells after them.

        Raises UserError if there are results and `resume` is not asked for, or if another machine made them, OSError if the folder cannot
        be written.
        """
        path = Path(folder) / FILE
        here = machine.describe()
        known: dict[Cell, Result] = {}
        if path.exists():
            if not resume:
                raise UserError(f"--output {folder}: holds results; go on with them by --resume, or choose another folder")
            before = cls.load(path)
            for key in before.machine.keys() | here.keys():
                if key not in FORGOTTEN and before.machine.get(key) != here.get(key):
                    raise UserError(
                        f"--resume {path}: measured with {key} {before.machine.get(key)}, this is {here.get(key)}; choose another --output"
                    )
            known = before.found
            for result in known.values():
                result.failed = ""  # to be tried again
        path.parent.mkdir(parents=True, exist_ok=True)
        results = cls(path, here, {cell: known.pop(cell, None) or Result(cell) for cell in cells} | known)
        results.save()
        return results

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the file, or the one in the folder, of that name. Raises UserError if it is none, or a damaged one."""
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            if saved["taskgpt_compare"] != VERSION:
                raise UserError(f"{file}: results of version {saved['taskgpt_compare']}, and this taskgpt reads {VERSION}; measure again")
            results = [
                Result(Cell.of(each["cell"]), each["first"], int(each["steps"]), [float(ms) for ms in each["ms"]], str(each["failed"]))
                for each in saved["cells"]
            ]
            return cls(file, dict(saved["machine"]), {result.cell: result for result in results})
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; wanted results, as `taskgpt compare --output DIR` writes them") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: no results of `taskgpt compare`, or damaged ones ({error}); measure again") from None

    def save(self) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        saved = {"taskgpt_compare": VERSION, "machine": self.machine, "cells": [asdict(result) for result in self.found.values()]}
        write_whole(self.path, json.dumps(saved, indent=1) + "\n")

    @property
    def measured(self) -> list[Result]:
        """What has at least one turn."""
        return [result for result in self.found.values() if result.ms]

    def sequential_ms(self, graph: str) -> float | None:
        """Return ms a step of the fastest sequential cell of that graph, whatever its tiles: what speedups are over."""
        return min((r.median for r in self.measured if r.cell.graph == graph and r.cell.is_sequential), default=None)

    def disagreements(self) -> list[list[Result]]:
        """Return, for each graph and tiling whose cells should have computed the same bits and did not, these cells."""
        groups: dict[str, list[Result]] = {}
        for result in self.found.values():
            if result.first and result.cell.scheduler != WHOLE_TENSOR and not make_config(result.cell.graph_word).options.commutative:
                groups.setdefault(result.cell.graph_word, []).append(result)
        return [group for group in groups.values() if len({r.first["sha256"] for r in group}) > 1]
