"""The process of one library in one set-up: trains a step whenever it is told to, and says how long that took.

    python -m taskgpt.lab.benchmarks.peer_process taskgpt.lab.benchmarks.peer_torch FOLDER WORKERS

It says, a line of JSON each: what the library is and how fast it multiplies; every way to train, with its first loss, or why it cannot
start; null when all have started. Then it reads numbers of ways, a line each, and answers each with seconds of a step and peak of memory.
It ends with its standard input. A process of its own, as allocators, MKL and XLA take their settings from the environment at its start.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SHAPE = (256, 3072, 768)  # M, N, K of the product by which libraries are compared: their products explain much of their steps


@dataclass
class Start:
    """What everybody starts from: parameters under our names, wte without its padding, which is no part of the model; and a batch."""

    heads: int
    hyper: list[float]  # lr, beta1, beta2, eps, weight decay
    tokens: np.ndarray  # (B, T), int64; so are the targets
    targets: np.ndarray
    parameters: dict[str, np.ndarray]

    def save(self, folder: Path) -> None:
        """Write it to an empty folder. Raises OSError."""
        for name, array in {**self.parameters, "tokens": self.tokens, "targets": self.targets}.items():
            np.save(folder / f"{name}.npy", array)
        (folder / "start.json").write_text(json.dumps([self.heads, self.hyper]))

    @classmethod
    def load(cls, folder: Path) -> "Start":
        """Return what was saved; the arrays are mapped, so that they take no memory of those who copy them."""
        heads, hyper = json.loads((folder / "start.json").read_text())
        arrays = {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}
        return cls(heads, hyper, arrays.pop("tokens"), arrays.pop("targets"), arrays)


@dataclass
class Peer:
    """A way to train: `reset()` takes the parameters of the start, `step()` trains one step and returns its loss."""

    name: str
    precision: str  # of products: float32 or bfloat16
    reset: Callable[[], None]
    step: Callable[[], float]


def main(name: str, folder: str, workers: str) -> None:
    """Do what the docstring above says. `name` is that of a module as `taskgpt.lab.benchmarks.peers.LIBRARIES` has."""
    say = mouth()
    module = importlib.import_module(name)
    module.prepare(int(workers))
    rates = {precision: gflops(module.multiply, precision) for precision in ("float32", "bfloat16")}
    say({"version": module.VERSION, "remark": module.remark(), "gflops": rates})
    steps = []
    for peer in module.peers(Start.load(Path(folder)), [precision for precision in rates if is_worthwhile(precision, rates)]):
        about = {"name": peer.name, "precision": peer.precision}
        try:
            peer.reset()
            about["first_loss"] = peer.step()
        except Exception as error:  # whatever a library raises that lacks a compiler, say
            about["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        steps.append(peer.step)
        say(about)
    del peer  # the last that holds the start
    say(None)
    for line in sys.stdin:
        try:
            say(measured(steps[int(line)]))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def mouth() -> Callable[[Any], None]:
    """Return what writes a line of JSON to standard output; whatever else this process prints now goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=out, flush=True)


def is_worthwhile(precision: str, rates: dict[str, float]) -> bool:
    """Say whether products in this precision are at least as fast as in float32: bfloat16's need instructions of their own."""
    return rates[precision] >= rates["float32"]


def gflops(multiply: Callable[[np.ndarray, np.ndarray, str], Callable[[], object]], precision: str) -> float:
    """Return the speed of a library's a @ weight.T: the median of some."""
    M, N, K = SHAPE
    run = multiply(np.ones((M, K), np.float32), np.ones((N, K), np.float32), precision)
    run()  # compiles
    return 2 * M * N * K / median(measured(run)["seconds"] for _ in range(30)) / 1e9


def measured(run: Callable[[], object]) -> dict[str, float | None]:
    """Return the seconds that `run()` took, and the most bytes of memory that this process had meanwhile (Linux; elsewhere None)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}


def peak_bytes() -> int | None:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
