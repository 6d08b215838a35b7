"""Whether a process still lives, and whether it is stopped, as Linux says in /proc/PID/stat; and what others are told of this one."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

_STATE, _STARTED = 0, 19  # fields behind the name, which may have spaces and brackets in it


class Seen(NamedTuple):
    """`started`: when the process began, in ticks since the machine did: no other process has the same number and start."""

    started: int
    is_stopped: bool


def look(pid: int) -> Seen | None:
    """Return what a process is like, None if there is none, or one that has ended and that nobody has asked about."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        state, started = fields[_STATE], int(fields[_STARTED])
    except (OSError, ValueError, IndexError):
        return None
    return None if state in "ZXx" else Seen(started, state in "Tt")


def own_title() -> str:
    """Return what this process is, for people: its program and verb."""
    file = Path(sys.argv[0] if sys.argv and sys.argv[0] else "python")
    words = [file.parent.name if file.name == "__main__.py" else file.name, *sys.argv[1:2]]
    return " ".join(word for word in words if not word.startswith("-")) or "python"


def own_start() -> int:
    """Return when this process began. Raises OSError where there is no /proc."""
    seen = look(os.getpid())
    if seen is None:
        raise OSError("/proc does not say when this process began")
    return seen.started
