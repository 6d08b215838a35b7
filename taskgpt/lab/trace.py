"""A run as data: which task ran when, on which worker, the same for every scheduler. Kept in one file, from which all formats are made.

    scheduler = Traced(scheduler)                  # does what the scheduler does, and remembers
    ...
    trace = scheduler.trace(about={...})
    trace.save("runs/native/trace.npz")
    trace = Trace.load("runs/native/trace.npz")

Times are nanoseconds of CLOCK_MONOTONIC, the same in all processes of a machine. A run is one pass through a graph: a step of training, a
batch of validation, a token of a sample. Its step counts the runs of graphs of that name. Runs may overlap.
"""

import itertools
import json
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import UserError
from taskgpt.schedulers import Scheduler, loops
from taskgpt.schedulers._record import RECORD_TYPE
from taskgpt.tasks import Graph

VERSION = 1
RECORD = 1_000_000  # for schedulers' setting `record`: what is not used takes no memory
RUN_TYPE = np.dtype([(name, np.int64) for name in ("graph", "step", "begin_ns", "end_ns")])


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """What a trace says of the tasks of a graph.

    Arrays have an item a task: kernel (an index into kernels), phase (into phases), layer (-1 = none), flops, bytes, loop (fork-join's: a
    number that grows with each barrier). The predecessors of task t are predecessors[first[t]:first[t + 1]]. calls: a line of text a task.
    """

    name: str
    kernels: list[str]
    phases: list[str]
    calls: list[str]
    kernel: np.ndarray
    phase: np.ndarray
    layer: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    loop: np.ndarray
    first: np.ndarray
    predecessors: np.ndarray

    ARRAYS = ("kernel", "phase", "layer", "flops", "bytes", "loop", "first", "predecessors")

    @classmethod
    def of(cls, graph: Graph) -> "TracedGraph":
        tasks = graph.tasks
        kernels = list(dict.fromkeys(task.name for task in tasks))
        phases = list(dict.fromkeys(task.section[0] for task in tasks))
        columns = {
            "kernel": [kernels.index(task.name) for task in tasks],
            "phase": [phases.index(task.section[0]) for task in tasks],
            "layer": [task.section[1] for task in tasks],
            "flops": [task.flops for task in tasks],
            "bytes": [task.bytes for task in tasks],
            "loop": [number for number, loop in enumerate(loops.cut(graph)) for _ in loop],
            "first": [0, *itertools.accumulate(len(task.predecessors) for task in tasks)],
            "predecessors": [p for task in tasks for p in task.predecessors],
        }
        calls = [str(task).partition(" ")[2] for task in tasks]
        return cls(graph.name, kernels, phases, calls, **{name: np.array(column, np.int64) for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.kernel)

    def verify(self) -> None:
        """Raise ValueError if arrays do not fit each other, name what is not there, or let a task wait for a later one."""
        lengths = {name: len(getattr(self, name)) for name in ("calls", *self.ARRAYS)}
        wanted = dict.fromkeys(lengths, len(self)) | {"first": len(self) + 1, "predecessors": lengths["predecessors"]}
        if lengths != wanted or any(getattr(self, name).dtype != np.int64 for name in self.ARRAYS):
            raise ValueError(f"graph {self.name}: wanted int64 arrays of these lengths, {wanted}, got {lengths}")
        if self.first[0] != 0 or self.first[-1] != len(self.predecessors) or (np.diff(self.first) < 0).any():
            raise ValueError(f"graph {self.name}: wanted predecessors cut into one part a task")
        earlier = np.repeat(np.arange(len(self)), np.diff(self.first))
        for name, limit in {"kernel": len(self.kernels), "phase": len(self.phases), "predecessors": earlier}.items():
            if not ((getattr(self, name) >= 0) & (getattr(self, name) < limit)).all():
                raise ValueError(f"graph {self.name}: a number in {name} beyond what there is")


@dataclass(frozen=True, eq=False)
class Trace:
    """The tasks of a number of runs.

    about: what JSON can say of the run; at least scheduler (a line), workers, is_fork_join, machine. graphs: what ran. runs: RUN_TYPE, in
    order; graph is an index into graphs. records: schedulers' RECORD_TYPE by start time; run is an index into runs. lost: tasks that found
    no room for a record. others: records of runs that were left out, whose run means nothing: workers were busy then, not idle.
    """

    about: dict[str, Any]
    graphs: list[TracedGraph]
    runs: np.ndarray
    records: np.ndarray
    lost: int = 0
    others: np.ndarray = field(default_factory=lambda: np.empty(0, RECORD_TYPE))

    @property
    def workers(self) -> int:
        return int(self.about["workers"])

    @property
    def begin_ns(self) -> int:
        """When the first run began."""
        return int(self.runs["begin_ns"].min(initial=np.iinfo(np.int64).max)) if len(self.runs) else 0

    @property
    def end_ns(self) -> int:
        return int(max(self.runs["end_ns"].max(initial=0), self.records["stop_ns"].max(initial=0)))

    def _repr_html_(self) -> str:
        """In a notebook: the timeline of at most two runs, from the middle on."""
        from taskgpt.lab.timeline import to_svg

        middle = self.runs[max(0, len(self.runs) - 2) // 2 :][:2]
        span = [0, 0] if not len(middle) else [middle["begin_ns"].min() - self.begin_ns, middle["end_ns"].max() - self.begin_ns]
        return to_svg([self], span[0] / 1e6, (span[1] - span[0]) / 1e6)

    def column(self, name: str) -> np.ndarray:
        """Return for each record what TracedGraph's array of that name says of its task. Kernels and phases count through `names`."""
        found = np.zeros(len(self.records), np.int64)
        graph_of = self.runs["graph"][self.records["run"]]
        for number, graph in enumerate(self.graphs):
            mine = graph_of == number
            values = getattr(graph, name)
            if name in ("kernel", "phase"):
                known = self.names(name)
                values = np.array([known.index(word) for word in getattr(graph, name + "s")], np.int64)[values]
            found[mine] = values[self.records["task"][mine]]
        return found

    def names(self, column: str) -> list[str]:
        """Return the names of all kernels, or phases, of all graphs."""
        return list(dict.fromkeys(word for graph in self.graphs for word in getattr(graph, column + "s")))

    def select(self, name: str) -> "Trace":
        """Return the runs of graphs of that name alone: `training`, say."""
        return self._only(np.array([self.graphs[g].name == name for g in self.runs["graph"]], bool))

    def without_first(self, count: int) -> "Trace":
        """Return the trace without its first runs."""
        return self._only(np.arange(len(self.runs)) >= count)

    def _only(self, chosen: np.ndarray) -> "Trace":
        """Return the chosen runs, counted anew."""
        number = np.cumsum(chosen) - 1
        is_in = chosen[self.records["run"]]
        records = self.records[is_in].copy()
        records["run"] = number[records["run"]]
        others = np.concatenate([self.others, self.records[~is_in]])
        return Trace(self.about, self.graphs, self.runs[chosen], records, self.lost, others[np.argsort(others["start_ns"], kind="stable")])

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        texts = {"about": json.dumps(self.about), "calls": json.dumps([graph.calls for graph in self.graphs])}
        heads = [{"name": g.name, "kernels": g.kernels, "phases": g.phases} for g in self.graphs]
        texts["head"] = json.dumps({"taskgpt_trace": VERSION, "lost": self.lost, "graphs": heads})
        arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
        arrays |= {"runs": self.runs, "records": self.records, "others": self.others}
        arrays |= {f"{name}-{at}": getattr(graph, name) for at, graph in enumerate(self.graphs) for name in TracedGraph.ARRAYS}
        part = f"{path}.part"
        try:
            with open(part, "wb") as file:
                np.savez_compressed(file, **arrays)
            os.replace(part, path)
        finally:
            Path(part).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read the file, or `trace.npz` in the folder, of that name. Raises UserError if it is no trace, or a damaged one."""
        file = Path(path) / "trace.npz" if Path(path).is_dir() else Path(path)
        try:
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as found:
                head, about, calls = (json.loads(found[name].tobytes()) for name in ("head", "about", "calls"))
                if head["taskgpt_trace"] != VERSION:
                    raise UserError(
                        f"{file}: a trace of version {head['taskgpt_trace']}, and this taskgpt reads {VERSION}; record it again"
                    )
                graphs = [
                    TracedGraph(calls=lines, **words, **{name: found[f"{name}-{at}"] for name in TracedGraph.ARRAYS})
                    for at, (words, lines) in enumerate(zip(head["graphs"], calls, strict=True))
                ]
                trace = cls(about, graphs, found["runs"], found["records"], head["lost"], found["others"])
            trace.verify()
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; wanted a trace, as `taskgpt train --trace DIR` writes it") from None
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file}: no trace, or a damaged one ({error}); record it again with --trace") from None
        return trace

    def verify(self) -> None:
        """Raise ValueError, saying where, if a part is missing or does not fit the others.

        Also if a worker did two things at once, or a task ran twice, or before what it waits for.
        """
        if missing := {"scheduler", "workers", "is_fork_join"} - set(self.about):
            raise ValueError(f"about: wanted {', '.join(sorted(missing))}, got none")
        for graph in self.graphs:
            graph.verify()
        r = self.records
        if r.dtype != RECORD_TYPE or self.others.dtype != RECORD_TYPE or self.runs.dtype != RUN_TYPE:
            raise ValueError("records or runs have other fields")
        for what, values, limit in (("run", r["run"], len(self.runs)), ("graph", self.runs["graph"], len(self.graphs))):
            if len(values) and not 0 <= values.min() <= values.max() < limit:
                raise ValueError(f"a {what} beyond the {limit} that there are")
        if len(r) and not 0 <= r["worker"].min() <= r["worker"].max() < self.workers:
            raise ValueError(f"a worker beyond the {self.workers} that there are")
        sizes = np.array([len(graph) for graph in self.graphs], np.int64)
        if len(r) and not ((r["task"] >= 0) & (r["task"] < sizes[self.runs["graph"][r["run"]]])).all():
            raise ValueError("a task that its graph does not have")
        if (wrong := np.flatnonzero((r["start_ns"] > r["stop_ns"]) | (r["ready_ns"] > r["start_ns"]))).size:
            raise ValueError(f"record {wrong[0]}: wanted ready <= start <= stop, got {r[wrong[0]]}")
        for worker in range(self.workers):
            mine = r[r["worker"] == worker]
            if (wrong := np.flatnonzero(mine["stop_ns"][:-1] > mine["start_ns"][1:])).size:
                raise ValueError(f"worker {worker} runs two tasks at once: {mine[wrong[0]]} and {mine[wrong[0] + 1]}")
        for run, mine in self.by_run():
            graph = self.graphs[self.runs["graph"][run]]
            starts, stops = np.full(len(graph), np.iinfo(np.int64).max), np.full(len(graph), -1)
            if len(np.unique(mine["task"])) != len(mine):
                raise ValueError(f"run {run}: a task ran twice")
            starts[mine["task"]], stops[mine["task"]] = mine["start_ns"], mine["stop_ns"]
            late = stops[graph.predecessors] > np.repeat(starts, np.diff(graph.first))
            if late.any():
                task = int(np.searchsorted(graph.first, np.flatnonzero(late)[0], side="right")) - 1
                raise ValueError(f"run {run}: task {task} started before a task that it waits for was done")

    def by_run(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (run, its records by start time)."""
        order = np.argsort(self.records["run"], kind="stable")
        bounds = np.searchsorted(self.records["run"][order], np.arange(len(self.runs) + 1))
        for run, (start, stop) in enumerate(itertools.pairwise(bounds)):
            yield run, self.records[order[start:stop]]


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
    _steps: Counter = field(default_factory=Counter)
    _runs: list[tuple[int, int, int]] = field(default_factory=list)  # graph, step, submitted_ns
    _records: list[np.ndarray] = field(default_factory=list)
    _lost: int = 0

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

    def take_records(self) -> tuple[np.ndarray, int]:
        records, lost = self.scheduler.take_records()
        if self.keeps:
            self._records.append(records)
        self._lost += lost
        return records, lost

    def _note(self, graph: Graph) -> Graph:
        if graph not in self._graphs:
            self._graphs[graph] = TracedGraph.of(self.scheduler.as_run(graph))
        self._runs.append((list(self._graphs).index(graph), self._steps[graph.name], time.monotonic_ns()))
        self._steps[graph.name] += 1
        return graph

    def trace(self, about: dict[str, Any]) -> Trace:
        """Return what ran so far. A run begins when its first task is ready, and ends with its last."""
        records = np.concatenate([np.empty(0, RECORD_TYPE), *self._records])
        return self._trace(records[np.argsort(records["start_ns"], kind="stable")], 0, about)

    def _trace(self, records: np.ndarray, first: int, about: dict[str, Any]) -> Trace:
        """Return the runs from the first one on, with these records of them."""
        records = records.copy()
        records["run"] -= first
        runs = np.array([(graph, step, begin, begin) for graph, step, begin in self._runs[first:]], RUN_TYPE)
        first_ready, last_stop = np.full(len(runs), np.iinfo(np.int64).max), np.zeros(len(runs), np.int64)
        np.minimum.at(first_ready, records["run"], records["ready_ns"])
        np.maximum.at(last_stop, records["run"], records["stop_ns"])
        has_records = np.isin(np.arange(len(runs)), records["run"])
        runs["begin_ns"][has_records], runs["end_ns"][has_records] = first_ready[has_records], last_stop[has_records]
        about = {
            **about,
            "scheduler": self.describe(),
            "workers": self.workers,
            "is_fork_join": isinstance(self.scheduler, loops.Scheduler),
        }
        return Trace(about, list(self._graphs.values()), runs, records, self._lost)
