"""A training run as one HTML page that opens from disk: losses, speed, efficiency, kernels, samples, settings. `train --report` writes it.

write("run.html", live, summary, "taskgpt train --graph tiny --report run.html")
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from taskgpt import palette
from taskgpt.files import write_whole
from taskgpt.lab import layout
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.theme import html_page

MOST_POINTS = 2000  # of a line: a screen shows no more
MOST_KERNELS = 12  # as bars; the others together

_BODY, _STYLE = (Path(__file__).with_name(f"run_page.{kind}") for kind in ("html", "css"))


def write(path: str | Path, live: Live, summary: dict[str, Any], command: str) -> None:
    """Write the page, whole or not at all. Raises UserError."""
    parts = {
        "TITLE": escape(live.title),
        "FIGURES": _figures(live, summary),
        "KERNELS": _kernels({name: ms / len(live.steps) for name, ms in live.kernel_ms.items()}),
        "SAMPLES": _samples(live.samples),
        "SETTINGS": "".join(_settings(summary, command)),
        "DATA": json.dumps({"charts": _charts(live)}, separators=(",", ":")).replace("<", "\\u003c"),  # nothing ends the script early
    }
    body = _BODY.read_text(encoding="utf-8")
    for name, text in parts.items():
        body = body.replace(f"<!--{name}-->", text)
    write_whole(path, html_page(f"{live.title}: a run", _STYLE.read_text(encoding="utf-8"), body))


def _charts(live: Live) -> list[dict[str, Any]]:
    """Return what each chart shows: a caption, a unit, and lines, each with a name, a colour, points, and whether they stand alone."""
    points, each = thinned([(step + 1, loss, speed, efficiency) for step, loss, speed, efficiency in live.steps])
    told = f"; a point is a mean of {each} steps" if each > 1 else ""
    steps, losses, speeds, efficiencies = zip(*points, strict=True)

    def line(name: str, colour: str, x: Iterable[float], y: Iterable[float], dots: bool = False) -> dict[str, Any]:
        finite = [value if abs(value) < float("inf") else None for value in y]
        return {"name": name, "colour": colour, "dots": dots, "points": list(zip(x, finite, strict=True))}

    validations = live.validations
    return [
        {
            "caption": f"loss{told}",
            "digits": 4,
            "lines": [
                line("train", palette.BLUE, steps, losses),
                line("validation", palette.ORANGE, [step for step, _ in validations], [loss for _, loss in validations], dots=True),
            ],
        },
        {"caption": f"tokens a second{told}", "digits": 0, "from0": True, "lines": [line("tok/s", palette.BLUE, steps, speeds)]},
        {
            "caption": f"parallel efficiency: time in tasks / ({live.workers} workers x time){told}",
            "digits": 3,
            "from0": True,
            "lines": [line("efficiency", palette.VIOLET, steps, efficiencies)],
        },
    ]


def thinned(points: Sequence[tuple[float, ...]], most: int = MOST_POINTS) -> tuple[list[tuple[float, ...]], int]:
    """Return at most so many points, each the mean of as many that follow each other, and of how many."""
    each = -(-len(points) // most)
    parts = (points[at : at + each] for at in range(0, len(points), each))
    return [tuple(statistics.fmean(column) for column in zip(*part, strict=True)) if each > 1 else part[0] for part in parts], each


def _figures(live: Live, summary: dict[str, Any]) -> str:
    """Return the run in numbers, as boxes."""
    train, validation = summary["train_loss"], summary["val_loss"]
    efficiency = statistics.median(efficiency for *_, efficiency in live.steps[1:] or live.steps)
    found = {
        "steps": f"{summary['steps']:,}",
        "train loss": _loss(train["last"]),
        **({"validation loss": _loss(validation["last"]), "best validation": _loss(validation["best"])} if validation else {}),
        "ms a step, median": f"{summary['median_ms']:,.1f}",
        "tokens a second": f"{summary['tokens_per_s']:,.0f}",
        f"of sgemm on {summary['workers']} threads": f"{summary['share_of_sgemm']:.0%}",
        "parallel efficiency": f"{efficiency:.3f}",
        "memory at most": f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    return "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in found.items())


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
    return "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td class="length"><i style="width:{ms / longest:.1%};background:{colours.get(name, palette.REST)}"></i></td>'
        f"<td>{ms:,.2f} ms</td><td>{ms / total:.1%}</td></tr>"
        for name, ms in shown
    )


def _samples(samples: Sequence[tuple[int, str]]) -> str:
    found = (f"<figure><figcaption>after {step:,} steps</figcaption><pre>{escape(text)}</pre></figure>" for step, text in reversed(samples))
    return "".join(found) or "<p>none: <code>--sample-every 0</code></p>"


def _settings(summary: dict[str, Any], command: str) -> Iterable[str]:
    """Yield what ran and how, as tables."""
    graph, disturbance = summary["graph"], summary["disturbance"]
    run = {
        "command": command,
        "data": summary["data"],
        "parameters sha256": summary["parameters_sha256"],
        "other processes": f"{disturbance['other_cores']:.1f} of {disturbance['cores']} cores",
        **disturbance["variables"],
    }
    tables = {"run": run, **{name: graph[name] for name in ("model", "batch", "tiles", "options")}}
    for caption, values in (tables | {"scheduler": summary["scheduler"], "machine": summary["machine"]}).items():
        rows = [[name, str(value)] for name, value in values.items()]
        yield f'<div class="scroll">{layout.to_html({"caption": caption, "head": ["", ""], "rows": rows})}</div>'
