"""Run the examples: `python -m examples cholesky heat --scheduler native --workers 2`; all of them without names."""

import argparse
import importlib
import time
from pathlib import Path

import numpy as np

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import Graph, compile_kernels

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> None:
    """Run each program, and say how long that took and how far its result is from NumPy's."""
    parser = argparse.ArgumentParser(prog="python -m examples", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {' '.join(NAMES)}")
    parser.add_argument("--scheduler", default="native", help="sequential, loops, threads, native or a set-up (default: native)")
    parser.add_argument("--workers", type=int, default=0, help="how many workers (default: as many as there are cores)")
    flags = parser.parse_args()
    wrong = [name for name in flags.names if name not in NAMES]
    if wrong:
        parser.error(f"no example is called {wrong[0]}; there are {' '.join(NAMES)}")
    workers = {} if flags.scheduler == "sequential" else {"workers": flags.workers}
    setup = load_scheduler(flags.scheduler, workers)
    with open_scheduler(setup.scheduler, setup.settings) as scheduler:
        for name in flags.names or NAMES:
            problem = importlib.import_module(f"examples.{name}").Problem()
            graph = Graph(name)
            problem.program(graph.spawn)
            compile_kernels(graph.kernels)
            for _ in range(2):  # the first run prepares the graph
                problem.begin()
                begin = time.perf_counter()
                if hasattr(problem, "run"):
                    problem.run(lambda graph=graph: scheduler.run(graph))
                else:
                    scheduler.run(graph)
                seconds = time.perf_counter() - begin
            error = np.abs(problem.result().astype(float) - problem.wanted()).max()
            print(f"{name:<20} {len(graph.tasks):>5} tasks {1e3 * seconds:9.2f} ms   largest error {error:.1e}")


if __name__ == "__main__":
    main()
