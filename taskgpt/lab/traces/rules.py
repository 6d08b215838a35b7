"""What the checkers of formats raise: a broken rule, with the file's name, whatever is wrong with the file."""

import csv
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskgpt.errors import UserError, shorten
from taskgpt.files import read_bytes


class RuleError(UserError):
    """A file breaks a rule of its format. The message says where, what was wanted and what was found."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn into a RuleError what code raises that trusts a file, or a part of it, to have the right form. Refuse pipes and devices."""
    try:
        if not stat.S_ISREG(kind := os.stat(path).st_mode) and not stat.S_ISDIR(kind):
            raise RuleError(f"{path}: wanted a file, got a pipe or a device; write it anew")
        yield
    except UserError:
        raise
    except OSError as error:  # those of Arrow have neither number nor file
        raise RuleError(f"{path}: cannot be read: {shorten(error.strerror or error)}") from None
    except MemoryError:
        raise RuleError(f"{path}: needs more memory than there is") from None
    except (
        *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
        *(RecursionError, NotImplementedError, struct.error, csv.Error),
    ) as error:
        raise RuleError(f"{path}: damaged, and read no further ({type(error).__name__}: {shorten(error)}); write it anew") from None


def whole(path: str | Path) -> bytes:
    """Return what is in a regular file, of whatever size. Raises UserError."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError):
        size = 0
    return read_bytes(path, size)
