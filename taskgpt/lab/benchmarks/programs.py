"""Whole task programs against the same tasks in C with OpenMP, in turns, on the same memory with the same BLAS.

Each row is one way to run a program. `graph, once`: its tasks are recorded, and run, and the time is of both. `graph, again`: it was
recorded before. `program`: its tasks start as they are spawned, by Python. `nested`: by compiled code. `OpenMP`: gcc's, which creates its
tasks each time. Before anything is timed, all have run once and their results are verified.
"""

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from taskgpt.config import MOST_TASKS
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.files import fill
from taskgpt.lab import machine
from taskgpt.lab.benchmarks.openmp import COMPILER, FLAGS, NotBuilt, OpenMP
from taskgpt.lab.benchmarks.task_programs import PROGRAMS, Loop, Recursion
from taskgpt.lab.named import named_scheduler, split_changes
from taskgpt.lab.report import Report, compile_with_progress, in_range, quartiles
from taskgpt.products import BLAS, verify_callers
from taskgpt.progress import Progress
from taskgpt.schedulers import Scheduler
from taskgpt.tasks import Graph, one_blas_thread

DEFAULTS = ["cholesky:tile=128", "cholesky:tile=64", "heat", "fib", "queens"]
OPENMP = "OpenMP"
PAUSE_SECONDS = 0.02  # before every turn: OpenMP's threads spin for a while, waiting for more work
COLUMNS = {
    "program": ("program", ""),
    "as": ("way", ""),
    "tasks": ("tasks", ",d"),
    "workers": ("workers", "d"),
    "ms": ("median_ms", ".1f"),
    "q1": ("q1_ms", ".1f"),
    "q3": ("q3_ms", ".1f"),
    "x OpenMP": ("x_openmp", ".2f"),
}
DETAILS = ("workers",)


@dataclass
class Case:
    """One way to run one program, and what its turns took."""

    program: Any  # of PROGRAMS
    way: str
    workers: int
    opened: Loop | Recursion
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def programs(flags: argparse.Namespace) -> None:
    """Run the programs in every way, in turns; print the table."""
    in_range("--rounds", flags.rounds)
    chosen = list(dict.fromkeys(map(program_of, flags.programs)))
    report = Report(flags)
    with named_scheduler(flags.scheduler, flags.workers, coarsen=0, dashboard=-1) as scheduler, one_blas_thread:
        verify_callers(BLAS, scheduler.workers)
        report.line("scheduler", scheduler.describe())
        try:
            openmp = OpenMP(scheduler.workers)
            report.line(OPENMP, f"{COMPILER} {' '.join(FLAGS)}, {openmp.threads} threads, with the BLAS of SciPy, as here")
        except NotBuilt as error:
            openmp = None
            report.line(OPENMP, f"left out: {error}")
        if said := compile_with_progress([kernel for program in chosen for kernel in program.kernels]):
            report.line("compiled", said)
        can_spawn = runs_programs(scheduler, report)
        rows = []
        for program in chosen:  # one at a time, for the memory
            cases = cases_of(program, scheduler, can_spawn, openmp)
            if cases:
                measure(cases, flags.rounds)
                rows += rows_of(cases)
    report.table("programs", COLUMNS, rows, DETAILS)
    report.save()


def program_of(word: str, flag: str = "--programs", known: Mapping[str, type] = PROGRAMS) -> Any:
    """Return the program of `NAME[:KEY=VALUE,...]`. Raises UserError."""
    name, changes = split_changes(word)
    if name not in known:
        raise UserError(f"{flag}: unknown program '{shorten(name)}'{did_you_mean(name, known)}")
    sizes = {}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            sizes[key.strip()] = int(value)
        except ValueError:
            raise UserError(f"{flag} {shorten(word)}: wanted {shorten(key)}=NUMBER, for example {flag} cholesky:tile=64") from None
    program = fill(known[name], sizes, f"{flag} {name}: ")
    if program.tasks > MOST_TASKS:
        raise UserError(f"{flag} {word}: {program.tasks:,} tasks, wanted at most {MOST_TASKS:,}; choose coarser ones")
    needed, free = program.nbytes, machine.free_memory_bytes()
    if needed > free:
        raise UserError(f"{flag} {word}: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; choose a smaller n")
    return program


def runs_programs(scheduler: Scheduler, report: Report) -> bool:
    """Return True if the scheduler runs programs whose tasks spawn tasks; else say why not."""
    try:
        with scheduler.program():
            return True
    except NotImplementedError as error:
        report.line("programs", f"left out: {error}")
        return False


def cases_of(program: Any, scheduler: Scheduler, can_spawn: bool, openmp: OpenMP | None) -> list[Case]:
    """Return the ways to run a program here, OpenMP's last."""
    opened = program.opened(scheduler.needs_shared_memory)
    ways: list[tuple[str, Callable[[], object]]] = []
    if isinstance(opened, Loop):
        kept = Graph(program.name)
        opened.program(kept.spawn)
        ways += [("graph, once", partial(record_and_run, scheduler, opened)), ("graph, again", partial(scheduler.run, kept))]
    if can_spawn and isinstance(opened, Loop):
        ways.append(("program", partial(run_program, scheduler, opened.program)))
    if can_spawn:
        ways.append(("nested", partial(run_root, scheduler, opened.root)))
    if openmp and ways:
        ways.append((OPENMP, partial(opened.in_c, openmp)))
    return [Case(program, way, scheduler.workers, opened, run) for way, run in ways]


def record_and_run(scheduler: Scheduler, loop: Loop) -> None:
    graph = Graph("once")
    loop.program(graph.spawn)
    scheduler.run(graph)


def run_program(scheduler: Scheduler, program: Callable[[Callable], None]) -> None:
    """Run a program whose tasks Python spawns."""
    with scheduler.program() as spawn:
        program(spawn)


def run_root(scheduler: Scheduler, root: tuple[Any, ...]) -> object:
    """Run a program of one task that spawns others; return what it returned."""
    with scheduler.program() as spawn:
        return spawn(*root).result()


def measure(cases: list[Case], rounds: int) -> None:
    """Run the cases in turns, once more than there are rounds: the first time is not kept. Raises UserError for a wrong result."""
    gc.collect()
    gc.freeze()  # the graph that is kept for other turns is no work of this turn's garbage collector
    try:
        with Progress("measuring", (rounds + 1) * len(cases)) as progress:
            for number in range(rounds + 1):
                for at, case in enumerate(cases):
                    told = f"round {number}/{rounds}" if number else "verifying"
                    progress.show(number * len(cases) + at, f"{told}: {case.program.name}, {case.way}")
                    seconds = turn(case)
                    if number:
                        case.seconds.append(seconds)
    finally:
        gc.unfreeze()


def turn(case: Case) -> float:
    """Run a case; return its seconds. Raises UserError for a wrong result."""
    case.opened.begin()
    gc.collect()
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    found = case.run()
    seconds = time.perf_counter() - start
    if wrong := case.opened.wrong(found):
        raise UserError(f"{case.program}, {case.way}: wrong result: {wrong}; its times would say nothing")
    return seconds


def rows_of(cases: list[Case]) -> list[dict[str, Any]]:
    """Return rows of the table; ratios are of medians, None without OpenMP."""
    rows = []
    theirs = next((quartiles(case.seconds)[1] for case in cases if case.way == OPENMP), None)
    for case in cases:
        q1, median, q3 = quartiles(case.seconds)
        rows.append(
            {
                "program": str(case.program),
                "way": case.way,
                "tasks": case.program.tasks,
                "workers": case.workers,
                "median_ms": median * 1e3,
                "q1_ms": q1 * 1e3,
                "q3_ms": q3 * 1e3,
                "x_openmp": theirs and median / theirs,
                "seconds": case.seconds,
            }
        )
    return rows
