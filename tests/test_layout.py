"""Tables of words: aligned as wide as they are, or within the width of a terminal."""

import argparse

import pytest

from taskgpt.lab import layout

TABLE = {
    "caption": "a caption of some words that is longer than what forty columns hold",
    "head": ["graph", "scheduler", "median ms", "share"],
    "rows": [["tiny:tiles.rows=64", "native-longest-path", "1,608.25", "5.0%"], ["tiny:tiles.rows=64", "loops", "9.50", "95.0%"]],
}


def test_as_wide_as_it_is():
    """Words stand left, numbers right, each column as wide as its widest cell."""
    assert layout.to_text(TABLE).splitlines() == [
        TABLE["caption"],
        "graph               scheduler            median ms  share",
        "tiny:tiles.rows=64  native-longest-path   1,608.25   5.0%",
        "tiny:tiles.rows=64  loops                     9.50  95.0%",
    ]


def test_within_a_width():
    """What is the same in all rows is said above; heads and words go on below, where they are joined; numbers stay whole."""
    assert layout.to_text(TABLE, 32).splitlines() == [
        "a caption of some words that is",
        "longer than what forty columns",
        "hold",
        "all: graph tiny:tiles.rows=64",
        "scheduler     median ms  share",
        "native-        1,608.25   5.0%",
        "longest-path",
        "loops              9.50  95.0%",
    ]
    different = {**TABLE, "rows": [TABLE["rows"][0], ["gpt2-124m", *TABLE["rows"][1][1:]]]}
    assert layout.to_text(different, 44).splitlines()[2:] == [
        "graph        scheduler     median ms  share",
        "tiny:        native-        1,608.25   5.0%",
        "tiles.rows=  longest-path",
        "64",
        "gpt2-124m    loops              9.50  95.0%",
    ]


@pytest.mark.parametrize("width", [40, 60, 80])
def test_nothing_is_lost(width):
    """However narrow: every character is there, in its column's order, and no line is too long where the numbers leave room."""
    table = {
        "caption": "",
        "head": ["dataset", "folder", "tokens"],
        "rows": [["a", "/a/folder/of/some/depth" * 3, "305,260"], ["b", "-", "1"]],
    }
    lines = layout.to_text(table, width).splitlines()
    assert max(map(len, lines)) <= width
    begin, end = lines[0].index("folder"), len(lines[0]) - len("tokens") - 1
    assert "".join(line[begin:end].strip() for line in lines[1:-1]) == "/a/folder/of/some/depth" * 3


def test_a_table_that_fits_is_left_alone():
    """And so is what a caller does not want narrowed."""
    assert layout.to_text(TABLE, 140) == layout.to_text(TABLE)
    assert layout.terminal_width(argparse.Namespace(wide=True)) is None


def test_rows_that_are_all_the_same_stay_a_table():
    """With nothing left to be told apart, nothing moves above."""
    table = {"caption": "", "head": ["cell", "verdict"], "rows": [["a cell", "not known yet"]] * 2}
    assert layout.to_text(table, 16).splitlines()[0].split() == ["cell", "verdict"]


def test_columns_can_be_left_out():
    assert layout.without(TABLE, ["share", "graph"])["rows"] == [["native-longest-path", "1,608.25"], ["loops", "9.50"]]


def test_a_heading_and_its_text(monkeypatch):
    """In one line for programs, below each other on a terminal; what cannot be broken is left whole."""
    text = "rows 128, columns 64, " + "x" * 70
    monkeypatch.delenv("COLUMNS", raising=False)
    assert layout.field("tiles", text) == f"tiles      {text}"
    monkeypatch.setenv("COLUMNS", "60")
    assert layout.field("tiles", text).splitlines() == ["tiles      rows 128, columns 64,", f"           {'x' * 70}"]
    assert layout.field("tiles", "rows 128") == "tiles      rows 128"
