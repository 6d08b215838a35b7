"""Which cores workers are bound to, and which are near each other: on made-up trees of /sys and /proc."""

import os

import numpy as np
import pytest
from interleavings import Still

from taskgpt.schedulers import cores


def tree(root, nodes: dict[int, tuple[str, str]], threads: dict[int, list[str]] | None = None):
    """Write nodes (cores, distances) and processes (the cores of each thread, the process' own first)."""
    for number, (cpus, distances) in nodes.items():
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
        (folder / "distance").write_text(f"{distances}\n")
    for process, allowed in (threads or {}).items():
        for at, cpus in enumerate(allowed):
            folder = root / f"proc/{process}/task/{process + at}"
            folder.mkdir(parents=True)
            (folder / "status").write_text(f"Name:\tx\nCpus_allowed_list:\t{cpus}\n")
        (root / f"proc/{process}/status").write_text(f"Name:\tx\nCpus_allowed_list:\t{allowed[0]}\n")
    return root


TWO_NODES = {0: ("0-1,4-5", "10 21"), 1: ("2-3,6-7", "21 10")}


def test_near_first(tmp_path):
    """Own node first, from the next one on; then the other node. Of four nodes, the nearer ones before the farther."""
    tree(tmp_path, TWO_NODES)
    order = cores.near_first([0, 1, 4, 2, 3], tmp_path).tolist()
    assert order == [[0, 1, 2, 3, 4], [1, 2, 0, 3, 4], [2, 0, 1, 3, 4], [3, 4, 0, 1, 2], [4, 3, 0, 1, 2]]
    four = tree(tmp_path / "four", {n: (str(n), " ".join(row)) for n, row in enumerate([("10", "32", "21", "32")] * 4)})
    assert cores.near_first([0, 1, 2, 3], four)[0].tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("missing", ["all", "distance", "no_number"])
def test_without_nodes(tmp_path, missing):
    """All are equally near: each begins with itself and goes round."""
    if missing != "all":
        tree(tmp_path, TWO_NODES)
        for file in (tmp_path / "sys/devices/system/node").glob("*/distance"):
            file.unlink() if missing == "distance" else file.write_text("far away")
    assert cores.near_first([0, 2, 1], tmp_path).tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_cores_to_bind(tmp_path, monkeypatch):
    """By node; not those that another process of ours holds, unless too few are left. A process of one core only holds none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    tree(tmp_path, TWO_NODES, {10**7: ["0-7", "0", "4", "2-3"], 10**7 + 100: ["5"], os.getpid(): ["0-7", "1"]})
    assert cores.cores_to_bind(6, tmp_path) == [1, 5, 2, 3, 6, 7]
    assert cores.cores_to_bind(7, tmp_path) == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound on this system")
def test_workers_steal_from_near_ones_first(monkeypatch):
    """What is near comes from the cores to which the workers are bound; the submitting thread's queue is last, and goes round itself."""
    monkeypatch.setattr("taskgpt.schedulers.native.scheduler.cores_to_bind", lambda count: [7, 8, 9])
    monkeypatch.setattr("taskgpt.schedulers.native.scheduler.near_first", lambda bound: np.array([[0, 2, 1], [1, 0, 2], [2, 1, 0]]))
    with Still(workers=3, work_stealing=True, binding="cores") as still:
        order = [[still.code._near(still.t, first, at) for at in range(4)] for first in range(4)]
    assert order == [[0, 2, 1, 3], [1, 0, 2, 3], [2, 1, 0, 3], [3, 0, 1, 2]]
