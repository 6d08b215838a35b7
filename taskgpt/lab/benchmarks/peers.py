"""PyTorch and JAX train the same model from the same parameters on the same tokens, in turns with us, in processes of their own."""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from taskgpt.gpt2.model import GPT2
from taskgpt.lab import machine
from taskgpt.lab.benchmarks.peer_process import SHAPE, Start, is_worthwhile, measured
from taskgpt.lab.benchmarks.peer_setups import Setup, setups
from taskgpt.lab.contests.cells import product_of
from taskgpt.lab.named import Prepared, named_scheduler, prepare
from taskgpt.lab.report import Report, in_range, quartiles
from taskgpt.products import OWN_BF16, described
from taskgpt.progress import Progress
from taskgpt.schedulers import Scheduler

# A module for each: VERSION; prepare(workers) comes first; multiply(a, weight, precision) is its product; remark() says how it was done;
# peers(start, precisions) yields the library's ways to train.
LIBRARIES = {"torch": "taskgpt.lab.benchmarks.peer_torch", "jax": "taskgpt.lab.benchmarks.peer_jax"}
PAUSE_SECONDS = 0.3  # after every turn: threads of one library may spin for a while, waiting for more work
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # between first losses, by the less precise of two
COLUMNS = {
    "who": ("who", ""),
    "set-up": ("setup", ""),
    "products": ("precision", ""),
    "threads": ("threads", "d"),
    "first loss": ("first_loss", ".6f"),
    "median ms": ("median_ms", ".1f"),
    "q1": ("q1_ms", ".1f"),
    "q3": ("q3_ms", ".1f"),
    "tok/s": ("tokens_per_second", ".0f"),
    "x ours": ("x_ours", ".2f"),
    "peak GiB": ("peak_gib", ".2f"),
}
DETAILS = ("threads", "q1", "q3")


class PeerFailed(Exception):
    """The process of a peer has ended, or could not train the step."""


@dataclass
class Contestant:
    """Somebody who trains; `turn()` trains a step and returns what `measured` does. One who failed has no times."""

    who: str
    setup: str
    precision: str
    first_loss: float
    turn: Callable[[], dict[str, Any]]
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    has_failed: bool = False

    @property
    def name(self) -> str:
        return f"{self.who} ({self.setup}), {self.precision}"

    def run(self) -> None:
        """Take a turn. Raises PeerFailed."""
        result = self.turn()
        self.seconds.append(result["seconds"])
        if result["peak_bytes"] is not None:
            self.peaks.append(result["peak_bytes"])


class PeerProcess:
    """The process of a library's module in a set-up, and what it says. Leaving the context ends it."""

    def __init__(self, module: str, setup: Setup, folder: Path, workers: int):
        words = [sys.executable, "-m", "taskgpt.lab.benchmarks.peer_process", module, str(folder), str(workers)]
        # In a session of its own, so that Ctrl-C reaches us alone, and we end it.
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=setup.environment(), text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def hear(self) -> Any:
        """Return the next that it says. Raises PeerFailed."""
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise PeerFailed(f"its process ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}")
        return json.loads(line)

    def step(self, way: int) -> dict[str, Any]:
        """Let it train a step; return what `measured` does. Raises PeerFailed."""
        with suppress(BrokenPipeError):  # then it has ended, which is heard
            self._process.stdin.write(f"{way}\n")
            self._process.stdin.flush()
        result = self.hear()
        if "error" in result:
            raise PeerFailed(result["error"])
        return result


def peers(flags: argparse.Namespace) -> None:
    """Time training steps of everybody who is installed, in turns."""
    in_range("--rounds", flags.rounds)
    report = Report(flags)
    (cell,) = product_of([flags.graph], flags.tiles, [flags.scheduler], [flags.workers], flags.set)
    with named_scheduler(cell.scheduler_word, cell.workers) as scheduler, ExitStack() as running:
        prepared = prepare(cell.graph_word, scheduler.needs_shared_memory)
        sgemm = machine.sgemm_gflops(scheduler.workers, *SHAPE)
        report.line("taskgpt", f"products {described(prepared.m.products)}; BLAS's sgemm at {sgemm:.0f} GFLOP/s")
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="taskgpt-peers-")))
        start_of(prepared.m).save(folder)
        others = [other for name in LIBRARIES for other in installed(report, running, name, folder, scheduler.workers)]
        for path in folder.glob("*.npy"):  # half a gigabyte for GPT-2 124M, which nobody needs any more
            path.unlink()
        precision = "bfloat16" if prepared.m.products == OWN_BF16 else "float32"
        ours = Contestant("taskgpt", cell.scheduler_word, precision, our_step(scheduler, prepared), lambda: our_turn(scheduler, prepared))
        contestants = [ours, *(other for other in others if is_same_model(report, other, ours))]
        with Progress("measuring", flags.rounds * len(contestants)) as progress:
            for done, contestant in enumerate(contestants * flags.rounds):
                progress.show(done, f"round {done // len(contestants) + 1}/{flags.rounds}: {contestant.name}")
                take_turn(report, contestant, progress)
    table = rows(contestants, scheduler.workers, prepared.m.batch.rows)
    report.table("peers", COLUMNS, table, DETAILS)
    print()
    for precision in LOSS_TOLERANCE:
        if (row := fastest(table[1:], precision)) is not None:
            report.line(precision, f"the fastest other, {row['who']} ({row['setup']}), takes {row['x_ours']:.2f} x our time")
    report.save()


def our_step(scheduler: Scheduler, prepared: Prepared) -> float:
    scheduler.run(prepared.graphs[0])
    return float(prepared.m.s.loss.array[0])


def our_turn(scheduler: Scheduler, prepared: Prepared) -> dict[str, Any]:
    return measured(lambda: our_step(scheduler, prepared))


def start_of(m: GPT2) -> Start:
    """Return what our model holds, for everybody to start from."""
    parameters = {name: t.array[: m.model.vocabulary] if name == "wte" else t.array for name, t in m.p.tensors.items()}
    tokens, targets = (t.array.astype(np.int64).reshape(m.batch.batch_size, m.batch.seq_len) for t in (m.s.tokens, m.s.targets))
    return Start(m.model.heads, m.s.hyper.array[:5].tolist(), tokens, targets, parameters)


def installed(report: Report, running: ExitStack, library: str, folder: Path, workers: int) -> Iterator[Contestant]:
    """Start a library in each of its set-ups, and yield its ways to train; say what is missing or fails, in one line."""
    if importlib.util.find_spec(library) is None:
        report.line(library, f"not installed, and left out; pip install {library}")
        return
    for setup in setups(library, folder):
        key = f"{library} ({setup.name})"
        process = running.enter_context(PeerProcess(LIBRARIES[library], setup, folder, workers))
        try:
            about = process.hear()
            speeds = ", ".join(f"{precision} products at {rate:.0f}" for precision, rate in about["gflops"].items())
            report.line(key, "; ".join(filter(None, (about["version"], f"{speeds} GFLOP/s", setup.said, about["remark"]))))
            for precision in about["gflops"]:
                if not is_worthwhile(precision, about["gflops"]):
                    report.line(f"{key}, {precision}", "left out: its products are slower than float32's on this processor")
            yield from started(report, process, setup)
        except PeerFailed as error:
            report.line(key, f"left out: {error}")


def started(report: Report, process: PeerProcess, setup: Setup) -> Iterator[Contestant]:
    """Yield the ways to train that a process has started. Raises PeerFailed."""
    number = 0
    while (about := process.hear()) is not None:
        found = Contestant(about["name"], setup.name, about["precision"], about.get("first_loss"), partial(process.step, number))
        if "error" in about:
            report.line(found.name, f"left out: {about['error']}")
        else:
            print(f"{found.name}: first loss {found.first_loss:.6f}", file=sys.stderr)
            yield found
        number += 1


def is_same_model(report: Report, other: Contestant, ours: Contestant) -> bool:
    """Compare the first losses; say it in one line if they differ by more than rounding."""
    is_same = abs(other.first_loss - ours.first_loss) <= max(LOSS_TOLERANCE[each.precision] for each in (other, ours))
    if not is_same:
        report.line(other.name, f"left out: its first loss is {other.first_loss:.6f}, ours {ours.first_loss:.6f}: not the same model")
    return is_same


def take_turn(report: Report, contestant: Contestant, progress: Progress) -> None:
    """Let somebody train a step, unless they have failed; say it in one line when they do."""
    if contestant.has_failed:
        return
    try:
        contestant.run()
    except PeerFailed as error:
        contestant.has_failed = True
        with progress.aside():
            report.line(contestant.name, f"failed after {len(contestant.seconds)} steps: {error}")
    time.sleep(PAUSE_SECONDS)


def rows(contestants: list[Contestant], workers: int, tokens: int) -> list[dict]:
    """Return the table; ratios are of times, to ours, which come first."""
    table = []
    for each in contestants:
        q1, middle, q3 = (None,) * 3 if each.has_failed else quartiles(each.seconds)
        table.append(
            {
                "who": each.who,
                "setup": each.setup,
                "precision": each.precision,
                "threads": workers,
                "first_loss": each.first_loss,
                "median_ms": middle and middle * 1e3,
                "q1_ms": q1 and q1 * 1e3,
                "q3_ms": q3 and q3 * 1e3,
                "tokens_per_second": middle and tokens / middle,
                "x_ours": middle and (middle * 1e3 / table[0]["median_ms"] if table else 1.0),
                "peak_gib": max(each.peaks) / 2**30 if each.peaks else None,
                "seconds": each.seconds,
            }
        )
    return table


def fastest(table: list[dict], precision: str) -> dict | None:
    """Return the row of the shortest median in that precision, if there is one."""
    return min((row for row in table if row["precision"] == precision and row["median_ms"]), key=lambda row: row["median_ms"], default=None)
