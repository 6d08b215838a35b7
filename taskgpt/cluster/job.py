"""What a driver tells the ranks of a generation, and what they tell it."""

from dataclasses import dataclass, field
from typing import Any

from taskgpt.cluster.kept import Held
from taskgpt.config import GraphConfig
from taskgpt.gpt2.checkpoints.resumable import About

END = "end"  # the offer of what a rank has at its end: its state, if it is whole, and what was recorded


@dataclass(frozen=True)
class Job:
    """One generation of a training run.

    run, generation: which; addresses: of the workers, by rank; flags: the command's, as a dict; micro_batches: of a step, of all ranks;
    until: after how many steps this generation ends; kept: the state that it begins with, which a rank has, or None for the initial one;
    workers: of each rank's native scheduler; is_staged: True if ranks are stages of one model, not replicas; is_watched: True if each
    is to say how it is; hang_s: how long a task may take; lease_s: how long a worker keeps a state for a driver that is silent; mpi: each
    rank's number in MPI, if that carries messages; record: tasks that each native worker records; saved_step: of the newest checkpoint,
    or where the run begins; unsaved_s: seconds since then.
    """

    run: str
    generation: int
    addresses: tuple[str, ...]
    flags: dict[str, Any]
    graph: GraphConfig
    micro_batches: int
    until: int
    kept: Held | None
    workers: tuple[int, ...]
    bucket_bytes: int
    as_bf16: bool
    is_sharded: bool
    is_staged: bool
    is_watched: bool
    timeout_s: float
    hang_s: float
    lease_s: float
    mpi: tuple[int, ...]
    record: int
    best_val_loss: float
    saved_step: int
    unsaved_s: float

    @property
    def count(self) -> int:
        return len(self.addresses)

    @property
    def is_in_parts(self) -> bool:
        """True if no rank has the whole state: what a lost one had can only come from a checkpoint."""
        return self.is_staged or (self.is_sharded and self.count > 1)

    @property
    def topic(self) -> str:
        """Of the events by which ranks tell the driver something."""
        return f"taskgpt-{self.run}"

    def offer_of(self, what: object) -> str:
        """Return the name of what a rank offers: a checkpoint, by its step, or END."""
        return f"{self.generation} {what}"


@dataclass(frozen=True)
class Ended:
    """How a rank's part of a generation ended.

    why: "" as agreed, otherwise which rank was lost, and how. step: how many steps are done. The others are of what it trained: seconds of
    each step, sha256 of the parameters, bytes that it sent and received, and of its exchanges by step: seconds that they took, and seconds
    in which nothing but them was left to do; of a stage, the seconds of its tasks.
    traced: sizes of what is offered of its trace.
    """

    rank: int
    step: int
    why: str = ""
    diverged: str = ""
    asked: str = ""
    sha256: str = ""
    memory_bytes: int = 0
    gflop_per_step: float = 0.0
    tasks_per_step: int = 0
    seconds: tuple[float, ...] = ()
    sent_bytes: int = 0
    payload_bytes: int = 0
    network_s: tuple[float, ...] = ()
    exposed_s: tuple[float, ...] = ()
    busy_s: tuple[float, ...] = ()
    traced: tuple[int, ...] = ()
    about: About | None = None
    extra: dict[str, Any] = field(default_factory=dict)
