"""`taskgpt show graph`: every format holds the same tasks and edges, and large graphs become readable."""

import json
import os
import re
import subprocess
import threading
from xml.etree import ElementTree

import pytest
from browser import BROWSER, needs_browser, visit

from taskgpt.config import load_graph
from taskgpt.errors import UserError
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.named import make
from taskgpt.programs.show import main as show
from taskgpt.tasks import Graph, by_section, coarsen, part


def shown(tmp_path, form: str, *flags: str) -> str:
    assert show(["graph", "--graph", "tiny", "--format", form, "--output", str(tmp_path / "graph"), *flags]) == 0
    return (tmp_path / "graph").read_text()


def edges_of_text(text: str) -> set[tuple[int, int]]:
    found = set()
    for line in text.splitlines():
        task, _, predecessors = line.partition(" <- ")
        found |= {(int(p), int(task.split()[0])) for p in predecessors.split()}
    return found


def test_formats_agree(tmp_path):
    """Text, JSON, GraphML and DOT have the same tasks, kernels and edges, each read with a reader of its own."""
    text = shown(tmp_path, "text")
    edges = edges_of_text(text)
    kernels = {int(line.split()[0]): line.split()[1] for line in text.splitlines()}

    tasks = json.loads(shown(tmp_path, "json"))["tasks"]
    assert {task["number"]: task["kernel"] for task in tasks} == kernels
    assert {(p, task["number"]) for task in tasks for p in task["predecessors"]} == edges

    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    root = ElementTree.fromstring(shown(tmp_path, "graphml"))
    nodes = {int(node.get("id")[1:]): node.find("g:data[@key='kernel']", space).text for node in root.iterfind(".//g:node", space)}
    assert nodes == kernels
    assert {(int(e.get("source")[1:]), int(e.get("target")[1:])) for e in root.iterfind(".//g:edge", space)} == edges

    dot = shown(tmp_path, "dot")
    assert {(int(a), int(b)) for a, b in re.findall(r"^  (\d+) -> (\d+);$", dot, re.MULTILINE)} == edges
    assert {int(n): name for n, name in re.findall(r'^  (\d+) \[label="(\w+)', dot, re.MULTILINE)} == kernels


def test_an_unknown_phase(capsys):
    """The known ones come as in a step, whatever the hashes of their names."""
    assert show(["graph", "--phase", "inference"]) == 2
    assert "known: forward, loss, backward, update" in capsys.readouterr().err


@pytest.mark.parametrize("colour", ["kernel", "layer", "phase", "path"])
def test_a_picture_has_every_task(colour, tmp_path):
    """One rectangle a task, and a legend of what colours tell."""
    picture = ElementTree.fromstring(shown(tmp_path, "svg", "--colour", colour))
    rectangles = [e for e in picture.iter() if e.get("class") == "task"]
    assert len(rectangles) == len(shown(tmp_path, "text").splitlines())
    words = {e.text for e in picture.iter() if e.tag.endswith("text")}
    legend = {"kernel": {"matmul"}, "layer": {"layer 0", "layer 1", "no layer"}, "phase": {"forward", "backward", "update"}}
    assert words >= (legend | {"path": {"on the longest path", "not on it"}})[colour]


def test_of_micro_batches_the_last_is_shown(tmp_path):
    """It adds to gradients, and updates; the title says what it is. Programs that measure whole steps refuse such a graph."""
    accumulated = "tiny:batch.accumulate=4,options.clip_norm=1"
    page = shown(tmp_path, "svg", "--graph", accumulated)
    assert "the last of 4 micro-batches of a training step of tiny" in page
    text = shown(tmp_path, "text", "--graph", accumulated)
    assert all(kernel in text for kernel in ("gradient_add", "loss_mean", "gradient_norm", "gradient_scale", "adamw_scaled_update"))
    with pytest.raises(UserError, match="a step of 4 micro-batches is no single graph to measure"):
        make(accumulated)


def test_few_tasks_have_names(tmp_path):
    """By section: phase and layer, in the box; a graph of many tasks has none, nor one whose columns would become too high."""

    def names(*flags: str) -> tuple[list[str], list]:
        picture = ElementTree.fromstring(shown(tmp_path, "svg", *flags))
        texts = [e.text for e in picture.iter() if e.get("pointer-events") == "none"]
        return texts, [e for e in picture.iter() if e.get("class") == "task"]

    texts, boxes = names("--by", "section")
    assert len(texts) == len(boxes)
    assert {"forward 0", "forward 1", "backward 1", "loss", "update 0"} <= set(texts)
    assert all(float(box.get("height")) >= 6 * max(map(len, texts)) for box in boxes)
    texts, boxes = names("--phase", "loss")
    assert sorted(texts) == sorted(box[0].text.split()[1] for box in boxes) != []
    assert names()[0] == names("--layer", "0", "--phase", "forward")[0] == []


def test_a_large_graph_by_section_is_small(tmp_path):
    """GPT-2 124M: more than a thousand tasks become one for each phase and layer, in an order that no edge contradicts."""
    assert show(["graph", "--graph", "gpt2-124m", "--by", "section", "--format", "json", "--output", str(tmp_path / "graph")]) == 0
    tasks = json.loads((tmp_path / "graph").read_text())["tasks"]
    assert 12 * 3 <= len(tasks) <= 60
    assert all(p < task["number"] for task in tasks for p in task["predecessors"])
    assert {(t["phase"], t["layer"]) for t in tasks} >= {
        (phase, layer) for phase in ("forward", "backward", "update") for layer in range(12)
    }


def test_sections_keep_the_calls():
    """No call is lost or doubled, also of a graph that was coarsened before, and an empty graph stays empty."""
    config = load_graph("tiny")
    graph = training_graph(GPT2(config.model, config.batch, config.tiles, config.options))
    for given in (graph, coarsen(graph, 40)):
        assert sorted(str(c) for task in by_section(given).tasks for c in task.calls) == sorted(
            str(c) for t in graph.tasks for c in t.calls
        )
    assert not by_section(Graph()).tasks


def reached(tasks: list[dict]) -> list[set[str]]:
    """Return the calls of all tasks that come before each, over any path."""
    found: list[set[str]] = []
    for task in tasks:
        found.append(set().union(*(found[p] | {tasks[p]["call"]} for p in task["predecessors"])))
    return found


@pytest.mark.parametrize(
    ("flags", "is_in"),
    [
        (["--layer", "1"], lambda task: task["layer"] == 1),
        (["--layer", "1", "--phase", "forward"], lambda task: (task["phase"], task["layer"]) == ("forward", 1)),
        (["--phase", "backward"], lambda task: task["phase"] == "backward"),
    ],
)
def test_a_layer_and_a_phase_alone(flags, is_in, tmp_path):
    """Their tasks in the order of the whole graph, over paths through others too, without an edge that others imply; named in the title."""
    whole = json.loads(shown(tmp_path, "json"))["tasks"]
    part = json.loads(shown(tmp_path, "json", *flags))["tasks"]
    calls = {task["call"] for task in whole if is_in(task)}
    assert [task["call"] for task in part] == [task["call"] for task in whole if is_in(task)]
    before = reached(part)
    assert before == [found & calls for task, found in zip(whole, reached(whole), strict=True) if is_in(task)]
    for task in part:
        assert not any(part[p]["call"] in before[q] for p in task["predecessors"] for q in task["predecessors"])
    title = ", ".join(["one training step of tiny", *(f"layer {word}" if word.isdecimal() else word for word in flags[1::2])])
    assert f">{title}: {len(part)} tasks" in shown(tmp_path, "svg", *flags)


def test_what_is_not_in_the_graph_is_named():
    """A layer, a phase."""
    assert show(["graph", "--layer", "7"]) == 2
    assert show(["graph", "--phase", "forwrd"]) == 2


def test_dask_shows_its_layers(tmp_path):
    """Dask's own view is a page by itself, each row with its layer's name."""
    page = shown(tmp_path, "dask")
    assert re.search(r"Layer\d+: forward_00\s*<", page)
    assert not re.search(r"""(src|href)=|https?://(?!www.w3.org)""", page)


def test_the_longest_path_is_the_longest():
    """Of all paths of a small graph, tried one by one, with given times and with estimates."""
    config = load_graph("tiny")
    graph = part(
        training_graph(GPT2(config.model, config.batch, config.tiles, config.options)), lambda task: task.section == ("forward", 0)
    )

    def all_paths(number: int) -> list[list[int]]:
        successors = graph.tasks[number].successors
        return [[number, *rest] for s in successors for rest in all_paths(s)] if successors else [[number]]

    paths = [path for task in graph.tasks if not task.predecessors for path in all_paths(task.number)]
    for seconds in ([task.estimated_seconds for task in graph.tasks], [(7 * n) % 11 + 1 for n in range(len(graph.tasks))]):
        found = graph.longest_path(seconds)
        assert found in paths
        assert sum(seconds[n] for n in found) == pytest.approx(max(sum(seconds[n] for n in path) for path in paths))
    assert graph.longest_path() == graph.longest_path([task.estimated_seconds for task in graph.tasks])
    assert Graph().longest_path() == []


def test_what_is_no_file_is_written_into_and_never_replaced(tmp_path, capsys):
    """A link stays, and what it names is written; a pipe without a reader is refused, with one it carries the text."""
    text = shown(tmp_path, "text")
    (tmp_path / "link").symlink_to(tmp_path / "named")
    assert show(["graph", "--output", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "named").read_text() == text

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert show(["graph", "--output", str(pipe)]) == 2
    assert capsys.readouterr().err == f"taskgpt show: error: {pipe}: is a pipe that nobody reads; start its reader first\n"
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    while (code := show(["graph", "--output", str(pipe)])) == 2:  # until the reader is there
        pass
    reader.join()
    assert code == 0 and got == [text] and pipe.is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "link", "named", "pipe"}


@needs_browser
def test_the_page_answers_a_click(tmp_path):
    """The task in the address is marked, and so are what it waits for and what waits for it."""
    shown(tmp_path, "html")
    (tmp_path / "graph").rename(tmp_path / "graph.html")
    edges = edges_of_text(shown(tmp_path, "text"))
    url = f"{(tmp_path / 'graph.html').as_uri()}#30"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", url]
    document = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    classes = re.findall(r'<rect class="(task[^"]*)"', document)
    assert [n for n, name in enumerate(classes) if name == "task chosen"] == [30]
    assert {n for n, name in enumerate(classes) if name == "task before"} == {a for a, b in edges if b == 30}
    assert {n for n, name in enumerate(classes) if name == "task after"} == {b for a, b in edges if a == 30}


def evaluated(tmp_path, js: str, *flags: str, size: str = "1280,800", scheme: str = "light") -> object:
    """Return what the page's JavaScript makes of an expression; an error in the console fails the test."""
    shown(tmp_path, "html", *flags)
    (tmp_path / "graph").rename(tmp_path / "graph.html")
    url = (tmp_path / "graph.html").as_uri()
    value, _ = visit(url, "document.documentElement.dataset.ready === 'yes'", f"JSON.stringify({js})", tmp_path, size, scheme)
    return json.loads(value)


@needs_browser
def test_dasks_page_opens(tmp_path):
    """At 480 pixels, without an error in the console, as black on white under a dark system too: the colours in it are Dask's."""
    shown(tmp_path, "dask")
    (tmp_path / "graph").rename(tmp_path / "graph.html")
    js = "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor]"
    value, _ = visit((tmp_path / "graph.html").as_uri(), "document.querySelectorAll('details').length > 5", js, tmp_path, "480,800", "dark")
    assert value == [480, "rgb(255, 255, 255)"]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["480,800", "1280,800"])
def test_the_page_fits_the_window(size, scheme, tmp_path):
    """The whole graph is in view, below title and legend, light or dark as the system is; zooming leaves both where they are."""
    js = """(() => {
      const of = element => { const { left, top, right, bottom } = element.getBoundingClientRect(); return [left, top, right, bottom]; };
      const found = [tasks.map(of), of(view), of(at("legend"))];
      for (let n = 0; n < 9; n++) zoom(1.5);
      found.push(of(at("legend")), [document.documentElement.scrollWidth, innerWidth]);
      return [...found, getComputedStyle(document.body).backgroundColor];
    })()"""
    boxes, view, legend, zoomed, (wide, window), back = evaluated(tmp_path, js, size=size, scheme=scheme)
    assert all(view[0] <= left and view[1] <= top and right <= view[2] and bottom <= view[3] for left, top, right, bottom in boxes)
    assert legend == zoomed and legend[3] <= view[1] + 1
    assert wide <= window
    assert back == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


@needs_browser
def test_names_are_in_boxes_when_there_is_room(tmp_path):
    """None in the whole graph; zoomed in, each in its box, and no word wider than that; of few tasks they are there from the start."""
    js = """(() => {
      const before = at("names").getClientRects().length;
      for (let n = 0; n < 4; n++) zoom(1.5);
      const room = [...at("names").children].map((text, n) => {
        const a = text.getBoundingClientRect(), b = tasks[n].getBoundingClientRect();
        return [text.textContent, Math.min(a.left - b.left, b.right - a.right)];
      });
      return [before, room];
    })()"""
    before, room = evaluated(tmp_path, js)
    assert before == 0
    assert room[0][0] == "encoderforward" and len(room) == len(shown(tmp_path, "text").splitlines())
    assert min(left for _, left in room) >= 0
    assert evaluated(tmp_path, "(zoom(9), at('names').children.length)", "--by", "section") == 0


@needs_browser
def test_the_page_is_searched_and_walked_by_keys(tmp_path):
    """A search and the legend dim the others; Enter goes to the first found; arrows go to what it waits for, and to what waits for it."""
    edges = edges_of_text(shown(tmp_path, "text"))
    js = """(() => {
      const lit = () => tasks.map((_, n) => n).filter(n => !tasks[n].classList.contains("off"));
      const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const search = at("search"), found = [];
      search.value = "ATTENTION_FORWARD"; search.oninput(); found.push(lit());
      search.onkeydown({ key: "Enter" }); found.push(chosen);
      search.value = ""; search.oninput();
      press("ArrowRight"); found.push(chosen);
      press("ArrowLeft"); found.push(chosen);
      at("legend").firstElementChild.click(); found.push(lit());
      press("Escape"); found.push(chosen);
      return found;
    })()"""
    searched, first, right, left, filtered, none = evaluated(tmp_path, js)
    names = {int(line.split()[0]): line.split()[1] for line in shown(tmp_path, "text").splitlines()}
    assert searched == [n for n, name in names.items() if name == "attention_forward"]
    assert first == searched[0]
    assert (first, right) in edges and (left, right) in edges
    assert filtered == [n for n, name in names.items() if not name.startswith("encoder")]
    assert none == -1
