"""Which cores this process may use: how many, the default number of workers everywhere; which are free to bind to, and which are near."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path("/")


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


def own_cores() -> list[int]:
    """Return the numbers of the cores that this process may use: the first ones, where it has the time of fewer than it may run on."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return list(allowed)[: usable_cores()]


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


# Which of them -------------------------------------------------------------------------------------------------------------------------


def cores_to_bind(count: int, root: Path = ROOT) -> list[int]:
    """Return the usable cores in the order of their memory nodes (Linux): those that no other process of this user has bound a thread to,
    if there are `count` of them."""
    node_of, _ = _nodes(root)
    usable = sorted(os.sched_getaffinity(0), key=lambda core: (node_of.get(core, 0), core))
    held = _held_cores(root)
    free = [core for core in usable if core not in held]
    return free if len(free) >= count else usable


def near_first(cores: Sequence[int], root: Path = ROOT) -> np.ndarray:
    """Return, for each of these cores, the places of all in `cores`: its own, then the nearest, of equally near ones the next after it."""
    node_of, distance = _nodes(root)
    nodes = [node_of.get(core) for core in cores]
    count, places = len(cores), np.arange(len(cores))
    far = {node: np.array([distance.get((node, other), 0) for other in nodes], np.int64) for node in set(nodes)}
    return np.array([np.argsort(far[node] * count + (places - at) % count, kind="stable") for at, node in enumerate(nodes)], np.int64)


def _nodes(root: Path) -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """Return the memory node of each core, and the distance between nodes as the firmware says, 10 to itself; nothing where /sys is not."""
    folders = {int(folder.name[4:]): folder for folder in (root / "sys/devices/system/node").glob("node[0-9]*")}
    node_of: dict[int, int] = {}
    distance: dict[tuple[int, int], int] = {}
    for node, folder in sorted(folders.items()):
        with suppress(OSError, ValueError):
            node_of |= dict.fromkeys(_numbers((folder / "cpulist").read_text()), node)
            far = map(int, (folder / "distance").read_text().split())
            distance |= {(node, other): value for other, value in zip(sorted(folders), far, strict=False)}
    return node_of, distance


def _held_cores(root: Path) -> set[int]:
    """Return the cores to which a process of this user, but not this one, has bound a thread that could run elsewhere: it and no other."""
    held: set[int] = set()
    for process in (root / "proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, StopIteration):
            if int(process.name) == os.getpid() or process.stat().st_uid != os.getuid():
                continue
            whole = _allowed(process)
            threads = [_allowed(thread) for thread in (process / "task").iterdir()]
            held |= {core for thread in threads if len(thread) == 1 < len(whole) for core in thread}
    return held


def _allowed(task: Path) -> list[int]:
    """Return the cores on which a process or thread may run. Raises OSError if it is gone."""
    lines = (task / "status").read_text().splitlines()
    return _numbers(next(line for line in lines if line.startswith("Cpus_allowed_list:")).partition(":")[2])


def _numbers(text: str) -> list[int]:
    """Return the numbers of a list as Linux writes it: 0-3,8."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found += range(int(first), int(last or first) + 1)
    return found
