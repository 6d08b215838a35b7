"""Panels as one HTML page that opens from disk, with a table of the runs."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from taskgpt.files import write_whole
from taskgpt.lab import charts, layout
from taskgpt.lab.curves.panels import Panel
from taskgpt.lab.theme import html_page

_STYLE = """body { padding: 16px clamp(12px, 3vw, 40px); max-width: 1240px; margin: 0 auto; overflow-wrap: anywhere; }
h1 { font-size: 20px; line-height: 1.3; margin: 4px 0 4px; }
figcaption, .dim { color: var(--dim); font-size: 13px; }
.scroll { margin-top: 20px; }
"""
MOST_NAMED = 4  # runs of which each chart has a legend; of more, the first one
_ROUNDED = ".7g"  # of values that were float32


def write(path: str | Path, title: str, found: Sequence[Panel], table: layout.Table, notes: Sequence[str]) -> None:
    """Write the page, whole or not at all. Raises UserError."""
    runs = len({line.run for panel in found for line in panel.lines})
    shown = [_chart(panel) | {"legend": runs > 1 and (at == 0 or runs <= MOST_NAMED)} for at, panel in enumerate(found)]
    told = "".join(f'<p class="dim">{escape(note)}</p>' for note in notes)
    body = f'<h1>{escape(title)}</h1>\n{charts.html(shown)}\n<div class="scroll">{layout.to_html(table)}</div>\n{told}'
    write_whole(path, html_page(title, _STYLE + charts.CSS, body))


def _chart(panel: Panel) -> dict[str, Any]:
    lines = [
        charts.line(
            line.name,
            line.colour,
            *([float(format(value, _ROUNDED)) for value in values] for values in (line.x, line.y)),
            **{name: True for name in ("thin", "band", "dots", "aside") if getattr(line, name)},
            **({"dash": line.dash} if line.dash else {}),
        )
        for line in panel.lines
    ]
    return {"caption": panel.caption, "digits": panel.digits, "from0": panel.from0, "along": panel.along, "lines": lines}
