"""Simulate graphs on machines that are not there: more workers, other policies and tiles, loops against tasks.

taskgpt simulate --graph tiny --workers 1,2,4,8                                       # on more cores than this machine has
taskgpt simulate --graph gpt2-124m --machine 2x56 --workers 1,14,56,112 --schedulers loops,native,threads
taskgpt simulate --machine 2x56:sockets=5 --workers 256 --policy oldest_first,longest_path_first --tiles rows=32,64 --times rates
taskgpt simulate --graph tiny --workers 1,2 --measure                                 # beside what is measured here
taskgpt simulate --graph gpt2-124m --times runs/one-worker --machine 2x56 --workers 112 --trace runs/simulated
taskgpt simulate --graph gpt2-124m --schedulers native --workers 2 --ranks 2,4,8,16,32 --gbits 1,10,100   # on several machines

Task times are measured here, on one worker, and scaled to the machine's sgemm; --t1 scales them to a whole step that is known. --times says
where else they come from: `rates` measures those of the first graph alone, and estimates the others; a folder holds the trace of a training
on one worker, which gives the same results every time. All choices are the schedulers' own. Beside stand the bounds that no schedule beats:
T1 / p, all tasks shared out without a gap; T-inf, the longest path; bandwidth, what moves through memory.

--ranks: so many machines, of --workers each, train with a part of the batch each and exchange gradients over links of --gbits. Weak
scaling: each has one micro-batch, the graph's. Strong scaling: a step has as many micro-batches as there are ranks at most.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskgpt.errors import UserError, run_program
from taskgpt.files import verify_can_write
from taskgpt.lab.contests.cells import WHOLE_TENSOR, Cell, product_of
from taskgpt.lab.named import listed, named_config
from taskgpt.lab.report import Report, in_range
from taskgpt.lab.simulator import scaling, validation
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Clocked, Costs, simulated
from taskgpt.lab.simulator.task_costs import Times, traffic
from taskgpt.lab.traces.formats import folder_name, save, verify_can_save
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.programs.arguments import Parser, add_changes, add_graphs, add_numbers, add_schedulers, add_wide, add_workers, positive, rate
from taskgpt.progress import Progress
from taskgpt.tasks import Graph

WORKERS = (1, 2, 4, 8)
MOST_RECORDS = 10**8  # of a simulation, 56 bytes each
COLUMNS = {
    "graph": ("graph", ""),
    "scheduler": ("scheduler", ""),
    "workers": ("workers", "d"),
    "ms": ("step_ms", ".2f"),
    "speedup": ("speedup", ".2f"),
    "efficiency": ("efficiency", ".3f"),
    "T1 / p": ("area_ms", ".2f"),
    "T-inf": ("tinf_ms", ".2f"),
    "bandwidth": ("bandwidth_ms", ".2f"),
    "measured": ("measured_ms", ".2f"),
    "first quartile": ("q1_ms", ".2f"),
    "third": ("q3_ms", ".2f"),
    "x measured": ("ratio", ".3f"),
}
DETAILS = ("T1 / p", "bandwidth", "first quartile", "third")
RANK_COLUMNS = {
    "Gb/s": ("gbits", "g"),
    "ranks": ("ranks", ",d"),
    "ms": ("step_ms", ".1f"),
    "exchange": ("exchange_ms", ".1f"),
    "not hidden": ("exposed_ms", ".1f"),
    "tok/s": ("tokens_per_s", ",.0f"),
    "efficiency": ("efficiency", ".3f"),
    "strong: ms": ("strong_ms", ".1f"),
    "speedup": ("strong_speedup", ".2f"),
    "of ideal": ("strong_efficiency", ".3f"),
}
RANK_DETAILS = ("exchange", "strong: ms")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt simulate", __doc__)
    add_graphs(p, ["gpt2-124m"])
    add_schedulers(p, ["loops", "native"])
    add_workers(p, "default 1,2,4,8", several=True)
    add_changes(p, several=True)
    p.add_argument("--policy", nargs="+", default=[], metavar="NAME", help="the same as --set policy=NAME,...")
    p.add_argument("--machine", default="here", metavar="NAME", help="here, 2x56, or a path of a .toml file (default here)")
    p.add_argument("--times", default="measured", metavar="FROM", help="measured, rates, or a folder with a trace (default measured)")
    p.add_argument("--t1", type=float, metavar="MS", help="scale task times so that all of the first graph's take so long a step")
    p.add_argument("--steps", type=int, default=10, metavar="N", help="steps, which may overlap; their mean counts (default 10)")
    p.add_argument("--measure", action="store_true", help="also run for real where this machine has the cores, in turns")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="of --measure (default 5)")
    add_numbers(p, "--ranks", positive, "numbers of ranks, each on a machine of its own", metavar="N")
    add_numbers(p, "--gbits", rate, "rates of the links between ranks, Gb/s (default 1 10 100)", metavar="R", default=[1.0, 10.0, 100.0])
    p.add_argument("--latency-us", type=float, default=30.0, metavar="US", help="of a message on a link, besides its bytes (default 30)")
    p.add_argument("--bucket-mib", type=float, default=8.0, metavar="MIB", help="of gradients that are exchanged together (default 8)")
    p.add_argument("--picture", metavar="FILE.svg", help="draw how the ranks scale")
    p.add_argument("--trace", metavar="DIR", help="write a trace of each simulation, for `taskgpt trace` and viewers")
    p.add_argument("--json", metavar="FILE", help="write every number")
    add_wide(p)

    def run() -> int:
        flags = p.parse_args(argv)
        flags.argv = list(sys.argv[1:] if argv is None else argv)
        return simulate(flags)

    return run_program("taskgpt simulate", run)


def simulate(flags: argparse.Namespace) -> int:
    """Print a line for each graph, scheduler and number of workers. Raises UserError or OSError."""
    in_range("--steps", flags.steps, 3)
    in_range("--rounds", flags.rounds)
    in_range("--t1", flags.t1, 1e-3, 10**9)
    settings = flags.set + ([f"policy={','.join(listed(flags.policy))}"] if flags.policy else [])
    if WHOLE_TENSOR in flags.schedulers:
        raise UserError(f"--schedulers {WHOLE_TENSOR}: has no tasks to simulate; leave it to `taskgpt compare`")
    cells = product_of(flags.graphs, flags.tiles, flags.schedulers, flags.workers or WORKERS, settings)
    verify_ranks(flags, cells)
    if flags.trace is not None:
        verify_can_save(flags.trace)
    times, machine = Times(flags.times), Machine.load(flags.machine)
    is_here = flags.machine.partition(":")[0] == "here"
    if is_here:
        machine = machine.with_room_for(max(cell.workers for cell in cells))
    costs: dict[str, Costs] = {}  # by graph, as soon as they are known
    schedulers = [
        simulated(named_config(cell.scheduler_word, cell.workers, record=RECORD), machine, lambda _, word=cell.graph_word: costs[word])
        for cell in cells
    ]
    report, rows, scale = Report(flags), [], 1.0
    report.line("simulated", f"{flags.machine}: " + ", ".join(f"{key} {value:.4g}" for key, value in vars(machine).items()))
    if not is_here and not flags.t1:
        scale = times.sgemm_gflops / machine.sgemm_gflops
    if flags.ranks is not None:
        return simulate_ranks(flags, cells[0], times, machine, scale, report)
    for word in dict.fromkeys(cell.graph_word for cell in cells):
        graph, alone = times.of(word)
        if len(graph.tasks) * flags.steps > MOST_RECORDS:
            most = MOST_RECORDS // len(graph.tasks)
            raise UserError(f"--steps {flags.steps}: {len(graph.tasks):,} tasks each are too many to keep; choose --steps {most} or less")
        if flags.t1 and not costs:
            scale = flags.t1 / 1e3 / alone.sum()
        seconds = alone * scale
        costs[word] = Costs(seconds, traffic(graph, machine.cache_mib * 2**20 * machine.sockets))
        report.line(f"tasks of {word}", f"{len(seconds)}, {flags.times}, times {scale:.3f}: {seconds.sum() * 1e3:.1f} ms a step")
        tinf_ms = sum(seconds[n] for n in graph.longest_path(seconds)) * 1e3
        mine = [(cell, each) for cell, each in zip(cells, schedulers, strict=True) if cell.graph_word == word]
        with Progress("simulating", len(mine)) as progress:
            for done, (cell, each) in enumerate(mine):
                progress.show(done, str(cell))
                rows.append(one(flags, cell, each, graph, costs[word], tinf_ms, progress))
    if flags.measure:
        validation.measure(cells, rows, flags.rounds, flags.steps)
    shown = {head: column for head, column in COLUMNS.items() if flags.measure or column[0] not in validation.NOT_MEASURED}
    report.table("steps", shown, rows, DETAILS)
    if flags.measure:
        judge(report, rows)
    report.save()
    return 0


def one(
    flags: argparse.Namespace, cell: Cell, scheduler: Clocked, graph: Graph, costs: Costs, tinf_ms: float, progress: Progress
) -> dict[str, Any]:
    """Return the row of one simulation."""
    machine, start = scheduler.machine, time.perf_counter()
    with Traced(scheduler) as traced:
        for _ in traced.run_each([graph] * flags.steps):
            pass
        trace = traced.trace({"command": shlex.join(["taskgpt", "simulate", *flags.argv]), "machine": vars(machine)})
    del trace.about["process"]  # whose clock these times are not by
    if flags.trace is not None:
        path = save(trace, Path(flags.trace) / folder_name(cell.graph_word) / folder_name(f"{cell.scheduler_word}-{cell.workers}"))
        with progress.aside():
            print(f"trace      {path}", file=sys.stderr)
    t1_ms, step_ms = costs.seconds.sum() * 1e3, (trace.end_ns - trace.begin_ns) / flags.steps / 1e6
    sockets = min(machine.sockets, -(-cell.workers // machine.cores_per_socket))
    return {
        "graph": cell.graph_word,
        "scheduler": cell.label,
        "workers": cell.workers,
        "step_ms": step_ms,
        "speedup": t1_ms / step_ms,
        "efficiency": t1_ms / step_ms / cell.workers,
        "area_ms": t1_ms / cell.workers,
        "tinf_ms": tinf_ms,
        "bandwidth_ms": costs.bytes.sum() / (sockets * machine.bandwidth_gbs * 1e6),
        "simulation_s": time.perf_counter() - start,
        **validation.NOT_MEASURED,
    }


def verify_ranks(flags: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """Raise UserError for flags of ranks that cannot be."""
    if flags.ranks is None:
        if flags.picture is not None:
            raise UserError("--picture: draws how ranks scale; give --ranks, 2,4,8 for example")
        return
    if len(cells) != 1:
        raise UserError(
            f"--ranks: wanted one graph, scheduler and number of workers, got {len(cells)} combinations; "
            "give --schedulers native --workers N, with the cores of a machine"
        )
    for flag in ("trace", "measure"):
        if getattr(flags, flag):
            raise UserError(f"--{flag}: is about one machine; leave out --ranks, or --{flag}")
    for number in flags.ranks:
        in_range("--ranks", number)
    for number in flags.gbits:
        in_range("--gbits", number, 1e-3)
    in_range("--latency-us", flags.latency_us, 0)
    in_range("--bucket-mib", flags.bucket_mib, 1e-3)
    if flags.picture is not None:
        verify_can_write(flags.picture)


def simulate_ranks(flags: argparse.Namespace, cell: Cell, times: Times, machine: Machine, scale: float, report: Report) -> int:
    """Print a line for each rate and number of ranks. Raises UserError or OSError."""
    config = named_config(cell.scheduler_word, cell.workers, record=RECORD)
    timeline = scaling.timeline_of(cell.graph_word, times, config, machine, int(flags.bucket_mib * 2**20), scale, flags.t1)
    report.line(
        "one machine", f"{timeline.alone_s * 1e3:.1f} ms a step of {timeline.tokens:,} tokens, {cell.scheduler_word}, {flags.times}"
    )
    mib = sum(bucket.nbytes for bucket in timeline.buckets) / 2**20
    told = f"{timeline.backward_s * 1e3:.1f} ms until backward is over, {timeline.update_s * 1e3:.1f} ms of updates behind it"
    report.line("a rank", f"{told}, {mib:.1f} MiB in {len(timeline.buckets)} buckets")
    networks = [scaling.Network(gbits, flags.latency_us) for gbits in flags.gbits]
    found = scaling.rows(timeline, networks, machine, sorted(set(flags.ranks)))
    report.table("ranks", RANK_COLUMNS, found, RANK_DETAILS)
    if flags.picture is not None:
        from taskgpt.lab.simulator.scaling_picture import draw  # loads slowly

        draw(found, Path(flags.picture))
        report.line("picture", flags.picture)
    report.save()
    return 0


def judge(report: Report, rows: list[dict[str, Any]]) -> None:
    """Print how right the predictions are."""
    error = validation.median_error(rows)
    count, wrong = validation.ranks(rows)
    print()
    report.line("median error", "nothing was measured" if error is None else f"{error:.1%} of what was measured")
    report.line("ranks", f"{count - len(wrong)} of {count} pairs that differ by more than their spreads are predicted in that order")
    for number, line in enumerate(wrong, 1):
        report.line(f"wrong {number}", line)


if __name__ == "__main__":
    sys.exit(main())
