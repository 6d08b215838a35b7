"""A Graph among Dask's collections, on a Client, and outside any scheduler of ours: it runs once for every time that it is computed."""

import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import dask
import dask.array as da
import dask.base
import kernels_for_tests as k
import numpy as np
import pytest
from dask.graph_manipulation import bind
from dask.typing import HLGDaskCollection
from distributed import Client, LocalCluster
from threadpoolctl import threadpool_info, threadpool_limits

import taskgpt
from taskgpt.tasks import Graph, TaskError, dims, kernel, one_blas_thread, run_now
from taskgpt.tasks.access import Commutative, InOut

(N,) = dims("N")


@kernel
def bump_together(x: Commutative[N]):
    x += 1


def counting(a, length: int = 12) -> Graph:
    """A chain for each cell: whoever runs it whole adds `length` to every x."""
    graph = Graph()
    for _ in range(length):
        for cell in range(k.CELLS):
            graph.spawn(k.nap, a.x[cell], a.log[cell], 0)
    return graph


def runs(a, length: int = 12) -> float:
    """How many times it ran."""
    times = (a.x.array - np.arange(k.CELLS * 4).reshape(k.CELLS, 4)) / length
    assert times.min() == times.max()
    return times.min()


class TestCollection:
    def test_compute(self):
        """Computed, a graph runs, every time, and gives None; beside arrays, inside of what Dask looks into, and on any `get`."""
        a = k.arena(is_shared=False)
        graph = counting(a)
        for times, scheduler in enumerate(["sync", "threads", taskgpt.get], start=1):
            assert dask.compute({"graph": [graph]}, da.ones(5, chunks=2).sum(), scheduler=scheduler) == ({"graph": [None]}, 5)
            assert runs(a) == times
        assert dask.compute(graph, graph, optimize_graph=False) == (None, None)  # the same collection twice is computed once
        assert graph.compute(num_workers=2) is None
        assert runs(a) == 5

    def test_protocol(self):
        assert isinstance(Graph(), HLGDaskCollection)
        assert dask.compute(Graph()) == (None,)

    def test_several_graphs(self):
        """Graphs of the same kernels and sections that are computed together all run: their keys and layers do not meet."""
        arenas = [k.arena(is_shared=False) for _ in range(3)]
        dask.compute([counting(a) for a in arenas])
        assert [runs(a) for a in arenas] == [1, 1, 1]

    def test_grown(self):
        """Tasks that were spawned after Dask looked at a graph run, too."""
        a = k.arena(is_shared=False)
        graph = counting(a)
        assert dask.is_dask_collection(graph)
        for cell in range(k.CELLS):
            graph.spawn(k.nap, a.x[cell], a.log[cell], 0)
        dask.compute(graph)
        assert runs(a, length=13) == 1

    def test_delayed(self):
        """A delayed call that takes a graph runs after it; so does a collection that is bound to one."""
        a = k.arena(is_shared=False)
        assert dask.delayed(lambda nothing: (nothing, runs(a)))(counting(a)).compute() == (None, 1)
        after = bind(dask.delayed(lambda: runs(a))(), counting(a))
        assert after.compute() == 2

    def test_persist(self):
        """A persisted graph has run; computing what it became runs nothing. Optimising leaves every task as it is."""
        a = k.arena(is_shared=False)
        (done,) = dask.persist(counting(a))
        assert dask.compute(done) == (None,)
        assert runs(a) == 1
        (optimized,) = dask.optimize(graph := counting(a))
        assert len(optimized.__dask_graph__()) == len(graph.tasks)
        dask.compute(optimized)
        assert runs(a) == 2

    def test_visualize(self, monkeypatch):
        """dask.visualize gets every task, and its edges."""
        drawn: list = []
        monkeypatch.setattr(dask.base, "visualize_dsk", lambda dsk, **_: drawn.append(dsk))
        graph = counting(k.arena(is_shared=False))
        dask.visualize(graph)
        graph.visualize()
        for dsk in drawn:
            assert {(key[1], before[1]) for key, task in dsk.items() for before in task.dependencies} == {
                (task.number, p) for task in graph.tasks for p in task.predecessors
            }
        assert len(drawn) == 2

    def test_no_dask(self):
        """A graph that Dask does not ask for does not load Dask."""
        code = "import sys, taskgpt.tasks; taskgpt.tasks.Graph(); sys.exit('dask' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_is_not_kept(self):
        """A graph that was computed goes with its last reference."""
        graph = counting(k.arena(is_shared=False))
        gc.collect()
        gc.disable()
        try:
            dask.compute(graph, scheduler="sync")
            gone = weakref.ref(graph)
            del graph
            assert gone() is None
        finally:
            gc.enable()


def client(**options) -> Iterator[Client]:
    with (
        LocalCluster(**options, dashboard_address=":0", scheduler_kwargs={"dashboard": False}, memory_limit=0) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="class")
def threads() -> Iterator[Client]:
    yield from client(n_workers=1, threads_per_worker=2, processes=False)


@pytest.fixture(scope="class")
def processes() -> Iterator[Client]:
    yield from client(n_workers=2, threads_per_worker=1, processes=True)


class TestClient:
    """A Dask cluster that is not ours."""

    @pytest.mark.parametrize("is_shared", [False, True])
    def test_threads(self, threads, is_shared):
        """On workers of this process, tensors of any kind: as often as it is asked for, by get, compute or persist, also at one time."""
        a, b = k.arena(is_shared), k.arena(is_shared)
        graph, other = counting(a), counting(b)
        for _ in range(3):
            threads.get(*graph.to_dask())
        dask.compute(graph, other, scheduler=threads)
        threads.compute([graph, other], sync=True)
        dask.compute(dask.persist(graph, scheduler=threads), scheduler=threads)
        assert (runs(a), runs(b)) == (6, 2)

    def test_processes(self, processes):
        """On worker processes, shared tensors; with one BLAS thread where the tasks run."""
        a = k.arena(is_shared=True)
        graph = counting(a)
        for _ in range(3):
            processes.get(*graph.to_dask())
        dask.compute(graph, scheduler=processes)
        assert runs(a) == 4
        blas = Graph()
        for cell in range(k.CELLS):
            blas.spawn(k.count_blas_threads, a.x[cell])
        dask.compute(blas, scheduler=processes)
        assert (a.x.array == 1).all()

    @pytest.mark.parametrize("what", ["private", "commutative", "local"])
    def test_processes_refuse(self, processes, what):
        """What a worker process could only compute on a copy, lock in a copy, or not import: one error that says what to do."""
        a = k.arena(is_shared=what != "private")
        graph = Graph(allow_commutative=what == "commutative")
        graph.spawn({"private": k.double, "commutative": k.add_one, "local": not_importable}[what], a.x[0])
        message = {
            "private": r"^tensor 'x' lives in the memory of one process, .*shared=True.* or use threads$",
            "commutative": r"^commutative tasks lock their tiles, .* or use threads$",
            "local": r"^another process cannot import test_to_dask.pickle_me_not; .* or use threads$",
        }
        before = a.x.array.copy()
        for scheduler in (processes, "processes"):
            with pytest.raises(TypeError, match=message[what]):
                dask.compute(graph, scheduler=scheduler)
        assert (a.x.array == before).all()

    def test_pickled_here(self):
        """Pickled and unpickled in one process, as a Client does it, a task is the same, on the same tensors, while its graph lives."""
        a = k.arena(is_shared=False)
        graph = Graph(allow_commutative=True)
        graph.spawn(bump_together, a.x[0])
        tasks, (last,) = graph.to_dask()
        pickled = pickle.dumps(pickle.loads(pickle.dumps(tasks)))
        dask.get(pickle.loads(pickled), last)
        assert (a.x.array[0] == [1, 2, 3, 4]).all()
        del graph, tasks
        with pytest.raises(TypeError, match="graph was dropped before it ran"):
            dask.get(pickle.loads(pickled), last)


@kernel
def pickle_me_not(x: InOut[N]):
    x += 1


not_importable, pickle_me_not = pickle_me_not, None


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


class TestOneBlasThread:
    """Outside of schedulers, too, tasks have a BLAS of one thread, and the caller has his own again after them."""

    @pytest.fixture(autouse=True)
    def three_threads(self):
        with threadpool_limits(3, user_api="blas"):
            assert blas_threads() == {3}
            yield
            assert blas_threads() == {3}

    @pytest.mark.parametrize("way", ["run_now", "task", "sync", "threads", "get"])
    def test_where_tasks_run(self, way):
        a, graph = k.arena(is_shared=False), Graph()
        for cell in range(k.CELLS):
            graph.spawn(k.count_blas_threads, a.x[cell])
        if way == "run_now":
            run_now(k.count_blas_threads, a.x[0])
            a.x.array[1:] = a.x.array[0]
        elif way == "task":
            for task in graph.tasks:
                task.run()
        else:
            dask.compute(graph, scheduler=taskgpt.get if way == "get" else way)
        assert (a.x.array == 1).all()

    def test_after_a_failure(self):
        a = k.arena(is_shared=False)
        with pytest.raises(TaskError):
            Graph().spawn(k.fail, a.x[0], a.log[0]).run()
        with pytest.raises(ZeroDivisionError):
            run_now(k.fail, a.x[0], a.log[0])

    def test_held_by_several(self):
        """The first to come changes the setting, the last to go undoes it, in whatever order."""
        inside, leave = threading.Event(), threading.Event()

        def other():
            with one_blas_thread:
                inside.set()
                leave.wait(20)

        thread = threading.Thread(target=other)
        with one_blas_thread:
            thread.start()
            inside.wait(20)
        assert blas_threads() == {1}
        with one_blas_thread:
            leave.set()
            thread.join()
            assert blas_threads() == {1}

    def test_new_library(self, monkeypatch):
        """A BLAS that came with an import since the last time is limited, too."""
        with one_blas_thread:
            pass
        monkeypatch.setattr(one_blas_thread, "_libraries", [])
        monkeypatch.setitem(sys.modules, "a module that brings a BLAS", None)
        with one_blas_thread:
            assert blas_threads() == {1}
