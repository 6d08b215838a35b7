"""What `taskgpt trace` reads: its own trace.npz, which it reports and converts, and the files of each format, which it checks."""

from argparse import Namespace
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from taskgpt.lab.traces import formats, page, timeline
from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.ranks import of_programs
from taskgpt.lab.traces.trace import RECORD_TYPE, RUN_TYPE, Trace
from taskgpt.lab.traces.traced_graph import TracedGraph
from taskgpt.programs.trace import report, steps_of

from . import Case


def _trace(is_fork_join: bool = False) -> Trace:
    """Return two runs of four tasks, the second one beginning while the first one goes on, and a run of another graph that was left out."""
    columns = {"kernel": [0, 1, 1, 2], "phase": [0, 0, 1, 1], "layer": [-1, 0, 1, -1], "flops": [0, 10, 20, 30], "bytes": [8, 16, 24, 32]}
    columns |= {"loop": [0, 1, 1, 2], "first": [0, 0, 1, 2, 4], "predecessors": [0, 0, 1, 2]}
    arrays = {name: np.array(values) for name, values in columns.items()}
    calls = [f"call {n} out(x[{n}])" for n in range(4)]
    graphs = [TracedGraph(name, ["a", "b", "c"], ["forward", ""], calls, **arrays) for name in ("training step", "validation")]
    rows = [(0, 0, 0, 0, 10, 0), (0, 1, 10, 10, 30, 0), (0, 2, 10, 12, 30, 1), (1, 0, 25, 30, 35, 1), (0, 3, 30, 30, 45, 0)]
    rows += [(1, 2, 35, 35, 66, 1), (1, 1, 45, 50, 60, 0), (1, 3, 66, 66, 66, 1)]
    runs = np.array([(0, 0, 0, 45, 0), (0, 1, 25, 66, 1)], RUN_TYPE)
    about = {"scheduler": "native: 2 workers", "workers": 2, "is_fork_join": is_fork_join, "machine": {"processor": "x"}}
    about["limits"] = {"sgemm_gflops": 100.0, "memory_gbs": 10.0}
    others = np.array([(0, 0, 70, 70, 80, 1)], RECORD_TYPE)
    return Trace(about, graphs, runs, np.array(rows, RECORD_TYPE), 0, others, {(0, 0): np.array([[1, 0], [3, 1]])})


def _make_trace(folder: Path) -> None:
    _trace().save(folder / "trace.npz")


def _read_trace(folder: Path) -> None:
    """Do with it all that can be done."""
    trace = Trace.load(folder)
    formats.export(trace, folder / "again", formats.FORMATS, arrows=True)
    formats.check(folder / "again")
    steps, _ = steps_of(str(folder), trace, Namespace(runs="training step", skip=0))
    str(Comparison.of(steps, trace))
    page.write([trace, steps], folder / "again" / "page.html", "fuzz", Comparison.of(steps).tables())
    timeline.to_svg([trace, steps], colour_by="layer")


def _make_merged(folder: Path) -> None:
    traces = {}
    for pid, is_fork_join in ((7, False), (8, True)):
        trace = _trace(is_fork_join)
        process = {"pid": pid, "program": "taskgpt train", "share": "node", "boot": "a", "cores": [0, 1]}
        traces[str(pid)] = replace(trace, about=trace.about | {"process": process})
    of_programs(traces).save(folder / "trace.npz")


def _read_merged(folder: Path) -> None:
    trace = Trace.load(folder)
    formats.export(trace, folder / "again")
    formats.check(folder / "again")
    flags = {"runs": "training step", "skip": 0, "reference": None, "json": None, "html": str(folder / "page.html"), "wide": True}
    with redirect_stdout(None):
        report(Namespace(paths=[str(folder)], **flags))
    of_programs({"this": trace, "other": trace})


def _make_format(name: str, is_fork_join: bool, folder: Path) -> None:
    formats.export(_trace(is_fork_join), folder, [name], arrows=True)


def _case(name: str, written: str, is_fork_join: bool = False) -> Case:
    return Case(name, partial(_make_format, written, is_fork_join), formats.check)


CASES = (
    Case("trace", _make_trace, _read_trace),
    Case("merged_trace", _make_merged, _read_merged),
    _case("perfetto", "perfetto"),
    _case("paraver", "paraver"),
    _case("ovni", "ovni"),
    _case("ovni_loops", "ovni", is_fork_join=True),
    _case("csv", "csv"),
    _case("parquet", "parquet"),
)
