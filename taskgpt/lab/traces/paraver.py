"""A trace for Paraver, BSC's trace browser: a .prv of records, beside it a .pcf that names values, a .row that names threads and CPUs, and
a folder .cfgs of views to open.

One application, one process, a thread a worker, on a CPU each: worker 0 is THREAD 1.1.1, as Extrae would call it and PyPOP looks for it, on
the CPU `worker 0`, which is none of the machine's. Numbers are Extrae's where it has some, so that its configurations work: states 0 Idle
(nothing is ready), 1 Running, 5 Synchronization (a barrier), 7 Scheduling (a task is ready, nobody runs it); types 60000018 outlined
function (loops), 60000023 task function, 60000028 task id. Ours follow on 70000001. An interval is an event with its value, then one with
0. Dependencies are communications, from the end of a task to the start of the one that waited, in the next run too; their size is the bytes
that it moves, their tag the kernel.

Kernels, phases and layers are numbered from FIRST on, one after the other, as Paraver draws a value in the colour that STATES_COLOR has for
its number: so each has its colour of taskgpt.palette, and none a state's.

Each program of a trace of several is an application. Each rank of a program of several is a process (TASK), whose last thread is its
network: Group Communication (13) while an exchange is under way, events 70000006 with how many are. Messages are communications between
these threads, their tag MESSAGE and the bucket. A worker's gap that is mostly due to an exchange under way is Group Communication too.

A gap between two tasks is one state, that of the cause to which most of it is due: times by state differ from those of `trace report`,
which shares a gap among its causes.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import localtime, strftime

import numpy as np

from taskgpt import palette
from taskgpt.errors import shorten
from taskgpt.files import replacing
from taskgpt.lab.layout import label
from taskgpt.lab.traces import paraver_views
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.rules import RuleError, reading
from taskgpt.lab.traces.trace import Trace

IDLE, RUNNING, SYNCHRONIZATION, SCHEDULING, COMMUNICATION = 0, 1, 5, 7, 13
STATES = {IDLE: "Idle", RUNNING: "Running", SYNCHRONIZATION: "Synchronization", SCHEDULING: "Scheduling and Fork/Join"}
STATES |= {COMMUNICATION: "Group Communication"}
STATE_OF = {"barrier": SYNCHRONIZATION, "dependency": IDLE, "scheduling": SCHEDULING, "between": IDLE}  # by what a gap is mostly due to
OUTLINED, TASK_FUNCTION, TASK_ID = 60000018, 60000023, 60000028
LAYER, PHASE, STEP, FLOPS, BYTES, EXCHANGES = range(70000001, 70000007)
FIRST = 20
MESSAGE = 1_000_000
_CHUNK = 20_000  # lines in memory at a time
_COMMUNICATION = "3:%d:%d:%d:%d:%d:%d:%d:%d:%d:%d:%d:%d:%d:%d"


def write(trace: Trace, path: str | Path) -> None:
    """Write path, a .prv, and the .pcf, .row and .cfgs beside it, each file whole or not at all. Raises OSError or UserError."""
    path = Path(path)
    _put(path.with_suffix(".pcf"), iter([_pcf(trace)]))
    _put(path.with_suffix(".row"), _row(trace))
    function = OUTLINED if trace.about["is_fork_join"] else TASK_FUNCTION
    timelines = {"kernel": ("Kernel", function), "layer": ("Layer", LAYER), "phase": ("Phase", PHASE), "step": ("Step", STEP)}
    paraver_views.write(path.with_suffix(".cfgs"), {"state": ("State", None), **timelines}, profiled="kernel")
    _put(path, _prv(trace))


class _Places:
    """Where things stand in the file. Of each worker, and then of each network: `cpu`, `application`, `task` and `thread`, all from 1.

    threads: how many each rank has. network: of ranks of a program that has several, their network's place in these.
    """

    def __init__(self, trace: Trace):
        ranks, rank = trace.ranks, trace.rank_of_worker
        program = np.array([each.program for each in ranks])
        workers = np.array([each.workers for each in ranks])
        has_network = np.bincount(program)[program] > 1
        of_networks = np.flatnonzero(has_network)
        self.threads = workers + has_network
        self.network = np.full(len(ranks), -1)
        self.network[of_networks] = trace.workers + np.arange(len(of_networks))
        of = np.concatenate([rank, of_networks])
        self.application = program[of] + 1
        self.task = (np.arange(len(ranks)) - np.searchsorted(program, program))[of] + 1
        place = np.arange(trace.workers) - np.searchsorted(rank, rank)
        self.thread = np.concatenate([place, workers[of_networks]]) + 1
        self.cpu = (np.cumsum(self.threads) - self.threads)[of] + self.thread

    def of(self, who: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.cpu[who], self.application[who], self.task[who], self.thread[who]


def _row(trace: Trace) -> Iterator[str]:
    places, ranks = _Places(trace), trace.ranks
    of, applications = np.array([rank.program for rank in ranks]), range(len(trace.programs))
    whose = [f"rank {n} " if len(applications) == 1 else f"{label(rank.name)} " for n, rank in enumerate(ranks)] if len(ranks) > 1 else [""]
    yield f"LEVEL CPU SIZE {sum(places.threads)}"
    for name, rank, network in zip(whose, ranks, places.network.tolist(), strict=True):
        yield from (f"{name}worker {worker}" for worker in range(rank.workers))
        yield from [f"{name}network"] * (network >= 0)
    yield from ("", "LEVEL NODE SIZE 1", "node", "")
    if len(applications) > 1:
        first = np.searchsorted(of, applications).tolist()
        count = np.bincount(of).tolist()
        yield f"LEVEL APPL SIZE {len(applications)}"
        yield from (
            label(ranks[at].name) if n == 1 else f"{n} ranks, {label(ranks[at].name)} first" for at, n in zip(first, count, strict=True)
        )
        yield ""
    if len(ranks) > 1:
        yield from (f"LEVEL TASK SIZE {len(ranks)}", *(label(rank.name) for rank in ranks), "")
    yield f"LEVEL THREAD SIZE {sum(places.threads)}"
    order = np.argsort(places.cpu)
    where = zip(*(each[order].tolist() for each in (places.application, places.task, places.thread)), strict=True)
    yield from (f"THREAD {application}.{task}.{thread}" for application, task, thread in where)


def _put(path: Path, lines: Iterator[str]) -> None:
    with replacing(path) as file:
        waiting: list[str] = []
        for line in lines:
            waiting.append(line)
            if len(waiting) == _CHUNK:
                file.write(("\n".join(waiting) + "\n").encode())
                waiting.clear()
        file.write("\n".join([*waiting, ""]).encode())


@dataclass(frozen=True)
class _Lines:
    """Lines of one form: when, in what order at the same time, and what stands in the form's %d, an array each."""

    times: np.ndarray
    sequence: np.ndarray
    form: str
    values: tuple[np.ndarray, ...]


def _prv(trace: Trace) -> Iterator[str]:
    """Yield the lines, by time."""
    length = trace.end_ns - trace.begin_ns
    now = strftime("%d/%m/%Y at %H:%M", localtime())
    places = _Places(trace)
    threads = np.split(places.threads, np.flatnonzero(np.diff([rank.program for rank in trace.ranks])) + 1)  # of each application
    applications = ":".join(f"{len(each)}({','.join(f'{count}:1' for count in each)})" for each in threads)
    yield f"#Paraver ({now}):{length}_ns:1({sum(places.threads)}):{len(threads)}:{applications}"
    parts = [*_states(trace, length, places), *_tasks(trace, places), _communications(trace, places)]
    if len(trace.ranks) > len(trace.programs):
        parts += [*_exchanges(trace, length, places), _messages(trace, length, places)]
    part_of = np.repeat(np.arange(len(parts)), [len(part.times) for part in parts])
    row_of = np.concatenate([np.arange(len(part.times)) for part in parts])
    order = np.lexsort([np.concatenate([getattr(part, key) for part in parts]) for key in ("sequence", "times")])
    for begin in range(0, len(order), _CHUNK):
        chunk = order[begin : begin + _CHUNK]
        lines = [""] * len(chunk)
        for number, part in enumerate(parts):
            here = np.flatnonzero(part_of[chunk] == number)
            rows = zip(*(values[row_of[chunk[here]]].tolist() for values in part.values), strict=True)
            for at, row in zip(here.tolist(), rows, strict=True):
                lines[at] = part.form % row
        yield from lines


def _states(trace: Trace, length: int, places: _Places) -> Iterator[_Lines]:
    """Yield those of the tasks, of tasks that were left out, and of gaps."""
    idle = gaps(trace)
    idle_state = np.array([STATE_OF[cause] for cause in CAUSES])[np.argmax([idle[cause] for cause in CAUSES], axis=0)]
    idle_state[(idle_state == IDLE) & (idle["network"] > (idle["end_ns"] - idle["begin_ns"]) / 2)] = COMMUNICATION
    spans = [(found, "start_ns", "stop_ns", np.full(len(found), RUNNING)) for found in (trace.records, trace.others)]
    for found, begin, end, state in [*spans, (idle, "begin_ns", "end_ns", idle_state)]:
        since, until = ((found[name] - trace.begin_ns).clip(0, length) for name in (begin, end))
        has_length = until > since
        who, since, until, state = (column[has_length] for column in (found["worker"], since, until, state))
        yield _state_lines(places.of(who), since, until, state)


def _state_lines(where: tuple, since: np.ndarray, until: np.ndarray, state: np.ndarray) -> _Lines:
    return _Lines(since, np.zeros_like(since), "1:%d:%d:%d:%d:%d:%d:%d", (*where, since, until, state))


def _exchanges(trace: Trace, length: int, places: _Places) -> Iterator[_Lines]:
    """Yield states and events of the ranks' networks: whenever the number of exchanges under way changes."""
    for rank, who in enumerate(places.network.tolist()):
        if who < 0:
            continue
        mine = trace.exchanges[trace.exchanges["rank"] == rank]
        begin, end = ((mine[name] - trace.begin_ns).clip(0, length) for name in ("begin_ns", "end_ns"))
        moments = np.unique(np.concatenate([[0, length], begin, end]))
        changes = [np.bincount(np.searchsorted(moments, each), minlength=len(moments)) for each in (begin, end)]
        count = np.cumsum(changes[0] - changes[1])
        where = places.of(np.full(len(moments), who))
        yield _Lines(moments, np.zeros_like(moments), f"2:%d:%d:%d:%d:%d:{EXCHANGES}:%d", (*where, moments, count))
        state = np.where(count > 0, COMMUNICATION, IDLE)
        yield _state_lines(tuple(each[:-1] for each in where), moments[:-1], moments[1:], state[:-1])


def _messages(trace: Trace, length: int, places: _Places) -> _Lines:
    """Return a line for each message that was sent and received within the trace."""
    m, begin = trace.messages, trace.begin_ns
    m = m[(m["send_ns"] >= begin) & (np.maximum(m["sent_ns"], m["received_ns"]) <= begin + length)]
    send, received = m["send_ns"] - begin, m["received_ns"] - begin
    one, other = (places.of(places.network[m[name]]) for name in ("source", "target"))
    values = *one, send, send, *other, received, received, m["bytes"], m["bucket"] + MESSAGE
    return _Lines(send, np.zeros_like(send), _COMMUNICATION, values)


def _numbers(trace: Trace) -> dict[str, int]:
    """Return the value of the first kernel, of the first phase, and of layer 0; no layer is the one before."""
    phase = FIRST + len(trace.names("kernel"))
    return {"kernel": FIRST, "phase": phase, "layer": phase + len(trace.names("phase")) + 1}


def _tasks(trace: Trace, places: _Places) -> Iterator[_Lines]:
    """Yield the events that begin tasks, and those that end them: each after those of the worker's task before, which may take no time."""
    r, function = trace.records, OUTLINED if trace.about["is_fork_join"] else TASK_FUNCTION
    starts, stops, where, number = r["start_ns"] - trace.begin_ns, r["stop_ns"] - trace.begin_ns, places.of(r["worker"]), np.arange(len(r))
    coloured = {what: trace.column(what) + first for what, first in _numbers(trace).items()}
    values = {function: coloured["kernel"], TASK_ID: r["task"] + 1}
    values |= {LAYER: coloured["layer"], PHASE: coloured["phase"], STEP: trace.runs["step"][r["run"]] + 1}  # 0 ends them
    costs = {FLOPS: trace.column("flops"), BYTES: trace.column("bytes")}
    begins, ends = (":".join(["2:%d:%d:%d:%d:%d", *words]) for words in ([f"{n}:%d" for n in values | costs], [f"{n}:0" for n in values]))
    yield _Lines(starts, 2 * number, begins, (*where, starts, *values.values(), *costs.values()))
    yield _Lines(stops, 2 * number + 1, ends, (*where, stops))


def _communications(trace: Trace, places: _Places) -> _Lines:
    """Return a line for each dependency: sent when the one that is waited for stops, received when the one that waits starts."""
    r, sizes, tags = trace.records, trace.column("bytes"), trace.column("kernel") + FIRST
    before, after = (np.concatenate([np.empty(0, np.int64), *each]) for each in list(zip(*trace.dependencies(), strict=True)) or [(), ()])
    out, ready, start = (r[name][at] - trace.begin_ns for name, at in (("stop_ns", before), ("ready_ns", after), ("start_ns", after)))
    one, other, ready = places.of(r["worker"][before]), places.of(r["worker"][after]), np.maximum(ready, out)
    values = *one, out, out, *other, start, ready, sizes[after], tags[after]
    return _Lines(out, np.zeros_like(out), _COMMUNICATION, values)


def _values(trace: Trace) -> dict[str, dict[int, tuple[str, str]]]:
    """Return the name and the colour of each kernel, phase and layer, by the number that it has in events."""
    layers = {-1, *trace.column("layer").tolist()}
    found = {what: dict(enumerate(trace.names(what))) for what in ("kernel", "phase")} | {"layer": {n: n for n in sorted(layers)}}
    numbered = {}
    for what, first in _numbers(trace).items():
        key = palette.key(what, found[what].values())
        named = {n: (value if what == "kernel" else key[value][0], key[value][1]) for n, value in found[what].items()}
        numbered[what] = {first + n: (label(name), colour) for n, (name, colour) in named.items()}
    return numbered


def _pcf(trace: Trace) -> str:
    colours = {IDLE: "117,195,255", RUNNING: "0,0,255", SYNCHRONIZATION: "179,0,0", SCHEDULING: "255,255,0", COMMUNICATION: "255,144,26"}
    values = _values(trace)
    for numbered in values.values():
        colours |= {n: ",".join(map(str, palette.channels(colour))) for n, (_, colour) in numbered.items()}
    names = {what: {n: name for n, (name, _) in numbered.items()} for what, numbered in values.items()}
    types = [
        (OUTLINED, "Executed OpenMP parallel function", names["kernel"]),
        (TASK_FUNCTION, "Executed task function", names["kernel"]),
        (TASK_ID, "Task id", {}),
        (LAYER, "Layer", names["layer"]),
        (PHASE, "Phase", names["phase"]),
        (STEP, "Step, counted from 1", {}),
        (FLOPS, "Floating-point operations of the task", {}),
        (BYTES, "Bytes that the task moves", {}),
        (EXCHANGES, "Exchanges under way", {}),
    ]
    options = f"LEVEL THREAD,UNITS NANOSEC,LOOK_BACK 100,SPEED 1,FLAG_ICONS ENABLED,NUM_OF_STATE_COLORS {len(colours)},YMAX_SCALE 37"
    pairs = (option.rsplit(" ", 1) for option in options.split(","))
    blocks = [
        "DEFAULT_OPTIONS\n\n" + "\n".join(f"{name:<20}{value}" for name, value in pairs),
        "DEFAULT_SEMANTIC\n\nTHREAD_FUNC         State As Is",
    ]
    blocks.append("STATES\n" + "\n".join(f"{n}    {name}" for n, name in STATES.items()))
    blocks.append("STATES_COLOR\n" + "\n".join(f"{n}    {{{colour}}}" for n, colour in colours.items()))
    for number, name, values in types:
        block = f"EVENT_TYPE\n0    {number}    {name}"
        blocks.append(block + ("\nVALUES\n" + "\n".join(f"{n}    {text}" for n, text in {0: "End", **values}.items()) if values else ""))
    return "\n\n".join(blocks) + "\n"


# The checker reads what is there, and knows nothing of how it was written -----------------------------------------------------------------

_APPLICATION = r"(\d+)\((\d+:1(?:,\d+:1)*)\)"
_HEADER = re.compile(rf"#Paraver \(\d\d/\d\d/\d{{4}} at \d\d:\d\d\):(\d+)_ns:1\((\d+)\):(\d+)((?::{_APPLICATION})+)")
_FIELDS = {"1": 8, "3": 15}


def check(path: str | Path) -> dict[str, int]:
    """Return how many tasks, states, events, arrows and views there are. Raises RuleError, with the line, for the first broken rule.

    Rules: the header's form; number and range of fields; order of time; a thread's states without gap or overlap, from 0 to the end; values
    of named types named in the .pcf; intervals that end; communications that arrive after they left; as many names in the .row as threads.
    """
    path = Path(path)
    with reading(path.with_suffix(".pcf")):
        named = _named_values(path.with_suffix(".pcf"))
    with reading(path.with_suffix(".row")):
        named_threads = _named_threads(path.with_suffix(".row"))
    counts = {"tasks": 0, "states": 0, "events": 0, "communications": 0}
    with reading(path), open(path, encoding="utf-8") as file:
        first = file.readline().rstrip("\n")
        header = _HEADER.fullmatch(first)
        if not header:
            wanted = "#Paraver (date):END_ns:1(cpus):applications:tasks(threads:1,...):..."
            raise RuleError(f"{path}:1: wanted a header, {wanted}, got {shorten(first)}")
        end, cpus, applications = map(int, header.groups()[:3])
        sizes = {}  # threads of each task of each application
        listed = re.findall(_APPLICATION, header[4])
        if len(listed) != applications:
            raise RuleError(f"{path}:1: wanted tasks of {shorten(applications)} applications, got {len(listed)}")
        for application, (tasks, counts_of) in enumerate(listed, start=1):
            of_tasks = [int(each.partition(":")[0]) for each in counts_of.split(",")]
            if len(of_tasks) != int(tasks):
                raise RuleError(f"{path}:1: wanted threads of {shorten(tasks)} tasks, got {len(of_tasks)}")
            sizes |= {(application, task): count for task, count in enumerate(of_tasks, start=1)}
        threads, first = sum(sizes.values()), dict(zip(sizes, [0, *itertools.accumulate(sizes.values())], strict=False))
        if threads != named_threads:
            wanted = f"LEVEL THREAD SIZE {shorten(threads)} in {path.with_suffix('.row').name}, and as many names"
            raise RuleError(f"{path}:1: wanted {wanted}, got {named_threads}")
        covered, open_values, last = [0] * threads, [{} for _ in range(threads)], 0
        for number, line in enumerate(file, start=2):
            text = line.rstrip("\n")

            def wrong(wanted: str, number: int = number, text: str = text) -> RuleError:
                return RuleError(f"{path}:{number}: wanted {wanted}, got {shorten(text)}")

            words = text.split(":")
            if not all(word.isdecimal() for word in words) or words[0] not in ("1", "2", "3"):
                raise wrong("a record of type 1, 2 or 3, all numbers")
            if len(words) != _FIELDS.get(words[0], len(words)) or (words[0] == "2" and (len(words) < 8 or len(words) % 2)):
                raise wrong("8 fields of a state, 15 of a communication, pairs of type and value of an event")
            kind, cpu, application, task, thread, time, *rest = map(int, words)
            ends = [(cpu, application, task, thread)] + ([tuple(rest[1:5])] if kind == 3 else [])
            if not all(1 <= c <= cpus and 1 <= th <= sizes.get((a, t), 0) for c, a, t, th in ends):
                raise wrong(f"cpu 1 to {cpus}, a task that the header has, thread 1 to {', '.join(map(str, sizes.values()))}")
            thread += first[application, task]
            if not last <= time <= end:
                raise wrong(f"a time from {last}, that of the line before, to {end}")
            last = time
            if kind == 1:
                counts["states"] += 1
                if time != covered[thread - 1] or not time < rest[0] <= end:
                    raise wrong(f"a state from {covered[thread - 1]}, where the thread's last one ended, to at most {end}")
                if rest[1] not in named["states"]:
                    raise wrong("a state that the .pcf names")
                covered[thread - 1] = rest[0]
            elif kind == 2:
                counts["events"] += 1
                for event_type, value in zip(rest[::2], rest[1::2], strict=True):
                    values = named.get(event_type)
                    if values is None or (values and value not in values):
                        raise wrong(f"a type, and a value of {event_type}, that the .pcf names")
                    if values and bool(open_values[thread - 1].get(event_type)) == bool(value):
                        raise wrong(f"values of {event_type} that end with 0 before another one begins")
                    open_values[thread - 1][event_type] = value if values else 0
                    counts["tasks"] += event_type in (OUTLINED, TASK_FUNCTION) and value != 0
            else:
                counts["communications"] += 1
                if not time <= rest[0] <= rest[6] <= end or not rest[0] <= rest[5] <= end:
                    raise wrong("a communication that arrives after it left")
    if any(stop != end for stop in covered) or any(any(values.values()) for values in open_values):
        got = f"{shorten(covered)} and {shorten(open_values)}"
        raise RuleError(f"{path}: wanted states of every thread up to {end} and intervals that end, got {got}")
    return counts | {"views": paraver_views.check(path.with_suffix(".cfgs"), set(named) - {"states"})}


def _named_threads(path: Path) -> int:
    """Return how many threads a .row names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    heads = [at for at, line in enumerate(lines) if line.startswith("LEVEL THREAD SIZE ")]
    if not heads:
        raise ValueError("wanted LEVEL THREAD SIZE, got none")
    size = lines[heads[0]].removeprefix("LEVEL THREAD SIZE ")
    if (count := len(list(itertools.takewhile(bool, lines[heads[0] + 1 :])))) != int(size):
        raise ValueError(f"wanted LEVEL THREAD SIZE {shorten(size)} and as many names, got {count}")
    return count


def _named_values(path: Path) -> dict:
    """Return {"states": numbers, type: numbers of its values} of a .pcf."""
    named: dict = {"states": set()}
    values: set[int] = set()  # the types of a block share them
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line in ("STATES", "STATES_COLOR", "EVENT_TYPE", "VALUES", "DEFAULT_OPTIONS", "DEFAULT_SEMANTIC"):
            section, values = line, set() if line == "EVENT_TYPE" else values
        elif line and section == "STATES":
            named["states"].add(int(line.split()[0]))
        elif line and section == "EVENT_TYPE":
            named[int(line.split()[1])] = values
        elif line and section == "VALUES":
            values.add(int(line.split()[0]))
    return named
