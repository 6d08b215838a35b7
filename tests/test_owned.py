"""Tiled programs on a Dask cluster of processes: right numbers, the least that crosses, memory for a part, one error when one is lost."""

import os
import re
import runpy
import signal
import sys
import threading

import numpy as np
import owned_programs as programs
import psutil
import pytest
from distributed import Client, LocalCluster
from pages import ROOT, files

sys.path.insert(0, str(ROOT))
from examples import cholesky_on_a_cluster as cholesky
from taskgpt.cluster import owned
from taskgpt.cluster.owned import run_owned
from taskgpt.errors import UserError
from taskgpt.schedulers import WorkerError
from taskgpt.tasks import TaskError


@pytest.fixture(scope="module")
def client():
    """A cluster of three worker processes."""
    options = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
    with (
        LocalCluster(n_workers=3, memory_limit=0, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(3)
        yield client


def factor(client, ranks):
    """Return Cholesky's factor of 256 rows as a plain matrix, and what it took."""
    done = run_owned(client, cholesky.program, cholesky.specs(256, 32), gather=["a", "error"], ranks=ranks)
    assert 0 < done.tensors["error"].max() < 1e-10
    return np.tril(done.tensors["a"].transpose(0, 2, 1, 3).reshape(256, 256)), done


def test_cholesky_is_lapacks_and_of_the_same_bits_on_any_number_of_workers(client):
    """What crosses is what owner computes needs, and what frames it, a few bytes in a hundred of tiles of 8 KiB."""
    factors = []
    for ranks in (3, 2, 1):
        found, done = factor(client, ranks)
        factors.append(found)
        assert len(done.ranks) == ranks
        assert done.sent_bytes == done.bound_bytes
        assert (done.bound_bytes > 0) == (ranks > 1) == bool(re.search("moved .* MiB, 1[.]0.* times", done.listing()))
        assert done.bound_bytes <= done.wire_bytes <= 1.06 * done.bound_bytes
    np.testing.assert_allclose(factors[0], cholesky.Problem(256, 32).wanted(), rtol=0, atol=1e-10)
    assert len({found.tobytes() for found in factors}) == 1


def test_no_worker_has_the_matrix(client):
    """Each takes less than three quarters of it at any moment: its own half, and a few tiles of the other's."""
    specs = cholesky.specs(4096, 256)
    stored = sum(range(1, 17)) * 256**2 * 8  # bytes of the lower triangle's tiles
    factor(client, 2)
    processes = {address: psutil.Process(pid) for address, pid in client.run(os.getpid).items()}
    before = {address: process.memory_info().rss for address, process in processes.items()}
    most, is_over = dict(before), threading.Event()

    def watch():
        while not is_over.wait(0.002):
            for address, process in processes.items():
                most[address] = max(most[address], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = run_owned(client, cholesky.program, specs, gather=["error"], ranks=2)
    is_over.set()
    watcher.join()
    assert 0 < done.tensors["error"].max() < 1e-10
    for rank in done.ranks:
        assert 0.4 < (most[rank.address] - before[rank.address]) / stored < 0.75


def test_the_example_says_what_moved(client, capsys):
    """Beside the least that can, and how far its result is from the formula; what it cannot run on is one line."""
    assert cholesky.main(["256", "--tile", "64", "--scheduler", client.scheduler.address]) == 0
    shown = capsys.readouterr().out
    assert "10 tiles of 64 x 64, 0.3 MiB" in shown
    assert re.search(r"moved (\d\.\d) MiB of tiles; owner computes needs \1 MiB", shown)
    assert re.search(r"largest error \d\.\de-1[0-9]\n$", shown)
    for words, told in [
        (["--scheduler", "native"], "wanted a cluster"),
        (["100", "--tile", "64"], "wanted a divisor of the matrix's 100 rows"),
    ]:
        assert cholesky.main(words) == 2
        assert told in capsys.readouterr().err


def test_the_pages_program_runs(client, tmp_path, monkeypatch, capsys):
    """docs/howto/owner_computes.md, on this cluster."""
    for name, text in files(ROOT / "docs" / "howto" / "owner_computes.md").items():
        (tmp_path / name).write_text(text.replace("tcp://10.0.0.1:8786", client.scheduler.address))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    runpy.run_path("main.py", run_name="__main__")
    assert "[ 0.  1.  3.  6. 10. 15. 21. 28.]" in capsys.readouterr().out


def test_mistakes_are_told_before_anything_runs(client):
    """Where there are too few workers, no such tensor, or a function that workers cannot import."""
    specs = programs.heat_specs()
    with pytest.raises(UserError, match="wanted 4 workers, got 3 that are fit"):
        run_owned(client, programs.heat, specs, ranks=4)
    with pytest.raises(UserError, match="there is no tensor 'z'; there are x, y, total"):
        run_owned(client, programs.heat, specs, gather=["z"])
    with pytest.raises(ValueError, match="a task runs at the home of the tiles"):
        run_owned(client, programs.two_homes, specs)
    main = type(sys)("__main__")
    exec("def program(spawn, arena): ...", main.__dict__)
    with pytest.raises(UserError, match="workers import 'program', and cannot import __main__; move it to a module"):
        run_owned(client, main.program, specs)


def test_a_task_that_fails_is_the_error(client):
    """With its rank, the task and its line; the cluster goes on."""
    with pytest.raises(TaskError, match=r"^rank 1 \(tcp://.*\): task \d+, refuse inout\(x\[0:16, 16:32\]\), .*ValueError: not today$"):
        run_owned(client, programs.refused, programs.heat_specs())
    factor(client, 3)


@pytest.mark.parametrize(
    "program, reason",
    [(programs.lost, "is lost: .*"), (programs.silent, "(was silent for|cannot be reached: no answer within) 2 s")],
    ids=["killed", "stopped"],
)
def test_a_worker_that_is_gone_is_the_error(client, monkeypatch, program, reason):
    """One, which says which; after a death the others go on with the next program."""
    monkeypatch.setattr(owned, "_LAST_WORDS_S", 0.5)  # those of the one that is stopped are not waited for
    pids = client.run(os.getpid)
    with pytest.raises(
        WorkerError, match=rf"rank 1 \(tcp://.*\) {reason}; the tiles whose home it was are gone: run the program again$"
    ) as raised:
        run_owned(client, program, programs.heat_specs(), timeout_s=2)
    if program is programs.silent:
        os.kill(pids[re.search("tcp://[0-9.:]+", str(raised.value))[0]], signal.SIGKILL)
    else:
        factor(client, 2)
