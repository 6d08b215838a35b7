"""A run's log, read: losses and the rest, thinned as they come, so that a log of days takes no more memory than one of minutes.

log = RunLog.read("runs/a")                 # a run's folder, or the file that --log wrote
log.steps.means()[COLUMNS.index("loss")]

What is no record, the last line of a run that was killed say, is left out, and `notes` says so.
"""

import json
import math
import os
import shlex
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import file_size, read_json
from taskgpt.lab.charts import Thinned
from taskgpt.progress import Progress, megabytes

LOG, RUN = "log.jsonl", "run.json"  # of a run's folder
LINE_BYTES = 1 << 20  # of a record; the longest ones, of samples and summaries, have some KB
LARGEST = float(np.finfo(np.float32).max)  # number of a record: losses and norms are float32
MOST_SAMPLES = 20  # the last ones
LOOK = 10_000  # lines between two looks of the progress

KEYS = {"loss": "train_loss", "norm": "norm", "lr": "lr", "speed": "tokens_per_s"}  # of a step's record
COLUMNS = ("step", "tokens", "seconds", *KEYS)  # of the steps; the first three are counts, when a step is done
VALIDATION_COLUMNS = ("step", "tokens", "seconds", "validation")


@dataclass
class Losses:
    """The first, last and best of losses, NaN for one that is no finite number; the best one's step."""

    first: float | None = None  # None as long as there is none
    last: float = math.nan
    best: float = math.inf
    best_step: int = 0

    @classmethod
    def of(cls, found: Iterable[tuple[int, float]]) -> "Losses":
        losses = cls()
        for step, loss in found:
            losses.add(step, loss)
        return losses

    def add(self, step: int, loss: float) -> None:
        loss = loss if math.isfinite(loss) else math.nan
        self.first, self.last = loss if self.first is None else self.first, loss
        if loss < self.best:
            self.best, self.best_step = loss, step

    def told(self) -> dict[str, float | int | None] | None:
        """Return first, last, best and best_step, None where one is no number; None if there are none."""
        if self.first is None:
            return None
        is_known = math.isfinite(self.best)
        first, last = (None if math.isnan(loss) else loss for loss in (self.first, self.last))
        return {"first": first, "last": last, "best": self.best if is_known else None, "best_step": self.best_step if is_known else None}


@dataclass
class RunLog:
    """What a log says. steps: of COLUMNS; validations: of VALIDATION_COLUMNS; samples: (steps done before, text), the last ones.

    count: steps in the log; loss, validation: their losses, best_step as the log counts. summary: the last one, None if there is none.
    settings: what a run's folder says of it.
    """

    path: Path
    name: str
    steps: Thinned = field(default_factory=lambda: Thinned(len(COLUMNS)))
    validations: Thinned = field(default_factory=lambda: Thinned(len(VALIDATION_COLUMNS)))
    samples: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=MOST_SAMPLES))
    count: int = 0
    loss: Losses = field(default_factory=Losses)
    validation: Losses = field(default_factory=Losses)
    summary: dict[str, Any] | None = None
    settings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _tokens: float = 0.0
    _seconds: float = 0.0
    _next: int = 0
    _damaged: int = 0
    _missing: int = 0
    _again: int = 0

    @classmethod
    def read(cls, run: str | Path) -> "RunLog":
        """Return what the log of a run's folder, or a log, says. Raises UserError if it is no log, or cannot be read."""
        path = log_of(run)
        log = cls(path, _parts(path)[-1])
        try:
            size = file_size(path)
            with path.open("rb") as file, Progress(f"reading {shorten(path, 40)}", size, megabytes) as progress:
                if file.read(1) not in (b"{", b""):
                    raise UserError(f"{shorten(path)}: is no log; name a run's folder, or a file that train --log wrote")
                file.seek(0)
                for number, line in enumerate(_lines(file), 1):
                    log._take(line)
                    if number % LOOK == 0:
                        progress.show(file.tell())
        except OSError as error:
            raise UserError(f"{shorten(path)}: cannot read: {error.strerror}; choose a log that you may read") from None
        log._note()
        if path.name == LOG:
            log._describe(path.with_name(RUN))
        return log

    @property
    def tokens_per_s(self) -> float | None:
        """The median, without the first step, which touches all memory for the first time; None if the log knows none."""
        speeds = self.steps.means()[COLUMNS.index("speed")]
        speeds = speeds[1:] if len(speeds) > 1 else speeds
        return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if isinstance(record, dict) and isinstance(record.get("summary"), dict):
            self.summary = record["summary"]
        elif type(step) is not int or not 0 <= step < 2**53:
            self._damaged += 1
        elif "train_loss" in record:
            self._step(step, record)
        elif "val_loss" in record:
            loss = _number(record["val_loss"])
            self.validation.add(step, loss)
            self.validations.add(step, self._tokens, self._seconds, loss)
        elif isinstance(record.get("sample"), str):
            self.samples.append((step, record["sample"]))

    def _step(self, step: int, record: dict[str, Any]) -> None:
        found = {name: _number(record.get(key)) for name, key in KEYS.items()}
        seconds = _number(record.get("ms")) / 1e3
        tokens = found["speed"] * seconds
        if seconds >= 0 and tokens >= 0:  # both are known
            self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self.count += 1
        self._missing += max(0, step - self._next) if self.count > 1 else 0
        self._again += step < self._next
        self._next = step + 1
        self.loss.add(step, found["loss"])
        self.steps.add(step + 1, self._tokens, self._seconds, *found.values())

    def _note(self) -> None:
        if self._damaged:
            self.notes.append(f"{shorten(self.path)}: left out {self._damaged:,} line{'s' * (self._damaged > 1)}, which no record is in")
        if self._missing:
            self.notes.append(f"{shorten(self.path)}: {self._missing:,} steps are missing; tokens and time count those that are there")
        if self._again:
            self.notes.append(f"{shorten(self.path)}: the steps begin again {self._again:,} times: is this the log of one run?")

    def _describe(self, file: Path) -> None:
        """Take what run.json says, where there is one; a damaged one is no reason to draw nothing."""
        with suppress(UserError):
            found = read_json(file)
            argv = found.get("argv") if isinstance(found, dict) else None
            if isinstance(argv, list):
                self.settings["command"] = shlex.join(["taskgpt", "train", *map(str, argv)])
                self.settings |= {key: str(found[key]) for key in ("made", "taskgpt") if key in found}


def log_of(run: str | Path) -> Path:
    """Return the file of a run's log. Raises UserError if there is none."""
    path = Path(run)
    if path.is_dir():
        path = path / LOG
        if not path.exists():
            raise UserError(f"{shorten(run)}: holds no {LOG}; name the folder of train --out, or a file that train --log wrote")
    elif not path.exists():
        raise UserError(f"{shorten(run)}: no such run; name the folder of train --out, or a file that train --log wrote")
    return path


def read_all(runs: Iterable[str | Path]) -> list[RunLog]:
    """Return the logs, each one once, under names that tell them apart. Raises UserError."""
    logs = [RunLog.read(path) for path in {os.path.realpath(log_of(run)): run for run in runs}.values()]
    parts = [_parts(log.path) for log in logs]
    for log, mine in zip(logs, parts, strict=True):
        longer = 1
        while longer < len(mine) and sum(other[-longer:] == mine[-longer:] for other in parts) > 1:
            longer += 1
        log.name = "/".join(mine[-longer:])
    return logs


def _parts(path: Path) -> tuple[str, ...]:
    """Return the parts of a name for a run: of its folder, or of the log's file."""
    whole = Path(os.path.realpath(path))
    return (whole.parent if whole.name == LOG else whole.with_suffix("") if whole.suffix == ".jsonl" else whole).parts


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines, of one that is too long for a record its beginning."""
    while line := file.readline(LINE_BYTES):
        yield line
        while len(line) == LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES)


def _number(value: Any) -> float:
    """Return a float, NaN for what is no number that a loss, a norm or a time can be."""
    return float(value) if type(value) in (int, float) and abs(value) <= LARGEST else math.nan
