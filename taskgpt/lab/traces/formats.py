"""The formats that a trace is written in, and the checkers of each."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taskgpt.errors import UserError
from taskgpt.lab.traces import ovni, ovni_check, paraver, perfetto, table
from taskgpt.lab.traces.rules import RuleError
from taskgpt.lab.traces.trace import Trace

TRACE = "trace.npz"
FORMATS = {  # how to write it, how to check it, and the name of what is written
    "perfetto": (perfetto.write, perfetto.check, "perfetto.json"),
    "paraver": (paraver.write, paraver.check, "paraver.prv"),
    "ovni": (ovni.write, ovni_check.check, "ovni"),
    "csv": (table.write_csv, table.check_csv, "csv"),
    "parquet": (table.write_parquet, table.check_parquet, "parquet"),
}
USUAL = ("perfetto", "paraver", "ovni", "csv")


def verify_can_save(folder: str) -> None:
    """Make the folder. Raises UserError if nothing can be written there: better before the run than after it."""
    if Path(folder).is_file():
        raise UserError(f"--trace {folder}: wanted a folder, got a file; choose another name")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--trace {folder}: cannot make this folder: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--trace {folder}: cannot write here; choose another folder")


def folder_name(words: str) -> str:
    """Return a name for the folder of a trace, of words of the command line, which may be paths: it leads nowhere else."""
    return re.sub(r"[^\w.=-]+", "_", words)


def has_trace(folder: str | Path) -> bool:
    """Return True if a trace was saved into a folder."""
    return (Path(folder) / TRACE).exists()


def save(trace: Trace, folder: str | Path) -> str:
    """Write the trace and its usual formats into a folder; return a line that says so. Raises UserError."""
    with _writing(folder):
        trace.save(Path(folder) / TRACE)
    files = [TRACE, *(path.name for path in export(trace, folder))]
    return f"{len(trace.records):,} tasks of {len(trace.runs)} runs in {folder}: {', '.join(files)}"


def export(trace: Trace, folder: str | Path, formats: Iterable[str] = USUAL, arrows: bool = False) -> list[Path]:
    """Write the trace in these formats into a folder; return what was written. `arrows`: Perfetto's too has the dependencies.

    Raises UserError if the folder cannot be written, or if a format needs a package that is missing.
    """
    paths = []
    with _writing(folder):
        for name in formats:
            write, _, file = FORMATS[name]
            paths.append(Path(folder) / file)
            write(trace, paths[-1], **({"arrows": True} if arrows and name == "perfetto" else {}))
    return paths


@contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    """Make the folder; what the system refuses, a full disk say, becomes a message that names it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write the trace here: {error.strerror or error}; make room, or choose another folder") from None


def check(path: str | Path) -> dict[str, dict[str, int]]:
    """Check every format found in a folder, or one format's file or folder, against its rules; return what each holds.

    Raises RuleError, which says where, what was wanted and what was found, also if what a folder holds has not the same number of
    tasks; UserError if there is nothing to check.
    """
    files = [TRACE, *(file for *_, file in FORMATS.values())]
    is_whole = any((Path(path) / file).exists() for file in files)
    folder, only = (Path(path), None) if is_whole else (Path(path).parent, Path(path).name)
    found = {}
    if only in (None, TRACE) and (folder / TRACE).exists():
        trace = Trace.load(folder / TRACE)
        found["trace"] = {"runs": len(trace.runs), "tasks": len(trace.records), "workers": trace.workers, "lost": trace.lost}
    for name, (_, check_format, file) in FORMATS.items():
        if only in (None, file) and (folder / file).exists():
            found[name] = check_format(folder / file)
            first = next(iter(found))
            if (wanted := found[first]["tasks"]) != (got := found[name]["tasks"]):
                raise RuleError(f"{folder / file}: wanted {wanted:,} tasks, as {first} has, got {got:,}; convert the trace again")
    if not found:
        raise UserError(f"{path}: no trace here; wanted a folder that --trace wrote, or a file of it: {', '.join(files)}")
    return found
