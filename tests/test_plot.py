"""Curves of training runs: what is drawn is what the logs say, in a terminal, as pictures and as pages; whatever the logs are like."""

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from browser import needs_browser, visit
from matplotlib import image

from taskgpt.errors import UserError
from taskgpt.lab.charts import Thinned
from taskgpt.lab.curves import run_log, terminal
from taskgpt.lab.curves.panels import COLOURS, MOST_RUNS, panels, smoothed
from taskgpt.lab.curves.run_log import COLUMNS, Losses, RunLog, read_all
from taskgpt.programs.plot import main
from taskgpt.train import main as train

READY = "document.documentElement.dataset.ready === 'yes'"
BRAILLE = re.compile("[\u2801-\u28ff]")


def record(step: int, loss: float | None, **others) -> dict:
    return {"step": step, "train_loss": loss, "norm": 1.5, "lr": 0.001, "ms": 20.0, "tokens_per_s": 5000.0, **others}


def written(path: Path, steps: int = 100, level: float = 3.0, every: int = 10) -> Path:
    """Write the log of a run of 100 tokens a step, whose loss falls to a level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for step in range(steps):
            if step % every == 0:
                file.write(json.dumps({"step": step, "val_loss": level + 2 / (step + 1)}) + "\n")
            file.write(json.dumps(record(step, level + 3 / (step + 1))) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run's folder, of nine steps."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "<text>.txt").write_text("</script><script>alert(1)</script> & so on. " * 200)
    flags = [
        "--graph",
        "tiny",
        "--workers",
        "2",
        "--data",
        str(folder / "<text>.txt"),
        "--steps",
        "9",
        "--val-every",
        "3",
        "--val-batches",
        "1",
    ]
    assert train([*flags, "--sample-every", "4", "--out", str(folder / "a <b>")]) == 0
    return folder / "a <b>"


@pytest.fixture
def two(tmp_path) -> list[str]:
    """Two runs' folders."""
    return [
        str(written(tmp_path / name / "log.jsonl", steps, level).parent) for name, steps, level in (("high", 100, 3.0), ("low", 60, 2.0))
    ]


def test_the_numbers_are_the_logs(trained, tmp_path, capsys):
    """Of a run that was trained: each loss, norm, rate and speed; and in the table last and best."""
    assert main([str(trained), "--json", str(tmp_path / "n.json")]) == 0
    [run] = json.loads((tmp_path / "n.json").read_text())["runs"]
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    steps = [r for r in records if "train_loss" in r]
    for name, key in (("loss", "train_loss"), ("norm", "norm"), ("lr", "lr"), ("speed", "tokens_per_s")):
        assert run["curves"]["steps"][name] == [r[key] for r in steps]
    assert run["curves"]["steps"]["step"] == list(range(1, 10))
    assert run["curves"]["steps"]["tokens"] == pytest.approx([256 * step for step in range(1, 10)])
    assert run["curves"]["steps"]["seconds"][-1] == pytest.approx(sum(r["ms"] for r in steps) / 1e3)
    assert run["curves"]["validations"]["step"] == [0, 3, 6, 9]
    assert run["curves"]["validations"]["validation"] == [r["val_loss"] for r in records if "val_loss" in r]
    best = min(steps, key=lambda r: r["train_loss"])
    assert (run["train_loss"], run["best_train_loss"], run["best_train_step"]) == (
        steps[-1]["train_loss"],
        best["train_loss"],
        best["step"] + 1,
    )
    assert f"{run['best_val_loss']:.4f}" in capsys.readouterr().out.splitlines()[-2]


def test_a_terminal_shows_lines_and_a_table(two, capsys):
    """Within 80 columns, without an escape where it is a pipe; letters tell runs apart, on their lines and in the table."""
    assert main(two) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out
    assert len(BRAILLE.findall(out)) > 200
    assert [line[:8].split() for line in lines[-2:]] == [["a", "high"], ["b", "low"]]
    drawn = out[: out.index("run ")]
    assert all(re.search(rf"[^a-z]{letter}[^a-z]", drawn) for letter in "ab")
    for title in ("train loss, mean of 2 steps", "validation loss", "gradient norm", "learning rate", "tok/s"):
        assert title in drawn


def test_the_dots_are_where_the_values_are(tmp_path, capsys):
    """A loss that falls in a straight line: from the first row at the left to the last at the right, row by row."""
    log = tmp_path / "line.jsonl"
    log.write_text("\n".join(json.dumps(record(step, 10.0 - step / 10)) for step in range(101)))
    assert main([str(log), "--only", "loss", "--smooth", "1"]) == 0
    rows = [re.split("[┤│]", line, maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[1 : 1 + terminal.TALL]]
    firsts = [BRAILLE.search(row).start() for row in rows]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0
    assert max(len(row.rstrip()) for row in rows) == len(rows[-1].rstrip())


@pytest.mark.parametrize(("columns", "beside"), [("120", True), ("60", False), ("10", False)])
def test_any_width(two, capsys, monkeypatch, columns, beside):
    """Two panels beside each other where they fit; never wider than the terminal, down to 30 columns."""
    monkeypatch.setenv("COLUMNS", columns)
    assert main(two) == 0
    drawn = capsys.readouterr().out.split("\nrun")[0].splitlines()
    assert max(map(len, drawn)) <= max(int(columns), 30)
    assert any("validation loss" in line and "gradient norm" in line for line in drawn) == beside


def test_colours_are_for_terminals(two, capsys, monkeypatch):
    """As plotille heeds FORCE_COLOR and NO_COLOR; of 256 colours, or of all where the terminal says that it has them."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLORTERM", raising=False)
    main(two)
    assert "\x1b[38;5;25m" in capsys.readouterr().out  # the palette's blue, in the cube of 256
    monkeypatch.setenv("COLORTERM", "truecolor")
    main(two)
    assert "\x1b[38;2;0;114;178m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(two)
    assert "\x1b" not in capsys.readouterr().out


def test_a_terminal_without_braille(two, monkeypatch):
    """Gets stars."""
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", latin)
    drawn = terminal.draw(panels(read_all(two), [], "step", None), 80)
    assert not BRAILLE.search(drawn)
    assert drawn.count("*") > 200


def test_what_is_asked_for(two, tmp_path, capsys):
    """--only, --x, --smooth."""
    assert main([*two, "--only", "lr,speed", "--x", "tokens"]) == 0
    out = capsys.readouterr().out
    assert "loss," not in out
    assert re.search(r"10k +tokens", out)
    found = panels(read_all(two), ["loss"], "tokens", 5)
    assert found[0].lines[0].x[-1] == pytest.approx(100 * 100)
    assert panels(read_all(two), ["loss"], "time", 5)[0].along == "seconds"
    raw, line = found[0].lines[:2]
    assert raw.thin
    assert line.y[-1] == pytest.approx(raw.y[-5:].mean())
    assert line.y[2] == pytest.approx(raw.y[:3].mean())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none"], "none: no such run; name the folder of train --out"),
        (["{folder}"], "holds no log.jsonl"),
        (["{folder}/empty.jsonl"], "no step yet"),
        (["{folder}/binary"], "is no log; name a run's folder"),
        (["/dev/zero"], "cannot read"),
        (["{run}", "--only", "los"], "unknown chart 'los'; did you mean 'loss'?"),
        (["{folder}/loss.jsonl", "--only", "norm"], "--only norm: no number of it in loss"),
        (["{folder}/loss.jsonl", "--x", "time"], "no log says how long steps took; choose --x step"),
        (["{run}", "--output", "x.pdf"], "wanted a name that ends in .png, .svg, .html"),
        (["{run}", "--output", "{folder}/none/x.png"], "cannot write"),
        (["{run}", "{folder}/loss.jsonl", "--report", "x.html"], "makes the page of one run, got 2"),
    ],
)
def test_a_mistake_is_one_line(two, tmp_path, capsys, flags, message):
    """With exit code 2."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "loss.jsonl").write_text('{"step": 0, "train_loss": 1.0}\n')
    assert main([flag.format(folder=tmp_path, run=two[0]) for flag in flags]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_a_log_that_is_damaged_or_still_growing(tmp_path, capsys):
    """What is no record is left out, and said; steps that are missing or begin again too; no number is no point."""
    log = written(tmp_path / "log.jsonl", 20)
    whole = log.read_bytes()
    other = [
        b'{"step": true, "train_loss": 1}',
        b'{"step": -1, "train_loss": 1}',
        b"[1]",
        b"\xff{",
        b'{"a": ' * 5000,
        b"{" + b"x" * (3 << 20),
    ]
    log.write_bytes(whole + b"\n".join(other) + b"\n" + json.dumps(record(25, None)).encode() + b"\n" + b'{"step": 26, "train_lo')
    read = RunLog.read(log)
    assert read.count == 21
    assert read.loss.told()["last"] is None
    assert read.loss.told()["best"] == pytest.approx(3 + 3 / 20)
    assert main([str(log)]) == 0
    told = capsys.readouterr().out
    assert "left out 7 lines" in told
    assert "5 steps are missing" in told
    log.write_bytes(whole + whole)
    assert main([str(log)]) == 0
    assert "the steps begin again 1 times" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["1e999", "NaN", "1" * 400, '"x"', "null", "[]", "{}", "true", "-1e308", "-2147483648"])
def test_any_value_is_drawn_or_left_out(tmp_path, value):
    """Text, page and picture."""
    log = tmp_path / "run.jsonl"
    odd = (
        f'{{"step": 1, "train_loss": {value}, "val_loss": {value}, "norm": {value}, "lr": {value}, "ms": {value}, "tokens_per_s": {value}}}'
    )
    summary = f'{{"summary": {{"graph": {value}, "machine": {value}, "workers": {value}, "median_ms": {value}, "disturbance": {value}}}}}'
    log.write_text(json.dumps(record(0, 2.0)) + f"\n{odd}\n" + json.dumps(record(2, 1.0)) + f"\n{summary}\n")
    for kind in ("png", "svg", "html"):
        assert main([str(log), "--output", str(tmp_path / f"x.{kind}"), "--report", str(tmp_path / "r.html")]) == 0
    assert main([str(log), "--json", str(tmp_path / "n.json")]) == 0


def test_one_step(tmp_path, capsys):
    """Is a point, everywhere."""
    log = tmp_path / "run.jsonl"
    log.write_text(json.dumps(record(0, 2.0)) + "\n")
    assert main([str(log)]) == 0
    assert BRAILLE.search(capsys.readouterr().out)
    for kind in ("png", "svg", "html"):
        assert main([str(log), "--output", str(tmp_path / f"x.{kind}")]) == 0


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    """By as much of their paths as that takes; the same run twice is one."""
    logs = [written(tmp_path / name, 2) for name in ("x/run/log.jsonl", "y/run/log.jsonl", "z.jsonl", "z.log")]
    named = [*logs, logs[0].parent, logs[2]]
    assert [log.name for log in read_all(named)] == ["x/run", "y/run", "z", "z.log"]


def test_the_many_runs_have_styles_of_their_own(tmp_path):
    """Colours, then dashes; more than that is refused."""
    logs = [RunLog(tmp_path, str(number)) for number in range(MOST_RUNS + 1)]
    for log in logs:
        log.count = 1
        log.steps.add(*range(len(COLUMNS)))
    [panel, *_] = panels(logs[:-1], ["lr"], "step", None)
    assert len({(line.colour, line.dash) for line in panel.lines}) == MOST_RUNS == 3 * len(COLOURS)
    with pytest.raises(UserError, match="at most 33 runs"):
        panels(logs, [], "step", None)


def test_a_long_log_is_thinned(monkeypatch, tmp_path):
    """To means, least and greatest of bins: a spike of one step in 30,000 stays; best and last are exact, whatever the length."""
    rows = 30_000
    points = Thinned(2, most=1000)
    values = np.random.default_rng(1).normal(3.0, 0.1, rows)
    values[12_345], values[777] = 50.0, math.nan
    for step, value in enumerate(values):
        points.add(step, value)
    assert points.each == 32
    assert points.means().shape == (2, 938)
    assert np.nanmax(points.extremes()[1, 1]) == 50.0
    assert points.counts()[1].sum() == rows - 1
    assert points.means()[1, 0] == pytest.approx(values[:32].mean())
    assert points.means()[1, -1] == pytest.approx(values[-(rows % 32) :].mean())
    assert np.nansum(points.means()[1] * points.counts()[1]) == pytest.approx(np.nansum(values))


def test_smoothed_lines_are_means_of_steps():
    """However many steps a point stands for; bins without a number have none."""
    values = np.random.default_rng(2).normal(size=64)
    exact = [values[max(0, at - 7) : at + 1].mean() for at in range(64)]
    assert smoothed(values, np.ones(64), 8) == pytest.approx(exact)
    bins = values.reshape(16, 4).mean(axis=1)
    assert smoothed(bins, np.full(16, 4.0), 8) == pytest.approx(exact[3::4])
    found = smoothed(np.array([1.0, math.nan, 3.0]), np.array([1.0, 0.0, 1.0]), 5)
    assert (found[0], found[2]) == (1.0, 2.0)
    assert math.isnan(found[1])


def test_losses_as_they_come():
    """First, last and best, with no number where there is none."""
    assert Losses().told() is None
    assert Losses.of([(0, math.nan)]).told() == {"first": None, "last": None, "best": None, "best_step": None}
    assert Losses.of([(0, 3.0), (1, 1.0), (2, math.inf)]).told() == {"first": 3.0, "last": None, "best": 1.0, "best_step": 1}


def test_pictures(two, tmp_path):
    """A PNG that opens, with the first run's blue in it; an SVG that is XML, light and dark, with its names as text."""
    assert main([*two, "--output", str(tmp_path / "c.png")]) == 0
    pixels = image.imread(tmp_path / "c.png")[..., :3]
    assert (np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(axis=2) < 0.02).sum() > 500
    assert main([*two, "--output", str(tmp_path / "c.svg")]) == 0
    text = (tmp_path / "c.svg").read_text()
    root = ElementTree.fromstring(text)
    words = {"".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"high", "low", "validation loss", "learning rate"} <= words
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text


@pytest.fixture
def page(two, tmp_path, trained) -> Path:
    """Curves of three runs, one of which has a name that would be HTML."""
    assert main([*two, str(trained), "--output", str(tmp_path / "c.html")]) == 0
    return tmp_path / "c.html"


def test_the_page_is_one_file(page):
    """Nothing comes from elsewhere, and no name is read as HTML."""
    text = page.read_text()
    assert not re.search(r"""(src|href)=|@import|url\(""", text)
    assert "a &lt;b&gt;" in text
    assert "a <b>" not in text
    charts = json.loads(re.search(r'type="application/json">(.*?)</script>', text).group(1))["charts"]
    assert [chart["caption"].split(",")[0].split(";")[0] for chart in charts] == [
        "train loss",
        "validation loss",
        "gradient norm",
        "learning rate",
        "tok/s",
    ]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280])
def test_the_page_in_any_window(page, tmp_path, scheme, width):
    """Inside the window, in the system's scheme, a legend of the runs at each chart; no error in the console (visit looks)."""
    js = """[document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor,
      [...document.querySelectorAll('figure')].map(figure => figure.querySelectorAll('.key').length),
      [...document.querySelectorAll('#charts svg')].every(svg => svg.getBoundingClientRect().right <= innerWidth),
      document.querySelectorAll('polyline').length]"""
    found, _ = visit(page.as_uri(), READY, js, tmp_path, f"{width},900", scheme)
    assert found == [True, {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme], [3] * 5, True, 6 + 3 + 6 + 3 + 6]


@needs_browser
def test_a_pointer_reads_the_runs(page, tmp_path):
    """The smoothed loss of each, and its validation; not each step behind them."""
    js = """(() => {
      const [chart] = charts;
      chart.svg.dispatchEvent(new PointerEvent("pointermove", { clientX: chart.svg.getBoundingClientRect().left + chart.x(8) }));
      return chart.now.textContent;
    })()"""
    told, _ = visit(page.as_uri(), READY, js, tmp_path)
    parts = told.split(" · ")
    assert [part.partition(",")[0] for part in parts] == ["high", "high validation", "low", "low validation", "a <b>", "a <b> validation"]
    assert parts[0] == f"high, step 8: {3 + (3 / 7 + 3 / 8) / 2:.4f}"


@needs_browser
def test_the_picture_in_a_dark_window(two, tmp_path):
    """Its ground is dark and its ink is light; it is no wider than the window."""
    assert main([*two, "--output", str(tmp_path / "c.svg")]) == 0
    js = """[getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.documentElement).color,
      document.documentElement.getBoundingClientRect().width <= innerWidth]"""
    found, _ = visit((tmp_path / "c.svg").as_uri(), "document.documentElement.tagName === 'svg'", js, tmp_path, "480,900", "dark")
    assert found == ["rgb(13, 17, 23)", "rgb(230, 237, 243)", True]


def test_the_page_of_a_finished_run(trained, tmp_path):
    """Has what the log has, and the command of its folder; neither kernels nor efficiency, and it says so."""
    assert main([str(trained), "--report", str(tmp_path / "run.html")]) == 0
    text = (tmp_path / "run.html").read_text()
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    charts = json.loads(re.search(r'type="application/json">(.*?)</script>', text).group(1))["charts"]
    assert charts[0]["lines"][0]["points"] == [[r["step"] + 1, r["train_loss"]] for r in records if "train_loss" in r]
    assert charts[0]["lines"][1]["points"] == [[r["step"], r["val_loss"]] for r in records if "val_loss" in r]
    assert [chart["caption"] for chart in charts] == ["loss", "tokens a second", "gradient norm", "learning rate"]
    assert re.findall(r"after (\d+) steps", text) == ["9", "8", "4"]
    assert records[-1]["summary"]["parameters_sha256"] in text
    assert "taskgpt train --graph=tiny" in text
    assert "neither kernels nor parallel efficiency" in text
    assert "<h2>Kernels" not in text
    assert "<text>" not in text
    assert not re.search(r"<!--[A-Z]+-->", text)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280])
def test_that_page_in_any_window(trained, tmp_path, scheme, width):
    """As the page of train --report is."""
    assert main([str(trained), "--report", str(tmp_path / "run.html")]) == 0
    js = "[document.documentElement.scrollWidth <= innerWidth, document.querySelectorAll('#charts svg').length]"
    found, _ = visit((tmp_path / "run.html").as_uri(), READY, js, tmp_path, f"{width},900", scheme)
    assert found == [True, 4]


def test_the_page_of_a_run_that_goes_on(tmp_path):
    """Has no summary, and says so."""
    log = written(tmp_path / "run.jsonl", 5)
    assert main([str(log), "--report", str(tmp_path / "run.html")]) == 0
    text = (tmp_path / "run.html").read_text()
    assert "the log has no summary: the run goes on" in text
    assert "<b>5,000</b><span>tokens a second" in text


def test_memory_does_not_grow_with_the_log(tmp_path, monkeypatch):
    """Of 200,000 lines at most 2,000 points of each line are kept, and no line of the log."""
    log = tmp_path / "run.jsonl"
    line = json.dumps(record(0, 2.0)).replace('"step": 0', '"step": %d')
    log.write_text("\n".join(line % step for step in range(200_000)))
    read = RunLog.read(log)
    assert read.count == 200_000
    assert read.steps.each == 128
    assert read.steps.means().shape == (len(COLUMNS), 1563)
    assert read.notes == []
    assert read.steps.means()[COLUMNS.index("tokens"), -1] == pytest.approx(100 * 200_000, rel=0.001)
    assert not [value for value in vars(read).values() if isinstance(value, list) and len(value) > run_log.MOST_SAMPLES]
