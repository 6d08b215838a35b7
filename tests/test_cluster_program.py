"""`taskgpt cluster check` says what a cluster is and how fast, and whether a training would begin on it."""

import json
import time

import pytest
from distributed import Client, LocalCluster, get_worker

from taskgpt.__main__ import main
from taskgpt.cluster import speeds


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two workers in threads of this process."""
    quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}, "silence_logs": 50}
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", memory_limit=0, **quiet) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def check(address, capsys, monkeypatch):
    """Run it on the cluster with a graph; return (exit code, what it prints), in lines as wide as they get."""
    monkeypatch.setattr(speeds, "MESSAGE_BYTES", 1 << 20)

    def run(graph: str, *words: str) -> tuple[int, str]:
        code = main(["cluster", "check", address, "--graph", graph, "--wide", *words])
        return code, capsys.readouterr().out

    return run


def test_what_is_found(check, address, tmp_path):
    """A row for each worker, the versions, and what that means; the same as JSON. Nothing is left in the workers."""
    code, text = check("tiny", "--json", str(tmp_path / "check.json"))
    assert code == 0
    assert "a training of tiny, 0.0 GiB a rank, would begin with 2 ranks on 1 machine" in text
    assert "over the slowest link" in text and "BLAS: " in text and "here: python 3." in text
    found = json.loads((tmp_path / "check.json").read_text())
    assert (found["faults"], found["ranks"], len(found["workers"])) == ([], 2, 2)
    for worker in found["workers"]:
        assert worker["address"] in text and worker["verdict"] == "fit" and worker["cores"] >= 1 and worker["gflops"] > 0
        for way in ("next", "previous"):
            assert 0 < worker[f"{way}_latency_s"] < 10 and 0 < worker[f"{way}_bytes_s"] < 1e12
    assert f"{min(worker[f'{way}_bytes_s'] for worker in found['workers'] for way in ('next', 'previous')) / 1e9:.2f} GB/s" in text


def test_a_training_that_would_be_refused(check):
    """Exit code 2, and the reason; with fewer ranks there is a worker to spare."""
    code, text = check("gpt2-124m:batch.batch_size=20000,tiles.rows=1000000,tiles.pointwise_rows=1000000,tiles.heads=12")
    assert code == 2
    assert "fault: " in text and "2 ranks need" in text and "would be refused" in text
    code, text = check("tiny", "--set", "ranks=1")
    assert code == 0 and "fit, to spare" in text and "would begin with 1 rank on 1 machine" in text


def test_while_another_run_is_there(check, address):
    """It says which worker is busy, with what, and measures nothing in it."""
    with Client(address, set_as_default=False) as other:
        work = other.submit(lambda: (get_worker().address, time.sleep(3))[0], key="rank-7", pure=False)
        while not any(other.processing().values()):
            time.sleep(0.01)
        code, text = check("tiny")
        busy = work.result()
    assert code == 0
    assert f"note: {busy} on " in text and "is busy with rank; what both do takes longer" in text
    [row] = [line for line in text.splitlines() if line.startswith(busy)]
    assert row.split()[-1] == "busy" and row.split()[4] == "-"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["native"], "native: wanted a cluster, got the scheduler native, which runs in this process"),
        (["nativ"], "unknown scheduler 'nativ'"),
        (["cluster"], "cluster: which one? --scheduler tcp://HOST:8786"),
        (["cluster-tls", "--set", "tls_ca_file=none.pem"], "none.pem: no such file"),
        (["127.0.0.1:8786", "--json", "none/x.json"], "none/x.json: cannot write"),
    ],
)
def test_a_mistake_is_told(words, message, capsys):
    """In one line, with exit code 2."""
    assert main(["cluster", "check", *words]) == 2
    assert message in capsys.readouterr().err
