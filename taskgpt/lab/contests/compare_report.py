"""The results of a comparison told: tables, CSV, Markdown, and one HTML page with pictures.

The table is the study's: ms of a step, of 40 steps, speedup over sequential, efficiency = speedup / workers; with the median, and the
interval in which it lies with 95 % confidence, which six turns tell and fewer do not. Speedups are over the fastest sequential cell of the
same graph, whatever its tiles; where none was measured there are none.
"""

import csv
import io
import statistics
from html import escape
from pathlib import Path
from typing import Any

from taskgpt.files import write_whole
from taskgpt.lab.contests.figures import figures
from taskgpt.lab.contests.results import Result, Results
from taskgpt.lab.contests.turns import FACTORS
from taskgpt.lab.layout import Table, to_html, to_markdown
from taskgpt.lab.named import make_config
from taskgpt.lab.report import LEAST_TURNS, NOT_YET, table_of
from taskgpt.lab.theme import html_page
from taskgpt.lab.traces.idle import CAUSES

STEPS = 40  # of the study's runs
IDLE = [cause for cause in CAUSES if cause != "between"]

TIMES = {
    "graph": ("graph", ""),
    "scheduler": ("scheduler", ""),
    "workers": ("workers", "d"),
    "mean ms": ("mean_ms", ".2f"),
    "median ms": ("median_ms", ".2f"),
    "95 % of the median": ("interval", ""),
    f"{STEPS} steps, s": ("total_s", ".2f"),
    "tok/s": ("tokens_per_second", ".0f"),
    "speedup": ("speedup", ".2f"),
    "efficiency": ("efficiency", ".3f"),
    "turns": ("turns", "d"),
}
WHY = {
    "graph": ("graph", ""),
    "scheduler": ("scheduler", ""),
    "workers": ("workers", "d"),
    "tasks": ("tasks", "d"),
    **{name: (name, ".3f") for name in FACTORS},
    **{f"idle: {cause}": (f"idle_{cause}_ms", ".2f") for cause in IDLE},
    "T1 ms": ("t1_ms", ".2f"),
    "T-inf ms": ("tinf_ms", ".2f"),
}
CHANGES = {
    "cell": ("cell", ""),
    "before, ms": ("before_ms", ".2f"),
    "95 % of before": ("before", ""),
    "after, ms": ("after_ms", ".2f"),
    "95 % of after": ("after", ""),
    "after / before": ("ratio", ".3f"),
    "beyond noise": ("verdict", ""),
    "same bits": ("bits", ""),
}


def row_of(result: Result, results: Results) -> dict[str, Any]:
    """Return all numbers of a cell, None for those that it does not have."""
    cell, first = result.cell, result.first
    trace = first and first.trace
    row: dict[str, Any] = {"graph": cell.graph_word, "scheduler": cell.label, "workers": cell.workers, "turns": len(result.ms)}
    row |= {name: first and getattr(first, name) for name in ("tasks", "loss", "sha256")}
    row |= dict.fromkeys(("mean_ms", "median_ms", "low_ms", "high_ms", "total_s", "tokens_per_second", "speedup", "efficiency"))
    row["interval"] = "-"
    if result.ms:
        low, high = result.interval or (None, None)
        mean, sequential = statistics.mean(result.ms), results.sequential_ms(cell.graph)
        row |= {"mean_ms": mean, "median_ms": result.median, "low_ms": low, "high_ms": high, "interval": result.interval_text}
        row |= {"total_s": mean * STEPS / 1e3, "tokens_per_second": make_config(cell.graph_word).batch.rows / result.median * 1e3}
        if sequential:
            row |= {"speedup": sequential / result.median, "efficiency": sequential / result.median / cell.workers}
    row |= {name: trace and trace.efficiency[name] for name in FACTORS}
    row |= {f"idle_{cause}_ms": trace and trace.idle_ms[cause] / trace.steps for cause in IDLE}
    row |= {name: trace and getattr(trace, name) for name in ("t1_ms", "tinf_ms")}
    return row | {"failed": result.failed}


def tables(results: Results) -> list[Table]:
    """Return times, why, bits, and what failed or was not reached, where there is any."""
    rows = [row_of(result, results) for result in results.found.values()]
    measured, traced = [row for row in rows if row["turns"]], [row for row in rows if row["t1_ms"]]
    if any(row["speedup"] for row in measured):
        caption, columns = "a training step: speedups over the fastest sequential cell of the same graph", TIMES
    else:
        caption = "a training step: no speedups, as no sequential cell was measured"
        columns = {head: column for head, column in TIMES.items() if head not in ("speedup", "efficiency")}
    if any(row["low_ms"] is None for row in measured):
        caption += f"; fewer than {LEAST_TURNS} turns do not tell in which interval a median lies"
    found = [table_of(caption, columns, measured)]
    if traced:
        caption = "why: of the first steps, with every task on record, POP's efficiencies, and all workers' idle time by cause, ms a step"
        found.append(table_of(caption, WHY, traced))
    found.append(_bits([row for row in rows if row["sha256"]]))
    missing = [[row["graph"], row["scheduler"], str(row["workers"]), row["failed"] or "not reached"] for row in rows if not row["turns"]]
    if missing:
        found.append({"caption": "not measured", "head": ["graph", "scheduler", "workers", "why"], "rows": missing})
    return [table for table in found if table["rows"]]


def known(results: Results) -> str:
    """Return in words how well the medians are known."""
    measured = results.measured
    told = sorted(r.precision for r in measured if r.precision is not None)
    few = len(measured) - len(told)
    words = [
        f"{len(told)} of {len(measured)} medians are known" + (f", to {told[0]:.1%} at best and {told[-1]:.1%} at worst" if told else "")
    ]
    return "; ".join(words + [f"{few} had fewer than {LEAST_TURNS} turns"] * bool(few))


def _bits(rows: list[dict[str, Any]]) -> Table:
    """Return who computed which bits."""
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        groups.setdefault((row["graph"], "no number" if row["loss"] is None else f"{row['loss']:.6f}", row["sha256"]), []).append(
            row["scheduler"]
        )
    words = [[graph, loss, sha256[:16], ", ".join(dict.fromkeys(names))] for (graph, loss, sha256), names in groups.items()]
    head = ["graph", "loss", "parameters sha256", "computed by"]
    return {"caption": "bits after six steps: the same wherever graph and tiles are, but for NumPy's", "head": head, "rows": words}


def agreement(results: Results) -> list[str]:
    """Return a line on each graph whose cells differ in their bits and should not."""
    lines = []
    for group in results.disagreements():
        found = ", ".join(f"{r.first.sha256[:8]} {r.cell.label} ({r.cell.workers})" for r in group)
        lines.append(f"{group[0].cell.graph_word}: DIFFERENT BITS: {found}")
    return lines


def changes_table(a: Results, b: Results) -> Table:
    """Return what changed from a to b, the largest change first."""
    rows = []
    for cell, before in a.found.items():
        after = b.found.get(cell)
        if not (after and before.ms and after.ms):
            continue
        same = before.first and after.first and before.first.sha256 == after.first.sha256
        rows.append(
            {
                "cell": str(cell),
                "before_ms": before.median,
                "before": before.interval_text,
                "after_ms": after.median,
                "after": after.interval_text,
                "ratio": after.median / before.median,
                "verdict": _verdict(before.interval, after.interval),
                "bits": "yes" if same else "NO",
            }
        )
    rows.sort(key=lambda row: (row["verdict"] in ("no", NOT_YET), -abs(row["ratio"] - 1)))
    return table_of("beyond noise is a change where the intervals of the medians do not meet", CHANGES, rows)


def _verdict(before: tuple[float, float] | None, after: tuple[float, float] | None) -> str:
    if before is None or after is None:
        return NOT_YET
    return "faster" if after[1] < before[0] else "slower" if after[0] > before[1] else "no"


def write(results: Results) -> list[Path]:
    """Write compare.csv, compare.md and compare.html beside the results; return their paths. Raises UserError."""
    found, folder = tables(results), results.path.parent
    machine = {"caption": "machine", "head": ["", ""], "rows": [[key, value] for key, value in results.machine.items()]}
    markdown = "\n\n".join([to_markdown(found[0]), f"{known(results)}.", *map(to_markdown, [*found[1:], machine])])
    texts = {"csv": _csv(results), "md": markdown + "\n", "html": _page(results, [*found, machine])}
    paths = [folder / f"compare.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_whole(path, text)
    return paths


def _csv(results: Results) -> str:
    rows = [{name: value for name, value in row_of(r, results).items() if name != "interval"} for r in results.found.values()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


STYLE = """
body { margin: 0 auto; max-width: 1240px; padding: 8px 16px 32px; }
figure { margin: 28px 0; } figure svg { display: block; max-width: max(100%, 560px); height: auto; }
h2 { font-size: 15px; margin: 0 0 2px; } figcaption { max-width: 75ch; color: var(--dim); margin-bottom: 8px; }
.wrong { color: var(--before); font-weight: 600; }
"""


def _page(results: Results, found: list[Table]) -> str:
    """Return the page: what differs and should not, times, pictures, then the other tables. Nothing in it comes from elsewhere."""
    graphs = ", ".join(dict.fromkeys(r.cell.graph for r in results.measured))
    wrong = "".join(f'<p class="wrong">{escape(line)}</p>' for line in agreement(results))
    pictures = "".join(
        f'<figure><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption><div class="scroll">{svg}</div></figure>'
        for title, caption, svg in figures(results)
    )
    first, *others = (f'<div class="scroll">{to_html(table)}</div>' for table in found)
    body = f"<h1>{escape(graphs)}: schedulers compared</h1>\n{wrong}{first}<p>{known(results)}.</p>{pictures}{''.join(others)}"
    return html_page(f"taskgpt compare: {graphs}", STYLE, body)
