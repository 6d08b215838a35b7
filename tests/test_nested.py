"""Twins that spawn: the same results as bodies in Python, without Python, and as clear where something is wrong."""

import contextlib
import subprocess
import sys
from array import array

import numba
import numpy as np
import pytest
from interleavings import Still, ends, run_alone
from plain_schedulers import scheduler

from taskgpt.schedulers.native import crew, open_run, program_engine
from taskgpt.schedulers.native.program_engine import OpenRun
from taskgpt.schedulers.native.table import IS_RANKED, NESTING, NOTHING
from taskgpt.tasks import AccessError, In, InOut, Out, Scratch, TaskError, TwinError, WeakInOut, dims, kernel, wrap
from taskgpt.tasks.frames import FRAME_PLACE, TOO_DEEP
from taskgpt.tasks.frames import NESTING as FRAME_NESTING
from taskgpt.tasks.spawn import Spawn

N, T, M = dims("N T M")
I64, F64, BOOL = np.int64, np.float64, np.bool_


@kernel(compiled=True)
def fib(n: int, spawn: Spawn) -> int:
    if n < 2:
        return n
    first, second = spawn(fib, n - 1), spawn(fib, n - 2)
    return first.result() + second.result()


@kernel(compiled=True)
def queens(full: int, columns: int, left: int, right: int, spawn: Spawn) -> int:
    """Return in how many ways the rows that are left can have a queen each: every place is a task."""
    if columns == full:
        return 1
    free = full & ~(columns | left | right)
    futures = []
    while free:
        bit = free & -free
        free ^= bit
        futures.append(spawn(queens, full, columns | bit, (left | bit) << 1, (right | bit) >> 1))
    found = 0
    for future in futures:
        found += future.result()
    return found


@numba.njit
def merge(a):
    """Merge the two sorted halves."""
    copy, half = a.copy(), a.shape[0] // 2
    i, j = 0, half
    for k in range(a.shape[0]):
        if j == a.shape[0] or (i < half and copy[i] <= copy[j]):
            a[k], i = copy[i], i + 1
        else:
            a[k], j = copy[j], j + 1


@kernel(compiled=True)
def sort(a: InOut[N, F64], spawn: Spawn):
    if a.shape[0] <= 16:
        a.array.sort()
        return
    half = a.shape[0] // 2
    spawn(sort, a[:half])
    spawn(sort, a[half:])
    spawn.taskwait()
    merge(a.array)


@kernel(compiled=True)
def factor(a: InOut[N, N, F64]):
    for k in range(a.shape[0]):
        for i in range(k + 1, a.shape[0]):
            a[i, k] /= a[k, k]
            for j in range(k + 1, a.shape[0]):
                a[i, j] -= a[i, k] * a[k, j]


@kernel(compiled=True)
def right_of(a: InOut[N, N, F64], diagonal: In[N, N, F64]):
    for i in range(a.shape[0]):
        for k in range(i):
            for j in range(a.shape[1]):
                a[i, j] -= diagonal[i, k] * a[k, j]


@kernel(compiled=True)
def below(a: InOut[N, N, F64], diagonal: In[N, N, F64]):
    for j in range(a.shape[1]):
        for i in range(a.shape[0]):
            for k in range(j):
                a[i, j] -= a[i, k] * diagonal[k, j]
            a[i, j] /= diagonal[j, j]


@kernel(compiled=True)
def subtract(a: InOut[N, N, F64], row: In[N, N, F64], column: In[N, N, F64]):
    for i in range(a.shape[0]):
        for k in range(a.shape[0]):
            for j in range(a.shape[1]):
                a[i, j] -= row[i, k] * column[k, j]


@kernel(compiled=True)
def sparse_lu(a: InOut[M, M, F64], there: InOut[T, T, BOOL], size: int, spawn: Spawn):
    """BSC's SparseLU: the loops of a matrix of tiles, some of which are there; all order is by what the tasks access."""
    tiles, is_there = there.shape[0], there.array
    for k in range(tiles):
        here = slice(k * size, (k + 1) * size)
        spawn(factor, a[here, here])
        for j in range(k + 1, tiles):
            if is_there[k, j]:
                spawn(right_of, a[here, j * size : (j + 1) * size], a[here, here])
        for i in range(k + 1, tiles):
            if is_there[i, k]:
                spawn(below, a[i * size : (i + 1) * size, here], a[here, here])
                for j in range(k + 1, tiles):
                    if is_there[k, j]:
                        is_there[i, j] = True
                        at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                        spawn(subtract, a[at], a[at[0], here], a[here, at[1]])


@kernel(compiled=True)
def mix(a: InOut[N, I64], k: int):
    for i in range(a.shape[0]):
        a[i] = a[i] * 31 + k


@kernel(compiled=True)
def mix_all(a: InOut[N, I64], seed: int, times: int, spawn: Spawn):
    """Spawn on parts of all lengths, that overlap in all ways; a few spawn more."""
    draw, length = seed, a.shape[0]
    for k in range(times):
        draw = (draw * 1103515245 + 12345) & 0x7FFFFFFF
        start = (draw >> 8) % length
        stop = start + 1 + (draw >> 16) % (length - start)
        if draw % 7 == 0 and times > 2:
            spawn(mix_all, a[start:stop], draw, times // 3)
        else:
            spawn(mix, a[start:stop], k)
        if draw % 31 == 0:
            spawn.taskwait()


class TestResults:
    """Bodies run in Python under `sequential`, and twins under `native`: the same in every bit."""

    def test_fib(self, each):
        with each.program() as spawn:
            assert spawn(fib, 15).result() == 610

    def test_queens(self, each):
        """Futures in a list."""
        with each.program() as spawn:
            assert spawn(queens, 63, 0, 0, 0).result() == 4

    @pytest.mark.parametrize("length", [1, 16, 1000])
    def test_merge_sort(self, each, length):
        numbers = np.random.default_rng(length).random(length)
        x = wrap(numbers.copy(), 16)
        with each.program() as spawn:
            spawn(sort, x[:])
        assert np.array_equal(x.array, np.sort(numbers))

    def test_sparse_lu(self, each):
        """Who waits for whom follows from tiles alone, those of one matrix with rows between them, too."""
        tiles, size = 6, 5
        there = np.array([[abs(i - j) in (0, 1, 4) for j in range(tiles)] for i in range(tiles)])
        matrix = np.random.default_rng(0).random((tiles * size, tiles * size)) * np.kron(there, np.ones((size, size)))
        matrix += 10 * size * np.eye(len(matrix))
        a, kept = wrap(matrix.copy(), (size, size), "a"), wrap(there.copy(), (None, None), "there")
        with each.program() as spawn:
            spawn(sparse_lu, a[:], kept[:], size)
        low = np.tril(a.array, -1) + np.eye(len(matrix))
        assert np.allclose(low @ np.triu(a.array), matrix)

    @pytest.mark.parametrize("seed", range(6))
    def test_random_parts_in_program_order(self, each, seed):
        found, wanted = (wrap(np.arange(40, dtype=I64), 8) for _ in range(2))
        with scheduler("sequential") as alone, alone.program() as spawn:
            spawn(mix_all, wanted[:], seed, 60)
        with each.program() as spawn:
            spawn(mix_all, found[:], seed, 60)
            spawn(mix, found[8:16], 1)  # after all that the first has spawned
        mix(wanted.array[8:16], 1)
        assert np.array_equal(found.array, wanted.array)


class TestLimits:
    def test_very_many_in_one_body(self, each):
        """More tasks than a worker has places for."""

        @kernel(compiled=True)
        def step(a: InOut[N, I64]):
            a[0] += 1

        @kernel(compiled=True)
        def loop(a: InOut[N, I64], times: int, spawn: Spawn):
            for i in range(times):
                spawn(step, a[i % 8 : i % 8 + 1])

        x = wrap(np.zeros(8, I64), 1)
        with each.program() as spawn:
            spawn(loop, x[:], 20_000)
        assert (x.array == 2500).all()

    def test_more_futures_than_places(self, each):
        """What finds no place runs where it is spawned, with its result."""

        @kernel(compiled=True)
        def square(k: int) -> float:
            return k * k * 1.0

        @kernel(compiled=True)
        def add_up(times: int, spawn: Spawn) -> float:
            total = 0.0
            first = spawn(square, 0)
            for k in range(times):
                total += spawn(square, k).result()
            return total + first.result()

        times = 10_000
        with each.program() as spawn:
            assert spawn(add_up, times).result() == (times - 1) * times * (2 * times - 1) / 6

    def test_order_without_places(self, monkeypatch):
        """What a task that found no place has spawned is done before what comes after that task."""

        @kernel(compiled=True)
        def inner(a: InOut[N, I64], k: int, spawn: Spawn):
            spawn(mix, a, k)

        @kernel(compiled=True)
        def deep(a: InOut[N, I64], left: int, spawn: Spawn):
            if left > 0:
                spawn(deep, a, left - 1)
                return spawn.taskwait()
            for k in range(100):
                spawn(inner, a, k)
                spawn(mix, a, -k)

        monkeypatch.setattr(program_engine, "_SHARE", 160)
        found, wanted = (wrap(np.zeros(8, I64), 8) for _ in range(2))
        with scheduler("sequential") as alone, alone.program() as spawn:
            spawn(deep, wanted[:], 0)
        with scheduler("native", workers=1) as native, native.program() as spawn:
            spawn(deep, found[:], 128)  # so many run inside of each other; then another thread has to
        assert np.array_equal(found.array, wanted.array)

    def test_a_recursion_deeper_than_a_stack(self, monkeypatch):
        """Threads take over from each other; beyond their number it is said."""
        monkeypatch.setattr(crew, "_MOST_THREADS", 8)

        @kernel(compiled=True)
        def deep(n: int, spawn: Spawn) -> int:
            return 0 if n == 0 else spawn(deep, n - 1).result() + 1

        with scheduler("native", workers=2) as native:
            with native.program() as spawn:
                assert spawn(deep, 500).result() == 500
            said = r"deep\(n=.*RecursionError: tasks wait inside of each other too deeply"
            with pytest.raises(TaskError, match=said), native.program() as spawn:
                spawn(deep, 2000).result()
            with native.program() as spawn:
                assert spawn(deep, 10).result() == 10

    def test_programs_follow_each_other(self):
        with scheduler("native", workers=4) as native:
            for _ in range(30):
                with native.program() as spawn:
                    futures = [spawn(fib, n) for n in range(12)]
                    assert [future.result() for future in futures] == [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]


class TestMistakes:
    def test_a_failure_names_the_way_to_it(self):
        """The task, its arguments, the line that spawned it, and the same of who spawned it."""

        @kernel(compiled=True)
        def breaks(a: In[N, I64], k: int):
            if k == 0:
                raise ValueError("oh no")

        @kernel(compiled=True)
        def down(a: In[N, I64], k: int, spawn: Spawn):
            if k == 0:
                spawn(breaks, a[1:3], k)
            else:
                spawn(down, a, k - 1)

        x = wrap(np.zeros(8, I64), 1)
        said = (
            r"task breaks\(a\[2\], k=0\), spawned in line \d+ of down\(a\[8\], k=0\), spawned in line \d+ of task 0, down "
            r"in\(x\[:\]\) k=1, spawned in .*test_nested.py, line \d+: ValueError: oh no"
        )
        with scheduler("native", workers=2) as native:
            with pytest.raises(TaskError, match=said) as raised, native.program() as spawn:
                spawn(down, x[:], 1)
            assert isinstance(raised.value.__cause__, ValueError)
            with native.program() as spawn:
                assert spawn(fib, 10).result() == 55

    def test_who_waits_for_what_failed_does_not_go_on(self):
        """Its own code after the wait would find what was never written."""

        @kernel(compiled=True)
        def breaks(a: InOut[N, I64]) -> int:
            raise ValueError("oh no")

        @kernel(compiled=True)
        def waits(a: InOut[N, I64], how: int, spawn: Spawn):
            future = spawn(breaks, a)
            if how == 0:
                future.result()
            else:
                spawn.taskwait()
            a.array[0] = 1

        x = wrap(np.zeros(8, I64), 1)
        for how in range(2):
            with scheduler("native", workers=2) as native, pytest.raises(TaskError, match=r"breaks.*oh no"), native.program() as spawn:
                spawn(waits, x[:], how).result()
        assert x.array[0] == 0

    def test_who_is_cancelled_by_a_failure_raises_it(self):
        """Not the CancelledError that its own body ended with, whoever comes first."""

        @kernel(compiled=True)
        def breaks(n: int, at: int, spawn: Spawn) -> int:
            if n == at:
                raise ValueError("oh no")
            if n < 2:
                return n
            first, second = spawn(breaks, n - 1, at), spawn(breaks, n - 2, at)
            return first.result() + second.result()

        with scheduler("native", workers=2) as native:
            for _ in range(300):
                with pytest.raises(TaskError, match="oh no"), native.program() as spawn:
                    for future in [spawn(breaks, 14, 3) for _ in range(3)]:
                        future.result()

    def test_a_failure_that_a_body_catches(self, monkeypatch):
        """The program fails all the same, also if there was no place for the task that did."""

        @kernel(compiled=True)
        def breaks(k: int) -> int:
            if k > 0:
                raise ValueError("oh no")
            return k

        @kernel(compiled=True)
        def catches(k: int, spawn: Spawn) -> int:
            first = spawn(breaks, 0).result()
            try:
                return spawn(breaks, k).result()
            except Exception:
                return first

        for share in (1, 100):
            monkeypatch.setattr(program_engine, "_SHARE", share)
            with scheduler("native", workers=1) as native, pytest.raises(TaskError, match="oh no"), native.program() as spawn:
                spawn(catches, 1)

    @pytest.mark.parametrize("start, stop", [(-1, 3), (3, 3), (5, 9)])
    def test_an_index_that_leaves_a_tile(self, each, start, stop):
        """As of tiles in Python."""

        @kernel(compiled=True)
        def part(a: InOut[N, I64], start: int, stop: int, spawn: Spawn):
            spawn(mix, a[start:stop], 1)

        x = wrap(np.zeros(8, I64), 1)
        with pytest.raises(TaskError, match=r"part.*IndexError: .*axis 0"), each.program() as spawn:
            spawn(part, x[:], start, stop)

    def test_sizes_that_do_not_agree(self):
        @kernel(compiled=True)
        def copy(out: Out[N, I64], inp: In[N, I64]):
            out[:] = inp

        @kernel(compiled=True)
        def wrong(a: InOut[N, I64], spawn: Spawn):
            spawn(copy, a[:3], a[4:])

        said = "ValueError: copy: 'inp' has another size N than 'out', line"
        with scheduler("native", workers=1) as native, pytest.raises(TaskError, match=said), native.program() as spawn:
            spawn(wrong, wrap(np.zeros(8, I64), 1)[:])

    def test_what_does_not_compile(self):
        """Each is refused in the words of what is wrong."""

        @kernel
        def python(a: InOut[N, I64]):
            pass

        @kernel(compiled=True)
        def scratchy(a: InOut[N, I64], work: Scratch[N]):
            pass

        @kernel(compiled=True)
        def two(a: InOut[N, N, I64]):
            pass

        @kernel(compiled=True)
        def nine(a: InOut[N, 1, 1, 1, 1, 1, 1, 1, 1, I64]):
            pass

        def tries(body, access=InOut):
            body.__annotations__ = {"a": access[N, I64], "k": int, "x": float, "spawn": Spawn}
            with pytest.raises((TwinError, AccessError)) as raised:
                kernel(compiled=True)(body).compile()
            return str(raised.value)

        def keyword(a, k, x, spawn):
            spawn(mix, a, 1, priority=3)

        def plain(a, k, x, spawn):
            spawn(python, a)

        def scratch(a, k, x, spawn):
            spawn(scratchy, a)

        def short(a, k, x, spawn):
            spawn(mix, a)

        def array(a, k, x, spawn):
            spawn(mix, a.array, 1)

        def real(a, k, x, spawn):
            spawn(mix, a, x)

        def flat(a, k, x, spawn):
            spawn(two, a)

        def axes(a, k, x, spawn):
            spawn(nine, a)

        def step(a, k, x, spawn):
            spawn(mix, a[::2], k)

        def written(a, k, x, spawn):
            spawn(mix, a, k)

        def sleeps(a, k, x, spawn):
            spawn.sleep(1.0)

        assert "without priority=" in tries(keyword)
        assert "cannot spawn python, which has no compiled twin" in tries(plain)
        assert "cannot spawn scratchy, which has Scratch" in tries(scratch)
        assert "mix takes 2 arguments (a, k), got 1" in tries(short)
        assert "mix: 'a' wants a tile, got" in tries(array)
        assert "mix: 'k' wants a constant (int), got float64" in tries(real)
        assert "two: 'a' wants int64 of 2 dimensions, got int64 of 1" in tries(flat)
        assert "cannot spawn nine, which has a tile of more than 8 axes" in tries(axes)
        assert "slices without step" in tries(step)
        assert "wrote 'a', declared In" in tries(written, In)
        assert "sleep" in tries(sleeps)
        with pytest.raises(TypeError, match="weak accesses has no compiled twin"):

            @kernel(compiled=True)
            def weak(a: WeakInOut[N, I64], spawn: Spawn): ...

    def test_a_kernel_that_was_defined_again(self):
        """Compiled code holds the kernels that it names as they were: it is said, not run."""
        names = {"kernel": kernel, "Spawn": Spawn, "__name__": __name__}
        leaf = "@kernel(compiled=True)\ndef leaf(k: int) -> int:\n    return k + {}\n"
        exec(leaf.format(1), names)
        exec("@kernel(compiled=True)\ndef root(k: int, spawn: Spawn) -> int:\n    return spawn(leaf, k).result()\n", names)
        with scheduler("native", workers=1) as native:
            with native.program() as spawn:
                assert spawn(names["root"], 1).result() == 2
            exec(leaf.format(2), names)
            with pytest.raises(TwinError, match="root: a kernel that it spawns has changed"), native.program() as spawn:
                spawn(names["root"], 1)

    def test_two_kernels_of_one_name(self):
        """Compiled code knows kernels by name and declaration: it is said of one body that spawns two of them, and two bodies may."""

        def adds(by):
            @kernel(compiled=True)
            def leaf(k: int) -> int:
                return k + by

            return leaf

        def spawns(first, second):
            @kernel(compiled=True)
            def root(k: int, spawn: Spawn) -> int:
                return spawn(first, k).result() + spawn(second, k).result()

            return root

        one, ten = adds(1), adds(10)
        with scheduler("native", workers=1) as native:
            with native.program() as spawn:
                assert [spawn(spawns(each, each), 0).result() for each in (one, ten, one)] == [2, 20, 2]
            with pytest.raises(TaskError, match="two kernels that have the name leaf"), native.program() as spawn:
                spawn(spawns(one, ten), 0)

    def test_what_changes_in_a_kernel_that_is_spawned(self):
        """A name that it reads: it is said, as of one that Python spawns. A new twin runs."""
        names = {"kernel": kernel, "Spawn": Spawn, "__name__": __name__, "C": 1}
        exec("@kernel(compiled=True)\ndef leaf(k: int) -> int:\n    return k + C\n", names)
        exec("@kernel(compiled=True)\ndef root(k: int, spawn: Spawn) -> int:\n    return spawn(leaf, k).result()\n", names)
        with scheduler("native", workers=1) as native:
            with native.program() as spawn:
                assert spawn(names["root"], 1).result() == 2
            names["C"] = 2
            with pytest.raises(TaskError, match="leaf: 'C' has changed"), native.program() as spawn:
                spawn(names["root"], 1)
            exec("@leaf.compiled\ndef _(k):\n    return k + 100\n", names)
            with native.program() as spawn:
                assert spawn(names["root"], 1).result() == 101


def test_checks_and_traces_run_bodies(tmp_path):
    """With check=True, or a trace, the bodies that spawn run in Python, and each task is checked, or told."""

    @kernel(compiled=True)
    def lies(a: In[N, I64]):
        pass

    @lies.compiled
    def _(a):
        pass

    x = wrap(np.arange(32, dtype=I64), 8)
    with scheduler("native", workers=2) as native, native.program(check=True) as spawn:
        assert spawn(fib, 6).result() == 8
        spawn(mix_all, x[:], 3, 20)
    with scheduler("native", workers=2, record=1000) as native, native.program() as spawn:
        assert spawn(fib, 6).result() == 8
        assert len(spawn.graph.tasks) >= 25


def test_twins_that_spawn_are_kept():
    """Another process loads what one has compiled, with the words of its own kernels."""
    text = (
        "import test_nested as t; from taskgpt.tasks import compile_kernels\n"
        "compile_kernels([t.fib], lambda done, total, kernel, seconds, was_cached: print(was_cached))\n"
        "with t.scheduler('native', workers=2) as s, s.program() as spawn: print(spawn(t.fib, 12).result())\n"
    )
    said = [subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, cwd="tests").stdout for _ in "12"]
    assert said[1] == "True\n144\n", said


class TestProtocol:
    """The scheduler's own code, a step at a time, on memory without threads."""

    @staticmethod
    @contextlib.contextmanager
    def still():
        """Give a scheduler that has an open run, and the frame of a body at its root."""
        with Still(workers=2) as still:
            still._table[IS_RANKED] = True
            run = OpenRun(still._table, still._run_words[0], None, None, False, places=16, edges=8)
            run._open_nests()
            still.frame, still.described, still.words = np.zeros(8, I64), np.zeros(8, I64), np.zeros(8, I64)
            still.frame[FRAME_PLACE], still.frame[FRAME_NESTING] = open_run.ROOT, still._worker_words[0, NESTING]
            still.kept = [run]
            still.everything += [run._open, run._pools, *run._arrays.values(), *run._of_run.values(), run._rings, run._nests, still.frame]
            for function in (still.code.wait_nested, still.code._leave_worker):
                function.__globals__["_SPINS"] = 1
            yield still

    @staticmethod
    def spawn(still):
        """Spawn a task without a body from the frame."""
        return still.code.spawn_nested(still.frame.ctypes.data, 0, still.words.ctypes.data, still.described.ctypes.data, 7)

    def test_a_task_is_run_once_and_heard_of(self):
        """Its parent waits while a thief takes it: one of them runs it, and the parent goes on with its result or leaves its worker."""
        with self.still() as still:

            def owner():
                place = yield from self.spawn(still)
                status = yield from still.code.wait_nested(still.frame.ctypes.data, place)
                still.found.append(int(status))

            def thief():
                instance = yield from still.code.take_others_nested(still.t, 1)
                if instance != NOTHING:
                    yield from still.code.run_spawned(still.t, 1, instance)

            ways = set()
            for are_through in ends(still, [owner, thief]):
                assert are_through and still.kept[0].is_quiet
                ways.add(tuple(still.found))
            assert ways == {(0,), (TOO_DEEP,)}

    def test_who_waits_runs_no_task_of_pythons(self):
        """One that is released meanwhile may wait for what comes after the one that waits: it goes through the queue."""
        with self.still() as still:
            buffer = still.kept[0]._buffer
            for words in ([0, 0, 0, 0, open_run.ROOT, 0, 0, -1, 0], [0, 0, 0, 1, open_run.ROOT, 0, 0, -1, 0, 1]):
                buffer[: len(words)] = array("q", words)
                run_alone(still.code.add_task(still._address, 2))
            parent, after = 1, 2
            still.frame[FRAME_PLACE] = parent
            run_alone(self.spawn(still))
            queue = still.code.queue_of(still.t, 0)
            assert run_alone(still.code.take_out(queue)) == 2 * parent
            assert run_alone(still.code.run_spawned(still.t, 1, 2 * parent)) == NOTHING  # its child is left
            assert run_alone(still.code._help(still.t, 0))
            assert run_alone(still.code.take_out(queue)) == 2 * after
