"""Measure steps, honestly: all contestants in one process, in turns, against this machine's own limits.

    python -m taskgpt.bench step --graphs tiny
    python -m taskgpt.bench step --graphs gpt2-124m gpt2-124m:tiles.rows=128 --schedulers sequential loops threads --workers 2
    python -m taskgpt.bench step --schedulers loops loops:chunks=dynamic loops-llmc --rounds 10 --json result.json

Every round runs one step of every graph x scheduler, and sgemm alone; the table shows medians over the rounds, the spread from the first to
the third quartile, and ratios of medians. `floor` is what sgemm alone would need for the step's matrix products on as many threads.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from taskgpt.config import GraphConfig, load_graph, load_scheduler, parse_graph_settings, parse_settings
from taskgpt.errors import UserError, run_program
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine
from taskgpt.schedulers import Scheduler, WorkerError, open_scheduler
from taskgpt.tasks import AccessError, Graph, TaskError, compile_kernels

GEMM_SECONDS = 0.3  # of sgemm in each round


@dataclass
class Contestant:
    """A graph under a scheduler, and its times."""

    graph_name: str
    scheduler_name: str
    m: GPT2
    graph: Graph
    scheduler: Scheduler
    seconds: list[float] = field(default_factory=list)

    def run(self) -> float:
        start = time.perf_counter()
        self.scheduler.run(self.graph)
        return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    title, _, examples = __doc__.partition("\n\n")
    p = argparse.ArgumentParser("taskgpt bench", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, metavar="VERB")
    step = verbs.add_parser("step", help="time training steps", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    step.add_argument("--graphs", nargs="+", default=["gpt2-124m"], metavar="NAME[:KEY=VALUE,...]", help="graph files, with changes")
    step.add_argument("--schedulers", nargs="+", default=["sequential", "loops", "threads"], metavar="NAME[:KEY=VALUE,...]")
    step.add_argument("--workers", type=int, metavar="N", help="workers of every scheduler but those set to one (default: each one's own)")
    step.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds after one to warm up (default 7)")
    step.add_argument("--json", metavar="FILE", help="write every time measured")
    flags = p.parse_args(argv)
    return run_program("taskgpt.bench", lambda: bench_steps(flags), (TaskError, AccessError, WorkerError))


def bench_steps(flags: argparse.Namespace) -> int:
    """Time a training step of every graph under every scheduler, in turns."""
    if flags.rounds < 1:
        raise UserError(f"--rounds: wanted at least 1, got {flags.rounds}")
    if flags.json is not None:
        open(flags.json, "ab").close()  # now rather than after all rounds
    with ExitStack() as stack:
        contestants = [enter(stack, flags, *pair) for pair in itertools.product(prepare_graphs(flags), flags.schedulers)]
        threads = sorted({1, *(c.scheduler.workers for c in contestants)})
        gflops: dict[int, list[float]] = {n: [] for n in threads}
        for round_number in range(flags.rounds + 1):
            for n in threads:
                gflops[n].append(machine.sgemm_gflops(n, seconds=GEMM_SECONDS))
            for contestant in contestants:
                contestant.seconds.append(contestant.run())
            if round_number == 0:  # touches all memory for the first time
                for times in (*gflops.values(), *(c.seconds for c in contestants)):
                    times.clear()
            print(f"round {round_number} of {flags.rounds}", file=sys.stderr)
    sgemm = {n: statistics.median(values) for n, values in gflops.items()}
    print_table(contestants, sgemm)
    if flags.json is not None:
        write_json(flags, contestants, gflops)
    return 0


def prepare_graphs(flags: argparse.Namespace) -> list[tuple[str, GPT2, Graph]]:
    """Return name, memory and graph of each graph asked for, filled with random parameters and tokens."""
    needs_shared = any(open_scheduler_named(name, flags.workers).needs_shared_memory for name in flags.schedulers)
    prepared = []
    for word in flags.graphs:
        name, changes = split_changes(word)
        config: GraphConfig = load_graph(name, parse_graph_settings(changes))
        m = GPT2(config.model, config.batch, config.tiles, config.options, shared=needs_shared)
        m.initialize(seed=42)
        m.set_hyper(0, lr=1e-4, weight_decay=0.0)
        for tensor in (m.s.tokens, m.s.targets):
            tensor.array[:] = np.random.default_rng(1).integers(0, config.model.vocabulary, m.batch.rows)
        graph = training_graph(m)
        compile_kernels(graph.kernels)
        prepared.append((word, m, graph))
    return prepared


def enter(stack: ExitStack, flags: argparse.Namespace, prepared: tuple[str, GPT2, Graph], scheduler_name: str) -> Contestant:
    name, m, graph = prepared
    scheduler = stack.enter_context(open_scheduler_named(scheduler_name, flags.workers))
    return Contestant(name, scheduler_name, m, graph, scheduler)


def open_scheduler_named(word: str, workers: int | None) -> Scheduler:
    """Open `NAME[:KEY=VALUE,...]`, with so many workers unless it has one by its configuration."""
    name, changes = split_changes(word)
    overrides = parse_settings(changes)[1]
    config = load_scheduler(name, overrides)
    if workers is not None and config.settings.workers != 1:
        config = load_scheduler(name, {"workers": workers, **overrides})
    return open_scheduler(config.scheduler, config.settings)


def split_changes(word: str) -> tuple[str, list[str]]:
    name, _, changes = word.partition(":")
    return name, [change for change in changes.split(",") if change]


def print_table(contestants: list[Contestant], sgemm: dict[int, float]) -> None:
    """Print machine, limits and the table; ratios are to the floor and to the first scheduler of the same graph."""
    for key, value in machine.describe().items():
        print(f"{key:10} {value}")
    print("sgemm      " + ", ".join(f"{gflops:.0f} GFLOP/s on {n} thread{'s' if n > 1 else ''}" for n, gflops in sgemm.items()))
    width = max(len(c.graph_name) for c in contestants)
    other = max(len(c.scheduler_name) for c in contestants)
    print(f"\n{'graph':{width}}  {'scheduler':{other}}  workers  tasks  median ms     q1     q3    tok/s   floor ms  x floor  x first")
    first: dict[str, float] = {}
    for c in contestants:
        median = statistics.median(c.seconds)
        q1, _, q3 = statistics.quantiles(c.seconds, n=4, method="inclusive") if len(c.seconds) > 1 else [median] * 3
        floor = gemm_flops(c.graph) / sgemm[c.scheduler.workers] / 1e9
        ratio = median / first.setdefault(c.graph_name, median)
        print(
            f"{c.graph_name:{width}}  {c.scheduler_name:{other}}  {c.scheduler.workers:7}  {len(c.graph.tasks):5}  {median * 1e3:9.1f} "
            f"{q1 * 1e3:6.0f} {q3 * 1e3:6.0f}  {c.m.batch.rows / median:7.0f}  {floor * 1e3:9.1f}  {median / floor:7.2f}  {ratio:7.2f}"
        )


def gemm_flops(graph: Graph) -> int:
    """Return the operations of a graph that are matrix products."""
    return sum(task.flops for task in graph.tasks if all("gemm" in call.kernel.tags for call in task.calls))


def write_json(flags: argparse.Namespace, contestants: list[Contestant], gflops: dict[int, list[float]]) -> None:
    record = {
        "machine": machine.describe(),
        "sgemm_gflops": gflops,
        "steps": [
            {
                "graph": c.graph_name,
                "scheduler": c.scheduler_name,
                "workers": c.scheduler.workers,
                "tasks": len(c.graph.tasks),
                "gemm_gflop": gemm_flops(c.graph) / 1e9,
                "tokens": c.m.batch.rows,
                "seconds": c.seconds,
            }
            for c in contestants
        ],
    }
    with open(flags.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
