"""Fuzzing of everything that reads a file: valid files are damaged, and a reader may answer only with the message that a person can use.

    python -m tests.fuzz                          # every reader, 1,000 inputs each
    python -m tests.fuzz data --examples 10000    # the readers of cases_data.py, 10,000 inputs each
    python -m tests.fuzz token_file --first 4711 --examples 1    # one input again, with its traceback

A *case* is a reader: how to make its valid files, and how to read them. To register one, append a `Case` to `CASES` in a file
`tests/fuzz/cases_ROOM.py`; nothing else is needed. test_fuzz.py runs a few inputs of each case with Hypothesis, the command above many,
each case in a process of its own with 1 GiB of address space.

    def make(folder: Path) -> None:            # called once; every file that it leaves may be damaged
        save_thing(folder / "thing.bin")

    CASES = (Case("thing", make, read=lambda folder: read_thing(folder / "thing.bin")),)

What is damaged, and how, is drawn by mutations.py: bytes of any file, the structure of `.json`, `.jsonl`, `.toml` and `.npz`, and what
stands in a file's place (nothing, a folder, a pipe, a device without end). A reader fails a case if it

- raises anything but `Case.allowed`, a MemoryError, a RecursionError and a warning included;
- does not come back within `SECONDS`;
- answers with a message that does not name the file, has several lines, or repeats so much of the file that nobody reads it.
"""

import os
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from taskgpt.errors import UserError

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # pyarrow's own reserves more address space than a case may have
SECONDS = 20  # of computing for one input, of which most take milliseconds: more is a hang
SECONDS_WAITING = 5 * SECONDS
LONGEST_MESSAGE = 1000  # characters


@dataclass(frozen=True)
class Case:
    """A reader of files."""

    name: str
    make: Callable[[Path], None]
    """Writes valid files into an empty folder."""
    read: Callable[[Path], object]
    """Reads what is in a folder, which is never the one of `make`, to the end: what is lazy must be consumed."""
    allowed: tuple[type[Exception], ...] = (UserError,)
    """What `read` may raise for a damaged file."""
    damage: str = "*"
    """Pattern of the files to damage, from the folder on."""
    names_file: bool = True
    """Whether each message must hold the name of a file of the case, or of their folder."""


class Hang(BaseException):
    """No answer in time. No Exception: a reader must not swallow it."""


@dataclass(frozen=True)
class Finding:
    """What a reader did wrong with an input."""

    kind: str
    """Type and place, by which equal findings are counted together."""
    detail: str


def groups() -> list[str]:
    """Return the ROOMs of the files cases_ROOM.py."""
    return sorted(path.stem.removeprefix("cases_") for path in Path(__file__).parent.glob("cases_*.py"))


def cases(group: str) -> tuple[Case, ...]:
    """Return the cases of a ROOM."""
    return import_module(f"{__package__}.cases_{group}").CASES


def files_of(case: Case) -> dict[str, bytes]:
    """Return the content of a case's valid files by their paths from the folder on."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        case.make(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lay_out(files: dict[str, "bytes | str"], folder: Path) -> None:
    """Write files into an empty folder; in place of a content may stand `folder`, `pipe`, `loop`, `endless` or `absent`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "loop":
            path.symlink_to(path.name)
        elif content == "endless":
            path.symlink_to("/dev/zero")


def judge(case: Case, files: "dict[str, bytes | str]") -> tuple[str, Finding | None]:
    """Read the files of an input in a folder of their own; return `read` or `refused`, and what was wrong with that, if anything was."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        lay_out(files, folder)
        with warnings.catch_warnings(), _deadline():
            warnings.simplefilter("error")
            case.read(folder)
        return "read", None
    except case.allowed as error:
        return "refused", _look_at_message(case, error, [folder.name, *(Path(name).name for name in files)])
    except (Exception, Hang) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "taskgpt" in frame.filename] or [None]
        where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames[-1] else ""
        return "failed", Finding(f"{type(error).__name__}{where}", "".join(traceback.format_exception(error))[-3000:])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _look_at_message(case: Case, error: Exception, names: list[str]) -> Finding | None:
    message, kind = str(error), traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(kind.filename).name}:{kind.lineno}"
    if case.names_file and not any(name in message for name in names):
        return Finding(f"message without a file name from {where}", message[:LONGEST_MESSAGE])
    if len(message) > LONGEST_MESSAGE:
        return Finding(f"message of {len(message) // 1000},000 characters or more from {where}", message[:LONGEST_MESSAGE])
    if len(message.splitlines()) > 1:
        return Finding(f"message of several lines from {where}", message)
    return None


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise Hang in what computes for SECONDS, or waits for much longer: on a busy machine, time passes without computing."""

    def stop(*_):
        raise Hang(f"no answer within {SECONDS} seconds")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, SECONDS_WAITING))
    before = [signal.signal(number, stop) for number, *_ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextmanager
def address_space(num_bytes: int) -> Iterator[None]:
    """Limit the process to what it has and so much more, where the system knows such a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
