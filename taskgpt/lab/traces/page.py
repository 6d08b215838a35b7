"""Traces as one HTML page that opens from disk: a timeline of the workers to zoom, with what each task read, wrote and waited for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt import palette
from taskgpt.files import write_whole
from taskgpt.lab.theme import html_page
from taskgpt.lab.traces.efficiency import longest_path
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.trace import Trace
from taskgpt.lab.traces.traced_graph import TracedGraph

_BODY, _STYLE = (Path(__file__).with_name(f"page.{kind}") for kind in ("html", "css"))


def write(traces: Sequence[Trace], path: str | Path, title: str, tables: Sequence[dict[str, Any]] = ()) -> None:
    """Write the page, whole or not at all: traces one above the other, each from its own beginning, then tables.

    A table has a caption, a head (a list of words) and rows of words. Raises UserError.
    """
    data = {"title": title, "traces": [_data(trace) for trace in traces], "tables": list(tables), "keys": _keys(traces)}
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing ends the script early
    body = _BODY.read_text(encoding="utf-8").replace("/*DATA*/", words)
    write_whole(path, html_page(title, _STYLE.read_text(encoding="utf-8"), body))


def _data(trace: Trace) -> dict[str, Any]:
    begin = trace.begin_ns
    times = {name: (trace.records[f"{name}_ns"] - begin).tolist() for name in ("ready", "start", "stop")}
    runs = [
        {"graph": graph, "step": step, "begin": start - begin, "end": end - begin, "number": number}
        for graph, step, start, end, number in trace.runs.tolist()
    ]
    longest = longest_path(trace) if len(trace.records) else {"run": -1, "path": []}
    of_run = np.flatnonzero(trace.records["run"] == longest["run"])
    idle = gaps(trace)
    place = dict(zip(trace.records["task"][of_run].tolist(), of_run.tolist(), strict=True))
    return {
        "path": [place[task["task"]] for task in longest["path"] if task["task"] in place],
        "title": trace.about["scheduler"],
        "workers": trace.workers,
        "processes": [{"name": rank.name, "workers": rank.workers} for rank in trace.ranks] if len(trace.ranks) > 1 else [],
        "length_ns": trace.end_ns - begin,
        "runs": runs,
        "graphs": [_graph(graph) for graph in trace.graphs],
        "edges": [{"from": a, "to": b, "pairs": pairs.tolist()} for (a, b), pairs in trace.edges.items()],
        **times,
        "others": {"worker": trace.others["worker"].tolist()}
        | {name: (trace.others[f"{name}_ns"] - begin).tolist() for name in ("start", "stop")},
        "gaps": {"worker": idle["worker"].tolist(), "causes": {cause: idle[cause].round().astype(int).tolist() for cause in CAUSES}}
        | {name: (idle[key] - begin).tolist() for name, key in (("start", "begin_ns"), ("stop", "end_ns"))},
        **{name: trace.records[name].tolist() for name in ("run", "task", "worker")},
    }


def _keys(traces: Sequence[Trace]) -> dict[str, dict[str | int, tuple[str, str, str]]]:
    """Return, for what colours can tell, (label, colour, ink on it) of each kernel, layer and phase, in the order of the legend."""
    values = {
        "kernel": [name for trace in traces for name in trace.names("kernel")],
        "layer": [layer for trace in traces for layer in trace.column("layer").tolist()],
        "phase": [name for trace in traces for name in trace.names("phase")],
    }
    return {
        what: {value: (label, colour, palette.ink_on(colour)) for value, (label, colour) in palette.key(what, found).items()}
        for what, found in values.items()
    }


def _graph(graph: TracedGraph) -> dict[str, Any]:
    texts = {"name": graph.name, "kernels": graph.kernels, "phases": graph.phases, "calls": graph.calls}
    return texts | {name: getattr(graph, name).tolist() for name in TracedGraph.ARRAYS if name != "loop"}
