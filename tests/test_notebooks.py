"""The notebooks run through."""

import pytest
from pages import ROOT
from test_readme import smaller


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_through(notebook):
    """Every cell, in order, in a fresh kernel, with the graph tiny in place of a larger one (`jupyter execute` takes those)."""
    nbformat = pytest.importorskip("nbformat", reason="pip install 'taskgpt[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'taskgpt[notebooks]'")
    pytest.importorskip("matplotlib", reason="pip install 'taskgpt[notebooks]'")
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        cell.source = smaller(cell.source)
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
