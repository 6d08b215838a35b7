"""Parts of a graph that are recorded again: the graph is the one that recording all of it makes."""

import gc
import weakref

import kernels_for_tests as k
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import taskgpt
from taskgpt.tasks import Graph, In, InOut, Reduction, dims, kernel, wrap

N, M = dims("N M")
U64 = np.uint64


@kernel
def stir(x: InOut[N, U64], a: In[M, U64], by: int):
    """Something that depends on every bit, and on the order."""
    x *= U64(6364136223846793005)
    x += a.sum()
    x += U64(by)


@kernel
def add(total: Reduction["+", (), U64], a: In[N, U64]):
    """Part of a sum."""
    np.add(total, a.sum(), out=total)


Pattern = list[tuple[str, int]]  # of a part: what it does, and where
CELLS = 8


class Problem:
    """Cells that tasks stir, and a number that they add to."""

    def __init__(self):
        self.x = wrap(np.arange(2 * CELLS, dtype=U64), 2, "x")
        self.total = wrap(np.zeros((), U64), (), "total")

    def spawn(self, graph: Graph, pattern: Pattern) -> None:
        x = self.x
        for what, at in pattern:
            if what == "stir":
                graph.spawn(stir, x.cell(at), x.cell((at + 3) % CELLS), at)
            elif what == "add":
                graph.spawn(add, self.total[()], x.cell(at))
            else:
                graph.spawn_each(stir, range(at, CELLS - 1), lambda i: (x.cell(i), x.cell(i + 1), i))

    def bits(self) -> tuple[bytes, bytes]:
        return self.x.array.tobytes(), self.total.array.tobytes()


def whole(patterns: list[Pattern]) -> tuple[Graph, Problem]:
    """Record all parts, each as a part."""
    graph, problem = Graph(), Problem()
    for pattern in patterns:
        with graph.part():
            problem.spawn(graph, pattern)
    return graph, problem


pattern = st.lists(st.tuples(st.sampled_from(["stir", "stir", "add", "loop"]), st.integers(0, CELLS - 2)), max_size=5)


@given(st.lists(pattern, min_size=1, max_size=4), st.lists(st.tuples(st.integers(0, 3), pattern, st.booleans()), min_size=1, max_size=4))
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_the_graph_is_that_of_recording_all_of_it(patterns, changes):
    """Whatever parts change, in whatever order, looked at and run in between or not: tasks, edges, kernels and bits are the same."""
    graph, problem = Graph(), Problem()
    parts = []
    for each in patterns:
        with graph.part() as part:
            problem.spawn(graph, each)
        parts.append(part)
    now = list(patterns)
    for at, changed, is_run in changes:
        at %= len(now)
        now[at] = changed
        with parts[at]:
            problem.spawn(graph, changed)
        wanted, other = whole(now)
        if is_run:
            other.x.array[:], other.total.array[...] = problem.x.array, problem.total.array
            with taskgpt.scheduler("sequential") as scheduler:
                scheduler.run(graph)
                scheduler.run(wanted)
            assert problem.bits() == other.bits()
        assert [part.numbers.stop for part in parts] == [len(whole(now[: at + 1])[0].tasks) for at in range(len(now))]
    assert graph.listing() == wanted.listing()
    assert graph.kernels == wanted.kernels
    assert graph.edges_to(graph) == wanted.edges_to(wanted)


def test_parts_of_parts():
    """A part within another is gone with it; what is recorded in its place may have parts, and those behind move."""
    graph, problem = Graph(), Problem()
    with graph.part() as outer:
        problem.spawn(graph, [("stir", 0)])
        with graph.part() as inner:
            problem.spawn(graph, [("stir", 1)])
    with graph.part() as last:
        problem.spawn(graph, [("stir", 2)])
    with inner:
        problem.spawn(graph, [("stir", 3), ("stir", 4)])
    assert [part.numbers for part in (outer, inner, last)] == [range(3), range(1, 3), range(3, 4)]
    with outer, graph.part() as new:
        problem.spawn(graph, [("stir", 5)])
    assert [part.numbers for part in (outer, new, last)] == [range(1), range(1), range(1, 2)]
    with new:
        pass
    with last:
        problem.spawn(graph, [("stir", 6)] * 2)
    assert [part.numbers for part in (outer, new, last)] == [range(0), range(0), range(2)]
    with pytest.raises(RuntimeError, match="is gone: a part around it was recorded again"), inner:
        pass
    with pytest.raises(RuntimeError, match="is being recorded; end its block before another part"), graph.part(), last:
        pass
    assert len(graph.tasks) == 2


def test_the_order_of_parts_is_that_of_their_first_blocks():
    """Not of where they were made, nor of where the empty ones stand; and what is empty is gone, too, with the part around it."""
    graph, problem = Graph(), Problem()
    second, first = graph.part(), graph.part()
    with first:
        pass
    with second:
        problem.spawn(graph, [("stir", 0)])
    with first, graph.part() as inner:
        pass
    with inner, graph.part() as deepest:
        problem.spawn(graph, [("stir", 1)] * 2)
    assert [part.numbers for part in (first, inner, deepest, second)] == [range(2), range(2), range(2), range(2, 3)]
    with deepest:
        problem.spawn(graph, [("stir", 2)] * 4)
    assert [part.numbers for part in (first, inner, deepest, second)] == [range(4), range(4), range(4), range(4, 5)]
    with graph.part() as outer, graph.part() as last:
        pass
    with pytest.raises(ZeroDivisionError), outer:
        raise ZeroDivisionError
    assert not last.is_gone
    with outer:
        pass
    assert last.is_gone


def test_a_block_that_raises_changes_nothing():
    """Neither the first one of a part nor a later one: its tasks, reductions that are open and parts in it are forgotten."""
    graph, problem = Graph(), Problem()
    with graph.part() as part:
        problem.spawn(graph, [("stir", 0), ("add", 1), ("add", 2)])
    before = graph.listing()
    for block in graph.part(), part:
        with pytest.raises(ZeroDivisionError), block:
            with graph.part() as inner:
                problem.spawn(graph, [("add", 4)])
            problem.spawn(graph, [("add", 3), ("loop", 0)])
            _ = 1 / 0
        with pytest.raises(RuntimeError, match="is gone"), inner:
            pass
        assert graph.listing() == before
    with part:
        problem.spawn(graph, [("stir", 1)])
    assert graph.listing() == "0 stir inout(x[2:4]) in(x[8:10]) by=1\n"


@pytest.mark.parametrize("name", ["sequential", "threads", "native", "loops"])
def test_between_runs(name):
    """Schedulers take the tasks as they are now, not a plan of others; within a run a part cannot be recorded."""
    a, graph = k.arena(is_shared=False), Graph()

    def spawn(cells: list[int]) -> None:
        for cell in cells:
            graph.spawn(k.swirl, a.x[cell], a.x[cell + 1], a.log[cell])

    with taskgpt.scheduler(name) as scheduler:
        with graph.part() as part:
            spawn([0, 1, 2])
        graph.spawn(k.swirl, a.x[6], a.x[0], a.log[6])
        scheduler.run(graph)
        for cells in [3, 4, 5], [5], [], [1, 2, 3]:
            with part:
                spawn(cells)
            for _ in scheduler.run_each([graph, graph]):
                pass
        assert a.log.array[:7, k.RUNS].tolist() == [1, 3, 3, 4, 2, 4, 9]
        with graph.part() as another:
            spawn([0])
        runs = scheduler.run_each([graph, graph])
        next(runs)
        if graph.runs:
            with pytest.raises(RuntimeError, match="is being run"), another:
                pass
        runs.close()


def test_loops_of_old_take_no_memory():
    """A loop that is recorded again and again has room for one."""
    graph, problem = Graph(), Problem()
    with graph.part() as part:
        problem.spawn(graph, [("loop", 0)])
    sizes = []
    for _ in range(5):
        with part:
            problem.spawn(graph, [("loop", 0), ("loop", 1)])
        sizes.append((len(graph._columns.table), len(graph._columns.families)))
    assert len(set(sizes[1:])) == 1
    gone = weakref.ref(graph)
    del graph, part
    gc.collect()
    assert gone() is None
