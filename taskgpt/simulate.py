"""Simulate a graph on machines that are not there: more workers, other policies, loops against tasks.

python -m taskgpt.simulate --graph tiny --workers 1 2 4 8                                         # on more cores than this machine has
python -m taskgpt.simulate --graph gpt2-124m --machine 2x56 --workers 1 14 56 112 --schedulers loops native native-longest-path
python -m taskgpt.simulate --graph tiny --machine here --workers 1 2 --measure                    # beside what is measured here
python -m taskgpt.simulate --graph gpt2-124m:tiles.rows=32 --machine 2x56 --workers 112 --trace runs/simulated

Task times are measured here, on one worker, and scaled to the machine's sgemm; --t1 scales them to a whole step that is known. Policies and
queues are the native scheduler's own, and loops are cut and dealt by theirs. Memory's bandwidth is shared by the tasks of a socket.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import run_program
from taskgpt.lab import machine as this
from taskgpt.lab.formats import save, verify_can_write
from taskgpt.lab.machine_file import Machine
from taskgpt.lab.named import Prepared, named_config, named_scheduler, prepare
from taskgpt.lab.report import Report, at_least
from taskgpt.lab.simulated import Clocked, Costs, simulated
from taskgpt.lab.task_costs import measured, traffic
from taskgpt.lab.trace import RECORD, Traced

COLUMNS = {
    "scheduler": ("scheduler", ""),
    "workers": ("workers", "d"),
    "ms a step": ("step_ms", ".2f"),
    "speedup": ("speedup", ".2f"),
    "efficiency": ("efficiency", ".3f"),
    "T1 / p": ("area_ms", ".2f"),
    "T-inf": ("tinf_ms", ".2f"),
    "bandwidth": ("bandwidth_ms", ".2f"),
    "measured": ("measured_ms", ".2f"),
    "simulated / measured": ("ratio", ".3f"),
}
MEASURED = ("measured_ms", "ratio")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    title, _, examples = __doc__.partition("\n\n")
    p = argparse.ArgumentParser(
        "taskgpt simulate", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = "NAME[:KEY=VALUE,...]"
    p.add_argument("--graph", default="gpt2-124m", metavar=named, help="graph file, with changes (default gpt2-124m)")
    p.add_argument("--schedulers", nargs="+", default=["loops", "native"], metavar=named, help="native, loops and their variants")
    p.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="numbers of workers (default 1 2 4 8)")
    p.add_argument("--machine", default="here", metavar="NAME", help="here, 2x56, or a path of a .toml file (default here)")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="steps, which may overlap; the median counts (default 10)")
    p.add_argument("--t1", type=float, metavar="MS", help="scale task times so that all of a step's tasks take so long")
    p.add_argument("--measure", action="store_true", help="also run for real where this machine has the cores, in turns")
    p.add_argument("--trace", metavar="DIR", help="write a trace of each simulation, for `taskgpt trace` and viewers")
    p.add_argument("--json", metavar="FILE", help="write every number")
    flags = p.parse_args(argv)
    flags.argv = list(sys.argv[1:] if argv is None else argv)
    return run_program("taskgpt.simulate", lambda: simulate(flags))


def simulate(flags: argparse.Namespace) -> int:
    """Print a line for each scheduler and number of workers. Raises UserError or OSError."""
    at_least("--steps", flags.steps, 3)
    for number in flags.workers:
        at_least("--workers", number)
    if flags.trace is not None:
        verify_can_write(flags.trace)
    machine = Machine.load(flags.machine)
    if flags.machine == "here":
        machine = machine.with_room_for(max(flags.workers))
    costs: list[Costs] = []  # of the one graph, as soon as they are measured
    schedulers = {
        (name, n): simulated(named_config(name, n, record=RECORD), machine, lambda _: costs[0])
        for name in flags.schedulers
        for n in flags.workers
    }
    report = Report(flags)
    report.line("simulated", f"{flags.machine}: " + ", ".join(f"{key} {value:.4g}" for key, value in vars(machine).items()))
    prepared = prepare(flags.graph)
    graph = prepared.graphs[0]
    seconds = measured(prepared)
    speed = 1.0 if flags.machine == "here" else this.sgemm_gflops(1) / machine.sgemm_gflops
    scale = flags.t1 / 1e3 / seconds.sum() if flags.t1 else speed
    costs.append(Costs(seconds * scale, traffic(graph, machine.cache_mib * 2**20 * machine.sockets)))
    total_ms = costs[0].seconds.sum() * 1e3
    report.line("tasks", f"{len(graph.tasks)}, measured here on one worker, times {scale:.3f}: {total_ms:.1f} ms a step")
    rows = [one(flags, prepared, costs[0], name, n, scheduler) for (name, n), scheduler in schedulers.items()]
    if flags.measure:
        beside(rows, flags, prepared)
    report.table("steps", {head: column for head, column in COLUMNS.items() if flags.measure or column[0] not in MEASURED}, rows)
    report.save()
    return 0


def one(flags, prepared: Prepared, costs: Costs, name: str, workers: int, scheduler: Clocked) -> dict[str, Any]:
    """Return the row of one simulation."""
    graph, machine, start = prepared.graphs[0], scheduler.machine, time.perf_counter()
    with Traced(scheduler) as traced:
        prepared.run(traced, flags.steps)
        trace = traced.trace({"command": shlex.join(["taskgpt", "simulate", *flags.argv]), "machine": vars(machine)})
    if flags.trace is not None:
        print(f"trace      {save(trace, Path(flags.trace) / f'{name}-{workers}'.replace(':', '_'))}", file=sys.stderr)
    t1_ms, step_ms = costs.seconds.sum() * 1e3, float(np.median(np.diff(np.sort(trace.runs["end_ns"]))[1:])) / 1e6
    sockets = min(machine.sockets, -(-workers // machine.cores_per_socket))
    return {
        "scheduler": name,
        "workers": workers,
        "step_ms": step_ms,
        "speedup": t1_ms / step_ms,
        "efficiency": t1_ms / step_ms / workers,
        "area_ms": t1_ms / workers,
        "tinf_ms": sum(costs.seconds[n] for n in graph.longest_path(costs.seconds)) * 1e3,
        "bandwidth_ms": costs.bytes.sum() / (sockets * machine.bandwidth_gbs * 1e6),
        "simulation_s": time.perf_counter() - start,
        "measured_ms": None,
        "ratio": None,
    }


def beside(rows: list[dict[str, Any]], flags: argparse.Namespace, prepared: Prepared) -> None:
    """Run what this machine has the cores for, in turns, and put it beside."""
    real = [row for row in rows if row["workers"] <= this.usable_cores()]
    taken: dict[int, list[float]] = {at: [] for at in range(len(real))}
    for round_number in range(6):
        for at, row in enumerate(real):
            with named_scheduler(row["scheduler"], row["workers"]) as scheduler:
                prepared.run(scheduler, 2)
                start = time.perf_counter()
                prepared.run(scheduler, flags.steps)
                if round_number:
                    taken[at].append((time.perf_counter() - start) / flags.steps * 1e3)
        print(f"measured round {round_number} of 5", file=sys.stderr)
    for at, row in enumerate(real):
        row["measured_ms"] = statistics.median(taken[at])
        row["ratio"] = row["step_ms"] / row["measured_ms"]


if __name__ == "__main__":
    sys.exit(main())
