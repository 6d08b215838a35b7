"""The page of a trace, in a real browser: it draws, from disk, without a network, and says what a task read, wrote and waited for."""

import html
import re
import subprocess

import numpy as np
import pytest
from browser import BROWSER, needs_browser
from test_trace import traced

from taskgpt.lab import page


def opened(url: str, *flags: str) -> str:
    """Return the document as the browser has it when the page is ready."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,600", *flags, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
def test_a_page_opens_from_disk(tmp_path):
    """Two traces, tables, and a task chosen in the address: shown with its call, its time and its neighbours."""
    traces = [traced("loops"), traced("native")]
    table = {"caption": "efficiency", "head": ["what", "value"], "rows": [["load balance", "0.97"]]}
    page.write(traces, tmp_path / "page.html", "loops & native </script>", [table])
    record = traces[1].records[20]
    graph = traces[1].graphs[traces[1].runs["graph"][record["run"]]]
    document = opened(f"{(tmp_path / 'page.html').as_uri()}#1:20")
    assert 'data-ready="yes"' in document
    assert "<td>load balance</td><td>0.97</td>" in document
    detail = html.unescape(re.search(r'id="detail">(.*?)</div>', document, re.DOTALL).group(1))
    task = record["task"]
    assert graph.calls[task] in detail
    for p in graph.predecessors[graph.first[task] : graph.first[task + 1]]:
        assert f"{p} {graph.kernels[graph.kernel[p]]}" in detail
    assert "http" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)


@needs_browser
def test_a_page_draws_its_tasks(tmp_path):
    """The picture has the colours of kernels, not an empty canvas."""
    matplotlib = pytest.importorskip("matplotlib.image")
    page.write([traced("native")], tmp_path / "page.html", "native")
    opened((tmp_path / "page.html").as_uri(), f"--screenshot={tmp_path / 'page.png'}")
    picture = (np.asarray(matplotlib.imread(tmp_path / "page.png"))[..., :3] * 255).round().astype(int)
    blue = (abs(picture - [0x00, 0x72, 0xB2]) <= 8).all(axis=2).sum()  # the first colour of the palette
    assert blue > 300


def test_a_page_is_one_file(tmp_path):
    """Nothing else is written, and nothing in it is fetched from anywhere."""
    page.write([traced("sequential")], tmp_path / "page.html", "sequential")
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(src|href)=|https?://|@import""", text)
