"""What a trace says of time: efficiencies, idle time by cause, kernels, and the longest path. A trace in, numbers out.

Efficiencies follow POP (pop-coe.eu): a product of factors, 1 is perfect. W workers; wall, the time in which a run is under way (not that
between two runs, in which validation may run, say); useful, the time inside tasks in the meantime, of runs that were left out too; m, the
worker with the most of it.

    parallel efficiency = useful / (W wall)  =  load balance x dependency efficiency x scheduling efficiency
    load balance        = (useful / W) / useful of m
    dependency eff.     = useful of m / (wall - m's idle time by scheduling)
    scheduling eff.     = (wall - m's idle time by scheduling) / wall
    computation scaling = useful of a 1-worker trace / useful, of a step each
    global efficiency   = parallel efficiency x computation scaling

A worker that runs no task idles, for the causes of idle.py. A step of several ranks is one of each.
"""

import itertools
import statistics
from typing import Any

import numpy as np

from taskgpt.lab.traces.idle import CAUSES, gaps, in_runs_ns
from taskgpt.lab.traces.ranks import split
from taskgpt.lab.traces.trace import Trace
from taskgpt.tasks import dependencies


def analyse(trace: Trace, reference: Trace | None = None, limits: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the numbers, all of them JSON's. `reference`: the same steps on one worker, for computation scaling.

    `limits`: what the machine reaches on as many threads (machine.limits), if not what the trace itself says.

    Raises ValueError for a trace without tasks.
    """
    if not len(trace.records):
        raise ValueError("a trace without tasks says nothing; wanted runs with records")
    r, workers, limits = trace.records, trace.workers, limits or trace.about.get("limits")
    wall_ns, elsewhere = in_runs_ns(trace)
    useful = np.bincount(r["worker"], r["stop_ns"] - r["start_ns"], workers) + elsewhere
    waits = gaps(trace)
    idle = {cause: np.bincount(waits["worker"], waits[cause], workers) for cause in CAUSES}
    most = int(useful.argmax())
    unhindered_ns = wall_ns - idle["scheduling"][most]
    factors = {
        "parallel efficiency": useful.sum() / (workers * wall_ns),
        "load balance": useful.mean() / useful[most],
        "dependency efficiency": useful[most] / unhindered_ns,
        "scheduling efficiency": unhindered_ns / wall_ns,
    }
    scaling = _useful_a_step(reference) / _useful_a_step(trace) if reference else None
    steps_ns = np.concatenate([np.diff(np.sort(trace.runs["end_ns"][trace.rank_of_run == rank])) for rank in range(len(trace.ranks))])
    return {
        "scheduler": trace.about["scheduler"],
        "workers": workers,
        "steps": _steps(trace),
        "tasks": len(r),
        "limits": limits,
        "wall_ms": wall_ns / 1e6,
        "step_ms": float(np.median(steps_ns) if len(steps_ns) else wall_ns) / 1e6,
        "efficiency": {name: float(value) for name, value in factors.items()}
        | {
            "computation scaling": None if scaling is None else float(scaling),
            "global efficiency": None if scaling is None else float(scaling * factors["parallel efficiency"]),
        },
        "idle_ms": {cause: float(idle[cause].sum()) / 1e6 for cause in CAUSES},
        "network_idle_ms": float(waits["network"].sum()) / 1e6,
        "useful_ms": float(useful.sum() - elsewhere.sum()) / 1e6,
        "other_runs_ms": float(elsewhere.sum()) / 1e6,
        **{f"by_{name}": _by(trace, name, limits) for name in ("kernel", "layer", "phase")},
        "by_rank": by_rank(trace, waits) if len(trace.ranks) > 1 else [],
        "longest_path": longest_path(trace),
    }


def in_words(trace: Trace) -> str:
    """Return what to read first: how long it took, and what no schedule of as many workers could fall below. Raises as `analyse`."""
    found = analyse(trace)
    path, factors = found["longest_path"], found["efficiency"]
    runs = f"{found['steps']} runs, {found['step_ms']:.2f} ms each (median)" if found["steps"] > 1 else f"{found['wall_ms']:.2f} ms"
    rows = {
        "T1, all tasks of a run one after the other": f"{path['t1_ms']:9.2f} ms",
        f"T-infinity, its longest path: {len(path['path'])} tasks": f"{path['tinf_ms']:9.2f} ms",
        f"no schedule on {found['workers']} workers is shorter than": f"{path['bound_ms']:9.2f} ms",
        "average parallelism, T1 / T-infinity": f"{path['average_parallelism']:9.2f}",
    }
    head = f"{found['tasks']} tasks on {found['workers']} workers: {runs}, parallel efficiency {factors['parallel efficiency']:.2f}"
    return "\n".join([head, *(f"  {what:43}{value}" for what, value in rows.items())])


def _useful_a_step(trace: Trace) -> float:
    return float((trace.records["stop_ns"] - trace.records["start_ns"]).sum()) / _steps(trace)


def _steps(trace: Trace) -> int:
    """Return how many runs there are, of the rank that has most."""
    return int(np.bincount(trace.rank_of_run).max())


def by_rank(trace: Trace, waits: np.ndarray) -> list[dict[str, Any]]:
    """Return what each rank's workers did, and its exchanges: while at least one was under way (`exchange_ms`), and while besides nothing
    was to be done (`network_idle_ms`, of all its workers)."""
    found = []
    for number, (rank, part) in enumerate(zip(trace.ranks, split(trace), strict=True)):
        if not len(part.records):
            continue
        wall_ns, elsewhere = in_runs_ns(part)
        useful = np.bincount(part.records["worker"], part.records["stop_ns"] - part.records["start_ns"], part.workers) + elsewhere
        x = part.exchanges
        x = x[(x["end_ns"] > part.begin_ns) & (x["begin_ns"] < part.end_ns)]
        found.append(
            {
                "rank": number,
                "name": rank.name,
                "workers": part.workers,
                "steps": len(part.runs),
                "parallel_efficiency": float(useful.sum() / (part.workers * wall_ns)),
                "load_balance": float(useful.mean() / useful.max()),
                "useful_ms": float(useful.sum() - elsewhere.sum()) / 1e6,
                "network_idle_ms": float(waits["network"][trace.rank_of_worker[waits["worker"]] == number].sum()) / 1e6,
                "exchange_ms": covered_ns(x["begin_ns"], x["end_ns"]) / 1e6,
                "sent_mb": float(x["bytes"].sum()) / 1e6,
                "clock_error_us": rank.clock_error_ns / 1e3,
            }
        )
    return found


def covered_ns(begin: np.ndarray, end: np.ndarray) -> int:
    """Return for how long at least one of these intervals goes on."""
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order]) if len(end) else end
    before = np.concatenate([begin[:1], end[:-1]])
    return int((end - np.maximum(begin, before)).clip(0).sum())


def _by(trace: Trace, name: str, limits: dict[str, float] | None) -> list[dict[str, Any]]:
    """Return count, time and speeds of each kernel, layer or phase, the longest first.

    of_sgemm, of_memory: a worker's speed against its share of the machine's, measured on as many threads, if it is known. Bytes are
    those that tasks declare: what they find in caches makes of_memory larger than 1.
    """
    column, took = trace.column(name), trace.records["stop_ns"] - trace.records["start_ns"]
    flops, moved = trace.column("flops"), trace.column("bytes")
    rows = []
    for value in np.unique(column):
        mine = column == value
        ns = int(took[mine].sum())
        label = int(value) if name == "layer" else trace.names(name)[value] or "other"
        rows.append(
            {
                "name": label,
                "tasks": int(mine.sum()),
                "ms": ns / 1e6,
                "share": ns / max(1, int(took.sum())),
                "mean_us": ns / mine.sum() / 1e3,
                "gflops": float(flops[mine].sum()) / max(1, ns),
                "gbs": float(moved[mine].sum()) / max(1, ns),
            }
        )
        of = {"of_sgemm": ("gflops", "sgemm_gflops"), "of_memory": ("gbs", "memory_gbs")}
        rows[-1] |= {name: rows[-1][speed] / (limits[limit] / trace.workers) if limits else None for name, (speed, limit) in of.items()}
    return sorted(rows, key=lambda row: -row["ms"])


def longest_path(trace: Trace) -> dict[str, Any]:
    """Return, for the run of median length, T1 (all task times), T-infinity (those of the longest path), and that path.

    No schedule of W workers can be shorter than `bound_ms`, the larger of T1 / W and T-infinity, with tasks that take as long as here.
    """
    lengths = (trace.runs["end_ns"] - trace.runs["begin_ns"]).tolist()
    chosen = lengths.index(statistics.median_low(lengths))
    graph = trace.graphs[trace.runs["graph"][chosen]]
    workers = trace.ranks[trace.rank_of_run[chosen]].workers
    mine = trace.records[trace.records["run"] == chosen]
    took = np.zeros(len(graph), np.int64)
    took[mine["task"]] = mine["stop_ns"] - mine["start_ns"]
    predecessors = [graph.predecessors[a:b].tolist() for a, b in itertools.pairwise(graph.first.tolist())]
    path = dependencies.longest_path(predecessors, took.tolist())
    total, longest = int(took.sum()), int(took[path].sum())
    return {
        "run": chosen,
        "step": int(trace.runs["step"][chosen]),
        "t1_ms": total / 1e6,
        "tinf_ms": longest / 1e6,
        "average_parallelism": total / max(1, longest),
        "bound_ms": max(total / workers, longest) / 1e6,
        "path": [
            {"task": task, "kernel": graph.kernels[graph.kernel[task]], "layer": int(graph.layer[task]), "ms": took[task] / 1e6}
            for task in path
        ],
    }
