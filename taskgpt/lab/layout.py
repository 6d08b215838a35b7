"""Tables of words, laid out as text for a terminal, as Markdown, and as HTML: columns of words stand left, columns of numbers right."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from taskgpt.errors import shorten

Table = dict[str, Any]  # caption; head, a list of words; rows, lists of words

INDENT = " " * 11  # of lines that go on below a heading
WHOLE = {"break_long_words": False, "break_on_hyphens": False}
GAP = "  "  # between columns
LEAST_WORDS = 12  # characters that a column of words keeps
_NUMBER = re.compile(r"[-+]?[\d.,]+%?(-[\d.,]+)?")  # and ranges of two


def label(name: str) -> str:
    """Return a name as files of lines and fixed sizes can hold it: one line of 1 to 120 printable characters."""
    return shorten(name, 120) or "no name"


def terminal_width(flags: argparse.Namespace) -> int | None:
    """Return how wide text may be: as the terminal is, 80 where there is none; None, as wide as it gets, if `--wide` was given."""
    return None if flags.wide else shutil.get_terminal_size().columns


def field(key: str, text: str) -> str:
    """Return a heading and what there is to say under it: on a terminal in lines of its width, elsewhere in one."""
    columns = shutil.get_terminal_size((0, 0)).columns
    line = f"{key:10} {text}"
    return line if len(line) <= columns or columns <= len(INDENT) else textwrap.fill(line, columns, subsequent_indent=INDENT, **WHOLE)


def to_text(table: Table, width: int | None = None) -> str:
    """Return caption, if there is one, head and rows in aligned columns.

    Within a `width`, heads and words that are too long for it go on in lines below; numbers stay whole.
    """
    lines = [[cell if cell.isprintable() else shorten(cell) for cell in line] for line in (table["head"], *table["rows"])]
    lefts, columns = stand_left(table), list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    found = [table["caption"]] if table["caption"] else []
    if width is not None:
        found = textwrap.wrap(table["caption"], width)
        widths = _narrowed(widths, [_least(column, left) for column, left in zip(columns, lefts, strict=True)], width)
    for line in lines:
        parts = [_cut(cell, at) for cell, at in zip(line, widths, strict=True)]
        for number in range(max(map(len, parts))):
            cells = (part[number] if number < len(part) else "" for part in parts)
            aligned = (f"{c:<{at}}" if left else f"{c:>{at}}" for c, at, left in zip(cells, widths, lefts, strict=True))
            found.append(GAP.join(aligned).rstrip())
    return "\n".join(found)


def _least(column: Sequence[str], stands_left: bool) -> int:
    """Return how narrow a column may become: numbers stay whole, heads break between words, words anywhere, but for short ones."""
    head, *cells = column
    return max([*(len(word) for word in head.split()), *(min(len(cell), LEAST_WORDS) if stands_left else len(cell) for cell in cells)])


def _narrowed(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Return widths that fit, the widest column cut first; none becomes narrower than its least."""
    widths = list(widths)
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        able = [at for at in range(len(widths)) if widths[at] > least[at]]
        if not able:
            break
        widths[max(able, key=lambda at: widths[at])] -= 1
    return widths


def _cut(cell: str, width: int) -> list[str]:
    """Return a cell in lines of a width: broken between words, or behind what joins them."""
    lines = [""]
    for word in re.findall(r"[^ ,:=-]*[ ,:=-]*", cell):
        if len(lines[-1]) + len(word.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


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
