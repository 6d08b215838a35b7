"""Training steps of graphs under schedulers, in turns, against what the machine needs for their matrix products alone."""

import argparse
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from taskgpt.lab import machine
from taskgpt.lab.contests.cells import Cell, product_of
from taskgpt.lab.named import Prepared, named_scheduler, prepare
from taskgpt.lab.report import Report, in_range, quartiles, seconds_of
from taskgpt.lab.roofline import Limits, Product, gemm_flops, products
from taskgpt.lab.traces.formats import folder_name, save, verify_can_save
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.products import BLAS
from taskgpt.progress import Progress
from taskgpt.schedulers import Scheduler

AGAIN = 3  # rounds more of limits that a step exceeds
COLUMNS = {
    "graph": ("graph", ""),
    "scheduler": ("scheduler", ""),
    "workers": ("workers", "d"),
    "tasks": ("tasks", "d"),
    "median ms": ("median_ms", ".1f"),
    "q1": ("q1_ms", ".1f"),
    "q3": ("q3_ms", ".1f"),
    "tok/s": ("tokens_per_second", ".0f"),
    "floor ms": ("floor_ms", ".1f"),
    "x floor": ("x_floor", ".2f"),
    "x first": ("x_first", ".2f"),
}
DETAILS = ("tasks", "floor ms")


@dataclass
class Contestant:
    """A graph under a scheduler, and its times."""

    prepared: Prepared
    cell: Cell
    scheduler: Scheduler
    seconds: list[float] = field(default_factory=list)

    def run(self, steps: int) -> None:
        self.seconds.append(seconds_of(lambda: self.prepared.run(self.scheduler, steps)) / steps)


def step(flags: argparse.Namespace) -> None:
    """Time training steps of every graph under every scheduler, in turns of a few steps."""
    in_range("--rounds", flags.rounds)
    in_range("--steps", flags.steps)
    report = Report(flags)
    cells = product_of(flags.graphs, flags.tiles, flags.schedulers, flags.workers or [None], flags.set)
    needs_shared = any(named_scheduler(cell.scheduler_word, cell.workers).needs_shared_memory for cell in cells)
    kept = {}
    if flags.trace is not None:
        verify_can_save(flags.trace)
        kept["record"] = RECORD
    with ExitStack() as stack:
        graphs = {word: prepare(word, needs_shared) for word in dict.fromkeys(cell.graph_word for cell in cells)}
        contestants = []
        for cell in cells:
            scheduler = named_scheduler(cell.scheduler_word, cell.workers, **kept)
            contestants.append(Contestant(graphs[cell.graph_word], cell, stack.enter_context(opened(scheduler, flags.trace))))
        teams = sorted({c.scheduler.workers for c in contestants})
        counts = {word: products(prepared.graphs[0]) for word, prepared in graphs.items()}
        limits = Limits()
        with Progress("measuring", (flags.rounds + 1) * len(contestants)) as progress:
            for round_number in range(flags.rounds + 1):
                limits.measure(sorted(set().union(*counts.values())), teams)
                for number, contestant in enumerate(contestants):
                    done = round_number * len(contestants) + number
                    progress.show(done, f"round {round_number}/{flags.rounds}: {contestant.cell}")
                    contestant.run(flags.steps)
                if round_number == 0:  # touches all memory for the first time
                    limits.clear()
                    for contestant in contestants:
                        contestant.seconds.clear()
        if flags.trace is not None:
            for c in contestants:
                number = f"-{c.cell.workers}" if len(flags.workers or []) > 1 else ""
                folder = folder_name(f"{c.prepared.name}-{c.cell.scheduler_word}{number}")
                about = {"command": f"taskgpt bench step, {flags.rounds + 1} rounds of {flags.steps}", "machine": machine.describe()}
                about["limits"] = machine.limits(c.scheduler.workers)
                print(f"trace      {save(c.scheduler.trace(about), Path(flags.trace) / folder)}")
        found = rows(contestants, counts, limits)
        for _ in range(AGAIN):
            if low := [row for row in found if row["multiplies"] == BLAS and row["x_floor"] < 1]:  # the machine was busier then
                limits.measure(sorted(set().union(*(counts[row["graph"]] for row in low))), sorted({row["workers"] for row in low}))
                found = rows(contestants, counts, limits)
    report.table("steps", COLUMNS, found, DETAILS)
    print()
    report.line("floor", "what BLAS's sgemm needs for the products alone, in float32; products of our own can be faster")
    if any(row["multiplies"] == BLAS and row["x_floor"] < 1 for row in found):
        report.line("doubt", "with BLAS below 1 x floor, a step was faster than sgemm in all rounds: this machine's speed varies too much")
    report.save()


def opened(scheduler: Scheduler, folder: str | None) -> Scheduler:
    """Return the scheduler, or one that keeps a trace."""
    return Traced(scheduler) if folder is not None else scheduler


def rows(contestants: list[Contestant], counts: dict[str, Counter[Product]], limits: Limits) -> list[dict]:
    """Return the table; ratios are of medians, to the floor and to the first scheduler of the same graph. counts: of each graph."""
    found = []
    first: dict[str, float] = {}
    for c in contestants:
        name, workers = c.prepared.name, c.scheduler.workers
        q1, median, q3 = quartiles(c.seconds)
        floor = limits.gemm_seconds(counts[name], workers)
        found.append(
            {
                "graph": name,
                "scheduler": c.cell.scheduler_word,
                "workers": workers,
                "multiplies": c.prepared.m.products,
                "tasks": len(c.prepared.graphs[0].tasks),
                "median_ms": median * 1e3,
                "q1_ms": q1 * 1e3,
                "q3_ms": q3 * 1e3,
                "tokens_per_second": c.prepared.m.batch.rows / median,
                "floor_ms": floor * 1e3,
                "x_floor": median / floor,
                "x_first": median / first.setdefault(name, median),
                "gemm_gflop": gemm_flops(counts[name]) / 1e9,
                "seconds": c.seconds,
            }
        )
    return found
