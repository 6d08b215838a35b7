"""Measure, honestly: all contestants in one process, in turns, against this machine's own limits.

    taskgpt bench step --graphs tiny
    taskgpt bench step --graphs gpt2-124m gpt2-124m:tiles.rows=128 --schedulers sequential loops native --workers 2
    taskgpt bench step --schedulers loops loops:chunks=dynamic loops-llmc --rounds 10 --json result.json
    taskgpt bench step --schedulers loops native --rounds 2 --trace runs/bench       # for Perfetto, Paraver, ovni and `trace`
    taskgpt bench roofline --graphs gpt2-124m              # sgemm at the graph's own shapes, memory bandwidth, the floor
    taskgpt bench products --graphs gpt2-124m              # our own products against BLAS at these shapes, in fp32 and bf16
    taskgpt bench overhead --systems native dask.threaded  # empty tasks: microseconds a task
    taskgpt bench record --tasks 10000 1000000             # recording graphs: microseconds and bytes a task
    taskgpt bench metg --patterns stencil_1d fft           # the shortest tasks that still use half of the machine
    taskgpt bench contention --workers 2,16,64,128         # what workers cost each other: counted, on simulated cores
    taskgpt bench decode --graph gpt2-124m                 # a generated token, against streaming the weights
    taskgpt bench programs --workers 2                     # Cholesky, heat, fib, N queens against C with OpenMP's tasks
    taskgpt bench peers --graph gpt2-124m                  # PyTorch and JAX train the same model

Tables show medians over the rounds, the spread from the first to the third quartile (q1, q3), and ratios of medians; `--json FILE` keeps
every value.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

from taskgpt.errors import run_program
from taskgpt.lab import roofline
from taskgpt.lab.benchmarks import contention, decode, patterns, peers, products, programs, recording, steps, task_bench
from taskgpt.lab.benchmarks.task_programs import PROGRAMS
from taskgpt.programs.arguments import (
    Parser,
    add_changes,
    add_graph,
    add_graphs,
    add_names,
    add_scheduler,
    add_schedulers,
    add_wide,
    add_workers,
)
from taskgpt.schedulers import WorkerError
from taskgpt.tasks import AccessError, TaskError, TwinError

SCHEDULERS = ["sequential", "loops", "threads", "native"]
NUMBERS_OF_WORKERS = {"roofline": "default 1, 2, 4, ... all cores", "contention": "default 2, 16, 64, 128"}
METG_PATTERNS = ["trivial", "stencil_1d", "fft", "nearest", "random", "tree"]  # the chains of `overhead` say nothing more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""

    def run() -> int:
        flags = parser().parse_args(argv)
        flags.run(flags)
        return 0

    return run_program("taskgpt bench", run, (TaskError, TwinError, AccessError, WorkerError))


def parser() -> argparse.ArgumentParser:
    """Return the parser: a verb each, with the flags that it shares with others under the same names."""
    p = Parser("taskgpt bench", __doc__)
    verbs = p.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run: Callable[[argparse.Namespace], None], rounds: int | None, help: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=help, doc=f"{help}\n\n{p.examples(name)}")
        verb.set_defaults(run=run, verb=name)
        if rounds is not None:  # else it is the same every time
            verb.add_argument(
                "--rounds", type=int, default=rounds, metavar="N", help=f"rounds of all contestants in turns (default {rounds})"
            )
        if name != "record":
            told = NUMBERS_OF_WORKERS.get(name, "default: each one's own, or all cores")
            add_workers(verb, told, name in ("step", *NUMBERS_OF_WORKERS))
        verb.add_argument("--json", metavar="FILE", help="write every value measured")
        add_wide(verb)
        return verb

    step = add("step", steps.step, 7, "steps of graphs under schedulers, against this machine's sgemm")
    add_graphs(step, ["gpt2-124m"])
    add_schedulers(step, SCHEDULERS)
    add_changes(step, several=True)
    step.add_argument(
        "--trace", metavar="DIR", help="also write what each worker did when, a folder for each contestant; costs each 1 to 2 %%"
    )
    step.add_argument("--steps", type=int, default=3, metavar="N", help="steps in a turn, which may overlap as in training (default 3)")

    limits = add("roofline", roofline.roofline, 7, "sgemm, memory bandwidth, and the floor of a step")
    add_graphs(limits, ["gpt2-124m"])
    add_changes(limits, several=True, has_scheduler=False)

    shapes = add("products", products.products, 7, "matrix products of our own against BLAS, at the shapes of graphs")
    add_graphs(shapes, ["gpt2-124m"])
    add_changes(shapes, several=True, has_scheduler=False)

    empty = add("overhead", task_bench.overhead, 7, "empty tasks: microseconds a task")
    add_task_bench(empty, ["trivial", "chains", "stencil_1d"])
    recorded = add("record", recording.record, 3, "recording graphs: microseconds and bytes a task; nothing runs")
    add_names(recorded, "program", list(recording.PROGRAMS), f"{' or '.join(recording.PROGRAMS)}, and graph files, or paths")
    add_names(recorded, "task", ["10000", "100000"], "about how many tasks those two have, several sizes", "")
    metg = add("metg", task_bench.metg, 3, "the shortest tasks that use half of the machine")
    add_task_bench(metg, METG_PATTERNS)
    metg.add_argument("--efficiency", type=float, default=0.5, metavar="E", help="part of the peak, above 0 and below 1 (default 0.5)")

    shared = add("contention", contention.contention, None, "many workers, simulated: atomic operations, locks and wake-ups a task")
    add_names(shared, "system", ["native"], "set-ups of native, or paths")
    add_names(shared, "pattern", ["stencil_1d", "fork_join"], f"of {', '.join(patterns.PATTERNS)} ", "")
    shared.add_argument("--width", type=int, metavar="N", help="tasks in a row of the graph (default: as many as workers)")
    shared.add_argument("--steps", type=int, default=20, metavar="N", help="rows (default 20)")
    shared.add_argument("--task-us", type=float, default=contention.TASK_US, metavar="US", help="a task's length (default %(default)s)")
    shared.add_argument("--machine", default="2x56", metavar="NAME", help="here, 2x56, or a path of a .toml file (default 2x56)")

    tokens = add("decode", decode.decode, 7, "a generated token, against streaming the weights from memory")
    add_graph(tokens, "gpt2-124m")
    add_scheduler(tokens, "native")
    tokens.add_argument("--batch-size", type=int, default=1, metavar="B", help="texts that are decoded together (default 1)")
    tokens.add_argument(
        "--context", type=int, metavar="N", help="tokens before the first that is decoded (default 64, or half of the positions)"
    )
    tokens.add_argument("--tokens", type=int, metavar="N", help="tokens decoded in a turn (default 64, or what is left)")

    whole = add("programs", programs.programs, 7, "task programs against the same in C with OpenMP's tasks, where gcc is")
    named = " ".join(f"{each.name} ({', '.join(key.name for key in dataclasses.fields(each))})" for each in PROGRAMS.values())
    add_names(whole, "program", programs.DEFAULTS, f"of {named}")
    add_scheduler(whole, "native")

    others = add("peers", peers.peers, 7, "PyTorch and JAX, where installed, train the same model")
    add_graph(others, "gpt2-124m")
    add_scheduler(others, "native")
    add_changes(others)
    return p


def add_task_bench(verb: argparse.ArgumentParser, chosen: list[str]) -> None:
    """Add what the verbs on Task Bench's graphs share."""
    add_names(
        verb,
        "system",
        task_bench.SYSTEMS,
        "Dask's, and scheduler files, or paths; +program or +nested behind one spawns",
    )
    add_names(verb, "pattern", chosen, f"of {', '.join(patterns.PATTERNS)} ", "")
    verb.add_argument("--width", type=int, metavar="N", help="tasks in a row of the graph (default: as many as workers)")
    verb.add_argument("--steps", type=int, default=1000, metavar="N", help="rows; a twentieth of it for clusters (default 1000)")


if __name__ == "__main__":
    sys.exit(main())
