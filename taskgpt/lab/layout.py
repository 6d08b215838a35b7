"""Tables of words, laid out as text for a terminal, as Markdown, and as HTML: columns of words stand left, columns of numbers right."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Collection, Sequence
from html import escape
from typing import Any

from taskgpt.errors import shorten

Table = dict[str, Any]  # caption; head, a list of words; rows, lists of words

INDENT = " " * 11  # of lines that go on below a heading
WHOLE = {"break_long_words": False, "break_on_hyphens": False}
GAP = "  "  # between columns
LONGEST_WORD = 24  # characters of a word that stays whole; longer ones, of paths say, are cut
BREAKS = re.compile(r"(?<=[ :=/-])|(?<=,)(?!\d)")  # between words, and behind what joins them, but in no number
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

    Within a `width`, what is the same in all rows is said once above, and heads and words go on in lines below; numbers stay whole.
    """
    if width is not None and len(table["rows"]) > 1 and max(map(len, to_text({**table, "caption": ""}).splitlines())) > width:
        table = _shared_above(table)
    lines = [[cell if cell.isprintable() else shorten(cell) for cell in line] for line in (table["head"], *table["rows"])]
    lefts, columns = stand_left(table), list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    found = [table["caption"]] if table["caption"] else []
    if width is not None:
        found = [line for caption in table["caption"].splitlines() for line in textwrap.wrap(caption, width)]
        widths = _narrowed(widths, [_least(column, left) for column, left in zip(columns, lefts, strict=True)], width)
    cut = [[_cut(cell, at) for cell, at in zip(line, widths, strict=True)] for line in lines]
    widths = [max(len(part) for cell in column for part in cell) for column in zip(*cut, strict=True)]
    for cells in cut:
        for number in range(max(map(len, cells))):
            parts = (cell[number] if number < len(cell) else "" for cell in cells)
            aligned = (f"{part:<{at}}" if left else f"{part:>{at}}" for part, at, left in zip(parts, widths, lefts, strict=True))
            found.append(GAP.join(aligned).rstrip())
    return "\n".join(found)


def _shared_above(table: Table) -> Table:
    """Return the table without the columns of words that say the same in all rows; its caption says it."""
    lefts, columns = stand_left(table), list(zip(*table["rows"], strict=True))
    shared = [at for at, column in enumerate(columns) if lefts[at] and len(set(column)) == 1 and column[0] not in ("", "-")]
    shared = shared if len(shared) < len(columns) else []
    said = ", ".join(f"{table['head'][at]} {columns[at][0]}" for at in shared)
    caption = "\n".join(filter(None, (table["caption"], f"all: {said}" if said else "")))
    return {**without(table, [table["head"][at] for at in shared]), "caption": caption}


def without(table: Table, heads: Collection[str]) -> Table:
    """Return the table without the columns of those heads."""
    kept = [at for at, head in enumerate(table["head"]) if head not in heads]
    return {**table, "head": [table["head"][at] for at in kept], "rows": [[row[at] for at in kept] for row in table["rows"]]}


def _least(column: Sequence[str], stands_left: bool) -> int:
    """Return how narrow a column may become: numbers stay whole, heads and words break where `_words` says."""
    head, *cells = column
    parts = [word for cell in cells for word in _words(cell)] if stands_left else cells
    return max([*map(len, head.split()), *(min(len(part), LONGEST_WORD) if stands_left else len(part) for part in parts)])


def _narrowed(widths: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """Return widths that fit, the widest column cut first; none becomes narrower than its least."""
    widths = list(widths)
    while sum(widths) + len(GAP) * (len(widths) - 1) > width:
        able = [at for at in range(len(widths)) if widths[at] > least[at]]
        if not able:
            break
        widths[max(able, key=lambda at: widths[at])] -= 1
    return widths


def _words(cell: str) -> list[str]:
    return [word.rstrip() for word in BREAKS.split(cell)]


def _cut(cell: str, width: int) -> list[str]:
    """Return a cell in lines of a width: broken between words, or behind what joins them."""
    lines = [""]
    for word in BREAKS.split(cell):
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
