"""Traces as one HTML page that opens from disk: a timeline of the workers to zoom, with what each task read, wrote and waited for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.files import write_whole
from taskgpt.lab.traces.efficiency import longest_path
from taskgpt.lab.traces.trace import Trace, TracedGraph
from taskgpt.tasks.picture import COLOURS

TEMPLATE = Path(__file__).with_name("page.html")


def write(traces: Sequence[Trace], path: str | Path, title: str, tables: Sequence[dict[str, Any]] = ()) -> None:
    """Write the page, whole or not at all: traces one above the other, each from its own beginning, then tables.

    A table has a caption, a head (a list of words) and rows of words. Raises UserError.
    """
    data = {"title": title, "traces": [_data(trace) for trace in traces], "tables": list(tables), "colours": COLOURS}
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing ends the script early
    text = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", words)
    write_whole(path, text)


def _data(trace: Trace) -> dict[str, Any]:
    begin = trace.begin_ns
    times = {name: (trace.records[f"{name}_ns"] - begin).tolist() for name in ("ready", "start", "stop")}
    runs = [
        {"graph": graph, "step": step, "begin": start - begin, "end": end - begin, "number": number}
        for graph, step, start, end, number in trace.runs.tolist()
    ]
    longest = longest_path(trace) if len(trace.records) else {"run": -1, "path": []}
    of_run = np.flatnonzero(trace.records["run"] == longest["run"])
    place = dict(zip(trace.records["task"][of_run].tolist(), of_run.tolist(), strict=True))
    return {
        "path": [place[task["task"]] for task in longest["path"] if task["task"] in place],
        "title": trace.about["scheduler"],
        "workers": trace.workers,
        "length_ns": trace.end_ns - begin,
        "runs": runs,
        "graphs": [_graph(graph) for graph in trace.graphs],
        "edges": [{"from": a, "to": b, "pairs": pairs.tolist()} for (a, b), pairs in trace.edges.items()],
        **times,
        "others": {"worker": trace.others["worker"].tolist()}
        | {name: (trace.others[f"{name}_ns"] - begin).tolist() for name in ("start", "stop")},
        **{name: trace.records[name].tolist() for name in ("run", "task", "worker")},
    }


def _graph(graph: TracedGraph) -> dict[str, Any]:
    texts = {"name": graph.name, "kernels": graph.kernels, "phases": graph.phases, "calls": graph.calls}
    return texts | {name: getattr(graph, name).tolist() for name in TracedGraph.ARRAYS if name != "loop"}
