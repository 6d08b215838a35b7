"""The house keeps its rooms apart: imports point one way, private names stay in their room, and no file grows too long."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "taskgpt"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the roof down: a room imports from rooms below its own, never from another on its own floor.
FLOORS = """
__main__ train programs
programs.arguments
cluster
lab.tuning lab.pairs
lab.benchmarks
lab.simulator
lab.contests lab.roofline lab.run_page runs
lab.named lab.dashboard lab.graph_formats
lab.traces
lab.report lab.curves __init__
lab.charts lab.drawing lab.layout lab.theme lab.machine lab.disturbance lab.pace config
gpt2 schedulers.native schedulers.loops schedulers.threads schedulers.sequential schedulers.local_cluster
gpt2.text schedulers schedulers.records schedulers.dask_get schedulers.dynamic
downloads
files schedulers.prepare products collectives cluster.settings
schedulers.repetition sharing
tasks schedulers.cores errors lab
palette progress pointers
"""
FLOOR_OF = {room: number for number, floor in enumerate(reversed(FLOORS.split("\n"))) for room in floor.split()}
ROOMS = sorted(FLOOR_OF, key=len, reverse=True)
STRANGERS = {("gpt2", "schedulers"), ("schedulers", "gpt2"), ("schedulers", "files")}  # on whatever floors


def module_of(path: Path) -> str:
    """Return `lab.traces.trace`; of a package its own name, of the whole one `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return next(room for room in ROOMS if module == room or module.startswith(f"{room}."))


MODULES = {module_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for all that a file imports, anywhere in it; the name is empty for a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def our_imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module of ours, name in it)."""
    for module, name in imports(path):
        if module.partition(".")[0] == "taskgpt":
            base = module.removeprefix("taskgpt").removeprefix(".")
            inner = f"{base}.{name}".strip(".")
            yield (inner, "") if inner in MODULES else (base or "__init__", name)


by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@by_file
def test_imports_point_down(path):
    """From the programs to the tasks. Rooms on one floor have nothing to do with each other, nor have GPT-2 and schedulers."""
    here = room_of(module_of(path))
    for module, _ in our_imports(path):
        there = room_of(module)
        assert there == here or FLOOR_OF[there] < FLOOR_OF[here], f"{here} imports {there}"
        assert (here.split(".")[0], there.split(".")[0]) not in STRANGERS, f"{here} imports {there}"


def test_no_file_imports_itself_by_way_of_others():
    """Nor inside a room: a file is read after those that it imports."""
    needs = {module: {other for other, _ in our_imports(path)} for module, path in MODULES.items()}
    assert list(TopologicalSorter(needs).static_order())


@by_file
def test_private_names_stay_in_their_room(path):
    """Neither imported from another room, nor taken from one of its modules."""
    here, others = room_of(module_of(path)), {}
    for module, name in our_imports(path):
        if room_of(module) != here:
            assert not any(part.startswith("_") and not part.startswith("__") for part in [*module.split("."), name])
            others[name or module.rpartition(".")[2]] = module
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in others:
            assert not node.attr.startswith("_"), f"{node.value.id}.{node.attr} is private to {others[node.value.id]}"


@by_file
def test_private_names_of_dask_are_imported_in_one_file(path):
    """When they move, one file breaks."""
    names = [[*module.split("."), name] for module, name in imports(path) if module.split(".")[0] in ("dask", "distributed")]
    assert path.name == "dask_graph.py" or not any(part.startswith("_") for parts in names for part in parts)


def test_no_file_is_longer_than_500_lines():
    """What is longer wants another file."""
    assert not {path.name: n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
