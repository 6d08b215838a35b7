"""A machine as the simulator knows it: sockets of equal cores, what these share, and what schedulers cost on them.

Machine.load("2x56")                         # lab/machines/2x56.toml
Machine.load("2x56:sockets=5,task_us=1")     # with changes
Machine.load("here")                         # this one, measured in a second or two

Overheads are microseconds. dask.threaded and distributed plan a whole graph before its first task begins, which takes so much a task of it
(`begin`); then one thread serves all workers: it hears that a task ended, and finds out what can begin, so much a task. What distributed
then has to say goes out in batches, so far apart (`batch`): a chain of short tasks waits for one at every link, long tasks hardly ever.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from taskgpt.config import parse_settings
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.files import fill, read_toml
from taskgpt.lab import machine as this
from taskgpt.lab.named import split_changes

MACHINES = Path(__file__).with_name("machines")
# Measured on two cores of an AMD EPYC (family 26), with empty tasks: Task Bench's patterns, 1 to 32 workers; of messages, with two ranks of
# a Dask cluster on hosts of network namespaces: `python -m tests.scaling`.
OVERHEADS_US = {
    "task_us": 0.3,
    "call_us": 2.2,
    "barrier_us": 30.0,
    "dask_begin_us": 9.0,
    "dask_task_us": 24.0,
    "distributed_begin_us": 100.0,
    "distributed_task_us": 650.0,
    "distributed_batch_us": 5500.0,
    "line_us": 0.06,
    "far_line_us": 0.13,
    "wake_us": 5.0,
    "slice_us": 3000.0,
    "switch_us": 100.0,
    "message_us": 270.0,
    "copy_mib_us": 700.0,
    "add_mib_us": 50.0,
}


MOST_SPEED, MOST_US = 1e9, 1e9  # far beyond any machine; and simulated times stay within 64 bits of ns


def _count():
    return field(metadata={"at_least": 1, "at_most": 4096})


def _speed():
    return field(metadata={"at_least": 1e-3, "at_most": MOST_SPEED})


def _overhead():
    return field(metadata={"at_least": 0, "at_most": MOST_US})


@dataclass(frozen=True)
class Machine:
    """What a machine file says. Bandwidth and cache are a socket's."""

    sockets: int = _count()
    cores_per_socket: int = _count()
    sgemm_gflops: float = _speed()  # of one core, the others idle, in fp32: task times measured elsewhere are scaled by it
    sgemm_busy_gflops: float = _speed()  # of one core, all of its socket busy: then clocks are lower. Never more than alone
    bandwidth_gbs: float = _speed()  # of one socket, all its cores streaming
    cache_mib: float = field(metadata={"at_least": 0, "at_most": MOST_SPEED})  # last-level cache of one socket
    task_us: float = _overhead()  # what the native scheduler adds to a task
    call_us: float = _overhead()  # what calling a kernel from Python adds, which all but the native scheduler do
    barrier_us: float = _overhead()  # what a fork and its barrier add to a parallel loop
    dask_begin_us: float = _overhead()  # dask.threaded: before a run begins, for each of its tasks
    dask_task_us: float = _overhead()  # dask.threaded: its thread's time for each task
    distributed_begin_us: float = _overhead()  # distributed, likewise
    distributed_task_us: float = _overhead()
    distributed_batch_us: float = _overhead()  # distributed: between two messages to the workers
    line_us: float = _overhead()  # until a core has a cache line that another one of its socket has written
    far_line_us: float = _overhead()  # the same between sockets
    wake_us: float = _overhead()  # until a thread that slept runs
    slice_us: float = _overhead()  # how long a thread runs before the system lets another one have its core that wants it, too
    switch_us: float = _overhead()  # what that costs, with the caches that are cold then
    message_us: float = _overhead()  # of a core, for a message between ranks, whatever its size
    copy_mib_us: float = _overhead()  # and for each MiB that it sends and receives at the same time
    add_mib_us: float = _overhead()  # and for each MiB of gradients that it adds to others

    def __post_init__(self):
        if self.sgemm_busy_gflops > self.sgemm_gflops:
            raise ValueError(f"sgemm_busy_gflops: wanted at most sgemm_gflops, {self.sgemm_gflops:.4g}, got {self.sgemm_busy_gflops:.4g}")

    @property
    def cores(self) -> int:
        return self.sockets * self.cores_per_socket

    @property
    def busy_speed(self) -> float:
        """How fast a core is when its whole socket is busy, against alone: at most 1."""
        return self.sgemm_busy_gflops / self.sgemm_gflops

    @classmethod
    def here(cls) -> Self:
        """Measure this machine, taken for one socket. Overheads are those measured on the author's."""
        cores = this.usable_cores()
        alone = _best(lambda: this.sgemm_gflops(1, seconds=0.1))
        together = _best(lambda: this.sgemm_gflops(cores, seconds=0.1)) / cores
        bandwidth = _best(lambda: this.bandwidth_gbs("update", cores, seconds=0.1))
        return cls(1, cores, alone, min(alone, together), bandwidth, this.cache_bytes() / 2**20 or 32.0, **OVERHEADS_US)

    @classmethod
    def load(cls, word: str) -> Self:
        """Return the machine `NAME[:KEY=VALUE,...]`: of machines/NAME.toml, of a .toml file by its path, or `here`. Raises UserError."""
        name, changes = split_changes(word)
        _, changed = parse_settings(changes)
        table = asdict(cls.here()) if name == "here" else _read(name)
        return fill(cls, {**table, **changed}, f"--machine {name}: ")

    def with_room_for(self, workers: int) -> Self:
        """Return this machine with as many sockets as it takes."""
        return replace(self, sockets=max(self.sockets, -(-workers // self.cores_per_socket)))


def _best(measure: Callable[[], float]) -> float:
    """Return the most of some rounds: what else runs on the machine can only take from it."""
    return max(measure() for _ in range(5))


def _read(name: str) -> dict:
    path = Path(name) if name.endswith(".toml") else MACHINES / f"{name}.toml"
    if not path.exists():
        known = ["here", *sorted(path.stem for path in MACHINES.glob("*.toml"))]
        raise UserError(f"--machine {shorten(name)}: no such machine{did_you_mean(name, known)}; or give a path that ends in .toml")
    return read_toml(path)
