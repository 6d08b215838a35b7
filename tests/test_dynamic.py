"""Programs whose tasks start as they are spawned: the same results as when every task runs where it is spawned, and nothing hangs."""

import asyncio
import contextlib
import gc
import os
import random
import signal
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import programs_at_random
import pytest
from interleavings import Still, ends, run_alone
from pages import ROOT, blocks
from plain_schedulers import scheduler

import taskgpt
from taskgpt import config
from taskgpt.lab.traces.trace import RECORD, Trace, Traced
from taskgpt.schedulers import open_scheduler
from taskgpt.schedulers.native import open_run
from taskgpt.schedulers.native.program_engine import OpenRun
from taskgpt.schedulers.native.table import FREED, IS_RANKED, NEXT_PLACE, NOTHING, WANTED
from taskgpt.tasks import Graph, In, InOut, Out, TaskError, Tensor, WeakIn, WeakInOut, dims, kernel, run_now, wrap
from taskgpt.tasks.spawn import ProgramError, Spawn

N, M = dims("N M")
CELL = 8
I64 = np.int64


def tensor(cells: int = 16) -> Tensor:
    return Tensor("x", np.arange(cells * CELL, dtype=I64), (CELL,))


@kernel
def mix(a: InOut[N, I64], k: int):
    a[:] = a * 31 + k


@mix.compiled
def _(a, k):
    for i in range(a.shape[0]):
        a[i] = a[i] * 31 + k


@kernel
def divide(a: InOut[N, I64], k: int):
    a[:] = a // k


@divide.compiled
def _(a, k):
    if k == 0:
        raise ZeroDivisionError("by nothing")


@kernel
def gather(a: InOut[N, I64], b: In[M, I64], k: int):
    a[:] = a * 7 + k + np.sum(b * np.arange(1, b.shape[0] + 1))


@kernel
def fill(a: Out[N, I64], b: In[M, I64]):
    a[:] = np.sum(b) % 1009


@fill.compiled
def _(a, b):
    total = 0
    for i in range(b.shape[0]):
        total += b[i]
    for i in range(a.shape[0]):
        a[i] = total % 1009


@kernel
def total(a: In[N, I64]) -> int:
    return int(np.sum(a))


@kernel
def largest(a: In[N, I64]) -> int:
    return int(a.max())


@largest.compiled
def _(a):
    most = a[0]
    for i in range(a.shape[0]):
        most = max(most, a[i])
    return most


@kernel
def fib(n: int, spawn: Spawn) -> int:
    if n < 2:
        return n
    a, b = spawn(fib, n - 1), spawn(fib, n - 2)
    return a.result() + b.result()


@kernel
def sort(a: InOut[N, I64], spawn: Spawn):
    if a.shape[0] <= CELL:
        a.array.sort()
        return
    half = a.shape[0] // CELL // 2 * CELL
    spawn(sort, a[:half])
    spawn(sort, a[half:])
    spawn.taskwait()
    merge(a.array)


@kernel
def merge(a: InOut[N, I64]):
    a.sort(kind="stable")


@kernel
def sort_weakly(a: WeakInOut[N, I64], spawn: Spawn):
    if a.shape[0] <= CELL:
        spawn(merge, a[:])
        return
    half = a.shape[0] // CELL // 2 * CELL
    spawn(sort_weakly, a[:half])
    spawn(sort_weakly, a[half:])
    spawn(merge, a[:])


@kernel
def wild(a: InOut[N, I64], seed: int, depth: int, spawn: Spawn):
    wander(a, seed, depth, spawn)


@kernel
def wild_weakly(a: WeakInOut[N, I64], seed: int, depth: int, spawn: Spawn):
    wander(a, seed, depth, spawn)


@kernel
def look_weakly(a: WeakIn[N, I64], b: WeakInOut[M, I64], spawn: Spawn):
    spawn(fill, b[:CELL], a[:])


def wander(a, seed: int, depth: int, spawn: Spawn):
    """Spawn at random, on parts of a tile."""
    choose = random.Random(seed)
    cells = a.shape[0] // CELL

    def part(most: int):
        count = choose.randint(1, min(most, cells))
        first = choose.randint(0, cells - count)
        return slice(first * CELL, (first + count) * CELL)

    for at in range(choose.randint(1, 8)):
        what = choose.choice(["mix", "mix", "gather", "fill", "wild", "weak", "weak", "look", "wait", "wait_on", "total", "final"])
        one, other = part(3), part(2)
        apart = one.stop <= other.start or other.stop <= one.start
        if what == "mix":
            spawn(mix, a[one], at, priority=choose.randint(-2, 2))
        elif what in ("gather", "fill") and apart:
            spawn(gather, a[one], a[other], at) if what == "gather" else spawn(fill, a[one], a[other])
        elif what in ("wild", "weak", "final") and depth > 0:
            spawn(wild_weakly if what == "weak" else wild, a[part(cells)], choose.getrandbits(30), depth - 1, final=what == "final")
        elif what == "look" and apart:
            spawn(look_weakly, a[one], a[other])
        elif what == "wait":
            spawn.taskwait()
        elif what == "wait_on":
            spawn.wait_on(a[one])
        elif what == "total":
            spawn(mix, a[other], spawn(total, a[one]).result() % 1009)


class TestResults:
    def test_order_is_that_of_the_program(self, each):
        """Tasks that access the same cell run in the order in which they were spawned."""
        x = tensor()
        with each.program() as spawn:
            for k in range(300):
                spawn(mix, x[k % 16 * CELL : (k % 16 + 1) * CELL], k)
                spawn(gather, x[0:CELL], x[CELL : 3 * CELL], k)
        expected = np.arange(16 * CELL, dtype=I64)
        for k in range(300):
            part = expected[k % 16 * CELL : (k % 16 + 1) * CELL]
            part[:] = part * 31 + k
            expected[:CELL] = expected[:CELL] * 7 + k + np.sum(expected[CELL : 3 * CELL] * np.arange(1, 2 * CELL + 1))
        assert (x.array == expected).all()

    @pytest.mark.parametrize("of", [total, largest])
    def test_a_future_has_what_the_kernel_returned(self, each, of):
        """Body or compiled twin, after all that was spawned before on the same cells."""
        x = tensor()
        with each.program() as spawn:
            spawn(mix, x[:CELL], 1)
            future = spawn(of, x[:CELL])
            array = np.arange(CELL, dtype=I64) * 31 + 1
            assert future.result() == (array.sum() if of is total else array.max())
            assert future.done() and future.exception() is None

    def test_tasks_spawn_tasks(self, each):
        """Recursion that waits for results of children."""
        with each.program() as spawn:
            assert spawn(fib, 14).result() == 377

    @pytest.mark.parametrize("how", [sort, sort_weakly])
    def test_sorting_by_nested_tasks(self, each, how):
        """A task on the same tile waits for a task and all that it spawned, waited for or not; twice."""
        x = Tensor("x", np.random.default_rng(0).integers(0, 10**9, 64 * CELL), (CELL,))
        expected = np.sort(x.array)
        with each.program() as spawn:
            spawn(how, x[:])
            first = spawn(total, x[:])
            spawn(how, x[:])
        assert (x.array == expected).all()
        assert first.result() == expected.sum()

    def test_waiting_for_tiles(self, each):
        """wait_on waits for who writes them, and the arrays can be read."""
        x = tensor()
        with each.program() as spawn:
            spawn(mix, x[:CELL], 3)
            spawn.wait_on(x[:CELL])
            assert (x.array[:CELL] == np.arange(CELL) * 31 + 3).all()

    def test_a_final_task_spawns_nothing(self, each):
        """What it spawns runs at once, in the same thread."""
        threads = set()

        @kernel
        def note(k: int):
            threads.add(threading.get_ident())

        @kernel
        def outer(k: int, spawn: Spawn):
            threads.add(threading.get_ident())
            for at in range(20):
                assert spawn(note, at).done()

        with each.program() as spawn:
            spawn(outer, 0, final=True)
        assert len(threads) == 1

    def test_random_programs(self):
        """Nested, weak, final and compiled tasks, waits and results at random: bit for bit what program order gives."""
        assert programs_at_random.verify(60) >= 60

    def test_very_many_tasks_in_little_memory(self, each):
        """Who spawns waits while many tasks are open: 30,000 spawns keep no more than some thousand."""
        x = tensor()
        most = 0
        with each.program() as spawn:
            for k in range(30_000):
                future = spawn(mix, x[k % 16 * CELL : (k % 16 + 1) * CELL], k)
                if k % 5000 == 4999:
                    most = max(most, sum(type(each) is type(future) and each.program is future.program for each in gc.get_objects()))
        assert 0 < most < 10_000
        expected = np.arange(16 * CELL, dtype=I64).reshape(16, CELL)
        for k in range(30_000):
            expected[k % 16] = expected[k % 16] * 31 + k
        assert (x.array == expected.ravel()).all()

    def test_programs_follow_each_other_and_graphs(self, each):
        """A scheduler runs graphs before, between and after programs."""
        x = tensor()
        graph = Graph()
        graph.spawn(mix, x[:CELL], 1)
        for _ in range(3):
            each.run(graph)
            with each.program() as spawn:
                spawn(mix, x[:CELL], 2)
        expected = np.arange(CELL)
        for k in (1, 2, 1, 2, 1, 2):
            expected = expected * 31 + k
        assert (x.array[:CELL] == expected).all()


@kernel
def halve(a: InOut[N, np.float64], most: Out[M, np.float64]):
    a /= 2
    most[0] = a.max()


@pytest.mark.parametrize("name", ["sequential", "loops", "threads", "native"])
class TestRepetition:
    """Whole steps until something is so."""

    def test_a_graph_until_it_is_so(self, name):
        """It is asked after every run."""
        a, most = wrap(np.full(8, 1024.0), ()), wrap(np.zeros(1), ())
        graph = Graph()
        graph.spawn(halve, a[:], most[:])
        with scheduler(name) as opened:
            assert opened.run_while(graph, until=lambda: most.array[0] < 1) == 11
            with pytest.raises(TypeError, match="give the function"):
                opened.run_while(graph, until=lambda: True, reads=[most[:]])
        assert a.array[0] == 0.5

    def test_a_step_that_overlaps_with_the_next(self, name):
        """A task asks, between the writers of what it reads; every step that has begun ends."""
        a, most = wrap(np.full(8, 1024.0), ()), wrap(np.zeros(1), ())
        asked = []

        def is_small():
            asked.append(most.array[0])
            return most.array[0] < 1

        with scheduler(name) as opened:
            runs = opened.run_while(lambda spawn: spawn(halve, a[:], most[:]), until=is_small, reads=[most[:]])
        assert runs in (11, 12)
        assert asked == [1024 / 2**k for k in range(1, runs + 1)]
        assert a.array[0] == 1024 / 2**runs


def test_the_page():
    """docs/howto/programs.md, from top to bottom."""
    exec("\n".join(blocks(ROOT / "docs" / "howto" / "programs.md", "python")), {"__name__": "page"})


def test_taskgpt_scheduler():
    """Three lines to begin."""
    with taskgpt.scheduler("native", workers=2) as opened, opened.program() as spawn:
        assert spawn(fib, 10).result() == 55


@pytest.mark.parametrize("name", ["loops", "threads", "local-cluster"])
def test_who_runs_graphs_alone_says_so(name):
    """The others refuse a program, and name those that run it."""
    found = config.load_scheduler(name, {})
    with pytest.raises(NotImplementedError, match="programs run on native, and on sequential"):
        open_scheduler(found.scheduler, found.settings).program()


class TestTraces:
    """A program as a run of stretches without a pause."""

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize(("name", "workers"), [("sequential", 1), ("native", 1), ("native", 2), ("native-stealing", 8)])
    def test_random_programs_are_traced(self, name, workers, seed, tmp_path):
        """No worker does two things at once, nothing begins before what it waits for is done, and all that ran is there: after a graph's
        run, and before another's. Files come back as they were."""
        x, y = tensor(), tensor()
        graph = Graph()
        graph.spawn(mix, y[:CELL], 1)
        with Traced(scheduler(name, workers=workers, record=RECORD)) as traced:
            traced.run(graph)
            with traced.program() as spawn:
                wander(x[:], seed, 3, spawn)
            traced.run(graph)
            trace = traced.trace({})
        trace.verify()
        assert [trace.graphs[run["graph"]].name for run in trace.runs] == ["graph", "program", "graph"]
        program = trace.graphs[1]
        assert sorted(trace.records["task"][trace.records["run"] == 1]) == list(range(len(program)))
        trace.save(tmp_path / "trace.npz")
        back = Trace.load(tmp_path)
        assert (back.records == trace.records).all() and back.graphs[1].calls == program.calls

    @pytest.mark.parametrize(("name", "workers"), [("sequential", 1), ("native", 1), ("native", 2)])
    @pytest.mark.parametrize("how", ["tiles", "result", "taskwait"])
    def test_who_waits_for_a_task_waits_for_what_it_spawned(self, name, workers, how):
        """By its tiles, for its result though it may be done, or for all: the edge to the last of its children is there."""

        @kernel
        def outer(a: InOut[N, I64], spawn: Spawn):
            spawn(mix, a[:CELL], 1)

        @kernel
        def root(a: InOut[N, I64], spawn: Spawn):
            future = spawn(outer, a[: 2 * CELL])
            if how == "tiles":
                spawn(fill, a[CELL : 2 * CELL], a[2 * CELL :])
            elif how == "result":
                future.result()
            else:
                spawn.taskwait()

        x = tensor()
        with scheduler(name, workers=workers, record=1000) as opened, opened.program() as spawn:
            spawn(root, x[:])
            spawn.taskwait()
            graph = spawn.graph
        names = [call.kernel.name for task in graph.tasks for call in task.calls]
        last = names.index("fill") if how == "tiles" else len(names) - 1
        assert names[last] == ("fill" if how == "tiles" else "root")
        above, left = set(), [last]
        while left:
            more = set(graph.tasks[left.pop()].predecessors) - above
            above |= more
            left += more
        assert names.index("mix") in above and names.index("outer") in above

    def test_a_task_that_waits_is_two_stretches(self):
        """The second waits for the first, and for what was awaited; while a task waits its worker does something else."""

        @kernel
        def outer(a: InOut[N, I64], spawn: Spawn):
            spawn(mix, a[:], 1).result()
            a.array[0] = 1

        x = tensor()
        with Traced(scheduler("native", workers=1, record=RECORD)) as traced:
            with traced.program() as spawn:
                spawn(outer, x[:CELL], label="mine")
            trace = traced.trace({})
        [program] = trace.graphs
        names = [program.kernels[kernel] for kernel in program.kernel]
        assert names == ["outer", "mix", "outer"]
        assert list(program.predecessors[program.first[2] :]) == [0, 1]
        assert program.phases[program.phase[0]] == "mine"
        assert list(trace.records["task"]) == [0, 1, 2]


class TestProtocol:
    """The code of open runs itself, in every order in which its threads can do their atomic steps."""

    @staticmethod
    @contextlib.contextmanager
    def still(tasks):
        """Give a scheduler without threads that has an open run, in which tasks without a body wait for those at these places."""
        with Still(workers=2) as still:
            still._table[IS_RANKED] = True
            run = OpenRun(still._table, still._run_words[0], None, None, False, places=16, edges=8)
            still.kept = [run]
            of_run = [*run._arrays.values(), *run._of_run.values()]
            still.everything += [run._open, run._pools, np.frombuffer(run._buffer, np.int64, 32), *of_run]
            still.places = [TestProtocol.add(still, waits, parent) for waits, parent in tasks]
            yield still

    @staticmethod
    def prepare(still, waits, parent=open_run.ROOT):
        buffer = still.kept[0]._buffer
        for at, word in enumerate([0, 0, 0, len(waits), parent, 0, 0, -1, 0, *waits]):
            buffer[at] = word

    @classmethod
    def add(cls, still, waits, parent=open_run.ROOT):
        cls.prepare(still, waits, parent)
        return run_alone(still.code.add_task(still._address, 2))

    @staticmethod
    def ready(still):
        """Take all that is in the queues; return the places."""
        queue = still.code.queue_of(still.t, 0)
        found = []
        while (instance := run_alone(still.code.take_out(queue))) != NOTHING:
            found.append(instance // 2)
        return found

    @staticmethod
    def runner(still, me, place):
        """A worker that runs a task, and keeps what it would go on with."""

        def run():
            best = yield from still.code.run_spawned(still.t, me, 2 * place)
            if best != NOTHING:
                still.found.append(best // 2)

        return run

    def everybody_is_done(self, still, open_tasks):
        run = still.kept[0]
        assert run.open_tasks() == open_tasks
        free, at = [], run._pools[0, FREED]
        while at != NOTHING:
            free.append(at)
            at = run._arrays[NEXT_PLACE][at]
        assert len(free) == len(set(free)) == len(still.places) - open_tasks

    def test_who_is_spawned_while_its_predecessor_ends_runs_once(self):
        """The edge comes too late or in time: the task is ready once."""
        with self.still([((), 0)]) as still:
            assert self.ready(still) == still.places
            self.prepare(still, still.places)
            spawned = []

            def spawner():
                spawned.append((yield from still.code.add_task(still._address, 2)))

            for are_through in ends(still, [spawner, self.runner(still, 0, still.places[0])]):
                assert are_through
                assert self.ready(still) + still.found == spawned[-1:]
            assert set(spawned) == {1, 2}  # the first task's place, if that was done already, or one of its own

    def test_a_task_in_two_hands_runs_once(self):
        """Its parent claims it while a worker takes it out of the queue: one runs it, and its place is free when both have been there."""
        with self.still([((), 0), ((1,), 0)]) as still:
            first, second = still.places
            assert self.ready(still) == [first]

            def parent():
                state = yield from still.code.claim_task(still._address, first)
                if state != NOTHING:
                    yield from still.code.run_claimed(still._address, 1, first, state)

            seen = set()
            for are_through in ends(still, [parent, self.runner(still, 0, first)]):
                assert are_through
                ready = self.ready(still)
                assert ready + still.found == [second]
                seen.add(tuple(ready))
                self.everybody_is_done(still, open_tasks=1)
            assert seen == {(), (second,)}  # who claimed it pushes what it made ready, who took it goes on with that

    def test_a_parent_is_done_once_when_body_and_children_end_together(self):
        """Whoever is last releases who waits for the parent."""
        with self.still([((), 0), ((), 1), ((1,), 0)]) as still:
            parent, child, after = still.places
            assert self.ready(still) == [parent, child]
            count = 0
            for are_through in ends(still, [self.runner(still, 0, parent), self.runner(still, 1, child)]):
                assert are_through
                assert self.ready(still) + still.found == [after]
                self.everybody_is_done(still, open_tasks=1)
                count += 1
            assert count > 3

    def test_who_waits_for_a_task_hears_of_it(self):
        """A thread begins to wait while the task ends: it does not sleep for ever, and the place is free afterwards."""
        with self.still([((), 0)]) as still:
            [place] = still.places
            self.ready(still)

            def waiter():
                if not (yield from still.code.begin_wait(still._address, place)):
                    yield from still.code.await_task(still._address, place, still.kept[0]._clock(), 1)
                    yield from still.code.end_wait(still._address, place)

            for are_through in ends(still, [waiter, self.runner(still, 0, place)]):
                assert are_through
                self.everybody_is_done(still, open_tasks=0)

    @pytest.mark.parametrize("setup", [{"idle": "idle"}, {"idle": "hybrid", "spins": 1}], ids=["sleeps", "spins"])
    def test_a_worker_is_given_back(self, setup):
        """Whatever the thread is at that is this worker: it leaves, and a task that it may have in its hands is still there."""
        with Still(workers=1, **setup) as still:

            def worker():
                yield from still.code.work(still._address, 0)

            def owner():
                yield from still.code.want_back(still._address, 0)

            for are_through in ends(still, [worker, owner]):
                assert are_through
                assert still._worker_words[0, WANTED] == 0


class TestFailure:
    def test_a_failure_names_task_tiles_and_line(self, each):
        """The first failure ends the program, and says where the task was spawned."""

        @kernel
        def breaks(a: InOut[N, I64]):
            raise ValueError("oh no")

        x = tensor()
        said = r"task 1 'second', breaks inout\(x\[0:8\]\), spawned in .*test_dynamic.py, line \d+: ValueError: oh no"
        with pytest.raises(TaskError, match=said), each.program() as spawn:
            spawn(mix, x[:CELL], 1)
            future = spawn(breaks, x[:CELL], label="second")
            spawn.taskwait()
        assert isinstance(future.exception(), TaskError)
        with each.program() as spawn:  # the next one runs
            assert spawn(total, x[CELL : 2 * CELL]).result() == x.array[CELL : 2 * CELL].sum()

    def test_a_failure_in_compiled_code(self, each):
        """The same for what a twin raises."""

        x = tensor()
        with pytest.raises(TaskError, match=r"divide.*ZeroDivisionError: by nothing"), each.program() as spawn:
            for k in (1, 0):
                spawn(divide, x[:CELL], k)
            spawn.taskwait()

    def test_nothing_begins_after_a_failure(self, each):
        """Tasks that wait for the one that failed do not run."""
        ran = []

        @kernel
        def breaks(a: InOut[N, I64]):
            raise ValueError

        @kernel
        def note(a: InOut[N, I64]):
            ran.append(1)

        x = tensor()
        with pytest.raises(TaskError), each.program() as spawn:
            spawn(breaks, x[:CELL])
            spawn(note, x[:CELL])
        assert not ran

    def test_an_exception_of_the_program_ends_it(self, each):
        """It is raised as it is, and the tasks that have begun are waited for."""
        x = tensor()
        with pytest.raises(KeyError, match="mine"), each.program() as spawn:
            for k in range(100):
                spawn(mix, x[:CELL], k)
            raise KeyError("mine")

    def test_errors_of_nested_tasks_come_to_the_program(self, each):
        """A task two levels down fails, while those above wait."""

        @kernel
        def breaks(k: int):
            raise ValueError("deep down")

        @kernel
        def inner(k: int, spawn: Spawn):
            spawn(breaks, k)
            spawn.taskwait()

        @kernel
        def outer(k: int, spawn: Spawn):
            spawn(inner, k)
            spawn.taskwait()

        with pytest.raises(TaskError, match="deep down"), each.program() as spawn:
            spawn(outer, 1)
            spawn.taskwait()

    def test_arguments_are_verified_as_for_graphs(self, each):
        """A wrong shape, a kernel that is none, overlapping tiles: told at the spawn."""
        x = tensor()
        with each.program() as spawn:
            with pytest.raises(TypeError, match="only kernels"):
                spawn(print, x[:CELL])
            with pytest.raises(TypeError, match="takes 2 arguments"):
                spawn(mix, x[:CELL])
            with pytest.raises(RuntimeError, match="overlap"):
                spawn(gather, x[:CELL], x[:CELL], 1)

    def test_declarations_are_enforced(self, each):
        """With check, a kernel that writes what it declares In fails; right programs give the same bits."""

        @kernel
        def lies(a: In[N, I64]):
            a.flags.writeable = True
            a[0] = 1

        @kernel
        def forgets(a: Out[N, np.float64]):
            a[1:] = 0

        x, y, z = tensor(), tensor(), wrap(np.zeros(8), ())
        with pytest.raises(TaskError, match="lies wrote 'a', declared In"), each.program(check=True) as spawn:
            spawn(lies, x[:CELL])
        with pytest.raises(TaskError, match="forgets left 1 of 8 elements of 'a' unwritten or NaN"), each.program(check=True) as spawn:
            spawn(forgets, z[:])
        x = tensor()
        with scheduler("sequential") as oracle, oracle.program() as spawn:
            wander(x[:], 7, 2, spawn)
        with each.program(check=True) as spawn:
            wander(y[:], 7, 2, spawn)
            assert spawn(largest, y[:CELL]).result() == x.array[:CELL].max()
        assert (x.array == y.array).all()

    def test_a_task_spawns_on_what_it_declares(self, each):
        """With check: else its children would run beside others on the same tile. Reading is not writing."""

        @kernel
        def strays(a: WeakInOut[N, I64], spawn: Spawn):
            spawn(mix, x[3 * CELL : 4 * CELL], 1)

        @kernel
        def writes(a: WeakIn[N, I64], spawn: Spawn):
            spawn(total, a[:])
            spawn(mix, a[:], 1)

        x = tensor()
        with pytest.raises(TaskError, match=r"mix writes 'a', x\[24:32\], and strays, which"), each.program(check=True) as spawn:
            spawn(strays, x[:CELL])
        with pytest.raises(TaskError, match=r"mix writes 'a', x\[0:8\], and writes, which spawns it"), each.program(check=True) as spawn:
            spawn(writes, x[:CELL])

    def test_a_spawn_is_its_tasks_own(self, each):
        """Another task cannot use it."""
        kept = []

        @kernel
        def keep(k: int, spawn: Spawn):
            kept.append(spawn)

        with each.program() as spawn:
            spawn(keep, 1).result()
            with pytest.raises(RuntimeError, match="declare `spawn: Spawn`"):
                kept[0](keep, 1)

    def test_kernels_for_programs_are_refused_elsewhere(self):
        """A graph cannot spawn from tasks, nor hand results to anybody."""
        with pytest.raises(TypeError, match="spawns tasks; spawn it in a program"):
            Graph().spawn(fib, 3)
        with pytest.raises(TypeError, match="returns a value, which a recorded task gives nobody"):
            Graph().spawn(total, tensor()[:CELL])
        with pytest.raises(TypeError, match="returns a value"):
            run_now(total, tensor()[:CELL])
        assert total(np.arange(4)) == 6

    def test_declarations_that_make_no_sense(self):
        """Weak without Spawn, Spawn with Scratch or not last."""
        with pytest.raises(TypeError, match="weak accesses are for tasks that it spawns"):

            @kernel
            def weak(a: WeakIn[N]): ...

        with pytest.raises(TypeError, match="stands after Spawn"):

            @kernel
            def early(spawn: Spawn, a: In[N]): ...


class TestWaiting:
    def test_events_hold_a_task(self, each):
        """A task is done when its events are fulfilled, from another thread: who waits for its tile waits for them."""
        x = tensor()
        order = []

        @kernel
        def receive(a: Out[N, I64], spawn: Spawn):
            event = spawn.event()

            def arrives():
                order.append("arrives")
                a.array[:] = 5
                event.fulfil()

            threading.Timer(0.05, arrives).start()

        @kernel
        def use(a: In[N, I64]):
            order.append(int(a[0]))

        with each.program() as spawn:
            spawn(receive, x[:CELL])
            spawn(use, x[:CELL])
        assert order == ["arrives", 5]

    def test_an_event_is_fulfilled_once(self, each):
        """The second time is a mistake of the caller."""
        events = []

        @kernel
        def ask(k: int, spawn: Spawn):
            events.append(spawn.event())
            events[0].fulfil()

        with each.program() as spawn:
            spawn(ask, 1).result()
            with pytest.raises(RuntimeError, match="was fulfilled before"):
                events[0].fulfil()
            with pytest.raises(RuntimeError, match="inside of a task"):
                spawn.event()

    def test_onready_comes_before_the_task(self, each):
        """It is called when all that the task waits for is done; its events delay the task."""
        x = tensor()
        order = []

        @kernel
        def note(a: InOut[N, I64], k: int):
            order.append(k)

        def ready(spawn):
            order.append("ready")
            event = spawn.event()
            threading.Timer(0.03, lambda: (order.append("happened"), event.fulfil())).start()

        with each.program() as spawn:
            spawn(note, x[:CELL], 1)
            spawn(note, x[:CELL], 2, onready=ready)
            spawn(note, x[:CELL], 3)
        assert order == [1, "ready", "happened", 2, 3]

    def test_a_task_that_blocks_gives_its_core_away(self):
        """On one worker eight tasks meet, which each waits for the others to come."""
        meeting = threading.Barrier(8)

        @kernel
        def meet(k: int, spawn: Spawn):
            with spawn.blocking():
                meeting.wait(60)

        with scheduler("native", workers=1) as opened, opened.program() as spawn:
            for k in range(8):
                spawn(meet, k)

    def test_tasks_wait_for_what_another_task_says(self):
        """One worker: the first task waits for an event that the second fulfils."""
        events, order = [], []

        @kernel
        def first(k: int, spawn: Spawn):
            events.append(spawn.event())
            events[0].wait()
            order.append("first")

        @kernel
        def second(k: int, spawn: Spawn):
            while not events:
                spawn.sleep(0.001)
            order.append("second")
            events[0].fulfil()

        with scheduler("native", workers=1) as opened, opened.program() as spawn:
            spawn(first, 1)
            spawn(second, 2)
        assert order == ["second", "first"]

    def test_locks_leave_the_core_to_others(self, each):
        """Tasks that do not depend on each other count under a lock."""
        count = [0]
        with each.program() as spawn:
            lock = spawn.lock()

            @kernel
            def add(k: int, spawn: Spawn):
                with lock:
                    before = count[0]
                    spawn.sleep(0.0005)
                    count[0] = before + 1

            for k in range(20):
                spawn(add, k)
        assert count == [20]

    def test_asyncio_fulfils_events(self, each):
        """A loop in a thread of its own does the waiting for many tasks."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        done = []

        @kernel
        def fetch(k: int, spawn: Spawn):
            event = spawn.event()

            async def arrive():
                await asyncio.sleep(0.01)
                done.append(k)
                event.fulfil()

            asyncio.run_coroutine_threadsafe(arrive(), loop)

        try:
            with each.program() as spawn:
                for k in range(10):
                    spawn(fetch, k)
            assert sorted(done) == list(range(10))
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def test_what_waits_for_ever_is_told(self, each):
        """An event that nobody fulfils: after the program's patience it says who waits, and ends."""

        @kernel
        def forgets(k: int, spawn: Spawn):
            spawn.event()

        said = r"nothing has gone on for 0.3 s: the program waits for (its events|.*'careless', forgets.* 1 of its events)"
        with pytest.raises(ProgramError, match=said), each.program(patience_s=0.3) as spawn:
            spawn(forgets, 1, label="careless")

    def test_tasks_that_wait_for_each_other_are_told(self):
        """Two tasks each wait for an event of the other."""
        events = {}

        @kernel
        def waits(k: int, spawn: Spawn):
            events[k] = spawn.event()
            while 1 - k not in events:
                spawn.sleep(0.001)
            events[1 - k].wait()
            events[k].fulfil()

        said = r"waits for an event.*waits for an event"
        with scheduler("native", workers=2) as opened, pytest.raises(ProgramError, match=said), opened.program(patience_s=0.3) as spawn:
            spawn(waits, 0)
            spawn(waits, 1)


class TestCancelling:
    def test_a_group_is_cancelled(self):
        """What has not begun does not; who waits for it goes on."""
        x = tensor()
        gate = threading.Event()
        ran = []

        @kernel
        def hold(a: InOut[N, I64]):
            gate.wait(10)

        @kernel
        def note(a: InOut[N, I64], k: int):
            ran.append(k)

        with scheduler("native", workers=2) as opened, opened.program() as spawn:
            spawn(hold, x[:CELL])
            with spawn.group() as group:
                futures = [spawn(note, x[:CELL], k) for k in range(10)]
            last = spawn(note, x[:CELL], 99)
            assert group.cancel() == 10
            gate.set()
            last.result()
            with pytest.raises(CancelledError):
                futures[0].result()
            assert isinstance(futures[3].exception(), CancelledError)
            group.wait()
        assert ran == [99]

    def test_one_task_is_cancelled_before_it_begins_only(self):
        """Afterwards cancel() says no."""
        with scheduler("native", workers=1) as opened, opened.program() as spawn:
            future = spawn(total, tensor()[:CELL])
            future.result()
            assert not future.cancel()

    def test_a_weak_task_that_is_cancelled_keeps_the_order(self):
        """Who comes after it still waits for who came before it."""
        x = tensor()
        gate = threading.Event()

        @kernel
        def hold(a: InOut[N, I64]):
            gate.wait(10)
            a += 1

        with scheduler("native", workers=3) as opened, opened.program() as spawn:
            spawn(hold, x[:CELL])
            first = spawn(sort_weakly, x[:])
            cancelled = first.cancel()
            spawn(sort_weakly, x[: 2 * CELL])
            time.sleep(0.05)
            gate.set()
        assert x.array[0] == 1 or not cancelled

    def test_random_faults_leave_nothing_behind(self):
        """Failures, cancellations and events at random, on 1 to 8 workers: nothing hangs, no thread is left, the next program runs."""
        assert programs_at_random.disturb(40) >= 40


@kernel
def spawn_nothing(a: WeakInOut[N, I64], spawn: Spawn):
    pass


@kernel
def look_at_nothing(a: WeakIn[N, I64], spawn: Spawn):
    pass


@kernel
def chain(n: int, spawn: Spawn) -> int:
    return 1 + spawn(chain, n - 1).result() if n else 0


class TestReview:
    """What an attack broke once."""

    @staticmethod
    def gated():
        """Return a gate, and a kernel that adds 1 when it is open."""
        gate = threading.Event()

        @kernel
        def hold(a: InOut[N, I64]):
            gate.wait(10)
            a += 1

        return gate, hold

    def test_a_final_weak_task_waits_itself(self, each):
        """What it spawns runs at once, and so cannot wait in its place."""

        @kernel
        def slow(a: InOut[N, I64]):
            time.sleep(0.02)
            a += 1

        @kernel
        def halve(a: WeakInOut[N, I64], spawn: Spawn):
            spawn(mix, a[:CELL], 0)

        x = tensor(1)
        with each.program() as spawn:
            spawn(slow, x[:])
            spawn(halve, x[:], final=True)
        assert x.array[0] == 31

    def test_weak_tasks_in_a_row_and_side_by_side(self):
        """Who comes after hundreds that spawned nothing is spawned at once, and waits for who came before them."""
        x = tensor(2)
        gate, hold = self.gated()
        begun = threading.Event()

        @kernel
        def occupy(k: int):
            begun.set()
            gate.wait(10)

        with scheduler("native", workers=1) as opened, opened.program() as spawn:
            spawn(occupy, 1)
            begun.wait(10)
            spawn(hold, x[:CELL])
            for _ in range(300):
                spawn(spawn_nothing, x[:])
                futures = [spawn(look_at_nothing, x[:]) for _ in range(2)]
            gate.set()
            futures[-1].result()
            assert spawn(total, x[:]).result() == sum(range(2 * CELL)) + CELL

    def test_cancelling_a_weak_task_whose_body_has_ended(self):
        """It has begun, and nothing is cancelled: not the task either that has the place of its body now."""
        x = tensor(2)
        gate, hold = self.gated()
        has_spawned = threading.Event()

        @kernel
        def outer(a: WeakInOut[N, I64], spawn: Spawn):
            spawn(hold, a[:CELL])

        @kernel
        def after(a: In[N, I64], k: int):
            has_spawned.set()

        with scheduler("native", workers=2) as opened, opened.program() as spawn:
            future = spawn(outer, x[:CELL])
            spawn(after, x[CELL:], 0)
            while not future.has_ended:
                time.sleep(0.001)
            time.sleep(0.01)
            others = [spawn(mix, x[:CELL], 1) for _ in range(4)]
            assert not future.cancel()
            gate.set()
            assert [other.exception() for other in others] == [None] * 4

    def test_a_task_with_events_and_weak_tiles_is_not_done_before(self, each):
        """Who reads what it writes itself waits for its events."""
        x = tensor(2)

        @kernel
        def receive(a: Out[N, I64], b: WeakInOut[M, I64], spawn: Spawn):
            event = spawn.event()

            def arrives():
                a.array[:] = 5
                event.fulfil()

            threading.Timer(0.1, arrives).start()

        with each.program() as spawn:
            receives = spawn(receive, x[:CELL], x[CELL:])
            while not receives.has_ended:
                time.sleep(0.001)
            assert spawn(total, x[:CELL]).result() == 5 * CELL

    def test_taskwait_does_not_wait_for_own_events(self, each):
        """A task waits for its children, and fulfils its event then."""
        x = tensor(2)

        @kernel
        def ask(a: InOut[N, I64], spawn: Spawn):
            event = spawn.event()
            spawn(mix, a[:CELL], 1)
            spawn.taskwait()
            event.fulfil()

        with each.program(patience_s=5) as spawn:
            spawn(ask, x[:CELL])
        assert x.array[1] == 32

    def test_a_result_is_the_failure(self, each):
        """Of compiled code, too; and for a task that did not begin because another failed."""
        x = tensor(2)

        with pytest.raises(TaskError, match="by nothing"), each.program() as spawn:
            failed = spawn(divide, x[:CELL], 0)
            with pytest.raises(TaskError, match="by nothing"):
                failed.result()
            failed.result()
        with pytest.raises(TaskError, match="by nothing"), each.program() as spawn:
            spawn(divide, x[:CELL], 0)
            spawn(total, x[:CELL]).result()
        assert isinstance(failed.exception(), TaskError)

    def test_an_exception_that_cannot_be_told(self, each):
        """Its own __str__ fails: the message has its type."""

        class Silent(Exception):
            def __str__(self):
                raise ValueError

        @kernel
        def breaks(k: int):
            raise Silent

        with pytest.raises(TaskError, match=r"breaks k=1.*: Silent$"), each.program() as spawn:
            spawn(breaks, 1)

    def test_a_long_chain_of_tasks_that_wait(self):
        """Far more than Python calls fit into a thread."""
        with scheduler("native", workers=2) as opened, opened.program() as spawn:
            assert spawn(chain, 600).result() == 600

    def test_after_its_end_a_program_says_so(self, each):
        """Spawning and waiting are refused, results are there; also while the next program runs."""
        x = tensor(2)
        with each.program() as spawn:
            future = spawn(total, x[:])
        with each.program() as another:
            for use in (lambda: spawn(total, x[:]), spawn.taskwait, lambda: spawn.wait_on(x[:])):
                with pytest.raises(RuntimeError, match="this program has ended"):
                    use()
            assert another(total, x[:]).result() == future.result() == x.array.sum()

    @pytest.mark.parametrize("inner", ["sequential", "native"])
    def test_a_task_may_open_a_scheduler(self, each, inner):
        """And run graphs and programs there, on other workers than its own."""
        sums = []

        @kernel
        def nest(k: int):
            x = tensor(2)
            graph = Graph()
            graph.spawn(mix, x[:CELL], k)
            with scheduler(inner, workers=1) as opened:
                opened.run(graph)
                with opened.program() as spawn:
                    spawn(mix, x[:CELL], k)
                    sums.append(spawn(total, x[:CELL]).result())

        with each.program() as spawn:
            for _ in range(4):
                spawn(nest, 0)
        assert sums == [31 * 31 * sum(range(CELL))] * 4

    def test_an_event_that_comes_too_late(self, each):
        """The program failed and ended: who fulfils an event then has done nothing wrong; who asks for one is told."""
        events, told = [], []

        @kernel
        def ask(k: int, spawn: Spawn):
            events.append(spawn.event())

        @kernel
        def late(k: int, spawn: Spawn):
            try:
                spawn(breaks, 1).exception()
                spawn.event()
            except BaseException as error:
                told.append(type(error))

        @kernel
        def breaks(k: int):
            raise ValueError("on purpose")

        with pytest.raises(TaskError, match="on purpose"), each.program() as spawn:
            if each.workers > 1:
                spawn(ask, 1)
            spawn(late, 1)
        for event in events:
            event.fulfil()
        assert told == [CancelledError]

    def test_a_spawn_that_fails_half_way_ends_the_program(self):
        """Its tiles are noted, and who comes after it would not wait for those before it."""

        @kernel
        def broken(a: InOut[N, I64]): ...

        @broken.compiled
        def _(a):
            a.nonsense()

        x = tensor(2)
        with scheduler("native", workers=2) as opened, pytest.raises(TaskError, match="does not compile"), opened.program() as spawn:
            with pytest.raises(TaskError, match="does not compile"):
                spawn(broken, x[:CELL])
            spawn(mix, x[:CELL], 1)

    def test_a_group_is_waited_for_while_it_grows(self):
        """Its members spawn more than it keeps, and end meanwhile."""

        @kernel
        def grow(k: int, spawn: Spawn):
            for at in range(400):
                spawn(nap, at)
            spawn.sleep(0.05)

        @kernel
        def nap(k: int):
            pass

        with scheduler("native", workers=2) as opened, opened.program() as spawn:
            with spawn.group() as group:
                futures = [spawn(grow, k) for k in range(8)]
            group.wait()
            assert all(future.done() for future in futures)

    def test_wrong_settings(self, each):
        """A priority, a patience and a tile that are none."""
        x = tensor(2)
        for wrong in ("a", None, -1, float("nan")):
            with pytest.raises(ValueError, match="patience_s is a number of seconds above 0"), each.program(patience_s=wrong):
                pass
        with each.program() as spawn:
            with pytest.raises(ValueError, match="priorities go from -16384 to 16384, got 16385"):
                spawn(mix, x[:CELL], 1, priority=16385)
            with pytest.raises(TypeError, match="integer"):
                spawn(mix, x[:CELL], 1, priority=0.5)
            with pytest.raises(TypeError, match=r"wait_on wants tiles, .* got a Tensor"):
                spawn.wait_on(x)
            spawn(mix, x[:CELL], 0)
        assert x.array[1] == 31

    def test_ctrl_c_at_any_moment(self):
        """Again and again, also twice: nothing hangs, and the next program runs."""
        x = tensor(2)

        @kernel
        def tree(a: InOut[N, I64], depth: int, spawn: Spawn):
            if depth:
                spawn(tree, a[:], depth - 1)
                spawn(nap, a[CELL:])
                spawn.taskwait()

        @kernel
        def nap(a: InOut[N, I64]):
            time.sleep(0.001)

        def interrupt():
            choose = random.Random(0)
            while not is_over.is_set():
                is_armed.wait(0.1)
                time.sleep(choose.random() * 0.02)
                if is_armed.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                    if choose.random() < 0.5:
                        time.sleep(choose.random() * 0.002)
                        os.kill(os.getpid(), signal.SIGINT)
                    is_armed.clear()

        is_over, is_armed = threading.Event(), threading.Event()
        thread = threading.Thread(target=interrupt)
        gc.disable()  # an interrupt inside of a callback of the collector's, such as distributed's, is lost
        thread.start()
        count = 0
        try:
            with scheduler("native", workers=2) as opened:
                for _ in range(60):
                    with contextlib.suppress(KeyboardInterrupt):  # the second one, after the end
                        try:
                            is_armed.set()
                            while is_armed.is_set():
                                with opened.program() as spawn:
                                    for _ in range(10):
                                        spawn(tree, x[:], 3)
                                        spawn(sort_weakly, x[:])
                                    spawn(total, x[:]).result()
                        except KeyboardInterrupt:
                            count += 1
                            while is_armed.is_set():
                                time.sleep(0.001)
                with contextlib.suppress(KeyboardInterrupt):  # one that is on its way
                    is_over.set()
                    thread.join()
                with opened.program() as spawn:
                    assert spawn(fib, 8).result() == 21
        finally:
            is_over.set()
            thread.join()
            gc.enable()
        assert count

    def test_programs_leave_no_memory_behind(self):
        """One after another on the same scheduler."""
        x = tensor(2)
        with scheduler("native", workers=2) as opened:
            for _ in range(2):
                with opened.program() as spawn:
                    spawn(mix, x[:CELL], 1)
            rooms = len(opened._room)
            for _ in range(5):
                with opened.program() as spawn:
                    spawn(mix, x[:CELL], 1)
            assert len(opened._room) == rooms
