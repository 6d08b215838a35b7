"""Draw the curves of training runs over each other: losses, norms, learning rates, speeds. A run may still go on.

taskgpt plot runs/a runs/b                                  # in the terminal, and a table
taskgpt plot runs/a runs/b --output curves.html             # a page whose values a pointer reads; or .png, .svg
taskgpt plot runs/a run.jsonl --only loss,lr --x tokens     # two of the charts, along the tokens trained on
taskgpt plot runs/a --smooth 100 --json curves.json         # a line that is the mean of 100 steps; the numbers
taskgpt plot runs/a --report run.html                       # the page of one run that train --report makes, from its log
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import UserError, did_you_mean, run_program, shorten
from taskgpt.files import atomic_file, verify_can_write, write_whole
from taskgpt.lab import layout, run_page
from taskgpt.lab.curves import page, picture, terminal
from taskgpt.lab.curves.panels import ALONG, LETTERS, METRICS, panels
from taskgpt.lab.curves.run_log import COLUMNS, VALIDATION_COLUMNS, RunLog, read_all
from taskgpt.lab.named import listed
from taskgpt.lab.report import table_of
from taskgpt.programs.arguments import Parser, add_wide, positive

WIDE = 160  # columns of a drawing, with --wide
KINDS = (".png", ".svg", ".html")
TABLE = {
    "run": ("run", ""),
    "steps": ("steps", ",d"),
    "train loss": ("train_loss", ".4f"),
    "best": ("best_train_loss", ".4f"),
    "at step": ("best_train_step", ",d"),
    "val loss": ("val_loss", ".4f"),
    "best val": ("best_val_loss", ".4f"),
    "after step": ("best_val_step", ",d"),
    "tok/s": ("tokens_per_s", ",.0f"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt plot", __doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", help="the folder of train --out, or a file that train --log wrote")
    p.add_argument("--only", default="", metavar="NAME,NAME", help=f"these charts alone: {', '.join(METRICS)}")
    p.add_argument("--x", choices=ALONG, default="step", help="what the charts go along; time is that of the steps (default step)")
    p.add_argument(
        "--smooth", type=positive, metavar="N", help="lines are means of the last N steps (default: a fiftieth of the longest run)"
    )
    p.add_argument("--output", metavar="FILE", help=f"write a picture or a page, {', '.join(KINDS)}, instead of drawing in the terminal")
    p.add_argument("--json", metavar="FILE", help="write the numbers")
    p.add_argument("--report", metavar="FILE.html", help="write the page of one run: losses, speed, samples, settings")
    add_wide(p)
    return run_program("taskgpt plot", lambda: plot(p.parse_args(argv)))


def plot(flags: argparse.Namespace) -> int:
    """Draw what was asked for, and print the table. Raises UserError."""
    metrics = listed([flags.only])
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"--only: unknown chart '{shorten(name)}'{did_you_mean(name, METRICS)}")
    kind = None if flags.output is None else Path(flags.output).suffix
    if kind is not None and kind not in KINDS:
        raise UserError(f"--output {shorten(flags.output)}: wanted a name that ends in {', '.join(KINDS)}")
    if flags.report is not None and len(flags.runs) > 1:
        raise UserError(f"--report: makes the page of one run, got {len(flags.runs)}; --output curves.html draws several")
    for path in filter(None, (flags.output, flags.json, flags.report)):
        verify_can_write(path)
    logs = read_all(flags.runs)
    found = panels(logs, metrics, flags.x, flags.smooth)
    rows = [numbers(log) for log in logs]
    title = ", ".join(log.name for log in logs) if len(logs) <= page.MOST_NAMED else f"{len(logs)} runs"
    notes = [note for log in logs for note in log.notes]
    if kind is None:
        print(f"{terminal.draw(found, layout.terminal_width(flags) or WIDE)}\n")
    elif kind == ".html":
        page.write(flags.output, title, found, table_of("", TABLE, rows), notes)
    elif kind == ".svg":
        write_whole(flags.output, picture.svg(title, found))
    else:
        with atomic_file(flags.output) as file:
            file.write(picture.png(title, found))
    if flags.json is not None:
        runs = [row | {"curves": curves(log)} for row, log in zip(rows, logs, strict=True)]
        write_whole(flags.json, json.dumps({"runs": runs}, allow_nan=False) + "\n")
    if flags.report is not None:
        run_page.write_of_log(flags.report, logs[0])
    lettered = [row | {"run": f"{letter} {row['run']}"} if len(logs) > 1 else row for letter, row in zip(LETTERS, rows, strict=False)]
    print(layout.to_text(table_of("", TABLE, lettered), layout.terminal_width(flags)))
    for note in notes:
        print(layout.field("note", note))
    for path in filter(None, (flags.output, flags.json, flags.report)):
        print(layout.field("wrote", path))
    return 0


def numbers(log: RunLog) -> dict[str, Any]:
    """Return a run in numbers, None for what the log does not know; steps are counted from 1."""
    train, val = log.loss.told() or {}, log.validation.told() or {}
    return {
        "run": log.name,
        "log": str(log.path),
        "steps": log.count,
        "train_loss": train.get("last"),
        "best_train_loss": train.get("best"),
        "best_train_step": train["best_step"] + 1 if train.get("best") is not None else None,
        "val_loss": val.get("last"),
        "best_val_loss": val.get("best"),
        "best_val_step": val.get("best_step"),
        "tokens_per_s": log.tokens_per_s,
    }


def curves(log: RunLog) -> dict[str, Any]:
    """Return the points of a run, not smoothed: of the steps, of `each` of them a mean, and of the validations."""
    found = {}
    for name, columns, points in (("steps", COLUMNS, log.steps), ("validations", VALIDATION_COLUMNS, log.validations)):
        values = {
            column: [each if np.isfinite(each) else None for each in row.tolist()]
            for column, row in zip(columns, points.means(), strict=True)
        }
        found[name] = {"each": points.each} | values
    return found


if __name__ == "__main__":
    sys.exit(main())
