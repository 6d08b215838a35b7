"""When workers run no task, and why: the gaps of a trace, each with its time by cause.

Of any moment's I idle workers and R ready tasks that nobody runs, min(I, R) idle although there is work: for `barrier`, as many as of the
ready tasks belong to a later loop than the one that runs (fork-join only), the others for `scheduling`. The rest idle for `dependency`:
nothing is ready. `between`: no run is under way. Idle workers share alike.
"""

import numpy as np

from taskgpt.lab.trace import Trace

CAUSES = ("barrier", "dependency", "scheduling", "between")
GAP_TYPE = np.dtype([("worker", np.int64), ("begin_ns", np.int64), ("end_ns", np.int64), *((cause, np.float64) for cause in CAUSES)])


def gaps(trace: Trace) -> np.ndarray:
    """Return the gaps, GAP_TYPE, by worker and time, from the trace's beginning to its end; the ns of causes add up to end - begin."""
    r, runs = trace.records, trace.runs
    ends = [trace.begin_ns, trace.end_ns]
    moments = np.unique(np.concatenate([r["ready_ns"], r["start_ns"], r["stop_ns"], runs["begin_ns"], runs["end_ns"], ends]))

    def under_way(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return how many of these intervals hold each stretch between two moments."""
        change = np.bincount(np.searchsorted(moments, begin), minlength=len(moments)).astype(np.int64)
        change -= np.bincount(np.searchsorted(moments, end), minlength=len(moments))
        return np.cumsum(change)[:-1]

    idle = trace.workers - under_way(r["start_ns"], r["stop_ns"])
    ready = under_way(r["ready_ns"], r["start_ns"])
    is_between = under_way(runs["begin_ns"], runs["end_ns"]) == 0
    later = under_way(*_behind_a_barrier(trace)) if trace.about["is_fork_join"] else np.zeros_like(ready)
    share = 1 / np.maximum(idle, 1)  # of what idles, each idle worker's
    with_work = np.minimum(idle, ready)
    barrier = np.minimum(with_work, later)
    shares = {
        "barrier": barrier * share,
        "scheduling": (with_work - barrier) * share,
        "dependency": np.where(is_between, 0, (idle - with_work) * share),
        "between": np.where(is_between, (idle - with_work) * share, 0),
    }
    found = _of_each_worker(trace)
    first, last = (np.searchsorted(moments, found[name]) for name in ("begin_ns", "end_ns"))
    for cause, part in shares.items():
        so_far = np.concatenate([[0.0], np.cumsum(part * np.diff(moments))])
        found[cause] = so_far[last] - so_far[first]
    return found


def _of_each_worker(trace: Trace) -> np.ndarray:
    """Return the gaps without their causes."""
    parts = []
    for worker in range(trace.workers):
        mine = trace.records[trace.records["worker"] == worker]
        part = np.zeros(len(mine) + 1, GAP_TYPE)
        part["worker"] = worker
        part["begin_ns"] = np.concatenate([[trace.begin_ns], mine["stop_ns"]])
        part["end_ns"] = np.concatenate([mine["start_ns"], [trace.end_ns]])
        parts.append(part[part["end_ns"] > part["begin_ns"]])
    return np.concatenate(parts)


def _behind_a_barrier(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return from when until when each task was ready while its loop had not begun."""
    r, loop = trace.records, trace.column("loop")
    key = r["run"] * (loop.max(initial=0) + 1) + loop
    first_start = np.full(key.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_start, key, r["start_ns"])
    return r["ready_ns"], np.maximum(r["ready_ns"], first_start[key])
