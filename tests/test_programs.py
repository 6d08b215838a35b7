"""What every program does with signals, its output and its limits, from the first import on: one line and the conventional exit code."""

import os
import re
import signal
import subprocess
import sys

import pytest

from taskgpt.errors import Interrupted, UserError, run_program

DISK = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")


def program(arguments: str, shell: str = "") -> subprocess.CompletedProcess:
    """Run `python -m taskgpt...` in a shell, with redirections around it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = (shell or "{}").format(f"{sys.executable} -m {arguments}")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_a_reader_of_the_help_may_leave():
    """As `taskgpt -h | head -1`: no word about the pipe."""
    done = program("taskgpt -h", "{} | head -c 1; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "u", "")


def test_a_reader_of_the_help_has_left():
    """Also where every line is written at once."""
    done = program("taskgpt -h", "(sleep 0.2; PYTHONUNBUFFERED=1 {}; echo $? >&2) | true")
    assert done.stderr == "1\n"


def test_output_is_closed_or_full():
    """Said in one line, with exit code 2."""
    done = program("taskgpt sizes tiny", "{} >&-")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in done.stderr


@DISK
@pytest.mark.parametrize("arguments", ["taskgpt -h", "taskgpt sizes tiny"])
def test_output_is_full(arguments):
    done = program(arguments, "{} > /dev/full")
    assert done.returncode == 2
    assert re.fullmatch(r"taskgpt.*: error: standard output: No space left on device\n", done.stderr)


def test_too_small_an_address_space_is_said():
    """Where libraries would abort."""
    done = program("taskgpt.train --graph tiny", "ulimit -v 500000; {}")
    assert done.returncode == 2
    assert re.fullmatch(r"taskgpt: error: the address space is limited to 488 MiB; .*\n", done.stderr)


@pytest.mark.parametrize("words", [["-m", "taskgpt.train"], ["-um", "taskgpt.train"], ["-mtaskgpt.train"], ["-B", "-Imtaskgpt"]])
def test_ctrl_c_while_modules_are_imported(words):
    """A module that never ends its import stands for what takes seconds; however the interpreter is told to run ours."""
    code = (
        "import sys, runpy, importlib.abc, os, signal\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Stop())\n"
        f"sys.orig_argv = {['python', *words]}\n"
        "sys.argv = ['-m']\n"
        "import taskgpt\n"
        "runpy.run_module('taskgpt.train', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "taskgpt: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_program_in_order(number, capsys):
    """`with` blocks and `finally` are left, also where the program has words of its own for it; the handlers of before are back."""
    before, left = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], []

    def run() -> int:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; nothing was written") from None
        finally:
            left.append(True)

    assert run_program("taskgpt.x", run) == 128 + number
    assert capsys.readouterr().err == "taskgpt.x: interrupted; nothing was written\n"
    assert left == [True]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_signal_that_is_ignored_stays_so():
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_program("taskgpt.x", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x: wrong"), 2, "error: x: wrong"),
        (MemoryError(), 2, "error: out of memory"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "error: a/b: No such file or directory"),
        (RuntimeError("can't start new thread"), 2, "error: the system lets this process start no more threads"),
        (ZeroDivisionError("task"), 1, "failed: task"),
        (Interrupted(signal.SIGTERM), 143, "ended by SIGTERM"),
    ],
)
def test_what_is_raised_is_a_line(error, code, message, capsys):
    def run() -> int:
        raise error

    assert run_program("taskgpt.x", run, (ZeroDivisionError,)) == code
    assert capsys.readouterr().err.startswith(f"taskgpt.x: {message}")


def test_a_defect_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="defect"):
        run_program("taskgpt.x", lambda: (_ for _ in ()).throw(RuntimeError("defect")))
