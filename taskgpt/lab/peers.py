"""PyTorch and JAX train the same model from the same parameters on the same tokens, in turns with us in one process."""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from taskgpt.gpt2.model import GPT2
from taskgpt.lab import machine
from taskgpt.lab.named import Prepared, named_scheduler, prepare
from taskgpt.lab.report import Report, in_range, quartiles, seconds_of
from taskgpt.schedulers import Scheduler

# Each has a file peer_NAME.py with two functions: peers(m, workers) yields its ways to train, multiply(a, weight, workers) is its product.
LIBRARIES = ("torch", "jax")
SHAPE = (256, 3072, 768)  # M, N, K of the product by which libraries are compared: their sgemm explains much of their steps
PAUSE_SECONDS = 0.3  # after every turn: threads of one library may spin for a while, waiting for more work
LOSS_TOLERANCE = 1e-4  # between first losses in float32
COLUMNS = {
    "who": ("who", ""),
    "threads": ("threads", "d"),
    "first loss": ("first_loss", ".6f"),
    "median ms": ("median_ms", ".1f"),
    "q1": ("q1_ms", ".1f"),
    "q3": ("q3_ms", ".1f"),
    "tok/s": ("tokens_per_second", ".0f"),
    "x ours": ("x_ours", ".2f"),
}


@dataclass
class Peer:
    """Somebody who trains: `reset()` takes the parameters of our model, `step()` trains one step and returns its loss."""

    name: str
    reset: Callable[[], None]
    step: Callable[[], float]
    is_float32: bool = True
    first_loss: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        self.seconds.append(seconds_of(self.step))


def peers(flags: argparse.Namespace) -> None:
    """Time training steps of everybody who is installed, in turns."""
    in_range("--rounds", flags.rounds)
    report = Report(flags)
    with named_scheduler(flags.scheduler, flags.workers) as scheduler:
        prepared = prepare(flags.graph, scheduler.needs_shared_memory)
        # The others go first, as our step changes the parameters that they start from.
        report.line("taskgpt", f"sgemm at {machine.sgemm_gflops(scheduler.workers, *SHAPE):.0f} GFLOP/s")
        others = [peer for peer in installed(report, prepared.m, scheduler.workers) if starts(report, peer)]
        ours = Peer(f"taskgpt {flags.scheduler}", lambda: None, lambda: our_step(scheduler, prepared))
        ours.first_loss = ours.step()
        contestants = [ours, *(peer for peer in others if is_same_model(report, peer, ours))]
        for round_number in range(1, flags.rounds + 1):
            for peer in contestants:
                peer.run()
                time.sleep(PAUSE_SECONDS)
            print(f"round {round_number} of {flags.rounds}", file=sys.stderr)
    report.table("peers", COLUMNS, rows(contestants, scheduler.workers, prepared.m.batch.rows))
    report.save()


def our_step(scheduler: Scheduler, prepared: Prepared) -> float:
    scheduler.run(prepared.graphs[0])
    return float(prepared.m.s.loss.array[0])


def installed(report: Report, m: GPT2, workers: int) -> Iterator[Peer]:
    """Yield the peers of the libraries that are here; say which are not."""
    for name in LIBRARIES:
        try:
            library = importlib.import_module(name)
        except ImportError:
            report.line(name, f"not installed, and left out; pip install {name}")
            continue
        module = importlib.import_module(f"taskgpt.lab.peer_{name}")
        report.line(name, f"{library.__version__}, sgemm at {gflops(module.multiply, workers):.0f} GFLOP/s")
        yield from module.peers(m, workers)


def gflops(multiply: Callable[[np.ndarray, np.ndarray, int], Callable[[], object]], workers: int) -> float:
    """Return the speed of a library's a @ weight.T, float32, on so many threads: the median of some."""
    M, N, K = SHAPE
    run = multiply(np.ones((M, K), np.float32), np.ones((N, K), np.float32), workers)
    run()  # compiles
    return 2 * M * N * K / median(seconds_of(run) for _ in range(30)) / 1e9


def starts(report: Report, peer: Peer) -> bool:
    """Run the first step, which compiles; say it in one line if that fails."""
    try:
        peer.reset()
        peer.first_loss = peer.step()
    except Exception as error:  # whatever a library raises that lacks a compiler, say
        reason = (str(error).strip().splitlines() or [""])[0]
        report.line(peer.name, f"left out: {type(error).__name__}: {reason}")
        return False
    print(f"{peer.name}: first loss {peer.first_loss:.6f}", file=sys.stderr)
    return True


def is_same_model(report: Report, peer: Peer, ours: Peer) -> bool:
    """Compare the first losses; say it in one line if they differ by more than rounding."""
    is_same = not peer.is_float32 or abs(peer.first_loss - ours.first_loss) <= LOSS_TOLERANCE
    if not is_same:
        report.line(peer.name, f"left out: its first loss is {peer.first_loss:.6f}, ours {ours.first_loss:.6f}: not the same model")
    return is_same


def rows(contestants: list[Peer], workers: int, tokens: int) -> list[dict]:
    """Return the table; ratios are of times, to ours, which come first."""
    table = []
    for peer in contestants:
        q1, middle, q3 = quartiles(peer.seconds)
        table.append(
            {
                "who": peer.name,
                "threads": workers,
                "first_loss": peer.first_loss,
                "median_ms": middle * 1e3,
                "q1_ms": q1 * 1e3,
                "q3_ms": q3 * 1e3,
                "tokens_per_second": tokens / middle,
                "x_ours": middle * 1e3 / table[0]["median_ms"] if table else 1.0,
                "seconds": peer.seconds,
            }
        )
    return table
