"""List the programs that share cores, and who holds which.

taskgpt share                     # all shares of yours
taskgpt share node --live         # again every second, until Ctrl-C
taskgpt share node --json share.json

Prints, of each share, a row for each program: its process, cores now, the time of cores that it has had, weight and priority, and whether
it waits for a core, is stopped or dead; and a row for each core: which program and worker hold it, and for how long.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from taskgpt.errors import UserError, run_program
from taskgpt.files import verify_can_write, write_whole
from taskgpt.lab import layout
from taskgpt.lab.report import table_of
from taskgpt.programs.arguments import Parser, add_wide
from taskgpt.sharing.seen import share, shares

MEMBERS = {
    "process": ("pid", "d"),
    "program": ("program", ""),
    "cores": ("cores", "d"),
    "workers": ("workers", "d"),
    "core s": ("core_s", ".1f"),
    "weight": ("weight", "d"),
    "priority": ("priority", "d"),
    "state": ("state", ""),
}
CORES = {
    "core": ("core", "d"),
    "process": ("pid", "d"),
    "program": ("program", ""),
    "worker": ("worker", "d"),
    "for ms": ("held_ms", ".1f"),
}
PERIOD_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt share", __doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="of a share (default: all)")
    p.add_argument("--live", action="store_true", help="list them again every second, until Ctrl-C")
    p.add_argument("--json", metavar="FILE", help="write what was listed")
    add_wide(p)
    return run_program("taskgpt share", lambda: _list(p.parse_args(argv)))


def _list(flags: argparse.Namespace) -> int:
    if flags.json is not None:
        verify_can_write(flags.json)
    while True:
        found = _found(flags.names)
        text = "\n\n".join(_text(each, layout.terminal_width(flags)) for each in found) or "no program shares its cores"
        clear = "\x1b[H\x1b[2J" if flags.live and sys.stdout.isatty() else ""
        print(f"{clear}{text}", flush=True)
        if flags.json is not None:
            write_whole(flags.json, json.dumps(found, indent=1) + "\n")
        if not flags.live:
            return 2 if any("error" in each for each in found) else 0
        time.sleep(PERIOD_S)
        if not clear:
            print()


def _found(names: Sequence[str]) -> list[dict[str, Any]]:
    if not names:
        return shares()
    found = []
    for name in names:
        try:
            found.append(share(name))
        except FileNotFoundError:
            raise UserError(f"share {name}: no program of yours has joined it; `taskgpt share` lists those there are") from None
    return found


def _text(found: dict[str, Any], width: int | None) -> str:
    if "error" in found:
        return found["error"]
    cores = [{**each, "held_ms": None if each["pid"] is None else 1e3 * each["held_s"]} for each in found["cores"]]
    held = sum(each["pid"] is not None for each in cores)
    members = table_of(f"share {found['share']}: {held} of {len(cores)} cores held", MEMBERS, found["members"])
    return f"{layout.to_text(members, width)}\n\n{layout.to_text(table_of('', CORES, cores), width)}"


if __name__ == "__main__":
    sys.exit(main())
