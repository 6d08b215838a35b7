"""Work with the traces that `taskgpt train --trace DIR` writes.

python -m taskgpt.trace check runs/native                             # does every file keep the rules of its format?
python -m taskgpt.trace convert runs/native --format perfetto         # write a format anew
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from taskgpt.errors import run_program
from taskgpt.lab.formats import FORMATS, check, export
from taskgpt.lab.trace import Trace


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 1 for a trace that breaks a rule."""
    title, _, examples = __doc__.partition("\n\n")
    p = argparse.ArgumentParser("taskgpt trace", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, metavar="VERB")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        shown = "\n".join(line for line in examples.splitlines() if f" {name} " in line)
        verb = verbs.add_parser(name, help=help, description=help, epilog=shown, formatter_class=argparse.RawDescriptionHelpFormatter)
        verb.set_defaults(run=run)
        return verb

    checked = add("check", check_trace, "check files against the rules of their formats")
    checked.add_argument("paths", nargs="+", metavar="PATH", help="a folder that --trace wrote, or a file of it")
    converted = add("convert", convert, "write a trace in other formats")
    converted.add_argument("path", metavar="PATH", help="a folder that --trace wrote, or its trace.npz")
    converted.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help=f"default {' '.join(FORMATS)}")
    converted.add_argument("--output", metavar="DIR", help="where to (default: the same folder)")
    flags = p.parse_args(argv)
    return run_program("taskgpt.trace", lambda: flags.run(flags), (ValueError,))


def check_trace(flags: argparse.Namespace) -> int:
    """Print what every file holds. Raises ValueError for the first broken rule."""
    for path in flags.paths:
        for name, counts in check(path).items():
            print(f"{path}: {name:8} ok: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    return 0


def convert(flags: argparse.Namespace) -> int:
    """Write the formats asked for. Raises UserError or OSError."""
    trace, folder = Trace.load(flags.path), Path(flags.path)
    folder = folder if folder.is_dir() else folder.parent
    for path in export(trace, flags.output or folder, flags.format):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
