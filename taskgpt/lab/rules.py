"""What the checkers of formats raise: a broken rule, with the file's name, whatever is wrong with the file."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RuleError(ValueError):
    """A file breaks a rule of its format. The message says where, what was wanted and what was found."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn into a RuleError what code raises that trusts a file, or a part of it, to have the right form."""
    try:
        yield
    except RuleError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        raise RuleError(f"{path}: damaged, and read no further ({type(error).__name__}: {error}); write it anew") from None
