"""Who holds what in the shares of this user, read from the segments: numbers for programs. Reading disturbs nobody."""

import time
from typing import Any

from taskgpt.errors import UserError
from taskgpt.sharing import layout as w
from taskgpt.sharing.liveness import look
from taskgpt.sharing.segment import Segment, names, opened


def shares() -> list[dict[str, Any]]:
    """Return all shares of this user, each as `share` does; of a damaged one its name and `error`."""
    found = []
    for name in names():
        try:
            found.append(share(name))
        except UserError as error:
            found.append({"share": name, "error": str(error)})
        except FileNotFoundError:  # its last member has left
            continue
    return found


def share(name: str) -> dict[str, Any]:
    """Return the members and the cores of a share. Raises UserError for a damaged one, FileNotFoundError if there is none."""
    with opened(name) as segment:
        pass
    try:
        return seen(segment)
    finally:
        segment.close()


def seen(segment: Segment) -> dict[str, Any]:
    """Return what an open segment says now, `cores` and `members`, each a list of tables; times in s."""
    now = time.monotonic_ns()
    slots, wanting = segment.slots.copy(), int(segment.words[w.WANTING])
    members = {}
    for number, words in enumerate(segment.members.copy()):
        if not words[w.IDENTITY]:
            continue
        pid = int(words[w.IDENTITY]) & 0xFFFFFFFF
        alive = look(pid)
        is_alive = alive is not None and alive.started == words[w.STARTED]
        state = "dead" if not is_alive else "stopped" if alive and alive.is_stopped else "waiting" if wanting >> number & 1 else ""
        members[number] = {
            "pid": pid,
            "program": words[w.NAME : w.NAME + w.NAME_WORDS].tobytes().rstrip(b"\0").decode(errors="replace"),
            "workers": int(words[w.WORKERS]),
            "weight": int(words[w.WEIGHT]),
            "priority": int(words[w.PRIORITY]),
            "cores": 0,
            "core_s": int(words[w.USED]) / 1e9,
            "offers": int(words[w.GRANTS]),
            "state": state,
        }
    cores = []
    for words in slots:
        owner = int(words[w.OWNER])
        number = (owner & 0xFF) - 1
        is_held = number in members and not owner & w.OFFERED
        held_s = max(0, now - int(words[w.SINCE])) / 1e9 if is_held and words[w.SINCE_OF] == owner else 0.0
        if is_held:
            members[number]["cores"] += 1
            members[number]["core_s"] += held_s
        program = members[number] if is_held else {"pid": None, "program": None}
        cores.append(
            {
                "core": int(words[w.CORE]),
                "pid": program["pid"],
                "program": program["program"],
                "worker": owner >> 8 & 0xFFF if is_held else None,
                "held_s": held_s,
            }
        )
    for each in members.values():
        each["state"] = each["state"] or ("running" if each["cores"] else "idle")
    return {"share": segment.name, "members": list(members.values()), "cores": cores}
