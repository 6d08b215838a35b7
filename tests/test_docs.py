"""The documentation: it builds offline without a warning, names everything, and what its how-tos build works."""

import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import kernels_for_tests as k
import numpy as np
import pytest
from pages import ROOT, blocks, files

import taskgpt.gpt2
from taskgpt.cluster.settings import Settings as ClusterSettings
from taskgpt.config import graph_keys, load_graph, load_scheduler, schedulers
from taskgpt.gpt2 import norms, shape
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.named import prepare, record
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.traces import formats
from taskgpt.runs.folder import Identity
from taskgpt.schedulers.native import policies, scheduler
from taskgpt.tasks import Kernel, check
from taskgpt.train import main as train

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The pages as HTML."""
    pytest.importorskip("sphinx", reason="pip install 'taskgpt[docs]'")
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", folder / "doctrees", DOCS, folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    return folder


def test_a_page_loads_nothing_from_elsewhere(built):
    """Scripts, styles, fonts and pictures come with the pages, which so can be read without network."""
    for page in built.rglob("*.html"):
        loaded = re.findall(r"""<(?:script|link|img)\b[^>]*?(?:src|href)=["'](?:https?:)?//[^"']*""", page.read_text(encoding="utf-8"))
        assert not loaded, f"{page}: {loaded}"


def test_every_tensor_and_kernel_is_named(built):
    """On the page that walks through the model."""
    page = (built / "reference" / "model.html").read_text(encoding="utf-8")
    config = load_graph("tiny")
    ways = dataclasses.replace(config.options, kernels="separate", update="separate")
    m = GPT2(config.model, config.batch, config.tiles, ways)
    tensors = [name for arena in (m.p, m.a, m.d, m.s) for name in arena.tensors]
    assert not [name for name in tensors + gpt2_kernels() if f">{name}<" not in page]


def gpt2_kernels() -> list[str]:
    modules = [importlib.import_module(f"taskgpt.gpt2.{module.name}") for module in pkgutil.iter_modules(taskgpt.gpt2.__path__)]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    return sorted(kernel.name for kernel in found if kernel.module.startswith("taskgpt.gpt2"))  # not what they import


def test_every_key_of_a_file_is_described():
    """Of graph files, set-up files and machine files."""
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    keys = set(graph_keys()) | {field.name for kind in (Machine, ClusterSettings) for field in dataclasses.fields(kind)}
    for name in schedulers():
        settings = importlib.import_module(f"taskgpt.schedulers.{name.replace('-', '_')}").Settings
        keys |= {field.name for field in dataclasses.fields(settings)}
    assert not [key for key in sorted(keys) if f"`{key}`" not in page]


def test_what_a_run_writes_is_described(tmp_path):
    """Every name in the log, in the tables of a trace and in trace.npz."""
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    words = ["--graph", "tiny", "--scheduler", "sequential", "--steps", "1", "--sample-every", "1", "--data", str(ROOT / "README.md")]
    assert train(words + ["--log", str(tmp_path / "log"), "--trace", str(tmp_path / "trace")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    names = {name for line in lines for name in line} | set(lines[-1]["summary"])
    for kind in (Identity, About):
        names |= {field.name for field in dataclasses.fields(kind)}
    for table in ("tasks", "idle"):
        names |= set((tmp_path / "trace" / "csv" / f"{table}.csv").read_text().splitlines()[0].split(","))
    names |= {re.sub(r"-\d+$", "-n", name) for name in np.load(tmp_path / "trace" / "trace.npz").files}
    assert not [name for name in sorted(names) if not re.search(rf"[`{{\" ]{name}[`\" :]", page)]


def shown_module(page: str, name: str, monkeypatch) -> types.ModuleType:
    """Return what Python makes of a file that a page shows."""
    [(path, text)] = [(path, text) for path, text in files(DOCS / page).items() if path.endswith(f"{name}.py")]
    module = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def test_the_scheduler_of_the_how_to_keeps_the_order(monkeypatch):
    """Every task once, each after its predecessors, whatever its seed; its TOML file has the keys of its Settings."""
    module = shown_module("howto/scheduler.md", "shuffled", monkeypatch)
    settings = tomllib.loads(files(DOCS / "howto/scheduler.md")["scheduler_configs/shuffled.toml"])
    orders = set()
    for seed in range(5):
        with module.Scheduler(module.Settings(**settings | {"seed": seed})) as scheduler:
            a = k.arena(scheduler.needs_shared_memory)
            graph = k.random_graph(a, 1)
            scheduler.run(graph)
        log = a.log.array
        for task in graph.tasks:
            assert log[task.number, k.RUNS] == 1
            assert all(log[p, k.STOP] <= log[task.number, k.START] for p in task.predecessors)
        orders.add(tuple(sorted(range(len(graph.tasks)), key=lambda number, log=log: log[number, k.START])))
    assert len(orders) > 1


def test_the_policy_of_the_how_to_ranks_tasks(monkeypatch):
    """It runs a graph in an order of its own, with the bits of any other."""
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    monkeypatch.setattr(scheduler, "POLICIES", policies.POLICIES)
    [text] = files(DOCS / "howto/policy.md").values()
    exec(text, vars(policies) | {"__name__": "of_the_page"})
    found = []
    for name in ("most_waited_for", "oldest_first"):
        settings = load_scheduler("native", {"workers": 1, "immediate_successor": False}).settings
        with scheduler.Scheduler(dataclasses.replace(settings, policy=name)) as native:
            a = k.arena(False)
            graph = k.random_graph(a, seed=3)
            native.run(graph)
        log = a.log.array
        for task in graph.tasks:
            assert all(log[p, k.STOP] <= log[task.number, k.START] for p in task.predecessors)
        found.append(np.argsort(log[: len(graph.tasks), k.START]).tolist())
    assert found[0] != found[1]


def test_the_norm_of_the_how_to_trains(monkeypatch):
    """The model has its tensors, the program its kernels; its gradients are those of finite differences, its declarations what it does."""
    monkeypatch.setattr(norms, "NORMS", dict(norms.NORMS))
    monkeypatch.setattr(shape, "NORMS", norms.NORMS)
    [text] = files(DOCS / "howto/norm.md").values()
    names = vars(norms) | {"__name__": "of_the_page"}
    exec(text, names)
    config = load_graph("tiny")
    gpt = GPT2(dataclasses.replace(config.model, norm="rmsnorm"), config.batch, config.tiles, config.options)
    gpt.initialize(1)
    rng = np.random.default_rng(1)
    for tensor in (gpt.s.tokens, gpt.s.targets):
        tensor.array[:] = rng.integers(0, 257, len(tensor.array))
    graph, losses = training_graph(gpt), []
    for step in range(5):
        gpt.set_hyper(step, 1e-3, 0.0)
        for task in (check(graph) if step == 0 else graph).tasks:
            task.run()
        losses.append(float(gpt.s.loss.array[0]))
    assert losses == sorted(losses, reverse=True)
    assert "ln1b" not in gpt.p.tensors

    x, weight, dout = rng.normal(size=(3, 8)), rng.normal(size=8), rng.normal(size=(3, 8))
    rstd, dinp, dweight = np.empty(3), np.empty((3, 8)), np.empty(8)

    def total() -> float:
        out = np.empty((3, 8))
        names["rmsnorm_forward"].body(out, rstd, x, weight)
        return float((out * dout).sum())

    total()
    names["rmsnorm_backward"].body(dinp, dout, x, weight, rstd)
    names["rmsnorm_backward_weight"].body(dweight, dout, x, rstd)
    for array, gradient in ((x, dinp), (weight, dweight)):
        for at in np.ndindex(array.shape):
            array[at] += 1e-6
            high = total()
            array[at] -= 2e-6
            low = total()
            array[at] += 1e-6
            assert (high - low) / 2e-6 == pytest.approx(gradient[at], rel=1e-4, abs=1e-7)


def test_the_trace_format_of_the_how_to_is_written_and_checked(monkeypatch, tmp_path):
    """It finds the tasks that the trace has, and a task that ends before it starts."""
    module = shown_module("howto/trace_format.md", "json_lines", monkeypatch)
    monkeypatch.setitem(formats.FORMATS, "json-lines", (module.write, module.check, "tasks.jsonl"))
    trace = record(prepare("tiny"), "sequential", steps=1)
    formats.save(trace, tmp_path)
    formats.export(trace, tmp_path, ["json-lines"])
    assert formats.check(tmp_path)["json-lines"] == {"tasks": len(trace.records)}
    path = tmp_path / "tasks.jsonl"
    path.write_text(path.read_text().replace('"stop_ns": ', '"stop_ns": -', 1))
    with pytest.raises(formats.RuleError, match="wanted ready <= start <= stop"):
        formats.check(tmp_path)


def test_training_graphs_of_the_tables_are_the_graph_files():
    """The page says 1,324 tasks and 191.1 GFLOP of gpt2-124m."""
    config = load_graph("gpt2-124m")
    graph = training_graph(GPT2(config.model, config.batch, config.tiles, config.options))
    assert f"{len(graph.tasks):,} tasks and {graph.flops / 1e9:.1f} GFLOP" in (DOCS / "reference" / "model.md").read_text(encoding="utf-8")


def test_a_program_with_kernels_is_clean_to_a_type_checker(tmp_path):
    """The kernel page's program, below the line that the page names: annotations of kernels are values."""
    pytest.importorskip("mypy", reason="pip install 'taskgpt[test]'")
    page = DOCS / "howto" / "kernel.md"
    [line] = re.findall(r"`(# mypy: .*)`", page.read_text(encoding="utf-8"))
    (tmp_path / "program.py").write_text("\n".join([line, *blocks(page, "python")]))
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "program.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
