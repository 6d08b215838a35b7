"""Docstrings of this project are plain text. This makes reStructuredText of them before autodoc reads them.

What stands indented, or in columns, becomes a literal block; `names` become code; every other character stays what it is.
"""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

COLUMNS = re.compile(r"\S {2,}\S")
CODE = re.compile(r"`([^`]+)`")
SPECIAL = re.compile(r"([\\*_|`:])")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: rewrite(lines))
    app.connect("autodoc-process-signature", without_any)
    return {"parallel_read_safe": True}


def without_any(app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, result: str) -> tuple[str, str] | None:
    """Leave out a signature that says nothing: of a class that nobody calls."""
    return ("", "") if signature == "(*args, **kwargs)" else None


def rewrite(lines: list[str]) -> None:
    lines[:] = [line for block in blocks(lines) for line in (*shown(block), "")]


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Yield what empty lines separate; indented blocks that follow each other are one."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            if block and not block[-1] and not (line.startswith("    ") and block[0].startswith("    ")):
                yield block[:-1]
                block = []
            block.append(line)
        elif block and block[-1]:
            block.append("")
    if block:
        yield block[:-1]


def shown(block: list[str]) -> list[str]:
    is_indented = block[0].startswith("    ")
    if is_indented or any(COLUMNS.search(line) for line in block):
        return ["::" if is_indented else ".. code-block:: text", "", *(f"    {line}" for line in block)]
    if block[0].startswith("- "):
        items = re.split(r"^- ", "\n".join(block), flags=re.MULTILINE)[1:]
        return [f"- {escaped(' '.join(item.split()))}" for item in items]
    return [escaped(" ".join(line.strip() for line in block))]


def escaped(text: str) -> str:
    parts = CODE.split(text)  # text, code, text, code, ...
    return "".join(rf"\ ``{part}``\ " if at % 2 else SPECIAL.sub(r"\\\1", part) for at, part in enumerate(parts))
