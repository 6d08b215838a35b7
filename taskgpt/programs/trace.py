"""Work with the traces that `taskgpt train --trace DIR` writes.

taskgpt trace check runs/native                             # does every file keep the rules of its format?
taskgpt trace report runs/native                            # efficiencies, idle time by cause, kernels, the longest path
taskgpt trace report runs/loops runs/native --html page.html   # beside each other; and a timeline of both to zoom
taskgpt trace convert runs/native --format perfetto --arrows   # write a format anew, with dependencies as arrows
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from taskgpt.errors import UserError, did_you_mean, run_program
from taskgpt.files import write_whole
from taskgpt.lab import layout
from taskgpt.lab.report import in_range
from taskgpt.lab.traces import page
from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.formats import FORMATS, USUAL, check, export
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
    reported.add_argument("--runs", default="training step", metavar="NAME", help="which graph's runs (default 'training step')")
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
    traces = [steps_of(path, flags) for path in flags.paths]
    reference = steps_of(flags.reference, flags) if flags.reference is not None else None
    if reference and reference.workers != 1:
        raise UserError(f"--reference {flags.reference}: wanted a trace of one worker, got {reference.workers}")
    comparison = Comparison.of(*traces, reference=reference)
    notes = []
    for path, trace, found in zip(flags.paths, traces, comparison.found, strict=True):
        found["cold_runs"] = int((trace.runs["step"] < flags.skip).sum())
        if found["cold_runs"]:
            notes.append(f"{path}: too few runs to leave out the first {flags.skip}: {found['cold_runs']} of {len(trace.runs)} are cold")
    if any(trace.about.get("machine") != traces[0].about.get("machine") for trace in traces):
        notes.append("recorded on different machines: what differs is theirs too")
    if flags.json is not None:
        write_whole(flags.json, json.dumps(comparison.found, indent=1) + "\n")
    if flags.html is not None:
        title = f"{flags.runs}s of {', '.join(flags.paths)}"
        page.write(traces, flags.html, "; ".join([title, *notes]), comparison.tables())
    for note in notes:
        print(f"note: {note}\n")
    print(comparison.text(layout.terminal_width(flags)))
    return 0


def steps_of(path: str, flags: argparse.Namespace) -> Trace:
    """Return the runs asked for of a trace. Raises UserError if there are none."""
    trace = Trace.load(path)
    chosen = trace.select(flags.runs)
    if not len(chosen.runs):
        raise UserError(f"{path}: no runs of '{flags.runs}'{did_you_mean(flags.runs, dict.fromkeys(g.name for g in trace.graphs))}")
    if not len(chosen.records):
        raise UserError(f"{path}: {len(chosen.runs)} runs of '{flags.runs}' without a task on record; record them again with --trace")
    chosen = chosen.without_first(flags.skip) if len(chosen.runs) > flags.skip else chosen
    if not (chosen.records["start_ns"] < chosen.records["stop_ns"]).any():
        raise UserError(f"{path}: {len(chosen.runs)} runs of '{flags.runs}' in which no task took any time; there is nothing to report")
    return chosen


def convert(flags: argparse.Namespace) -> int:
    """Write the formats asked for. Raises UserError."""
    trace, folder = Trace.load(flags.path), Path(flags.path)
    folder = folder if folder.is_dir() else folder.parent
    for path in export(trace, flags.output or folder, flags.format, flags.arrows):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
