"""Tables of words, laid out as text for a terminal, as Markdown, and as HTML: columns of words stand left, columns of numbers right."""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from taskgpt.errors import shorten

Table = dict[str, Any]  # caption; head, a list of words; rows, lists of words

_NUMBER = re.compile(r"[-+]?[\d.,]+%?(-[\d.,]+)?")  # and ranges of two


def label(name: str) -> str:
    """Return a name as files of lines and fixed sizes can hold it: one line of 1 to 120 printable characters."""
    return shorten(name, 120) or "no name"


def to_text(table: Table) -> str:
    """Return caption, if there is one, head and rows in aligned columns."""
    lines = [[cell if cell.isprintable() else shorten(cell) for cell in line] for line in (table["head"], *table["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    found = [table["caption"]] if table["caption"] else []
    for line in lines:
        cells = (
            f"{cell:<{width}}" if left else f"{cell:>{width}}" for cell, width, left in zip(line, widths, stand_left(table), strict=True)
        )
        found.append("  ".join(cells).rstrip())
    return "\n".join(found)


def to_markdown(table: Table) -> str:
    """Return the caption in bold, and the table as GitHub and others draw it."""
    marks = [":--" if left else "--:" for left in stand_left(table)]
    lines = [table["head"], marks, *table["rows"]]
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"**{table['caption']}**", "", *rows])


def to_html(table: Table) -> str:
    """Return the caption in a paragraph of its own, and the table."""
    lefts = stand_left(table)

    def row(cells: Sequence[str], tag: str) -> str:
        styled = (
            f'<{tag} style="text-align:{"left" if left else "right"}">{escape(cell)}</{tag}>'
            for cell, left in zip(cells, lefts, strict=True)
        )
        return f"<tr>{''.join(styled)}</tr>"

    body = "".join(row(cells, "td") for cells in table["rows"])
    return f"<p><b>{escape(table['caption'])}</b></p><table>{row(table['head'], 'th')}{body}</table>"


def stand_left(table: Table) -> list[bool]:
    """Say of each column whether it stands left: the first one does, and those that hold anything but numbers and dashes."""
    columns = list(zip(*table["rows"], strict=True)) or [()] * len(table["head"])
    return [at == 0 or any(c not in ("", "-") and not _NUMBER.fullmatch(c) for c in column) for at, column in enumerate(columns)]
