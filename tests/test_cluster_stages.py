"""Stages on a Dask cluster: the bits of one machine, its checkpoints, and what becomes of a run that loses a stage."""

import os
import signal
import threading
import time

import pytest
from distributed import Client, LocalCluster

import taskgpt
from taskgpt.errors import UserError

TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n\n" * 400
STAGES = "stages=2"


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


def run(text, client=None, steps=4, **flags):
    return taskgpt.train(graph="tiny", data=text, steps=steps, sample_every=0, total_batch=768, client=client, **flags)


def test_stages_have_the_bits_and_the_checkpoints_of_one_machine(client, text, tmp_path, capsys):
    """A run in stages that goes on here, and one from here that goes on in stages, end as one that is all here."""
    here = run(text, out=tmp_path / "here", save_every=2)
    there = run(text, client, out=tmp_path / "there", save_every=2, set=[STAGES], save=tmp_path / "there.bin")
    assert there["parameters_sha256"] == here["parameters_sha256"]
    assert there["val_loss"] == here["val_loss"]
    assert there["cluster"]["stages"] == 2 and 0 < there["cluster"]["bubble"] < 1
    assert "of 2 stages and 3 micro-batches" in capsys.readouterr().out
    for step in ("step-00000002", "step-00000004"):
        first, second = (tmp_path / name / step / "tensors.safetensors" for name in ("here", "there"))
        assert first.read_bytes() == second.read_bytes()
    on = taskgpt.train("--resume", str(tmp_path / "there"), steps=6, scheduler="native")
    on_in_stages = taskgpt.train("--resume", str(tmp_path / "here"), steps=6, client=client, set=[STAGES])
    assert on["parameters_sha256"] == on_in_stages["parameters_sha256"]
    again = run(text, client, steps=1, init=tmp_path / "there.bin", set=[STAGES])
    assert again["val_loss"]["first"] == there["val_loss"]["last"]


def test_a_lost_stage_sends_the_run_back_to_its_newest_checkpoint(client, text, tmp_path, capsys):
    """Its layers are lost with it. The run waits for another worker, and ends with the bits of one that lost nobody."""

    def strike():
        while not (tmp_path / "run" / "step-00000010").exists():
            time.sleep(0.01)
        pids = client.run(os.getpid)
        os.kill(pids[max(pids)], signal.SIGKILL)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    found = run(text, client, steps=40, val_every=0, out=tmp_path / "run", save_every=10, set=[STAGES, "timeout_s=2"])
    thread.join()
    said = capsys.readouterr().out
    assert found["cluster"]["generations"] in {f"0x2 {step}x2" for step in (10, 20, 30, 40)}
    assert "from the last checkpoint" in said
    assert found["parameters_sha256"] == run(text, steps=40, val_every=0)["parameters_sha256"]


def test_what_does_not_go_with_stages_is_one_message(client, text):
    with pytest.raises(UserError, match="stages: wanted at most 2, one for each layer of the model, got 3"):
        run(text, client, set=["stages=3"])
    with pytest.raises(UserError, match="stages: zero is for ranks that each have the whole model; leave it out, or set stages = 0"):
        run(text, client, set=[STAGES, "zero=true"])
    with pytest.raises(UserError, match="got stages = 2 and ranks = 1; leave ranks out"):
        run(text, client, set=[STAGES, "ranks=1"])
