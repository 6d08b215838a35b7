"""The rules of ovni's emulator, for the events that ovni.py writes. Reads what is there, and knows nothing of how it was written."""

import heapq
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskgpt.errors import shorten
from taskgpt.files import read_json
from taskgpt.lab.traces.rules import RuleError, reading

_FIXED = "OHx:16 OHe:0 OM[:12 OM]:12 VTc:8 VTx:8 VTe:8 VHw:0 VHW:0 VSh:0 VSf:0 VPp:0 VPr:0 PQx:4 PQe:4 PWs:0 PWS:0 PBj:0 PBJ:0"
_SIZES = {"VYc": None, "POc": None} | {name: int(size) for name, size in (word.split(":") for word in _FIXED.split())}  # bytes of payload
_MODELS = {"O": "ovni", "V": "nosv", "P": "openmp"}
_LEAVES = {"VHW": "VHw", "VSf": "VSh", "VTe": "VTx", "PWS": "PWs", "PBJ": "PBj", "PQe": "PQx", "OM]": "OM["}
_LABEL_BYTES = 4 + 512  # a number, a label, a 0
_HOUR_NS = 3600 * 10**9


@dataclass
class _Thread:
    """A stream, and where the emulator stands in it. Stacks are by channel: subsystem, label, mark."""

    folder: Path
    about: dict[str, Any]
    state: str = "unborn"
    cpu: int | None = None
    rests: bool = False
    stacks: dict[str, list[tuple]] = field(default_factory=dict)


def check(path: str | Path) -> dict[str, int]:
    """Return how many threads, events and tasks that ran there are. Raises RuleError, with file and byte, for the first broken rule.

    Rules: keys of stream.json, loom_cpus in one of them; header, known events of required models, whole payloads, times that never go back,
    starts within an hour; OHx first and OHe last; CPUs that exist, one running thread a CPU; types and tasks created once, strictly before
    they are used; a task that executes once at a time; what is entered is left, in order.
    """
    with reading(path):
        return _check(Path(path))


def _check(path: Path) -> dict[str, int]:
    folders = sorted(file.parent for file in path.rglob("stream.json"))
    if not folders:
        raise RuleError(f"{path}: wanted folders with a stream.json, got none")
    threads = [_Thread(folder, _about(folder / "stream.json")) for folder in folders]
    with_cpus = [thread for thread in threads if "loom_cpus" in thread.about["ovni"]]
    if len(with_cpus) != 1:
        raise RuleError(f"{path}: wanted loom_cpus in one stream.json, got them in {len(with_cpus)}")
    cpus = {cpu["index"]: cpu["phyid"] for cpu in with_cpus[0].about["ovni"]["loom_cpus"]}
    if sorted(cpus) != list(range(len(cpus))) or len(set(cpus.values())) != len(cpus):
        raise RuleError(f"{path}: wanted loom_cpus with indices 0, 1, ... and a phyid each, got {shorten(cpus)}")
    counts, running = Counter(threads=len(threads), events=0, tasks=0), {}
    made: dict[int, dict[str, dict]] = {thread.about["ovni"]["pid"]: {"type": {}, "task": {}} for thread in threads}  # by a process
    starts: list[int] = []

    def stream(number: int) -> Iterator[tuple]:
        for at, event in enumerate(_events(threads[number].folder / "stream.obs")):
            if at == 0:
                starts.append(event[0])
            yield event[0], number, *event[1:]

    for clock, number, offset, name, payload in heapq.merge(*map(stream, range(len(threads))), key=lambda event: event[0]):
        thread = threads[number]
        created = made[thread.about["ovni"]["pid"]]
        counts["events"] += 1

        def wrong(wanted: str, thread=thread, offset=offset, name=name, payload=payload) -> RuleError:
            return RuleError(f"{thread.folder / 'stream.obs'}: byte {offset}: wanted {wanted}, got {name} {shorten(payload)}")

        if _MODELS[name[0]] not in thread.about["ovni"]["require"]:
            raise wrong(f"an event of a model that stream.json requires: {shorten(', '.join(thread.about['ovni']['require']))}")
        if name == "OHx":
            cpu = struct.unpack("<iiQ", payload)[0]
            if thread.state != "unborn" or (cpu != -1 and cpu not in cpus):
                raise wrong(f"one beginning, on CPU -1 to {len(cpus) - 1}")
            if cpu != -1 and running.setdefault(cpu, number) != number:
                raise wrong("one running thread on a CPU")
            thread.state, thread.cpu = "running", cpu
        elif thread.state != "running":
            raise wrong("events between OHx and OHe")
        elif name == "OHe":
            thread.state = "dead"
            running.pop(thread.cpu, None)
            if any(thread.stacks.values()):
                raise wrong(f"an end with everything left, not within {[s[-1] for s in thread.stacks.values() if s]}")
        elif name in ("VYc", "POc", "VTc"):
            _create(name, clock, payload, created, wrong)
        elif name in ("VPp", "VPr"):
            if thread.rests == (name == "VPr"):
                raise wrong("rest and progress in turn")
            thread.rests = name == "VPr"
        else:
            _enter_or_leave(name, clock, payload, thread, created, wrong)
            counts["tasks"] += name in ("VTx", "PWs")
    if max(starts) - min(starts) > _HOUR_NS:
        raise RuleError(f"{path}: wanted threads that begin within an hour, got {(max(starts) - min(starts)) / _HOUR_NS:.1f} hours")
    for thread in threads:
        if thread.state != "dead":
            raise RuleError(f"{thread.folder / 'stream.obs'}: wanted OHe at the end, got a thread that is {thread.state}")
    return dict(counts)


def _create(name: str, clock: int, payload: bytes, created: dict[str, dict], wrong) -> None:
    what = "task" if name == "VTc" else "type"
    number = struct.unpack_from("<I", payload)[0]
    if number == 0 or number in created[what]:
        raise wrong(f"a {what} number that is not 0 and new")
    if what == "type" and not (payload.endswith(b"\0") and 1 < len(payload) - 4 <= 512):
        raise wrong("a label of 1 to 511 bytes, then a 0")
    if what == "task" and created["type"].get(struct.unpack("<II", payload)[1], clock + 1) > clock:
        raise wrong("a type created before")
    created[what][number] = clock


def _enter_or_leave(name: str, clock: int, payload: bytes, thread: _Thread, created: dict[str, dict], wrong) -> None:
    entered = _LEAVES.get(name, name)
    channel = "label" if entered == "PQx" else f"mark {payload[8:].hex()}" if entered == "OM[" else "subsystem"
    stack = thread.stacks.setdefault(channel, [])
    if name in _LEAVES:
        if not stack or stack[-1] != (entered, payload):
            raise wrong(f"to leave what was entered last, {stack[-1] if stack else 'nothing'}")
        stack.pop()
        if entered == "VTx":
            created["task"][struct.unpack_from("<I", payload)[0]] = clock
        return
    if entered in ("VTx", "PQx"):
        what = "task" if entered == "VTx" else "type"
        since = created[what].get(struct.unpack_from("<I", payload)[0])
        if since is None or since >= clock:
            raise wrong(f"a {what} created strictly before, which does not execute elsewhere")
    if entered == "VTx":
        if any(before == "VTx" for before, _ in stack):
            raise wrong("the task that executes here to pause or end first")
        created["task"][struct.unpack_from("<I", payload)[0]] = 1 << 63  # until it ends
    if entered == "OM[" and not struct.unpack("<qi", payload)[0]:
        raise wrong("a mark that is not 0")
    stack.append((entered, payload))


def _about(file: Path) -> dict[str, Any]:
    """Return a stream.json that has what the emulator asks for."""
    with reading(file):
        return _verified(read_json(file), file)


def _verified(about: dict[str, Any], file: Path) -> dict[str, Any]:
    ovni = about.get("ovni", {})
    wanted = {
        "version 3": about.get("version") == 3,
        "ovni.part thread": ovni.get("part") == "thread",
        "ovni.tid and ovni.pid that are not 0": ovni.get("tid") and ovni.get("pid"),
        "ovni.loom without /": "/" not in ovni.get("loom", "/"),
        "ovni.require": isinstance(ovni.get("require"), dict),
        "ovni.finished 1": ovni.get("finished") == 1,
        "ovni.lib.version and ovni.lib.commit": {"version", "commit"} <= set(ovni.get("lib", ())),
        "ovni.app_id of 1 or more": ovni.get("app_id", 0) > 0,
    }
    for what, holds in wanted.items():
        if not holds:
            raise RuleError(f"{file}: wanted {what}, got {shorten(ovni)}")
    return about


def _events(file: Path) -> Iterator[tuple[int, int, str, bytes]]:
    """Yield (clock, offset, letters, payload). Raises RuleError for what is no event, or cut short, or goes back in time."""
    last = 0
    with reading(file), open(file, "rb") as opened:
        if opened.read(8) != b"ovni\x01\0\0\0":
            raise RuleError(f"{file}: wanted ovni, version 1, in its first 8 bytes")
        while head := opened.read(12):
            offset = opened.tell() - len(head)

            def wrong(wanted: str, offset: int = offset) -> RuleError:
                return RuleError(f"{file}: byte {offset}: wanted {wanted}")

            if len(head) < 12:
                raise wrong("12 bytes of an event; the file is cut short")
            flags, letters, clock = head[0], head[1:4].decode("latin-1"), int.from_bytes(head[4:], "little")
            if letters not in _SIZES:
                raise wrong(f"an event that taskgpt writes, got {letters!r}")
            size = (flags & 15) + 1 if flags & 15 else 0
            if (flags == 0x13) != (_SIZES[letters] is None) or (flags != 0x13 and size != _SIZES[letters]):
                raise wrong(f"{_SIZES[letters]} bytes of payload for {letters}, got flags {flags:#x}")
            if flags == 0x13:
                size = int.from_bytes(opened.read(4), "little")
                if size > _LABEL_BYTES:
                    raise wrong(f"a label of 1 to 511 bytes, then a 0, got {size:,} bytes of payload")
            payload = opened.read(size)
            if len(payload) < size:
                raise wrong(f"{size} bytes of payload; the file is cut short")
            if clock < last:
                raise wrong(f"a time from {last}, got {clock}")
            last = clock
            yield clock, offset, letters, payload
