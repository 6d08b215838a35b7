"""The one exception for a mistake that the user can mend, and what every program does with exceptions.

A message says where, what was wanted, what was found, and what to do: `graphs/tiny.toml: unknown key 'row'; did you mean 'rows'?`
"""

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake in a flag, a file or a configuration."""


def shorten(text: object, most: int = 200) -> str:
    """Return `str(text)`, what a message repeats of a user's own, on one line of at most `most` characters: longer, its middle is cut out.

    What a terminal would not print as it is, line ends and escapes, is written as Python writes it.
    """
    text = str(text)
    text = text if len(text) <= most else f"{text[: most // 2 - 3]}...{text[-(most // 2) :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, else the list of known words."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(shorten(word), known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"


def run_program(name: str, run: Callable[[], int], failures: tuple[type[Exception], ...] = ()) -> int:
    """Return what `run` returns, or an exit code for what it raises, having said it in one line on standard error.

    2 for a user's mistake and for what the system refuses (files, memory), 1 for `failures`, 130 for Ctrl-C. Anything else is a defect of
    the program, and passes with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sample may hold what the terminal's encoding does not
    try:
        return run()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered would be reported at exit
        return 1
    except (UserError, MemoryError, OSError) as error:
        return _complain(name, f"error: {error}", 2)
    except failures as error:
        return _complain(name, f"failed: {error}", 1)
    except KeyboardInterrupt as error:
        return _complain(name, str(error) or "interrupted", 130)


def _complain(name: str, message: str, code: int) -> int:
    print(f"{name}: {message}", file=sys.stderr)
    return code
