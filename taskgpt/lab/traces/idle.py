"""When workers run no task, and why: the gaps of a trace, each with its time by cause.

Of any moment's I idle workers and R ready tasks that nobody runs, min(I, R) idle although there is work: for `barrier`, as many as of the
ready tasks belong to a later loop than the one that runs (fork-join only), the others for `scheduling`. The rest idle for `dependency`:
nothing is ready. `between`: no run is under way. Idle workers share alike. Workers of a rank run its tasks alone: each rank stands for
itself, and of its time for `dependency`, that while one of its exchanges is under way counts as `network` too. Of several programs,
that for `scheduling` while as many tasks run as there are cores counts as `taken` too.
"""

import numpy as np

from taskgpt.lab.traces.process import cores_of
from taskgpt.lab.traces.ranks import split
from taskgpt.lab.traces.trace import Trace

CAUSES = ("barrier", "dependency", "scheduling", "between")
_OF_CAUSES = ("network", "taken")
GAP_TYPE = np.dtype(
    [("worker", np.int64), ("begin_ns", np.int64), ("end_ns", np.int64), *((name, float) for name in (*CAUSES, *_OF_CAUSES))]
)


def gaps(trace: Trace) -> np.ndarray:
    """Return the gaps, GAP_TYPE, by worker and time, from the trace's beginning to its end; the ns of causes add up to end - begin.

    network: how much of `dependency` it is; taken: how much of `scheduling`.
    """
    first_worker, found, taken = 0, [], when_taken(trace)
    for part in split(trace):
        mine = _gaps(part, trace.begin_ns, trace.end_ns, *taken)
        mine["worker"] += first_worker
        first_worker += part.workers
        found.append(mine)
    return np.concatenate(found)


def when_taken(trace: Trace, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the stretches, from when until when, in which so many tasks more run as there are cores; none for a trace of one program."""
    cores = cores_of(trace.programs) if len(trace.programs) > 1 else 0
    moments = _moments(trace, trace.begin_ns, trace.end_ns)
    running = sum(_under_way(moments, each["start_ns"], each["stop_ns"]) for each in (trace.records, trace.others))
    is_taken = running >= cores + spare if cores else np.zeros(len(moments) - 1, bool)
    return moments[:-1][is_taken], moments[1:][is_taken]


def _gaps(trace: Trace, begin_ns: int, end_ns: int, taken_from: np.ndarray, taken_until: np.ndarray) -> np.ndarray:
    """Return those of one rank, from some beginning to some end."""
    r, x = trace.records, trace.exchanges
    moments = np.union1d(_moments(trace, begin_ns, end_ns), np.concatenate([taken_from, taken_until]))
    idle = trace.workers - sum(_under_way(moments, each["start_ns"], each["stop_ns"]) for each in (r, trace.others))
    ready = _under_way(moments, r["ready_ns"], r["start_ns"])
    is_between = _is_between(trace, moments)
    later = _under_way(moments, *_behind_a_barrier(trace)) if trace.about["is_fork_join"] else np.zeros_like(ready)
    share = 1 / np.maximum(idle, 1)  # of what idles, each idle worker's
    with_work = np.minimum(idle, ready)
    barrier = np.minimum(with_work, later)
    shares = {
        "barrier": barrier * share,
        "scheduling": (with_work - barrier) * share,
        "dependency": np.where(is_between, 0, (idle - with_work) * share),
        "between": np.where(is_between, (idle - with_work) * share, 0),
    }
    shares["network"] = np.where(_under_way(moments, x["begin_ns"], x["end_ns"]) > 0, shares["dependency"], 0)
    shares["taken"] = np.where(_under_way(moments, taken_from, taken_until) > 0, shares["scheduling"], 0)
    found = _of_each_worker(trace, begin_ns, end_ns)
    first, last = (np.searchsorted(moments, found[name]) for name in ("begin_ns", "end_ns"))
    for cause, part in shares.items():
        so_far = np.concatenate([[0.0], np.cumsum(part * np.diff(moments))])
        found[cause] = so_far[last] - so_far[first]
    return found


def in_runs_ns(trace: Trace) -> tuple[int, np.ndarray]:
    """Return how long runs were under way, and the time of each worker's tasks of other runs in the meantime."""
    moments = _moments(trace, trace.begin_ns, trace.end_ns)
    so_far = np.concatenate([[0], np.cumsum(np.where(_is_between(trace, moments), 0, np.diff(moments)))])
    start, stop = (np.searchsorted(moments, trace.others[name].clip(moments[0], moments[-1])) for name in ("start_ns", "stop_ns"))
    return int(so_far[-1]), np.bincount(trace.others["worker"], so_far[stop] - so_far[start], trace.workers)


def _moments(trace: Trace, begin_ns: int, end_ns: int) -> np.ndarray:
    """Return when anything changes, from a beginning to an end."""
    r, o, runs = trace.records, trace.others, trace.runs
    times = [r["ready_ns"], r["start_ns"], r["stop_ns"], o["start_ns"], o["stop_ns"], runs["begin_ns"], runs["end_ns"]]
    times += [trace.exchanges[name] for name in ("begin_ns", "end_ns")]
    return np.unique(np.concatenate([[begin_ns, end_ns], *times]).clip(begin_ns, end_ns))


def _under_way(moments: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return how many of these intervals hold each stretch between two moments."""
    begin, end = (np.searchsorted(moments, each.clip(moments[0], moments[-1])) for each in (begin, end))
    return np.cumsum(np.bincount(begin, minlength=len(moments)) - np.bincount(end, minlength=len(moments)))[:-1]


def _is_between(trace: Trace, moments: np.ndarray) -> np.ndarray:
    return _under_way(moments, trace.runs["begin_ns"], trace.runs["end_ns"]) == 0


def _of_each_worker(trace: Trace, begin_ns: int, end_ns: int) -> np.ndarray:
    """Return the gaps without their causes."""
    parts = []
    everything = np.concatenate([trace.records, trace.others])
    everything = everything[np.argsort(everything["start_ns"], kind="stable")]
    everything = everything[np.argsort(everything["worker"], kind="stable")]
    bounds = np.searchsorted(everything["worker"], np.arange(trace.workers + 1))
    for worker in range(trace.workers):
        mine = everything[bounds[worker] : bounds[worker + 1]]
        part = np.zeros(len(mine) + 1, GAP_TYPE)
        part["worker"] = worker
        part["begin_ns"] = np.concatenate([[begin_ns], mine["stop_ns"]]).clip(begin_ns, end_ns)
        part["end_ns"] = np.concatenate([mine["start_ns"], [end_ns]]).clip(begin_ns, end_ns)
        parts.append(part[part["end_ns"] > part["begin_ns"]])
    return np.concatenate(parts)


def _behind_a_barrier(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return from when until when each task was ready while its loop had not begun."""
    r, loop = trace.records, trace.column("loop")
    _, key = np.unique(r["run"] * (loop.max(initial=0) + 1) + loop, return_inverse=True)
    first_start = np.full(len(r), np.iinfo(np.int64).max)
    np.minimum.at(first_start, key, r["start_ns"])
    return r["ready_ns"], np.maximum(r["ready_ns"], first_start[key])
