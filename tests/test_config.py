"""Configurations: whatever a person writes into a file or behind `--set` is taken, or its mistake told in one line."""

import errno
from pathlib import Path

import pytest

from taskgpt.config import available, load_graph, load_scheduler, parse_settings
from taskgpt.errors import UserError, shorten


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiles = 3", r"x\.toml: tiles: wanted a table, got 3; begin it with a line \[tiles\]"),
        ('model = "x"', "model: wanted a table, got 'x'"),
        ("[[tiles]]", r"tiles: wanted a table, got \[\{\}\]"),
        ("rows = 3", "unknown table 'rows'"),
        ("[tile]", "unknown table 'tile'; did you mean 'tiles'"),
        ("[tiles]\nrow = 3", "model.layers: missing"),
        ("tiles", r"x\.toml: not a TOML file"),
    ],
)
def test_a_wrong_graph_file_is_told(tmp_path, text, message):
    """With a change on top or without."""
    (tmp_path / "x.toml").write_text(text)
    for overrides in ({}, {"tiles.rows": 8}):
        with pytest.raises(UserError, match=message):
            load_graph(str(tmp_path / "x.toml"), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler = 3", r"x\.toml: scheduler: wanted the name of a scheduler, got 3; write it in quotes"),
        ('scheduler = "loop"', "unknown scheduler 'loop'; did you mean 'loops'"),
        ('scheduler = "loops"\nworker = 1', r"x\.toml: worker: unknown key; did you mean 'workers'"),
        ('scheduler = "loops"\n[workers]', "workers: wanted int, got {}"),
    ],
)
def test_a_wrong_scheduler_file_is_told(tmp_path, text, message):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_scheduler(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("load", [load_graph, load_scheduler])
def test_a_file_that_cannot_be_read_is_told(tmp_path, load, monkeypatch):
    """Missing, a folder, another encoding, without permission."""
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    for name, reason in {"none": "no such file", "folder": "cannot read: Is a directory", "latin": "not a TOML file"}.items():
        with pytest.raises(UserError, match=rf"{name}\.toml: {reason}"):
            load(str(tmp_path / f"{name}.toml"))
    with pytest.raises(UserError, match=r"unknown (graph|scheduler) 'xxxxxxxx"):
        load("x" * 300)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"latin\.toml: cannot read: Permission denied; choose"):
        load(str(tmp_path / "latin.toml"))


def test_values_are_what_toml_says_or_words():
    """A change gives one value: TOML behind it, say a second key, makes it a word, which is refused where a number is wanted."""
    words = ["tiles.rows=3", "a=1.5", "b=true", "c=static", "d='x y'", "e=", "f=x=y"]
    assert parse_settings(words) == ({"tiles.rows": 3}, {"a": 1.5, "b": True, "c": "static", "d": "x y", "e": "", "f": "x=y"})
    graph, _ = parse_settings(["tiles.rows=3\nx=4"])
    with pytest.raises(UserError, match=r"tiles\.rows: wanted int, got '3\\nx=4'"):
        load_graph("tiny", graph)


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [("rows=128", "tiles.rows"), ("batch_size=2", "batch.batch_size"), ("worker=2", "workers"), ("chunk=2", "chunks")],
)
def test_a_graphs_key_without_its_table_is_recognized(word, suggestion):
    """A change without a dot goes to the scheduler, which knows it not; the suggestion comes from both files."""
    _, overrides = parse_settings([word])
    with pytest.raises(UserError, match=rf"loops\.toml: .*: unknown key; did you mean '{suggestion}'\?"):
        load_scheduler("loops", overrides)


def test_sequential_takes_one_worker():
    """So a sweep over schedulers may give each of them one worker; more are refused in words of their own."""
    assert load_scheduler("sequential", {"workers": 1}) == load_scheduler("sequential")
    for workers in (0, 3):
        with pytest.raises(UserError, match=f"sequential has one worker, got --workers {workers}; choose another scheduler"):
            load_scheduler("sequential", {"workers": workers})


def test_every_file_that_comes_along_is_right():
    for name in available("graphs"):
        assert load_graph(name).name == name
    for name in available("scheduler_configs"):
        assert load_scheduler(name).name == name


def test_what_a_message_repeats_is_short_and_on_one_line():
    """However long the value is, and whatever it does to a terminal; its ends are what it is recognized by."""
    assert shorten(Path("runs/native")) == "runs/native"
    assert shorten("é" * 200) == "é" * 200
    assert shorten("a" * 5000 + "b" * 5000, most=20) == "aaaaaaa...bbbbbbbbbb"
    assert shorten("two\nlines\x1b[31m") == r"two\nlines\x1b[31m"
