"""`taskgpt run`: a file runs as under Python, and what its schedulers did is written."""

import subprocess
import sys

import pytest

from taskgpt import config
from taskgpt.__main__ import main
from taskgpt.lab.traces import formats
from taskgpt.lab.traces.trace import Trace

PROGRAM = """
import sys
import numpy as np
import taskgpt
from taskgpt.tasks import Graph, InOut, Spawn, dims, kernel, wrap

N = dims("N")[0]


@kernel
def add(a: InOut[N, np.int64], k: int):
    a += k


@kernel
def spread(a: InOut[N, np.int64], spawn: Spawn):
    for first in range(0, a.shape[0], 8):
        spawn(add, a[first : first + 8], 1)
    spawn.taskwait()


if __name__ == "__main__":
    x = wrap(np.zeros(64, np.int64), 8)
    for name in sys.argv[1:]:
        with taskgpt.scheduler(name) as scheduler:
            with scheduler.program() as spawn:
                spawn(spread, x[:], label="spreading")
            graph = Graph("again")
            graph.spawn(add, x[:], 1)
            scheduler.run(graph)
    print(x.array.sum(), __file__)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PROGRAM)
    return path


def test_a_file_runs_as_under_python(file, capfd):
    """The same output as of python; arguments, name and folder are the file's; modules beside it are found."""
    (file.parent / "beside.py").write_text("WORD = 'found'")
    file.write_text(PROGRAM + "\nimport beside\nprint(beside.WORD)\n")
    assert main(["run", str(file), "native", "sequential"]) == 0
    out, err = capfd.readouterr()
    plain = subprocess.run([sys.executable, str(file), "native", "sequential"], capture_output=True, text=True, timeout=300)
    assert (out, err) == (plain.stdout, "") and out == f"256 {file}\nfound\n"


def test_what_its_schedulers_did_is_written(file, tmp_path, capfd):
    """A folder for each scheduler, which the checks of all formats accept; later programs are not traced."""
    assert main(["run", "--trace", str(tmp_path / "out"), str(file), "native", "sequential"]) == 0
    assert capfd.readouterr().err.count("tasks of 2 runs in") == 2
    # Eight tasks, and the one that spawns them: before and after them on native, and between them where each runs as it is spawned.
    for folder, name, stretches in (("1-native", "native", 10), ("2-sequential", "sequential", 17)):
        formats.check(tmp_path / "out" / folder)
        trace = Trace.load(tmp_path / "out" / folder)
        assert [trace.graphs[run["graph"]].name for run in trace.runs] == ["program", "again"]
        assert trace.about["scheduler"].startswith(name)
        program = trace.graphs[trace.runs["graph"][0]]
        assert len(program) == stretches and set(program.phases) == {"spreading"}
    assert type(config.scheduler("native")).__name__ == "Scheduler"


def test_the_exit_code_is_the_files(file, tmp_path, capfd):
    """Also of one that ends with an exception, which Python prints; the trace until there is written."""
    file.write_text(PROGRAM + "\nraise KeyError('mine')\n")
    assert main(["run", "--trace", str(tmp_path / "out"), str(file), "native"]) == 1
    assert "KeyError: 'mine'" in capfd.readouterr().err
    assert len(Trace.load(tmp_path / "out").runs) == 2
    for ending, code in (("3", 3), ("'no'", 1), ("None", 0)):
        file.write_text(f"import sys\nsys.exit({ending})\n")
        assert main(["run", str(file)]) == code
    assert capfd.readouterr().err == "no\n"


def test_mistakes_are_told_in_a_line(file, tmp_path, capfd):
    """No file; nothing to trace."""
    assert main(["run", str(tmp_path / "none.py")]) == 2
    assert "none.py: wanted a Python file, got none" in capfd.readouterr().err
    assert main(["run", "--trace", str(tmp_path / "out"), str(file)]) == 2
    assert "no scheduler that was opened with taskgpt.scheduler(...) ran anything" in capfd.readouterr().err
