"""The one exception for a mistake that the user can mend.

Programs print its message on one line and leave with exit code 2, without a traceback. A message says where, what was wanted, what was
found, and what to do: `graphs/tiny.toml: unknown key 'row'; did you mean 'rows'?`
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a flag, a file or a configuration."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known word, else the list of known words."""
    known = [str(k) for k in known]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"
