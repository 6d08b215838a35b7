"""A run as data: which task ran when, on which worker, the same for every scheduler. Kept in one file, from which all formats are made.

    with traced("native", workers=2) as scheduler:     # as taskgpt.scheduler, and remembers what it does
        ...
    trace = scheduler.trace()
    trace.save("runs/native/trace.npz")
    trace = Trace.load("runs/native/trace.npz")

Times are nanoseconds of CLOCK_MONOTONIC, the same in all processes of a machine. A run is one pass through a graph: a step of training, a
batch of validation, a token of a sample. Its step counts the runs of graphs of that name, its number all runs of the scheduler. Runs may
overlap: then tasks of a run wait for those of the run before that they depend on, and for no others.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taskgpt.config import SchedulerConfig, load_scheduler
from taskgpt.errors import UserError, shorten
from taskgpt.files import fill, replacing
from taskgpt.lab.traces import network, trace_file
from taskgpt.lab.traces.network import EXCHANGE_TYPE, MESSAGE_TYPE, Rank, ranks_of
from taskgpt.lab.traces.process import Process, process_of, this_process
from taskgpt.lab.traces.rules import whole
from taskgpt.lab.traces.traced_graph import LARGEST, TracedGraph
from taskgpt.schedulers import Scheduler, open_scheduler
from taskgpt.schedulers.records import RECORD_TYPE
from taskgpt.schedulers.repetition import run_while
from taskgpt.tasks import Graph, Tile

VERSION = 4  # 1 had neither numbers of runs nor edges between them, 2 no ranks, 3 not several programs
RECORD = 1_000_000  # for schedulers' setting `record`: what is not used takes no memory
RUN_TYPE = np.dtype([(name, np.int64) for name in ("graph", "step", "begin_ns", "end_ns", "number")])
_RUN_TYPE_1 = np.dtype(RUN_TYPE.descr[:-1])
_MOST_WORKERS = 4096  # of a trace with fewer records than that
_TYPES = (np.dtype(np.uint8), np.dtype(np.int64), RECORD_TYPE, RUN_TYPE, _RUN_TYPE_1, EXCHANGE_TYPE, MESSAGE_TYPE)


@dataclass(frozen=True, eq=False)
class Trace:
    """The tasks of a number of runs.

    about: what JSON can say of the run; at least scheduler (a line), workers, is_fork_join, machine, process. graphs: what ran. runs:
    RUN_TYPE, in order; graph is an index into graphs. records: schedulers' RECORD_TYPE by start time; run is an index into runs. lost:
    tasks that found no room for a record. others: records of runs that were left out, whose run means nothing: workers were busy then, not
    idle.
    edges[a, b]: rows (task of graph a, task of graph b that waits for it) where a run of b comes right after one of a. Of pairs that are
    not there nothing is known, and all tasks of b may wait for all of a.
    exchanges, messages: EXCHANGE_TYPE and MESSAGE_TYPE, where there are several ranks: processes that about's `ranks` names (network.py).
    Where these are of several programs, about's `programs` is what is known of each, as `about` of its own trace said.
    """

    about: dict[str, Any]
    graphs: list[TracedGraph]
    runs: np.ndarray
    records: np.ndarray
    lost: int = 0
    others: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD_TYPE))
    edges: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    exchanges: np.ndarray = field(default_factory=lambda: np.empty(0, EXCHANGE_TYPE))
    messages: np.ndarray = field(default_factory=lambda: np.empty(0, MESSAGE_TYPE))

    @property
    def workers(self) -> int:
        """Of all ranks."""
        return int(self.about["workers"])

    @property
    def ranks(self) -> list[Rank]:
        """One, if only one process ran it."""
        return ranks_of(self.about)

    @property
    def programs(self) -> list[dict[str, Any]]:
        """What is known of each program: `about` itself, if there is one."""
        return self.about.get("programs") or [self.about]

    @property
    def rank_of_run(self) -> np.ndarray:
        return np.searchsorted([rank.first_run for rank in self.ranks], self.runs["number"], side="right") - 1

    @property
    def rank_of_worker(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.ranks)), [rank.workers for rank in self.ranks])

    @property
    def begin_ns(self) -> int:
        """When the first run began."""
        return int(self.runs["begin_ns"].min(initial=np.iinfo(np.int64).max)) if len(self.runs) else 0

    @property
    def end_ns(self) -> int:
        return int(max(self.runs["end_ns"].max(initial=0), self.records["stop_ns"].max(initial=0)))

    def column(self, name: str) -> np.ndarray:
        """Return for each record what TracedGraph's array of that name says of its task. Kernels and phases count through `names`."""
        found = np.zeros(len(self.records), np.int64)
        graph_of = self.runs["graph"][self.records["run"]]
        known = {word: at for at, word in enumerate(self.names(name))} if name in ("kernel", "phase") else {}
        for number in np.unique(graph_of).tolist():
            mine, graph = graph_of == number, self.graphs[number]
            values = getattr(graph, name)
            if known:
                values = np.array([known[word] for word in getattr(graph, name + "s")], np.int64)[values]
            found[mine] = values[self.records["task"][mine]]
        return found

    def names(self, column: str) -> list[str]:
        """Return the names of all kernels, or phases, of all graphs."""
        return list(dict.fromkeys(word for graph in self.graphs for word in getattr(graph, column + "s")))

    def select(self, name: str) -> "Trace":
        """Return the runs of graphs of that name alone: `training`, say."""
        return self._only(np.array([self.graphs[g].name == name for g in self.runs["graph"]], bool))

    def without_first(self, count: int) -> "Trace":
        """Return the trace without the first runs, of each rank."""
        rank = self.rank_of_run  # in order, as numbers are
        return self._only(np.arange(len(self.runs)) - np.searchsorted(rank, rank) >= count)

    def _only(self, chosen: np.ndarray) -> "Trace":
        """Return the chosen runs, counted anew."""
        number = np.cumsum(chosen) - 1
        is_in = chosen[self.records["run"]]
        records = self.records[is_in].copy()
        records["run"] = number[records["run"]]
        others = np.concatenate([self.others, self.records[~is_in]])
        others = others[np.argsort(others["start_ns"], kind="stable")]
        return replace(self, runs=self.runs[chosen], records=records, others=others)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        with replacing(path) as file:
            self.put(file)

    def put(self, file: BinaryIO) -> None:
        """Write what `save` writes. Raises OSError."""
        texts = {"about": json.dumps(self.about), "calls": json.dumps([graph.calls for graph in self.graphs])}
        heads = [{"name": g.name, "kernels": g.kernels, "phases": g.phases} for g in self.graphs]
        texts["head"] = json.dumps({"taskgpt_trace": VERSION, "lost": self.lost, "graphs": heads, "edges": list(self.edges)})
        arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
        arrays |= {name: getattr(self, name) for name in ("runs", "records", "others", "exchanges", "messages")}
        arrays |= {f"{name}-{at}": getattr(graph, name) for at, graph in enumerate(self.graphs) for name in TracedGraph.ARRAYS}
        arrays |= {f"edges-{at}": edges.ravel() for at, edges in enumerate(self.edges.values())}
        np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read the file, or `trace.npz` in the folder, of that name. Raises UserError if it is no trace, or a damaged one."""
        file = Path(path) / "trace.npz" if Path(path).is_dir() else Path(path)
        try:
            data = whole(file)
        except UserError as error:
            raise UserError(f"{error}; wanted a trace, as `taskgpt train --trace DIR` writes it") from None
        return cls.parse(data, str(file))

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Trace":
        """Read what `put` has written. Raises UserError, which begins with `where`."""
        try:
            trace = cls._from(trace_file.unpacked(data, _TYPES))
            trace.verify()
        except (ValueError, UserError, KeyError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{where}: no trace, or a damaged one ({what}); record it again with --trace") from None
        except MemoryError:
            raise UserError(f"{where}: a trace that needs more memory than there is") from None
        return trace

    @classmethod
    def _from(cls, found: dict[str, np.ndarray]) -> "Trace":
        """Return what the arrays of a file say. Raises ValueError, UserError without the file's name, and KeyError."""
        head, about, calls = (trace_file.parsed(found[name]) for name in ("head", "about", "calls"))
        version = head.get("taskgpt_trace") if isinstance(head, dict) else None
        if version not in range(1, VERSION + 1):
            raise ValueError(f"of version {shorten(version)}, and this taskgpt reads 1 to {VERSION}")
        head, calls = fill(_Head, head, "head."), fill(_Calls, {"calls": calls}, "").calls
        graphs = [
            TracedGraph(calls=lines, **vars(words), **{name: found[f"{name}-{at}"] for name in TracedGraph.ARRAYS})
            for at, (words, lines) in enumerate(zip(head.graphs, calls, strict=True))
        ]
        runs = found["runs"]
        if runs.dtype == _RUN_TYPE_1:
            runs = np.array([(*run, number) for number, run in enumerate(runs.tolist())], RUN_TYPE)
        edges = {pair: found[f"edges-{at}"].reshape(-1, 2) for at, pair in enumerate(head.edges)}
        of_ranks = {name: found[name] for name in ("exchanges", "messages") if name in found}
        return cls(about, graphs, runs, found["records"], head.lost, found["others"], edges, **of_ranks)

    def verify(self) -> None:
        """Raise ValueError, saying where, if a part is missing, does not fit the others, or holds what cannot be.

        Also if a worker did two things at once, or a task ran twice, or before what it waits for.
        """
        r, o, runs = self.records, self.others, self.runs
        if r.dtype != RECORD_TYPE or o.dtype != RECORD_TYPE or runs.dtype != RUN_TYPE:
            raise ValueError("records or runs have other fields")
        _verify_about(self.about, max(_MOST_WORKERS, len(r) + len(o)))
        network.verify(self.ranks, len(self.programs), self.workers, self.exchanges, self.messages)
        for graph in self.graphs:
            graph.verify()
        sizes = np.array([len(graph) for graph in self.graphs], np.int64)
        for what, values, limit in (
            ("run", r["run"], len(runs)),
            ("graph", runs["graph"], len(self.graphs)),
            ("worker", np.concatenate([r["worker"], o["worker"]]), self.workers),
            ("step", runs["step"], LARGEST),
            ("run's number", runs["number"], LARGEST),
        ):
            if len(values) and not 0 <= values.min() <= values.max() < limit:
                raise ValueError(f"a {what} beyond the {limit} that there are")
        if len(r) and not ((r["task"] >= 0) & (r["task"] < sizes[runs["graph"][r["run"]]])).all():
            raise ValueError("a task that its graph does not have")
        if len(r) and (self.rank_of_run[r["run"]] != self.rank_of_worker[r["worker"]]).any():
            raise ValueError("a worker that runs a task of another rank")
        for (a, b), edges in self.edges.items():
            if (
                edges.dtype != np.int64
                or not (0 <= a < len(sizes) and 0 <= b < len(sizes))
                or not ((edges >= 0) & (edges < sizes[[a, b]])).all()
            ):
                raise ValueError(f"edges between graphs {a} and {b} that they do not have")
        self._verify_times()
        order = np.lexsort([r["task"], r["run"]])
        if (wrong := np.flatnonzero((np.diff(r["run"][order]) == 0) & (np.diff(r["task"][order]) == 0))).size:
            raise ValueError(f"run {r['run'][order[wrong[0]]]}: a task ran twice")
        for before, after in self.dependencies():
            if (wrong := np.flatnonzero(r["stop_ns"][before] > r["start_ns"][after])).size:
                run, task = r[["run", "task"]][after[wrong[0]]]
                raise ValueError(f"run {run}: task {task} started before a task that it waits for was done")

    def _verify_times(self) -> None:
        r, runs = self.records, self.runs
        for what, rows, names in (
            ("record", r, ("ready_ns", "start_ns", "stop_ns")),
            ("record of another run", self.others, ("start_ns", "stop_ns")),
            ("run", runs, ("begin_ns", "end_ns")),
        ):
            times = np.stack([rows[name] for name in names])
            if (wrong := np.flatnonzero((times[0] < 0) | (np.diff(times, axis=0) < 0).any(axis=0) | (times[-1] >= 2**62))).size:
                order = " <= ".join(name.removesuffix("_ns") for name in names)
                raise ValueError(f"{what} {wrong[0]}: wanted {order}, times of a clock that began at 0, got {rows[wrong[0]]}")
            if rows is not runs and (np.diff(rows["start_ns"]) < 0).any():
                raise ValueError(f"wanted {what}s by start time")
        if (np.diff(runs["number"]) <= 0).any():
            raise ValueError("wanted runs in order")
        if (length := self.end_ns - self.begin_ns) >= LARGEST:
            raise ValueError(f"wanted less than {LARGEST:,} ns from the beginning to the end, got {length:,}")
        everything = np.concatenate([r, self.others])
        everything = everything[np.lexsort([everything["stop_ns"], everything["start_ns"], everything["worker"]])]
        a, b = everything[:-1], everything[1:]
        if (wrong := np.flatnonzero((a["worker"] == b["worker"]) & (a["stop_ns"] > b["start_ns"]))).size:
            worker = a["worker"][wrong[0]]
            raise ValueError(f"worker {worker} runs two tasks at once: {a[wrong[0]]} and {b[wrong[0]]}")
        begin, end = runs["begin_ns"][r["run"]], runs["end_ns"][r["run"]]
        if (wrong := np.flatnonzero((r["ready_ns"] < begin) | (r["stop_ns"] > end))).size:
            raise ValueError(f"record {wrong[0]}: wanted it within its run, got {r[wrong[0]]} and {runs[r['run'][wrong[0]]]}")

    def by_run(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (run, its records by start time)."""
        for run, places in enumerate(self._places()):
            yield run, self.records[places]

    def _places(self) -> list[np.ndarray]:
        """Return, for each run, where its records are."""
        order = np.argsort(self.records["run"], kind="stable")
        return np.split(order, np.searchsorted(self.records["run"][order], np.arange(1, len(self.runs)))) if len(self.runs) else []

    def dependencies(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, for each run with records, (which records others wait for, which wait for them): those of the run, and of the one before.

        By the tasks that wait. Of tasks without a record nothing is said.
        """
        before: tuple[int, int, np.ndarray] | None = None  # number, graph, place of each task's record
        for (number, of), mine in zip(self.runs[["number", "graph"]].tolist(), self._places(), strict=True):
            if not len(mine):
                continue
            graph = self.graphs[of]
            place = np.full(len(graph), -1)
            place[self.records["task"][mine]] = mine
            waits = np.repeat(np.arange(len(graph)), np.diff(graph.first))
            pairs = np.stack([place[graph.predecessors], place[waits]], axis=1)
            if before is not None and number == before[0] + 1 and (before[1], of) in self.edges:
                there, here = self.edges[before[1], of].T
                pairs = np.concatenate([pairs, np.stack([before[2][there], place[here]], axis=1)])
            pairs = pairs[(pairs >= 0).all(axis=1)]
            before = number, of, place
            yield pairs[:, 0], pairs[:, 1]


def _verify_about(about: dict[str, Any], most_workers: int) -> None:
    """Raise ValueError unless what is said of the run has what formats and reports need."""
    if not isinstance(about, dict):
        raise ValueError(f"about: wanted a table, got {shorten(about)}")
    types = {"is_fork_join": bool, "scheduler": str, "workers": int}
    if missing := [name for name in types if name not in about]:
        raise ValueError(f"about: wanted {', '.join(missing)}, got none")
    for name, wanted in types.items():
        if type(about[name]) is not wanted:
            raise ValueError(f"about: {name}: wanted {wanted.__name__}, got {shorten(about[name])}")
    if not 1 <= about["workers"] <= most_workers:
        raise ValueError(f"about: workers: wanted 1 to {most_workers}, got {shorten(about['workers'])}")
    process_of(about)
    programs = about.get("programs", [])
    if not isinstance(programs, list):
        raise ValueError(f"about: programs: wanted a list, got {shorten(programs)}")
    for program in programs:
        _verify_about(program, most_workers)
    limits = about.get("limits")
    if limits is None:
        return
    for name in ("sgemm_gflops", "memory_gbs"):
        value = limits.get(name) if isinstance(limits, dict) else None
        if not (type(value) in (int, float) and 0 < value < 1e12):
            raise ValueError(f"about: limits: wanted a number above 0 for {name}, got {shorten(value)}")


@dataclass(frozen=True)
class _Names:
    """What the file's head says of a graph."""

    name: str
    kernels: list[str]
    phases: list[str]


@dataclass(frozen=True)
class _Head:
    taskgpt_trace: int
    graphs: list[_Names]
    lost: int = field(metadata={"at_least": 0})
    edges: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Calls:
    calls: list[list[str]]


@dataclass
class Traced:
    """A scheduler whose runs are kept as a trace. Its setting `record` says how many tasks a worker can keep between two runs in turn.

    on_run is called after every run that is yielded, with what was done since the last one ended, and before this one ended: tasks of its
    own, and those of the next one that are done; so also if the caller comes late, and the next one has gone further.
    keeps: False keeps nothing for `trace`, so that a run may be endless.
    """

    scheduler: Scheduler
    on_run: Callable[[Trace], None] | None = None
    keeps: bool = True
    _graphs: dict[Graph, TracedGraph] = field(default_factory=dict)
    _as_run: list[Graph] = field(default_factory=list)
    _steps: Counter = field(default_factory=Counter)
    _runs: list[tuple[int, int, int]] = field(default_factory=list)  # graph, step, submitted_ns
    _records: list[np.ndarray] = field(default_factory=list)
    _lost: int = 0

    def __post_init__(self) -> None:
        self._process: Process = this_process(getattr(self.scheduler.settings, "share", ""))  # now: `taskgpt run` changes the title

    @property
    def workers(self) -> int:
        return self.scheduler.workers

    @property
    def needs_shared_memory(self) -> bool:
        return self.scheduler.needs_shared_memory

    def __enter__(self) -> "Traced":
        self.scheduler.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.scheduler.__exit__(*exception)

    def describe(self) -> str:
        return self.scheduler.describe()

    def ahead(self) -> float:
        return self.scheduler.ahead()

    def as_run(self, graph: Graph) -> Graph:
        return self.scheduler.as_run(graph)

    def run(self, graph: Graph) -> None:
        for _ in self.run_each([graph]):
            pass

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]:
        first = len(self._runs)
        waiting = np.empty(0, RECORD_TYPE)
        try:
            with closing(self.scheduler.run_each(map(self._note, graphs))) as runs:
                for number, graph in enumerate(runs, first):
                    if self.on_run is not None:
                        waiting = np.concatenate([waiting, self.take_records()[0]])
                        end_ns = waiting["stop_ns"][waiting["run"] <= number].max(initial=0)
                        is_due = waiting["stop_ns"] <= end_ns
                        records, waiting = waiting[is_due], waiting[~is_due]
                        self.on_run(self._trace(records, int(records["run"].min(initial=len(self._runs))), {}))
                    yield graph
        finally:
            self.take_records()

    @contextmanager
    def program(self, **options: Any) -> Iterator[Any]:
        """Keep a program as a run of the graph that it turns out to be: of stretches of its tasks without a pause."""
        begin_ns = time.monotonic_ns()
        with self.scheduler.program(**options) as spawn:
            yield spawn
        graph = spawn.graph
        self._as_run.append(graph)
        self._graphs[graph] = TracedGraph.of(graph)
        self._runs.append((len(self._graphs) - 1, self._steps[graph.name], begin_ns))
        self._steps[graph.name] += 1
        records = self.take_records()[0]
        if self.on_run is not None:
            self.on_run(self._trace(records, len(self._runs) - 1, {}))

    def run_while(self, step: Any, until: Callable[[], bool], reads: Sequence[Tile] = ()) -> int:
        return run_while(self, step, until, reads)

    def take_records(self) -> tuple[np.ndarray, int]:
        records, lost = self.scheduler.take_records()
        if self.keeps:
            self._records.append(records)
        self._lost += lost
        return records, lost

    def _note(self, graph: Graph) -> Graph:
        if graph not in self._graphs:
            self._as_run.append(self.scheduler.as_run(graph))
            self._graphs[graph] = TracedGraph.of(self._as_run[-1])
        self._runs.append((list(self._graphs).index(graph), self._steps[graph.name], time.monotonic_ns()))
        self._steps[graph.name] += 1
        return graph

    def trace(self, about: dict[str, Any] | None = None) -> Trace:
        """Return what ran so far. A run begins when its first task is ready, and ends with its last."""
        records = np.concatenate([np.empty(0, RECORD_TYPE), *self._records])
        trace = self._trace(records[np.argsort(records["start_ns"], kind="stable")], 0, {**(about or {}), "process": asdict(self._process)})
        trace.edges.update(self._edges())
        return trace

    def _edges(self) -> dict[tuple[int, int], np.ndarray]:
        """Return what is known of runs after each other. Not asked for before the end: gpt2-124m's take 0.4 s."""
        traced, found = list(self._graphs.values()), {}
        for a, b in dict.fromkeys(itertools.pairwise(graph for graph, *_ in self._runs)):
            are_whole = all(len(self._as_run[n].tasks) == len(traced[n]) for n in (a, b))  # not recorded further since they ran
            if are_whole and (edges := self._as_run[a].edges_to(self._as_run[b])) is not None:
                found[a, b] = np.array(edges, np.int64).reshape(-1, 2)
        return found

    def _trace(self, records: np.ndarray, first: int, about: dict[str, Any]) -> Trace:
        """Return the runs from the first one on, with these records of them."""
        records = records.copy()
        records["run"] -= first
        runs = np.array([(*run, run[-1], number) for number, run in enumerate(self._runs[first:], start=first)], RUN_TYPE)
        first_ready, last_stop = np.full(len(runs), np.iinfo(np.int64).max), np.zeros(len(runs), np.int64)
        np.minimum.at(first_ready, records["run"], records["ready_ns"])
        np.maximum.at(last_stop, records["run"], records["stop_ns"])
        has_records = np.isin(np.arange(len(runs)), records["run"])
        runs["begin_ns"][has_records], runs["end_ns"][has_records] = first_ready[has_records], last_stop[has_records]
        about = {
            **about,
            "scheduler": self.describe(),
            "workers": self.workers,
            "is_fork_join": self.scheduler.is_fork_join,
        }
        return Trace(about, list(self._graphs.values()), runs, records, self._lost)


def traced(name: str = "native", **settings: Any) -> Traced:
    """Return what `taskgpt.scheduler` returns, with its runs kept as a trace. Raises UserError for an unknown name, key or value."""
    return open_traced(load_scheduler(name, settings))


def open_traced(config: SchedulerConfig) -> Traced:
    """Return the scheduler of a configuration, with its runs kept as a trace."""
    return Traced(open_scheduler(config.scheduler, replace(config.settings, record=RECORD)))
