"""The native scheduler: its policies on drawn graphs, runs that overlap, idle workers, records, and its protocols under stress.

What it shares with other schedulers is in test_schedulers.py and test_same_bits.py.
"""

import contextlib
import gc
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing

import kernels_for_tests as k
import numpy as np
import psutil
import pytest
from interleavings import Still, ends, interleavings, run_alone

from taskgpt import config
from taskgpt.errors import UserError
from taskgpt.schedulers import open_scheduler
from taskgpt.schedulers.native.policies import POLICIES
from taskgpt.schedulers.native.table import BOTTOM, FAILED, NOTHING, TOP
from taskgpt.tasks import (
    Arena,
    Call,
    Commutative,
    Graph,
    In,
    InOut,
    Out,
    Scratch,
    Task,
    TaskError,
    TensorSpec,
    check,
    dims,
    kernel,
    run_now,
    wrap,
)
from taskgpt.tasks.blas_threads import one_blas_thread
from taskgpt.tasks.spawn import PRIORITY_LIMIT

N = dims("N")[0]


def opened(**overrides):
    chosen = config.load_scheduler("native", overrides)
    return open_scheduler(chosen.scheduler, chosen.settings)


@kernel
def step(own: InOut[N], milliseconds: int):
    """Take time."""
    time.sleep(milliseconds / 1000)


@kernel
def churn(out: InOut[N], a: In[N], b: In[N], salt: float):
    """Something whose rounding depends on the order, compiled."""
    out[:] = out * np.float32(0.5) + a * np.float32(salt) - b * out


@churn.compiled
def _(out, a, b, salt):
    for i in range(out.shape[0]):
        out[i] = out[i] * np.float32(0.5) + a[i] * np.float32(salt) - b[i] * out[i]


@kernel
def raise_if_zero(out: InOut[N], at: int):
    """Raise in compiled code."""
    if out[at] == 0:
        raise ValueError(f"a zero at {at}")
    out[at] += 1


@raise_if_zero.compiled
def _(out, at):
    if out[at] == 0:
        raise ValueError("a zero")
    out[at] += 1


@kernel
def show_arguments(seen: Out[10], tile: In[N, N], whole: int, real: float, square: Scratch[N, 3], row: Scratch[5, np.int64]):
    """Write what a compiled twin is given."""
    seen[:] = [tile.shape[0], tile[1, 2], whole, real, 2, 3 * len(tile), 4, 5, 12, 8]


@show_arguments.compiled
def _(seen, tile, whole, real, square, row):
    for i in range(square.shape[0]):
        for j in range(3):
            square[i, j] = 1
    row[4] = 4
    seen[0], seen[1], seen[2], seen[3], seen[4] = tile.shape[0], tile[1, 2], whole, real, square.ndim
    seen[5], seen[6], seen[7] = square.sum(), row[4], row.shape[0]
    seen[8], seen[9] = square.strides[0], row.strides[0]


def drawn(successors: dict[int, list[int]], priorities: dict[int, int] | None = None, milliseconds: int = 0) -> Graph:
    """Return a graph with these edges."""
    count = 1 + max(s for each in successors.values() for s in each)
    arena = Arena({"own": TensorSpec((count, 1), (1, None))})
    graph = Graph("drawn")
    for number in range(count):
        predecessors = tuple(sorted(a for a, each in successors.items() if number in each))
        task = Task(number, (Call(step, (arena.own[number], milliseconds)),), ("", -1))
        task.priority = (priorities or {}).get(number, 0)
        graph.append(task, predecessors)
    return graph


def order(graph: Graph, **overrides) -> list[int]:
    """Return the tasks in the order in which one worker starts them."""
    with opened(workers=1, record=1000, **overrides) as scheduler:
        scheduler.run(graph)
        records, lost = scheduler.take_records()
    assert lost == 0
    return records["task"].tolist()


FORK = {0: [1, 2, 3], 3: [4], 4: [5]}


@kernel
def add(out: Commutative[N]):
    """Add one, slowly, one task at a time."""
    before = out.copy()
    time.sleep(0.001)
    out[:] = before + 1


@kernel
def add_or_raise(out: Commutative[N]):
    """Fail as soon as another waits for the lock."""
    time.sleep(0.02)
    raise ValueError("this kernel always fails")


def closure(edges: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Return all pairs of which the second waits for the first, directly or not; edges lead to higher numbers."""
    before: dict[int, set[int]] = {}
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        before.setdefault(b, set()).update({a} | before.get(a, set()))
    return {(a, b) for b, each in before.items() for a in each}


class TestPolicies:
    r"""What one worker does with

              0
            / | \
           1  2  3
                 |
                 4
                 |
                 5
    """

    def test_oldest_first(self):
        """1, 2 and 3 became ready before 4."""
        assert order(drawn(FORK), policy="oldest_first", immediate_successor=False) == [0, 1, 2, 3, 4, 5]

    def test_newest_first(self):
        """3 became ready last, then 4, then 5: depth first."""
        assert order(drawn(FORK), policy="newest_first", immediate_successor=False) == [0, 3, 4, 5, 2, 1]

    def test_longest_path_first(self):
        """3 has the longest path behind it, then 4; what is left is all of one length."""
        assert order(drawn(FORK), policy="longest_path_first", immediate_successor=False)[:3] == [0, 3, 4]

    def test_longest_path_first_measures(self):
        """Paths are as long as they took: after a few runs 1, which is slow, goes before 3."""
        graph = drawn(FORK)
        call = graph.tasks[1].calls[0]
        call.args = call.args[0], 40  # milliseconds
        with opened(workers=1, record=1000, policy="longest_path_first", immediate_successor=False) as scheduler:
            for _ in range(4):
                scheduler.run(graph)
            tasks = scheduler.take_records()[0]["task"].tolist()
        assert tasks[:3] == [0, 3, 4]
        assert tasks[-6:-4] == [0, 1]

    def test_immediate_successor(self):
        """The worker goes on with 3, which 1 made ready, though 2 waits longer."""
        graph = {0: [1, 2], 1: [3]}
        assert order(drawn(graph), policy="oldest_first", immediate_successor=False) == [0, 1, 2, 3]
        assert order(drawn(graph), policy="oldest_first", immediate_successor=True) == [0, 1, 3, 2]

    def test_every_policy_is_explained(self):
        """In the file of defaults, which is what a user reads."""
        text = config.find_file("scheduler_configs", "native").read_text(encoding="utf-8")
        assert all(f'"{policy}": ' in text for policy in POLICIES)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize(("immediate_successor", "work_stealing"), list(itertools.product([False, True], repeat=2)))
    def test_priorities_win(self, policy, immediate_successor, work_stealing):
        """2 and 4 are urgent, 1 can wait: whatever the policy."""
        graph = drawn(FORK, {1: -7, 2: PRIORITY_LIMIT, 4: 5})
        setup = {"policy": policy, "immediate_successor": immediate_successor, "work_stealing": work_stealing}
        assert order(graph, **setup) == [0, 2, 3, 4, 5, 1]

    def test_priority_out_of_range(self):
        with pytest.raises(ValueError, match=f"priorities go from -{PRIORITY_LIMIT} to {PRIORITY_LIMIT}, got {PRIORITY_LIMIT + 1}"):
            order(drawn(FORK, {1: PRIORITY_LIMIT + 1}))

    def test_work_stealing_leaves_nobody_idle(self):
        """All of a fork is pushed by one worker; the other takes its share from that worker's queue."""
        graph = drawn({0: list(range(1, 21))}, milliseconds=5)
        with opened(workers=2, work_stealing=True, record=1000) as scheduler:
            scheduler.run(graph)
            records = scheduler.take_records()[0]
        assert np.bincount(records["worker"]).min() >= 5


class TestOverlap:
    def test_the_next_run_begins_while_the_last_tasks_run(self):
        """Task 0 of the second run starts while the slow task 1 of the first still runs; task 1 of the second run waits for it."""
        a = k.arena(is_shared=False)
        graph = Graph()
        graph.spawn(k.nap, a.x[0], a.log[0], 1)
        graph.spawn(k.nap, a.x[1], a.log[1], 100)
        with opened(workers=2, record=100) as scheduler:
            list(scheduler.run_each([graph, graph]))
            records = {(r["run"], r["task"]): r for r in scheduler.take_records()[0]}
        assert records[1, 0]["start_ns"] < records[0, 1]["stop_ns"] <= records[1, 1]["start_ns"]

    def test_a_run_never_begins_before_the_last_but_one_is_over(self):
        """Its inputs may be in the same slot."""
        a = k.arena(is_shared=False)
        graph = Graph()
        graph.spawn(k.nap, a.x[0], a.log[0], 1)
        graph.spawn(k.nap, a.x[1], a.log[1], 30)
        with opened(workers=2, record=100) as scheduler:
            list(scheduler.run_each([graph] * 4))
            records = scheduler.take_records()[0]
        for run in range(2, 4):
            assert records["start_ns"][records["run"] == run].min() >= records["stop_ns"][records["run"] == run - 2].max()

    def test_a_derived_graph_waits_for_all(self):
        """A graph that does not know its accesses does not overlap."""
        a = k.arena(is_shared=False)
        graph = Graph()
        for cell in range(2):
            graph.spawn(k.nap, a.x[cell], a.log[cell], 10 * cell)
        with opened(workers=2, record=100) as scheduler:
            list(scheduler.run_each([graph, check(graph)]))
            records = scheduler.take_records()[0]
        assert records["start_ns"][records["run"] == 1].min() >= records["stop_ns"][records["run"] == 0].max()

    def test_edges_to_the_next_graph(self):
        """Writer to reader, reader to writer, and nothing that another edge implies."""
        a = k.arena(is_shared=False)
        one, other = Graph(), Graph()
        one.spawn(churn, a.x[0], a.x[1], a.x[2], 1.0)  # 0
        one.spawn(churn, a.x[3], a.x[0], a.x[4], 1.0)  # 1: after 0
        other.spawn(churn, a.x[5], a.x[3], a.x[0], 1.0)  # 0: reads what 0 and 1 wrote; 1 came after 0
        other.spawn(churn, a.x[1], a.x[6], a.x[7], 1.0)  # 1: overwrites what 0 read
        assert one.edges_to(other) == [(1, 0), (0, 1)]
        assert one.edges_to(one) == [(1, 0)]

    def test_the_failure_of_a_later_run_comes_after_the_end_of_the_earlier(self):
        """What is done is yielded, though the run beside it has failed; then the failure is raised, and the next run is fresh."""
        a = k.arena(is_shared=False)
        good, bad = Graph(), Graph()
        good.spawn(k.nap, a.x[1], a.log[1], 30)
        bad.spawn(k.fail, a.x[0], a.log[0])
        done = []
        with opened(workers=2) as scheduler:
            for _ in range(3):
                with pytest.raises(TaskError, match=r"^task 0, fail"):
                    for graph in scheduler.run_each([good, good, bad, good]):
                        done.append(graph)
                scheduler.run(good)
        assert done[0] is good
        assert bad not in done

    def test_edges_agree_with_those_of_one_graph(self):
        """Two drawn programs one after the other order the same pairs of tasks as both recorded as one, commutative ones among them."""
        for seed in range(60):
            draw = random.Random(seed)
            arena = Arena({"x": TensorSpec((5, 4), (1, None))})
            both, parts = Graph(allow_commutative=True), [Graph(allow_commutative=True) for _ in range(2)]
            for part in parts:
                for _ in range(draw.randint(1, 12)):
                    out, first, second = draw.sample(range(5), 3)
                    calls = [(add, arena.x[out]), (churn, arena.x[out], arena.x[first], arena.x[second], 1.0)]
                    call = calls[draw.random() < 0.7]
                    part.spawn(*call)
                    both.spawn(*call)
            count = len(parts[0].tasks)
            edges = [(p, t.number) for t in parts[0].tasks for p in t.predecessors]
            edges += [(count + p, count + t.number) for t in parts[1].tasks for p in t.predecessors]
            edges += [(a, count + b) for a, b in parts[0].edges_to(parts[1])]
            wanted, found = closure([(p, t.number) for t in both.tasks for p in t.predecessors]), closure(edges)
            assert wanted <= found  # more only where commutative tasks of two graphs, which share no lock, keep their order
            if not both.is_commutative:
                assert wanted == found


class TestCalls:
    def test_arguments(self):
        """Tiles with any strides, integers, floats (also when given as an integer) and scratch reach the compiled twin."""
        arena = Arena({"seen": TensorSpec((2, 10), (1, None)), "tile": TensorSpec((9, 9), (3, 3))})
        arena.tile.array[:] = np.arange(81).reshape(9, 9)
        graph = Graph()
        graph.spawn(show_arguments, arena.seen[0], arena.tile[3:6, 3:6], -7, 2.5)
        graph.spawn(show_arguments, arena.seen[1], arena.tile[:, :], 1 << 20, 3)
        with opened() as scheduler:
            scheduler.run(graph)
        assert arena.seen.array.tolist() == [[3, 41, -7, 2.5, 2, 9, 4, 5, 12, 8], [9, 11, 1 << 20, 3, 2, 27, 4, 5, 12, 8]]

    def test_exception_in_compiled_code(self):
        """It arrives as its own type, with the task's name, and costs no memory."""
        a = k.arena(is_shared=False)
        graph = Graph()
        graph.spawn(raise_if_zero, a.x[0], 1)
        graph.spawn(raise_if_zero, a.x[0], 0)
        with opened() as scheduler:
            for _ in range(3):
                with pytest.raises(
                    TaskError,
                    match=r"^task 1, raise_if_zero inout\(x\[0, :\]\) at=0, spawned in .*_native.py, line \d+: ValueError: a zero$",
                ) as caught:
                    scheduler.run(graph)
                assert type(caught.value.__cause__) is ValueError
        assert a.x.array[0, 1] == 4

    def test_a_kernel_that_does_not_compile(self):
        """It stops the run before it begins, under the name of the first task that needs it, as under every other scheduler."""

        @kernel
        def wrong(x: InOut[N]):
            x += 1

        @wrong.compiled
        def _(x):
            x[0] = undefined(x)  # noqa: F821

        a = k.arena(is_shared=False)
        graph = Graph()
        for cell in 0, 1:
            graph.spawn(k.double, a.x[cell])
            graph.spawn(wrong, a.x[cell])
        before = a.x.array.copy()
        said = "TwinError: wrong: its compiled twin does not compile: NameError: name 'undefined'"
        message = rf"^task 1, wrong inout\(x\[0, :\]\), spawned in .*line \d+: {said}"
        with opened(workers=1) as scheduler, pytest.raises(TaskError, match=message):
            scheduler.run(graph)
        np.testing.assert_array_equal(a.x.array, before)

    @pytest.mark.parametrize("setting", [{"workers": 5000}, {"spins": 10**20}, {"record": 10**11}])
    def test_settings_out_of_reach(self, setting):
        [(name, value)] = setting.items()
        with pytest.raises(UserError, match=f"{name}: wanted at most .*, got {value}"):
            opened(**setting)

    def test_needs_compiled_code(self, monkeypatch):
        monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
        with pytest.raises(UserError, match="NUMBA_DISABLE_JIT=1 switches off; take --scheduler sequential"), opened():
            pass

    def test_twins_cached_by_different_processes(self, tmp_path):
        """Two kernels of one file and one signature, compiled and cached by two processes, are still two in a third."""
        (tmp_path / "two_kernels.py").write_text(TWO_KERNELS)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        for names in ("one", "hundred", "one hundred"):
            command = [sys.executable, "-m", "two_kernels", *names.split()]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
            assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["1.0", "100.0"]


TWO_KERNELS = """
import sys
from taskgpt import config
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import Arena, Graph, InOut, TensorSpec, dims, kernel

N = dims("N")[0]

@kernel
def one(x: InOut[N]):
    x += 1

@one.compiled
def _(x):
    for i in range(x.shape[0]):
        x[i] += 1

@kernel
def hundred(x: InOut[N]):
    x += 100

@hundred.compiled
def _(x):
    for i in range(x.shape[0]):
        x[i] += 100

if __name__ == "__main__":
    import two_kernels
    arena = Arena({"x": TensorSpec((2, 4), (1, None))})
    graph = Graph()
    for at, name in enumerate(sys.argv[1:]):
        graph.spawn(getattr(two_kernels, name), arena.x[at])
    chosen = config.load_scheduler("native", {})
    with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
        scheduler.run(graph)
    print(*arena.x.array[:, 0])
"""


class TestWorkers:
    def test_idle_hybrid_workers_use_no_cpu(self):
        with opened(workers=4, idle="hybrid") as scheduler:
            scheduler.run(k.random_graph(k.arena(is_shared=False), seed=0))
            time.sleep(0.2)  # until they sleep
            before = psutil.Process().cpu_times()
            time.sleep(0.5)
            after = psutil.Process().cpu_times()
        assert after.user + after.system - before.user - before.system < 0.05

    def test_what_workers_do_is_seen_from_another_thread(self):
        """Which task does not end, how many have, and when nobody has one to run."""
        goes_on = threading.Event()

        @kernel
        def stuck(own: InOut[N]):
            goes_on.wait(60)

        graph, cells = Graph("doing"), wrap(np.zeros(8, np.float32), (4,), "cells")
        for each, at in ((k.double, 0), (stuck, 0), (k.double, 1)):
            graph.spawn(each, cells.cell(at))
        with opened(workers=2, idle="idle") as scheduler:
            thread = threading.Thread(target=lambda: list(scheduler.run_each([graph])))
            thread.start()
            while not (now := scheduler.doing()).tasks or sum(count for _, count in now.finished) < 2:
                time.sleep(0.001)
            assert now == (((0, 2),), ("stuck",), False)
            goes_on.set()
            thread.join()
            while not scheduler.doing().is_idle:
                time.sleep(0.001)
            assert scheduler.doing() == ((), (), True)
            goes_on.clear()
            thread = threading.Thread(target=scheduler.run, args=[graph])
            thread.start()
            while (now := scheduler.doing()).is_idle or not now.finished:
                time.sleep(0.001)
            assert now == (((1, 0),), (), False)
            goes_on.set()
            thread.join()

    def test_records(self):
        """A row for each task, in order, with times that fit the graph; what found no room is counted."""
        a = k.arena(is_shared=False)
        graph = k.random_graph(a, seed=3)
        with opened(workers=2, record=1000) as scheduler:
            begin = time.monotonic_ns()
            scheduler.run(graph)
            records, lost = scheduler.take_records()
            assert lost == 0
            assert sorted(records["task"]) == list(range(len(graph.tasks)))
            assert (begin < records["ready_ns"]).all()
            assert (records["ready_ns"] <= records["start_ns"]).all()
            assert (records["start_ns"] <= records["stop_ns"]).all()
            assert len(scheduler.take_records()[0]) == 0
        with opened(workers=1, record=10) as scheduler:
            scheduler.run(graph)
            records, lost = scheduler.take_records()
            assert (len(records), lost) == (10, len(graph.tasks) - 10)

    def test_records_that_are_taken_make_room(self):
        """Runs that overlap without an end, as those of a training do: none is lost if they are taken in time."""
        a = k.arena(is_shared=False)
        graph = k.random_graph(a, seed=3)
        with opened(workers=2, record=3 * len(graph.tasks)) as scheduler:
            told = []
            for _ in scheduler.run_each(graph for _ in range(20)):
                told.append(scheduler.take_records())
            told.append(scheduler.take_records())
            assert sum(lost for _, lost in told) == 0
            found = np.concatenate([records for records, _ in told])
            wanted = [(run, task) for run in range(20) for task in range(len(graph.tasks))]
            assert sorted(zip(found["run"].tolist(), found["task"].tolist(), strict=True)) == wanted
            assert (found["start_ns"] <= found["stop_ns"]).all()


class TestStopping:
    def test_a_commutative_task_that_fails(self):
        """It gives its lock back; who waits for it stops too."""
        a = k.arena(is_shared=False)
        graph = Graph(allow_commutative=True)
        for _ in range(4):
            graph.spawn(add_or_raise, a.x[0])
        with opened(workers=3) as scheduler:
            for _ in range(3):
                with pytest.raises(TaskError, match="add_or_raise"):
                    scheduler.run(graph)

    def test_commutative_tasks_of_overlapping_runs(self):
        a = k.arena(is_shared=False)
        graph = Graph(allow_commutative=True)
        for _ in range(5):
            graph.spawn(add, a.x[0])
        with opened(workers=3) as scheduler:
            list(scheduler.run_each([graph] * 4))
        assert (a.x.array[0] == [20, 21, 22, 23]).all()

    def test_after_the_with_block(self):
        """An iterator that is closed late does no harm; a run is refused."""
        a = k.arena(is_shared=False)
        graph = k.naps(a, milliseconds=1, length=10)
        with opened() as scheduler:
            runs = scheduler.run_each([graph] * 5)
            next(runs)
        runs.close()
        with pytest.raises(RuntimeError, match="this scheduler is closed; use it inside its `with` block"):
            scheduler.run(graph)

    def test_an_old_iterator_closed_during_a_new_run(self):
        """It abandons nothing but its own."""
        a = k.arena(is_shared=False)
        graph = k.naps(a, milliseconds=1, length=5)
        with opened() as scheduler:
            old = scheduler.run_each([graph] * 5)
            next(old)
            new = scheduler.run_each([graph] * 3)
            next(new)
            old.close()
            assert len(list(new)) == 2

    def test_a_task_that_asks_for_a_run_between_two_graphs(self):
        """Its run would wait for itself, though the caller does not: it fails at once, and nothing that was begun is lost."""
        a = k.arena(is_shared=False)
        graph, inner, errors = Graph(), k.naps(a, milliseconds=1, length=5), []
        graph.spawn(k.act, a.x[0], a.log[0])

        def act():
            if a.log.array[0, k.RUNS]:
                may_go_on.wait(10)
                for ask in (lambda: scheduler.run(inner), lambda: next(scheduler.run_each([inner])), lambda: graph.spawn(k.act, a.x[0], 0)):
                    try:
                        ask()
                    except RuntimeError as error:
                        errors.append(str(error)[:30])

        may_go_on = threading.Event()
        with opened(workers=2) as scheduler, closing(scheduler.run_each([graph] * 2)) as runs:
            k.within["act"] = act
            next(runs)
            with pytest.raises(RuntimeError, match="graph 'graph' is being run"):
                graph.spawn(k.nap, a.x[0], a.log[1], 0)
            may_go_on.set()
            next(runs)
        assert errors == ["this scheduler is in the middl"] * 2 + ["a task cannot record into grap"]
        assert a.log.array[0, k.RUNS] == 2

    def test_a_failure_in_what_is_finished(self):
        """close() raises what a task raised after the last graph that was yielded, and so does the end of the `with` block."""
        a = k.arena(is_shared=False)
        good, bad = k.naps(a, milliseconds=1, length=3), Graph()
        bad.spawn(k.nap, a.x[7], a.log[10], 20)
        bad.spawn(k.fail, a.x[7], a.log[11])
        with opened(workers=2) as scheduler:
            runs = scheduler.run_each([good, bad, good])
            next(runs)
            with pytest.raises(TaskError, match=r"^task 1, fail"):
                runs.close()
            scheduler.run(good)
        with pytest.raises(TaskError, match=r"^task 1, fail"), opened(workers=2) as scheduler:
            runs = scheduler.run_each([good, bad, good])
            next(runs)
        runs.close()

    @pytest.mark.parametrize("is_awaited", [False, True], ids=["at_once", "long_ago"])
    def test_a_failure_is_told_whenever_it_came(self, is_awaited):
        """Whether the task failed before the iterator was left or after: close() raises it, and so it is told where `graphs` raises."""
        a = k.arena(is_shared=False)
        good, bad = Graph(), Graph()
        good.spawn(k.nap, a.x[0], a.log[0], 1)
        bad.spawn(k.fail, a.x[0], a.log[1])

        def graphs():
            yield good
            yield bad
            await_failure()
            raise KeyError("no more")

        def await_failure():
            while is_awaited and not scheduler._table[FAILED]:
                time.sleep(0.001)

        with opened(workers=2) as scheduler:
            runs = scheduler.run_each([good, bad, good])
            next(runs)
            await_failure()
            with pytest.raises(TaskError, match=r"^task 0, fail"):
                runs.close()
            with pytest.raises(TaskError, match=r"^task 0, fail") as error:
                list(scheduler.run_each(graphs()))
            assert isinstance(error.value.__context__, KeyError)
            scheduler.run(good)

    def test_a_failure_that_nobody_hears_is_freed(self):
        """An interrupt abandons a run whose task has failed; the exception does not outlive it."""
        alive = []

        class Failure(Exception):
            def __init__(self):
                super().__init__("lost")
                alive.append(weakref.ref(self))

        def fail():
            raise Failure

        a = k.arena(is_shared=False)
        good, graph = Graph(), Graph()
        good.spawn(k.nap, a.x[0], a.log[0], 1)
        graph.spawn(k.act, a.x[0], a.log[1])
        k.within["act"] = fail
        with opened(workers=2) as scheduler:
            runs = scheduler.run_each([graph, graph])
            with pytest.raises(TaskError):
                next(runs)
            runs = scheduler.run_each([good, graph, graph])
            next(runs)
            while not scheduler._table[FAILED]:
                time.sleep(0.001)
            with pytest.raises(KeyboardInterrupt):
                runs.throw(KeyboardInterrupt)
        gc.collect()
        assert len(alive) == 2
        assert [each() for each in alive] == [None, None]

    def test_an_iterator_that_is_collected_inside_a_task(self):
        """The garbage collector closes it where nobody can wait for the task: its runs end by themselves."""
        a = k.arena(is_shared=False)
        graph = Graph()
        graph.spawn(k.act, a.x[0], a.log[0])
        asked = []
        with opened(workers=2) as scheduler:
            holder = [scheduler.run_each(asked.append(0) or graph for _ in range(5))]
            holder.append(holder)  # a cycle
            forgotten = threading.Event()
            k.within["act"] = lambda: len(asked) < 2 or (forgotten.wait(10) and gc.collect())
            next(holder[0])
            trace = weakref.ref(holder[0])
            del holder
            forgotten.set()
            while trace() is not None:
                time.sleep(0.001)
            k.within["act"] = lambda: None
            scheduler.run(graph)
        assert a.log.array[0, k.RUNS] == len(asked) + 1 == 3

    def test_interrupts_at_any_moment(self):
        """An interrupt, wherever it strikes, leaves a scheduler that gives the right bits: also while room is made for a larger graph."""
        draw = random.Random(1)
        arena, expected = (Arena({"x": TensorSpec((TestStress.CELLS, 16), (1, None))}) for _ in range(2))
        programs = [TestStress.program(draw, length) for length in (3, 200, 2000)]
        graphs = [Graph() for _ in programs]
        for graph, program in zip(graphs, programs, strict=True):
            TestStress.spawn(graph.spawn, arena, program)

        def interrupt(*_):
            raise KeyboardInterrupt

        gc.collect()
        gc.disable()  # Python drops an interrupt that strikes in a finalizer: other tests' garbage should not be finalized here
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            for number in range(60):
                with opened(workers=2) as scheduler:
                    with contextlib.suppress(KeyboardInterrupt):
                        signal.setitimer(signal.ITIMER_REAL, draw.random() * draw.choice([0.001, 0.02]))
                        for _ in scheduler.run_each(graphs[number % 3] for _ in range(4)):
                            pass
                        signal.setitimer(signal.ITIMER_REAL, 0)  # here: it may strike on its way out
                    arena.x.array[:] = expected.x.array[:] = np.random.default_rng(number).standard_normal((TestStress.CELLS, 16))
                    order = [draw.randrange(3) for _ in range(3)]
                    for _ in scheduler.run_each(graphs[n] for n in order):
                        pass
                    for n in order:
                        TestStress.spawn(run_now, expected, programs[n])
                    assert arena.x.array.tobytes() == expected.x.array.tobytes()
        finally:
            signal.signal(signal.SIGALRM, before)
            gc.enable()


class TestStress:
    CELLS = 12

    @pytest.mark.parametrize("workers", range(1, 9))
    def test_random_graphs(self, workers):
        """1,000 graphs in all, of up to 500 tasks, alone and overlapping, on more workers than cores, left early or not: the bits of
        program order, of as many runs as were begun.

        The arithmetic does not forgive an exchange of two accesses, so a stale or torn read, a lost wake-up (the run would hang) or an edge
        counted twice shows.
        """
        draw = random.Random(workers)
        arena, expected = (Arena({"x": TensorSpec((self.CELLS, 16), (1, None))}) for _ in range(2))
        for _ in range(3):
            policy, immediate, stealing = draw.choice(list(POLICIES)), draw.random() < 0.5, draw.random() < 0.5
            with opened(
                workers=workers, policy=policy, immediate_successor=immediate, work_stealing=stealing, spins=draw.choice([1, 300])
            ) as s:
                for _ in range(14):
                    programs = [self.program(draw, draw.randint(1, 500)) for _ in range(3)]
                    graphs = [Graph(allow_commutative=False) for _ in programs]
                    for graph, program in zip(graphs, programs, strict=True):
                        self.spawn(graph.spawn, arena, program)
                    runs = [draw.randrange(3) for _ in range(6)]
                    arena.x.array[:] = expected.x.array[:] = np.random.default_rng(draw.randrange(1000)).standard_normal((self.CELLS, 16))
                    taken, leave_after = [], draw.randint(1, 9)  # of 6
                    for done, _ in enumerate(s.run_each(taken.append(n) or graphs[n] for n in runs), start=1):
                        if done == leave_after:
                            break
                    with one_blas_thread:  # once, not for each call
                        for n in taken:
                            self.spawn(run_now, expected, programs[n])
                        assert arena.x.array.tobytes() == expected.x.array.tobytes()
                        s.run(graphs[0])
                        self.spawn(run_now, expected, programs[0])
                    assert arena.x.array.tobytes() == expected.x.array.tobytes()

    @classmethod
    def program(cls, draw: random.Random, tasks: int) -> list[tuple]:
        return [(*draw.sample(range(cls.CELLS), 3), draw.random()) for _ in range(tasks)]

    @staticmethod
    def spawn(spawn, arena, program) -> None:
        tiles = [arena.x[n] for n in range(len(arena.x.array))]
        for out, a, b, salt in program:
            spawn(churn, tiles[out], tiles[a], tiles[b], salt)


class TestProtocols:
    """Why what threads share is right, in every interleaving of their atomic steps: of models of them, or of their own code.

    That compiled code does what its source says is for TestStress to find out.
    """

    def test_an_edge_to_the_next_run_is_counted_down_once(self):
        """A task ends while the next run is submitted: exactly one of the two threads counts its edge down."""

        def worker(shared):
            before, shared["mark"] = shared["mark"], shared["mark"] | 1
            yield
            if before & 2:
                shared["pending"] -= 1
                yield

        def submitter(shared):
            shared["pending"] = 1
            yield
            before, shared["mark"] = shared["mark"], shared["mark"] | 2
            yield
            if before & 1:
                shared["pending"] -= 1
                yield

        for shared in interleavings([worker, submitter], {"mark": 0, "pending": 0}):
            assert shared["pending"] == 0

    @staticmethod
    def taker(still, function, times):
        """A thread that takes so often from queue 0, and says what it got."""

        def run():
            for _ in range(times):
                found = yield from getattr(still.code, function)(still.code.queue_of(still.t, 0))
                if found != NOTHING:
                    still.found.append(found)

        return run

    @staticmethod
    def pusher(still, function, instances):
        def run():
            for instance in instances:
                yield from getattr(still.code, function)(still.code.queue_of(still.t, 0), instance)

        return run

    @pytest.mark.parametrize("own", ["take_newest", "take_oldest"])
    def test_a_deque_gives_each_task_to_one(self, own):
        """Its owner pushes two and takes, while two others take the oldest: each has one taker, and what is left is still there."""
        with Still(workers=2, work_stealing=True) as still:

            def owner():
                yield from self.pusher(still, "put", [10, 11])()
                yield from self.taker(still, own, 2)()

            count = 0
            thieves = [self.taker(still, "take_oldest", 1) for _ in range(2)]
            for are_through in ends(still, [owner, *thieves]):
                assert are_through
                left = still._queue_words[0, BOTTOM] - still._queue_words[0, TOP]
                assert len(still.found) == len(set(still.found)) == 2 - left
                count += 1
            assert count > 10

    def test_an_inbox_loses_nothing(self):
        """Two push, one each, while a third takes: what he did not get is there for the next who takes."""
        with Still(workers=2) as still:
            threads = [self.pusher(still, "drop_into", [10]), self.pusher(still, "drop_into", [11]), self.taker(still, "take_out", 3)]
            queue = still.code.queue_of(still.t, 0)
            seen = set()
            for are_through in ends(still, threads):
                assert are_through
                seen.add(tuple(still.found))
                still.found += [run_alone(still.code.take_out(queue)) for _ in range(2 - len(still.found))]
                assert sorted(still.found) == [10, 11]
            assert {(), (10,), (11,), (10, 11), (11, 10)} <= seen

    @staticmethod
    def worker(still, me, tasks):
        """A worker, until it has had so many tasks."""

        def run():
            for _ in range(tasks):
                found = NOTHING
                while found == NOTHING:
                    found = yield from still.code.take(still.t, me)
                    if found == NOTHING:
                        found = yield from still.code.wait_for_work(still.t, me)
                still.found.append(found)

        return run

    @staticmethod
    def submitter(still, instances):
        def run():
            for instance in instances:
                yield from still.code.push(still.t, still.workers, instance)

        return run

    @pytest.mark.parametrize("stealing", [False, True])
    @pytest.mark.parametrize("setup", [{"idle": "hybrid", "spins": 1}, {"idle": "idle"}], ids=["spins", "sleeps"])
    def test_no_wake_up_is_lost(self, setup, stealing):
        """A worker begins to wait, spins, goes on the watch or falls asleep, while a task is pushed: it gets the task."""
        with Still(workers=1, work_stealing=stealing, **setup) as still:
            for are_through in ends(still, [self.worker(still, 0, 1), self.submitter(still, [6])]):
                assert are_through
                assert still.found == [6]

    @pytest.mark.parametrize("stealing", [False, True])
    @pytest.mark.parametrize("setup", [{"idle": "hybrid", "spins": 1}, {"idle": "idle"}], ids=["spins", "sleeps"])
    def test_no_wake_up_of_two_workers_is_lost(self, setup, stealing):
        """Two workers, whatever they do when they have nothing, get the two tasks that are pushed: one each, in all orders in which a
        thread that could go on is left at most twice."""
        with Still(workers=2, work_stealing=stealing, **setup) as still:
            threads = [self.worker(still, 0, 1), self.worker(still, 1, 1), self.submitter(still, [6, 8])]
            for are_through in ends(still, threads, most_switches=2):
                assert are_through
                assert sorted(still.found) == [6, 8]
