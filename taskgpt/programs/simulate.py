"""Simulate graphs on machines that are not there: more workers, other policies and tiles, loops against tasks.

taskgpt simulate --graph tiny --workers 1,2,4,8                                       # on more cores than this machine has
taskgpt simulate --graph gpt2-124m --machine 2x56 --workers 1,14,56,112 --schedulers loops,native,threads
taskgpt simulate --machine 2x56:sockets=5 --workers 256 --policy oldest_first,longest_path_first --tiles rows=32,64 --times rates
taskgpt simulate --graph tiny --workers 1,2 --measure                                 # beside what is measured here
taskgpt simulate --graph gpt2-124m --times runs/one-worker --machine 2x56 --workers 112 --trace runs/simulated
taskgpt simulate --graph gpt2-124m --schedulers native --workers 2 --ranks 2,4,8,16,32 --gbits 1,10,100   # on several machines
taskgpt simulate --machine 2x56 --pairs tiny@native tiny@loops:share_weight=3   # two programs on one machine

Task times are measured here, on one worker, and scaled to the machine's sgemm; --t1 scales them to a whole step that is known. --times says
where else they come from: `rates` measures those of the first graph alone, and estimates the others; a folder holds the trace of a training
on one worker, which gives the same results every time. All choices are the schedulers' own. Beside stand the bounds that no schedule beats:
T1 / p, all tasks shared out without a gap; T-inf, the longest path; bandwidth, what moves through memory.

--ranks: so many machines, of --workers each, train with a part of the batch each and exchange gradients over links of --gbits. Weak
scaling: each has one micro-batch, the graph's. Strong scaling: a step has as many micro-batches as there are ranks at most.

--pairs: two programs GRAPH@SCHEDULER train side by side, --steps each, or GRAPH:times=N@SCHEDULER. In four ways: one after the other;
split, each on half of the cores; oversubscribed, each with a worker for every core, of which the system makes time slices; and shared, task
by task, by the protocol that `--share` runs. Of three programs or more, every two, each also with another of its kind.
"""

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import UserError, run_program, shorten
from taskgpt.files import verify_can_write
from taskgpt.lab.contests.cells import WHOLE_TENSOR, Cell, product_of
from taskgpt.lab.named import listed, named_config
from taskgpt.lab.pairs.words import Word
from taskgpt.lab.report import Report, in_range
from taskgpt.lab.simulator import scaling, together, validation
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Clocked, Costs, simulated
from taskgpt.lab.simulator.task_costs import Scale, Times, traffic
from taskgpt.lab.traces.formats import folder_name, save, verify_can_save
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.programs.arguments import Parser, add_changes, add_graphs, add_numbers, add_schedulers, add_wide, add_workers, positive, rate
from taskgpt.progress import Progress
from taskgpt.tasks import Graph

GRAPHS, SCHEDULERS, WORKERS = ["gpt2-124m"], ["loops", "native"], (1, 2, 4, 8)
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
PAIR_COLUMNS = {
    "programs": ("programs", ""),
    "exclusive": ("exclusive_ms", ",.0f"),
    "split": ("split_ms", ",.0f"),
    "oversubscribed": ("oversubscribed_ms", ",.0f"),
    "shared": ("shared_ms", ",.0f"),
    "efficiency": ("efficiency", ".3f"),
    "exclusive / shared": ("over_exclusive", ".2f"),
    "best other / shared": ("over_best", ".2f"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt simulate", __doc__)
    add_graphs(p, GRAPHS)
    add_schedulers(p, SCHEDULERS)
    add_workers(p, "default 1,2,4,8", several=True)
    add_changes(p, several=True)
    p.add_argument("--policy", nargs="+", default=[], metavar="NAME", help="the same as --set policy=NAME,...")
    p.add_argument("--machine", default="here", metavar="NAME", help="here, 2x56, or a path of a .toml file (default here)")
    p.add_argument("--times", default="measured", metavar="FROM", help="measured, rates, or a folder with a trace (default measured)")
    p.add_argument("--t1", type=float, metavar="MS", help="scale task times so that all of the first graph's take so long a step")
    p.add_argument(
        "--scale", choices=("all", "products"), default="all", help="which tasks --t1 scales (default all); products: to one speed"
    )
    p.add_argument("--steps", type=int, default=10, metavar="N", help="steps, which may overlap; their mean counts (default 10)")
    p.add_argument("--measure", action="store_true", help="also run for real where this machine has the cores, in turns")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="of --measure (default 5)")
    add_numbers(p, "--ranks", positive, "numbers of ranks, each on a machine of its own", metavar="N")
    add_numbers(p, "--gbits", rate, "rates of the links between ranks, Gb/s (default 1 10 100)", metavar="R", default=[1.0, 10.0, 100.0])
    p.add_argument("--latency-us", type=float, default=30.0, metavar="US", help="of a message on a link, besides its bytes (default 30)")
    p.add_argument("--bucket-mib", type=float, default=8.0, metavar="MIB", help="of gradients that are exchanged together (default 8)")
    told = "two programs GRAPH[:KEY=VALUE,...][@SCHEDULER[:...]] on one machine; of more, every two; may be given again"
    p.add_argument("--pairs", nargs="+", action="append", metavar="PROGRAM", help=told)
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
    if flags.scale != "all" and (flags.t1 is None or flags.ranks is not None):
        raise UserError(f"--scale {flags.scale}: says what --t1 scales on one machine; give --t1 MS, and no --ranks")
    if flags.pairs is not None:
        return simulate_pairs(flags)
    cells = product_of(flags.graphs, flags.tiles, flags.schedulers, flags.workers or WORKERS, settings)
    verify_ranks(flags, cells)
    if flags.trace is not None:
        verify_can_save(flags.trace)
    times, machine = Times(flags.times), Machine.load(flags.machine)
    if flags.machine.partition(":")[0] == "here":
        machine = machine.with_room_for(max(cell.workers for cell in cells))
    costs: dict[str, Costs] = {}  # by graph, as soon as they are known
    schedulers = [
        simulated(named_config(cell.scheduler_word, cell.workers, record=RECORD), machine, lambda _, word=cell.graph_word: costs[word])
        for cell in cells
    ]
    report, rows = Report(flags), []
    scale = begin(flags, report, times, machine)
    if flags.ranks is not None:
        return simulate_ranks(flags, cells[0], times, machine, scale.factor, report)
    for word in dict.fromkeys(cell.graph_word for cell in cells):
        graph, alone = times.of(word)
        if len(graph.tasks) * flags.steps > MOST_RECORDS:
            most = MOST_RECORDS // len(graph.tasks)
            raise UserError(f"--steps {flags.steps}: {len(graph.tasks):,} tasks each are too many to keep; choose --steps {most} or less")
        costs[word] = scaled(flags, report, word, graph, alone, scale, machine)
        seconds = costs[word].seconds
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


def begin(flags: argparse.Namespace, report: Report, times: Times, machine: Machine) -> Scale:
    """Say what is simulated; return how times become those of that machine."""
    report.line("simulated", f"{flags.machine}: " + ", ".join(f"{key} {value:.4g}" for key, value in vars(machine).items()))
    is_known = flags.t1 or flags.machine.partition(":")[0] == "here"
    return Scale(1.0 if is_known else times.sgemm_gflops / machine.sgemm_gflops, flags.t1 and flags.t1 / 1e3, flags.scale == "products")


def scaled(flags: argparse.Namespace, report: Report, word: str, graph: Graph, alone: np.ndarray, scale: Scale, machine: Machine) -> Costs:
    """Return the costs of a graph's tasks there, and say what they are together."""
    seconds = scale.of(graph, alone)
    told = f"times {seconds.sum() / alone.sum():.3f}: {seconds.sum() * 1e3:.1f} ms a step"
    report.line(f"tasks of {word}", f"{len(seconds)}, {flags.times}, {told}")
    return Costs(seconds, traffic(graph, machine.cache_mib * 2**20 * machine.sockets))


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


def simulate_pairs(flags: argparse.Namespace) -> int:
    """Print a line for every two programs. Raises UserError or OSError."""
    for flag in ("tiles", "set", "policy", "ranks", "trace", "measure", "picture"):
        if getattr(flags, flag):
            raise UserError(
                f"--{flag}: says nothing about --pairs; leave it out, or give keys with a program, GRAPH:KEY=VALUE@NAME:KEY=VALUE"
            )
    if flags.graphs != GRAPHS or flags.schedulers != SCHEDULERS:
        raise UserError("--pairs: names the graph and the scheduler of each program; leave out --graph and --scheduler")
    machine = Machine.load(flags.machine)
    cores = flags.workers or [machine.cores]
    if len(cores) > 1:
        raise UserError(f"--workers {','.join(map(str, cores))}: wanted one number of cores for --pairs, got {len(cores)}")
    in_range("--workers", cores[0], 2, machine.cores)
    pairs = [pair for group in flags.pairs for pair in pairs_of(listed(group), cores[0])]
    words = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    times, report = Times(flags.times), Report(flags)
    scale = begin(flags, report, times, machine)
    known: dict[str, tuple[Graph, Costs]] = {}
    setups: dict[Word, together.SetUp] = {}
    for number, word in enumerate(words, 1):
        if word.program not in known:
            graph, alone = times.of(word.program)
            known[word.program] = graph, scaled(flags, report, word.program, graph, alone, scale, machine)
        setups[word] = together.SetUp(word.scheduler, *known[word.program], steps=word.times or flags.steps)
        report.line(f"program {number}", f"{setups[word].steps} steps, {word.scheduler}, {word.program}")
    alone_s: dict[Word, float] = {}
    rows = []
    with Progress("simulating", len(pairs)) as progress:
        for done, pair in enumerate(pairs):
            name, ends_s = " + ".join(str(words.index(word) + 1) for word in pair), {}
            for way in together.WAYS:
                progress.show(done, f"programs {name}, {way}")
                if way == "exclusive":
                    for word in pair:
                        if word not in alone_s:
                            (alone_s[word],) = together.run([setups[word]], way, machine, cores[0])
                    ends_s[way] = list(itertools.accumulate(alone_s[word] for word in pair))
                else:
                    ends_s[way] = together.run([setups[word] for word in pair], way, machine, cores[0])
            work_s = sum(setups[word].steps * float(setups[word].costs.seconds.sum()) for word in pair)
            rows.append(pair_row(name, ends_s, work_s / cores[0]))
    report.table("pairs", PAIR_COLUMNS, rows)
    report.save()
    return 0


def pairs_of(said: Sequence[str], cores: int) -> list[tuple[Word, Word]]:
    """Return the pair of two programs; of more, every two, each also with another of its kind. Raises UserError."""
    words = [Word.of(each) for each in said]
    if len(words) < 2:
        raise UserError(f"--pairs {shorten(','.join(said))}: wanted two programs or more, got {len(words)}")
    for word in words:
        if not word.is_graph:
            raise UserError(
                f"--pairs {shorten(word.said)}: no times of its tasks are known; name a graph, or measure: taskgpt compare --pairs"
            )
        together.config_of(word.scheduler, cores)
    return [(words[0], words[1])] if len(words) == 2 else list(itertools.combinations_with_replacement(words, 2))


def pair_row(name: str, ends_s: dict[str, list[float]], least_s: float) -> dict[str, Any]:
    """Return the row of two programs. `ends_s`: when each is over, by way; `least_s`: if all tasks were shared out without a gap."""
    makespans = {way: max(ends) for way, ends in ends_s.items()}
    return {
        "programs": name,
        **{f"{way}_ms": makespan * 1e3 for way, makespan in makespans.items()},
        "efficiency": least_s / makespans["shared"],
        "over_exclusive": makespans["exclusive"] / makespans["shared"],
        "over_best": min(makespans[way] for way in together.WAYS[:-1]) / makespans["shared"],
        "ends_ms": {way: [end * 1e3 for end in ends] for way, ends in ends_s.items()},
    }


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
