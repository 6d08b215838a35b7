"""The example programs: NumPy's results, the same bits under every scheduler, declarations that hold."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import Graph, check, run_now

sys.path.insert(0, str(ROOT))
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("[a-z]*.py"))
SCHEDULERS = [
    ("sequential", {}),
    ("loops", {"workers": 2}),
    ("threads", {"workers": 2}),
    *(("native", {"workers": workers}) for workers in (1, 2, 4, 8)),
]


def solved(problem, run) -> np.ndarray:
    """Return the result of a run from the beginning."""
    problem.begin()
    if hasattr(problem, "run"):
        problem.run(run)
    else:
        run()
    return problem.result().copy()


@pytest.fixture(params=NAMES)
def problem(request):
    return importlib.import_module(f"examples.{request.param}").Problem()


def recorded(problem) -> Graph:
    graph = Graph()
    problem.program(graph.spawn)
    return graph


def test_results(problem):
    """Every scheduler gives the same bits, in every run, and they are what NumPy says."""
    graph, found = recorded(problem), []
    for name, settings in SCHEDULERS:
        chosen = load_scheduler(name, settings)
        with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
            found += [solved(problem, lambda scheduler=scheduler: scheduler.run(graph)) for _ in range(2)]
    assert len({each.tobytes() for each in found}) == 1
    tolerance = {np.float16: 1e-3, np.float32: 1e-4}.get(found[0].dtype.type, 1e-9)
    np.testing.assert_allclose(found[0], problem.wanted(), rtol=tolerance, atol=tolerance)


def test_declarations_hold(problem):
    """check finds nothing, and changes no bit."""
    graph = recorded(problem)
    wanted, got = (solved(problem, lambda each=each: [task.run() for task in each.tasks]) for each in (graph, check(graph)))
    assert got.tobytes() == wanted.tobytes()


def test_without_a_graph(problem):
    """The same program at once; reductions add in another order then, which may round differently."""
    graph = recorded(problem)
    wanted = solved(problem, lambda: [task.run() for task in graph.tasks])
    got = solved(problem, lambda: problem.program(run_now))
    if any("reduction" in str(task) for task in graph.tasks):
        np.testing.assert_allclose(got.astype(float), wanted.astype(float), rtol=1e-4)
    else:
        assert got.tobytes() == wanted.tobytes()


def test_the_command_of_the_page():
    """It runs what it is given, and refuses what there is not."""
    command = [sys.executable, "-m", "examples"]
    done = subprocess.run([*command, "dot", "sparse_lu", "--workers", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, [line.split()[0] for line in done.stdout.splitlines()]) == (0, ["dot", "sparse_lu"]), done.stderr
    wrong = subprocess.run([*command, "heet"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (wrong.returncode, wrong.stderr) == (2, "python -m examples: error: no example is called 'heet'; did you mean 'heat'?\n")


def test_every_example_is_listed():
    """In the docstring of the folder and on the page."""
    listed = importlib.import_module("examples").__doc__
    page = (ROOT / "docs" / "tutorials" / "programs.md").read_text(encoding="utf-8")
    assert not [name for name in NAMES if f"{name}.py" not in listed or f"examples/{name}.py" not in page]
