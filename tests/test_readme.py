"""README and the documentation say what is true: their commands run, their Python runs, the picture is the graph's.

A command runs unless others run its program, and each of its flags, and write what is read; then its flags and names are read, and no more.
"""

import argparse
import itertools
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from pages import PAGES, README, ROOT, blocks, commands

from taskgpt.__main__ import main
from taskgpt.config import load_graph, load_scheduler
from taskgpt.lab import machine
from taskgpt.lab.named import make_config, scheduler_of
from taskgpt.lab.tuning import tuned
from taskgpt.products.instruction_sets import of_this_machine
from taskgpt.programs.show import main as show

SMALL = {
    "compare": ("--turn", "0.01s", "--precision", "0.9", "--budget", "60s", "--workers", "1"),  # until six rounds are over
    "tune": ("--budget", "6s"),
    "simulate": ("--steps", "3", "--rounds", "1"),
    "step": ("--graphs", "tiny"),
    "roofline": ("--graphs", "tiny"),
    "products": ("--graphs", "tiny"),
    "overhead": ("--steps", "20"),
    "metg": ("--steps", "20"),
    "contention": ("--steps", "4"),
    "record": ("--tasks", "500"),
    "programs": ("--programs", "fib:n=20"),
    "decode": ("--graph", "tiny"),
    "peers": ("--graph", "tiny"),
}
WRITES = ("--out", "--trace", "--output", "--save", "--log", "--csv", "--html", "--report")  # a file, or a folder
REPLACED = {"--graph", "--graphs", "--steps", "--workers", "--budget", "--rounds"}  # by what takes less time
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
FILES_READ = {word for command in COMMANDS for before, word in itertools.pairwise(shlex.split(command)) if before not in WRITES}


def program_of(command: str) -> str:
    """Return the verbs: `bench step`."""
    return " ".join(itertools.takewhile(lambda word: re.fullmatch("[a-z]+", word), shlex.split(command)[1:]))


def new_in(command: str) -> set[str]:
    """Return the flags of a command, with the name of a file that it writes if another command reads it."""
    words = [*shlex.split(command), ""]
    flags = {f"{word} {value}" if word in WRITES and value in FILES_READ else word for word, value in itertools.pairwise(words)}
    return {flag for flag in flags if flag.startswith("--")} - REPLACED


def chosen(commands: list[str]) -> list[str]:
    """Leave out, from the last on, each command whose program others run, and all of its flags."""
    left = list(commands)
    for command in reversed(commands):
        others = [other for other in left if other != command and program_of(other) == program_of(command)]
        if others and new_in(command) <= set().union(*map(new_in, others)):
            left.remove(command)
    return left


RUN = chosen([command for command in COMMANDS if "--pairs" not in command])  # test_pairs.py reads those
READ = [command for command in COMMANDS if command not in RUN]


def test_ci_runs_the_readmes_test_command():
    """Word for word."""
    found = [line for block in blocks(README, "sh") for line in block.splitlines() if "pytest" in line]
    assert len(found) == 1
    assert found[0] in (ROOT / ".ci" / "run").read_text()


def test_readme_is_short():
    """What needs more room is in docs/."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The folder where a reader types one command after another: some read what others wrote. `gpt2` is a small model there."""
    folder = tmp_path_factory.mktemp("here")
    text = folder / "my.txt"
    text.write_text("\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md")), encoding="utf-8")
    words = ["--graph", "tiny", "--set", "model.max_seq_len=256", "--steps", "0", "--data", str(text), "--save", str(folder / "gpt2")]
    assert main(["train", *words]) == 0
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, here, monkeypatch, capsys):
    """In the order of the pages, with the graph tiny in place of a larger one, one step, one round, and one worker where it measures."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))  # where tuning remembers
    words = [smaller(word) for word in shlex.split(command)[1:]]
    verb = words[0]
    if verb == "train":
        words += [] if "--graph" in words else ["--graph", "tiny"]
        words += ["--steps", "1", "--data", "my.txt", "--val-batches", "1"]
    if verb in SMALL:
        words += SMALL[verb]
    if "--measure" in words:
        words += ["--workers", "1"]
    if verb == "bench":
        small, value = SMALL[words[1]]
        words += ([] if small in words and small != "--tasks" else [small, value]) + ([] if words[1] == "contention" else ["--rounds", "1"])
    code = main(words)
    output = capsys.readouterr()
    if verb == "tune" and code == 1:  # so little time decides nothing, and the program says so
        assert "nothing is written or remembered, give more --budget" in output.out
        (here / "tuned").mkdir(exist_ok=True)  # for the command that takes up what is tuned; test_tune.py looks at what tune writes
        shutil.copy(ROOT / "graphs" / "tiny.toml", here / "tuned" / "tiny-tuned.toml")
        (here / "tuned" / "native-tuned.toml").write_text('scheduler = "native"\n')
        tiny = load_graph("tiny")
        tuned.remember(tiny, machine.usable_cores(), tiny.tiles, {}, "by this test")
    else:
        assert code == 0, output.err


@pytest.mark.parametrize("command", READ)
def test_a_command_that_others_stand_for_is_right(command, monkeypatch):
    """Its flags are the program's, and there are graphs and schedulers of these names."""
    found = flags_of(command, monkeypatch)
    for word in names(found, "graph") - {"tuned/gpt2-124m-tuned.toml"}:
        make_config(word)
    for word in names(found, "scheduler") - {"whole-tensor", "tuned/native-tuned.toml"}:
        load_scheduler(*scheduler_of(word), may_be_cluster=True)


def names(flags: argparse.Namespace, kind: str) -> set[str]:
    """Return the words of --graph, or --scheduler, of a program that takes one or several."""
    one = getattr(flags, kind, None)
    return {one} if one else set(getattr(flags, f"{kind}s", ()))


class Parsed(BaseException):
    """Ends a program that has read its flags."""


def flags_of(command: str, monkeypatch) -> argparse.Namespace:
    """Return a command's flags, as its program reads them."""

    def parse_args(parser, *args, **kwargs):
        raise Parsed(parse(parser, *args, **kwargs))

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed) as parsed:
        main(shlex.split(command)[1:])
    return parsed.value.args[0]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != README], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, here, monkeypatch, capsys, tmp_path):
    """From the first block to the last, and what it prints is what the page shows."""
    monkeypatch.chdir(here)
    program = tmp_path / f"{page.stem}.py"
    program.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    runpy.run_path(str(program))
    printed = capsys.readouterr().out
    for shown in blocks(page, "text"):
        assert shown in printed


def smaller(text: str) -> str:
    """Put the graph tiny in place of a larger one, a smaller matrix, and fewer simulated workers."""
    text = re.sub(r"\bgpt2-[a-z\d]+(-(t\d+|b\d+|llmc|bf16))?", "tiny", text)
    text = text.replace("n=4096", "n=512").replace("2,16,64,128", "2,16")
    return re.sub(r",model\.(channels|heads|vocabulary)=\d+", "", text)


@pytest.mark.skipif(of_this_machine() is None, reason="BLAS multiplies here, and each product says so")
def test_the_picture_is_that_of_the_graph(tmp_path):
    """graphs/tiny.svg is what `taskgpt show graph` draws today."""
    assert show(["graph", "--graph", "tiny", "--format", "svg", "--output", str(tmp_path / "tiny.svg")]) == 0
    assert (tmp_path / "tiny.svg").read_text() == (ROOT / "graphs" / "tiny.svg").read_text()
