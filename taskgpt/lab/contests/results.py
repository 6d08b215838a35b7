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
from typing import Self

from taskgpt.errors import UserError, shorten
from taskgpt.files import fill, read_json, write_whole
from taskgpt.lab import machine
from taskgpt.lab.contests.cells import WHOLE_TENSOR, Cell
from taskgpt.lab.contests.turns import MOST_MS, First
from taskgpt.lab.named import make_config
from taskgpt.lab.report import interval_words, median_interval

VERSION = 1
FILE = "compare.json"
MOST_STEPS = 2000  # in a turn
FORGOTTEN = ("system", "memory")  # of a machine's description: what may differ from day to day


@dataclass
class Result:
    """A cell's measurements. `first`: None until it ran. `steps`: in a turn. `ms`: a step, of each turn. `failed`: why."""

    cell: Cell
    first: First | None = None
    steps: int = field(default=0, metadata={"at_least": 0, "at_most": MOST_STEPS})
    ms: list[float] = field(default_factory=list)
    failed: str = ""

    def __post_init__(self):
        for ms in self.ms:
            if not 0 < ms < MOST_MS:
                raise ValueError(f"ms: wanted times of a step above 0 and below {MOST_MS:g} ms, got {ms:g}")

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The median's confidence interval, 95 %; None if there are too few turns for one."""
        return median_interval(self.ms)

    @property
    def interval_text(self) -> str:
        return interval_words(self.interval)

    @property
    def precision(self) -> float | None:
        """Half of the interval, as a part of the median."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2 / self.median

    def is_tight(self, precision: float) -> bool:
        return self.precision is not None and self.precision <= precision


@dataclass
class _Saved:
    """What the file holds."""

    taskgpt_compare: int
    machine: dict[str, str]
    cells: list[Result]


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
                        f"--resume {path}: measured with {shorten(key)} {shorten(before.machine.get(key))}, this is {here.get(key)}; "
                        "choose another --output"
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
        if not file.exists():
            raise UserError(f"{file}: no such file; wanted results, as `taskgpt compare --output DIR` writes them")
        saved = read_json(file)
        if not isinstance(saved, dict) or (version := saved.get("taskgpt_compare")) is None:
            raise UserError(f"{file}: no results of `taskgpt compare`; choose the folder that it wrote them into")
        if version != VERSION:
            raise UserError(f"{file}: results of version {shorten(version)}, and this taskgpt reads {VERSION}; measure again")
        try:
            cells = fill(_Saved, saved, "").cells
            found = {result.cell: result for result in cells}
            for at, result in enumerate(cells):
                if found[result.cell] is not result:
                    raise UserError(f"cells[{at}]: the same cell stands there twice")
                make_config(result.cell.graph_word)
                str(result.cell)  # names its scheduler
        except UserError as error:
            raise UserError(f"{file}: {error}; damaged, or of another taskgpt: measure again") from None
        return cls(file, saved["machine"], found)

    def save(self) -> None:
        """Write the file, whole or not at all. Raises UserError."""
        saved = asdict(_Saved(VERSION, self.machine, list(self.found.values())))
        write_whole(self.path, json.dumps(saved, indent=1, allow_nan=False) + "\n")

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
        return [group for group in groups.values() if len({r.first.sha256 for r in group}) > 1]
