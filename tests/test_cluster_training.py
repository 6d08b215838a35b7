"""Training on a Dask cluster: the bits, the checkpoints, and what becomes of a run whose workers die, stop, or come later."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from distributed import Client, LocalCluster
from hosts import DaskHosts, why_not

import taskgpt
from taskgpt.errors import UserError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 400


@pytest.fixture(scope="module")
def cluster():
    options = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": None, "scheduler_kwargs": {"dashboard": False}}
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, memory_limit=0, silence_logs=50, **options) as started:
        yield started


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "hamlet.txt"
    path.write_text(TEXT)
    return str(path)


def run(text, client=None, steps=6, **flags):
    return taskgpt.train(graph="tiny", data=text, steps=steps, sample_every=0, client=client, **flags)


def test_two_ranks_learn_what_one_machine_learns(client, text, tmp_path):
    """The same losses as with as many micro-batches here, and a run that goes on here from the cluster's checkpoint."""
    there = run(text, client, out=tmp_path / "run", save_every=3, log=tmp_path / "log.jsonl")
    here = run(text, total_batch=512)
    assert there["cluster"]["generations"] == "0x2"
    for name in ("train_loss", "val_loss"):
        assert there[name]["last"] == pytest.approx(here[name]["last"], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-00000003", "step-00000006"]
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "train_loss" in each] == list(range(6))
    on = taskgpt.train("--resume", str(tmp_path / "run"), steps=9, scheduler="native")
    assert on["steps"] == 3 and on["train_loss"]["last"] < there["train_loss"]["last"]


def test_one_rank_has_the_bits_of_one_machine(client, text, tmp_path):
    """Also with a checkpoint of llm.c's in and out."""
    here = run(text, save=tmp_path / "here.bin")
    there = run(text, client, set=["ranks=1"], total_batch=256, save=tmp_path / "there.bin")
    assert there["parameters_sha256"] == here["parameters_sha256"]
    assert (tmp_path / "here.bin").read_bytes() == (tmp_path / "there.bin").read_bytes()
    more = [run(text, where, init=tmp_path / "here.bin", total_batch=256)["parameters_sha256"] for where in (None, client)]
    assert more[0] == more[1]


def strike(client, number: int, after_lines: int, log):
    """Send a signal to the last worker when the log has so many lines; return the thread that does."""

    def wait_and_strike():
        while not log.exists() or len(log.read_text().splitlines()) < after_lines:
            time.sleep(0.01)
        pids = client.run(os.getpid)
        os.kill(pids[max(pids)], number)
        if number == signal.SIGSTOP:
            time.sleep(6)
            os.kill(pids[max(pids)], signal.SIGCONT)

    thread = threading.Thread(target=wait_and_strike, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_costs_a_step_and_no_bit(client, text, tmp_path, number, capsys):
    """The others go on from memory; the bits are those of a run that was planned to lose it, and to get another, at those steps."""
    thread = strike(client, number, 10, tmp_path / "log.jsonl")
    found = run(text, client, steps=120, val_every=0, log=tmp_path / "log.jsonl", set=["timeout_s=2"])
    thread.join()
    client.wait_for_workers(2, timeout=60)
    generations = found["cluster"]["generations"]
    assert " " in generations and found["steps"] == 120
    assert "from memory" in capsys.readouterr().out
    planned = run(text, client, steps=120, val_every=0, set=[f"generations={generations}"], total_batch=512)
    assert planned["cluster"]["generations"] == generations
    assert planned["parameters_sha256"] == found["parameters_sha256"]


def test_shards_are_saved_whole(client, text, tmp_path):
    """Each rank's moments come into one checkpoint, from which one machine goes on."""
    parts = run(text, client, set=["zero=true"], out=tmp_path / "parts", save_every=3)
    whole = run(text, client, out=tmp_path / "whole", save_every=3)
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    first, second = (tmp_path / name / "step-00000006" / "tensors.safetensors" for name in ("parts", "whole"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are hosts")
def test_hosts_have_the_bits_of_processes(client, text, tmp_path):
    """Two machines with a link of 1 Gb/s, and two processes of one: the same parameters. The link carries what ranks say they send."""
    here = run(text, client, steps=20, val_every=0)
    with DaskHosts(2, gbits=1) as hosts:
        words = [
            "--graph",
            "tiny",
            "--data",
            text,
            "--steps",
            "20",
            "--val-every",
            "0",
            "--sample-every",
            "0",
            "--log",
            tmp_path / "log.jsonl",
        ]
        before = hosts.bytes(1)[1]
        done = hosts.popen(0, [sys.executable, "-m", "taskgpt.train", *words, "--scheduler", hosts.scheduler], stdout=subprocess.PIPE)
        said, _ = done.communicate(timeout=120)
        sent = hosts.bytes(1)[1] - before
    assert done.returncode == 0, said
    there = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["summary"]
    assert there["parameters_sha256"] == here["parameters_sha256"]
    assert there["cluster"]["payload_bytes_per_step"] * 20 < sent < there["cluster"]["payload_bytes_per_step"] * 20 * 1.1 + 2_000_000


def test_what_is_wrong_is_one_message(client, text, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        run("nowhere.txt", client)
    with pytest.raises(UserError, match="--report: is not for a run on a cluster"):
        run(text, client, report=tmp_path / "page.html")
    with pytest.raises(UserError, match="--steps"):
        taskgpt.train(steps="many", client=client)
    assert run(text, client, steps=1)["steps"] == 1
