"""Views that Paraver opens ready made (File > Load configuration): .cfg files, version 3.4, that go with the traces of paraver.py.

A timeline shows one thing of every worker over time: the value of a type of events, or the state. The profile is a histogram of a timeline:
a row a worker, a column a value, in each cell the time.
"""

import re
from pathlib import Path

from taskgpt.errors import shorten
from taskgpt.files import read_text, write_whole
from taskgpt.lab.traces.rules import RuleError, reading

_THREAD_OF = {True: "State As Is", False: "Last Evt Val"}  # Paraver's functions that make a timeline of records
_ANY = "1" + "0" * 18 + ".000000000000"


def write(folder: Path, timelines: dict[str, tuple[str, int | None]], profiled: str) -> None:
    """Write FILE.cfg for each (title, type of events; None = states), and profile.cfg of one, each file whole. Raises UserError."""
    folder.mkdir(exist_ok=True)
    for file, (title, event_type) in timelines.items():
        text = _head(1, f"{title} of every worker over time.") + _timeline(1, title, event_type)
        write_whole(folder / f"{file}.cfg", text)
    title, event_type = timelines[profiled]
    text = _head(1, f"Time by {title.lower()} and worker.") + _timeline(1, title, event_type) + _profile(title)
    write_whole(folder / "profile.cfg", text)


def _head(windows: int, description: str) -> str:
    return (
        f"#ParaverCFG\nConfigFile.Version: 3.4\nConfigFile.NumWindows: {windows}\n"
        f"ConfigFile.BeginDescription\n{description}\nConfigFile.EndDescription\n\n\n"
    )


def _timeline(number: int, title: str, event_type: int | None) -> str:
    rule = "#" * 80
    adding = ("appl", "task", "node", "system", "workload")
    functions = {"cpu": "Active Thd", **dict.fromkeys(adding, "Adding"), "thread": _THREAD_OF[event_type is None]}
    functions |= dict.fromkeys(("from_obj", "to_obj", "tag_msg", "size_msg", "bw_msg", "evt_value"), "All")
    functions["evt_type"] = "All" if event_type is None else "="
    levels = ("cpu", "appl", "task", "thread", "node", "system", "workload")
    compose = [*(f"compose_{level}" for level in levels), "topcompose1", "topcompose2"]
    settings = {
        "name": title,
        "type": "single",
        "id": number,
        "position_x": 100,
        "position_y": 100,
        "width": 1000,
        "height": 250,
        "comm_lines_enabled": "false",
        "flags_enabled": "false",
        "noncolor_mode": "true",
        "color_mode": "window_in_code_mode",
        "logical_filtered": "true",
        "physical_filtered": "false",
        "comm_fromto": "true",
        "comm_tagsize": "true",
        "comm_typeval": "true",
        "units": "Microseconds",
        "maximum_y": "1000.000000000000",
        "minimum_y": "1.000000000000",
        "compute_y_max": "true",
        "level": "thread",
        "scale_relative": "1.000000000000",
        "end_time_relative": "1.000000000000",
        "object": "appl { 1, { All } }",
        "begin_time_relative": "0.000000000000",
        "open": "true",
        "drawmode": "draw_randnotzero",
        "drawmode_rows": "draw_randnotzero",
        "pixel_size": 1,
        "labels_to_draw": 1,
        "selected_functions": _braced(functions),
        "compose_functions": _braced(dict.fromkeys(compose, "As Is")),
    }
    lines = [rule, f"< NEW DISPLAYING WINDOW {title} >", rule, *(f"window_{name} {value}" for name, value in settings.items())]
    if event_type is not None:
        lines += [f"window_filter_module evt_type 1 {event_type}", f'window_filter_module evt_type_label 1 "{title}"']
    return "\n".join(lines) + "\n\n"


def _braced(pairs: dict[str, str]) -> str:
    return f"{{ {len(pairs)}, {{ " + ", ".join(f"{{{name}, {value}}}" for name, value in pairs.items()) + " } }"


def _profile(title: str) -> str:
    settings = {
        "Name": f"Time by {title.lower()} and worker",
        "X": 100,
        "Y": 400,
        "Width": 1000,
        "Height": 250,
        "ControlWindow": 1,
        "DataWindow": 1,
        "Accumulator": "Semantic",
        "Statistic": "Time",
        "CalculateAll": "True",
        "HideCols": "True",
        "HorizVert": "Horizontal",
        "Color": "True",
        "SemanticColor": "False",
        "Zoom": "Enabled",
        "SortCols": "False",
        "SortCriteria": "Average",
        "Parameters": f"4 -{_ANY} {_ANY} -{_ANY} {_ANY}",
        "AnalysisLimits": "Alltrace",
        "ComputeYScale": "True",
        "Minimum": "1.000000000000",
        "Maximum": "100.000000000000",
        "Delta": "1.000000000000",
        "ComputeGradient": "True",
        "DrawModeObjects": "draw_maximum",
        "DrawModeColumns": "draw_maximum",
        "PixelSize": 1,
        "ColorMode": "window_in_gradient_mode",
        "ShowOnlyTotals": "False",
        "ShortHeaderLabels": "False",
    }
    return "< NEW ANALYZER2D >\n" + "\n".join(f"Analyzer2D.{name}: {value}" for name, value in settings.items()) + "\n"


def check(folder: Path, known_types: set[int]) -> int:
    """Return how many views there are. Raises RuleError for one that Paraver would not open, or that shows nothing of this trace.

    Rules: the header; as many windows as it says, numbered from 1; braces that count what they hold; histograms of windows that are there;
    types of events that the .pcf names.
    """
    paths = sorted(folder.glob("*.cfg"))
    for path in paths:
        with reading(path):
            _check_view(path, read_text(path), known_types)
    return len(paths)


def _check_view(path: Path, text: str, known_types: set[int]) -> None:
    head = re.match(r"#ParaverCFG\nConfigFile\.Version: 3\.4\nConfigFile\.NumWindows: (\d{1,9})\n", text)
    if not head:
        raise RuleError(f"{path}: wanted #ParaverCFG, ConfigFile.Version: 3.4 and ConfigFile.NumWindows: N, got {shorten(text[:80])}")
    windows = re.findall(r"< NEW DISPLAYING WINDOW .+ >\n#+\nwindow_name .+\nwindow_type single\nwindow_id (\d+)\n", text)
    if len(windows) != int(head[1]) or windows != [str(n + 1) for n in range(len(windows))]:
        raise RuleError(f"{path}: wanted {head[1]} windows, numbered from 1, got {shorten(windows)}")
    for count, inside in re.findall(r"_functions \{ (\d+), \{ (.*) \} \}\n", text):
        if len(re.findall(r"\{\w+, [^}]+\}", inside)) != int(count):
            raise RuleError(f"{path}: wanted {shorten(count)} functions, got {shorten(inside)}")
    for window in re.findall(r"Analyzer2D\.(?:Control|Data)Window: (\d+)\n", text):
        if window not in windows:
            raise RuleError(f"{path}: a histogram of window {shorten(window)}, which is not there")
    for event_type in re.findall(r"window_filter_module evt_type 1 (\d+)\n", text):
        if int(event_type) not in known_types:
            raise RuleError(f"{path}: events of type {shorten(event_type)}, which the .pcf does not name")
