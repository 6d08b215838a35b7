"""What many workers cost each other: the native scheduler's code on simulated cores, on the graphs of Task Bench."""

import argparse

from taskgpt.errors import UserError, shorten
from taskgpt.lab.benchmarks import patterns, task_bench
from taskgpt.lab.named import named_config
from taskgpt.lab.report import Report, in_range
from taskgpt.lab.simulator.contention import Contended
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.progress import Progress
from taskgpt.schedulers.prepare import worker_count

WORKERS = [2, 16, 64, 128]
TASK_US = 20.0  # about what a fine task of GPT-2 124M takes where 112 of them run at a time
COLUMNS = {
    "pattern": ("pattern", ""),
    "system": ("system", ""),
    "workers": ("workers", "d"),
    "tasks": ("tasks", "d"),
    "locked": ("locked", ".2f"),
    "acquired": ("acquired", ".2f"),
    "failed": ("failed", ".2f"),
    "transfers": ("transfers", ".2f"),
    "wake-ups": ("wakes", ".2f"),
    "span us": ("span_us", ".0f"),
    "efficiency": ("efficiency", ".3f"),
}


def contention(flags: argparse.Namespace) -> None:
    """Simulate each pattern under each system on each number of workers; print what a task costs, counted."""
    in_range("--width", flags.width)
    in_range("--steps", flags.steps)
    if not 0 < flags.task_us <= 1e6:
        raise UserError(f"--task-us: wanted microseconds, above 0 and at most 1e6, got {flags.task_us}")
    patterns.verify_patterns(flags.patterns)
    machine, configs = Machine.load(flags.machine), {}
    for system in dict.fromkeys(flags.systems):
        for workers in flags.workers or WORKERS:
            config = named_config(system, workers)
            if config.scheduler != "native":
                raise UserError(f"--systems {shorten(system)}: counts are of the native scheduler's code; choose native or a set-up of it")
            configs[system, worker_count(config.settings.workers)] = config  # a set-up may have a number of its own
    report, rows = Report(flags), []
    cases = [(pattern, *case, config) for pattern in dict.fromkeys(flags.patterns) for case, config in configs.items()]
    with Progress("simulating", len(cases)) as progress:
        for done, (pattern, system, workers, config) in enumerate(cases):
            progress.show(done, f"{pattern} {system} {workers}")
            graph, _ = task_bench.record(pattern, flags.width or workers, flags.steps)
            with Contended(config.settings, machine.with_room_for(workers), flags.task_us) as scheduler:
                scheduler.run(graph)
            efficiency = len(graph.tasks) * flags.task_us / (scheduler.span_us * workers)
            found = {"tasks": len(graph.tasks), **scheduler.counts.a_task(), "span_us": scheduler.span_us, "efficiency": efficiency}
            rows.append({"pattern": pattern, "system": system, "workers": workers, **found})
    report.line("counted", "for a task, all workers together")
    report.table("rows", COLUMNS, rows, ("tasks",))
    report.save()
