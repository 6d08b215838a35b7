"""Work with the traces that `taskgpt train --trace DIR` writes.

taskgpt trace check runs/native                             # does every file keep the rules of its format?
taskgpt trace report runs/native                            # efficiencies, idle time by cause, kernels, the longest path
taskgpt trace report runs/loops runs/native --html page.html   # beside each other; and a timeline of both to zoom
taskgpt trace convert runs/native --format perfetto --arrows   # write a format anew, with dependencies as arrows
taskgpt trace merge runs/native runs/loops --output runs/both  # one timeline of programs that ran beside each other
taskgpt trace report runs/both                                 # what they made of the cores, and each of them beside the others
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import UserError, did_you_mean, run_program
from taskgpt.files import write_whole
from taskgpt.lab import layout
from taskgpt.lab.report import in_range
from taskgpt.lab.traces import page
from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.formats import FORMATS, TRACE, USUAL, check, export, save
from taskgpt.lab.traces.node import node
from taskgpt.lab.traces.node import tables as node_tables
from taskgpt.lab.traces.process import process_of
from taskgpt.lab.traces.ranks import of_programs, programs
from taskgpt.lab.traces.trace import Trace
from taskgpt.programs.arguments import Parser, add_wide


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 2 for a file that is damaged, or breaks a rule."""
    p = Parser("taskgpt trace", __doc__)
    verbs = p.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=help, doc=f"{help}\n\n{p.examples(name)}")
        verb.set_defaults(run=run)
        return verb

    checked = add("check", check_trace, "check files against the rules of their formats")
    checked.add_argument("paths", nargs="+", metavar="PATH", help="a folder that --trace wrote, or a file of it")
    reported = add("report", report, "say where the time went: of one trace, or of several beside each other")
    reported.add_argument("paths", nargs="+", metavar="PATH", help="folders that --trace wrote, or their trace.npz")
    reported.add_argument(
        "--runs",
        default="training step",
        metavar="NAME",
        help="which graph's runs (default 'training step'); in a merged trace, of a program that has none, all",
    )
    reported.add_argument(
        "--skip", type=int, default=2, metavar="N", help="leave out the first N runs: cold memory, plans in the making (default 2)"
    )
    reported.add_argument("--reference", metavar="PATH", help="a trace of the same steps on one worker, for computation scaling")
    reported.add_argument("--json", metavar="FILE", help="write every number")
    reported.add_argument("--html", metavar="FILE", help="write a page with timeline and tables, which opens from disk")
    add_wide(reported)
    converted = add("convert", convert, "write a trace in other formats")
    converted.add_argument("path", metavar="PATH", help="a folder that --trace wrote, or its trace.npz")
    converted.add_argument(
        "--format",
        nargs="+",
        metavar="NAME",
        choices=FORMATS,
        default=USUAL,
        help=f"{', '.join(FORMATS)} (default {' '.join(USUAL)}); ovni's of loops need ovni 1.12",
    )
    converted.add_argument("--arrows", action="store_true", help="dependencies as arrows in Perfetto's format too, which grows threefold")
    converted.add_argument("--output", metavar="DIR", help="where to (default: the same folder)")
    joined = add("merge", merge, "write one trace of programs that ran beside each other on one machine, in all formats")
    joined.add_argument("paths", nargs="+", metavar="PATH", help="folders that --trace wrote, or their trace.npz")
    joined.add_argument("--output", required=True, metavar="DIR", help="where to")

    def run() -> int:
        flags = p.parse_args(argv)
        return flags.run(flags)

    return run_program("taskgpt trace", run)


def check_trace(flags: argparse.Namespace) -> int:
    """Print what every file holds. Raises UserError for the first broken rule."""
    for path in flags.paths:
        for name, counts in check(path).items():
            print(layout.field(f"{path}: {name:8}", "ok: " + ", ".join(f"{count:,} {what}" for what, count in counts.items())))
    return 0


def report(flags: argparse.Namespace) -> int:
    """Print the tables; write what was asked for. Raises UserError."""
    in_range("--skip", flags.skip, 0)
    whole = [Trace.load(path) for path in flags.paths]
    is_merged = any(len(trace.programs) > 1 for trace in whole)
    if is_merged and (len(whole) > 1 or flags.reference is not None):
        raise UserError(f"{', '.join(flags.paths)}: a trace of several programs is reported alone, and has each beside the others")
    parts = programs(whole[0]) if is_merged else whole
    names = [str(process_of(about)) for about in whole[0].programs] if is_merged else []
    paths = [f"{flags.paths[0]}, {name}" for name in names] or flags.paths
    chosen = [steps_of(path, part, flags, is_merged) for path, part in zip(paths, parts, strict=True)]
    reference = steps_of(flags.reference, Trace.load(flags.reference), flags)[0] if flags.reference is not None else None
    if reference and reference.workers != 1:
        raise UserError(f"--reference {flags.reference}: wanted a trace of one worker, got {reference.workers}")
    traces = [trace for trace, _ in chosen]
    comparison = Comparison.of(*traces, reference=reference, programs=names)
    notes = []
    for path, (trace, cold), found in zip(paths, chosen, comparison.found, strict=True):
        found["cold_runs"] = cold
        if cold:
            notes.append(f"{path}: too few runs to leave out the first {flags.skip}: {cold} of {len(trace.runs)} are cold")
    if any(trace.about.get("machine") != traces[0].about.get("machine") for trace in traces):
        notes.append("recorded on different machines: what differs is theirs too")
    results: Any = comparison.found
    tables = comparison.tables()
    if is_merged:
        try:
            of_node = node(whole[0])
        except ValueError as error:
            raise UserError(f"{flags.paths[0]}: {error}; merge it again") from None
        results = [of_node | {"programs": comparison.found}]
        tables = [*node_tables(of_node), *tables]
    if flags.json is not None:
        write_whole(flags.json, json.dumps(results, indent=1) + "\n")
    if flags.html is not None:
        title = f"{flags.paths[0]}: {', '.join(names)}" if is_merged else f"{flags.runs}s of {', '.join(flags.paths)}"
        page.write(whole if is_merged else traces, flags.html, "; ".join([title, *notes]), tables)
    for note in notes:
        print(f"note: {note}\n")
    print("\n\n".join(layout.to_text(table, layout.terminal_width(flags)) for table in tables))
    return 0


def steps_of(path: str, trace: Trace, flags: argparse.Namespace, or_all: bool = False) -> tuple[Trace, int]:
    """Return the runs asked for of a trace, and how many of them are cold. `or_all`: all runs, if there are none of that name.

    Raises UserError if there are none.
    """
    chosen = trace.select(flags.runs)
    if not len(chosen.runs) and or_all:
        chosen = trace
    if not len(chosen.runs):
        raise UserError(f"{path}: no runs of '{flags.runs}'{did_you_mean(flags.runs, dict.fromkeys(g.name for g in trace.graphs))}")
    if not len(chosen.records):
        raise UserError(f"{path}: {len(chosen.runs)} runs of '{flags.runs}' without a task on record; record them again with --trace")
    cold = 0
    if np.bincount(chosen.rank_of_run).max() > flags.skip:
        chosen = chosen.without_first(flags.skip)
    else:
        cold = int((chosen.runs["step"] < flags.skip).sum())
    if not (chosen.records["start_ns"] < chosen.records["stop_ns"]).any():
        raise UserError(f"{path}: {len(chosen.runs)} runs of '{flags.runs}' in which no task took any time; there is nothing to report")
    return chosen, cold


def merge(flags: argparse.Namespace) -> int:
    """Write one trace of several. Raises UserError."""
    files = {(Path(path) / TRACE if Path(path).is_dir() else Path(path)).resolve() for path in flags.paths}
    if len(flags.paths) < 2 or len(files) < len(flags.paths):
        raise UserError(f"{', '.join(flags.paths)}: wanted traces of at least two programs, each once")
    trace = of_programs({path: Trace.load(path) for path in flags.paths})
    print(f"merged {len(trace.programs)} programs: {', '.join(str(process_of(about)) for about in trace.programs)}")
    print(f"trace  {save(trace, flags.output)}")
    return 0


def convert(flags: argparse.Namespace) -> int:
    """Write the formats asked for. Raises UserError."""
    trace, folder = Trace.load(flags.path), Path(flags.path)
    folder = folder if folder.is_dir() else folder.parent
    for path in export(trace, flags.output or folder, flags.format, flags.arrows):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
