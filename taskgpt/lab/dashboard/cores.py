"""Which program holds which core of a share, as HTML: a row for each program, and a box for each core in the colour of who holds it."""

import os
from html import escape
from typing import Any

from taskgpt import palette
from taskgpt.errors import UserError
from taskgpt.lab import layout
from taskgpt.sharing.seen import share

_HEAD = ["program", "process", "cores", "workers", "core s", "weight", "priority", "state"]


def seen_now(name: str) -> str:
    """Return what there is to see of a share now; why not, if nothing."""
    try:
        return to_html(share(name))
    except FileNotFoundError:
        return f"share {escape(name)}: no program is in it"
    except UserError as error:
        return escape(str(error))


def to_html(found: dict[str, Any]) -> str:
    """Return what `sharing.seen.share` found as HTML. This process' program stands first."""
    members = sorted(found["members"], key=lambda each: each["pid"] != os.getpid())
    colour = {each["pid"]: palette.COLOURS[at % len(palette.COLOURS)] for at, each in enumerate(members)}
    rows = [
        [
            each["program"] + (", this one" if each["pid"] == os.getpid() else ""),
            *(str(each[key]) for key in ("pid", "cores", "workers")),
            f"{each['core_s']:.1f}",
            *(str(each[key]) for key in ("weight", "priority", "state")),
        ]
        for each in members
    ]
    held = sum(each["pid"] is not None for each in found["cores"])
    caption = f"cores shared in '{found['share']}': {held} of {len(found['cores'])} held"
    boxes = "".join(_box(each, colour.get(each["pid"], palette.REST)) for each in found["cores"])
    strip = f'<div style="display: flex; flex-wrap: wrap; gap: 3px; margin-top: 8px">{boxes}</div>'
    return layout.to_html({"caption": caption, "head": _HEAD, "rows": rows}) + strip


def _box(core: dict[str, Any], colour: str) -> str:
    who = "free" if core["pid"] is None else f"{core['program']} {core['pid']}, worker {core['worker']}"
    style = f"background: {colour}; color: {palette.ink_on(colour)}; padding: 2px 8px; border-radius: 4px"
    return f'<span style="{style}">core {core["core"]}: {escape(who)}</span>'
