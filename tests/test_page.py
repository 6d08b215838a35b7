"""The page of a trace, in a real browser: it draws, from disk, without a network, and says what a task read, wrote and waited for."""

import dataclasses
import html
import itertools
import json
import re
import subprocess
from xml.etree import ElementTree

import kernels_for_tests as k
import numpy as np
import pytest
from browser import BROWSER, needs_browser, visit
from test_efficiency import hand_made
from test_trace import traced

from taskgpt import palette
from taskgpt.lab.traces import page, timeline
from taskgpt.lab.traces.efficiency import longest_path
from taskgpt.lab.traces.trace import RUN_TYPE, Trace


def opened(url: str, *flags: str) -> str:
    """Return the document as the browser has it when the page is ready."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,600", *flags, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
def test_a_page_opens_from_disk(tmp_path):
    """Two traces, tables, and a task chosen in the address: shown with its call, its time and its neighbours."""
    traces = [traced("loops"), traced("native")]
    table = {"caption": "efficiency", "head": ["what", "value"], "rows": [["load balance", "0.97"]]}
    page.write(traces, tmp_path / "page.html", "loops & native </script>", [table])
    record = traces[1].records[20]
    graph = traces[1].graphs[traces[1].runs["graph"][record["run"]]]
    document = opened(f"{(tmp_path / 'page.html').as_uri()}#1:20")
    assert 'data-ready="yes"' in document
    assert "<td>load balance</td><td>0.97</td>" in document
    detail = html.unescape(re.search(r'id="detail"[^>]*>(.*?)</div>', document, re.DOTALL).group(1))
    task = record["task"]
    assert graph.calls[task] in detail
    for p in graph.predecessors[graph.first[task] : graph.first[task + 1]]:
        assert f"{p} {graph.kernels[graph.kernel[p]]}" in detail
    assert "http" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)


@needs_browser
def test_a_page_shows_what_the_next_run_waits_for(tmp_path):
    """Of a task at the end of a run: tasks of the next one, which are drawn too; of runs that are not shown nothing is said."""
    trace = traced("native", order=(0, 0))
    page.write([trace, trace.without_first(1)], tmp_path / "page.html", "native")
    a, b = trace.edges[0, 0][0].tolist()
    rows = trace.records[["run", "task"]].tolist()
    before, after, first = rows.index((0, a)), rows.index((1, b)), trace.without_first(1).records["task"].tolist().index(b)
    name, kernel = trace.graphs[0].name, trace.graphs[0].kernels
    shown = "(choose({ trace: page.traces[at], i }), document.getElementById('detail').textContent)"
    js = f"[[0, {before}], [0, {after}], [1, {first}]].map(([at, i]) => {shown})"
    awaited, waits, alone = evaluated(tmp_path / "page.html", js, tmp_path)
    assert re.search(rf"awaited by: .*of {name} 1: .*\b{b} {kernel[trace.graphs[0].kernel[b]]}", awaited)
    assert re.search(rf"waits for: .*of {name} 0: .*\b{a} {kernel[trace.graphs[0].kernel[a]]}", waits)
    assert f"of {name} 0" not in alone.split("awaited by")[0].split("waits for")[1]


@needs_browser
def test_a_page_draws_its_tasks(tmp_path):
    """The picture has the colours of kernels, not an empty canvas."""
    matplotlib = pytest.importorskip("matplotlib.image")
    trace = traced("native")
    page.write([trace], tmp_path / "page.html", "native")
    opened((tmp_path / "page.html").as_uri(), f"--screenshot={tmp_path / 'page.png'}")
    picture = (np.asarray(matplotlib.imread(tmp_path / "page.png"))[..., :3] * 255).round().astype(int)
    colours = palette.of_kernels(trace.names("kernel")).values()
    wanted = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in colours]
    drawn = sum((abs(picture - colour) <= 8).all(axis=2).sum() for colour in wanted)
    assert drawn > 300 + 121 * len(wanted)  # a square of 11 pixels in the legend


@needs_browser
def test_a_page_shows_the_longest_path(tmp_path):
    """A button outlines its tasks, which are those of the report, one after the other."""
    trace = traced("native")
    page.write([trace], tmp_path / "page.html", "native")
    js = "(document.getElementById('path').click(), JSON.stringify(page.traces[0].path.map(i => page.traces[0].task[i])))"
    value, _ = visit((tmp_path / "page.html").as_uri(), "document.documentElement.dataset.ready === 'yes'", js, tmp_path)
    found = longest_path(trace)
    assert json.loads(value) == [task["task"] for task in found["path"]]
    assert len(found["path"]) > 5


def evaluated(path, js: str, folder) -> object:
    """Return what the page's JavaScript makes of an expression."""
    value, _ = visit(path.as_uri(), "document.documentElement.dataset.ready === 'yes'", f"JSON.stringify({js})", folder)
    return json.loads(value)


@needs_browser
def test_the_legend_has_what_is_drawn(tmp_path):
    """Kernels of a family once, in the palette's colour; not those that no task of these runs has."""
    trace = hand_made([(0, 100 * n, 100 * n, 100 * n + n + 1, []) for n in range(3)], workers=1)
    graph = trace.graphs[0]
    graph.kernels[:] = ["matmul_forward", "matmul_gelu_forward", "gelu_backward", "layernorm_forward"]
    graph.kernel[:] = np.arange(3)
    page.write([trace], tmp_path / "page.html", "three kernels")
    js = "[...document.querySelectorAll('#legend > *')].map(s => [s.textContent, s.style.getPropertyValue('--c')])"
    found = evaluated(tmp_path / "page.html", js, tmp_path)
    assert found == [["matmul", palette.BLUE], ["gelu backward", palette.of_kernels(["gelu_backward"])["gelu_backward"]]]


@needs_browser
def test_the_longest_paths_of_all_traces_are_in_view(tmp_path):
    """Each counts from its own beginning, and the second one's is late."""
    late = [(0, 1000 * n, 1000 * n, 1000 * n + 10, []) for n in range(9)] + [(0, 9000, 9000, 9900, [])]
    page.write([hand_made([(0, 0, 0, 500, [])], 1), hand_made(late, 1)], tmp_path / "page.html", "two")
    begin, end = evaluated(tmp_path / "page.html", "(document.getElementById('path').click(), [t0, t1])", tmp_path)
    assert begin <= 0
    assert end >= 9900


@needs_browser
def test_the_longest_path_is_that_of_one_step(tmp_path):
    """Of each trace: its own run is at the beginning, and the view is no longer than the longest of these paths, and a margin."""
    traces = [traced("loops", order=(0, 0, 0)), traced("native", order=(0, 0, 0))]
    page.write(traces, tmp_path / "page.html", "two")
    begin, end, shifts = evaluated(
        tmp_path / "page.html", "(document.getElementById('path').click(), [t0, t1, page.traces.map(t => t.shift)])", tmp_path
    )
    spans = []
    for trace, shift in zip(traces, shifts, strict=True):
        found = longest_path(trace)
        run = trace.runs[found["run"]]
        assert shift == run["begin_ns"] - trace.begin_ns
        spans.append(run["end_ns"] - run["begin_ns"])
    assert end - begin <= 1.05 * max(spans)


@needs_browser
def test_traces_are_aligned_at_a_step(tmp_path):
    """Of which one begins late: it is drawn at the same place in both, and what a click finds there is a task of it."""
    early = hand_made([(0, 100, 100, 200, []), (0, 300, 300, 400, [])], workers=1)
    late = hand_made([(0, 5100, 5100, 5200, []), (0, 7300, 7300, 7400, [])], workers=1)
    traces = []
    for trace, begins in ((early, (100, 300)), (late, (5100, 7300))):
        runs = np.array([(0, 2 + n, begin, begin + 150, n) for n, begin in enumerate(begins)], RUN_TYPE)
        trace.records["run"] = np.arange(2)
        traces.append(Trace(trace.about, trace.graphs, runs, trace.records))
    page.write(traces, tmp_path / "page.html", "two")
    js = """(() => {
      alignAt("3"); draw();
      const box = canvas.getBoundingClientRect();
      return page.traces.map(trace => {
        const found = under({ clientX: box.left + x(trace, trace.start[1]) + 2, clientY: box.top + rowTop(trace, 0) + 5 });
        return [x(trace, trace.start[1]), page.traces.indexOf(found.trace), found.i];
      });
    })()"""
    (one, *first), (other, *second) = evaluated(tmp_path / "page.html", js, tmp_path)
    assert one == pytest.approx(other)
    assert (first, second) == ([0, 1], [1, 1])


@needs_browser
def test_a_gap_says_its_cause(tmp_path):
    """Why the worker idled, what it ran next, and which task that had waited for."""
    tasks = [(0, 0, 0, 1000, []), (1, 0, 0, 400, []), (1, 1000, 1200, 2000, [0])]  # ready at 1000, begun at 1200
    page.write([hand_made(tasks, 2)], tmp_path / "page.html", "a gap")
    js = """(() => {
      draw();
      const trace = page.traces[0], box = canvas.getBoundingClientRect();
      choose(under({ clientX: box.left + x(trace, 700), clientY: box.top + rowTop(trace, 1) + 5 }));
      return document.getElementById("detail").textContent;
    })()"""
    text = evaluated(tmp_path / "page.html", js, tmp_path)
    assert text.startswith("idle for 0.80 µs from 0.40 µs\n")
    shares = {cause: int(share) for share, cause in re.findall(r"(\d+) % (\w+): ", text)}
    assert shares == {"dependency": 88, "scheduling": 13}  # 700 of 800, as worker 0 idles too in the last 200, and they share these
    assert "then: task 2" in text
    assert "for task 0" in text and "on worker 0, until 1.00 µs" in text


@needs_browser
def test_a_selection_has_sums(tmp_path):
    """All workers' time in it, by kernel and by cause of idleness: they add up; what the legend filters out is one line."""
    tasks = [(0, 0, 0, 1000, []), (1, 0, 0, 400, []), (1, 1000, 1200, 2000, [0])]
    trace, a, b = hand_made(tasks, 2), 300, 1500
    trace.graphs[0].kernels[:] = ["matmul_forward", "gelu_forward"]
    trace.graphs[0].kernel[:] = [0, 0, 1]
    page.write([trace], tmp_path / "page.html", "native")
    js = f"""(() => {{
      const before = [...sums({a}, {b}, "kernel")[0]];
      selection = {{ a: {a}, b: {b} }};
      document.querySelector("#legend button").click();
      return [before, [...sums({a}, {b}, "kernel")[0]], document.getElementById("sums").textContent];
    }})()"""
    before, after, text = evaluated(tmp_path / "page.html", js, tmp_path)
    idle = {
        "idle: dependency": 700 + 900 // 2,
        "idle: scheduling": 100 + 100 // 2,
    }  # worker 0 idles from 1000 to 2000: half of that is in it
    assert dict(before) == {"matmul": 700 + 100, "gelu": 300, **idle}
    assert dict(after) == {"filtered out": 800, **{name: ns for name, ns in before if name != "matmul"}}
    assert "filtered out" in text and text.startswith("selected: 1.20 µs from 0.30 µs to 1.50 µs")


@needs_browser
def test_the_mouse_chooses_moves_and_selects(tmp_path):
    """A click chooses what is under it; a drag moves, and selects once `select` is pressed."""
    page.write([hand_made([(0, 0, 0, 1000, []), (1, 0, 0, 400, []), (1, 1000, 1200, 2000, [0])], 2)], tmp_path / "page.html", "mouse")
    url, ready = (tmp_path / "page.html").as_uri(), "document.documentElement.dataset.ready === 'yes'"
    js = "(({ left, top }) => [left + x(page.traces[0], 700), left + x(page.traces[0], 1500), top + rowTop(page.traces[0], 1) + 9])"
    (a, b, y), _ = visit(url, ready, f"{js}(canvas.getBoundingClientRect())", tmp_path)
    click, drag = [("Pressed", a, y), ("Released", a, y)], [("Pressed", a, y), ("Moved", a + 9, y), ("Moved", b, y), ("Released", b, y)]
    state = "[chosen && chosen.gap !== undefined, t0, selection && [selection.a, selection.b]]"
    (is_gap, before, selected), _ = visit(url, ready, state, tmp_path, mouse=click)
    assert is_gap and selected is None
    (chosen, after, selected), _ = visit(url, f"{ready} && (zoom(0.5, 1000), true)", state, tmp_path, mouse=drag)
    assert chosen is None and selected is None and before < after < 500
    (chosen, after, selected), _ = visit(url, f"{ready} && (at('select').click(), true)", state, tmp_path, mouse=drag)
    assert chosen is None and after == before
    assert selected == pytest.approx([700, 1500], abs=5)


@needs_browser
def test_a_search_finds_tasks(tmp_path):
    """By kernel, call, phase or layer, in capitals too; Enter goes to the first, then to the next one in order of time."""
    trace = traced("native")
    page.write([trace], tmp_path / "page.html", "native")
    js = """(() => {
      const search = document.getElementById("search"), enter = () => search.onkeydown({ key: "Enter" });
      search.value = "SWIRL"; search.oninput();
      const lit = [...page.traces[0].lit], shown = [];
      for (let n = 0; n < 2; n++) { enter(); shown.push(chosen.i); }
      return [lit, shown, document.getElementById("found").textContent];
    })()"""
    lit, shown, text = evaluated(tmp_path / "page.html", js, tmp_path)
    kernels = np.array(trace.names("kernel"))[trace.column("kernel")]
    assert lit == (kernels == "swirl").astype(int).tolist()
    assert shown == np.flatnonzero(kernels == "swirl")[:2].tolist()
    assert text.startswith(f"{sum(lit)} tasks, ")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [480, 1280])
def test_a_page_fits_and_follows_the_system(scheme, width, tmp_path):
    """Nothing is wider than the window, at 480 pixels too; light or dark as the system is; no error in the console (visit looks)."""
    table = {"caption": "wide", "head": [f"column {n}" for n in range(30)], "rows": [["1.0"] * 30]}
    page.write([traced("loops"), traced("native")], tmp_path / "page.html", "a long title " * 10, [table])
    js = "[document.documentElement.scrollWidth <= innerWidth, getComputedStyle(document.body).backgroundColor]"
    value, _ = visit(
        (tmp_path / "page.html").as_uri(), "document.documentElement.dataset.ready === 'yes'", js, tmp_path, f"{width},900", scheme
    )
    assert value == [True, {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]]


@needs_browser
def test_what_the_page_writes_stands_apart(tmp_path):
    """Names of runs do not overlap, of which there are many; a time before the beginning has a unit for its size."""
    one = hand_made([(0, 100 * n, 100 * n, 100 * n + 90, []) for n in range(200)], workers=1)
    runs = np.array([(0, n, 100 * n, 100 * n + 90, n) for n in range(200)], RUN_TYPE)
    one.records["run"] = np.arange(200)
    trace = Trace(one.about, [dataclasses.replace(one.graphs[0], name="a graph of a long name")], runs, one.records)
    page.write([trace], tmp_path / "page.html", "many runs")
    js = """(() => {
      const found = [], was = ctx.fillText;
      ctx.fillText = (text, x, y) => { found.push([text, x, y, ctx.measureText(text).width]); was.call(ctx, text, x, y); };
      draw();
      return [found, ms(-16645360)];
    })()"""
    words, early = evaluated(tmp_path / "page.html", js, tmp_path)
    labels = [(x, wide) for text, x, y, wide in words if text.startswith("a graph") and y == 26]
    assert len(labels) > 2
    assert all(x + wide < following for (x, wide), (following, _) in itertools.pairwise(labels))
    assert early == "-16.65 ms"


@needs_browser
def test_runs_that_are_left_out_are_drawn_once_a_pixel(tmp_path):
    """Grey, on their own worker, at most as many rectangles as the canvas is wide."""
    whole = hand_made([(n % 2, 10 * n, 10 * n, 10 * n + 4, []) for n in range(20_000)], workers=2)
    trace = Trace(whole.about, whole.graphs, whole.runs, whole.records[:2], others=whole.records[2:])
    page.write([trace], tmp_path / "page.html", "others")
    js = """(() => {
      const found = [], was = ctx.fillRect, line = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
      ctx.fillRect = (...box) => { if (ctx.fillStyle === line) found.push(box); was.apply(ctx, box); };
      draw();
      return found;
    })()"""
    boxes = evaluated(tmp_path / "page.html", js, tmp_path)
    assert {y for _, y, _, _ in boxes} == {34, 64}
    assert 2 <= len(boxes) <= 2 * 1300
    assert min(x for x, *_ in boxes) < 90
    assert max(x + wide for x, _, wide, _ in boxes) > 1200


@pytest.mark.parametrize("colour_by", ["kernel", "layer", "phase"])
def test_a_still_picture_has_every_task(colour_by):
    """Two traces, one above the other: wide enough, each task is a rectangle as long as it took; narrower, none of its time is lost."""
    traces = [traced("loops"), traced("native")]
    wide, narrow = (ElementTree.fromstring(timeline.to_svg(traces, colour_by=colour_by, width=width)) for width in (10**6, 300))
    total = sum(len(trace.records) for trace in traces)
    longest = max(trace.end_ns - trace.begin_ns for trace in traces)
    took = sum((trace.records["stop_ns"] - trace.records["start_ns"]).sum() for trace in traces)

    def tasks(svg) -> list:
        return [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]

    assert len(tasks(wide)) <= total
    assert len(tasks(wide)) > 0.9 * total
    assert len(tasks(narrow)) < len(tasks(wide))
    for svg, width in ((wide, 10**6), (narrow, 300)):
        shown, pixel = sum(float(rect.get("width")) + 0.2 for rect in tasks(svg)), longest / (width - 70)
        least = 0.5 * len(tasks(svg))  # what is shorter than half a pixel is drawn that wide; 0.01: words have two digits
        assert -0.01 * len(tasks(svg)) <= shown - took / pixel <= least + 0.01 * len(tasks(svg))


def test_graphs_and_timelines_display_themselves():
    """In a notebook, as pictures."""
    assert ElementTree.fromstring(timeline.Timeline(traced("native"))._repr_svg_()).tag.endswith("svg")
    graph = k.random_graph(k.arena(False), 1)
    assert ElementTree.fromstring(graph._repr_svg_()).tag.endswith("svg")


def test_a_page_is_one_file(tmp_path):
    """Nothing else is written, and nothing in it is fetched from anywhere."""
    page.write([traced("sequential")], tmp_path / "page.html", "sequential")
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)=|https?://|@import""", text)
