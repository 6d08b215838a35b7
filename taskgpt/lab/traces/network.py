"""What a trace of several processes says beside its tasks: whose workers are whose, what was exchanged, and the messages that carried it.

A process of a trace is a rank: of one program that runs on a cluster, or of one of several programs that ran beside each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskgpt.files import fill
from taskgpt.lab.traces.process import process_of

WHATS = ("reduce", "reduce-own", "spread", "gather", "move")  # what an exchange does, by its number
# rank; bucket and turn: which exchange, and how often before; when its first and its last part were handed in, and when it was done; sent
EXCHANGE_TYPE = np.dtype([(name, np.int64) for name in ("rank", "bucket", "turn", "what", "first_ns", "begin_ns", "end_ns", "bytes")])
# bucket: -1 of none. send, sent: while the source sent it; asked, received: while the target waited for it
MESSAGE_TYPE = np.dtype(
    [(name, np.int64) for name in ("source", "target", "bucket", "bytes", "send_ns", "sent_ns", "asked_ns", "received_ns")]
)


@dataclass(frozen=True)
class Rank:
    """A process of a trace. Its workers come after those of the ranks before it; numbers of its runs count from `first_run`.

    clock_error_ns: how wrong its times may be, against those of the others. program: which of the trace's programs it is of; only ranks of
    one program exchange anything.
    """

    name: str
    workers: int = field(metadata={"at_least": 1, "at_most": 4096})
    first_run: int = field(metadata={"at_least": 0, "at_most": 2**53})
    clock_error_ns: int = field(default=0, metadata={"at_least": 0, "at_most": 2**53})
    program: int = field(default=0, metadata={"at_least": 0, "at_most": 2**20})


@dataclass(frozen=True)
class _Ranks:
    ranks: list[Rank]


def ranks_of(about: dict[str, Any]) -> list[Rank]:
    """Return the ranks of a trace; if it knows of none, one for all that there is, named as its process, or "". Raises UserError."""
    found = fill(_Ranks, {"ranks": about["ranks"]}, "about.").ranks if about.get("ranks") else []
    return found or [Rank(str(process_of(about) or ""), int(about["workers"]), 0)]


def verify(ranks: Sequence[Rank], programs: int, workers: int, exchanges: np.ndarray, messages: np.ndarray) -> None:
    """Raise ValueError, saying where, for what cannot be."""
    of = [rank.program for rank in ranks]
    if of[0] or of[-1] != programs - 1 or not np.isin(np.diff(of), (0, 1)).all():
        raise ValueError(f"ranks: wanted those of {programs} programs one after the other, got programs {of}")
    if sum(rank.workers for rank in ranks) != workers:
        raise ValueError(f"ranks: wanted {workers} workers together, got {[rank.workers for rank in ranks]}")
    if ranks[0].first_run or (np.diff([rank.first_run for rank in ranks]) <= 0).any():
        raise ValueError("ranks: wanted runs counted from 0, and from a higher number for each rank")
    if exchanges.dtype != EXCHANGE_TYPE or messages.dtype != MESSAGE_TYPE:
        raise ValueError("exchanges or messages have other fields")
    for what, rows, limits, orders in (
        ("exchange", exchanges, {"rank": len(ranks), "what": len(WHATS)}, [("first_ns", "begin_ns", "end_ns")]),
        (
            "message",
            messages,
            {"source": len(ranks), "target": len(ranks)},
            [("send_ns", "sent_ns"), ("asked_ns", "received_ns"), ("send_ns", "received_ns")],
        ),
    ):
        wrong = np.zeros(len(rows), bool)
        for name in rows.dtype.names:
            wrong |= (rows[name] < (-1 if name == "bucket" else 0)) | (rows[name] >= limits.get(name, 2**62))
        for order in orders:
            wrong |= (np.diff(np.stack([rows[name] for name in order]), axis=0) < 0).any(axis=0)
        if wrong.any():
            raise ValueError(f"{what} {wrong.argmax()}: wanted ranks that there are, and times in order, got {rows[wrong.argmax()]}")


def lanes(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return for each interval the number of a row in which none overlap, the lowest that is free."""
    found, free = np.zeros(len(begin), np.int64), []
    for at in np.argsort(begin, kind="stable").tolist():
        lane = next((number for number, until in enumerate(free) if until <= begin[at]), len(free))
        free[lane : lane + 1] = [end[at]]
        found[at] = lane
    return found
