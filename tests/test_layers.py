"""The house keeps its rooms apart: imports point one way, private names of Dask stay in one file, and no file grows too long."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "taskgpt"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import of the package, besides itself. Top-level files are programs.
ALLOWED = {
    "tasks": set(),
    "schedulers": {"tasks", "errors"},
    "gpt2": {"tasks", "files", "errors"},
    "config": {"files", "gpt2", "schedulers", "errors"},
    "errors": set(),
    "files": {"errors"},
    "data": {"gpt2", "errors"},
    "lab": {"config", "files", "gpt2", "schedulers", "tasks", "errors"},
    "console": {"config", "gpt2", "lab", "tasks", "errors"},
    "train": {"config", "console", "data", "gpt2", "lab", "schedulers", "tasks", "errors"},
    "bench": {"config", "gpt2", "lab", "schedulers", "tasks", "errors"},
    "trace": {"files", "lab", "errors"},
    "compare": {"lab", "errors"},
    "simulate": {"lab", "tasks", "errors"},
    "tune": {"config", "gpt2", "lab", "schedulers", "errors"},
    "show": {"config", "files", "gpt2", "lab", "tasks", "errors"},
    "__main__": {"config", "gpt2", "errors"},
    "__init__": {"config", "gpt2", "schedulers", "tasks", "errors"},
}


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """gpt2 and schedulers never meet; tasks knows nobody."""
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("taskgpt.")}
    assert rooms - {room_of(path)} <= ALLOWED[room_of(path)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_dask_are_imported_in_one_file(path):
    """When they move, one file breaks."""
    private = {
        n for n in imports(path) if n.split(".")[0] in ("dask", "distributed") and any(part.startswith("_") for part in n.split("."))
    }
    assert not private or path.name == "dask_graph.py"


def test_no_file_is_longer_than_500_lines():
    """What is longer wants another file."""
    assert not {path.name: n for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500}
