"""Run small programs of tasks, and compare their results with NumPy's.

python -m examples                                                    # all of them
python -m examples cholesky heat --scheduler loops --workers 2        # two of them, as loops with barriers
"""

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from taskgpt.errors import UserError, did_you_mean, run_program
from taskgpt.lab.named import named_scheduler
from taskgpt.programs.arguments import Parser, add_scheduler, add_workers
from taskgpt.tasks import Graph, compile_kernels

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = Parser("python -m examples", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)} (default: all)")
    add_scheduler(parser, "native")
    add_workers(parser, "default: what the set-up says")
    return run_program("python -m examples", lambda: run(parser.parse_args(argv)))


def run(flags: argparse.Namespace) -> int:
    """Run each program twice, the first time to prepare; say how long the second took, and how far its result is from NumPy's."""
    for name in flags.names:
        if name not in NAMES:
            raise UserError(f"no example is called '{name}'{did_you_mean(name, NAMES)}")
    with named_scheduler(flags.scheduler, flags.workers) as scheduler:
        if scheduler.needs_shared_memory:
            raise UserError(
                f"--scheduler {flags.scheduler}: the examples' arrays are in the memory of one process; choose threads or native"
            )
        for name in flags.names or NAMES:
            problem = importlib.import_module(f"examples.{name}").Problem()
            graph = Graph(name)
            problem.program(graph.spawn)
            compile_kernels(graph.kernels)
            for _ in range(2):
                problem.begin()
                begin = time.perf_counter()
                if hasattr(problem, "run"):
                    problem.run(lambda graph=graph: scheduler.run(graph))
                else:
                    scheduler.run(graph)
                seconds = time.perf_counter() - begin
            error = np.abs(problem.result().astype(float) - problem.wanted()).max()
            print(f"{name:<20} {len(graph.tasks):>4} tasks {1e3 * seconds:9.2f} ms   largest error {error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
