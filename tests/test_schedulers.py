"""One contract for every scheduler, then what is particular to each."""

import asyncio
import contextlib
import errno
import gc
import importlib.machinery
import os
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.request
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker

import kernels_for_tests as k
import numpy as np
import psutil
import pytest
from dask.callbacks import Callback
from dask.system import cpu_count
from dask.utils import key_split
from programs import started
from threadpoolctl import threadpool_info

import taskgpt
from taskgpt import config
from taskgpt.errors import UserError
from taskgpt.schedulers import Scheduler, WorkerError, local_cluster, open_scheduler
from taskgpt.schedulers.cores import _quota_cores, usable_cores
from taskgpt.schedulers.loops import cut
from taskgpt.tasks import Graph, TaskError, TwinError, check, compile_kernels, run_now

# Scheduler file and overrides. A scheduler joins the contract by joining this list.
VARIANTS = {
    "sequential": ("sequential", {}),
    "loops, 1 worker": ("loops", {"workers": 1}),
    "loops, 2 workers": ("loops", {"workers": 2}),
    "loops, 3 workers": ("loops", {"workers": 3}),
    "loops, dynamic chunks": ("loops-dynamic", {"workers": 3, "chunk_size": 2}),
    "loops, some kernels": ("loops", {"workers": 2, "coverage": "covered"}),
    "native, 1 worker": ("native", {"workers": 1}),
    "native, 2 workers": ("native", {"workers": 2}),
    "native, 4 workers, a queue each": ("native", {"workers": 4, "work_stealing": True}),
    "native, newest first": ("native", {"workers": 3, "policy": "newest_first", "immediate_successor": False}),
    "native, longest path first": ("native", {"workers": 3, "policy": "longest_path_first", "record": 1000}),
    "native, same core first": ("native", {"workers": 3, "policy": "same_core_first"}),
    "native, same core first, a queue each": ("native", {"workers": 3, "policy": "same_core_first", "work_stealing": True}),
    "native, idle": ("native", {"workers": 2, "idle": "idle", "binding": "cores"}),
    "native, busy": ("native", {"workers": 2, "idle": "busy"}),
    "threads, 1 worker": ("threads", {"workers": 1, "coarsen": 0}),
    "threads, 2 workers": ("threads", {"workers": 2, "coarsen": 0}),
    "threads, 3 workers": ("threads", {"workers": 3, "coarsen": 0}),
    "threads, coarsened": ("threads", {"workers": 2, "coarsen": 12}),
    "local-cluster, threads": ("local-cluster", {"workers": 2, "coarsen": 0, "dashboard": -1}),
    "local-cluster, 1 process": ("local-cluster-processes", {"workers": 1, "coarsen": 12, "dashboard": -1}),
    "local-cluster, 2 processes": ("local-cluster-processes", {"workers": 2, "coarsen": 0, "dashboard": -1}),
}
NAMES = ["native", "sequential", "loops", "threads", "local-cluster", "local-cluster-processes"]


def opened(name: str, **overrides: object) -> Scheduler:
    chosen = config.load_scheduler(name, overrides)
    return open_scheduler(chosen.scheduler, chosen.settings)


@pytest.fixture(scope="class", params=VARIANTS)
def scheduler(request) -> Iterator[Scheduler]:
    name, overrides = VARIANTS[request.param]
    with opened(name, **overrides) as scheduler:
        yield scheduler


class TestContract:
    @pytest.mark.parametrize("seed", range(4))
    def test_order(self, scheduler, seed):
        """Every task runs once, each after its predecessors."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = k.random_graph(a, seed)
        scheduler.run(graph)
        log = a.log.array
        assert (log[: len(graph.tasks), k.RUNS] == 1).all()
        for task in graph.tasks:
            for p in task.predecessors:
                assert log[p, k.STOP] <= log[task.number, k.START], f"{task} started before {graph.tasks[p]} was done"

    @pytest.mark.parametrize("seed", range(4))
    def test_same_bits(self, scheduler, seed):
        """The results are those of program order, to the bit, in every run."""
        a, expected = k.arena(scheduler.needs_shared_memory), k.arena(is_shared=False)
        graph = k.random_graph(a, seed)
        for _ in range(3):
            scheduler.run(graph)
            k.random_program(run_now, expected, seed)
            assert a.x.array.tobytes() == expected.x.array.tobytes()

    def test_every_run_runs(self, scheduler):
        """A graph that ran runs again: Distributed, for one, skips keys that it knows."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = k.random_graph(a, seed=5, length=10)
        for runs in range(1, 9):
            scheduler.run(graph)
            assert (a.log.array[:10, k.RUNS] == runs).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_records(self, name):
        """Asked for, every task of every run has a record: ready after its predecessors, on a worker that does one thing at a time."""
        with opened(name, record=10_000, **({} if name == "sequential" else {"workers": 2})) as scheduler:
            a = k.arena(scheduler.needs_shared_memory)
            graphs = [k.random_graph(a, seed) for seed in range(2)]
            for order in ((0, 1, 0), (1,)):
                before = time.monotonic_ns()
                for _ in scheduler.run_each(graphs[n] for n in order):
                    pass
                records, lost = scheduler.take_records()
                tasks = [scheduler.as_run(graphs[n]).tasks for n in order]
                first = records["run"].min()
                assert lost == 0
                assert sorted(records[["run", "task"]].tolist()) == [(first + n, t.number) for n, ts in enumerate(tasks) for t in ts]
                assert (before <= records["ready_ns"]).all()
                assert (records["ready_ns"] <= records["start_ns"]).all()
                assert (records["start_ns"] <= records["stop_ns"]).all()
                by_key = {(r["run"] - first, r["task"]): r for r in records}
                for n, ts in enumerate(tasks):
                    for task in ts:
                        for p in task.predecessors:
                            assert by_key[n, p]["stop_ns"] <= by_key[n, task.number]["ready_ns"]
                for worker in range(scheduler.workers):
                    mine = records[records["worker"] == worker]
                    assert (mine["stop_ns"][:-1] <= mine["start_ns"][1:]).all()
                assert set(records["worker"]) <= set(range(scheduler.workers))
            assert len(scheduler.take_records()[0]) == 0

    @pytest.mark.parametrize("name", NAMES)
    def test_records_without_room(self, name):
        """Times that find no room are counted."""
        with opened(name, record=3, workers=1) as scheduler:
            a = k.arena(scheduler.needs_shared_memory)
            graph = k.random_graph(a, seed=0)
            scheduler.run(graph)
            records, lost = scheduler.take_records()
            assert (len(records), lost) == (3, len(scheduler.as_run(graph).tasks) - 3)

    def test_graphs_alternate(self, scheduler):
        """Training, validation and sampling take turns on one scheduler and on the same tensors."""
        a, expected = k.arena(scheduler.needs_shared_memory), k.arena(is_shared=False)
        graphs = [k.random_graph(a, seed, length=10 + seed) for seed in range(3)]
        for seed in (0, 1, 0, 2, 2, 1):
            scheduler.run(graphs[seed])
            k.random_program(run_now, expected, seed, length=10 + seed)
        assert a.x.array.tobytes() == expected.x.array.tobytes()

    def test_run_each(self, scheduler):
        """Graphs that may overlap give the results of running in turn; the next is asked for one ahead at most, and they come in order."""
        a, expected = k.arena(scheduler.needs_shared_memory), k.arena(is_shared=False)
        graphs = [k.random_graph(a, seed, length=20 + seed) for seed in range(3)]
        order = (0, 1, 0, 1, 2, 2, 2, 0, 1, 0)
        asked = []

        def ask():
            for seed in order:
                asked.append(seed)
                yield graphs[seed]

        for done, (seed, graph) in enumerate(zip(order, scheduler.run_each(ask()), strict=True), start=1):
            assert graph is graphs[seed]
            assert done <= len(asked) <= done + 1
            k.random_program(run_now, expected, seed, length=20 + seed)
        assert a.x.array.tobytes() == expected.x.array.tobytes()

    def test_run_each_left_early(self, scheduler):
        """What has begun is finished: the tensors are those after the runs of all graphs that were asked for, and nothing runs any more."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = k.naps(a, milliseconds=1, length=5)
        asked = []

        def ask(at_most: int):
            for turn in range(5):
                if turn == at_most:
                    raise ZeroDivisionError
                asked.append(turn)
                yield graph

        def close():
            runs = scheduler.run_each(ask(5))
            next(runs)
            runs.close()

        def leave(stop: type[Exception] | None):
            for _ in scheduler.run_each(ask(5)):
                if stop:
                    raise stop
                break

        for way in (close, lambda: leave(None), lambda: leave(ZeroDivisionError), lambda: list(scheduler.run_each(ask(2)))):
            before = len(asked)
            with contextlib.suppress(ZeroDivisionError):
                way()
            gc.collect()
            assert 1 <= len(asked) - before <= 2
            assert (a.log.array[: len(graph.tasks), k.RUNS] == len(asked)).all()
            assert not graph.runs
        assert_stopped(a, most=len(graph.tasks))
        self.test_order(scheduler, seed=8)

    def test_an_iterator_that_nobody_closes(self, scheduler):
        """It keeps a run under way at most; whoever runs something next waits for that first."""
        a, expected = k.arena(scheduler.needs_shared_memory), k.arena(is_shared=False)
        graphs = [k.random_graph(a, seed, length=20) for seed in range(2)]
        asked = []
        runs = scheduler.run_each(asked.append(0) or graphs[0] for _ in range(5))
        next(runs)
        scheduler.run(graphs[1])
        for seed in (*asked, 1):
            k.random_program(run_now, expected, seed, length=20)
        assert a.x.array.tobytes() == expected.x.array.tobytes()
        runs.close()
        assert a.x.array.tobytes() == expected.x.array.tobytes()

    def test_tasks_cannot_spawn(self, scheduler):
        """A task that spawns into a graph from outside fails at once, and says why; the graph stays as it was."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        graph.spawn(k.spawn_outside, a.x[0], a.log[0])
        why = "RuntimeError: a task cannot record into graph 'outside', which it has not made; spawn tasks of tasks in a program$"
        with pytest.raises(TaskError, match=r"^task 0, spawn_outside .*: " + why):
            scheduler.run(graph)
        with pytest.raises(TaskError, match=why):
            list(scheduler.run_each([check(graph)]))
        assert len(k.OUTSIDE.tasks) == 0
        if not scheduler.needs_shared_memory:  # where the task can get at the graph that runs
            graph = Graph("itself")
            graph.spawn(k.act, a.x[0], a.log[0])
            with within(lambda: graph.spawn(k.nap, a.x[0], a.log[1], 0)), pytest.raises(TaskError, match=r"^task 0, act .*graph 'itself'"):
                scheduler.run(graph)
            assert len(graph.tasks) == 1
        self.test_order(scheduler, seed=8)

    def test_tasks_cannot_run_graphs(self, scheduler):
        """A task that asks its own scheduler for a run fails at once, whatever way it asks; with a scheduler of its own it runs graphs."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        graph.spawn(k.spawn_inside, a.x[0], a.log[0])
        scheduler.run(graph)
        assert (a.x.array[0] == [2, 3, 4, 5]).all()
        if not scheduler.needs_shared_memory:  # a worker process cannot get at the scheduler
            inner, graph = k.random_graph(a, seed=0), Graph()
            graph.spawn(k.act, a.x[0], a.log[0])
            for ask in (lambda: scheduler.run(inner), lambda: next(scheduler.run_each([inner]))):
                why = (
                    r"^task 0, act .*: RuntimeError: this scheduler is in the middle of a run, and neither a task of it nor another thread"
                )
                with within(ask), pytest.raises(TaskError, match=why):
                    scheduler.run(graph)
            with within(lambda: taskgpt.get(*inner.to_dask())):
                scheduler.run(graph)
            assert (a.log.array[1 : len(inner.tasks), k.RUNS] == 1).all()
        self.test_order(scheduler, seed=8)

    def test_other_threads_while_a_graph_runs(self, scheduler):
        """Another thread can neither spawn into the graph nor start a run; afterwards both work."""
        a, errors = k.arena(scheduler.needs_shared_memory), []
        graph, other = Graph("held"), k.random_graph(a, seed=0)
        graph.spawn(k.hold, a.x[0], a.log[0])

        def meddle():
            while not a.log.array[0, k.START]:
                time.sleep(0.001)
            for ask in (lambda: graph.spawn(k.nap, a.x[0], a.log[1], 0), lambda: scheduler.run(other)):
                try:
                    ask()
                except RuntimeError as error:
                    errors.append(str(error))
            a.x.array[0] = -1

        meddler = threading.Thread(target=meddle)
        meddler.start()
        scheduler.run(graph)
        meddler.join()
        assert errors[0] == "graph 'held' is being run, and the task would not be; spawn it before the run or after its end"
        assert errors[1].startswith("this scheduler is in the middle of a run")
        graph.spawn(k.nap, a.x[0], a.log[1], 0)
        scheduler.run(graph)
        assert a.log.array[:2, k.RUNS].tolist() == [2, 1]

    def test_run_within_run_each(self, scheduler):
        """A run in between, by who asks for graphs or by who gives them, comes between them."""
        a, expected = k.arena(scheduler.needs_shared_memory), k.arena(is_shared=False)
        graphs = [k.random_graph(a, seed, length=20) for seed in range(2)]

        def ask():
            for turn in range(4):
                if turn == 2:
                    scheduler.run(graphs[1])
                yield graphs[0]

        for turn, _ in enumerate(scheduler.run_each(ask())):
            if turn == 3:
                scheduler.run(graphs[1])
        for seed in (0, 0, 1, 0, 0, 1):
            k.random_program(run_now, expected, seed, length=20)
        assert a.x.array.tobytes() == expected.x.array.tobytes()

    def test_growing_graph(self, scheduler):
        """A graph that was recorded further after it ran is run whole."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        scheduler.run(graph)
        graph.spawn(k.nap, a.x[0], a.log[0], 0)
        scheduler.run(graph)
        graph.spawn(k.nap, a.x[0], a.log[1], 0)
        scheduler.run(graph)
        assert list(a.log.array[:3, k.RUNS]) == [2, 1, 0]

    def test_compiled_kernel(self, scheduler):
        """Kernels run as their compiled twins, in worker processes too."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        for cell in range(k.CELLS):
            graph.spawn(k.double, a.x[cell])
        compile_kernels(graph.kernels)
        scheduler.run(graph)
        assert (a.x.array == 2 * k.arena(is_shared=False).x.array).all()

    @pytest.mark.parametrize("of, name", [(vars(k), "FACTOR"), (k.TABLE, 0)])
    def test_numbers_that_a_twin_was_compiled_with(self, scheduler, of, name):
        """Changed after a graph has run, they are refused before any task starts, wherever it was compiled; as they were, it goes on."""
        k.double.compiled(k.double._twin.py_func)  # anew: worker processes alone will compile it
        refusal = r"has changed since its compiled twin was made|is not in the worker processes what it is in this one"
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        graph.spawn(k.nap, a.x[0], a.log[0], 0)
        graph.spawn(k.double, a.x[1])
        scheduler.run(graph)
        before = of[name]
        of[name] = 3
        try:
            for run in scheduler.run, lambda graph: list(scheduler.run_each([graph])):
                with pytest.raises(TwinError, match=rf"double: '(FACTOR|TABLE)' ({refusal})"):
                    run(graph)
        finally:
            of[name] = before
        assert (a.log.array[0, k.RUNS], a.x.array[1, 0]) == (1, 8)
        scheduler.run(graph)
        assert (a.log.array[0, k.RUNS], a.x.array[1, 0]) == (2, 16)

    def test_failure(self, scheduler):
        """The first exception names its task; no task starts after it, none still runs when it is raised, and the next run is fresh."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        graph.spawn(k.fail, a.x[0], a.log[0])
        for number in range(1, 100):
            graph.spawn(k.nap, a.x[number % k.CELLS], a.log[number], 10)
        with pytest.raises(TaskError, match=r"^task 0, fail .*x\[0, :\].*: ZeroDivisionError: this kernel always fails$"):
            scheduler.run(graph)
        assert_stopped(a, most=50, since=a.log.array[0, k.START])
        self.test_order(scheduler, seed=6)

    def test_interrupt(self, scheduler):
        """Ctrl-C stops a run as an exception does."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = k.naps(a, milliseconds=30, length=k.TASKS // 2)
        gc.collect()  # what earlier tests left: Python loses an interrupt that meets the collector calling a weak reference back

        def interrupt_when_running():
            while not a.log.array[:, k.RUNS].any():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt_when_running)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            scheduler.run(graph)
        assert_stopped(a, most=100)
        interrupter.join()
        self.test_order(scheduler, seed=7)

    def test_second_interrupt(self, scheduler):
        """A second Ctrl-C ends the wait for the tasks that run; the next run waits for them in its stead."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        for number in range(k.CELLS):
            graph.spawn(k.nap, a.x[number], a.log[number], 100)
        gc.collect()

        def interrupt_twice():
            while not a.log.array[:, k.START].any():
                time.sleep(0.01)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.03)

        interrupter = threading.Thread(target=interrupt_twice)
        with contextlib.suppress(KeyboardInterrupt):  # the second one comes after the end, where the calling thread is the only worker
            interrupter.start()
            try:
                scheduler.run(graph)
            finally:
                interrupter.join()
        last = Graph()
        last.spawn(k.nap, a.x[0], a.log[k.CELLS], 0)
        scheduler.run(last)
        log = a.log.array
        begun = log[: k.CELLS][log[: k.CELLS, k.START] > 0]
        assert len(begun)
        assert (begun[:, k.STOP] < log[k.CELLS, k.START])[begun[:, k.RUNS] > 0].all()
        assert (begun[:, k.RUNS] == 0).sum() <= 1  # of the calling thread, whose nap was interrupted
        self.test_order(scheduler, seed=7)

    def test_commutative(self, scheduler):
        """Commutative tasks run one at a time; between processes, where their locks do not reach, the graph is refused."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph(allow_commutative=True)
        for _ in range(20):
            graph.spawn(k.add_one, a.x[0])
        if scheduler.needs_shared_memory:
            with pytest.raises(UserError, match="commutative=false"):
                scheduler.run(graph)
        else:
            scheduler.run(graph)
            assert (a.x.array[0] == [20, 21, 22, 23]).all()

    def test_blas_threads(self, scheduler):
        """Where the tasks run, BLAS has one thread."""
        a = k.arena(scheduler.needs_shared_memory)
        graph = Graph()
        for cell in range(k.CELLS):
            graph.spawn(k.count_blas_threads, a.x[cell])
        scheduler.run(graph)
        assert (a.x.array == 1).all()

    def test_describe(self, scheduler):
        """A scheduler says in a line what runs the tasks, and how many at a time."""
        assert "\n" not in scheduler.describe()
        assert scheduler.workers == 1 or f"{scheduler.workers} work" in scheduler.describe()


@contextlib.contextmanager
def within(what) -> Iterator[None]:
    """Have the task `act` do this."""
    k.within["act"] = what
    yield
    k.within.clear()


def assert_stopped(a, most: int, since: int = 1) -> None:
    """At most `most` tasks began since then, and no more will: the log does not change for longer than a nap."""
    before = a.log.array.copy()
    time.sleep(0.1)
    assert (a.log.array == before).all()
    assert 0 < (before[:, k.START] >= since).sum() <= most


class TestLife:
    @pytest.mark.parametrize("name", [name for name in NAMES if name != "local-cluster-processes"])  # whose start takes seconds
    def test_opened_twice_and_used_closed(self, name):
        """Both say so; a scheduler that was closed can be opened again."""
        scheduler = opened(name, workers=1)
        a = k.arena(scheduler.needs_shared_memory)
        graph = k.random_graph(a, seed=0, length=5)
        for _ in range(2):
            for ask in (lambda: scheduler.run(graph), lambda: next(scheduler.run_each([graph]))):
                with pytest.raises(RuntimeError, match=r"^this scheduler is closed; use it inside its `with` block$"):
                    ask()
            with scheduler:
                scheduler.run(graph)
                with pytest.raises(RuntimeError, match=r"^this scheduler is in its `with` block already; open a second one$"), scheduler:
                    pass
                scheduler.run(graph)
        assert (a.log.array[:5, k.RUNS] == 4).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_nothing_stays(self, name):
        """After the `with` block, no thread and no process is left, BLAS has its threads back, and the environment is as it was."""
        blas, environment, threads = blas_threads(), dict(os.environ), set(threading.enumerate())
        with opened(name) as scheduler:
            assert set(blas_threads()) == {1}
            scheduler.run(k.random_graph(k.arena(scheduler.needs_shared_memory), seed=0))
        assert blas_threads() == blas
        assert dict(os.environ) == environment

        def left():  # Distributed keeps one thread for the life of the process, to serialize large messages
            return {thread for thread in set(threading.enumerate()) - threads if not thread.name.startswith("Dask-Offload")}

        deadline = time.monotonic() + 2  # a thread that has just waited for a process may need a moment
        while left() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert left() == set()
        assert worker_processes(os.getpid()) == []

    @pytest.mark.parametrize("moment", ["opening", "running"])
    @pytest.mark.parametrize("name", NAMES)
    def test_interrupted_program(self, name, moment):
        """Ctrl-C in a terminal ends a program soon, with one traceback and an exit code that is not 0, and leaves no process behind."""
        program = [sys.executable, k.__file__, name]
        with started(program, start_new_session=True) as process:
            while process.stdout.readline() != f"{moment}\n":
                pass
            time.sleep(0.3)
            workers = worker_processes(process.pid)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            _, errors = process.communicate(timeout=20)  # the program ends well by itself, without errors, after 10 s
        assert process.returncode not in (0, None)
        assert errors.count("Traceback (most recent call last)") == 1, errors
        assert errors.endswith("KeyboardInterrupt\n")
        assert not any(psutil.pid_exists(worker) for worker in workers)

    @pytest.mark.parametrize("name", ["sequential", "loops", "threads"])
    def test_graphs_are_not_kept(self, name):
        """A plan does not keep its graph, and so its tensors, alive."""
        with opened(name) as scheduler:
            graph = k.random_graph(k.arena(is_shared=False), seed=0)
            scheduler.run(graph)
            trace = weakref.ref(graph)
            del graph
            gc.collect()
            assert trace() is None

    def test_workers_default(self, monkeypatch):
        """workers = 0 means the same under every scheduler and taskgpt.get: the cores that this process may use, as Dask counts them."""
        for slurm, wanted in (("", cpu_count()), ("1", 1)):
            monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
            counts = {name: opened(name).workers for name in ("native", "loops", "threads", "local-cluster")}
            assert set(counts.values()) == {usable_cores()} == {wanted}
            graph = {f"key {n}": (lambda seconds: time.sleep(seconds) or threading.get_ident(), 0.005) for n in range(10)}
            assert len(set(taskgpt.get(graph, list(graph)))) <= wanted

    @pytest.mark.parametrize(
        ("groups", "files", "cores"),
        [
            ("0::/", {"cpu.max": "150000 100000"}, 2),
            ("0::/", {"cpu.max": "max 100000"}, 0),
            ("0::/job/step", {"job/cpu.max": "50000 100000", "job/step/cpu.max": "max 100000"}, 1),
            ("0::/job/step", {"job/cpu.max": "800000 100000", "job/step/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
            ("0::/the/host/s", {"cpu.max": "400000 100000"}, 4),
            ("3:memory:/\n2:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 3),
            ("2:cpu:/a\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 0),
            ("2:cpu:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "90000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
            ("0::/", {"cpu.max": "strange"}, 0),
            ("", {}, 0),
        ],
    )
    def test_quota(self, tmp_path, groups, files, cores):
        """The CPU quota of this process' control group, and of every one around it, rounded up; 0 for none."""
        for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n" if text else "")
        assert _quota_cores(tmp_path) == cores
        assert _quota_cores(tmp_path / "nothing") == 0

    def test_imports(self):
        """Importing the package, its schedulers and its configuration does not load Dask's cluster."""
        code = "import sys, taskgpt, taskgpt.config, taskgpt.schedulers; sys.exit('distributed' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


FROM_OUTSIDE = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # what terminals and batch systems send


def worker_processes(pid: int) -> list[int]:
    """Return the children of a process; not Python's resource tracker, which multiprocessing starts once and keeps."""
    children = psutil.Process(pid).children(recursive=True)
    return [c.pid for c in children if not any("resource_tracker" in word for word in c.cmdline())]


class TestLoops:
    def test_cut(self):
        """A loop ends where the kernel changes, and where a task depends on one of the loop.

        swirl 1<-0   swirl 2<-0   swirl 3<-0 | swirl 0<-3   swirl 4<-5 | mix 5<-6,7 | swirl 5<-6
                                      reads 3, which was just written '     another kernel
        """
        a = k.arena(is_shared=False)
        graph = Graph()
        for number, (out, inp) in enumerate([(1, 0), (2, 0), (3, 0), (0, 3), (4, 5)]):
            graph.spawn(k.swirl, a.x[out], a.x[inp], a.log[number])
        graph.spawn(k.mix, a.x[5], a.x[6], a.x[7], a.log[5], 0)
        graph.spawn(k.swirl, a.x[5], a.x[6], a.log[6])
        assert [[task.number for task in loop] for loop in cut(graph)] == [[0, 1, 2], [3, 4], [5], [6]]

    def test_static_chunks(self):
        """A static loop is cut into equal parts in order; the calling thread has the first, whatever the others do."""
        log = run_naps([1] * 5, workers=2, chunks="static")
        main = threading.get_native_id()
        assert list(log[:, k.THREAD] == main) == [True, True, False, False, False]
        assert len(set(log[2:, k.THREAD])) == 1

    def test_dynamic_chunks(self):
        """In a dynamic loop a worker that is free takes the next chunk."""
        log = run_naps([200, 10, 10, 10, 10, 10], workers=2, chunks="dynamic", chunk_size=1)
        assert len(set(log[1:, k.THREAD])) == 1
        assert log[0, k.THREAD] != log[1, k.THREAD]

    def test_chunk_size(self):
        """A dynamic chunk has chunk_size tasks, the last what is left."""
        log = run_naps([20] * 5, workers=3, chunks="dynamic", chunk_size=2)
        threads = list(log[:, k.THREAD])
        assert threads[0] == threads[1] != threads[2] == threads[3] != threads[4] != threads[0]

    def test_barrier(self):
        """No task of a loop starts before the last of the loop before it is done, even if it does not depend on it."""
        a = k.arena(is_shared=False)
        graph = Graph()
        for number, milliseconds in enumerate([1, 60]):
            graph.spawn(k.nap, a.x[number], a.log[number], milliseconds)
        graph.spawn(k.swirl, a.x[2], a.x[3], a.log[2])
        with opened("loops", workers=2) as scheduler:
            scheduler.run(graph)
        assert a.log.array[2, k.START] >= a.log.array[1, k.STOP]

    def test_failure_in_a_loop(self):
        """A task that fails stops every part of its loop."""
        a = k.arena(is_shared=False)
        graph = Graph()
        for number, milliseconds in enumerate([-1, 50, 50, 50, 50, 50, 50, 50]):
            graph.spawn(k.nap, a.x[number], a.log[number], milliseconds)
        with opened("loops", workers=2) as scheduler, pytest.raises(TaskError, match=r"^task 0, nap .*sleep length must be non-negative"):
            scheduler.run(graph)
        assert a.log.array[:, k.RUNS].sum() <= 1

    def test_interrupt_at_barrier(self):
        """Ctrl-C while the calling thread waits at a barrier waits for the tasks of the others."""
        a = k.arena(is_shared=False)
        graph = Graph()
        for number, milliseconds in enumerate([1, 300]):
            graph.spawn(k.nap, a.x[number], a.log[number], milliseconds)
        with opened("loops", workers=2) as scheduler:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                scheduler.run(graph)
            assert a.log.array[1, k.RUNS] == 1

    def test_coverage(self):
        """Kernels without the tag that is asked for run in the calling thread alone."""
        a = k.arena(is_shared=False)
        graph = Graph()
        for number in range(4):
            graph.spawn(k.swirl, a.x[number], a.x[7], a.log[number])
        for number in range(4, 8):
            graph.spawn(k.nap, a.x[number - 4], a.log[number], 1)
        with opened("loops", workers=2, coverage="covered") as scheduler:
            scheduler.run(graph)
        log = a.log.array
        assert len(set(log[:4, k.THREAD])) == 2
        assert set(log[4:8, k.THREAD]) == {threading.get_native_id()}


def run_naps(milliseconds: list[int], **overrides: object) -> np.ndarray:
    """Run a loop of naps; return their lines of the log."""
    a = k.arena(is_shared=False)
    graph = Graph()
    for number, duration in enumerate(milliseconds):
        graph.spawn(k.nap, a.x[number], a.log[number], duration)
    with opened("loops", **overrides) as scheduler:
        scheduler.run(graph)
    return a.log.array[: len(milliseconds)]


class TestThreads:
    @pytest.mark.parametrize(("limit", "fewest", "most"), [(0, 60, 60), (20, 2, 20)])
    def test_coarsening_and_callbacks(self, limit, fewest, most):
        """Dask's callbacks see every task of the graph; `coarsen` limits how many there are, 0 does not."""
        seen = []
        graph = k.random_graph(k.arena(is_shared=False), seed=1)
        with opened("threads", workers=2, coarsen=limit) as scheduler, Callback(pretask=lambda key, *_: seen.append(key)):
            scheduler.run(graph)
        assert fewest <= len(seen) <= most
        assert {key_split(key) for key in seen} <= {"mix", "swirl"}


WITHOUT_GUARD = """
from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler

chosen = load_scheduler("local-cluster-processes", {"workers": 1, "dashboard": -1})
with open_scheduler(chosen.scheduler, chosen.settings):
    pass
"""


class TestLocalCluster:
    def test_dashboard(self):
        """describe() gives the address of the dashboard, which answers."""
        pytest.importorskip("bokeh", reason="the dashboard needs bokeh: pip install 'taskgpt[dashboard]'")
        with opened("local-cluster", dashboard=0) as scheduler:
            address = scheduler.describe().split()[-1]
            with urllib.request.urlopen(address, timeout=10) as response:
                assert response.status == 200
        with opened("local-cluster", dashboard=-1) as scheduler:
            assert "dashboard" not in scheduler.describe()

    @pytest.mark.parametrize("name", ["local-cluster", "local-cluster-processes"])
    def test_only_this_machine(self, name):
        """Every port is bound to 127.0.0.1: who reaches one can run code as this user."""
        with opened(name, workers=2):
            pids = [os.getpid(), *worker_processes(os.getpid())]
            sockets = [c for pid in pids for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert sockets
            assert {c.laddr.ip for c in sockets} == {"127.0.0.1"}

    def test_processes_share_memory(self):
        """Worker processes, two of them and none this one, write what this process reads, and read what it writes."""
        a = k.arena(is_shared=True)
        with opened("local-cluster-processes", workers=2) as scheduler:
            graph = k.naps(a, milliseconds=20, chains=4, length=5)
            scheduler.run(graph)
            assert (a.x.array[:4] == k.arena(is_shared=False).x.array[:4] + 5).all()
            a.x.array[:] = 100
            scheduler.run(graph)
        assert (a.x.array[:4] == 105).all()
        pids = set(a.log.array[:20, k.PROCESS])
        assert len(pids) == 2
        assert os.getpid() not in pids

    def test_kernels_of_main_are_refused(self, monkeypatch):
        """A kernel of the main program cannot be imported by worker processes, and the error says so."""
        monkeypatch.setattr(k.nap, "module", "__main__")
        with opened("local-cluster-processes", workers=1) as scheduler, pytest.raises(UserError, match="move it to a module"):
            scheduler.run(k.naps(k.arena(is_shared=True), milliseconds=0, length=1))

    def test_numbers_that_worker_processes_do_not_find(self, monkeypatch):
        """What they import afresh has not what the program has set since: refused before the first run, and in a new graph too."""
        k.double.compiled(k.double._twin.py_func)  # anew: worker processes alone will compile it
        refusal = "double: 'FACTOR' is not in the worker processes what it is in this one: they import kernels_for_tests afresh"

        def doubled(*kernels) -> Graph:
            graph = Graph()
            for kernel in kernels:
                graph.spawn(kernel, a.x[1])
            return graph

        with opened("local-cluster-processes", workers=1, dashboard=-1) as scheduler:
            a = k.arena(is_shared=True)
            a.x.array[1] = 1
            for kernel in k.double, k.double.bounds_checked:
                graph = doubled(kernel)
                with monkeypatch.context() as changed:
                    changed.setattr(k, "FACTOR", 3)
                    for refused in graph, graph, doubled(kernel):
                        with pytest.raises(TwinError, match=refusal):
                            scheduler.run(refused)
                scheduler.run(graph)
            assert a.x.array[1, 0] == 4
            monkeypatch.setattr(k, "TABLE", k.TABLE.copy())  # another array, the same numbers
            scheduler.run(graph)
            scheduler.run(doubled(k.double, k.count_blas_threads))
            assert a.x.array[1, 0] == 1 and not k.double.is_compiled
            monkeypatch.setattr(k, "FACTOR", 3)
            assert scheduler.run(doubled(k.count_blas_threads)) is None  # which has no twin
            with opened("sequential") as sequential:
                sequential.run(doubled(k.double))  # compiles it of what is here now
            assert a.x.array[1, 0] == 3
            with pytest.raises(TwinError, match=refusal):
                scheduler.run(doubled(k.double))
        k.double.compiled(k.double._twin.py_func)

    def test_signals_to_all_processes(self):
        """What a terminal or a batch system sends to every process of a program is for the main process: a run goes on in its workers."""
        a = k.arena(is_shared=True)
        with opened("local-cluster-processes", workers=2) as scheduler:
            graph = k.naps(a, milliseconds=10, length=5)
            scheduler.run(graph)
            workers = worker_processes(os.getpid())
            for worker in workers:
                for number in FROM_OUTSIDE:
                    os.kill(worker, number)
            scheduler.run(graph)
            assert worker_processes(os.getpid()) == workers
        assert (a.log.array[:10, k.RUNS] == 2).all()
        assert not any(psutil.pid_exists(worker) for worker in workers)

    def test_signals_to_the_resource_tracker(self, monkeypatch):
        """As a scheduler starts it, where nothing has before: what a terminal sends does not end it, and so no shared memory is lost."""
        tracker = resource_tracker.ResourceTracker()
        monkeypatch.setattr(resource_tracker, "ensure_running", tracker.ensure_running)
        local_cluster._start_resource_tracker()
        try:
            for number in FROM_OUTSIDE:
                os.kill(tracker._pid, number)
            assert tracker._check_alive()
        finally:
            os.close(tracker._fd)  # which ends it
        assert os.waitpid(tracker._pid, 0)[1] == 0

    def test_threads_take_signals_as_ever(self):
        """Where the workers are threads nothing is masked: what a kernel starts can be ended."""
        found = []
        k.within["act"] = lambda: found.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        a = k.arena(is_shared=False)
        graph = Graph()
        graph.spawn(k.act, a.x[0], a.log[0])
        with opened("local-cluster", workers=1) as scheduler:
            scheduler.run(graph)
        assert not found[0] & FROM_OUTSIDE

    @pytest.mark.parametrize("word", ["", "# __name__"])
    def test_a_program_without_guard(self, tmp_path, word):
        """Worker processes would run it again, each starting workers of its own: one message names what to do."""
        (tmp_path / "program.py").write_text(f"{word}\n{WITHOUT_GUARD}")
        command, environment = [sys.executable, tmp_path / "program.py"], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert result.returncode == 1
        assert result.stderr.count("Traceback") == 1
        assert "put what opens the scheduler below `if __name__ ==" in result.stderr.splitlines()[-1]

    @pytest.mark.parametrize(
        ("module", "file", "is_refused"),
        [
            ("package.__main__", "__main__.py", False),
            ("__main__", "__main__.py", False),
            (None, "ipython.py", False),
            ("package.program", "program.py", True),
            (None, "program.py", True),
        ],
    )
    def test_a_guard_is_asked_for_where_the_program_is_imported_anew(self, module, file, is_refused, tmp_path, monkeypatch):
        """Which `python -m package` is not, nor ipython: the same as multiprocessing's own rule."""
        (tmp_path / file).write_text("print()\n")
        main = types.ModuleType("__main__")
        main.__file__, main.__spec__ = str(tmp_path / file), module and importlib.machinery.ModuleSpec(module, None)
        monkeypatch.setitem(sys.modules, "__main__", main)
        with pytest.raises(UserError, match="put what opens") if is_refused else contextlib.nullcontext():
            local_cluster._verify_can_start_processes()

    def test_no_semaphores(self, monkeypatch):
        """Without /dev/shm there are no worker processes, and the error says so."""

        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
        with pytest.raises(UserError, match=r"^worker processes need /dev/shm, .* \(No space left on device\); mend that, or take proc"):
            opened("local-cluster-processes").__enter__()

    def test_private_memory_is_refused(self):
        """Tensors in this process' own memory cannot be sent to worker processes, and the error says how to make them."""
        with opened("local-cluster-processes", workers=1) as scheduler, pytest.raises(TypeError, match="shared=True"):
            scheduler.run(k.random_graph(k.arena(is_shared=False), seed=0))

    def test_stopped_run(self):
        """A task that reaches a worker after its run was stopped does not start: messages may overtake each other."""
        asyncio.run(local_cluster._stop(-1))
        local_cluster._run_task(-1, graph_id=-1, number=0, times=(-1, 0, 0))  # would not find its graph

    def test_worker_dies_at_work(self):
        """A worker process that is killed in a task ends the run with an error; the next run has a new worker."""
        a = k.arena(is_shared=True)
        with opened("local-cluster-processes", workers=2) as scheduler:
            graph = Graph()
            for number in range(10):
                graph.spawn(k.die if number == 4 else k.nap, a.x[number % 2], a.log[number], *([] if number == 4 else [20]))
            with pytest.raises(WorkerError) as caught:
                scheduler.run(graph)
            assert str(caught.value).startswith(f"worker process {a.log.array[4, k.PROCESS]} died")
            assert a.log.array[4, k.RUNS] == 1  # Distributed would try it on another worker
            TestContract().test_order(scheduler, seed=8)

    def test_worker_dies_idle(self):
        """A worker process that dies while another works ends the run too, though nothing that it ran was unfinished."""
        a = k.arena(is_shared=True)
        with opened("local-cluster-processes", workers=2) as scheduler:
            graph = k.naps(a, milliseconds=20, chains=1, length=60)

            def kill_idle():
                idle = set(worker_processes(os.getpid())) - {a.log.array[0, k.PROCESS]}
                os.kill(idle.pop(), signal.SIGKILL)

            scheduler.run(graph)  # everybody knows the graph, and the chain stays with the worker that has it
            threading.Timer(0.5, kill_idle).start()
            with pytest.raises(WorkerError, match=r"^worker process \d+ died"):
                scheduler.run(graph)
            assert a.log.array[59, k.RUNS] == 1  # the second run did not get that far
