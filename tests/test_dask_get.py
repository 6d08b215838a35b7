"""taskgpt.get keeps the contract of a Dask `get`, runs tasks in the order that its policy says, and leaves nothing behind.

Drawings: time runs to the right, `a-->b` means b waits for a. With one worker the order in which tasks run is determined.
"""

import contextlib
import gc
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import ClassVar

import dask
import dask.array as da
import dask.bag as db
import dask.order
import dask.threaded
import pytest
from dask._task_spec import DataNode, Task, TaskRef
from dask.callbacks import Callback
from dask.core import flatten
from dask.diagnostics import CacheProfiler, Profiler, ProgressBar, ResourceProfiler
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.utils import key_split
from dask.utils_test import GetFunctionTestMixin, add, inc

import taskgpt
from taskgpt import get
from taskgpt.schedulers.dask_get import workers
from taskgpt.schedulers.dask_get.ranking import POLICIES
from taskgpt.tasks.dask_graph import nodes

ONE = partial(get, num_workers=1)
PATIENCE = 20  # seconds until a wait in a test counts as lost


@pytest.fixture(autouse=True)
def nothing_stays():
    """No thread outlives a run, no callback, and no run is taken for the one around what the caller does next."""
    yield
    assert getattr(workers._thread, "run", None) is None
    assert workers_alive() == []
    assert not Callback.active


def workers_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("taskgpt-get")]


def random_graph(seed: int, tasks: int = 60) -> dict:
    """A legacy graph whose result names every task with its inputs, so that a wrong input shows."""
    rng = random.Random(seed)
    graph = {("t", 0): "start"}
    for number in range(1, tasks):
        before = rng.sample(range(number), min(number, rng.choice([0, 1, 1, 2, 3])))
        graph["t", number] = (lambda number, *inputs: hash((number, inputs)), number, *(("t", b) for b in before))
    return graph


def fails(*_):
    raise LookupError("nothing there")


def recorded(edges: str, log: list) -> dict:
    """A graph from `a b-->c`, one or more per line separated by spaces or commas; every task logs its name."""
    inputs: dict[str, list] = {}
    for edge in edges.split():
        before, _, after = edge.partition("-->")
        for name in (*before.split(","), *filter(None, [after])):
            inputs.setdefault(name, [])
        if after:
            inputs[after] += before.split(",")
    return {name: (lambda name, _inputs: log.append(name), f"{name}!", list(before)) for name, before in inputs.items()}


def ran(edges: str, wanted: str, **options: object) -> str:
    """Return the order in which one worker runs the graph."""
    log: list[str] = []
    get(recorded(edges, log), wanted.split(), num_workers=1, **options)
    return " ".join(name.removesuffix("!") for name in log)


class TestMixin(GetFunctionTestMixin):
    """What Dask expects of any get."""

    get = staticmethod(get)


class TestOneWorker(GetFunctionTestMixin):
    get = staticmethod(ONE)


class TestContract:
    @pytest.mark.parametrize("workers", [1, 2, 5])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_random_graphs(self, policy, workers):
        """Any policy on any number of workers gives what Dask gives."""
        for seed in range(5):
            graph = random_graph(seed)
            keys = [list(graph), ("t", 7), [[("t", 59)]]]
            assert get(graph, keys, policy=policy, num_workers=workers) == dask.get(graph, keys)

    def test_collections(self):
        """Arrays, bags and delayed calls, optimised or not, give what they give under dask.threaded; kwargs of compute reach the get."""
        x = da.arange(100, chunks=7).reshape(10, 10).rechunk(3)
        collections = [(x @ x.T - x.mean(axis=0)).std(), db.range(20, npartitions=4).map(inc).fold(add), dask.delayed(max)([x.sum(), 3])]
        for optimized in (True, False):
            expected = dask.compute(*collections, scheduler="threads", optimize_graph=optimized)
            assert dask.compute(*collections, scheduler=get, optimize_graph=optimized, num_workers=3, policy="dask_order") == expected

    def test_persist(self):
        """A persisted collection holds its results, and can be computed further."""
        with dask.config.set(scheduler=get):
            assert (da.ones(10, chunks=2).persist() + 1).sum().compute() == 20

    def test_only_what_is_needed(self):
        """A task that no wanted key needs does not run, whether it could or not; nor does a task of which it is wanted twice run twice."""
        assert ran("a-->b b-->c x-->b2", "b b") == "a b"
        assert get({"a": (inc, 1), "broken": (inc, "a", "lost")}, "a") == 2

    def test_fused_tasks(self):
        """The parts of a fused task run once each, in their order, also where one of them is used twice."""
        log: list[str] = []

        def logged(name, *inputs):
            log.append(name)
            return sum(inputs)

        graph = nodes({"x": 5, "p": (logged, "P", "x"), "q": (logged, "Q", "p", "p"), "r": (logged, "R", "q", "p")})
        fused = type(graph["p"]).fuse(graph["p"], graph["q"], graph["r"], key="fused")
        assert get({"x": 5, "fused": fused, "last": (inc, "fused")}, ["fused", "last"]) == (15, 16)
        assert log == ["P", "Q", "R"]

    def test_aliases_and_data(self):
        """Keys that stand for others, and for data, also where nothing has to run."""
        graph = {"data": 3, "alias": "data", "far": "alias", "x": (inc, "far")}
        assert get(graph, ["data", "alias", "far", "x"]) == (3, 3, 3, 4)
        assert get({}, []) == ()
        assert get({"x": None}, "x") is None

    def test_cache(self):
        """Results that are in the cache are not computed; new ones are left there."""
        cache = {"b": 10}
        assert get({"a": (fails,), "b": (inc, "a"), "c": (inc, "b")}, "c", cache=cache) == 11
        assert cache == {"b": 10, "c": 11}
        with dask.config.set(cache={"x": 4}):
            assert get({"x": (fails,), "y": (inc, "x")}, "y") == 5

    def test_malformed_graphs(self):
        """What cannot be run is refused before any task runs."""
        log: list[str] = []
        with pytest.raises(ValueError, match=r"Missing dependency 'lost' of 'b'"):
            get(nodes({"a": (log.append, 1)}) | {"b": nodes({"b": (add, "a", "lost"), "lost": 1})["b"]}, ["a", "b"])
        with pytest.raises(RuntimeError, match=r"Cycle in the graph through '[ab]'"):
            get({"a": (inc, "b"), "b": (inc, "a"), "c": (log.append, 1)}, ["c", "a"])
        assert log == []

    def test_bad_options(self):
        """The message says what was wanted, what came, and what there is."""
        with pytest.raises(ValueError, match=r"policy must be one of depth_first, .*, dask_order, got 'fastest'"):
            get({"x": 1}, "x", policy="fastest")
        with pytest.raises(ValueError, match=r"num_workers must be at least 1, got -2"):
            get({"x": 1}, "x", num_workers=-2)
        with pytest.raises(TypeError, match=r"pool must be a ThreadPoolExecutor .*, got int"):
            get({"x": 1}, "x", pool=4)

    def test_import(self):
        """Importing taskgpt is cheap: Dask comes with the first use of get."""
        code = "import sys, taskgpt; assert 'dask' not in sys.modules; assert callable(taskgpt.get); taskgpt.nothing"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.stderr.endswith("AttributeError: module 'taskgpt' has no attribute 'nothing'\n")
        assert taskgpt.__all__ == ["get", "scheduler", "train"]


FAN = "a-->p b-->p a-->u u-->q"


class TestPolicies:
    """What runs first. The same two drawings for all: FAN and CHAINS.

    FAN     a-->p      a-->u-->q      CHAINS     a1-->a2------>end
            b-->p                                b1-->b2-->b3-->end
    """

    CHAINS = "a1-->a2 b1-->b2 b2-->b3 a2,b3-->end"

    def test_depth_first(self):
        """First all that p needs, then p; then u, now the last user of a, which that frees. The chains one after the other."""
        assert ran(FAN, "p q") == "a b p u q"
        assert ran(self.CHAINS, "end") == "a1 a2 b1 b2 b3 end"

    def test_oldest_first(self):
        """Breadth first: what was ready at the beginning goes before what a, or a1, made ready."""
        assert ran(FAN, "p q", policy="oldest_first") == "a b u p q"
        assert ran(self.CHAINS, "end", policy="oldest_first") == "a1 b1 a2 b2 b3 end"

    def test_newest_first(self):
        """What a made ready goes on at once, to the end of its path, while b, ready from the beginning, waits."""
        assert ran(FAN, "p q", policy="newest_first") == "a u q b p"
        assert ran(self.CHAINS, "end", policy="newest_first") == "a1 a2 b1 b2 b3 end"

    def test_longest_path_first(self):
        """At any time the task furthest from the end: b1 has four tasks to go with itself, then a1 and b2 three, then a2 and b3 two."""
        assert ran(FAN, "p q", policy="longest_path_first") == "a b u p q"
        assert ran(self.CHAINS, "end", policy="longest_path_first") == "b1 a1 b2 a2 b3 end"

    @staticmethod
    def order_of(get, graph, keys, **options) -> list:
        seen: list = []
        with Callback(pretask=lambda key, *_: seen.append(key)):
            get(graph, keys, **options)
        return seen

    def test_dask_order(self):
        """On one worker exactly the order of Dask's own schedulers: what became ready last goes first, in dask.order's order."""
        assert ran(FAN, "p q", policy="dask_order") == "a u q b p"
        for seed in range(40):
            draw = random.Random(seed)
            graph = random_graph(seed, draw.randrange(2, 120))
            keys = draw.sample(list(graph), draw.randrange(1, min(len(graph), 8) + 1))
            assert self.order_of(ONE, graph, keys, policy="dask_order") == self.order_of(dask.get, graph, keys)

    def test_dask_order_of_arrays(self):
        x = da.random.random((60, 60), chunks=13)
        for y in (x.sum(), (x - x.mean(0)).std(), x @ x.T, x.rechunk((5, 60)).cumsum(0)):
            graph, keys = y.__dask_graph__(), y.__dask_keys__()
            wanted = self.order_of(dask.threaded.get, graph, keys, num_workers=1)
            assert self.order_of(ONE, graph, keys, policy="dask_order") == wanted

    def test_depth_first_frees(self):
        """A result whose last users are all ready is used up at once: r and s, needed only later, follow p.

        a-->p-->all   a-->r   a-->s
        b-->p         b-->r
        """
        assert ran("a,b-->p c-->all p-->all a,b-->r a-->s", "all s r") == "a b p r s c all"

    def test_depth_first_is_bounded(self):
        """What has many more users is not used up at once: their results would take more than it does."""
        many = " ".join(f"a-->u{i} o{i},u{i}-->v{i}" for i in range(100))
        log = ran(many, " ".join(f"v{i}" for i in range(100))).split()
        assert log[:7] == ["a", "u0", "o0", "v0", "u1", "o1", "v1"]

    @pytest.mark.parametrize("policy", POLICIES)
    def test_priorities_win(self, policy):
        """Whatever the policy, of the ready tasks the one of highest priority goes first; -1 after those without."""
        log: list = []
        graph = {("x", i): (log.append, i) for i in range(6)}
        layer = MaterializedLayer(graph, annotations={"priority": lambda key: {4: 1.5, 2: 7, 0: -1}.get(key[1])})
        ONE(HighLevelGraph({"x": layer}, {"x": set()}), list(graph), policy=policy)
        assert log[:2] == [2, 4]
        assert sorted(log[2:5]) == [1, 3, 5]
        assert log[5] == 0

    @pytest.mark.parametrize("policy", ["oldest_first", "newest_first"])
    def test_priorities_of_released_tasks(self, policy):
        """A task that becomes ready goes before those of lower priority that were ready before it, and after those of higher."""
        log: list = []
        graph = {name: (partial(log.append, name),) for name in ("a", "low", "high", "b")} | {"after": (lambda _: log.append("after"), "a")}
        levels = {"high": 3, "a": 2, "b": 2, "after": 1}
        with dask.annotate(priority=levels.get):
            ONE(graph, list(graph), policy=policy)
        assert log[0] == "high"
        assert sorted(log[1:3]) == ["a", "b"]
        assert log[3:] == ["after", "low"]


class TestAnnotations:
    """Where priorities come from."""

    def test_delayed(self):
        """dask.annotate(priority=...) around delayed calls reaches the get."""
        log: list[str] = []
        calls = []
        for name, priority in (("low", -1), ("none", None), ("high", 5)):
            with dask.annotate(**{"priority": priority} if priority else {}):
                calls.append(dask.delayed(log.append)(name))
        dask.compute(*calls, scheduler=ONE)
        assert log == ["high", "none", "low"]

    @pytest.mark.parametrize("fuse", [None, False])
    def test_arrays(self, fuse):
        """Annotations of arrays, which Dask's optimisation drops where it fuses tasks, are found all the same."""
        log: list[str] = []

        def noted(block, name):
            log.append(name)
            return block + 1

        def pipeline(name):
            return da.ones(6, chunks=2).map_blocks(noted, name, meta=da.ones(1)._meta)[::-1].sum()

        first = pipeline("plain")
        with dask.annotate(priority=1):
            second = pipeline("urgent")
        with dask.config.set({"optimization.fuse.active": fuse}):
            dask.compute(first, second, scheduler=ONE)
        assert log == ["urgent"] * 3 + ["plain"] * 3

    def test_around_the_run(self):
        """An annotation around the call counts for what has none of its own."""
        log: list[str] = []
        with dask.annotate(priority=3):
            marked = dask.delayed(log.append)("marked")
        with dask.annotate(priority=lambda key: 9 if key == "x" else 1):
            ONE({"y": (partial(log.append, "y"),), "x": (partial(log.append, "x"),)}, ["y", "x"])
            dask.compute(dask.delayed(log.append)("plain"), marked, scheduler=ONE)
        assert log == ["x", "y", "marked", "plain"]


class TestCallbacks:
    def test_calls(self):
        """start, start_state, then before and after each task, then finish; a task's callbacks come after those of its inputs."""
        calls: list = []
        names = ("start", "start_state", "pretask", "posttask", "finish")
        with Callback(*(partial(lambda name, *args: calls.append((name, args)), name) for name in names)):
            assert get({"a": 1, "b": (inc, "a"), "c": (inc, "b")}, "c", num_workers=2) == 3
        assert [(name, args[0] if name.endswith("task") else None) for name, args in calls] == [
            ("start", None),
            ("start_state", None),
            ("pretask", "b"),
            ("posttask", "b"),
            ("pretask", "c"),
            ("posttask", "c"),
            ("finish", None),
        ]
        _, (key, value, graph, state, worker) = calls[3]
        assert (key, value, worker) == ("b", 2, threading.get_ident())
        assert set(graph) == {"a", "b", "c"}
        assert state["finished"] == {"b", "c"}
        assert state["released"] == {"a", "b"}
        assert not state["ready"] and not state["waiting"] and not state["running"]
        assert calls[-1][1][-1] is False

    def test_diagnostics(self):
        """Dask's profilers and progress bar work, and agree with what ran."""
        graph = {("x", i): (inc, i) for i in range(20)} | {"sum": (sum, [("x", i) for i in range(20)])}
        out = io.StringIO()
        with Profiler() as tasks, CacheProfiler() as memory, ProgressBar(out=out):
            assert get(graph, "sum", num_workers=3) == 210
        assert {each.key for each in tasks.results} == set(graph)
        assert all(each.end_time >= each.start_time for each in tasks.results)
        assert {each.key for each in memory.results} == set(graph)
        assert "100% Completed" in out.getvalue()

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_resource_profiler(self):
        with ResourceProfiler(dt=0.01) as resources:
            get({"x": (time.sleep, 0.05)}, "x")
        assert resources.results

    def test_values_from_a_callback(self):
        """A callback may put results into the graph, as dask.cache does: their tasks do not run."""
        with Callback(start=lambda graph: graph.update(a=5)):
            assert get({"a": (fails,), "b": (inc, "a")}, "b") == 6

    @pytest.mark.parametrize("which", ["pretask", "posttask", "start_state"])
    def test_failing_callback(self, which):
        """An exception in a callback ends the run like one in a task, and finish hears of it."""
        failed: list[bool] = []
        callbacks = {which: lambda *_: 1 / 0, "finish": lambda graph, state, f: failed.append(f)}
        with Callback(**callbacks), pytest.raises(ZeroDivisionError):
            get({("x", i): (inc, i) for i in range(9)}, [("x", i) for i in range(9)], num_workers=2)
        assert failed == [True]

    def test_nested(self):
        """Only the outermost run calls the callbacks that are set around it."""
        seen: list = []
        with Callback(pretask=lambda key, *_: seen.append(key)):
            assert get({"outer": (lambda: get({"inner": (inc, 1)}, "inner"),)}, "outer") == 2
        assert seen == ["outer"]

    def test_given(self):
        """Callbacks given by keyword are called, and those that are set are not."""
        seen: list = []
        with Callback(start=lambda graph: seen.append("set")):
            get({"x": (inc, 1)}, "x", callbacks=[(lambda graph: seen.append("given"), None, None, None, None)])
        assert seen == ["given"]


def fails_on(block):
    raise LookupError("nothing there")


class TestErrors:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_short_traceback(self, workers):
        """The traceback of a failing collection has no frame more than under Dask's own scheduler."""
        array = da.ones(10, chunks=5).map_blocks(fails_on, dtype=float, meta=da.ones(1)._meta).sum()

        def frames(scheduler) -> list[tuple]:
            with pytest.raises(LookupError) as caught:
                array.compute(scheduler=scheduler, num_workers=workers)
            return [(frame.filename, frame.name) for frame in traceback.extract_tb(caught.value.__traceback__)]

        assert frames(get) == frames("threads")
        with dask.config.set({"admin.traceback.shorten": []}):
            assert any(os.path.join("dask_get", "workers.py") in filename for filename, _ in frames(get))

    @pytest.mark.parametrize("workers", [1, 3])
    def test_traceback(self, workers):
        """The error is the one that was raised, and its traceback leads to the line that did; nothing of Dask's between."""
        with pytest.raises(LookupError, match="nothing there") as caught:
            get({("x", i): (inc, i) for i in range(9)} | {"y": (fails, ("x", 8))}, "y", num_workers=workers)
        frames = traceback.extract_tb(caught.value.__traceback__)
        assert frames[-1].name == "fails"
        assert not any(frame.filename.startswith(os.path.dirname(dask.__file__)) for frame in frames)

    def test_first_error_ends_the_run(self):
        """No task starts after it, and those that run are waited for."""
        log: list = []
        running, failing = threading.Event(), threading.Event()

        def lasts():
            running.set()
            assert failing.wait(PATIENCE)
            time.sleep(0.05)
            log.append("done")

        def fails_then():
            assert running.wait(PATIENCE)
            failing.set()
            raise LookupError

        graph = {"lasts": (lasts,), "fails": (fails_then,)} | {("x", i): (log.append, i) for i in range(100)}
        with pytest.raises(LookupError):
            get(graph, list(graph), num_workers=2)
        assert log == ["done"]

    def test_every_worker_fails(self):
        """Of errors at the same time, one is raised, and every one leaves its thread."""
        barrier = threading.Barrier(4)

        def fails_together(number):
            barrier.wait(PATIENCE)
            raise LookupError(number)

        with pytest.raises(LookupError):
            get({("x", i): (fails_together, i) for i in range(4)}, [("x", i) for i in range(4)], num_workers=4)

    def test_ends_runs_inside(self):
        """An error ends the runs that tasks have started, too."""
        started, log = threading.Event(), []

        def inner():
            started.set()
            return ONE({("x", i): (lambda i: time.sleep(0.01) or log.append(i), i) for i in range(1000)}, [("x", i) for i in range(1000)])

        def fails_then():
            assert started.wait(PATIENCE)
            raise LookupError

        with pytest.raises(LookupError):
            get({"inner": (inner,), "fails": (fails_then,)}, ["inner", "fails"], num_workers=2)
        assert len(log) < 1000

    def test_no_run_inside_a_stopped_one(self):
        """A task that still runs after the error cannot start a run."""
        failing, caught = threading.Event(), []

        def late():
            assert failing.wait(PATIENCE)
            time.sleep(0.05)
            try:
                get({"x": (inc, 1)}, "x")
            except CancelledError as error:
                caught.append(str(error))

        def fails_then():
            failing.set()
            raise LookupError

        with pytest.raises(LookupError):
            get({"late": (late,), "fails": (fails_then,)}, ["late", "fails"], num_workers=2)
        assert caught == ["the run around this one was stopped"]

    def test_rerun_locally(self):
        """With rerun_exceptions_locally, from the call or from Dask's settings, a task that failed runs again in the calling thread."""
        both, threads = threading.Barrier(2), []

        def fails_elsewhere():
            if not threads:
                both.wait(PATIENCE)
            if threads or threading.current_thread() is not threading.main_thread():
                threads.append(threading.current_thread())
                fails()

        graph = {"x": (fails_elsewhere,), "y": (fails_elsewhere,)}
        with pytest.raises(LookupError):
            get(graph, ["x", "y"], num_workers=2, rerun_exceptions_locally=True)
        assert [thread is threading.main_thread() for thread in threads] == [False, True]
        threads[:] = [None]
        with pytest.raises(LookupError), dask.config.set(rerun_exceptions_locally=True):
            ONE(graph, "x")
        assert len(threads) == 3

    def test_errors_are_not_kept(self):
        """When nobody keeps the error, the results that its traceback leads to are gone, without the collector's help."""
        alive = Alive()
        gc.collect()
        gc.disable()
        try:
            for workers in (1, 2):
                with contextlib.suppress(LookupError):
                    get({"a": (alive.make,), "b": (fails, "a"), "c": (fails, "a")}, ["b", "c"], num_workers=workers)
            assert alive.count() == 0
        finally:
            gc.enable()


class Alive:
    """Makes results and counts those that are alive: `counts` says how many were, each time that one was made."""

    class Result:
        pass

    def __init__(self):
        self._lock, self._alive, self.counts = threading.Lock(), weakref.WeakSet(), []

    def count(self) -> int:
        return len(self._alive)

    def make(self, *_inputs) -> object:
        result = self.Result()
        with self._lock:
            self.counts.append(len(self._alive))
            self._alive.add(result)
        return result


class TestMemory:
    def test_chain(self):
        """A result is gone before the task after its last user starts; what get returns holds only what was wanted."""
        alive = Alive()
        graph = {("x", i): (alive.make, *([("x", i - 1)] if i else [])) for i in range(50)}
        kept = ONE(graph, [("x", 10), ("x", 49)])
        assert alive.counts == [0, *[1] * 11, *[2] * 38]
        assert alive.count() == len(kept) == 2

    def test_tree(self):
        """depth_first reduces a tree of 128 leaves with a result alive per level, and one more."""
        alive, level = Alive(), [("leaf", i) for i in range(128)]
        graph = dict.fromkeys(level, (alive.make,))
        while len(level) > 1:
            pairs = list(zip(level[::2], level[1::2], strict=True))
            level = [("sum", len(pairs), i) for i in range(len(pairs))]
            graph |= {key: (alive.make, *pair) for key, pair in zip(level, pairs, strict=True)}
        ONE(graph, level)
        assert max(alive.counts) <= 8

    def test_several_reductions_of_the_same(self):
        """depth_first reads a block, reduces it for all that need it, and drops it, also where the keys are wanted one after the other."""
        blocks, results = Alive(), Alive()
        graph: dict = {("block", i): (blocks.make,) for i in range(40)}
        for name in ("sum", "min", "max"):
            graph |= {(name, i): (results.make, ("block", i)) for i in range(40)}
            graph[name] = (results.make, [(name, i) for i in range(40)])
        ONE(graph, ["sum", "min", "max"])
        assert max(blocks.counts) == 0

    def test_sleeping_worker(self):
        """A worker that waits for others keeps no result alive."""
        alive, counts, threads = Alive(), [], []

        def last(_):
            time.sleep(0.05)  # the other worker has nothing more to do
            counts.append(alive.count())
            threads.append(threading.get_ident())

        graph = {"a": (alive.make,), "b": (lambda a: None, "a"), "c": (time.sleep, 0.05), "d": (last, "c")}
        for _ in range(2):
            get(graph, ["d", "b"], num_workers=2)
        assert counts == [0, 0]

    def test_fused(self):
        """A part of a fused task drops what no later part needs."""
        alive = Alive()
        parts = nodes({"p0": (alive.make,)} | {f"p{i}": (alive.make, f"p{i - 1}") for i in range(1, 9)})
        get({"fused": type(parts["p0"]).fuse(*parts.values(), key="fused")}, "fused")
        assert alive.counts == [0, *[1] * 8]


class Lockstep:
    """A Dask graph whose tasks end one by one, the one whose time has come first, when no worker is left that could start another.

    So what runs beside what is the same in every run, on any machine, and so is `peak`: the most bytes of results alive at a time. A task
    takes from 0.5 to 2 of a time that nobody waits for, drawn for `seed`. A result lives from the end of its task to that of its last user.
    """

    def __init__(self, graph: dict, keys: list, workers: int, seed: int):
        found = nodes(graph)
        tasks = {key: node for key, node in found.items() if not isinstance(node, DataNode)}
        self.wanted, self.workers, self.seed = set(keys), workers, seed
        self.inputs: dict = {}
        missing = list(keys)
        while missing:
            if (key := missing.pop()) in tasks and key not in self.inputs:
                self.inputs[key] = tasks[key].dependencies & tasks.keys()
                missing += self.inputs[key]
        self.users: dict = {key: [] for key in self.inputs}
        for key, inputs in self.inputs.items():
            for each in inputs:
                self.users[each].append(key)
        self.waiting = {key: len(inputs) for key, inputs in self.inputs.items()}
        self.uses = {key: len(users) + (key in self.wanted) for key, users in self.users.items()}
        self.ready = {key for key, inputs in self.inputs.items() if not inputs}
        self.running: dict = {}
        self.sizes: dict = {}
        self.now, self.turn, self.change = 0.0, None, threading.Condition()
        self.live = self.peak = 0
        self.graph = found | {
            key: Task(
                key, self.run, key, partial(self.evaluate, tasks[key], before := tuple(tasks[key].dependencies)), *map(TaskRef, before)
            )
            for key in self.inputs
        }

    @staticmethod
    def evaluate(node, names: tuple, *values):
        return node(dict(zip(names, values, strict=True)))

    def run(self, key, evaluate, *values):
        with self.change:
            self.ready.discard(key)
            self.running[key] = self.now + random.Random(f"{self.seed}{key[1:]}{key_split(key)}").uniform(0.5, 2)
            self.call_next()
            assert self.change.wait_for(lambda: self.turn == key, 10 * PATIENCE)
            result = evaluate(*values)
            self.now, self.turn = self.running.pop(key), None
            self.sizes[key] = size_of(result)
            self.live += self.sizes[key]
            self.peak = max(self.peak, self.live)
            for user in self.users[key]:
                self.waiting[user] -= 1
                if not self.waiting[user]:
                    self.ready.add(user)
            for each in self.inputs[key]:
                self.uses[each] -= 1
                if not self.uses[each]:
                    self.live -= self.sizes[each]
            self.call_next()
            return result

    def call_next(self) -> None:
        if self.turn is None and self.running and len(self.running) == min(self.workers, len(self.running) + len(self.ready)):
            self.turn = min(self.running, key=self.running.get)
            self.change.notify_all()


def size_of(result) -> int:
    if isinstance(result, dict | list | tuple):
        return sum(map(size_of, result.values() if isinstance(result, dict) else result))
    return getattr(result, "nbytes", 0)


class TestMemoryOfArrays:
    """By default the most bytes of results alive at a time are at most 1.1 times those of dask.threaded, on as many workers."""

    SIDE = 120
    ARRAYS: ClassVar = {
        "sum": lambda x: x.sum(),
        "mean": lambda x: x.mean(axis=0),
        "std": lambda x: (x + 1).std(axis=1),
        "cumsum of rows": lambda x: x.cumsum(axis=0).sum(),
        "cumsum of columns": lambda x: x.cumsum(axis=1),
        "centred": lambda x: (x - x.mean(axis=0)).std(),
        "rows": lambda x: x.rechunk((5, 120)).sum(axis=1),
        "squares": lambda x: x.rechunk((17, 17)).max(),
        "shuffled": lambda x: x.shuffle([list(range(i, 120, 6)) for i in range(6)], axis=0).sum(),
    }

    def peak(self, get, name: str, chunks: tuple, workers: int, seed: int) -> int:
        array = self.ARRAYS[name](da.random.default_rng(1).random((self.SIDE, self.SIDE), chunks=chunks))
        (array,) = dask.optimize(array)
        keys = list(flatten(array.__dask_keys__()))
        lockstep = Lockstep(dict(array.__dask_graph__()), keys, workers, seed)
        get(lockstep.graph, keys, num_workers=workers)
        return lockstep.peak

    @pytest.mark.parametrize("chunks", [(10, 120), (24, 24), (120, 60)])
    @pytest.mark.parametrize("name", ARRAYS)
    def test_one_worker(self, name, chunks):
        assert self.peak(get, name, chunks, 1, 0) <= 1.1 * self.peak(dask.threaded.get, name, chunks, 1, 0)

    @pytest.mark.parametrize("workers", [2, 4])
    @pytest.mark.parametrize("name", ARRAYS)
    def test_several_workers(self, name, workers):
        """On the mean of several draws of what the tasks take: by chance one or the other is ahead."""
        ours, daskes = [[self.peak(g, name, (24, 24), workers, seed) for seed in range(3)] for g in (get, dask.threaded.get)]
        assert sum(ours) <= 1.1 * sum(daskes)


class TestThreads:
    def test_none_for_a_chain(self):
        """Where never two tasks are ready, no thread is started."""
        graph = {("x", i): (lambda *_: threading.get_ident(), *([("x", i - 1)] if i else [])) for i in range(30)}
        assert set(get(graph, list(graph), num_workers=8)) == {threading.get_ident()}

    def test_as_many_as_workers(self, monkeypatch):
        """num_workers tasks run at a time, where so many are ready, and no more; from the call, Dask's settings, or the usable cores."""
        barrier = threading.Barrier(3)
        graph = {("x", i): (lambda i: (barrier.wait(PATIENCE) and None) or threading.get_ident(), i) for i in range(30)}
        assert len(set(get(graph, list(graph), num_workers=3))) == 3
        monkeypatch.setattr(workers, "usable_cores", lambda: 3)
        assert len(set(get(graph, list(graph)))) == 3
        with dask.config.set(num_workers=3):
            assert len(set(get(graph, list(graph)))) == 3

    def test_woken_again(self):
        """A worker that had nothing to do joins in when there is something again."""
        barrier = threading.Barrier(2)
        graph: dict = {"start": (inc, 0)}
        before = "start"
        for i in range(20):
            graph |= {("x", i, side): (lambda *_: barrier.wait(PATIENCE), before) for side in "lr"}
            before = ("join", i)
            graph[before] = (lambda *_: time.sleep(0.002), ("x", i, "l"), ("x", i, "r"))
        get(graph, before, num_workers=2)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_nested(self, workers):
        """Tasks may compute, to any depth, on any number of workers."""

        def nest(depth):
            if not depth:
                return 1
            return get({("n", i): (nest, depth - 1) for i in range(2)} | {"sum": (add, ("n", 0), ("n", 1))}, "sum", num_workers=workers)

        assert nest(5) == 32

    @pytest.mark.parametrize("kind", [ThreadPool, ThreadPoolExecutor])
    def test_pool(self, kind):
        """With a pool, from the call or from Dask's settings, tasks run in its threads only, also those of runs inside."""
        barrier = threading.Barrier(3)

        def work(i):
            barrier.wait(PATIENCE)
            return (
                threading.get_ident(),
                *get({("y", j): (threading.get_ident,) for j in range(3)}, [("y", j) for j in range(3)], pool=pool),
            )

        with kind(3) as pool:
            graph = {("x", i): (work, i) for i in range(9)}
            threads = set(sum(get(graph, list(graph), pool=pool), ()))
            assert len(threads) == 3
            assert threading.get_ident() not in threads
            with dask.config.set(pool=pool):
                assert set(sum(get(graph, list(graph)), ())) == threads
                with pytest.raises(LookupError):
                    get({"x": (fails,)}, "x")

    def test_pool_of_one(self):
        """Runs inside runs on a pool of one thread wait for nobody."""

        def nest(depth):
            return 0 if not depth else 1 + get({"x": (nest, depth - 1), "y": (inc, 1)}, ["x", "y"], pool=pool)[0]

        with ThreadPoolExecutor(1) as pool:
            assert get({"x": (nest, 4)}, "x", pool=pool) == 4

    def test_pool_of_processes(self):
        """Is refused; as Dask's setting, which is for another scheduler then, it is passed over."""
        with ProcessPoolExecutor(1) as pool:
            with pytest.raises(TypeError, match="got ProcessPoolExecutor"):
                get({"x": 1}, "x", pool=pool)
            with dask.config.set(pool=pool):
                assert get({"x": (os.getpid,)}, "x") == os.getpid()

    def test_called_from_several_threads(self):
        """Runs at the same time do not meet."""
        graphs = [random_graph(seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as callers:
            for _ in range(3):
                results = list(callers.map(lambda graph: get(graph, list(graph), num_workers=2), graphs))
                assert results == [dask.get(graph, list(graph)) for graph in graphs]

    def test_context(self):
        """Tasks see the context variables of the caller, and what they set does not reach it."""
        variable = ContextVar("variable", default="default")
        token = variable.set("set")
        barrier = threading.Barrier(2)

        def look(i):
            barrier.wait(PATIENCE)
            seen = variable.get()
            variable.set(f"set by {i}")
            return seen

        try:
            assert get({("x", i): (look, i) for i in range(2)}, [("x", 0), ("x", 1)], num_workers=2) == ("set", "set")
            assert variable.get() == "set"
        finally:
            variable.reset(token)


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


class TestInterrupt:
    """Ctrl-C in the calling thread. `nothing_stays` sees to it that no thread does."""

    def stopped(self, graph: dict, **options: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            get(graph, list(graph), **options)

    def end_of_workers(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while workers_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def test_in_a_task(self):
        """While the calling thread runs a task: that is interrupted, and no other starts."""
        log: list[int] = []
        graph = {"x": (lambda: interrupt() or time.sleep(PATIENCE),)} | {("x", i): (log.append, i) for i in range(20)}
        self.stopped(graph, num_workers=1)
        assert log == []

    def test_while_others_run(self):
        """While the calling thread has nothing to do: where it is asked for, the task that runs is waited for, and no other starts."""
        log: list[str] = []
        both = threading.Barrier(2)

        def task():
            both.wait(PATIENCE)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.05)  # the main thread sleeps now
                interrupt()
                time.sleep(0.05)
                log.append("done")

        graph = {"x": (task,), "y": (task,), "z": (lambda *_: log.append("started"), "x", "y")}
        self.stopped(graph, num_workers=2, finish_running=True)
        assert log == ["done"]
        with dask.config.set({"taskgpt.finish-running": True}):
            self.stopped(graph, num_workers=2)
        assert log == ["done"] * 2

    @pytest.mark.parametrize("where", ["pool", "idle caller", "working caller"])
    def test_at_once(self, where):
        """The tasks that run in other threads are not waited for; no other starts, and no callback is called any more."""
        all_run, may_end, interrupts = threading.Barrier(3), threading.Event(), threading.Lock()
        log, calls = [], []

        def task():
            all_run.wait(PATIENCE)
            if threading.current_thread() is threading.main_thread():
                if where == "working caller":
                    interrupt()
                    time.sleep(PATIENCE)
                return
            if where != "working caller" and interrupts.acquire(blocking=False):
                time.sleep(0.05)  # the main thread sleeps now
                interrupt()
            assert may_end.wait(PATIENCE)
            log.append("ended")

        graph = dict.fromkeys("abc", (task,)) | {"after": (lambda *_: log.append("started"), "a", "b", "c")}
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(3)) if where == "pool" else None
            stack.callback(may_end.set)
            stack.enter_context(Callback(posttask=lambda key, *_: calls.append(key), finish=lambda *_: calls.append("finish")))
            self.stopped(graph, num_workers=3, pool=pool)
            assert log == []
        self.end_of_workers()
        assert log == ["ended"] * (3 if where == "pool" else 2)
        assert calls[-1] == "finish"

    def test_as_the_caller_stops_working(self, monkeypatch):
        """However late it comes: what the caller runs next is not inside of the run that was stopped."""
        leave, interrupts = workers._Computation._leave, iter([KeyboardInterrupt])

        def interrupted(run, outer):
            for error in interrupts:
                raise error
            leave(run, outer)

        monkeypatch.setattr(workers._Computation, "_leave", interrupted)
        self.stopped({"x": (inc, 1)}, num_workers=1)
        assert get({"x": (inc, 1)}, "x") == 2

    def test_between_tasks(self):
        """While many short tasks run, wherever it comes."""
        graph = {("x", i): (inc, i) for i in range(20_000)} | {("y", i): (inc, ("x", i)) for i in range(20_000)}
        for moment in (100, 5_000, 15_000):
            self.stopped(graph | {("x", moment): (lambda: interrupt() or 0,)}, num_workers=2)
            self.end_of_workers()

    def test_in_a_run_inside(self):
        """All runs, around and inside, are stopped."""
        log: list[int] = []
        inner = {("x", i): (lambda i: time.sleep(0.01) or log.append(i), i) for i in range(1000)}
        started = threading.Event()

        def run_inner(i):
            started.set()
            return ONE(inner, list(inner))

        def interrupt_then():
            assert started.wait(PATIENCE)
            interrupt()

        self.stopped({("outer", i): (run_inner, i) for i in range(2)} | {"interrupt": (interrupt_then,)}, num_workers=3)
        self.end_of_workers()
        assert len(log) < 1000

    def test_second(self):
        """A second Ctrl-C does not wait for the tasks that still run."""
        running, over = threading.Event(), threading.Event()

        def lasts():
            running.set()
            time.sleep(0.05)
            interrupt()
            assert over.wait(PATIENCE)

        def interrupted():
            assert running.wait(PATIENCE)
            interrupt()
            time.sleep(PATIENCE)

        self.stopped({"a": (interrupted,), "b": (lasts,)}, num_workers=2, finish_running=True)
        assert workers_alive()
        over.set()
        self.end_of_workers()  # an interrupted Thread.join takes the thread for dead, so that another would not wait
