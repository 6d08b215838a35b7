"""Compare schedulers, numbers of workers, settings and tile sizes: every combination, in turns, until the medians are known.

taskgpt compare --graph gpt2-124m                                                   # the usual schedulers, all cores
taskgpt compare --graph gpt2-124m --schedulers sequential,loops,native --workers 1,2 --set policy=oldest_first,newest_first
taskgpt compare --graph tiny --tiles rows=64,128 --tiles columns=32,64 --budget 2m  # tile x tile
taskgpt compare --graph gpt2-124m --output runs/compare --resume                    # go on where it was stopped
taskgpt compare --diff runs/yesterday runs/today                                    # what changed beyond noise
taskgpt compare --pairs cholesky:tile=64 chain --pairs gpt2-124m@native gpt2-124m@native    # two programs at once, or not
taskgpt compare --pairs products products --weights 3:1                             # what their weights in a share give them

Writes compare.json, .csv, .md and .html (with pictures) into the output folder. Baselines: `loops-llmc` (llm.c's pragmas), `loops` (all
loops), `whole-tensor` (NumPy on tensors that are not cut, threads inside the BLAS: what a NumPy user would write), `sequential`.

A program of --pairs is NAME[:KEY=VALUE,...][@SCHEDULER]: training steps of a graph, or cholesky, heat, chain (of tasks, for one core),
stream (bound by memory), products (bound by cores); on native if no scheduler is named; times=N among its keys says how often it runs.
Each pair runs exclusive (one after the other), oversubscribed (both at once, a worker for every core each), split (both at once, half of
the cores each) and shared (both at once, a worker for every core each, task by task as by --share), in turns. Writes pairs.json and
pairs.html.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from taskgpt.errors import UserError, run_program, shorten
from taskgpt.lab import layout, machine
from taskgpt.lab.contests import compare_report
from taskgpt.lab.contests.cells import product_of
from taskgpt.lab.contests.results import MOST_STEPS, Result, Results
from taskgpt.lab.contests.turns import CellFailed, Turns
from taskgpt.lab.disturbance import Disturbance
from taskgpt.lab.pairs.contest import compare_pairs
from taskgpt.lab.report import LEAST_TURNS, seconds_in
from taskgpt.lab.roofline import team_sizes
from taskgpt.programs.arguments import Parser, add_changes, add_graphs, add_schedulers, add_wide, add_workers
from taskgpt.progress import Progress

SCHEDULERS = ["sequential", "whole-tensor", "loops-llmc", "loops", "threads", "native"]
FIRST_STEPS = 4  # from fresh parameters, on record, after warm-up: loss, bits, efficiencies
LEAST_STEPS = 2  # in a turn
OF_PAIRS = {"rounds": "10", "seconds": "3s", "weights": "3:1"}  # flags, with defaults, or an example
DETAILS = {"mean ms", f"{compare_report.STEPS} steps, s", "turns", "tasks", "T1 ms", "T-inf ms"}  # columns of `--wide`, and of the files
DETAILS |= {f"idle: {cause}" for cause in compare_report.IDLE}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 1 if cells that should agree computed different bits, or if all failed."""
    p = Parser("taskgpt compare", __doc__)
    add_graphs(p, ["gpt2-124m"])
    add_schedulers(p, SCHEDULERS)
    add_workers(p, "default 1, 2, 4, ... all cores", several=True)
    add_changes(p, several=True)
    p.add_argument("--precision", type=float, default=0.01, metavar="P", help="until all medians are known to this part (default 0.01)")
    p.add_argument("--budget", default="15m", metavar="TIME", help="or until it is spent: 90s, 10m, 1h (default 15m)")
    p.add_argument("--turn", default="1s", metavar="TIME", help="how long a turn of a cell lasts, two steps at least (default 1s)")
    p.add_argument("--output", default="runs/compare", metavar="DIR", help="where results go (default runs/compare)")
    p.add_argument("--resume", action="store_true", help="go on with the results that the output folder holds")
    p.add_argument("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="measure nothing; say what changed between two output folders")
    add_pairs(p)
    add_wide(p)

    def run() -> int:
        flags = p.parse_args(argv)
        if flags.pairs:
            return compare_pairs(flags_of_pairs(flags, p))
        for name in OF_PAIRS:
            if getattr(flags, name) is not None:
                raise UserError(f"--{name}: only with --pairs, for example --pairs products chain --{name} {OF_PAIRS[name]}")
        return diff(*flags.diff, layout.terminal_width(flags)) if flags.diff else compare(flags)

    return run_program("taskgpt compare", run)


def add_pairs(p: argparse.ArgumentParser) -> None:
    """Add what concerns pairs of programs."""
    group = p.add_argument_group("pairs of programs")
    group.add_argument("--pairs", nargs=2, action="append", metavar="PROGRAM", help="two programs at once, or not; may be given again")
    told = {
        "rounds": ("N", f"rounds of all ways (default {OF_PAIRS['rounds']})"),
        "seconds": ("S", f"how long each program takes alone, about; with --weights, both (default {OF_PAIRS['seconds']})"),
        "weights": ("N:M", "both in a share for --seconds, with these weights: which time of cores each gets"),
    }
    for name, (metavar, help) in told.items():
        group.add_argument(f"--{name}", type=int if name == "rounds" else None, metavar=metavar, help=help)


def flags_of_pairs(flags: argparse.Namespace, p: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags that concern pairs, with their defaults. Raises UserError if others were given."""
    kept = {name: getattr(flags, name) for name in ("pairs", "output", "wide", *OF_PAIRS)}
    for name, value in vars(flags).items():
        if name not in kept and value != p.get_default(name):
            raise UserError(f"--{name}: not with --pairs, whose words name graphs and schedulers themselves: gpt2-124m:tiles.rows=64@loops")
    defaults = {"rounds": int(OF_PAIRS["rounds"]), "seconds": OF_PAIRS["seconds"]}
    return argparse.Namespace(**kept | {name: value for name, value in defaults.items() if kept[name] is None})


def compare(flags: argparse.Namespace) -> int:
    """Measure, write and print; return the exit code. Raises UserError or OSError."""
    if not 0 < flags.precision < 1:
        raise UserError(f"--precision {flags.precision:g}: wanted a part of the median, such as 0.01")
    budget_s, turn_s = seconds_in("--budget", flags.budget), seconds_in("--turn", flags.turn)
    workers = flags.workers or team_sizes(machine.usable_cores())
    cells = product_of(flags.graphs, flags.tiles, flags.schedulers, workers, flags.set)
    results = Results.begin(flags.output, cells, flags.resume)
    for key, value in results.machine.items():
        print(layout.field(key, value))
    until = f"until medians are known to {flags.precision:.1%} or {flags.budget} are over"
    print(layout.field("cells", f"{len(cells)}, in turns of {flags.turn}, {until}"))
    mine, disturbance = [results.found[cell] for cell in cells], Disturbance()
    try:
        with Progress("comparing", budget_s, None) as progress, Turns() as turns:
            measure(mine, turns, results, flags.precision, budget_s, turn_s, progress)
    except KeyboardInterrupt:
        compare_report.write(results)
        raise KeyboardInterrupt(f"interrupted; {flags.output} holds what was measured, go on with --resume") from None
    width, details = layout.terminal_width(flags), () if flags.wide else DETAILS
    tables = (layout.without(table, details) for table in compare_report.tables(results))
    print("\n" + "\n\n".join(layout.to_text(table, width) for table in tables) + "\n")
    reached, failed = sum(r.is_tight(flags.precision) for r in mine), sum(bool(r.failed) for r in mine)
    notes = [f"{reached} of {len(mine)} are known to {flags.precision:.1%}"]
    notes += [f"{failed} could not be run"] * bool(failed)
    notes += [f"--budget {flags.budget} ended first, --resume goes on"] * (reached + failed < len(mine))
    print(layout.field("medians", "; ".join(notes)))
    if disturbed := disturbance.found(machine.usable_cores()).notes():
        print(layout.field("disturbed", "; ".join(disturbed)))
    for path in [results.path, *compare_report.write(results)]:
        print(f"wrote      {path}")
    wrong = compare_report.agreement(results)
    print("\n".join(wrong) if wrong else "bits       the same wherever graph and tiles are")
    return 1 if wrong or not any(r.ms for r in mine) else 0


def measure(
    mine: Sequence[Result], turns: Turns, results: Results, precision: float, budget_s: float, turn_s: float, progress: Progress
) -> None:
    """Give every cell a first run and then turns, round after round, all of them in every round, so that all see the same machine."""
    begun, before = time.monotonic(), sum(len(r.ms) for r in mine)
    end = begun + budget_s

    def attempt(r: Result, what: Callable[[], None], doing: str) -> None:
        live = [r for r in mine if not r.failed]
        done = sum(len(r.ms) for r in mine) - before
        total_s = (time.monotonic() - begun) * (turns_needed(live, precision) - before) / done if done else budget_s
        known = f"{sum(r.is_tight(precision) for r in live)} of {len(live)} medians known"
        progress.show_time(f"{doing}: {r.cell}; {known}", min(total_s, budget_s))
        try:
            what()
        except CellFailed as error:
            r.failed = shorten(error)
            with progress.aside():
                print(f"failed     {r.cell}: {r.failed}", file=sys.stderr)
        results.save()

    def begin(r: Result) -> None:
        r.first = turns.first(r.cell, FIRST_STEPS)
        r.steps = min(MOST_STEPS, max(LEAST_STEPS, round(turn_s * 1e3 / turns.timed(r.cell, LEAST_STEPS))))

    def turn(r: Result) -> None:
        r.ms.append(turns.timed(r.cell, r.steps))

    for at, r in enumerate(mine):
        if not r.steps and time.monotonic() < end:
            attempt(r, partial(begin, r), f"first run {at + 1}/{len(mine)}")
    while True:
        live = [r for r in mine if r.steps and not r.failed]
        if not live or time.monotonic() >= end or all(r.is_tight(precision) for r in live):
            return
        number = min(len(r.ms) for r in live)
        for r in live:
            if len(r.ms) == number and time.monotonic() < end:  # else ahead, since a round was interrupted
                attempt(r, partial(turn, r), f"round {number + 1}")


def turns_needed(cells: Sequence[Result], precision: float) -> int:
    """Guess how many turns all cells take together: an interval shrinks with the root of their number."""
    needed = [len(r.ms) * (r.precision / precision) ** 2 for r in cells if r.precision is not None]
    return len(cells) * max([LEAST_TURNS, *map(round, needed)])


def diff(before: str, after: str, width: int | None) -> int:
    """Print what changed from one output folder to another. Raises UserError."""
    a, b = Results.load(before), Results.load(after)
    for key in a.machine:
        if a.machine[key] != b.machine.get(key):
            print(f"{shorten(key):10} before {shorten(a.machine[key])}, after {shorten(b.machine.get(key))}")
    table = compare_report.changes_table(a, b)
    if not table["rows"]:
        raise UserError(f"--diff {before} {after}: no cell was measured in both")
    print(layout.to_text(table, width))
    for name, one, other in ((before, a, b), (after, b, a)):
        if count := sum(r.cell not in other.found for r in one.measured):
            print(f"only in {name}: {count} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
