"""The times of steps that overlap: by what was done, whoever looks when."""

import time

import kernels_for_tests as k
import pytest

from taskgpt import config
from taskgpt.lab.pace import Pace
from taskgpt.lab.traces.trace import Traced
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import Graph

TASKS, NAP_MS = 10, 2


def looked_at(*looks: tuple[float, float]) -> list[float]:
    pace = Pace(0.0)
    return [pace.step(now, ahead) for now, ahead in looks]


def test_runs_in_turn_take_the_time_between_their_ends():
    assert looked_at((2.0, 0.0), (3.0, 0.0), (7.0, 0.0)) == [2.0, 1.0, 4.0]


def test_a_look_that_comes_late_makes_no_step_short():
    """Steps of one second, seen at 1 and, late, at 2.9 and 3: between two looks, work went on evenly."""
    assert looked_at((1.0, 0.0), (2.9, 0.9), (3.0, 0.0)) == pytest.approx([1.0, 1.0, 1.0])


def test_a_step_that_was_done_before_the_look_ended_then():
    """The next one was done too when the caller came; then nothing ran until it asked for another."""
    assert looked_at((2.0, 1.0), (9.0, 0.0), (10.0, 0.0)) == pytest.approx([1.0, 1.0, 8.0])


@pytest.mark.parametrize("name", ["native", "threads", "loops", "sequential"])
@pytest.mark.parametrize("is_traced", [False, True])
def test_no_step_is_shorter_than_its_work(name, is_traced):
    """Tasks that sleep, so many in a row, and a caller that comes late: their sleep is the least that a step can take.

    The times of all steps together are those of the clock.
    """
    chosen = config.load_scheduler(name, {"record": 1000} if name == "sequential" else {"workers": 1, "record": 1000})
    scheduler = open_scheduler(chosen.scheduler, chosen.settings)
    a = k.arena(False)
    graph = Graph("naps")
    for n in range(TASKS):
        graph.spawn(k.nap, a.x[n % k.CELLS], a.log[n], NAP_MS)
    with Traced(scheduler) if is_traced else scheduler as opened:
        start = time.perf_counter()
        pace, seconds = Pace(start), []
        for number, _ in enumerate(opened.run_each([graph] * 6)):
            now = time.perf_counter()
            seconds.append(pace.step(now, opened.ahead()))
            if number in (0, 3):
                time.sleep(2.5 * TASKS * NAP_MS / 1000)
    assert min(seconds) > (TASKS - 1) * NAP_MS / 1000  # a task that is under way counts when it is done
    assert sum(seconds) == pytest.approx(now - start)
