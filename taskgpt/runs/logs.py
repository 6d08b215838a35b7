"""Where the records of a run go: JSON lines, CSV, TensorBoard's event files. A log that cannot be written does not end training.

logs = Logs(say)
logs.add(JsonLines("log.jsonl", resumed=None))
logs.write({"step": 0, "val_loss": 5.5})
logs.begin()                                    # there is a step to write in the place of earlier logs
logs.write({"step": 0, "train_loss": 5.6, ...})

A record is what docs/reference/files.md says of the log. An earlier log stays as it is until the run has done a step. A run that goes on
continues its logs: what they say of steps from there on is written anew.
"""

import csv
import errno
import io
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from taskgpt.errors import UserError, shorten
from taskgpt.files import parse_json, replacing, verify_can_write

Record = dict[str, Any]
RECORDS = b'{"step": ', b'{"summary": '  # how the lines of a log begin
CSV_COLUMNS = ("step", "train_loss", "val_loss", "norm", "lr", "ms", "tokens_per_s", "skipped")
CURVES = {"train_loss": "loss/train", "val_loss": "loss/validation"} | {name: name for name in ("norm", "lr", "ms", "tokens_per_s")}
FLUSH_S = 10.0  # between two times that events are brought to the disk, where TensorBoard looks


class Log:
    """A log. flag, where: how the user named it; is_waiting: an earlier one is still there; is_cut_off: that one has no end.

    `begin` puts this run's in its place, `write` takes a record, at any time. Both raise OSError.
    """

    flag = ""
    is_waiting = is_cut_off = False

    def __init__(self, where: str | Path):
        self.where = str(where)

    @property
    def name(self) -> str:
        return f"{self.flag} {shorten(self.where)}"

    def begin(self) -> None:
        raise NotImplementedError

    def write(self, record: Record) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Logs:
    """The logs of a run. One that cannot be written is left out from then on, which `say` is told, and `has_lost` says."""

    def __init__(self, say: Callable[[str], None]):
        self.has_lost = False
        self._say = say
        self._logs: list[Log] = []

    def add(self, log: Log) -> None:
        self._logs.append(log)

    def __iter__(self) -> Iterator[Log]:
        return iter(self._logs)

    def begin(self) -> None:
        self._each(lambda log: log.begin())

    def write(self, record: Record) -> None:
        self._each(lambda log: log.write(record))

    def close(self) -> None:
        for log in self._logs:
            with suppress(OSError):
                log.close()

    def _each(self, do: Callable[[Log], None]) -> None:
        for log in list(self._logs):
            try:
                do(log)
            except OSError as error:  # the training is worth more
                self._logs.remove(log)
                self.has_lost = True
                with suppress(OSError):
                    log.close()
                self._say(f"{log.name}: cannot write: {error.strerror or error}; going on without it")


# Files of lines ------------------------------------------------------------------------------------------------------------------------


class Lines(Log):
    """A file with a line, or none, for each record; or a pipe.

    `resumed`: after how many steps the run goes on. Raises UserError if the file cannot be written, if something else than an earlier log
    of its kind is there, or if it is a pipe that nobody reads.
    """

    head = b""  # the first line
    kind = ""  # what it is, in words
    look = 0  # bytes from which one sees that

    def __init__(self, path: str | Path, resumed: int | None):
        super().__init__(path)
        self._held: list[bytes] | None = None  # lines for a log in whose place an earlier one is
        self._head = self.head  # if it is still to be written
        try:
            if os.path.isfile(path) and os.path.getsize(path):
                with open(path, "rb") as file:
                    if not self._is_of_this_kind(file.read(self.look)):
                        raise UserError(f"{self.name}: is there already and is no {self.kind}; name another file")
                    self._held = [] if resumed is None else list(self._past(file, resumed))
            # A pipe without a reader would otherwise be waited for, and for ever.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
            os.set_blocking(descriptor, True)
            self._file = open(descriptor, "wb", buffering=0)  # noqa: SIM115 - open until the program ends
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise UserError(f"{self.name}: is a pipe that nobody reads; start its reader first") from None
            raise UserError(f"{self.name}: cannot write: {error.strerror}; choose another place, where you may write") from None

    @property
    def is_waiting(self) -> bool:
        return self._held is not None

    def begin(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with replacing(self.where) as file:
                file.writelines([self.head, *held])
            self._head = b""
            self._file.close()
            self._file = open(self.where, "ab", buffering=0)  # noqa: SIM115 - open until the program ends

    def write(self, record: Record) -> None:
        if not (line := self._line(record)):
            return
        if self._held is not None:
            self._held.append(line)
            return
        line, self._head = self._head + line, b""
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def _past(self, file: io.BufferedReader, steps: int) -> Iterator[bytes]:
        """Yield what an earlier log says of the steps before so many, without a line that was cut off: a kill, or a full disk, did that."""
        file.seek(len(self.head))
        for line in file:
            try:
                if line.endswith(b"\n") and self._known(line, steps) < steps:
                    yield line
            except (ValueError, AttributeError, RecursionError):
                continue

    def _is_of_this_kind(self, first: bytes) -> bool:
        raise NotImplementedError

    def _known(self, line: bytes, steps: int) -> int:
        """Return the step of a line of an earlier log, `steps` for what belongs to none. Raises ValueError for a damaged one."""
        raise NotImplementedError

    def _line(self, record: Record) -> bytes:
        raise NotImplementedError


class JsonLines(Lines):
    """A JSON object a line. losses, validations: what an earlier log says of them, (step, loss)."""

    flag, kind, look = "--log", "log", max(map(len, RECORDS))

    def __init__(self, path: str | Path, resumed: int | None):
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []
        super().__init__(path, resumed)

    def _past(self, file: io.BufferedReader, steps: int) -> Iterator[bytes]:
        self.is_cut_off = True  # until a summary is the last line
        yield from super()._past(file, steps)

    def _is_of_this_kind(self, first: bytes) -> bool:
        return any(first.startswith(each[: len(first)]) for each in RECORDS)

    def _known(self, line: bytes, steps: int) -> int:
        self.is_cut_off = True
        record = parse_json(line.decode())
        step = record.get("step", steps)  # a summary, of the part before, has none
        self.is_cut_off = "summary" not in record
        step = step if type(step) is int else steps
        if step < steps:
            for key, known in (("train_loss", self.losses), ("val_loss", self.validations)):
                if key in record:
                    known.append((step, record[key] if isinstance(record[key], float) else math.nan))
        return step

    def _line(self, record: Record) -> bytes:
        # JSON has no NaN: a diverged loss is null.
        known = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        return json.dumps(known, allow_nan=False).encode() + b"\n"


class Csv(Lines):
    """A row for each step, with the validation before it; one of a validation alone if no step follows."""

    flag, kind = "--csv", "table of steps"
    head = (",".join(CSV_COLUMNS) + "\n").encode()
    look = len(head)

    def __init__(self, path: str | Path, resumed: int | None):
        self._validation: Record = {}  # that has no row yet
        super().__init__(path, resumed)

    def _is_of_this_kind(self, first: bytes) -> bool:
        return first == self.head

    def _known(self, line: bytes, steps: int) -> int:
        return int(line.partition(b",")[0])

    def _line(self, record: Record) -> bytes:
        if "val_loss" in record:
            before, self._validation = self._validation, record
            return _row(before)
        if "train_loss" in record:
            validation, self._validation = self._validation, {}
            return _row(validation | record) if validation.get("step") == record["step"] else _row(validation) + _row(record)
        if "summary" in record:
            validation, self._validation = self._validation, {}
            return _row(validation)
        return b""


def _row(record: Record) -> bytes:
    if not record:
        return b""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(record.get(name, "") for name in CSV_COLUMNS)
    return text.getvalue().encode()


# TensorBoard ---------------------------------------------------------------------------------------------------------------------------


class TensorBoard(Log):
    """Event files in a folder, a new one for each part of a run; TensorBoard forgets what earlier ones say of steps from there on.

    tensorboardX writes them, but for its threads: when the disk is full, those end, and training would wait for them for ever. Raises
    UserError if it is not installed, or if nothing can be written there.
    """

    flag = "--tensorboard"
    is_waiting = True

    def __init__(self, folder: str | Path, resumed: int | None):
        super().__init__(folder)
        try:
            import tensorboardX  # here, as it is an extra, and imports torch where there is one
            from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError:
            raise UserError(f"{self.name}: needs tensorboardX; pip install 'taskgpt[tensorboard]', or take --csv") from None
        self._library, self._events, self._summaries = tensorboardX, event_pb2, summary_pb2
        self._first_step = resumed or 0
        self._held: list[Record] = []
        self._writer: Any = None
        self._flushed_s = -math.inf
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.name}: cannot write: {error.strerror}; choose another place, where you may write") from None
        verify_can_write(Path(folder, "events"))

    def begin(self) -> None:
        if not self.is_waiting:
            return
        self.is_waiting = False
        self._writer = self._library.RecordWriter(str(self._next_file()))
        self._put(file_version="brain.Event:2")
        self._put(step=self._first_step, session_log=self._events.SessionLog(status=self._events.SessionLog.START))
        for record in self._held:
            self.write(record)
        self._held.clear()

    def write(self, record: Record) -> None:
        if self.is_waiting:
            self._held.append(record)
            return
        values = [self._summaries.Summary.Value(tag=tag, simple_value=record[key]) for key, tag in CURVES.items() if key in record]
        if "sample" in record:  # as a block of code: TensorBoard reads Markdown
            values += self._library.summary.text("sample", "    " + record["sample"].replace("\n", "\n    ")).value
        if values:
            self._put(step=record["step"], summary=self._summaries.Summary(value=values))
        if "summary" in record or time.monotonic() - self._flushed_s >= FLUSH_S:
            self._writer.flush()
            self._flushed_s = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _put(self, **content: Any) -> None:
        self._writer.write(self._events.Event(wall_time=time.time(), **content).SerializeToString())

    def _next_file(self) -> Path:
        """Return a name behind all that are there: TensorBoard reads files in the order of their names, whatever the clock says."""
        folder = Path(self.where).absolute()
        times = [int(part) for path in folder.glob("events.out.tfevents.*") if (part := path.name.split(".")[3]).isdecimal()]
        return folder / f"events.out.tfevents.{max([int(time.time()), *(each + 1 for each in times)]):010d}.{socket.gethostname()}"
