"""What several programs made of a machine's cores, of a trace of all of them: POP's efficiency of the node, and of each process.

    node's efficiency = time in tasks of all processes / (cores x span of the trace), and while all of them are at work
    of the cores      = time in tasks of a process / (cores x span of that process)

The cores are those that the processes may use together. A process' own efficiency and load balance are over its workers, while a run of it
is under way. Where programs do not share, two tasks may be on one core at once, and both count: the node's efficiency may be above 1.
"""

from typing import Any

import numpy as np

from taskgpt.lab.layout import Table
from taskgpt.lab.traces.efficiency import by_rank, covered_ns
from taskgpt.lab.traces.idle import gaps, when_taken
from taskgpt.lab.traces.process import cores_of, process_of
from taskgpt.lab.traces.trace import Trace


def node(trace: Trace) -> dict[str, Any]:
    """Return the numbers, all of them JSON's. Raises ValueError for a trace that does not tell its cores, or in which no time passes."""
    cores, span_ns = cores_of(trace.programs), trace.end_ns - trace.begin_ns
    if not cores or not span_ns:
        raise ValueError("a trace that tells neither cores nor time says nothing of a node; wanted processes, and runs with tasks")
    waits = gaps(trace)
    rank, programs = trace.rank_of_worker, [process_of(about) for about in trace.programs]
    processes = []
    for row in by_rank(trace, waits):
        number = row["rank"]
        runs = trace.runs[trace.rank_of_run == number]
        mine_ns, process = int(runs["end_ns"].max() - runs["begin_ns"].min()), programs[trace.ranks[number].program]
        waited = waits["taken"][rank[waits["worker"]] == number].sum()
        processes.append(
            {
                **{name: row[name] for name in ("name", "workers", "parallel_efficiency", "load_balance", "useful_ms")},
                "share": process.share if process else "",
                "span_ms": mine_ns / 1e6,
                "of_cores": row["useful_ms"] * 1e6 / (cores * max(1, mine_ns)),
                "waited_ms": float(waited) / 1e6,
            }
        )
    of_run = trace.rank_of_run
    spans = [trace.runs[of_run == number] for number in np.unique(of_run)]
    begin, end = max(runs["begin_ns"].min() for runs in spans), min(runs["end_ns"].max() for runs in spans)
    together_ns = max(0, int(end - begin))
    useful_ns, useful_together_ns = _in_tasks_ns(trace, trace.begin_ns, trace.end_ns), _in_tasks_ns(trace, begin, max(begin, end))
    return {
        "cores": cores,
        "span_ms": span_ns / 1e6,
        "useful_ms": useful_ns / 1e6,
        "efficiency": useful_ns / (cores * span_ns),
        "together_ms": together_ns / 1e6,
        "together_efficiency": useful_together_ns / (cores * together_ns) if together_ns else None,
        "all_taken_ms": covered_ns(*when_taken(trace)) / 1e6,
        "oversubscribed_ms": covered_ns(*when_taken(trace, spare=1)) / 1e6,
        "processes": processes,
    }


def _in_tasks_ns(trace: Trace, begin_ns: int, end_ns: int) -> int:
    """Return the time of all tasks between two times."""
    each = (rows["stop_ns"].clip(begin_ns, end_ns) - rows["start_ns"].clip(begin_ns, end_ns) for rows in (trace.records, trace.others))
    return int(sum(took.sum() for took in each))


def tables(found: dict[str, Any]) -> list[Table]:
    """Return what `node` found, for people."""
    span_ms, together = found["span_ms"], found["together_efficiency"]
    rows = [
        ["cores that the processes may use", str(found["cores"])],
        ["from the first task to the last, ms", f"{span_ms:.2f}"],
        ["efficiency: time in tasks / (cores x that)", f"{found['efficiency']:.3f}"],
        ["while all processes are at work, ms", f"{found['together_ms']:.2f}"],
        ["efficiency in that time", "-" if together is None else f"{together:.3f}"],
        ["all cores have a task", f"{found['all_taken_ms'] / span_ms:.0%} of the time"],
        ["more tasks than cores: oversubscribed", f"{found['oversubscribed_ms'] / span_ms:.0%} of the time"],
    ]
    of = [
        [
            each["name"],
            each["share"] or "-",
            str(each["workers"]),
            *(f"{each[key]:.2f}" for key in ("span_ms", "useful_ms")),
            *(f"{each[key]:.3f}" for key in ("of_cores", "parallel_efficiency", "load_balance")),
            f"{each['waited_ms']:.2f}",
        ]
        for each in found["processes"]
    ]
    head = ["", "share", "workers", "span", "in tasks", "of the cores", "efficiency", "balance", "waited"]
    return [
        {"caption": "the node, all processes together", "head": ["", ""], "rows": rows},
        {"caption": "processes: ms; waited: of all its workers, while it had work and all cores had tasks", "head": head, "rows": of},
    ]
