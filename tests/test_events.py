"""Events in recorded graphs: a task is done when its body is, and all that it waits for has happened."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from plain_schedulers import scheduler

from taskgpt.tasks import Arena, Graph, In, InOut, Out, TaskError, TensorSpec, check, dims, event, kernel, run_now

[N] = dims("N")
SCHEDULERS = ["sequential", "loops", "threads", "local-cluster", "native"]
elsewhere = ThreadPoolExecutor(1)
later: list = []  # what a test does with an event that a task hands out


@kernel
def fill_later(out: Out[N], value: float):
    """Fill a tile from another thread, some time after the body."""
    happened = event()

    def fill():
        out[:] = value
        happened.fulfil()

    threading.Timer(0.02, fill).start()


@kernel
def fail_later(out: Out[N]):
    happened = event()
    out[:] = 0
    threading.Timer(0.02, lambda: happened.fail(OSError("the line is cut"))).start()


@kernel
def hand_out(out: Out[N]):
    out[:] = 1
    later.append(event())


@kernel
def fulfil_all(out: Out[N]):
    out[:] = len(later)
    while later:
        later.pop().fulfil()


@kernel
def fulfil_at_once_elsewhere(out: Out[N]):
    out[:] = 1
    elsewhere.submit(event().fulfil)


@kernel
def keep_and_fulfil(out: Out[N]):
    out[:] = 0
    later[0].fulfil()


@kernel
def add(out: InOut[N], inp: In[N]):
    out += inp


@add.compiled
def add_twin(out, inp):
    for n in range(out.shape[0]):
        out[n] += inp[n]


def arena(cells: int = 4):
    return Arena({"x": TensorSpec((cells, 8), (1, None)), "y": TensorSpec((cells, 8), (1, None))})


def recorded(a) -> Graph:
    """Fill rows later, then add them."""
    graph = Graph("events")
    for n in range(4):
        graph.spawn(fill_later, a.x[n], float(n + 1))
        graph.spawn(add, a.y[n], a.x[n])
    graph.spawn(add, a.y[0], a.y[3])
    return graph


@pytest.mark.parametrize("name", SCHEDULERS)
def test_who_comes_after_waits_for_the_event(name):
    a = arena()
    graph = recorded(a)
    with scheduler(name, workers=1 if name == "sequential" else 2, record=100) as s:
        for _ in s.run_each([graph] * 3):
            pass
        records, lost = s.take_records()
    assert a.y.array[:, 0].tolist() == [3 + (4 + 8 + 12), 6, 9, 12]
    assert (len(records), lost) == (27, 0)


def test_no_worker_waits():
    """One worker alone runs what fulfils the events of the tasks before."""
    a, graph = arena(), Graph("hand out")
    for n in range(3):
        graph.spawn(hand_out, a.x[n])
    graph.spawn(fulfil_all, a.x[3])
    graph.spawn(add, a.y[0], a.x[0])
    with scheduler("native", workers=1, policy="oldest_first") as s:
        for _ in range(3):
            s.run(graph)
    assert a.y.array[0].tolist() == [3] * 8


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_event_that_fails_is_a_task_that_fails(name):
    a, graph = arena(), Graph("fail")
    graph.spawn(fail_later, a.x[0])
    graph.spawn(add, a.y[0], a.x[0])
    with scheduler(name, workers=1 if name == "sequential" else 2) as s:
        for _ in range(2):
            with pytest.raises(TaskError, match=r"task 0, fail_later out\(x\[0.*OSError: the line is cut"):
                s.run(graph)
        s.run(recorded(a))


def test_what_happens_after_a_run_was_abandoned_is_nobodys():
    a, graph = arena(), Graph("abandoned")
    graph.spawn(hand_out, a.x[0])
    graph.spawn(fail_later, a.x[1])
    with scheduler("native", workers=2) as s:
        with pytest.raises(TaskError, match="line is cut"):
            s.run(graph)
        s.run(recorded(a))
        later.pop().fulfil()
        s.run(recorded(a))


def test_checked():
    """What an event writes later is checked, too: the copies live until then."""
    a = arena()
    with scheduler("native", workers=2) as s:
        s.run(check(recorded(a)))
    assert a.y.array[:, 0].tolist() == [5, 2, 3, 4]


def test_without_a_graph():
    a = arena()
    run_now(fill_later, a.x[0], 3.0)
    assert a.x.array[0].tolist() == [3] * 8
    with pytest.raises(OSError, match="line is cut"):
        run_now(fail_later, a.x[0])
    with pytest.raises(RuntimeError, match="no task runs in this thread"):
        event()


@pytest.mark.parametrize("name", ["sequential", "native"])
def test_in_a_program(name):
    a = arena()
    with scheduler(name, workers=1) as s:
        with s.program() as spawn:
            spawn(fill_later, a.x[0], 3.0)
            spawn(add, a.y[0], a.x[0])
        assert a.y.array[0].tolist() == [3] * 8
        with pytest.raises(TaskError, match="line is cut"), s.program() as spawn:
            spawn(fail_later, a.x[0])
            spawn(add, a.y[0], a.x[0])


def test_happens_once():
    a, graph = arena(), Graph("twice")
    graph.spawn(hand_out, a.x[0])
    graph.spawn(keep_and_fulfil, a.x[1])
    with scheduler("native", workers=1, policy="oldest_first") as s:
        s.run(graph)
    with pytest.raises(RuntimeError, match="fulfilled before"):
        later.pop().fulfil()


def test_runs_that_end_while_others_are_held():
    """Tasks of one run look for it while another ends, again and again."""
    a, graph = arena(), Graph("hand out")
    for n in range(4):
        graph.spawn(fulfil_at_once_elsewhere, a.x[n])
        graph.spawn(add, a.y[n], a.x[n])
    with scheduler("native", workers=2) as s:
        assert sum(1 for _ in s.run_each([graph] * 500)) == 500
    assert a.y.array[:, 0].tolist() == [500] * 4
