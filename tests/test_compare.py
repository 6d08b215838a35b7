"""Comparisons: which cells there are, turns that survive what a cell does, statistics, reports, and the program from end to end."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
from xml.etree import ElementTree

import pytest

from taskgpt.compare import main as compare
from taskgpt.errors import UserError
from taskgpt.lab import compare_report, layout
from taskgpt.lab.cells import Cell, product_of
from taskgpt.lab.figures import figures
from taskgpt.lab.report import median_interval, seconds_in
from taskgpt.lab.results import Results
from taskgpt.lab.turns import CellFailed, Turns


def test_the_product_has_every_combination_once():
    """Sequential has one worker and no policy, the whole tensor no tiles: what does not differ is not there twice."""
    cells = product_of(
        ["tiny"],
        ["rows=64,128", "columns=32,64"],
        ["sequential", "loops", "native", "whole-tensor"],
        [1, 2],
        ["policy=oldest_first,newest_first"],
    )
    count = {name: sum(cell.scheduler == name for cell in cells) for name in ("sequential", "loops", "native", "whole-tensor")}
    assert count == {"sequential": 4, "loops": 8, "native": 16, "whole-tensor": 2}
    assert len(set(cells)) == len(cells)
    assert {str(cell) for cell in cells if cell.scheduler == "native"} > {
        "tiny:tiles.rows=64,tiles.columns=32 native policy=newest_first, 2 workers",
        "tiny:tiles.rows=128,tiles.columns=64 native policy=oldest_first, 1 worker",
    }
    assert all(Cell.of(json.loads(json.dumps(dataclasses.asdict(cell)))) == cell for cell in cells)


def test_baselines_are_named_so_that_nobody_confuses_them():
    """A loop's coverage is always said; the whole tensor says what it is."""
    cells = product_of(["tiny"], [], ["sequential", "loops-llmc", "loops", "whole-tensor"], [1], [])
    assert [cell.label for cell in cells] == [
        "sequential",
        "loops coverage=llmc",
        "loops coverage=all",
        "whole-tensor NumPy, threaded BLAS",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["tinny"], [], ["native"], [1], []), "did you mean 'tiny'"),
        ((["tiny"], ["row=64"], ["native"], [1], []), "did you mean 'rows'"),
        ((["tiny"], ["rows=0"], ["native"], [1], []), "at least 1"),
        ((["tiny"], ["rows"], ["native"], [1], []), "wanted KEY=VALUE"),
        ((["tiny"], [], ["nativ"], [1], []), "did you mean 'native'"),
        ((["tiny"], [], ["native"], [1], ["polcy=oldest_first"]), "did you mean 'policy'"),
        ((["tiny"], [], ["native"], [1], ["policy=oldest"]), "wanted one of"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments, message):
    """In the command's own words."""
    with pytest.raises(UserError, match=re.escape(message)):
        product_of(*arguments)


@pytest.fixture(scope="module")
def turns():
    with Turns() as opened:
        yield opened


def one(scheduler: str, graph: str = "tiny", workers: int = 1) -> Cell:
    (cell,) = product_of([graph], [], [scheduler], [workers], [])
    return cell


def test_a_first_run_tells_bits_and_efficiencies(turns):
    """The same bits as in order; the whole tensor's to rounding; POP's factors multiply."""
    found = {name: turns.first(one(name), 2) for name in ("sequential", "loops", "native", "whole-tensor")}
    assert found["native"]["sha256"] == found["loops"]["sha256"] == found["sequential"]["sha256"] != found["whole-tensor"]["sha256"]
    assert found["whole-tensor"]["loss"] == pytest.approx(found["sequential"]["loss"], abs=1e-5)
    factors = found["native"]["trace"]["efficiency"]
    product = factors["load balance"] * factors["dependency efficiency"] * factors["scheduling efficiency"]
    assert factors["parallel efficiency"] == pytest.approx(product)
    assert found["native"]["trace"]["steps"] == 2
    assert turns.timed(one("native"), 3) > 0


def test_a_cell_that_kills_its_process_does_not_take_the_others_along(turns):
    """The next one gets a new process, with the same bits."""
    before = turns.first(one("sequential"), 1)
    os.kill(turns._process.pid, signal.SIGKILL)
    with pytest.raises(CellFailed, match="its process died of SIGKILL"):
        turns.timed(one("sequential"), 1)
    assert turns.first(one("sequential"), 1)["sha256"] == before["sha256"]


def test_a_cell_that_hangs_is_given_up(tmp_path):
    """After the limit, in a message."""
    with Turns(limit_s=0.001) as impatient, pytest.raises(CellFailed, match="gave no answer"):
        impatient.timed(one("sequential"), 1)


@pytest.mark.parametrize(("n", "ranks"), [(1, (1, 1)), (5, (1, 5)), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))])
def test_the_medians_interval_is_that_of_the_sign_test(n, ranks):
    """As in tables of it; by the binomial distribution it holds 95 %, and one rank less on each side does not."""
    assert median_interval(range(n, 0, -1)) == ranks

    def holds(low: int) -> float:
        return 1 - 2 * sum(math.comb(n, k) for k in range(low)) / 2**n

    if n >= 6:
        assert holds(ranks[0]) >= 0.95 > holds(ranks[0] + 1)


def test_times_are_read_with_their_units():
    """And what is none is refused."""
    assert [seconds_in("--budget", text) for text in ("90s", "20m", "1.5h", "5")] == [90, 1200, 5400, 5]
    for text in ("", "m", "-3s", "nan", "inf", "5d"):
        with pytest.raises(UserError, match="wanted a time"):
            seconds_in("--budget", text)


def made_up(folder, ms: dict[str, list[float]], sha256: dict[str, str] | None = None) -> Results:
    """Return results of tiny under these schedulers."""
    results = Results.begin(str(folder), [one(name, workers=2) for name in ms], resume=False)
    for result, (name, values) in zip(results.found.values(), ms.items(), strict=True):
        result.ms, result.steps = values, 3
        result.first = {"loss": 1.0, "sha256": (sha256 or {}).get(name, "aa" * 32), "tasks": 10}
    results.save()
    return results


def test_speedup_is_over_sequential_and_efficiency_by_workers(tmp_path):
    """10 ms against 5 ms on two workers: 2.0 and 1.0; 40 steps of a mean of 6 ms: 0.24 s."""
    results = made_up(tmp_path, {"sequential": [10.0] * 6, "native": [5.0, 5.0, 5.0, 5.0, 5.0, 11.0]})
    row = compare_report.row_of(list(results.found.values())[1], results)
    assert (row["speedup"], row["efficiency"], row["mean_ms"], row["median_ms"]) == (2.0, 1.0, 6.0, 5.0)
    assert row["total_s"] == pytest.approx(0.24)
    assert row["tokens_per_second"] == pytest.approx(256 / 5e-3)


def test_different_bits_are_seen(tmp_path):
    """But for the whole tensor's, whose sums have another order."""
    values = {"sequential": [1.0], "native": [1.0], "whole-tensor": [1.0]}
    assert not made_up(tmp_path / "a", values, {"whole-tensor": "bb" * 32}).disagreements()
    wrong = made_up(tmp_path / "b", values, {"native": "cc" * 32})
    assert "DIFFERENT BITS: aaaaaaaa sequential (1), cccccccc native (2)" in compare_report.agreement(wrong)[0]
    (_, _, page) = compare_report.write(wrong)
    assert "DIFFERENT BITS" in page.read_text()


def test_a_change_is_one_whose_intervals_do_not_meet(tmp_path, capsys):
    """Largest first; what changed by less than its spread is no change."""
    before = {"sequential": [10.0, 10.1, 10.2, 10.3, 10.4, 10.5], "native": [5.0, 5.1, 5.2, 5.3, 5.4, 5.5]}
    after = {"sequential": [10.5, 10.1, 10.2, 10.3, 10.4, 10.9], "native": [4.0, 4.1, 4.2, 4.3, 4.4, 4.5]}
    a, b = made_up(tmp_path / "a", before), made_up(tmp_path / "b", after)
    rows = compare_report.changes_table(a, b)["rows"]
    assert [(row[0], row[6]) for row in rows] == [("tiny native, 2 workers", "faster"), ("tiny sequential, 1 worker", "no")]
    assert compare(["--diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "faster" in capsys.readouterr().out


def test_results_are_read_with_care(tmp_path):
    """What is none, or damaged, or of another machine, is told in a line."""
    made_up(tmp_path, {"sequential": [1.0]})
    file = tmp_path / "compare.json"
    saved = json.loads(file.read_text())
    with pytest.raises(UserError, match="holds results; go on with them by --resume"):
        Results.begin(str(tmp_path), [one("native")], resume=False)
    resumed = Results.begin(str(tmp_path), [one("native")], resume=True)
    assert [len(r.ms) for r in resumed.found.values()] == [0, 1]
    file.write_text(json.dumps(saved | {"machine": saved["machine"] | {"processor": "Z80"}}))
    with pytest.raises(UserError, match="measured with processor Z80"):
        Results.begin(str(tmp_path), [one("native")], resume=True)
    for text in ("", "[]", '{"taskgpt_compare": 2}', '{"taskgpt_compare": 1, "machine": {}, "cells": [{}]}'):
        file.write_text(text)
        with pytest.raises(UserError):
            Results.load(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        Results.load(tmp_path / "nowhere")


def test_every_picture_that_has_something_to_show(tmp_path):
    """Times, workers' time, scaling, tiles and settings: each is SVG by itself, and the same every time."""
    cells = product_of(["tiny"], ["rows=64,128", "columns=32,64"], ["sequential", "native"], [1, 2], ["policy=oldest_first,newest_first"])
    results = Results.begin(str(tmp_path), cells, resume=False)
    for at, r in enumerate(results.found.values()):
        idle = {"barrier": 1.0, "dependency": 2.0, "scheduling": 3.0, "between": 0.0}
        r.ms, r.first = [float(10 + at)] * 6, {"loss": 1.0, "sha256": "", "tasks": 1, "trace": {"useful_ms": 10.0, "idle_ms": idle}}
    found = figures(results)
    titles = " ".join(title for title, _ in found)
    for what in (
        "ms a step",
        "where the workers' time goes",
        "scaling",
        "tiles, native policy=newest_first, 2 workers",
        "settings of native",
    ):
        assert what in titles
    assert found == figures(results)
    names: list[str] = []
    for _, svg in found:
        names += {e.get("id") for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("clipPath")}
    assert len(names) == len(set(names))


def test_tables_stand_as_text_markdown_and_html():
    """Words left, numbers right; what would be markup is text."""
    table = {"caption": "c", "head": ["name", "what", "n"], "rows": [["a|b", "<x>", "1.5"], ["c", "-", "10"]]}
    assert layout.to_text(table).splitlines() == ["c", "name  what    n", "a|b   <x>   1.5", "c     -      10"]
    assert "| :-- | :-- | --: |" in layout.to_markdown(table)
    assert layout.stand_left({"rows": [["x", "9fd60d", "-1.5", "12%", "1.2-3.4", "1,024", "-"]]}) == [True, True] + 5 * [False]
    assert r"a\|b" in layout.to_markdown(table)
    assert '<td style="text-align:left">&lt;x&gt;</td><td style="text-align:right">1.5</td>' in layout.to_html(table)


def test_the_program(tmp_path, capsys):
    """Rounds, a cell that cannot run beside those that can, every file; then it goes on where it was."""
    large = "tiny:model.layers=1000000,model.channels=1024"
    argv = ["--graph", "tiny", large, "--schedulers", "sequential,native", "--workers", "2", "--turn", "0.01s", "--output", str(tmp_path)]
    assert compare([*argv, "--budget", "8s", "--precision", "0.9"]) == 0
    printed = capsys.readouterr()
    assert "bits       the same" in printed.out
    assert "GiB are free; choose a smaller graph or batch" in printed.err
    results = Results.load(tmp_path)
    turns_taken = [len(r.ms) for r in results.found.values()]
    assert [bool(n) for n in turns_taken] == [True, True, False, False]
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scheduler"] for row in rows] == ["sequential", "native"] * 2
    assert float(rows[1]["median_ms"]) == results.measured[1].median
    assert "needs" in rows[2]["failed"]
    page = (tmp_path / "compare.html").read_text()
    assert not re.search(r"""(src|href)=["']?http|@import""", page)
    assert "not measured" in (tmp_path / "compare.md").read_text()
    assert compare([*argv, "--budget", "8s"]) == 2
    assert compare(["--graph", "tiny", *argv[3:], "--budget", "2s", "--precision", "0.0001", "--resume"]) == 0
    assert all(len(r.ms) > before for r, before in zip(Results.load(tmp_path).found.values(), turns_taken[:2], strict=False))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--budget", "soon"], "--budget soon: wanted a time"),
        (["--precision", "2"], "--precision 2: wanted a part"),
        (["--workers", "1,none"], "--workers none: wanted numbers"),
        (["--diff", "a", "b"], "a: no such file; wanted results"),
        (["--diff", "a"], "expected 2 arguments"),
    ],
)
def test_a_mistake_is_told_in_a_line(wrong, message, capsys, tmp_path, monkeypatch):
    """With exit code 2."""
    monkeypatch.chdir(tmp_path)
    try:
        code = compare(["--graph", "tiny", *wrong])
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
