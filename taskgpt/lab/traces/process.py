"""Which process a trace is of: its number and program, the share that it took part in, its machine and the cores that it may use there."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskgpt.files import fill
from taskgpt.schedulers.cores import own_cores
from taskgpt.sharing.liveness import own_title

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Process:
    """program: for people, its file's name and verb. share: the name of the share whose cores it took, "" for none.

    boot: tells machines, and the times that they were started, apart, and so whose clock is whose; "" where there is no such thing.
    """

    pid: int = field(metadata={"at_least": 1, "at_most": 2**31})
    program: str
    share: str
    boot: str
    cores: list[int]

    def __str__(self) -> str:
        return f"{self.program} {self.pid}"


def this_process(share: str) -> Process:
    return Process(os.getpid(), own_title(), share, boot_id(), own_cores())


def process_of(about: dict[str, Any]) -> Process | None:
    """Return the process that `about` of a trace names, None if it names none. Raises UserError for what is none."""
    return fill(_About, {"process": about["process"]}, "about.").process if "process" in about else None


def cores_of(abouts: Iterable[dict[str, Any]]) -> int:
    """Return how many cores these processes may use together, 0 if nothing is known of one of them."""
    processes = [process_of(about) for about in abouts]
    return len({core for each in processes if each for core in each.cores}) if all(processes) else 0


def boot_id() -> str:
    """Return what tells machines, and the times that they were started, apart; "" where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class _About:
    process: Process
