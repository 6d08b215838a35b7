"""One grammar: names, workers, tiles and settings mean the same to every program, and every help fits its terminal."""

import argparse
import importlib
import re

import pytest

from taskgpt.__main__ import PROGRAMS
from taskgpt.config import find_file, load_graph, load_scheduler
from taskgpt.errors import UserError
from taskgpt.lab.contests.cells import product_of
from taskgpt.lab.named import choices, graph_words, listed, make_config, with_changes
from taskgpt.programs.arguments import Parser
from taskgpt.runs.start import Start
from taskgpt.train import configure
from taskgpt.train import parser as train_parser

VERBS = [*PROGRAMS, "data prepare", "show graph", "trace report", "trace check", "trace convert"]
VERBS += [f"bench {verb}" for verb in ("step", "roofline", "overhead", "metg", "peers")]


def program(words: str):
    verb, *rest = words.split()
    main = importlib.import_module("taskgpt.train" if verb == "train" else f"taskgpt.programs.{verb}").main
    return lambda *flags: main([*rest, *flags])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["a,b", "c"], ["a", "b", "c"]),
        (["a:x=1,y=2,b", "c:z=3"], ["a:x=1,y=2", "b", "c:z=3"]),
        (["a:x=1,b:y=2,z=3"], ["a:x=1", "b:y=2,z=3"]),
        (["a:x=1", "y=2"], ["a:x=1", "y=2"]),
        (["tcp://h:1,a"], ["tcp://h:1", "a"]),
        ([",", ""], []),
    ],
)
def test_lists_have_commas_or_spaces(words, names):
    """A part with `=` belongs to the name before it in the same word."""
    assert listed(words) == names


def test_a_file_that_is_there_is_a_name(tmp_path):
    """Whatever its name: commas and colons in it are no list and no changes."""
    path = tmp_path / "a,b:c=1.toml"
    path.write_bytes(find_file("graphs", "tiny").read_bytes())
    assert listed([str(path)]) == [str(path)]
    assert make_config(with_changes(str(path), [])).model == load_graph("tiny").model


@pytest.mark.parametrize("word", ["tiny", "tiny:", "tiny:,", "tiny:tiles.rows=2", "tiny:tiles.rows=2,"])
def test_changes_are_added(word):
    """Behind those that are there, also where a name ends as if there were more."""
    assert make_config(with_changes(word, [("tiles.rows", "8")])) == load_graph("tiny", {"tiles.rows": 8})


def test_values_are_lists_too():
    """KEY=VALUE,VALUE and KEY=VALUE,KEY=VALUE; of a key that is given twice, the last counts."""
    assert choices("--tiles", ["rows=64,128,columns=32", "heads=1"]) == {"rows": ["64", "128"], "columns": ["32"], "heads": ["1"]}
    assert choices("--set", ["a=1", "a=2,3"]) == {"a": ["2", "3"]}
    for flag, example in {"--tiles": "rows=64", "--tile": "rows=64", "--set": "policy=oldest_first"}.items():
        for wrong in ("rows", "rows=", "rows=1,,2", "=1", ""):
            with pytest.raises(UserError, match=rf"{flag} .*: wanted KEY=VALUE, for example {flag} {example}$"):
                choices(flag, [wrong])


def test_settings_go_where_their_keys_belong():
    """A tile's key is a tile, another of the graph file's changes the graph, a scheduler's is for who has it; `workers` for all."""
    settings = ["tiles.rows=64,128", "model.layers=1,2", "policy=newest_first", "workers=1,2"]
    cells = product_of(["tiny"], ["columns=32"], ["loops", "native"], [4], settings)
    assert cells == product_of(
        ["tiny:model.layers=1", "tiny:model.layers=2"], ["columns=32", "rows=64,128"], ["loops", "native"], [1, 2], ["policy=newest_first"]
    )
    assert len(cells) == 16
    assert {make_config(cell.graph_word).tiles.rows for cell in cells} == {64, 128}


def test_every_program_makes_the_same_graph_of_the_same_words():
    """By the name, by --tiles and by --set; train, programs of cells, programs without a scheduler."""
    wanted = load_graph("tiny", {"tiles.rows": 64, "model.layers": 1})
    ways = [["--graph", "tiny:tiles.rows=64,model.layers=1"], ["--graphs", "tiny", "--tile", "rows=64", "--set", "model.layers=1"]]
    ways += [["--graph", "tiny", "--set", "tiles.rows=64", "model.layers=1"], ["--graph", "tiny", "--set", "tiles.rows=64,model.layers=1"]]
    for way in ways:
        flags = train_parser().parse_args([*way, "--scheduler", "loops:chunks=dynamic", "--set", "chunk_size=3"])
        graph, scheduler = configure(Start(flags, flags))
        assert graph == wanted
        assert scheduler.settings == load_scheduler("loops", {"chunks": "dynamic", "chunk_size": 3}).settings
        sets = [word for word in flags.set if "chunk" not in word]
        assert [make_config(word) for word in graph_words([flags.graph], flags.tiles, sets)] == [wanted]
        (cell,) = product_of([flags.graph], flags.tiles, ["native"], [1], sets)
        assert make_config(cell.graph_word) == wanted


@pytest.mark.parametrize("verb", ["train", "tune", "show graph", "bench peers"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--graph", "tiny,gpt2-124m"], "--graph tiny,gpt2-124m: wanted one, got 2; `taskgpt compare` takes several"),
        (["--graphs", "tiny", "tiny"], "--graphs tiny,tiny: wanted one, got 2"),
        (["--graph", ""], "--graph: wanted one, got none"),
        (["--tiles", "rows=64,128"], "--tiles rows=64,128: wanted one value, got 2"),
        (["--set", "model.layers=1,2"], "--set model.layers=1,2: wanted one value, got 2"),
        (["--tiles", "row=64"], "--tiles row: no size of a tile; did you mean 'rows'?"),
        (["--set", "tiles.row=64"], "unknown key 'tiles.row'; did you mean 'tiles.rows'?"),
        (["--set", "model.layers"], "--set model.layers: wanted KEY=VALUE"),
    ],
)
def test_who_takes_one_refuses_several(verb, flags, message, capsys):
    """In one line, with exit code 2, before anything runs."""
    assert program(verb)(*flags) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line]
    assert message in line


@pytest.mark.parametrize("verb", ["train", "tune", "bench peers", "bench metg"])
def test_who_takes_one_number_of_workers_refuses_several(verb, capsys):
    """As with names."""
    assert program(verb)("--workers", "1,2") == 2
    assert "--workers 1,2: wanted one, got 2" in capsys.readouterr().err
    assert program(verb)("--workers", "0") == 2
    assert "--workers 0: wanted a number from 1 to 4,096, for example --workers 2" in capsys.readouterr().err


def test_names_behind_a_setting_are_names(capsys):
    """Of `sizes`, as it was written before a flag took several words; every combination has its line."""
    assert program("sizes")("--set", "model.layers=1,3", "tiny", "--wide") == 0
    assert re.findall(r"^(\S+) +(\d)", capsys.readouterr().out, re.M) == [("tiny:model.layers=1", "1"), ("tiny:model.layers=3", "3")]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", [80, 140])
def test_help_fits_its_terminal(verb, columns, capsys, monkeypatch):
    """Examples too, which say `taskgpt` and the verb, and are whole commands to a shell; and --version is there."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        program(verb)("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert "--version" in shown
    *_, examples = shown.partition("examples:\n")
    commands = re.sub(r" \\\n +", " ", examples.partition("\n\n")[0]).splitlines()
    assert any(line.startswith(f"  taskgpt {verb}") for line in commands)
    assert all(line.startswith(("  taskgpt ", "  # ")) for line in commands)


@pytest.mark.parametrize("columns", [1, 3, 12])
def test_help_of_a_terminal_too_narrow_to_read(columns, monkeypatch):
    """Is long, and no traceback."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert "taskgpt train" in train_parser().format_help()


def test_the_version_is_the_packages(capsys):
    """With any verb."""
    for verb in ("sizes", "bench step"):
        with pytest.raises(SystemExit):
            program(verb)("--version")
        assert re.fullmatch(r"taskgpt \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_without_a_docstring():
    """As under python -OO."""
    p = Parser("taskgpt x", None)
    p.add_argument("--wide", action="store_true")
    assert "--wide" in p.format_help()
    assert p.parse_args(["--wide"]) == argparse.Namespace(wide=True)
