"""What a person sees of a training run: lines, a progress bar and a log; and what stops it: signals, or a reader who leaves."""

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from taskgpt.config import GraphConfig
from taskgpt.errors import Interrupted, UserError, drop_output, shorten
from taskgpt.gpt2.model import GPT2
from taskgpt.lab.dashboard.live import Live
from taskgpt.tasks import Graph


class Output:
    """Standard output for a run that is worth more than its lines: what cannot be written is dropped, and `error` says why."""

    def __init__(self):
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(lambda: sys.stdout.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: sys.stdout.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def _try(self, write) -> None:
        if self.error is None:
            try:
                write()
            except OSError as error:
                self.error = error


class Report:
    """Everything the program says: lines on standard output, a progress bar on a terminal, JSON lines in the log."""

    def __init__(self):
        self.output = Output()
        self.console = Console(file=self.output, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.rows = 0
        self.has_lost_log = self.has_lost_output = False
        self._bar: Progress | None = None
        self._log = None
        self._held: list[bytes] | None = None  # lines for a log in whose place an earlier one is
        self._live: Live | None = None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_) -> None:
        if self._log:
            self._log.close()
        if self.output.error:
            drop_output()

    @property
    def has_reader(self) -> bool:
        """False once the reader of standard output, `head` say, has left."""
        return not isinstance(self.output.error, BrokenPipeError)

    def open_log(self, path: str) -> None:
        """Begin the log; an earlier one stays until there is a first step to write in its place.

        Raises UserError if it cannot be written, if something else than an earlier log is there, or if it is a pipe that nobody reads.
        """
        try:
            if os.path.isfile(path) and os.path.getsize(path):
                with open(path, "rb") as file:
                    if file.read(1) != b"{":
                        raise UserError(f"--log {shorten(path)}: is there already and is no log; name another file")
                self._held = []
            # A pipe without a reader would otherwise be waited for, and for ever.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
            os.set_blocking(descriptor, True)
            self._log = open(descriptor, "wb", buffering=0)  # noqa: SIM115 - open until the program ends
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise UserError(f"--log {shorten(path)}: is a pipe that nobody reads; start its reader first") from None
            raise UserError(f"--log {shorten(path)}: cannot write: {error.strerror}; choose another place, where you may write") from None
        self._log_name = shorten(path)

    def open_live(self, workers: int) -> Live:
        """Begin to keep what a dashboard shows."""
        self._live = Live(workers)
        return self._live

    def say(self, line: str) -> None:
        """Print a line. If standard output cannot be written, say so once on standard error, and go on."""
        self.console.print(line)
        if self.output.error and self.has_reader and not self.has_lost_output:
            self.has_lost_output = True
            with suppress(OSError):
                print(f"taskgpt train: standard output: cannot write: {self.output.error.strerror}; going on without it", file=sys.stderr)

    def notes(self, lines: Iterable[str]) -> None:
        """Say what times should be read with."""
        for line in lines:
            self.say(f"note       {line}")

    @contextmanager
    def progress(self, steps: int) -> Iterator[None]:
        """On a terminal, show a bar with the time left; elsewhere the lines are progress enough."""
        if not self.console.is_terminal:
            yield
            return
        text, left = TextColumn("{task.description}"), TextColumn("left")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._bar.add_task("training", total=steps)
            yield

    def begin(self, config: GraphConfig, scheduler: str, data: str, m: GPT2, graph: Graph) -> None:
        shape = m.model
        self.rows = m.batch.rows
        sizes = f"L {shape.layers}, NH {shape.heads}, C {shape.channels}, V {shape.vocabulary}"
        work = f"{len(graph.tasks)} tasks of {len(graph.kernels)} kernels, {graph.flops / 1e9:.4g} GFLOP a step"
        self.say(f"model      {config.name}: {shape.parameter_count():,} parameters, {sizes}")
        self.say(f"batch      B {m.batch.batch_size}, T {m.batch.seq_len}")
        self.say(f"data       {data}")
        tiles = ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(config.tiles).items())
        self.say(f"graph      {work}, {m.nbytes / 2**30:.2f} GiB of tensors")
        self.say(f"tiles      {tiles}")
        self.say(f"scheduler  {scheduler}")
        if self._live:
            self._live.title = f"{config.name}, B {m.batch.batch_size}, T {m.batch.seq_len}, {scheduler}"

    def validation(self, step: int, loss: float) -> None:
        self.say(f"val loss {loss:.6f}")
        self._write({"step": step, "val_loss": loss})
        if self._live:
            self._live.validation(step, loss)

    def step(self, step: int, loss: float, seconds: float) -> None:
        speed = self.rows / seconds
        self.say(f"step {step}: train loss {loss:.6f} (took {seconds * 1e3:.1f} ms, {speed:.0f} tok/s)")
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=1, description=f"loss {loss:.3f}  {speed:.0f} tok/s")
        self._replace_log()
        self._write({"step": step, "train_loss": loss, "ms": seconds * 1e3, "tokens_per_s": speed})
        if self._live:
            self._live.step(step, loss, speed)

    def sample(self, step: int, ids: list[int], text: str, printable: str) -> None:
        self.say(f"generating:\n---\n{printable}\n---")
        self._write({"step": step, "sample": text, "ids": ids})

    def summary(self, summary: dict[str, Any], is_wanted: bool) -> None:
        """The last lines. `is_wanted`: False leaves an earlier log where no step has replaced it."""
        if "median_ms" in summary:
            s = summary
            steady = f"mean {s['mean_ms']:.1f}, median {s['median_ms']:.1f}, min {s['min_ms']:.1f} ms a step"
            self.say(f"time       first step {s['first_step_ms']:.1f} ms; then {steady}")
            self.say(
                f"speed      {s['tokens_per_s']:.0f} tok/s, {s['gflops']:.1f} GFLOP/s = {s['share_of_sgemm']:.0%} of this machine's sgemm "
                f"on {s['workers']} thread{'s' if s['workers'] > 1 else ''} ({s['sgemm_gflops']:.0f})"
            )
            if s["share_of_sgemm"] > 1:
                self.notes(["faster than sgemm, measured again: the machine is slower since then, or these tiles suit it better"])
        self.say(f"memory     {summary['peak_memory_bytes'] / 2**30:.2f} GiB at most")
        self.say(f"parameters sha256 {summary['parameters_sha256']}")
        if is_wanted:
            self._replace_log()
        elif self._held is not None:
            self.say(f"log        no step ran; {self._log_name} stays as it was")
        self._write({"summary": summary})

    def _replace_log(self) -> None:
        """Put this run's lines in the place of an earlier log."""
        held, self._held = self._held, None
        if held is not None:
            with suppress(OSError):  # who cannot truncate cannot write
                self._log.truncate(0)
            self._put(b"".join(held))

    def _write(self, record: dict[str, Any]) -> None:
        # JSON has no NaN: a diverged loss is null.
        record = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self._held is None:
            self._put(line)
        else:
            self._held.append(line)

    def _put(self, lines: bytes) -> None:
        try:
            while self._log and lines:
                lines = lines[self._log.write(lines) :]
        except OSError as error:
            # The training is worth more than its log.
            self.say(f"--log {self._log_name}: cannot write: {error.strerror}; going on without it")
            self._log.close()
            self._log, self.has_lost_log = None, True


class StopRequest:
    """What ends a run early, in order: a signal while steps run, or a reader of standard output that leaves.

    Then the run ends after the steps under way, with checkpoint and summary. Before the first step and after the last, where there is
    nothing to wait for, a signal ends the program at once, and so does a second one.
    """

    def __init__(self, report: Report):
        self.number = 0  # of the signal
        self.can_wait = False
        self.consequence = "nothing was saved"
        self._report = report

    @property
    def is_requested(self) -> bool:
        return self.number != 0 or not self._report.has_reader

    @property
    def exit_code(self) -> int:
        """Return the conventional one: 128 + the signal's number; 1 for a reader that left; 0 if nothing ended the run early."""
        return 128 + self.number if self.number else int(not self._report.has_reader)

    def request(self, number: int, _frame: object) -> None:
        if self.number or not self.can_wait:
            raise Interrupted(number, f"interrupted{' at once' if self.number else ''}; {self.consequence}")
        self.number = number
        with suppress(RuntimeError):  # in the middle of writing another line
            self._report.say("stopping as soon as the steps under way are done; press Ctrl-C again to stop at once")
