"""Comparisons: which cells there are, turns that survive what a cell does, statistics, reports, and the program from end to end."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
from browser import needs_browser, visit
from programs import started

from taskgpt import palette
from taskgpt.errors import UserError
from taskgpt.files import fill
from taskgpt.lab import layout
from taskgpt.lab.contests import compare_report
from taskgpt.lab.contests.cells import Cell, product_of
from taskgpt.lab.contests.figures import figures
from taskgpt.lab.contests.results import Results
from taskgpt.lab.contests.turns import FACTORS, CellFailed, First, Turns, Watched
from taskgpt.lab.report import median_interval, seconds_in
from taskgpt.lab.traces.idle import CAUSES
from taskgpt.programs.compare import main as compare


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
    assert all(fill(Cell, json.loads(json.dumps(dataclasses.asdict(cell))), "") == cell for cell in cells)


def test_a_set_up_of_sequential_is_sequential(tmp_path):
    """Whatever its file is called: speedups are over it."""
    path = tmp_path / "mine.toml"
    path.write_text('scheduler = "sequential"')
    cells = product_of(["tiny"], [], [str(path), "sequential", "native", "whole-tensor"], [1], [])
    assert [cell.is_sequential for cell in cells] == [True, True, False, False]


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
    assert found["native"].sha256 == found["loops"].sha256 == found["sequential"].sha256 != found["whole-tensor"].sha256
    assert found["whole-tensor"].loss == pytest.approx(found["sequential"].loss, abs=1e-5)
    factors = found["native"].trace.efficiency
    product = factors["load balance"] * factors["dependency efficiency"] * factors["scheduling efficiency"]
    assert factors["parallel efficiency"] == pytest.approx(product)
    assert found["native"].trace.steps == 2
    assert turns.timed(one("native"), 3) > 0


def test_a_cell_that_kills_its_process_does_not_take_the_others_along(turns):
    """The next one gets a new process, with the same bits."""
    before = turns.first(one("sequential"), 1)
    os.kill(turns._bench.pid, signal.SIGKILL)
    with pytest.raises(CellFailed, match="its process died of SIGKILL"):
        turns.timed(one("sequential"), 1)
    assert turns.first(one("sequential"), 1).sha256 == before.sha256


def test_a_signal_leaves_results_to_go_on_with(tmp_path):
    """SIGTERM in the middle of a round: exit code 143, one line, files whole, no turn lost that was saved."""
    argv = ["--graph", "tiny", "--schedulers", "native", "--workers", "1", "--turn", "0.01s", "--precision", "0.000001"]
    command = [sys.executable, "-m", "taskgpt", "compare", *argv, "--output", str(tmp_path)]
    with started(command, stdout=subprocess.DEVNULL) as process:
        while not ((tmp_path / "compare.json").exists() and Results.load(tmp_path).measured):
            assert process.poll() is None
            time.sleep(0.2)
        process.terminate()
        said = process.communicate()[1]
    assert process.returncode == 143
    assert said.splitlines()[-1] == f"taskgpt compare: interrupted; {tmp_path} holds what was measured, go on with --resume"
    assert Results.load(tmp_path).measured
    assert (tmp_path / "compare.html").read_text().endswith("</html>\n")


def test_a_cell_that_hangs_is_given_up(tmp_path):
    """After the limit, in a message."""
    with Turns(limit_s=0.001) as impatient, pytest.raises(CellFailed, match="gave no answer"):
        impatient.timed(one("sequential"), 1)


@pytest.mark.parametrize(("n", "ranks"), [(1, None), (5, None), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (100, (40, 61))])
def test_the_medians_interval_is_that_of_the_sign_test(n, ranks):
    """As in tables of it: it holds 95 % by the binomial distribution, one rank less on each side does not; nor do fewer than six values."""
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


WATCHED = Watched(12.0, dict.fromkeys(FACTORS, 0.9), dict.fromkeys(CAUSES, 1.0), 10.0, 4, 10.0, 5.0)


def made_up(folder, ms: dict[str, list[float]], sha256: dict[str, str] | None = None) -> Results:
    """Return results of tiny under these schedulers."""
    results = Results.begin(str(folder), [one(name, workers=2) for name in ms], resume=False)
    for result, (name, values) in zip(results.found.values(), ms.items(), strict=True):
        result.ms, result.steps = values, 3
        result.first = First(1.0, (sha256 or {}).get(name, "aa" * 32), 10)
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
    with pytest.raises(UserError, match="no such file"):
        Results.load(tmp_path / "nowhere")


def change(saved: dict, path: str, value: object) -> None:
    """Put a value where `cells.0.steps` says."""
    *above, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in above:
        saved = saved[part]
    saved[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("taskgpt_compare", 2, "results of version 2, and this taskgpt reads 1"),
        ("taskgpt_compare", None, "no results of `taskgpt compare`"),
        ("taskgpt_compare", True, "taskgpt_compare: wanted int, got True"),
        ("machine", [], "machine: wanted dict, got []"),
        ("machine.cores", 2, "machine.cores: wanted str, got 2"),
        ("cells", {}, "cells: wanted list, got {}"),
        ("cells.0", [], "cells[0]: wanted a table, got []"),
        ("cells.0.cell.graph", "tinny", "unknown graph 'tinny'; did you mean 'tiny'?"),
        ("cells.0.cell.tiles", [["rows", "64", "1"]], "cells[0].cell.tiles[0]: wanted tuple, got ['rows', '64', '1']"),
        ("cells.0.cell.tiles", [["rows", "0"]], "tiles.rows: wanted at least 1, got 0"),
        ("cells.0.cell.scheduler", "nativ", "unknown scheduler 'nativ'"),
        ("cells.0.cell.settings", [["policy", "none"]], "policy: unknown key"),
        ("cells.0.cell.workers", 10**9, "cells[0].cell.workers: wanted at most 4,096"),
        ("cells.1.cell", {"graph": "tiny", "tiles": [], "scheduler": "sequential", "settings": [], "workers": 1}, "stands there twice"),
        ("cells.0.first", {"loss": 1.0}, "cells[0].first.sha256: missing"),
        ("cells.0.first.loss", "nan", "cells[0].first.loss: wanted a finite number or nothing"),
        ("cells.0.first.sha256", None, "cells[0].first.sha256: wanted str, got None"),
        ("cells.0.first.trace.efficiency", {}, "cells[0].first.trace: wanted parallel efficiency"),
        ("cells.0.first.trace.idle_ms.barrier", 1e300, "cells[0].first.trace: wanted times and efficiencies that can be"),
        ("cells.0.first.trace.steps", 0, "cells[0].first.trace.steps: wanted at least 1"),
        ("cells.0.steps", 10**9, "cells[0].steps: wanted at most 2,000"),
        ("cells.0.ms", [-1.0], "cells[0]: ms: wanted times of a step above 0"),
        ("cells.0.ms", [10**400], "cells[0].ms[0]: wanted a finite number, got "),
        ("cells.0.depth", 1, "cells[0].depth: unknown key"),
        ("cells.0.failed", None, "cells[0].failed: wanted str, got None"),
    ],
)
def test_damaged_results_are_refused_at_the_door(path, value, message, tmp_path, capsys):
    """By `--diff` and by `--resume`: exit code 2, and one line that names the file, the place, what was wanted and what is there."""
    results = made_up(tmp_path, {"sequential": [1.0], "native": [1.0]})
    for result in results.found.values():
        result.first.trace = WATCHED
    results.save()
    saved = json.loads((tmp_path / "compare.json").read_text())
    change(saved, path, value)
    (tmp_path / "compare.json").write_text(json.dumps(saved))
    for argv in (["--diff", str(tmp_path), str(tmp_path)], ["--graph", "tiny", "--resume", "--output", str(tmp_path)]):
        assert compare(argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "compare.json: " in line
        assert message in line
        assert len(line) < 600


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "NaN", '{"a":' * 5000, '{"taskgpt_compare": 1, "taskgpt_compare": 1}'])
def test_what_is_no_json_is_refused_too(text, tmp_path):
    """Whatever stands in the file."""
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(UserError, match=r"compare\.json: "):
        Results.load(tmp_path)


def test_a_loss_that_is_no_number_is_kept(tmp_path):
    """As null, which JSON has, and tables say so."""
    results = made_up(tmp_path, {"native": [1.0]})
    next(iter(results.found.values())).first.loss = None
    results.save()
    assert Results.load(tmp_path).measured[0].first.loss is None
    assert "no number" in str(compare_report.tables(results))


def test_speedups_have_one_base_or_there_are_none(tmp_path):
    """Without sequential, a scheduler that is slower everywhere stands above, in ms; each one's own fewest workers are no base."""
    cells = product_of(["tiny"], [], ["sequential", "loops", "native"], [1, 2], [])
    ms = {("sequential", 1): 30.0, ("loops", 1): 60.0, ("loops", 2): 20.0, ("native", 1): 20.0, ("native", 2): 15.0}
    for wanted, measured in (
        ("Speedup over the fastest sequential, 30 ms", cells),
        ("In ms a step: no sequential was measured", cells[1:]),
    ):
        results = Results.begin(str(tmp_path / str(len(measured))), measured, resume=False)
        for cell, result in results.found.items():
            result.ms = [ms[cell.scheduler, cell.workers]] * 6
        [svg] = [svg for _, caption, svg in figures(results) if wanted in caption]
        has_base = "speedup over sequential" in svg
        assert has_base == (measured is cells)
        assert ("ideal" in svg) == has_base
        [table] = [table for table in compare_report.tables(results) if table["caption"].startswith("a training step")]
        assert ("speedup" in table["head"]) == ("over the fastest sequential" in table["caption"]) == has_base


def test_too_few_turns_tell_no_interval(tmp_path):
    """Five turns: `not known yet` in every table, nothing in CSV, no line in the picture, no change beyond noise; six tell one."""
    few = made_up(tmp_path / "few", {"sequential": [10.0, 11.0, 12.0, 13.0, 14.0]})
    more = made_up(tmp_path / "more", {"sequential": [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]})
    [result] = few.found.values()
    assert result.interval is None
    assert not result.is_tight(0.99)
    csv_path, markdown, page = compare_report.write(few)
    with open(csv_path, newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["median_ms"], row["low_ms"], row["high_ms"]) == ("12.0", "", "")
    for text in (markdown.read_text(), page.read_text(), layout.to_text(compare_report.tables(few)[0])):
        assert "not known yet" in text
        assert "fewer than 6 turns" in text
        assert "with 95 % confidence" not in text
    assert "0 of 1 medians are known; 1 had fewer than 6 turns" in page.read_text()
    assert compare_report.changes_table(few, more)["rows"][0][6] == "not known yet"
    assert "20.00-25.00" in layout.to_text(compare_report.tables(more)[0])
    assert "1 of 1 medians are known, to 11.1% at best" in compare_report.write(more)[2].read_text()


def test_every_picture_that_has_something_to_show(tmp_path):
    """Times, workers' time, scaling, tiles and settings: each is SVG by itself, and the same every time."""
    cells = product_of(["tiny"], ["rows=64,128", "columns=32,64"], ["sequential", "native"], [1, 2], ["policy=oldest_first,newest_first"])
    results = Results.begin(str(tmp_path), cells, resume=False)
    for at, r in enumerate(results.found.values()):
        r.ms, r.first = [float(10 + at)] * 6, First(1.0, "", 1, WATCHED)
    found = figures(results)
    titles = " ".join(title for title, *_ in found)
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
    for *_, svg in found:
        names += {e.get("id") for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("clipPath")}
    assert len(names) == len(set(names))


def test_variants_of_a_scheduler_have_colours_of_their_own(tmp_path):
    """The first has the scheduler's, which is the same in every picture of the page."""
    cells = product_of(["tiny"], [], ["loops", "native"], [1, 2], ["policy=oldest_first,newest_first"])
    results = Results.begin(str(tmp_path), cells, resume=False)
    for r in results.found.values():
        r.ms = [10.0] * 6
    times, scaling = (svg for title, _, svg in figures(results) if "median" in title or "scaling" in title)
    labels = dict.fromkeys(r.cell.label for r in results.measured)
    for svg in (times, scaling):
        found = set(re.findall(r"fill: (#\w{6})", svg)) & {colour.lower() for colour in palette.COLOURS}
        assert {palette.ORANGE.lower(), palette.BLUE.lower()} <= found and len(found) == len(labels) == 3


def test_pictures_take_the_pages_colour_of_text(tmp_path):
    """Nothing is black or white but what is written on colours, so that they are read on dark pages; axes say what they show."""
    cells = product_of(["tiny"], [], ["sequential", "native"], [1, 2], [])
    results = Results.begin(str(tmp_path), cells, resume=False)
    for at, r in enumerate(results.found.values()):
        r.ms, r.first = [float(10 + at)] * 6, First(1.0, "", 1, WATCHED)
    for picture, axis in zip(figures(results), ("ms a step", "all workers' time", "workers"), strict=True):
        texts = [e for e in ElementTree.fromstring(picture.svg).iter() if e.tag.endswith("}text")]
        assert all("currentColor" in e.get("style", "") for e in texts)
        assert axis in {e.text for e in texts}
        assert not re.search(r"(fill|stroke): #(000000|ffffff)", picture.svg)
        assert picture.caption.endswith(".")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280])
def test_the_page_fits_and_follows_the_system(scheme, width, tmp_path):
    """Nothing is wider than the window but what scrolls by itself; light or dark as the system is; no error in the console."""
    *_, page = compare_report.write(made_up(tmp_path, {"sequential": [10.0] * 6, "native": [5.0] * 6}))
    js = "[document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor]"
    value, _ = visit(page.as_uri(), "document.querySelectorAll('figure svg').length > 0", js, tmp_path, f"{width},900", scheme)
    assert value == [True, {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]]


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
    large = "tiny:model.channels=1048576,tiles.columns=1048576"
    argv = ["--graph", "tiny", large, "--schedulers", "sequential,native", "--workers", "2", "--turn", "0.01s", "--output", str(tmp_path)]
    assert compare([*argv, "--budget", "90s", "--precision", "0.9"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^medians    2 of 4 are known to 90.0%; 2 could not be run$", printed.out, re.MULTILINE)
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
    for result in results.measured:
        del result.ms[2:]
    results.save()
    assert compare(["--graph", "tiny", *argv[3:], "--budget", "90s", "--precision", "0.9", "--resume"]) == 0
    resumed = Results.load(tmp_path)
    assert all(len(r.ms) >= 6 for r in resumed.measured)
    assert [r.ms[:2] for r in resumed.measured] == [r.ms for r in results.measured]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--budget", "soon"], "--budget soon: wanted a time"),
        (["--precision", "2"], "--precision 2: wanted a part"),
        (["--workers", "1,none"], "--workers none: wanted a number"),
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
