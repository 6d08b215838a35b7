"""What a person sees of a training run: lines and progress; its logs; and what stops it: signals, or a reader who leaves."""

import dataclasses
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from taskgpt.config import GraphConfig
from taskgpt.errors import Interrupted, drop_output, shorten
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.steps import Steps
from taskgpt.lab import layout
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.report import compile_with_progress
from taskgpt.products import BLAS, described
from taskgpt.progress import Progress, minutes
from taskgpt.runs.logs import JsonLines, Log, Logs
from taskgpt.tasks import Kernel

LAST_STEPS = 20  # whose median says how fast training is now, and when it will end


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


class Console:
    """Everything the program says: lines on standard output, progress on standard error, records in its logs; and what it keeps of it.

    losses, validations, samples: (steps done before, what was found).
    """

    def __init__(self):
        self.output = Output()
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []
        self.samples: list[tuple[int, str]] = []
        self.rows = self.steps = self._steps_here = 0
        self.logs = Logs(self.say)
        self.has_lost_output = False
        self.told: dict[str, Any] = {}  # the summary
        self._progress: Progress | None = None
        self._seconds: deque[float] = deque(maxlen=LAST_STEPS)
        self._live: Live | None = None
        self.multiplies_by_blas = False

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        self.logs.close()
        if self.output.error:
            drop_output()

    @property
    def has_reader(self) -> bool:
        """False once the reader of standard output, `head` say, has left."""
        return not isinstance(self.output.error, BrokenPipeError)

    @property
    def has_lost_log(self) -> bool:
        return self.logs.has_lost

    def open_logs(self, logs: Iterable[Log]) -> None:
        """Begin the logs, and know again what an earlier part of the run has told them."""
        for log in logs:
            self.logs.add(log)
            if isinstance(log, JsonLines):
                self.losses += log.losses
                self.validations += log.validations

    def open_live(self, workers: int) -> Live:
        """Begin to keep what a dashboard shows."""
        self._live = Live(workers, samples=self.samples)
        return self._live

    def say(self, line: str) -> None:
        """Print a line. If standard output cannot be written, say so once on standard error, and go on."""
        with self._progress.aside() if self._progress else nullcontext():
            print(line, file=self.output, flush=True)
        if self.output.error and self.has_reader and not self.has_lost_output:
            self.has_lost_output = True
            with suppress(OSError):
                print(f"taskgpt train: standard output: cannot write: {self.output.error.strerror}; going on without it", file=sys.stderr)

    def tell(self, key: str, text: str) -> None:
        """Print a heading and what there is to say under it, which a terminal shows in lines of its width."""
        self.say(layout.field(key, text))

    def notes(self, lines: Iterable[str]) -> None:
        """Say what times should be read with."""
        for line in lines:
            self.tell("note", line)

    @contextmanager
    def progress(self, steps: int) -> Iterator[None]:
        """Show progress below the lines, on a terminal; elsewhere lines are progress enough."""
        try:
            with Progress("training", steps, has_lines=False) as self._progress:
                yield
        finally:
            self._progress = None

    def compiling(self, kernels: Sequence[Kernel]) -> None:
        """Compile the kernels, and say so if they do not come from the cache."""
        if told := compile_with_progress(kernels):
            self.tell("compiled", told)

    def begin(self, config: GraphConfig, scheduler: str, data: str, m: GPT2, step: Steps, steps: int) -> None:
        """Say what runs, and how."""
        shape = m.model
        self.rows, self.steps = m.step_tokens, steps
        sizes = f"L {shape.layers}, NH {shape.heads}, C {shape.channels}, V {shape.vocabulary}"
        work = f"{step.tasks} tasks of {len(step.kernels)} kernels, {step.flops / 1e9:.4g} GFLOP a step"
        self.tell("model", f"{config.name}: {shape.parameter_count():,} parameters, {sizes}")
        several = f", {step.count} micro-batches a step: {self.rows:,} tokens" * (step.count > 1)
        self.tell("batch", f"B {m.batch.batch_size}, T {m.batch.seq_len}{several}")
        self.tell("data", data)
        tiles = ", ".join(f"{name} {size}" for name, size in dataclasses.asdict(config.tiles).items())
        self.tell("graph", f"{work}, {m.nbytes / 2**30:.2f} GiB of tensors")
        self.tell("tiles", tiles)
        self.tell("products", described(m.products))
        self.multiplies_by_blas = m.products == BLAS
        if m.update != m.options.update:
            self.tell("update", f"{m.update}, because {m.options.separate_because(m.batch)}")
        self.tell("scheduler", scheduler)
        if self._live:
            self._live.total = steps
            self._live.title = f"{config.name}, B {m.batch.batch_size}, T {m.batch.seq_len}, {scheduler}"

    def validation(self, step: int, loss: float) -> None:
        self.validations.append((step, loss))
        self.say(f"val loss {loss:.6f}")
        self.logs.write({"step": step, "val_loss": loss})
        if self._live:
            self._live.validation(step, loss)

    def step(self, step: int, loss: float, norm: float, skipped: str, rate: float, seconds: float) -> None:
        """Say what the step, of that number from 0, found, learned with and took; the speed that is shown is that of the last steps.

        `skipped` is why it updated nothing, "" if it did.
        """
        self.losses.append((step, loss))
        if self._steps_here == 1:
            self._seconds.clear()  # the first step touched all memory for the first time
        self._steps_here += 1
        self._seconds.append(seconds)
        speed, smoothed = self.rows / seconds, statistics.median(self._seconds)
        left_s = smoothed * (self.steps - step - 1)
        took = f"took {seconds * 1e3:.1f} ms, {self.rows / smoothed:.0f} tok/s" + f", {minutes(left_s)} left" * (left_s > 0)
        if self._progress:
            self._progress.show(step + 1, f"loss {loss:.3f}, {self.rows / smoothed:.0f} tok/s", left_s=left_s)
        why = skipped and f", skipped: {skipped}"
        self.say(f"step {step + 1}/{self.steps}: train loss {loss:.6f}, norm {norm:.4f}, lr {rate:.4g}{why} ({took})")
        self.logs.begin()
        record = {"step": step, "train_loss": loss, "norm": norm, "lr": rate, "ms": seconds * 1e3, "tokens_per_s": speed}
        self.logs.write(record | ({"skipped": skipped} if skipped else {}))
        if self._live:
            self._live.step(step, loss, speed, left_s)

    def sample(self, step: int, ids: list[int], text: str, printable: str) -> None:
        self.samples.append((step, printable))
        self.say(f"generating:\n---\n{printable}\n---")
        self.logs.write({"step": step, "sample": text, "ids": ids})

    def summary(self, summary: dict[str, Any], is_wanted: bool) -> None:
        """The last lines. `is_wanted`: False leaves an earlier log where no step has replaced it."""
        self.told = summary
        if told := summary["train_loss"]:
            self.tell("train loss", _listed(told, "step", 1))
        if told := summary["val_loss"]:
            self.tell("validation", _listed(told, "after step", 0))
        if "median_ms" in summary:
            s = summary
            steady = f"mean {s['mean_ms']:.1f}, median {s['median_ms']:.1f}, min {s['min_ms']:.1f} ms a step"
            self.tell("time", f"first step {s['first_step_ms']:.1f} ms; then {steady}")
            speed, threads = f"{s['tokens_per_s']:.0f} tok/s, {s['gflops']:.1f} GFLOP/s", f"{s['workers']} thread{'s' * (s['workers'] > 1)}"
            if "share_of_sgemm" in s:
                share = f"{s['share_of_sgemm']:.0%} of this machine's sgemm on {threads} ({s['sgemm_gflops']:.0f})"
                self.tell("speed", f"{speed} = {share}")
            else:
                self.tell("speed", f"{speed} on {threads}")
            if s.get("share_of_sgemm", 0) > 1 and self.multiplies_by_blas:
                self.notes(["faster than sgemm, measured again: the machine is slower since then, or these tiles suit it better"])
        self.tell("memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB at most")
        self.say(f"parameters sha256 {summary['parameters_sha256']}")
        if is_wanted or any(log.is_cut_off for log in self.logs):
            self.logs.begin()
        for log in self.logs:
            if log.is_waiting:
                self.tell("log", f"no step ran; {shorten(log.where)} stays as it was")
        self.logs.write({"summary": summary})


def _listed(told: dict[str, float | int | None], where: str, first: int) -> str:
    """Return losses in words, the best one with its step, whose numbers begin with `first`."""
    words = [f"{name} {'no number' if told[name] is None else format(told[name], '.6f')}" for name in ("first", "last", "best")]
    return ", ".join(words) + ("" if told["best"] is None else f" ({where} {told['best_step'] + first})")


class StopRequest:
    """What ends a run early, in order: a signal while steps run, a time that is over, or a reader of standard output that leaves.

    Then the run ends after the steps under way, with checkpoint and summary. Before the first step and after the last, where there is
    nothing to wait for, a signal ends the program at once, and so does a second one.
    """

    def __init__(self, report: Console):
        self.number = 0  # of the signal
        self._end_s = math.inf  # by the clock that never goes back
        self.can_wait = self.wants_save = False
        self.consequence = "nothing was saved"
        self._report = report

    @property
    def is_requested(self) -> bool:
        return self.number != 0 or not self._report.has_reader or time.monotonic() >= self._end_s

    def end_after(self, seconds: float) -> None:
        """Request a stop when so much time has passed."""
        self._end_s = time.monotonic() + seconds

    @property
    def exit_code(self) -> int:
        """Return the conventional one: 128 + the signal's number; 1 for a reader that left; 0 if nothing ended the run early."""
        return 128 + self.number if self.number else int(not self._report.has_reader)

    def request_save(self, *_: object) -> None:
        """Have a checkpoint made soon. A signal's handler."""
        self.wants_save = True

    def request(self, number: int, _frame: object) -> None:
        if self.number or not self.can_wait:
            raise Interrupted(number, f"interrupted{' at once' if self.number else ''}; {self.consequence}")
        self.number = number
        with suppress(RuntimeError):  # in the middle of writing another line
            self._report.say("stopping as soon as the steps under way are done; press Ctrl-C again to stop at once")
