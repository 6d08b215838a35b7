"""Watching a run while it goes on: the numbers, the tasks in Dask's task stream, and both in a real browser."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack

import kernels_for_tests as k
import numpy as np
import pytest
from browser import needs_browser, visit
from dask.utils import key_split
from programs import started
from test_efficiency import hand_made
from test_trace import traced

from taskgpt import config, palette, train
from taskgpt.errors import UserError
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.traces.trace import Trace, Traced
from taskgpt.schedulers import open_scheduler

plt = pytest.importorskip("matplotlib.image", reason="screenshots are read with matplotlib: pip install 'taskgpt[notebooks]'")
pytest.importorskip("bokeh", reason="the dashboard needs bokeh: pip install 'taskgpt[dashboard]'")
from bokeh.document import Document  # noqa: E402
from bokeh.models import Div  # noqa: E402

from taskgpt.lab.dashboard import cores as live_cores  # noqa: E402
from taskgpt.lab.dashboard import page as live_page  # noqa: E402
from taskgpt.lab.dashboard.dashboard import Dashboard  # noqa: E402

NAMES = ["native", "sequential", "loops", "threads"]


def opened(name: str):
    chosen = config.load_scheduler(name, {"record": 10_000, **({} if name == "sequential" else {"workers": 2})})
    return open_scheduler(chosen.scheduler, chosen.settings)


def test_numbers_of_a_run():
    """Efficiency and time by kernel of what was recorded; ready tasks of the run before, counted by hand at a moment."""
    trace = traced("native", order=(0, 1, 0))
    live = Live(trace.workers)
    parts = [trace.select(trace.graphs[0].name)._only(np.arange(2) == n) for n in range(2)]
    for part in parts:
        live.look(part)
        took = (part.records["stop_ns"] - part.records["start_ns"]).sum()
        assert live.last_run.efficiency == pytest.approx(took / (2 * (part.end_ns - part.begin_ns)))
        assert sum(live.last_run.kernel_ms.values()) == pytest.approx(took / 1e6)
        assert list(live.last_run.kernel_ms.values()) == sorted(live.last_run.kernel_ms.values(), reverse=True)
    r, moment = parts[0].records, parts[0].begin_ns + live.last_run.ready_at_ms[100] * 1e6
    assert live.last_run.ready[100] == ((r["ready_ns"] <= moment) & (r["start_ns"] > moment)).sum()
    live.step(0, 2.5, 100.0)
    live.validation(0, 2.75)
    assert live.steps == [(0, 2.5, 100.0, live.last_run.efficiency)]
    assert live.validations == [(0, 2.75)]
    shown = live.last_step
    live.look(trace.select(trace.graphs[1].name))  # a validation
    assert live.last_step is shown is not live.last_run


def test_a_task_counts_since_the_last_look():
    """One that began long before it, and ends now: its worker was busy the whole time, not longer."""
    trace = hand_made([(0, 0, 0, 100, []), (1, 0, 0, 120, [])], workers=2)
    live = Live(2)
    so_far = trace.runs.copy()
    so_far["end_ns"] = 100
    live.look(Trace(trace.about, trace.graphs, so_far, trace.records[:1]))
    live.look(Trace(trace.about, trace.graphs, trace.runs, trace.records[1:]))
    assert live.last_run.efficiency == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_who_looks_late_sees_each_run_once(name):
    """A look shows what was done between the ends of two runs, though the next run was done too when it came."""
    parts, live = [], Live(2)

    def look(part: Trace) -> None:
        parts.append(part)
        live.look(part)
        assert live.last_run.efficiency <= 1
        assert sum(live.last_run.kernel_ms.values()) == pytest.approx((part.records["stop_ns"] - part.records["start_ns"]).sum() / 1e6)

    with Traced(opened(name), look) as scheduler:
        graph = k.random_graph(k.arena(False), 3)
        for _ in scheduler.run_each([graph] * 5):
            time.sleep(0.05)
        trace = scheduler.trace({})
    assert sum(len(part.records) for part in parts) == len(trace.records)
    assert [part.records["stop_ns"].max() for part in parts] == trace.runs["end_ns"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_task_stream_shows_every_task_once(name):
    """Of runs that overlap too: its kernel and step, its worker, and when it ran, by the time it ended."""
    live = Live(2)
    bare = opened(name)
    dashboard = Dashboard(live, "0")
    with Traced(bare, dashboard.look) as scheduler, dashboard.serve(bare):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/taskgpt", dashboard.url)
        graph = k.random_graph(k.arena(scheduler.needs_shared_memory), 3)
        for _ in scheduler.run_each([graph] * 4):
            pass
        trace = scheduler.trace({})
        stream = dashboard.task_stream.buffer  # filled by the server's thread
        end = time.monotonic() + 20
        while len(stream) < len(trace.records) and time.monotonic() < end:
            time.sleep(0.01)
        spans = list(stream)
    shown = sorted((*s["key"], s["thread"], round(s["startstops"][0]["stop"] - s["startstops"][0]["start"], 6)) for s in spans)
    kernel, step = trace.column("kernel"), trace.runs["step"][trace.records["run"]]
    took = (trace.records["stop_ns"] - trace.records["start_ns"]) / 1e9
    columns = zip(kernel, step, trace.records["task"], trace.records["worker"], took, strict=True)
    ran = sorted((trace.names("kernel")[n], s, t, w, round(d, 6)) for n, s, t, w, d in columns)
    assert [row[:4] for row in shown] == [row[:4] for row in ran]
    assert [row[4] for row in shown] == pytest.approx([row[4] for row in ran], abs=2e-6)


def test_the_bar_leads_to_what_has_something_to_show():
    """Of a scheduler that is not Dask's: the run, its task stream, this process. Dask's own keeps all pages."""
    bar = {}
    for name in ("native", "local-cluster"):
        bare = opened(name)
        dashboard = Dashboard(Live(2), "" if name == "local-cluster" else "0")
        with bare, dashboard.serve(bare):
            for page in ("taskgpt", "status"):
                with urllib.request.urlopen(dashboard.url.replace("taskgpt", page)) as answer:
                    bar[name, page] = re.findall(r'<a href="([a-z-]+)">', answer.read().decode())
    links = ["taskgpt", "tasks", "system", "individual-scheduler-system", "individual-task-stream"]
    assert bar["native", "taskgpt"] == bar["native", "status"] == links
    assert bar["local-cluster", "status"][:2] == ["taskgpt", "status"]
    assert {"workers", "graph", "individual-progress"} < set(bar["local-cluster", "taskgpt"])


def test_local_cluster_gets_the_page_and_keeps_its_stream():
    """At its own address; its tasks carry the names of kernels."""
    bare = opened("local-cluster")
    dashboard = Dashboard(Live(2))
    with Traced(bare, dashboard.look) as scheduler, dashboard.serve(bare):
        graph = k.random_graph(k.arena(scheduler.needs_shared_memory), 3)
        scheduler.run(graph)
        assert dashboard.url.partition("/taskgpt")[0] in bare.describe()
        assert dashboard.task_stream is None
        names = {key_split(key) for key in bare.dask_scheduler.tasks}
        assert names <= {task.name for task in graph.tasks}
        with urllib.request.urlopen(dashboard.url) as answer:
            assert b"taskgpt" in answer.read()


@pytest.mark.parametrize(
    ("scheduler", "address", "message"),
    [
        ("native", "http://x", "wanted [HOST:]PORT"),
        ("native", "70000", "wanted [HOST:]PORT"),
        ("native", "1" * 10_000, "wanted [HOST:]PORT"),
        ("native", "::1:8787", "wanted [HOST:]PORT"),
        ("native", "[::x]:8787", "wanted [HOST:]PORT"),
        ("native", "a..b:8787", "cannot listen there"),
        ("native", "[::1]:TAKEN6", "choose another port"),
        ("native", "TAKEN", "choose another port"),
        ("local-cluster", "8123", "--set dashboard=PORT"),
    ],
)
def test_an_address_that_cannot_be_is_refused(scheduler, address, message, capsys):
    """In a line that says what to do, before the run."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as taken:
        if "TAKEN6" in address:
            taken = stack.enter_context(ipv6_server())
            address = address.replace("TAKEN6", str(taken.getsockname()[1]))
        address = address.replace("TAKEN", str(taken.getsockname()[1]))
        flags = ["--graph", "tiny", "--steps", "1", "--scheduler", scheduler, "--data", __file__]
        assert train.main([*flags, "--dashboard", address]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err) < 500


def ipv6_server() -> socket.socket:
    """Return a server at a free port of ::1."""
    try:
        return socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 on this system")


def test_an_ipv6_address():
    """In brackets, as a link has it, and the page answers there."""
    ipv6_server().close()
    bare = opened("sequential")
    dashboard = Dashboard(Live(1), "[::1]:0")
    with bare, dashboard.serve(bare):
        assert re.fullmatch(r"http://\[::1\]:\d+/taskgpt", dashboard.url)
        with urllib.request.urlopen(dashboard.url) as answer:
            assert b"taskgpt" in answer.read()


def test_a_missing_bokeh_is_said(monkeypatch):
    """With the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        Dashboard(Live(1))


@needs_browser
@pytest.mark.parametrize("page", ["taskgpt", "tasks"])
def test_a_browser_shows_a_run(page, tmp_path):
    """While it trains: points on the page's curves, rectangles in the task stream, and both are drawn."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    flags = ["--graph", "tiny", "--steps", "1000000", "--val-every", "50", "--sample-every", "0", "--data", str(text), "--dashboard", "0"]
    command = [sys.executable, "-m", "taskgpt.train", *flags]
    with started(command, stderr=subprocess.STDOUT) as process:
        try:
            url = next(line.split()[1] for line in process.stdout if line.startswith("dashboard"))
            threading.Thread(target=process.stdout.read, daemon=True).start()  # nobody else empties the pipe
            sources = "[...Bokeh.documents[0]._all_models.values()].filter(m => m.type === 'ColumnDataSource').map(m => m.data)"
            columns = {"taskgpt": ["efficiency", "ms"], "tasks": ["worker_thread"]}[page]
            ready = " && ".join(f"{sources}.some(d => d.{name} && d.{name}.length > 8)" for name in columns)
            wanted = f"JSON.stringify({sources}.filter(d => d.efficiency || d.worker_thread).map(d => Object.fromEntries(" + (
                "Object.entries(d).map(([k, v]) => [k, Array.from(v)]))))"
            )
            url = url.replace("taskgpt", page)
            value, picture = visit(url, f"window.Bokeh && Bokeh.documents[0] && {ready}", wanted, tmp_path)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    (found,) = json.loads(value)
    if page == "taskgpt":
        assert found["step"][:5] == [0, 1, 2, 3, 4]
        assert all(4 < loss < 7 for loss in found["loss"][:5])
        assert all(0 < share <= 1.05 for share in found["efficiency"])
    else:
        assert {"matmul_forward", "layernorm_forward"} & set(found["name"])
        assert set(found["worker_thread"]) >= {"native-0"}
        assert dict(zip(found["name"], found["color"], strict=True)) == palette.of_kernels(found["name"])
    colours = np.unique((plt.imread(picture)[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 50
    assert process.returncode == 130


PROGRAM = """
import sys, time
import numpy as np
import taskgpt
from taskgpt.tasks import Graph, InOut, Spawn, dims, kernel, wrap

N = dims("N")[0]


@kernel(compiled=True)
def smooth(a: InOut[N]):
    for _ in range(500):
        for i in range(a.shape[0]):
            a[i] = a[i] * 0.5 + 1


@kernel
def each_block(a: InOut[N], spawn: Spawn):
    for first in range(0, a.shape[0], 256):
        spawn(smooth, a[first : first + 256])


x = wrap(np.zeros(4096, np.float32), 256)
graph = Graph("sweep")
graph.spawn_each(smooth, range(16), lambda i: (x[256 * i : 256 * i + 256],))
with taskgpt.scheduler("native", workers=2) as scheduler:
    while True:
        scheduler.run(graph)
        with scheduler.program() as spawn:
            spawn(each_block, x[:])
        time.sleep(0.02)
"""


@needs_browser
def test_a_browser_shows_a_program_that_is_no_training(tmp_path):
    """`taskgpt run --dashboard`: each run of its graphs, and each of its programs, with what its kernels took."""
    file = tmp_path / "mine.py"
    file.write_text(PROGRAM)
    command = [sys.executable, "-m", "taskgpt", "run", "--dashboard", "0", str(file)]
    with started(command, stderr=subprocess.STDOUT) as process:
        try:
            url = next(line.split()[1] for line in process.stdout if line.startswith("dashboard"))
            threading.Thread(target=process.stdout.read, daemon=True).start()
            sources = "[...Bokeh.documents[0]._all_models.values()].filter(m => m.type === 'ColumnDataSource').map(m => m.data)"
            ready = f"window.Bokeh && Bokeh.documents[0] && {sources}.some(d => d.graph && d.graph.length > 8)"
            wanted = (
                f"JSON.stringify({sources}.filter(d => d.graph || d.kernel).map(d => Object.fromEntries("
                "Object.entries(d).map(([k, v]) => [k, Array.from(v)]))))"
            )
            value, _ = visit(url, ready, wanted, tmp_path)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    runs, kernels = sorted(json.loads(value), key=lambda found: "kernel" in found)
    assert runs["graph"][:4] == ["sweep", "program", "sweep", "program"]
    assert all(0 < share <= 1.05 for share in runs["efficiency"]) and min(runs["ms"]) > 0
    assert "smooth" in kernels["kernel"]


@needs_browser
@pytest.mark.parametrize(("name", "stops"), [("native", False), ("native", True), ("local-cluster", False)])
def test_a_page_says_how_the_run_ended(name, stops, tmp_path):
    """Who looks until the end sees whether it is finished, though the server is gone by then; and where it was, and the last sample.

    Also of a run that goes on from a checkpoint, after its first steps.
    """
    bare = opened(name)
    live = Live(2, "a run", total=9)
    dashboard = Dashboard(live, "" if name == "local-cluster" else "0")
    found = {}

    def look() -> None:
        text = "[...Bokeh.documents[0]._all_models.values()].filter(m => m.type === 'Div').map(m => m.text).join()"
        ring = f"window.rung ||= fetch('http://127.0.0.1:{doorbell.getsockname()[1]}', {{ mode: 'no-cors' }})"
        ready = f"window.Bokeh && Bokeh.documents[0] && ({text}.includes('sample') && ({ring}), /finished|early/.test({text}))"
        found["text"], _ = visit(dashboard.url, ready, text, tmp_path, expected="CONNECTION_REFUSED|Failed to connect")

    with socket.create_server(("127.0.0.1", 0)) as doorbell, bare, dashboard.serve(bare):
        for step in range(6, 8 if stops else 9):
            live.step(step, 2.5, 1000.0, left_s=60)
        live.samples.append((2, "to be <or> not"))
        viewer = threading.Thread(target=look)
        viewer.start()
        doorbell.settimeout(60)
        with doorbell.accept()[0] as visitor:  # who sees the sample
            visitor.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
    viewer.join(30)
    assert ("step 8 of 9, ended early: loss" if stops else "step 9 of 9, finished: loss") in found["text"]
    assert "sample after 2 steps" in found["text"] and "to be &lt;or&gt; not" in found["text"]


def test_the_head_says_how_far_it_is():
    """Before the first step, in the middle with the time left, and at the end."""
    live = Live(2, "a <run>", total=1200)
    assert live_page.head(live) == "<b>a &lt;run&gt;</b><br>waiting for the first step"
    live.step(1039, 2.5, 1000.0, left_s=75)
    assert "step 1,040 of 1,200, 1:15 left: loss 2.5000, 1,000 tok/s" in live_page.head(live)
    live.end = "finished"
    assert "step 1,040 of 1,200, finished: loss" in live_page.head(live)


def test_the_page_shows_who_holds_which_core(monkeypatch):
    """Of a run that shares its cores: each program, this one first, and each core in the colour of who holds it; read anew at each look."""
    members = [
        {"program": name, "pid": pid, "cores": 1, "workers": 2, "core_s": 1.25, "weight": 1, "priority": 0, "state": "running"}
        for name, pid in (("<other>", 1), ("mine", os.getpid()))
    ]
    owners = [(0, "<other>", 1, 0), (1, "mine", os.getpid(), 1), (2, None, None, None)]
    cores = [{"core": core, "program": name, "pid": pid, "worker": worker, "held_s": 0.0} for core, name, pid, worker in owners]
    monkeypatch.setattr(live_cores, "share", {"node": {"share": "node", "members": members, "cores": cores}}.__getitem__)
    document, live = Document(), Live(2, share="node")
    update = live_page.fill(document, live, {})
    (text,) = [div.text for div in document.select({"type": Div}) if "cores shared in" in div.text]
    assert "2 of 3 held" in text and text.index("mine, this one") < text.index("&lt;other&gt;") and "<other>" not in text
    boxes = re.findall(r"background: (#\w+); .*?>(core [^<]*)<", text)
    assert [words for _, words in boxes] == ["core 0: &lt;other&gt; 1, worker 0", f"core 1: mine {os.getpid()}, worker 1", "core 2: free"]
    assert [colour for colour, _ in boxes] == [palette.COLOURS[1], palette.COLOURS[0], palette.REST]
    cores[2] |= members[1] | {"worker": 0}
    update()
    assert any("3 of 3 held" in div.text for div in document.select({"type": Div}))


def test_a_run_that_shares_tells_the_page():
    """Which share it is in; of one that nobody is in any more it says so, and a run that shares none has no such table."""
    name = f"dashboard-{os.getpid()}"
    for share in (name, ""):
        chosen = config.load_scheduler("sequential", {"share": share})
        bare = open_scheduler(chosen.scheduler, chosen.settings)
        dashboard = Dashboard(Live(1), "0")
        with bare, dashboard.serve(bare):
            assert dashboard.live.share == share
            document = Document()
            live_page.fill(document, dashboard.live, {})
            assert bool(share) == any("cores shared in" in div.text for div in document.select({"type": Div}))
    assert live_cores.seen_now(name) == f"share {name}: no program is in it"
