"""How many cores this process may use: the default number of workers, everywhere."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path


def usable_cores() -> int:
    """Return the number of cores that this process may use: not all of the machine under taskset, SLURM or a container.

    It is the least of: its affinity; the CPU quota of its control groups, rounded up; SLURM_CPUS_PER_TASK, which SLURM need not enforce;
    and, from Python 3.13 on, what -X cpu_count says. Dask's CPU_COUNT is the same but for SLURM, of which it does not know, and looks for
    quotas in fewer places. It is not asked, as importing Dask takes a quarter of a second.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), _quota_cores()]
    if hasattr(os, "process_cpu_count"):
        counts.append(os.process_cpu_count())
    if (slurm := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdecimal():
        counts.append(int(slurm))
    return min((count for count in counts if count), default=1)


@cache
def _quota_cores(root: Path = Path("/")) -> int:
    """Return the cores whose time this process' control groups (Linux; versions 1 and 2) leave to it, rounded up, or 0: no limit."""
    quotas = [quota for folder in _cpu_groups(root) if (quota := _quota_of(folder))]
    return math.ceil(min(quotas, default=0))


def _cpu_groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process' groups and of those around them, whose limits are limits here too."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (controllers, "cpu") if controllers else ("", "unified"):
            # In a container the name may be the host's: then only the mount itself is there, and it is the container's.
            top = root / "sys/fs/cgroup" / mount
            folder = top / group.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _quota_of(folder: Path) -> float:
    """Return the cores that a group's quota is worth, or 0: it has none."""
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()  # "max" is no number
        return int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(0, int(quota)) / int(period)
    return 0
