"""The notebooks run through, and the course's exercises can be failed and solved."""

import pytest
from pages import ROOT
from test_readme import smaller

NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.parent.name == "course"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_through(notebook):
    """Every cell, in order, in a fresh kernel, with the graph tiny in place of a larger one (`jupyter execute` takes those).

    An exercise of the course says that it is not solved yet; the answers assert that they are right.
    """
    nbformat = pytest.importorskip("nbformat", reason="pip install 'taskgpt[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'taskgpt[notebooks]'")
    pytest.importorskip("matplotlib", reason="pip install 'taskgpt[notebooks]'")
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        cell.source = smaller(cell.source)
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in content.cells:
        if "exercise" in tags(cell):
            said = "".join(output.get("text", "") for output in cell.outputs)
            assert "not yet" in said and "right\n" not in said, cell.source


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_without_its_answers_is_what_a_student_gets(lesson):
    """Answers are marked, come last, one for each exercise, and assert their verdict: what is left without them runs as before."""
    nbformat = pytest.importorskip("nbformat", reason="pip install 'taskgpt[notebooks]'")
    cells = nbformat.read(lesson, as_version=4).cells
    is_answer = ["answer" in tags(cell) for cell in cells]
    assert is_answer == sorted(is_answer)
    exercises = sum("exercise" in tags(cell) for cell in cells)
    asserted = sum(cell.source.count('assert verdict == "right"') for cell in cells if "answer" in tags(cell))
    assert exercises == asserted >= 2
    assert not any("Answers\n" in cell.source for cell in cells if "answer" not in tags(cell))


def test_every_notebook_is_on_a_page():
    """By its file's name, in the list of notebooks or on the course's page."""
    pages = "".join((ROOT / "docs" / "tutorials" / name).read_text(encoding="utf-8") for name in ("notebooks.md", "course.md"))
    assert not [path.name for path in NOTEBOOKS if f"`{path.name}`" not in pages]
