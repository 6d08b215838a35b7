"""Traces of several processes, ranks: made of what each recorded, by one clock; and taken apart again, where a rank's workers stand for
themselves.

trace = of_programs({"runs/a": Trace.load("runs/a"), "runs/b": Trace.load("runs/b")})     # that ran beside each other
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from taskgpt.errors import UserError
from taskgpt.lab.traces.network import EXCHANGE_TYPE, MESSAGE_TYPE, Rank
from taskgpt.lab.traces.process import process_of
from taskgpt.lab.traces.trace import Trace
from taskgpt.lab.traces.traced_graph import TracedGraph

_RUNS = 1 << 32  # numbers of runs for each rank
NOTED_TYPE = np.dtype([(name, np.int64) for name in ("peer", "is_sent", "bucket", "tag", "bytes", "begin_ns", "end_ns")])


@dataclass(frozen=True)
class Clock:
    """How a rank's clock is set against another: at some times of its own, so many ns have to be added. error_ns: how wrong that may be."""

    at_ns: tuple[int, ...] = (0,)
    add_ns: tuple[int, ...] = (0,)
    error_ns: int = 0

    def __call__(self, times_ns: np.ndarray) -> np.ndarray:
        return times_ns + np.rint(np.interp(times_ns, self.at_ns, self.add_ns)).astype(np.int64)


@dataclass(frozen=True)
class Part:
    """What a process recorded between two changes of the ranks, by its own clock.

    process: which of the names; peers: the process of each rank; generation: of which messages are. exchanges: EXCHANGE_TYPE, whose rank
    means nothing; noted: NOTED_TYPE, the messages as this side saw them, of which a peer and a tag say which is which.
    """

    process: int
    peers: Sequence[int]
    generation: int
    trace: Trace
    exchanges: np.ndarray
    noted: np.ndarray
    clock: Clock = field(default_factory=Clock)


def of_programs(traces: Mapping[str, Trace]) -> Trace:
    """Return one trace of programs that ran on one machine, of their traces by where these came from. Their times stay as they are.

    Raises UserError for what has no clock in common.
    """
    names: list[str] = []
    parts: list[Part] = []
    of: list[int] = []  # the program of each name
    abouts: list[dict[str, Any]] = []
    clocks = {}
    for where, trace in traces.items():
        for about in trace.programs:
            process = process_of(about)
            if process is None or not process.boot:
                raise UserError(f"{where}: does not say by which machine's clock its times are; record it again with --trace")
            clocks.setdefault(process.boot, where)
        if any(rank.clock_error_ns for rank in trace.ranks):
            raise UserError(f"{where}: has ranks on other machines; traces are merged of programs that ran on one")
        of += [len(abouts) + rank.program for rank in trace.ranks]
        first, each = len(names), split(trace)
        peers = [first + rank for rank in range(len(each))]
        names += [rank.name for rank in trace.ranks]
        parts += [
            Part(at, peers, first, part, part.exchanges, _noted(trace.messages, at - first)) for at, part in zip(peers, each, strict=True)
        ]
        abouts += [{name: value for name, value in about.items() if name != "ranks"} for about in trace.programs]
    if len(clocks) > 1:
        a, b, *_ = clocks.values()
        raise UserError(f"{b}: recorded on another machine than {a}, or after a restart of it: their times have no clock in common")
    found = merged(names, parts, {})
    ranks = [rank | {"program": program} for rank, program in zip(found.about["ranks"], of, strict=True)]
    about = {"programs": abouts, "ranks": ranks, "is_fork_join": all(each["is_fork_join"] for each in abouts)}
    trace = replace(found, about=found.about | about)
    try:
        trace.verify()
    except ValueError as error:
        raise UserError(f"{', '.join(traces)}: cannot be of programs beside each other ({error}); record them again") from None
    return trace


def merged(names: Sequence[str], parts: Sequence[Part], about: Mapping[str, Any]) -> Trace:
    """Return one trace of the processes of these names, each a rank of it, from their parts, in the order in which they came about.

    A message of which only one side is known is left out. One that seems to come before it was sent, as clocks are not exact, comes when it
    was sent.
    """
    graphs, places = [], {}
    of_rank: list[list[Trace]] = [[] for _ in names]
    for part in parts:
        trace = _by(part.clock, part.trace)
        number = np.array([places.setdefault(_key(graph), len(places)) for graph in trace.graphs], np.int64)
        for graph, place in zip(trace.graphs, number.tolist(), strict=True):
            if place == len(graphs):
                graphs.append(graph)
        before = of_rank[part.process]
        runs = trace.runs.copy()
        runs["graph"] = number[runs["graph"]]
        if before:
            runs["number"] += before[-1].runs["number"].max(initial=-1) + 2  # not right after each other
            runs["step"] += max(each.runs["step"].max(initial=-1) for each in before) + 1
        edges = {(int(number[a]), int(number[b])): pairs for (a, b), pairs in trace.edges.items()}
        before.append(replace(trace, runs=runs, edges=edges))
    chosen = [at for at, found in enumerate(of_rank) if found]
    workers = [max(each.workers for each in of_rank[at]) for at in chosen]
    errors = [max(part.clock.error_ns for part in parts if part.process == at) for at in chosen]
    ranks = [
        Rank(names[at], count, rank * _RUNS, error) for rank, (at, count, error) in enumerate(zip(chosen, workers, errors, strict=True))
    ]
    runs, records, others, first_run, first_worker, edges = [], [], [], 0, 0, {}
    for rank, at in zip(ranks, chosen, strict=True):
        for each in of_rank[at]:
            mine, rows, left_out = each.runs.copy(), each.records.copy(), each.others.copy()
            mine["number"] += rank.first_run
            rows["run"] += first_run
            for found in (rows, left_out):
                found["worker"] += first_worker
            first_run += len(mine)
            runs.append(mine)
            records.append(rows)
            others.append(left_out)
            edges |= each.edges
        first_worker += rank.workers
    rank_of = {process: rank for rank, process in enumerate(chosen)}
    every, left_out = (rows[np.argsort(rows["start_ns"], kind="stable")] for rows in map(np.concatenate, (records, others)))
    lines = dict.fromkeys(each.about["scheduler"] for found in of_rank for each in found)
    kind = {"is_fork_join": any(each.about["is_fork_join"] for found in of_rank for each in found)}
    ours = {"workers": sum(workers), "ranks": [asdict(rank) for rank in ranks]} | kind
    return Trace(
        {"scheduler": " / ".join(lines), **about, **ours},
        graphs,
        np.concatenate(runs),
        every,
        sum(part.trace.lost for part in parts),
        left_out,
        edges=edges,
        exchanges=_exchanges(parts, rank_of),
        messages=_messages(parts, rank_of),
    )


def _key(graph: TracedGraph) -> tuple:
    texts = graph.name, *graph.kernels, *graph.phases, *graph.calls
    return (*texts, *(getattr(graph, name).tobytes() for name in TracedGraph.ARRAYS))


def _by(clock: Clock, trace: Trace) -> Trace:
    """Return a trace by another clock."""
    runs, records, others = trace.runs.copy(), trace.records.copy(), trace.others.copy()
    for rows in (runs, records, others):
        for name in rows.dtype.names:
            if name.endswith("_ns"):
                rows[name] = clock(rows[name])
    return replace(trace, runs=runs, records=records, others=others)


def _exchanges(parts: Sequence[Part], rank_of: Mapping[int, int]) -> np.ndarray:
    found = [np.empty(0, EXCHANGE_TYPE)]
    for part in parts:
        rows = part.exchanges.copy()
        rows["rank"] = rank_of[part.process]
        for name in ("first_ns", "begin_ns", "end_ns"):
            rows[name] = part.clock(rows[name])
        found.append(rows)
    every = np.concatenate(found)
    return every[np.argsort(every["begin_ns"], kind="stable")]


def _messages(parts: Sequence[Part], rank_of: Mapping[int, int]) -> np.ndarray:
    """Return the messages of which both sides are known."""
    sides: tuple[dict, dict] = {}, {}  # by generation, processes and tag: when it was received, and when it was sent
    for part in parts:
        begin, end = (part.clock(part.noted[name]) for name in ("begin_ns", "end_ns"))
        for row, since, until in zip(part.noted.tolist(), begin.tolist(), end.tolist(), strict=True):
            peer, is_sent, bucket, tag, nbytes, *_ = row
            here, there = part.process, part.peers[peer]
            source, target = (here, there) if is_sent else (there, here)
            sides[is_sent][part.generation, source, target, bucket, tag] = nbytes, since, until
    received, sent = sides
    rows = []
    for key in sent.keys() & received.keys():
        _, source, target, bucket, _ = key
        (nbytes, send, done), (_, asked, come) = sent[key], received[key]
        come = max(come, send)
        rows.append((rank_of[source], rank_of[target], bucket, nbytes, send, done, min(asked, come), come))
    return np.array(sorted(rows, key=lambda row: (row[4:], row[:4])), MESSAGE_TYPE)


def _noted(messages: np.ndarray, rank: int) -> np.ndarray:
    """Return the messages of a trace as one of its ranks saw them."""
    tag = np.arange(len(messages))
    sides = [np.empty(0, NOTED_TYPE)]
    for is_sent, (own, peer, begin, end) in enumerate(
        (("target", "source", "asked_ns", "received_ns"), ("source", "target", "send_ns", "sent_ns"))
    ):
        is_mine = messages[own] == rank
        m, rows = messages[is_mine], np.zeros(is_mine.sum(), NOTED_TYPE)
        columns = {"peer": m[peer], "is_sent": is_sent, "bucket": m["bucket"], "tag": tag[is_mine], "bytes": m["bytes"]}
        for name, column in (columns | {"begin_ns": m[begin], "end_ns": m[end]}).items():
            rows[name] = column
        sides.append(rows)
    return np.concatenate(sides)


def programs(trace: Trace) -> list[Trace]:
    """Return the trace of each program; of one, the trace itself."""
    if len(trace.programs) == 1:
        return [trace]
    parts, found = split(trace), []
    for number, about in enumerate(trace.programs):
        ranks = [at for at, rank in enumerate(trace.ranks) if rank.program == number]
        if len(ranks) == 1:
            found.append(replace(parts[ranks[0]], about=parts[ranks[0]].about | about))
            continue
        peers = [rank - ranks[0] for rank in range(len(parts))]
        mine = [Part(peers[rank], peers, 0, parts[rank], parts[rank].exchanges, _noted(trace.messages, rank)) for rank in ranks]
        found.append(merged([trace.ranks[rank].name for rank in ranks], mine, about))
    return found


def split(trace: Trace) -> list[Trace]:
    """Return the trace of each rank; of one process, the trace itself. Places of runs and workers, and numbers of runs, count from 0."""
    ranks = trace.ranks
    if len(ranks) == 1:
        return [trace]
    of_run, of_worker = trace.rank_of_run, trace.rank_of_worker
    found, first_worker = [], 0
    for number, rank in enumerate(ranks):
        is_run = of_run == number
        place = np.cumsum(is_run) - 1
        records, others = (rows[of_worker[rows["worker"]] == number] for rows in (trace.records, trace.others))
        records["run"] = place[records["run"]]
        for rows in (records, others):
            rows["worker"] -= first_worker
        first_worker += rank.workers
        runs = trace.runs[is_run]
        runs["number"] -= rank.first_run
        about = {name: value for name, value in trace.programs[rank.program].items() if name != "ranks"} | {"workers": rank.workers}
        exchanges = trace.exchanges[trace.exchanges["rank"] == number].copy()
        exchanges["rank"] = 0
        found.append(Trace(about, trace.graphs, runs, records, 0, others, trace.edges, exchanges))
    return found
