"""Paraver's files: every task, state, cost and dependency read back with a reader of the test's own; broken rules are found."""

import re
from collections import Counter

import numpy as np
import pytest
from test_efficiency import hand_made
from test_trace import NAMES, traced, waits

from taskgpt import palette
from taskgpt.lab.traces import paraver
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.rules import RuleError


def names_of(pcf: str, event_type: int) -> dict[int, str]:
    block = re.search(rf"EVENT_TYPE\n0 +{event_type} .*?\nVALUES\n(.*?)(?:\n\n|\Z)", pcf, re.DOTALL).group(1)
    return {int(number): name for number, name in (line.split(maxsplit=1) for line in block.splitlines())}


def test_values_have_the_colours_of_other_pictures(tmp_path):
    """Paraver draws a value in STATES_COLOR's entry for its number: kernels, phases and layers have their own, and no state's."""
    trace = traced("native")
    paraver.write(trace, tmp_path / "paraver.prv")
    pcf = (tmp_path / "paraver.pcf").read_text()
    colours = {int(n): rgb for n, *rgb in re.findall(r"^(\d+)    \{(\d+),(\d+),(\d+)\}$", pcf, re.MULTILINE)}
    values = {what: names_of(pcf, n) for what, n in (("kernel", 60000023), ("phase", 70000002), ("layer", 70000001))}
    numbers = [n for named in values.values() for n in named if n]
    assert len(set(numbers)) == len(numbers) and not set(numbers) & set(paraver.STATES)
    assert set(colours) == {*numbers, *paraver.STATES}
    for kernel, colour in palette.of_kernels(trace.names("kernel")).items():
        [number] = [n for n, name in values["kernel"].items() if name == kernel]
        assert "#" + "".join(f"{int(part):02X}" for part in colours[number]) == colour
    for layer, colour in palette.of_layers(trace.column("layer").tolist()).items():
        [number] = [n for n, name in values["layer"].items() if name == (f"layer {layer}" if layer >= 0 else "no layer")]
        assert "#" + "".join(f"{int(part):02X}" for part in colours[number]) == colour


@pytest.mark.parametrize("name", NAMES)
def test_every_field_reads_back(name, tmp_path):
    """Worker, times, kernel, layer, phase, step, task and costs of each task, and an arrow for each dependency."""
    trace = traced(name)
    path = tmp_path / "paraver.prv"
    paraver.write(trace, path)
    counts = paraver.check(path)
    function = 60000018 if name == "loops" else 60000023
    pcf = path.with_suffix(".pcf").read_text()
    kernels, phases, layers = (names_of(pcf, n) for n in (function, 70000002, 70000001))
    found, open_tasks, arrows = [], {}, Counter()
    running, states = Counter(), Counter()
    for line in path.read_text().splitlines()[1:]:
        kind, *fields = map(int, line.split(":"))
        if kind == 1:
            running[fields[3]] += (fields[5] - fields[4]) * (fields[6] == 1)
            states[fields[6]] += fields[5] - fields[4]
        elif kind == 2:
            thread, time = fields[3], fields[4]
            values = dict(zip(fields[5::2], fields[6::2], strict=True))
            if values[function]:
                open_tasks[thread] = time, values
            else:
                start, values = open_tasks.pop(thread)
                words = kernels[values[function]], layers[values[70000001]], phases[values[70000002]]
                numbers = values[60000028] - 1, values[70000003] - 1, values[70000004], values[70000005]
                found.append((thread - 1, start, time, *words, *numbers))
        else:
            arrows[fields[3], fields[4], fields[9], fields[10]] += 1
    expected = []
    for run, records in trace.by_run():
        graph = trace.graphs[trace.runs["graph"][run]]
        for r in records:
            t = r["task"]
            start, stop = r["start_ns"] - trace.begin_ns, r["stop_ns"] - trace.begin_ns
            layer = f"layer {graph.layer[t]}" if graph.layer[t] >= 0 else "no layer"
            words = graph.kernels[graph.kernel[t]], layer, graph.phases[graph.phase[t]] or "no phase"
            expected.append((r["worker"], start, stop, *words, t, trace.runs["step"][run], graph.flops[t], graph.bytes[t]))
    ends = [(a["worker"] + 1, a["stop_ns"] - trace.begin_ns, b["worker"] + 1, b["start_ns"] - trace.begin_ns) for a, b in waits(trace)]
    expected_arrows = Counter(ends)
    assert sorted(found) == sorted(expected)
    assert arrows == expected_arrows
    assert (counts["events"], counts["communications"]) == (2 * len(expected), arrows.total())
    busy = Counter()
    for worker, start, stop, *_ in expected:
        busy[worker + 1] += stop - start
    assert running == busy
    idle = gaps(trace)
    mostly = np.argmax([idle[cause] for cause in CAUSES], axis=0)
    assert states[0] == sum(
        g["end_ns"] - g["begin_ns"] for g, c in zip(idle, mostly, strict=True) if CAUSES[c] in ("dependency", "between")
    )
    assert states[5] == sum(g["end_ns"] - g["begin_ns"] for g, c in zip(idle, mostly, strict=True) if CAUSES[c] == "barrier")


def test_tasks_without_length_begin_before_they_end(tmp_path):
    """A coarse clock: tasks that take no time, alone, at the beginning or where others end and begin, keep their events in order."""
    trace = hand_made([(0, 0, 0, 4, []), (0, 4, 4, 4, [0]), (0, 4, 4, 4, []), (0, 4, 4, 6, [1]), (1, 0, 0, 0, []), (1, 2, 2, 2, [])], 2)
    paraver.write(trace, tmp_path / "paraver.prv")
    assert paraver.check(tmp_path / "paraver.prv")["events"] == 12
    events = [line.split(":") for line in (tmp_path / "paraver.prv").read_text().splitlines() if line.startswith("2:1:")]
    assert [(int(e[5]), int(e[9])) for e in events] == [(0, 1), (4, 0), (4, 2), (4, 0), (4, 3), (4, 0), (4, 4), (6, 0)]


BREAKS = {
    "a header": lambda lines: lines.__setitem__(0, "#Paraver"),
    "all numbers": lambda lines: lines.append("9:1:1:1:1:1"),
    "8 fields of a state": lambda lines: lines.__setitem__(-1, lines[-1] + ":1:2:3"),
    "thread 1 to 1": lambda lines: lines.__setitem__(1, lines[1].replace("1:1:1:1:1:", "1:1:1:1:2:", 1)),
    "that of the line before": lambda lines: lines.append(lines[1]),
    "where the thread's last one ended": lambda lines: lines.insert(1, lines[1]),
    "that the .pcf names": lambda lines: lines.__setitem__(swap(lines, "2:"), lines[swap(lines, "2:")] + ":77:1"),
    "before another one begins": lambda lines: lines.insert(swap(lines, "2:"), lines[swap(lines, "2:")]),
    "arrives after it left": lambda lines: lines.__setitem__(
        swap(lines, "3:"), ":".join([*lines[swap(lines, "3:")].split(":")[:6], "0"] + lines[swap(lines, "3:")].split(":")[7:])
    ),
    "states of every thread": lambda lines: lines.__delitem__(len(lines) - 1 - swap(lines[::-1], "1:")),
}


def swap(lines: list[str], start: str) -> int:
    """Return where the first line is that begins so."""
    return next(at for at, line in enumerate(lines) if line.startswith(start))


@pytest.mark.parametrize("message", BREAKS)
def test_broken_rules_are_found(message, tmp_path):
    """The checker that ships names the line, and what it wanted."""
    path = tmp_path / "paraver.prv"
    paraver.write(traced("sequential"), path)
    lines = path.read_text().splitlines()
    BREAKS[message](lines)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RuleError, match=re.escape(message)):
        paraver.check(path)


def test_threads_are_named_as_analysers_look_for_them(tmp_path):
    """PyPOP takes columns that begin with THREAD, and reads what follows the first point as process and thread; CPUs name the workers."""
    paraver.write(traced("native"), tmp_path / "paraver.prv")
    lines = (tmp_path / "paraver.row").read_text().splitlines()
    at, cpus = lines.index("LEVEL THREAD SIZE 2"), lines.index("LEVEL CPU SIZE 2")
    assert [tuple(map(int, name.split(".")[1:])) for name in lines[at + 1 :] if name.startswith("THREAD 1.")] == [(1, 1), (1, 2)]
    assert lines[cpus + 1 : cpus + 3] == ["worker 0", "worker 1"]


def test_a_row_without_names_is_found(tmp_path):
    """Paraver would show the wrong threads."""
    path = tmp_path / "paraver.prv"
    paraver.write(traced("native"), path)
    path.with_suffix(".row").write_text("LEVEL THREAD SIZE 3\na\nb\nc\n")
    with pytest.raises(RuleError, match=r"LEVEL THREAD SIZE 2"):
        paraver.check(path)


VIEW_BREAKS = {
    "wanted #ParaverCFG": lambda text: text.replace("#ParaverCFG", "#Paraver"),
    "windows, numbered": lambda text: text.replace("NumWindows: 1", "NumWindows: 2"),
    "wanted 14 functions": lambda text: text.replace("{thread, Last Evt Val}, ", ""),
    "a histogram of window": lambda text: text.replace("DataWindow: 1", "DataWindow: 2"),
    "does not name": lambda text: text.replace("evt_type 1 60000023", "evt_type 1 60000099"),
}


@pytest.mark.parametrize("message", VIEW_BREAKS)
def test_a_view_that_would_not_open_is_found(message, tmp_path):
    """Each view names its window, its functions and the events that it shows."""
    path = tmp_path / "paraver.prv"
    paraver.write(traced("native"), path)
    assert paraver.check(path)["views"] == 6
    view = path.with_suffix(".cfgs") / "profile.cfg"
    broken = VIEW_BREAKS[message](view.read_text())
    assert broken != view.read_text()
    view.write_text(broken)
    with pytest.raises(RuleError, match=message):
        paraver.check(path)
