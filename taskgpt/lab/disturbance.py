"""What keeps measurements on this machine from being what it can do: other processes, a throttled container, the environment.

disturbance = Disturbance()
...                             # what is measured
for line in disturbance.notes(): print(line)
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

# Variables that have BLAS, or the compiled kernels, use less than the processor has.
HOLD_BACK = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT", "NUMBA_BOUNDSCHECK")
LEAST_SHARE = 0.1  # of the cores: less is what every machine does beside, and within the noise of what is measured
LEAST_SECONDS = 0.2  # less is too short for the clocks, which tick every 10 ms


class Clocks(NamedTuple):
    """Seconds: of the clock; all that cores of this process have worked, for anybody; that this program has; throttled."""

    now: float
    all_work: float
    own_work: float
    throttled: float


def read_clocks(cgroup: Path = Path("/sys/fs/cgroup")) -> Clocks:
    """Return the clocks of now, on the cores that this process may use. `cgroup`: of the container (version 2)."""
    cores = psutil.cpu_times(percpu=True)
    with contextlib.suppress(AttributeError, IndexError):  # another system; cores that were switched off
        cores = [cores[core] for core in os.sched_getaffinity(0)]
    me = psutil.Process()
    own = sum(_worked(process) for process in (me, *me.children(recursive=True)))
    throttled = 0.0
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
        throttled = int(found["throttled_usec"]) / 1e6
    return Clocks(time.monotonic(), sum(_busy(core) for core in cores), own, throttled)


def _busy(times) -> float:
    """Return the seconds that a core worked: guests are in user's, stolen ones worked for other machines."""
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _worked(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended; then its parent's children_* have it
        return 0.0
    return times.user + times.system + (times.children_user + times.children_system if process.pid == os.getpid() else 0.0)


@dataclass(frozen=True)
class Found:
    """What disturbed: cores that others used, the share of the time that this container was throttled, variables that hold back."""

    cores: int
    other_cores: float
    throttled: float
    variables: dict[str, str]

    def notes(self) -> list[str]:
        """Return a line for each thing that makes times longer than they need be; none on a quiet machine."""
        lines = []
        if self.other_cores > LEAST_SHARE * self.cores:
            lines.append(f"other processes use {self.other_cores:.1f} of the {self.cores} cores; alone, it would be faster")
        if self.throttled > LEAST_SHARE:
            lines.append(
                f"the container's CPU quota stopped its processes for {self.throttled:.0%} of the time; fewer workers may be faster"
            )
        if self.variables:
            lines.append(f"the environment holds back: {', '.join(f'{n}={value}' for n, value in self.variables.items())}; unset it")
        return lines


class Disturbance:
    """Watches from its making on. `clocks` and `environment` may be given in tests."""

    def __init__(self, clocks: Callable[[], Clocks] = read_clocks, environment: Mapping[str, str] = os.environ):
        self._clocks, self._environment = clocks, environment
        self._begin = clocks()

    def found(self, cores: int) -> Found:
        """Return what disturbed since the last call, or since the beginning, on so many cores."""
        begin, self._begin = self._begin, self._clocks()
        worked = Clocks(*(after - before for before, after in zip(begin, self._begin, strict=True)))
        variables = {name: self._environment[name] for name in HOLD_BACK if self._environment.get(name)}
        if worked.now < LEAST_SECONDS:
            return Found(cores, 0.0, 0.0, variables)
        others = max(0.0, worked.all_work - worked.own_work) / worked.now
        return Found(cores, min(others, cores), min(1.0, max(0.0, worked.throttled) / worked.now), variables)
