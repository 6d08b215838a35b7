"""`taskgpt bench programs`: every way to run a program gives the right result, C's too; a wrong one is noticed before it is timed."""

import dataclasses
import json
import shutil

import pytest

from taskgpt.lab.benchmarks import openmp, task_programs
from taskgpt.lab.benchmarks.openmp import OpenMP
from taskgpt.lab.benchmarks.task_programs import PROGRAMS, Cholesky, Fib, Heat, Queens
from taskgpt.programs.bench import main
from taskgpt.tasks import Graph, Tile, kernel

needs_gcc = pytest.mark.skipif(shutil.which(openmp.COMPILER) is None, reason="no gcc, which compiles the C side")
SMALL = [Cholesky(100, 32), Heat(70, 32, 3), Fib(14, 8), Queens(6, 2)]  # the last tiles are smaller
WORDS = ["cholesky:n=100,tile=32", "heat:n=70,block=32,sweeps=3", "fib:n=14,cut_off=8", "queens:n=6,cut_off=2"]
each_word = pytest.mark.parametrize("word", WORDS, ids=lambda word: word.partition(":")[0])


def run(tmp_path, *words: str) -> dict:
    """Run the verb once; return what it wrote as JSON."""
    path = tmp_path / "result.json"
    assert main(["programs", *words, "--rounds", "1", "--workers", "2", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def at_once(kernel, *args):
    """Spawn by running the NumPy body; return a future that has the result."""
    arrays = [arg.array if isinstance(arg, Tile) else arg for arg in args]
    found = kernel.body(*arrays, *([at_once] if kernel in (task_programs.fib, task_programs.queens) else []))
    at_once.tasks += 1
    return type("Future", (), {"result": lambda _: found})()


@pytest.mark.parametrize("program", SMALL, ids=lambda program: program.name)
def test_bodies_give_the_right_result_in_so_many_tasks(program):
    """Run one after another, without a scheduler; a recorded graph has as many."""
    opened = program.opened(False)
    opened.begin()
    at_once.tasks, found = 0, None
    if hasattr(opened, "program"):
        opened.program(at_once)
        graph = Graph()
        opened.program(graph.spawn)
        assert len(graph.tasks) == program.tasks
    else:
        found = at_once(*opened.root).result()
    assert opened.wrong(found) == ""
    assert at_once.tasks == program.tasks


@needs_gcc
def test_all_ways_are_measured(tmp_path, capsys):
    """Graphs and programs against C, each with its ratio; results have been verified."""
    rows = run(tmp_path, "--programs", *WORDS)["programs"]
    loop, recursion = ["graph, once", "graph, again", "program", "nested", "OpenMP"], ["nested", "OpenMP"]
    assert [row["way"] for row in rows] == loop + loop + recursion + recursion
    assert [row["x_openmp"] for row in rows if row["way"] == "OpenMP"] == [1.0] * 4
    assert all(len(row["seconds"]) == 1 and row["median_ms"] > 0 and row["x_openmp"] > 0 for row in rows)
    assert "cholesky 100, tiles 32" in capsys.readouterr().out


@needs_gcc
@pytest.mark.parametrize("threads", [1, 3])
def test_c_gives_the_same(threads):
    """On one thread and on several; heat bit by bit."""
    c = OpenMP(threads)
    for program in SMALL:
        opened = program.opened(False)
        opened.begin()
        assert opened.wrong(opened.in_c(c)) == ""


@each_word
@needs_gcc
def test_a_wrong_result_of_c_is_noticed(word, monkeypatch, capsys):
    """Nothing is timed then."""
    monkeypatch.setattr(OpenMP, word.partition(":")[0], lambda *_: 0)
    assert main(["programs", "--programs", word, "--rounds", "1"]) == 2
    assert "OpenMP: wrong result: " in capsys.readouterr().err


@kernel
def one(n: int, cut_off: int) -> int:
    return 1


@pytest.mark.parametrize(
    ("word", "broken"),
    [(WORDS[0], {"program": lambda spawn: None}), (WORDS[1], {"program": lambda spawn: None}), (WORDS[2], {"root": (one, 0, 0)})],
)
def test_a_wrong_result_is_noticed(word, broken, monkeypatch, capsys):
    """Nothing is timed then."""
    program = PROGRAMS[word.partition(":")[0]]
    opened = program.opened
    monkeypatch.setattr(program, "opened", lambda *given: dataclasses.replace(opened(*given), **broken))
    assert main(["programs", "--programs", word, "--rounds", "1"]) == 2
    assert ": wrong result: " in capsys.readouterr().err


def test_without_a_compiler_our_own_ways_are_left(tmp_path, monkeypatch):
    """And it is said why."""
    monkeypatch.setattr(openmp.shutil, "which", lambda _: None)
    record = run(tmp_path, "--programs", *WORDS)
    assert record["notes"]["OpenMP"] == "left out: no gcc on this machine"
    assert [row["way"] for row in record["programs"]] == ["graph, once", "graph, again", "program", "nested"] * 2 + ["nested"] * 2
    assert {row["x_openmp"] for row in record["programs"]} == {None}


@needs_gcc
def test_what_the_compiler_refuses_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(openmp, "FLAGS", ("-no-such-flag",))
    note = run(tmp_path, "--programs", WORDS[2])["notes"]["OpenMP"]
    assert note.startswith("left out: gcc -no-such-flag ended with exit code 1: ") and "no-such-flag" in note[60:]


def test_schedulers_that_run_graphs_alone(tmp_path):
    """Their graphs are measured; recursions have none."""
    record = run(tmp_path, "--programs", WORDS[0], WORDS[2], "--scheduler", "threads")
    assert record["notes"]["programs"].startswith("left out: scheduler threads runs recorded graphs alone")
    assert {row["way"] for row in record["programs"]} - {"OpenMP"} == {"graph, once", "graph, again"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("choleski", "unknown program 'choleski'; did you mean 'cholesky'?"),
        ("heat:n=many", "wanted n=NUMBER, for example"),
        ("heat:n", "wanted n=NUMBER, for example"),
        ("fib:size=4", "size: unknown key"),
        ("fib:n=0", "n: "),
        ("fib:n=8,cut_off=8", "cut_off 8: wanted less than n, which is 8"),
        ("queens:n=3,cut_off=4", "cut_off 4: wanted at most n, which is 3"),
        ("heat:block=1", "wanted at most"),
    ],
)
def test_mistakes_are_named(word, said, capsys):
    assert main(["programs", "--programs", word]) == 2
    error = capsys.readouterr().err
    assert error.startswith("taskgpt bench: error: --programs") and said in error and "Traceback" not in error


def test_more_memory_than_is_free_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("taskgpt.lab.machine.free_memory_bytes", lambda: 10**6)
    assert main(["programs", "--programs", "cholesky:n=1000"]) == 2
    assert "GiB are free; choose a smaller n" in capsys.readouterr().err


def test_help_names_programs_and_sizes(capsys):
    with pytest.raises(SystemExit):
        main(["programs", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "taskgpt bench programs --workers 2" in text
    assert all(f"{name} (n, " in text for name in PROGRAMS)
