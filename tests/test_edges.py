"""Edges of a graph: sets of predecessors, in any order, become the transitive reduction, whenever somebody looks."""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgpt.tasks.edges import REACH, Edges


@st.composite
def waits(draw) -> list[set[int]]:
    """Draw what each task waits for: any set of earlier ones."""
    count = draw(st.integers(1, 25))
    return [draw(st.sets(st.integers(0, task - 1), max_size=6)) if task else set() for task in range(count)]


def reduced(given: list[set[int]]) -> list[tuple[int, ...]]:
    """Compute by a set of ancestors for each task, the definition: no predecessor comes before another one."""
    before: list[int] = []
    found = []
    for each in given:
        kept, implied = [], 0
        for p in sorted(each, reverse=True):
            if not implied >> p & 1:
                kept.append(p)
            implied |= before[p] | 1 << p
        before.append(implied)
        found.append(tuple(reversed(kept)))
    return found


def edges_of(given: list[set[int]]) -> Edges:
    edges = Edges()
    for each in given:
        edges.add(each)
    return edges


@given(waits(), st.randoms(use_true_random=False))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug
def test_edges_are_the_transitive_reduction(given, choices):
    """Also if somebody looks in between: then tasks are added to those whose edges are final."""
    wanted, edges = reduced(given), Edges()
    for task, each in enumerate(given):
        edges.add(sorted(each, key=lambda _: choices.random()))
        if choices.random() < 0.3:
            assert edges.before(task) == wanted[task]
    assert [edges.before(task) for task in range(len(given))] == wanted
    assert len(edges) == sum(map(len, wanted))
    for task in range(len(given)):
        assert edges.after(task) == [other for other, each in enumerate(wanted) if task in each]


def drawn(count: int) -> list[set[int]]:
    """Draw waits that reach back a little, and some that reach back to anywhere."""
    draw = random.Random(0)
    found = []
    for task in range(count):
        near = {task - draw.randint(1, 40) for _ in range(3)}
        far = {draw.randrange(task) for _ in range(2)} if task and draw.random() < 0.3 else set()
        found.append({p for p in near | far if p >= 0})
    return found


def test_in_a_large_graph_edges_reach_over_many_blocks():
    """10,000 tasks are more than one pass goes through: what is implied across blocks, and across a look in between, is found."""
    given = drawn(10_000)
    wanted = reduced(given)
    edges = edges_of(given)
    assert [edges.before(task) for task in range(len(given))] == wanted
    parts = edges_of(given[:6000])
    assert len(parts) == sum(map(len, wanted[:6000]))
    for each in given[6000:]:
        parts.add(each)
    assert [parts.before(task) for task in range(len(given))] == wanted
    assert sum(map(len, wanted)) < 0.8 * sum(map(len, given))  # and there was something to leave out


def test_one_task_that_waits_for_all():
    """As the norm of a gradient does: of 5,000 independent tasks all stay, of a chain only the last."""
    count = 5000
    independent = edges_of([*[set()] * count, set(range(count))])
    assert independent.before(count) == tuple(range(count))
    chain = edges_of([set(), *({task} for task in range(count - 1)), set(range(count))])
    assert chain.before(count) == (count - 1,)


def test_edges_from_far_back_stay():
    """They are not worth the search: of a long chain the last task keeps its edge from the first, and loses that from a nearer one."""
    count = REACH + 10
    chain = edges_of([set(), *({task} for task in range(count - 1)), {0, count // 2, count - 1}])
    assert chain.before(count) == (0, count - 1)
    assert len(chain) == count + 1


def test_exact_edges_stay():
    """What is added as exact is sorted, and kept though another edge implies it."""
    edges = Edges()
    for each in [], [0], [1, 0]:
        edges.add_exact(each)
    assert [edges.before(task) for task in range(3)] == [(), (0,), (0, 1)]


def test_threads_may_look_together():
    """All get the reduction; so does another process, which is sent it."""
    given = drawn(3000)
    wanted, edges = reduced(given), edges_of(given)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(edges.before, range(len(given)))) == wanted
    sent = pickle.loads(pickle.dumps(edges_of(given)))
    assert [sent.before(task) for task in range(len(given))] == wanted
