"""The wheel: what a release installs is all that a run needs."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, unpacked."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="pip install 'taskgpt[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    [path] = builder.WheelBuilder(str(ROOT)).build(directory=str(folder))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_has_every_file(wheel):
    """Modules, pages, machines, types; graphs and scheduler_configs inside the package."""
    package = {path.relative_to(ROOT) for path in (ROOT / "taskgpt").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    data = {Path("taskgpt") / path.relative_to(ROOT) for kind in ("graphs", "scheduler_configs") for path in (ROOT / kind).glob("*.toml")}
    found = {path.relative_to(wheel) for path in (wheel / "taskgpt").rglob("*") if path.is_file()}
    assert not (package | data) - found
    assert {Path("taskgpt/py.typed"), Path("taskgpt/lab/traces/page.html"), Path("taskgpt/lab/simulator/machines/2x56.toml")} <= found
    assert not [path for path in found if "tests" in path.parts]


def test_an_installed_wheel_finds_its_files(wheel, tmp_path):
    """From any folder: the graphs and set-ups that it brought, by name, and machines."""
    program = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
from taskgpt.config import available, load_graph, load_scheduler
from taskgpt.lab.simulator.machine_file import Machine
for name in available("graphs"):
    load_graph(name)
for name in available("scheduler_configs"):
    load_scheduler(name, may_be_cluster=True)
Machine.load("2x56")
print(*available("graphs"), *available("scheduler_configs"))
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == [
        name for kind in ("graphs", "scheduler_configs") for name in sorted(p.stem for p in (ROOT / kind).glob("*.toml"))
    ]


def test_the_version_is_that_of_the_changelog(wheel):
    """Of its newest section."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [path.name for path in wheel.glob("*.dist-info")] == [f"taskgpt-{newest[1]}.dist-info"]
