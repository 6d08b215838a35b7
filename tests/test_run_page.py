"""The page of a training run, in a real browser: what it shows is what ran, from one file, light and dark, wide and narrow."""

import json
import re

import pytest
from browser import needs_browser, visit

from taskgpt.errors import UserError
from taskgpt.lab import run_page
from taskgpt.lab.dashboard.live import Live
from taskgpt.train import main

TINY = ["--graph", "tiny", "--workers", "2", "--val-batches", "1"]
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of seven steps with its page and its log; the text that it learns from would end a script, and begin another."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "<text>.txt").write_text("</script><script>alert(1)</script> & so on. " * 200)
    flags = ["--data", str(folder / "<text>.txt"), "--steps", "7", "--val-every", "3", "--sample-every", "4"]
    assert main([*TINY, *flags, "--report", str(folder / "run.html"), "--log", str(folder / "log.jsonl")]) == 0
    return folder


def test_the_page_has_what_the_log_has(folder):
    """Losses of every step and validation, the last sample first, the hash, the command."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    page = (folder / "run.html").read_text()
    loss, speed, efficiency = json.loads(re.search(r'type="application/json">(.*?)</script>', page).group(1))["charts"]
    train, validation = (line["points"] for line in loss["lines"])
    assert train == [[r["step"] + 1, r["train_loss"]] for r in records if "train_loss" in r]
    assert validation == [[r["step"], r["val_loss"]] for r in records if "val_loss" in r]
    assert [step for step, _ in validation] == [0, 3, 6, 7]
    assert [value for _, value in speed["lines"][0]["points"]] == [r["tokens_per_s"] for r in records if "train_loss" in r]
    assert all(0 < value <= 1.01 for _, value in efficiency["lines"][0]["points"])
    assert re.findall(r"after (\d+) steps", page) == ["7", "4"]
    assert "matmul_forward" in re.findall(r'<th scope="row">(\w+)</th>', page)
    assert sum(float(share) for share in re.findall(r"<td>([\d.]+)%</td>", page)) == pytest.approx(100, abs=1)
    assert records[-1]["summary"]["parameters_sha256"] in page
    assert "taskgpt train --graph tiny" in page


def test_the_page_is_one_file(folder):
    """Nothing comes from elsewhere, and nothing of a user's own is read as HTML."""
    page = (folder / "run.html").read_text()
    assert not re.search(r"""(src|href)=|@import|url\(|alert\(1\)</script>""", page)
    assert "&lt;text&gt;.txt" in page
    assert "<text>" not in page
    assert not re.search(r"<!--[A-Z]+-->", page)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280])
def test_it_draws_in_any_window(folder, tmp_path, scheme, width):
    """Lines, dots and bars, inside the window; the system's scheme; no error in the console (visit looks)."""
    js = """[document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor,
      [...document.querySelectorAll('polyline')].map(line => line.points.length), document.querySelectorAll('circle').length,
      [...document.querySelectorAll('#charts svg')].every(svg => svg.getBoundingClientRect().right <= innerWidth),
      Math.max(...[...document.querySelectorAll('#kernels i')].map(bar => bar.getBoundingClientRect().width)) > innerWidth / 5]"""
    found, _ = visit((folder / "run.html").as_uri(), READY, js, tmp_path, f"{width},900", scheme)
    assert found == [True, {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme], [7, 4, 7, 7], 4, True, True]


@needs_browser
def test_a_pointer_reads_values(folder, tmp_path):
    """Of the step that it is nearest to, of each line; when it leaves, they go."""
    js = """(() => {
      const [chart] = charts, tell = (kind, x) => chart.svg.dispatchEvent(new PointerEvent(kind, { clientX: x }));
      tell("pointermove", chart.svg.getBoundingClientRect().left + chart.x(5)); const near = chart.now.textContent;
      tell("pointerleave", 0); return [near, chart.now.textContent];
    })()"""
    (near, after), _ = visit((folder / "run.html").as_uri(), READY, js, tmp_path)
    assert re.fullmatch(r"train, step 5: \d\.\d+ · validation, step 6: \d\.\d+", near)
    assert after == ""


@needs_browser
def test_one_step_and_no_number(tmp_path):
    """A run that diverged at once has a page too: a point, and no line where there is no number."""
    live = Live(1, "one <step>", steps=[(0, float("nan"), 100.0, 0.5)], validations=[(0, 5.5)])
    told = {"first": None, "last": None, "best": None, "best_step": None}
    summary = {"train_loss": told, "val_loss": None, "steps": 1, "median_ms": 1.0, "tokens_per_s": 1.0, "share_of_sgemm": 1.0, "workers": 1}
    summary |= {"peak_memory_bytes": 1, "data": "", "parameters_sha256": "", "scheduler": {}, "machine": {}}
    summary |= {"graph": {name: {} for name in ("model", "batch", "tiles", "options")}}
    summary |= {"disturbance": {"other_cores": 0.0, "cores": 1, "variables": {}}}
    run_page.write(tmp_path / "run.html", live, summary, "taskgpt train")
    assert "no number" in (tmp_path / "run.html").read_text()
    js = "[document.querySelectorAll('circle').length, document.querySelector('#charts svg').textContent.includes('NaN')]"
    found, _ = visit((tmp_path / "run.html").as_uri(), READY, js, tmp_path)
    assert found == [3, False]


def test_a_page_is_for_a_run_that_did_a_step(folder, tmp_path, capsys):
    """An earlier one stays; that none can be written is said before the work."""
    page = tmp_path / "run.html"
    page.write_text("earlier")
    flags = [*TINY, "--data", str(folder / "<text>.txt"), "--val-every", "0", "--sample-every", "0"]
    assert main([*flags, "--steps", "0", "--report", str(page)]) == 0
    assert f"no step ran; {page} stays as it was" in capsys.readouterr().out
    assert page.read_text() == "earlier"
    assert main([*flags, "--steps", "0", "--report", str(tmp_path / "new.html")]) == 0
    assert f"no step ran; {tmp_path / 'new.html'} was not written" in capsys.readouterr().out
    assert main([*flags, "--steps", "1", "--report", str(tmp_path / "none" / "run.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_page_that_finds_no_room_costs_nothing_else(folder, tmp_path, capsys, monkeypatch):
    """The trace is written, and the exit code and a line say what is missing."""

    def full(*_):
        raise UserError("run.html: the disk is full")

    monkeypatch.setattr(run_page, "write", full)
    flags = [*TINY, "--data", str(folder / "<text>.txt"), "--steps", "1", "--val-every", "0", "--sample-every", "0"]
    assert main([*flags, "--report", str(tmp_path / "run.html"), "--trace", str(tmp_path / "t")]) == 2
    shown = capsys.readouterr()
    assert "the disk is full" in shown.err
    assert "parameters sha256" in shown.out
    assert (tmp_path / "t" / "trace.npz").exists()
