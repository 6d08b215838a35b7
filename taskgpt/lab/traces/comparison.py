"""One trace's numbers, or several's beside each other: as text, as tables for a page or a notebook, and what differs between them.

print(Comparison.of(Trace.load("runs/loops"), Trace.load("runs/native")))
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from taskgpt.lab import layout
from taskgpt.lab.layout import Table
from taskgpt.lab.traces.efficiency import analyse
from taskgpt.lab.traces.idle import CAUSES
from taskgpt.lab.traces.trace import Trace


@dataclass(frozen=True)
class Comparison:
    """found: what efficiency.analyse says of each trace. A notebook shows it as tables, `print` as text.

    programs: their names, if each trace is of another program, which does other things.
    """

    found: list[dict[str, Any]]
    programs: Sequence[str] = ()

    @classmethod
    def of(cls, *traces: Trace, reference: Trace | None = None, programs: Sequence[str] = ()) -> Self:
        """`reference`: the same steps on one worker. `programs`: names of the traces' programs. Raises ValueError for one without tasks.

        Speeds are stated against the same limits for all traces of as many workers on one machine: the largest that any of them measured.
        """
        return cls([analyse(trace, reference, _limits(trace, traces)) for trace in traces], programs)

    @property
    def names(self) -> list[str]:
        """The programs, or the schedulers, numbered where two are the same."""
        if self.programs:
            return list(self.programs)
        words = [each["scheduler"].partition(":")[0] for each in self.found]
        return [word if words.count(word) == 1 else f"{word} {at + 1}" for at, word in enumerate(words)]

    def tables(self) -> list[Table]:
        """Return efficiency, times, idle time by cause, what differs, time by kernel, layer and phase, limits, speeds, longest paths."""
        found = self.found
        times = {
            "a step, median": lambda f: f["step_ms"],
            "T1: all its tasks": lambda f: f["longest_path"]["t1_ms"],
            "T-infinity: its longest path": lambda f: f["longest_path"]["tinf_ms"],
            "no schedule is shorter than": lambda f: f["longest_path"]["bound_ms"],
            "average parallelism, T1 / T-infinity": lambda f: f["longest_path"]["average_parallelism"],
        }
        spent = {"in tasks": [f["useful_ms"] / f["steps"] for f in found]}
        spent |= {"in tasks of other runs": [f["other_runs_ms"] / f["steps"] for f in found]}
        spent |= {_idle(cause): [f["idle_ms"][cause] / f["steps"] for f in found] for cause in CAUSES}
        if any(f["by_rank"] for f in found):
            spent["of idle: dependency, in exchanges"] = [f["network_idle_ms"] / f["steps"] for f in found]
        factors = {name: [f["efficiency"][name] for f in found] for name in found[0]["efficiency"]}
        tables = [
            self._beside("efficiency", factors, ".3f"),
            self._beside("time, ms", {name: [get(f) for f in found] for name, get in times.items()}, ".2f"),
            self._beside("all workers' time, ms a step", spent, ".2f"),
        ]
        tables += [_ranks(f, name) for f, name in zip(found, self.names, strict=True) if f["by_rank"]]
        tables += [self._differences(other) for other in range(1, len(found)) if not self.programs]
        for what in ("kernel", "layer", "phase"):
            by_name = [{row["name"]: row["ms"] / f["steps"] for row in f[f"by_{what}"]} for f in found]
            known = sorted({name for each in by_name for name in each}, key=lambda name: -max(each.get(name, 0) for each in by_name))
            rows = {_label(what, name): [each.get(name) for each in by_name] for name in known}
            tables.append(self._beside(f"ms a step by {what}", rows, ".3f"))
        if any(f["limits"] for f in found):
            limits = {"sgemm, GFLOP/s": "sgemm_gflops", "memory, GB/s": "memory_gbs"}
            rows = {label: [f["limits"] and f["limits"][limit] for f in found] for label, limit in limits.items()}
            tables.append(self._beside("the machine's limits on as many threads as workers, measured after the run", rows, ".1f"))
        for f, name in zip(found, self.names, strict=True):
            tables += [_speeds(f, name), _path(f, name)]
        return tables

    def _beside(self, caption: str, rows: dict[str, list[float | None]], form: str) -> Table:
        words = [[name, *("-" if value is None else format(value, form) for value in values)] for name, values in rows.items()]
        return {"caption": caption, "head": ["", *self.names], "rows": words}

    def differences(self, other: int = 1) -> list[tuple[str, float, float]]:
        """Return (kernel or cause of idleness, ms a step of the first trace, and of that other one), the largest difference first.

        All workers' time: the lines add up to workers x wall time / steps.
        """
        parts = []
        for f in (self.found[0], self.found[other]):
            spent = {row["name"]: row["ms"] / f["steps"] for row in f["by_kernel"]} | {"other runs": f["other_runs_ms"] / f["steps"]}
            parts.append(spent | {f"idle: {cause}": f["idle_ms"][cause] / f["steps"] for cause in CAUSES if cause != "between"})
        a, b = parts
        rows = [(name, a.get(name, 0.0), b.get(name, 0.0)) for name in dict.fromkeys([*a, *b])]
        return sorted(rows, key=lambda row: -abs(row[2] - row[1]))

    def _differences(self, other: int) -> Table:
        rows = self.differences(other)
        total = ("all of it", sum(row[1] for row in rows), sum(row[2] for row in rows))
        lines = [[name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] for name, a, b in [total, *rows] if a or b]
        first, second = self.names[0], self.names[other]
        caption = f"what differs: all workers' time, ms a step, {second} against {first}"
        return {"caption": caption, "head": ["", first, second, "difference"], "rows": lines}

    def text(self, width: int | None) -> str:
        """Return the tables as text, within a width if there is one."""
        return "\n\n".join(layout.to_text(table, width) for table in self.tables())

    def __str__(self) -> str:
        return self.text(None)

    def _repr_html_(self) -> str:
        return "".join(layout.to_html(table) for table in self.tables())


def _limits(trace: Trace, traces: Sequence[Trace]) -> dict[str, float] | None:
    """Return the largest values of those traces that were recorded where this one was: a limit can be measured too low, never too high."""
    here = trace.about.get("machine"), trace.workers
    known = [t.about["limits"] for t in traces if t.about.get("limits") and (t is trace or (t.about.get("machine"), t.workers) == here)]
    return {name: max(each[name] for each in known) for name in known[0]} if known else None


def _idle(cause: str) -> str:
    return f"idle: {cause}" if cause != "between" else "between runs"


def _speeds(found: dict[str, Any], name: str) -> Table:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.0%}"

    head = ["", "tasks", "mean us", "GFLOP/s", "of sgemm", "GB/s", "of memory"]
    rows = [
        [
            r["name"],
            str(r["tasks"]),
            f"{r['mean_us']:.1f}",
            f"{r['gflops']:.1f}",
            percent(r["of_sgemm"]),
            f"{r['gbs']:.1f}",
            percent(r["of_memory"]),
        ]
        for r in found["by_kernel"]
    ]
    reasons = {
        "of_sgemm": "Over 100 % of sgemm: the limit is of one size, after the run, with all workers at it; clocks were higher before.",
        "of_memory": "Over 100 % of memory: tasks found bytes that they declare in caches.",
    }
    over = [reason for share, reason in reasons.items() if any((r[share] or 0) > 1 for r in found["by_kernel"])]
    caption = " ".join([f"kernels, {name}: a worker's speed, and its share of the limit.", *over]).removesuffix(".")
    return {"caption": caption, "head": head, "rows": rows}


def _ranks(found: dict[str, Any], name: str) -> Table:
    """Return what each rank did, a row each."""
    rows = [
        [
            r["name"],
            str(r["workers"]),
            f"{r['parallel_efficiency']:.3f}",
            f"{r['load_balance']:.3f}",
            *(f"{r[key] / r['steps']:.2f}" for key in ("useful_ms", "exchange_ms", "network_idle_ms", "sent_mb")),
        ]
        for r in found["by_rank"]
    ]
    error_us = max(r["clock_error_us"] for r in found["by_rank"])
    caption = f"ranks, {name}: ms and MB a step, of all its workers; their clocks agree to {error_us:,.0f} us"
    head = ["", "workers", "efficiency", "balance", "in tasks", "exchanges", "idle for them", "MB sent"]
    return {"caption": caption, "head": head, "rows": rows}


def _path(found: dict[str, Any], name: str) -> Table:
    """Return the longest path by kernel."""
    path = found["longest_path"]["path"]
    count, ms = Counter(task["kernel"] for task in path), Counter()
    for task in path:
        ms[task["kernel"]] += task["ms"]
    rows = [[kernel, str(count[kernel]), f"{time:.2f}"] for kernel, time in ms.most_common()]
    caption = f"longest path, {name}: {len(path)} tasks one after the other, by kernel"
    return {"caption": caption, "head": ["", "tasks", "ms"], "rows": rows}


def _label(what: str, name: Any) -> str:
    return str(name) if what != "layer" else f"layer {name}" if name >= 0 else "no layer"
