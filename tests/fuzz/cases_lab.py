"""What the programs that measure, choose and predict read: graph, scheduler and machine files, results of compare, remembered tilings."""

import shutil
from pathlib import Path
from unittest import mock

from taskgpt.config import find_file, load_graph, load_scheduler
from taskgpt.lab.contests import compare_report
from taskgpt.lab.contests.cells import product_of
from taskgpt.lab.contests.results import Results
from taskgpt.lab.contests.turns import FACTORS, First, Watched
from taskgpt.lab.simulator.machine_file import MACHINES, Machine
from taskgpt.lab.traces.idle import CAUSES
from taskgpt.lab.tuning import tuned

from . import Case

HERE = dict.fromkeys(("processor", "cores", "blas"), "any")  # not this machine, which is slow to describe


def _copy(path: Path, name: str):
    return lambda folder: shutil.copy(path, folder / name)


def _make_results(folder: Path) -> None:
    cells = product_of(["tiny"], ["rows=64,128"], ["sequential", "native", "whole-tensor"], [1, 2], ["policy=oldest_first"])
    with mock.patch("taskgpt.lab.machine.describe", lambda: HERE):
        results = Results.begin(str(folder), cells, resume=False)
    for at, result in enumerate(results.found.values()):
        result.steps, result.ms = 3, [10.0 + at, 11.5, 9.25, 10.5, 10.25, 10.0, 10.125]
        watched = Watched(12.0, dict.fromkeys(FACTORS, 0.9), dict.fromkeys(CAUSES, 1.0), 10.0, 4, 10.0, 5.0)
        result.first = First(5.5, "24cc1a35" * 8, 184, watched if at % 2 else None)
    results.save()


def _diff(folder: Path) -> None:
    a = Results.load(folder)
    compare_report.changes_table(a, a)


def _resume(folder: Path) -> None:
    with mock.patch("taskgpt.lab.machine.describe", lambda: HERE):
        results = Results.begin(str(folder), product_of(["tiny"], [], ["native"], [2], []), resume=True)
    compare_report.tables(results)
    compare_report.agreement(results)
    compare_report.known(results)


def _remembered(work):
    """Have tuning's memory in the folder, for a machine that is always the same; it calls its file by the key's hash."""

    def run(folder: Path) -> None:
        always = {"_path": lambda key: folder / "tiles.json", "_key": lambda *_: {"of": "any"}}
        with mock.patch.multiple(tuned, **always):
            work()

    return run


def _remember() -> None:
    tuned.remember(load_graph("tiny"), 2, load_graph("tiny").tiles, {"policy": "newest_first"}, "today")


GRAPH, SCHEDULER, MACHINE = find_file("graphs", "tiny"), find_file("scheduler_configs", "native"), MACHINES / "2x56.toml"
CASES = (
    Case("graph_file", _copy(GRAPH, "x.toml"), lambda folder: load_graph(str(folder / "x.toml"))),
    Case("scheduler_file", _copy(SCHEDULER, "native.toml"), lambda folder: load_scheduler(str(folder / "native.toml"))),
    Case("machine_file", _copy(MACHINE, "x.toml"), lambda folder: Machine.load(str(folder / "x.toml"))),
    Case("compare_diff", _make_results, _diff),
    Case("compare_resume", _make_results, _resume),
    Case(
        "tuned_memory",
        _remembered(_remember),
        _remembered(lambda: tuned.remembered(load_graph("tiny"), 2, "taskgpt tune")),
        names_file=False,  # where there is none, nothing was tuned
    ),
)
