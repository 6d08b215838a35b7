"""Plans of the native scheduler: what compiled workers read of a graph is what its tasks and calls, looked at one by one, say."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgpt.schedulers.native.plan import Plan, edges_to_next
from taskgpt.tasks import Commutative, Graph, In, InOut, Out, Reduction, Scratch, Several, Tensor, check, coarsen, dims, kernel, wrap
from taskgpt.tasks.columns import Columns
from taskgpt.tasks.native_entry import Words, has_native_entry, native_entry
from taskgpt.tasks.scratch import scratch_layout

R, C, P, Q, N = dims("R C P Q N")
F64, MANY = np.float64, 36  # MANY: more calls of a signature than are lowered one by one


@kernel(compiled=True)
def mix(out: InOut[R, C, F64], a: In[P, Q, F64], by: float, salt: int):
    out[0, 0] += a[0, 0] * by + salt


@kernel(compiled=True, flops=lambda N, by: int(N * by))
def costly(out: InOut[N, F64], by: float):
    """Cost what a constant says."""
    out *= by


@kernel(compiled=True)
def through(out: Out[N, F64], a: In[N, F64], own: Scratch[N, F64], more: Scratch[2, N, F64]):
    own[:] = a
    out[:] = own


@kernel(compiled=True)
def shared(out: Commutative[N, F64], a: In[N, F64]):
    out += a


@kernel(compiled=True)
def number(out: Out[(), F64], a: In[(), F64]):
    out[()] = a[()]


@kernel(compiled=True)
def add(total: Reduction["+", N, F64], a: In[N, F64]):
    total += a


@kernel
def in_python(out: InOut[N, F64], parts: Several[In[N, F64]], at: int):
    for part in parts:
        out += part * at


def tensors() -> dict[str, Tensor]:
    """Return tensors of all kinds of strides."""
    x, y = wrap(np.zeros((MANY, 8)), (1, 4), "x"), wrap(np.zeros((2 * MANY, 10))[::-2], (1, 5), "y")
    z = wrap(np.zeros((3, MANY, 7)), (1, 1, None), "z")
    return {"x": x, "y": y, "z": z, "one": wrap(np.zeros(()), (), "one"), "other": wrap(np.zeros(()), (), "other")}


STEPS = {  # (kernel, values of its indices, function of the tensors that returns that of the indices)
    "cells": (mix, (MANY // 2, 2), lambda x, y, *_: lambda i, j: (x.cell(i, j), y.cell(i, j), 0.5, 3)),
    "other strides": (mix, (MANY // 2, 2), lambda x, y, *_: lambda i, j: (y.cell(i, j), x.cell(i, j), -0.0, -7)),
    "halos": (mix, (MANY // 2, 2), lambda x, y, *_: lambda i, j: (x.cell(i, j), y.cell(i, j).grown(1), i * 0.1, j - i)),
    "one tile for all": (mix, (MANY,), lambda x, _, z, *__: lambda i: (x[0:2, 1:3], z[1], 2.5, i)),
    "like, of x and y": (mix, (MANY,), lambda x, y, *_: lambda i: (x[i : i + 1, 0:3], y[i : i + 1, 0:3], 1.0, 1)),
    "like, of y and z": (mix, (MANY,), lambda _, y, z, *__: lambda i: (y[i : i + 1, 0:3], z[1, i : i + 1, 0:3], 1.0, 1)),
    "like, of z and x": (mix, (MANY,), lambda x, _, z, *__: lambda i: (z[i % 3, 0:1, 0:3], x[i : i + 1, 0:3], 1.0, 1)),
    "integers for a float": (mix, (MANY,), lambda x, y, *_: lambda i: (x[i : i + 1], y[i : i + 1], i * (1 << 40), -(1 << 62))),
    "dropped axes": (mix, (3, MANY // 2), lambda _, y, z, *__: lambda t, i: (z[t, i : i + 2, 1:5], y[i : i + 1, 2:4], 1.0, 2)),
    "rows of three": (through, (2, MANY // 2), lambda _, __, z, *___: lambda t, i: (z[t, i], z[t + 1, i])),
    "rows of two": (through, (MANY,), lambda x, _, z, *__: lambda i: (x[i, 1:8], z[0, i])),
    "costly": (costly, (MANY,), lambda x, *_: lambda i: (x[i], 2.0 + i * 0.5)),
    "commutative": (shared, (MANY,), lambda x, y, *_: lambda i: (x[i % 2, 0:5], y[i, 0:5])),
    "no axes": (number, (MANY,), lambda *every: lambda i: (every[3][()], every[4][()])),
    "reduction": (add, (MANY,), lambda x, y, *_: lambda i: (x[0, 0:3], y[i, 2:5])),
    "in Python": (in_python, (MANY,), lambda x, y, *_: lambda i: (x[i], [y[i, 0:8], y[0, 1:9]], i)),
}


def record(program: list[tuple], allow_commutative: bool) -> Graph:
    """Return the graph of steps: (name, in how many iterations of each index, whether as a loop, priority)."""
    graph, every = Graph(allow_commutative=allow_commutative), tensors().values()
    for name, most, as_loop, priority in program:
        each_kernel, counts, function = STEPS[name]
        over, call = tuple(min(most, count) for count in counts), function(*every)
        if as_loop:
            graph.spawn_each(each_kernel, over, call, priority=priority)
        else:
            for index in itertools.product(*map(range, over)):
                graph.spawn(each_kernel, *call(*index), priority=priority)
    return graph


def verify(graph: Graph) -> None:
    """Compare the plan of a graph with its tasks."""
    plan = Plan(graph)
    tasks = [*graph.tasks]
    calls = [call for task in tasks for call in task.calls]
    assert plan.call_first.tolist() == [0, *itertools.accumulate(len(task.calls) for task in tasks)]
    for call, entry, address in zip(calls, plan.call_entry.tolist(), plan.call_words.tolist(), strict=True):
        if has_native_entry(call):
            words = Words()
            words.add(call)
            assert entry == native_entry(call.kernel)
            assert [*(ctypes.c_int64 * len(words.words)).from_address(address)] == [*words.words], str(call)
    assert len({entry for call, entry in zip(calls, plan.call_entry.tolist(), strict=True) if not has_native_entry(call)}) == sum(
        not has_native_entry(call) for call in calls
    )
    assert plan.seconds.tolist() == [1e-6 + task.estimated_seconds for task in tasks]
    assert plan.scratch_bytes == max((scratch_layout(call.scratch_shapes)[1] for call in calls), default=0)
    priorities = [task.priority for task in tasks]
    assert (plan.priorities is None and not any(priorities)) or plan.priorities.tolist() == priorities
    assert plan.indegree.tolist() == [len(task.predecessors) for task in tasks]
    locks: dict[int, int] = {}
    held = [locks.setdefault(serial, len(locks)) for task in tasks for serial, _ in task.locks]
    if graph.is_commutative:
        assert plan.lock_first.tolist() == [0, *itertools.accumulate(len(task.locks) for task in tasks)]
        assert (plan.lock_of.tolist(), len(plan.locks)) == (held, len(locks))
    else:
        assert plan.locks is None
    arrays = plan.call_first, plan.call_entry, plan.call_words, plan.successor_first, plan.successor, plan.indegree
    assert {(array.dtype.str, array.flags.c_contiguous) for array in arrays} == {("<i8", True)}


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from([1, 3, MANY]), st.booleans(), st.sampled_from([0, 0, 0, 2, -1]))


@given(st.lists(STEP, max_size=6), st.booleans())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_a_plan_says_what_the_tasks_say(program, allow_commutative):
    """Entries, words, locks, priorities, estimates and scratch, of loops and single tasks of all kinds in any order."""
    verify(record(program, allow_commutative))


@pytest.mark.parametrize("as_loop", [True, False])
@pytest.mark.parametrize("name", sorted(STEPS))
def test_each_kind_of_call(name, as_loop):
    """Alone, many times, and with a few before and after."""
    verify(record([(name, MANY, as_loop, 0)], True))
    verify(record([("cells", 1, False, 0), (name, MANY, as_loop, 3), ("rows of two", 2, True, 0)], False))


def test_tensors_of_other_strides_in_calls_of_one_signature():
    """Strides go by the tensor, and by the axes that are dropped of it."""
    for as_loop in True, False:
        verify(record([(f"like, of {pair}", MANY, as_loop, 0) for pair in ("x and y", "y and z", "z and x")], False))


@given(st.lists(STEP, min_size=1, max_size=4), st.integers(1, 9))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_plans_of_derived_graphs(program, most):
    """Of coarsened ones, whose tasks have several calls, and of checked ones."""
    verify(coarsen(record(program, True), most))
    verify(check(record(program, True)))


def test_a_part_that_was_recorded_again():
    """What was there before is in no word, and a loop in its place is like any other."""
    every = tensors()
    graph, (x, y, *_) = Graph(), every.values()
    graph.spawn_each(mix, (MANY // 2, 2), lambda i, j: (x.cell(i, j), y.cell(i, j), 0.5, 3))
    with graph.part() as part:
        graph.spawn_each(mix, MANY, lambda i: (y[i : i + 1], x[0:1], 1.5, i))
    graph.spawn_each(costly, MANY, lambda i: (x[i], 2.0))
    verify(graph)
    with part:
        graph.spawn_each(mix, (MANY - 2, 2), lambda i, j: (y.cell(i + 2, j), x.cell(i, 1 - j), 1.5, i))
        graph.spawn_each(through, MANY, lambda i: (x[i], y[i, 0:8]))
    verify(graph)


def test_a_loop_is_planned_without_a_call_for_each_task(monkeypatch):
    """One shows what those of a signature have in common. The halos of the first row are another, of two tasks."""
    graph = record([("halos", MANY, True, 0), ("rows of three", MANY, True, 0)], False)
    asked, calls_of = [], Columns.calls_of
    monkeypatch.setattr(Columns, "calls_of", lambda columns, number: asked.append(number) or calls_of(columns, number))
    Plan(graph)
    assert len(graph.tasks) == 2 * MANY
    assert len(asked) == 2 + 2


def test_edges_to_the_next_run_as_arrays():
    """The same pairs of tasks as the graph names."""
    graph = record([("halos", MANY, True, 0), ("other strides", MANY, False, 0), ("costly", 3, True, 0)], False)
    first, successor = edges_to_next(graph, graph)
    found = [(before, after) for before in range(len(graph.tasks)) for after in successor[first[before] : first[before + 1]].tolist()]
    assert sorted(found) == sorted(graph.edges_to(graph))
    assert len(first) == len(graph.tasks) + 1
    assert successor.flags.c_contiguous
