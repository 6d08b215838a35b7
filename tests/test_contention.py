"""Simulated cache lines, and the native scheduler's own code on them: what is counted is what happens, by hand where it can be."""

import json

import pytest

from taskgpt.config import load_scheduler
from taskgpt.lab.benchmarks import patterns, task_bench
from taskgpt.lab.simulator.contention import LINE_BYTES, Contended, Counts, Lines
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.programs.bench import main

TWO_BY_TWO = Machine.load("2x56:cores_per_socket=2,line_us=0.1,far_line_us=0.3,wake_us=0")
FREE = Machine.load("2x56:line_us=0,far_line_us=0,wake_us=0")


def contended(pattern: str, workers: int, where: Machine, steps: int = 10, **overrides) -> Contended:
    """Return the scheduler after a run of that graph."""
    graph, _ = task_bench.record(pattern, workers, steps)
    config = load_scheduler("native", {"workers": workers, **overrides})
    with Contended(config.settings, where.with_room_for(workers), 20.0) as scheduler:
        scheduler.run(graph)
    assert scheduler.counts.tasks == len(graph.tasks)
    return scheduler


def test_lines_by_hand():
    """The first use is free; then a line comes from its writer, near or far, and is kept until another core writes it."""
    counts = Counts()
    lines = Lines(TWO_BY_TWO, counts)
    assert lines.reach(0, 0, True, 5.0) == 5
    assert lines.reach(0, LINE_BYTES - 8, False, 6.0) == 6
    assert lines.reach(1, 0, False, 10.0) == 110  # a copy, from the same socket
    assert lines.reach(1, 0, False, 200.0) == 200
    assert lines.reach(2, 8, True, 200.0) == 500  # alone, from the other socket
    assert lines.reach(1, 0, True, 210.0) == 800  # after it has arrived there
    assert lines.reach(2, LINE_BYTES, True, 210.0) == 210  # another line
    assert counts.transfers == 3


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
@pytest.mark.parametrize("stealing", [False, True])
@pytest.mark.parametrize("idle", ["hybrid", "idle"])
def test_every_task_runs(pattern, stealing, idle):
    """The compiled functions, a step at a time, finish every graph, spinning or asleep."""
    contended(pattern, 5, TWO_BY_TWO, work_stealing=stealing, idle=idle)


def test_a_worker_alone():
    """It waits for nobody but the submitting thread, whose lines it gets, and is busy all the time."""
    scheduler = contended("chains", 1, TWO_BY_TWO)
    assert scheduler.counts.failed == scheduler.counts.wakes == 0
    assert 10 * 15 < scheduler.span_us < 10 * 25 + 10


def test_what_lines_cost():
    """Where they are free a run ends earlier, by as many tasks as before."""
    assert contended("stencil_1d", 16, FREE).span_us < contended("stencil_1d", 16, Machine.load("2x56:line_us=1")).span_us


def test_sleepers_are_woken():
    """Workers that sleep at once are woken for the rows of a fork."""
    assert contended("fork_join", 4, FREE, idle="idle").counts.wakes > 4
    assert contended("fork_join", 4, FREE, idle="busy").counts.wakes == 0


@pytest.mark.parametrize("stealing", [False, True])
@pytest.mark.parametrize("pattern", ["stencil_1d", "fork_join"])
def test_nobody_stampedes(pattern, stealing):
    """On 32 workers less than one attempt in two tasks fails, to take a lock or to be the first at a word: one does not try, but waits."""
    counts = contended(pattern, 32, Machine.load("2x56"), steps=6, work_stealing=stealing).counts
    assert counts.failed < counts.tasks / 2


def test_the_verb(tmp_path, capsys):
    """A row for each pattern, system and number of workers."""
    path = tmp_path / "counts.json"
    words = ["--workers", "2,3", "--steps", "4", "--systems", "native", "native-stealing", "--patterns", "trivial", "--json", str(path)]
    assert main(["contention", *words]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["system"], row["workers"], row["tasks"]) for row in rows] == [
        (system, workers, 4 * workers) for system in ("native", "native-stealing") for workers in (2, 3)
    ]
    assert all(0 < row["efficiency"] <= 1.34 for row in rows)  # tasks take 3/4 of the time given or more
    assert "transfers" in capsys.readouterr().out


def test_a_set_up_with_a_number_of_workers_of_its_own(tmp_path):
    """Is simulated with these, once, and the row says so."""
    path = tmp_path / "counts.json"
    words = ["--workers", "2,16", "--steps", "4", "--systems", "native:workers=4", "--patterns", "trivial", "--json", str(path)]
    assert main(["contention", *words]) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert (row["workers"], row["tasks"]) == (4, 16)
    assert 0 < row["efficiency"] <= 1.34


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "loops"], "--systems loops: counts are of the native scheduler's code"),
        (["--patterns", "stensil_1d"], "did you mean 'stencil_1d'"),
        (["--task-us", "0"], "--task-us: wanted microseconds"),
    ],
)
def test_mistakes(words, message, capsys):
    assert main(["contention", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out  # nothing was measured
