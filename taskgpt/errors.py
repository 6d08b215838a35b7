"""The one exception for a mistake that the user can mend, and what every program does with exceptions, signals and its output.

A message says where, what was wanted, what was found, and what to do: `graphs/tiny.toml: unknown key 'row'; did you mean 'rows'?`

A program ends with exit code 0, or with one line on standard error: 2 for what the user or the system can mend, 1 for a task or a worker
that failed and for results that are not as they should be, 128 + n for a signal (130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP). A
reader of its output that leaves, `head` say, ends it quietly, with 1. A signal that was ignored when the program began, as under nohup,
stays ignored.
"""

import atexit
import difflib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAVE_SIGNALS = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []  # by which a batch system says that the end is near
LEAST_BYTES = 1 << 30  # of address space for libraries and compiling: imports take 0.45 GiB; with 0.7, llvmlite and OpenBLAS abort
CORE_BYTES = 48 << 20  # beside that, for each core: the buffer and the stack of a BLAS thread


class UserError(Exception):
    """A mistake in a flag, a file or a configuration."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the program as Ctrl-C does. number: of the signal."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or ("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"))
        self.number = number


def shorten(text: object, most: int = 200) -> str:
    """Return `str(text)`, what a message repeats of a user's own, on one line of at most `most` characters: longer, its middle is cut out.

    What a terminal would not print as it is, line ends and escapes, is written as Python writes it.
    """
    text = str(text)
    text = text if len(text) <= 2 * most else text[:most] + text[-most:]  # more than is shown, and not all of a huge one
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most // 2 - 3]}...{text[-(most // 2) :]}"


def did_you_mean(word: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """Return `; did you mean 'x'?` for the nearest word, known here or elsewhere, else the list of those known here."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(shorten(word), [*known, *elsewhere], n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"


# A program's life ----------------------------------------------------------------------------------------------------------------------


def begin_program() -> None:
    """Prepare a process that is one of our programs, before it imports what is large; `run_program` does the rest.

    From here on Ctrl-C is one line, also while modules are imported, where an exception would be a traceback, or be swallowed. Exits with
    code 2 if standard output is closed, for the next file that is opened would take its place; or if the address space is limited
    (ulimit -v) to less than the libraries need, which abort then.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        sys.exit(_complain("taskgpt", "error: standard output is closed; send it to /dev/null if nobody is to read it", 2))
    space, wanted = address_space_bytes(), LEAST_BYTES + CORE_BYTES * (os.cpu_count() or 1)
    if space < wanted:
        given = f"the address space is limited to {space / 2**20:.0f} MiB"
        sys.exit(_complain("taskgpt", f"error: {given}; taskgpt needs {wanted / 2**20:.0f} and a model's; raise it (ulimit -v)", 2))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    atexit.register(_flush)  # as the first, so that it runs last


def address_space_bytes() -> float:
    """Return how large this process may become (ulimit -v), infinity without a limit."""
    try:
        import resource
    except ImportError:  # Windows
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def run_program(name: str, run: Callable[[], int], failures: tuple[type[Exception], ...] = ()) -> int:
    """Return what `run` returns, or an exit code for what it raises, having said it in one line on standard error.

    `failures` are what 1 stands for. While `run` runs, signals raise Interrupted, so that `with` blocks are left in order. Anything else
    that is raised is a defect of the program, and passes with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sample may hold what the terminal's encoding does not
    try:
        with on_signals(_interrupt):
            code = run()
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        drop_output()
        return 1
    except (UserError, MemoryError, OSError) as error:
        return _complain(name, f"error: {drop_output() or _reason(error)}", 2)
    except failures as error:
        return _complain(name, f"failed: {error}", 1)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        return _complain(name, "error: the system lets this process start no more threads (ulimit -u, -v); choose fewer workers", 2)
    except KeyboardInterrupt as error:
        return _complain(name, str(error) or "interrupted", 128 + _signal_of(error))


@contextmanager
def on_signals(handler: Callable[[int, object], None], numbers: Iterable[int] = SIGNALS) -> Iterator[None]:
    """Call `handler(number, frame)` for some signals inside the block. In the main thread alone, where alone they arrive."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    before = {number: each for number, each in before.items() if each not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, each in before.items():
            signal.signal(number, each)


def _interrupt(number: int, _frame: object) -> None:
    raise Interrupted(number)


def _signal_of(error: BaseException | None) -> int:
    """Return the number of the signal behind an interrupt, which may have been raised again with another message."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error.number if error else signal.SIGINT


def _leave(number: int, _frame: object) -> None:
    os.write(2, b"taskgpt: interrupted\n")
    os._exit(128 + number)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{shorten(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error) or "out of memory"  # which comes without words


def drop_output() -> str:
    """Drop what standard output cannot write and still holds, which would be complained about at exit; return why, "" if it can write."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # no file behind it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return f"standard output: {error.strerror}"
    return ""


def _flush() -> None:
    """Write what is left, of --help say, which ends the program before `run_program`; that its reader has left is no news."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        os._exit(_complain("taskgpt", f"error: standard output: {error.strerror}", 2))


def _complain(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return code
