"""README says what is true: its commands run, its picture is the graph's, and CI runs its test command."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taskgpt.programs.show import main as show

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.partition("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in dict.fromkeys(LINES) if line.startswith(("python -m taskgpt", "taskgpt "))]

SMALL = {
    "compare": ("--turn", "0.01s", "--precision", "0.9", "--budget", "60s"),  # until six rounds are over
    "tune": ("--budget", "6s"),
    "simulate": ("--steps", "3", "--rounds", "1"),
    "step": ("--graphs", "tiny"),
    "roofline": ("--graphs", "tiny"),
    "overhead": ("--steps", "20"),
    "metg": ("--steps", "20"),
    "peers": ("--graph", "tiny"),
}


def test_ci_runs_the_readmes_test_command():
    """Word for word."""
    commands = [line for block in BLOCKS for line in block.splitlines() if "pytest" in line]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The folder where a reader types one command after another: some read what others wrote."""
    return tmp_path_factory.mktemp("here")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, here):
    """In the README's order, with the graph tiny in place of a larger one, one step, one round, and one worker where it measures."""
    words = [sys.executable, "-m", "taskgpt", *shlex.split(command)[1:]] if command.startswith("taskgpt") else shlex.split(command)
    words[0] = sys.executable
    words = [smaller(word) for word in words]
    if "train" in command:
        words += [] if "--graph" in words else ["--graph", "tiny"]
        words += ["--steps", "1", "--data", str(ROOT / "README.md"), "--val-batches", "1"]
    if (verb := words[3]) in SMALL:
        words += SMALL[verb]
    if "--measure" in words:
        words += ["--workers", "1"]
    if verb == "bench":
        small, value = SMALL[words[4]]
        words += ["--rounds", "1"] + ([] if small in words else [small, value])
    result = subprocess.run(words, cwd=here, env=environment(), capture_output=True, text=True, timeout=120)
    if verb == "tune" and result.returncode == 1:  # so little time decides nothing, and the program says so
        assert "nothing is written or remembered, give more --budget" in result.stdout
        (here / "tuned").mkdir(exist_ok=True)  # for the command that takes up what is tuned; test_tune.py looks at what tune writes
        shutil.copy(ROOT / "graphs" / "tiny.toml", here / "tuned" / "tiny-tuned.toml")
        (here / "tuned" / "native-tuned.toml").write_text('scheduler = "native"\n')
    else:
        assert result.returncode == 0, result.stderr


def smaller(text: str) -> str:
    """Put the graph tiny in place of a larger one."""
    text = re.sub(r"\bgpt2-[a-z\d]+(-(t\d+|b\d+|llmc))?", "tiny", text)
    return re.sub(r",model\.(channels|heads|vocabulary)=\d+", "", text)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_picture_is_that_of_the_graph(tmp_path):
    """graphs/tiny.svg is what `taskgpt show graph` draws today."""
    assert show(["graph", "--graph", "tiny", "--format", "svg", "--output", str(tmp_path / "tiny.svg")]) == 0
    assert (tmp_path / "tiny.svg").read_text() == (ROOT / "graphs" / "tiny.svg").read_text()
