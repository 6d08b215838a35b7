"""Run a program of your own, and write what its schedulers did.

taskgpt run mine.py                               # as `python mine.py`
taskgpt run --trace runs/mine mine.py             # also write which task ran when, for Perfetto, Paraver, ovni
taskgpt run --trace runs/mine mine.py 100 --fast  # what follows the file's name is for it
taskgpt run --dashboard 8787 mine.py              # look at its tasks in Dask's dashboard while it runs
taskgpt trace report runs/mine --runs program --skip 0

What is written is of the schedulers that the program opens with `taskgpt.scheduler(...)`: the graphs that they run, and their programs,
`scheduler.program()`. Of several schedulers each has a folder of its own. A dashboard shows the runs and programs of one scheduler at a
time, each when it has ended.
"""

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from taskgpt import config
from taskgpt.config import SchedulerConfig
from taskgpt.errors import UserError, run_program, shorten
from taskgpt.lab import machine
from taskgpt.lab.traces.formats import save, verify_can_save
from taskgpt.lab.traces.trace import Traced, open_traced
from taskgpt.programs.arguments import Parser
from taskgpt.schedulers import Scheduler


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 1 if it ends with an exception, which is printed as Python prints it."""

    def run() -> int:
        p = Parser("taskgpt run", __doc__)
        p.add_argument("--trace", metavar="DIR", help="write what each worker did when, for Perfetto, Paraver, ovni and `taskgpt trace`")
        p.add_argument("--dashboard", metavar="[HOST:]PORT", help="serve Dask's dashboard there, with a page of ours; 0: any free port")
        p.add_argument("file", metavar="FILE", help="the program")
        p.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="what it is given on its command line")
        flags = p.parse_args(argv)
        if not os.path.isfile(flags.file):
            raise UserError(f"{shorten(flags.file)}: wanted a Python file, got {'a folder' if os.path.isdir(flags.file) else 'none'}")
        if flags.trace is None and flags.dashboard is None:
            return run_file(flags.file, flags.arguments)
        if flags.trace is not None:
            verify_can_save(flags.trace)
        command = " ".join(["taskgpt run", flags.file, *flags.arguments])
        opened: list[tuple[str, Traced]] = []

        def open_and_note(found: SchedulerConfig) -> Traced:
            traced = open_traced(found)
            if flags.dashboard is not None and not any(isinstance(each, Shown) and each.is_open for _, each in opened):
                traced = Shown(traced.scheduler, flags.dashboard, command)
            traced.keeps = flags.trace is not None
            opened.append((found.name, traced))
            return traced

        usual, config.opener = config.opener, open_and_note
        try:
            code = run_file(flags.file, flags.arguments)
        finally:
            config.opener = usual
        if flags.trace is not None:
            write(opened, flags.trace, command)
        return code

    return run_program("taskgpt run", run)


class Shown(Traced):
    """A scheduler that a dashboard shows while it is open."""

    def __init__(self, scheduler: Scheduler, address: str, command: str):
        """`address`: where to serve, `command`: what the page says that runs. Raises UserError as Dashboard does."""
        from taskgpt.lab.dashboard.dashboard import Dashboard  # here, as it takes half a second, and needs bokeh
        from taskgpt.lab.dashboard.live import Live

        self._dashboard = Dashboard(Live(scheduler.workers, command, trains=False), address)
        self._serving = ExitStack()
        self.is_open = False
        super().__init__(scheduler, self._dashboard.look)

    def __enter__(self) -> "Shown":
        super().__enter__()
        self._serving.enter_context(self._dashboard.serve(self.scheduler))
        self.is_open = True
        print(f"dashboard  {self._dashboard.url}", file=sys.stderr)
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_open = False
        with self._serving:
            super().__exit__(*exception)


def run_file(file: str, arguments: Sequence[str]) -> int:
    """Run a Python file as the main program; return its exit code."""
    argv, path = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [file, *arguments], os.path.dirname(os.path.abspath(file))
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


def write(opened: Sequence[tuple[str, Traced]], folder: str, command: str) -> None:
    """Write the traces of schedulers that ran something. Raises UserError if none did, or for a folder that cannot be written."""
    traces = [(name, traced.trace({"command": command, "machine": machine.describe()})) for name, traced in opened]
    traces = [(name, trace) for name, trace in traces if len(trace.runs)]
    if not traces:
        raise UserError("--trace: nothing to write: no scheduler that was opened with taskgpt.scheduler(...) ran anything")
    for number, (name, trace) in enumerate(traces, start=1):
        place = Path(folder) if len(traces) == 1 else Path(folder, f"{number}-{name}")
        verify_can_save(str(place))
        print(f"trace      {save(trace, place)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
