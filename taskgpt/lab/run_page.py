"""A training run as one HTML page that opens from disk: losses, speed, efficiency, kernels, samples, settings.

write("run.html", live, summary, "taskgpt train --graph tiny --report run.html")    # at the end of a run: `train --report`
write_of_log("run.html", RunLog.read("runs/a"))                                      # long after it: `plot --report`

A log knows nothing of kernels and efficiency; a page of it has neither.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt import palette
from taskgpt.files import write_whole
from taskgpt.lab import charts, layout
from taskgpt.lab.charts import Thinned, line, told
from taskgpt.lab.curves.run_log import COLUMNS, VALIDATION_COLUMNS, RunLog
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.theme import html_page

MOST_KERNELS = 12  # as bars; the others together
NOT_IN_A_LOG = "Made from the log of the run, which has neither kernels nor parallel efficiency: train --report has them."

_BODY, _STYLE = (Path(__file__).with_name(f"run_page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css"))


def write(path: str | Path, live: Live, summary: dict[str, Any], command: str) -> None:
    """Write the page, whole or not at all. Raises UserError."""
    points = Thinned(4)
    for step, loss, speed, efficiency in live.steps:
        points.add(step + 1, loss, speed, efficiency)
    steps, losses, speeds, efficiencies = points.means()
    efficiency = {
        "caption": f"parallel efficiency: time in tasks / ({live.workers} workers x time){told(points)}",
        "digits": 3,
        "from0": True,
        "lines": [line("efficiency", palette.VIOLET, steps, efficiencies)],
    }
    kernels = _kernels({name: ms / len(live.steps) for name, ms in live.kernel_ms.items()})
    figures = _figures(summary) | {
        "parallel efficiency": f"{statistics.median(efficiency for *_, efficiency in live.steps[1:] or live.steps):.3f}"
    }
    found = [*_charts(points, (steps, losses, speeds), np.array(live.validations).reshape(-1, 2).T), efficiency]
    _write(
        path, live.title, "Losses, speed and efficiency", figures, found, kernels, live.samples, _settings(summary, {"command": command})
    )


def write_of_log(path: str | Path, log: RunLog) -> None:
    """Write the page of a log, whole or not at all. Raises UserError."""
    summary = log.summary or {}
    columns = dict(zip(COLUMNS, log.steps.means(), strict=True))
    validations = [log.validations.means()[VALIDATION_COLUMNS.index(name)] for name in ("step", "validation")]
    figures = _figures(
        {"tokens_per_s": log.tokens_per_s, **summary, "steps": log.count, "train_loss": log.loss.told(), "val_loss": log.validation.told()}
    )
    run = {"log": str(log.path), **log.settings, "note": NOT_IN_A_LOG}
    if not summary:
        run["state"] = "the log has no summary: the run goes on, or was ended before it could write one"
    found = _charts(log.steps, [columns[name] for name in ("step", "loss", "speed")], validations)
    for name, title, digits in (("norm", "gradient norm", 3), ("lr", "learning rate", 6)):
        if np.isfinite(columns[name]).any():
            lines = [line(name, palette.VIOLET, columns["step"], columns[name])]
            found.append({"caption": f"{title}{told(log.steps)}", "digits": digits, "lines": lines})
    _write(path, _title(log), "Losses and speed", figures, found, "", list(log.samples), _settings(summary, run))


def _write(path, title: str, what: str, figures: dict[str, str], found: list, kernels: str, samples: Sequence, settings: Iterable) -> None:
    parts = {
        "TITLE": escape(title),
        "FIGURES": "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures.items()),
        "WHAT": what,
        "KERNELS": kernels,
        "SAMPLES": _samples(samples),
        "SETTINGS": "".join(settings),
        "CHARTS": charts.html(found),
    }
    body = _BODY
    for name, text in parts.items():
        body = body.replace(f"<!--{name}-->", text)
    write_whole(path, html_page(f"{title}: a run", _STYLE + charts.CSS, body))


def _title(log: RunLog) -> str:
    """Return what a run's own page would call it, the name of the log where there is no summary of it."""
    graph, scheduler = ((log.summary or {}).get(name) for name in ("graph", "scheduler"))
    batch = graph.get("batch") if isinstance(graph, dict) else None
    if not (isinstance(batch, dict) and isinstance(scheduler, dict)):
        return log.name
    return f"{log.name}: {graph.get('name')}, B {batch.get('batch_size')}, T {batch.get('seq_len')}, {scheduler.get('name')}"


def _charts(points: Thinned, columns: Sequence[Iterable[float]], validations: Iterable[Iterable[float]]) -> list[dict[str, Any]]:
    """Return the charts of losses and speed."""
    steps, losses, speeds = columns
    return [
        {
            "caption": f"loss{told(points)}",
            "digits": 4,
            "lines": [line("train", palette.BLUE, steps, losses), line("validation", palette.ORANGE, *validations, dots=True)],
        },
        {
            "caption": f"tokens a second{told(points)}",
            "digits": 0,
            "from0": True,
            "lines": [line("tok/s", palette.BLUE, steps, speeds)],
        },
    ]


def _figures(summary: dict[str, Any]) -> dict[str, str]:
    """Return the run in numbers: those that the summary has."""
    found = {"steps": f"{summary['steps']:,}"}
    for key, name in (("train_loss", "train loss"), ("val_loss", "validation loss")):
        if summary[key]:
            found[name] = _loss(summary[key]["last"])
    if summary["val_loss"]:
        found["best validation"] = _loss(summary["val_loss"]["best"])
    for key, name, form in (
        ("median_ms", "ms a step, median", "{:,.1f}"),
        ("tokens_per_s", "tokens a second", "{:,.0f}"),
        ("share_of_sgemm", f"of sgemm on {summary.get('workers')} threads", "{:.0%}"),
    ):
        if _is_number(summary.get(key)):
            found[name] = form.format(summary[key])
    if _is_number(nbytes := summary.get("peak_memory_bytes")):
        found["memory at most"] = f"{nbytes / 2**30:.2f} GiB"
    return found


def _loss(loss: float | None) -> str:
    return "no number" if loss is None else f"{loss:.4f}"


def _kernels(kernel_ms: dict[str, float]) -> str:
    """Return a bar for each kernel, the longest first."""
    total, colours = sum(kernel_ms.values()) or 1.0, palette.of_kernels(kernel_ms)
    rows = sorted(kernel_ms.items(), key=lambda item: -item[1])
    shown, rest = rows[:MOST_KERNELS], rows[MOST_KERNELS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(ms for _, ms in rest)))
    longest = max((ms for _, ms in shown), default=1.0)
    bars = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="length"><i style="width:{ms / longest:.1%};background:{colours.get(name, palette.REST)}"></i></td>'
        f"<td>{ms:,.2f} ms</td><td>{ms / total:.1%}</td></tr>"
        for name, ms in shown
    )
    return f'<h2>Kernels</h2>\n<p class="dim">all workers\' time, mean of all steps</p>\n<table id="kernels">{bars}</table>'


def _samples(samples: Sequence[tuple[int, str]]) -> str:
    found = (f"<figure><figcaption>after {step:,} steps</figcaption><pre>{escape(text)}</pre></figure>" for step, text in reversed(samples))
    return "".join(found) or "<p>none: <code>--sample-every 0</code></p>"


def _settings(summary: dict[str, Any], run: dict[str, str]) -> Iterable[str]:
    """Yield what ran and how, as tables: those parts that the summary has."""
    graph, disturbance = (_table(summary.get(name)) for name in ("graph", "disturbance"))
    run = run | {name: summary[key] for key, name in (("data", "data"), ("parameters_sha256", "parameters sha256")) if key in summary}
    if _is_number(other := disturbance.get("other_cores")):
        run["other processes"] = f"{other:.1f} of {disturbance.get('cores')} cores"
    run |= _table(disturbance.get("variables"))
    tables = {"run": run, **{name: _table(graph.get(name)) for name in ("model", "batch", "tiles", "options")}}
    for caption, values in (tables | {name: _table(summary.get(name)) for name in ("scheduler", "machine")}).items():
        if rows := [[name, str(value)] for name, value in values.items()]:
            yield f'<div class="scroll">{layout.to_html({"caption": caption, "head": ["", ""], "rows": rows})}</div>'


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
