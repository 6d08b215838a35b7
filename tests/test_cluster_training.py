"""Training on a Dask cluster: the bits, the checkpoints, and what becomes of a run whose workers die, stop, or come later."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from distributed import Client, LocalCluster
from hosts import DaskHosts, why_not

import taskgpt
from taskgpt.cluster import rank_training
from taskgpt.cluster.kept import Kept
from taskgpt.errors import UserError
from taskgpt.lab.dashboard.live import Live
from taskgpt.runs.console import Console

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


def after_lines(log, lines: int, strike):
    """Call a function when the log has so many lines; return the thread that does."""

    def wait_and_strike():
        while not log.exists() or len(log.read_text().splitlines()) < lines:
            time.sleep(0.01)
        strike()

    thread = threading.Thread(target=wait_and_strike, daemon=True)
    thread.start()
    return thread


def strike(client, number: int):
    """Send a signal to the last worker."""
    pids = client.run(os.getpid)
    os.kill(pids[max(pids)], number)
    if number == signal.SIGSTOP:
        time.sleep(6)
        os.kill(pids[max(pids)], signal.SIGCONT)


@pytest.fixture
def shown(monkeypatch):
    """Return what a page shows, and what ranks have said for it, when there is a page."""
    pytest.importorskip("bokeh", reason="the dashboard needs bokeh: pip install 'taskgpt[dashboard]'")
    kept: list = []
    open_live, rank = Console.open_live, Live.rank

    def keep(console: Console, workers: int) -> Live:
        kept.extend((open_live(console, workers), []))
        return kept[0]

    def listen(live: Live, *said) -> None:
        kept[1].append(said)
        rank(live, *said)

    monkeypatch.setattr(Console, "open_live", keep)
    monkeypatch.setattr(Live, "rank", listen)
    return kept


def verify_page(live, said, cluster, before, after):
    """Compare the page with the summary, and with the addresses of the workers before the run and after it."""
    from bokeh.document import Document
    from bokeh.models import Div

    from taskgpt.lab.dashboard.page import fill, rank_table

    assert all(seconds > 0 and wait_s > 0 for number, _, seconds, wait_s in said if number == 1)
    assert {number for number, step, *_ in said if step < 120} == {0, 1}  # before they end, which the driver is told anyway
    table = rank_table(live.ranks)
    rows = [dict(zip(table["head"], (cell.replace(",", "") for cell in row), strict=True)) for row in table["rows"]]
    here, lost = ([row for row in rows if row["state"] == state] for state in ("here", "lost"))
    generations = cluster["generations"].split()
    assert [row["rank"] for row in here] == [str(rank) for rank in range(int(generations[-1].partition("x")[2]))]
    assert {row["generation"] for row in here} == {str(len(generations) - 1)} and {row["steps done"] for row in here} == {"120"}
    assert {row["worker"] for row in here} <= after and {row["machine"] for row in here} == {socket.gethostname()}
    assert all(float(row["tok/s"]) > 0 for row in here)
    assert all((float(row["ms waiting for the network"]) > 0) if len(here) == 2 else (row["of the step"] == "-") for row in here)
    assert {row["worker"] for row in lost} == before - {row["worker"] for row in here}
    document = Document()
    fill(document, live, {})
    page = "".join(div.text for div in document.select({"type": Div}))
    assert all(row["worker"] in page for row in rows) and f"on {len(here)} rank" in page


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_costs_a_step_and_no_bit(client, text, tmp_path, number, capsys, shown):
    """The others go on from memory; the bits are those of a run that was planned to lose it, and to get another, at those steps.

    The dashboard's page has a row for each rank, by its own word, and says who was lost.
    """
    before = set(client.scheduler_info()["workers"])
    thread = after_lines(tmp_path / "log.jsonl", 10, lambda: strike(client, number))
    found = run(text, client, steps=120, val_every=0, log=tmp_path / "log.jsonl", set=["timeout_s=2"], dashboard=0)
    thread.join()
    verify_page(*shown, found["cluster"], before, set(client.scheduler_info()["workers"]))
    client.wait_for_workers(2, timeout=60)
    generations = found["cluster"]["generations"]
    assert " " in generations and found["steps"] == 120
    assert "from memory" in capsys.readouterr().out
    planned = run(text, client, steps=120, val_every=0, set=[f"generations={generations}"], total_batch=512)
    assert planned["cluster"]["generations"] == generations
    assert planned["parameters_sha256"] == found["parameters_sha256"]


def test_a_worker_that_hangs_costs_a_step_and_no_bit(client, text, tmp_path, capsys):
    """A task of it does not end, while its worker answers everything. It is told of, and takes no part until it goes on."""

    def hang_at_once() -> None:
        from taskgpt.collectives import Communicator

        Communicator.goes_on, Communicator.hand_in_before = threading.Event(), Communicator.hand_in
        Communicator.hand_in = lambda self, *part: (self.goes_on.wait(60), self.hand_in_before(*part))

    def go_on() -> None:
        from taskgpt.collectives import Communicator

        Communicator.goes_on.set()
        Communicator.hand_in = Communicator.hand_in_before

    log, hung = tmp_path / "log.jsonl", max(client.run(os.getpid))
    thread = after_lines(log, 5, lambda: client.run(hang_at_once, workers=[hung]))
    found = run(text, client, steps=40, val_every=0, log=log, set=["hang_s=1"])
    thread.join()
    generations = found["cluster"]["generations"]
    assert generations.startswith("0x2 ") and generations.endswith("x1") and found["steps"] == 40
    told = capsys.readouterr().out
    assert f"{hung}), after" in told and "has not gone on for 1 s; restart this worker" in told and "from memory" in told
    client.run(go_on, workers=[hung])
    planned = run(text, client, steps=40, val_every=0, set=[f"generations={generations}"], total_batch=512)
    assert planned["parameters_sha256"] == found["parameters_sha256"]


def test_a_rank_says_how_it_is_now_and_then(monkeypatch):
    """Twice a second at most, also if it is not rank 0, and only where somebody is shown that; it goes on if it cannot."""
    clock, said = [0.0], []

    def log_event(topic, told):
        said.append((clock[0], topic, told["generation"], told["what"], *told["found"]))
        raise OSError("the scheduler is gone")

    monkeypatch.setattr(rank_training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for is_watched in (True, False):
        job = SimpleNamespace(topic="run", generation=3, is_watched=is_watched)
        report = rank_training.RankReport(job, 1, SimpleNamespace(log_event=log_event), Kept())
        for step in range(12):
            clock[0] = step / 8
            report.rank(step, 0.125, 0.03)
            report.say("nothing")
    assert said == [(step / 8, "run", 3, "rank", 1, step, 0.125, 0.03) for step in (0, 4, 8)]


def test_shards_are_saved_whole(client, text, tmp_path):
    """Each rank's moments come into one checkpoint, from which one machine goes on."""
    parts = run(text, client, set=["zero=true"], out=tmp_path / "parts", save_every=3)
    whole = run(text, client, out=tmp_path / "whole", save_every=3)
    assert parts["parameters_sha256"] == whole["parameters_sha256"]
    first, second = (tmp_path / name / "step-00000006" / "tensors.safetensors" for name in ("parts", "whole"))
    assert first.read_bytes() == second.read_bytes()
    plan = "generations=0x2 3x1"
    parts = run(text, client, set=["zero=true", plan], total_batch=512, out=tmp_path / "on")
    assert parts["parameters_sha256"] == run(text, client, set=[plan], total_batch=512)["parameters_sha256"]


def test_ranks_end_together_when_numbers_are_none_any_more(client, text, capsys):
    """Also those with different shares, of which one has begun more of the next step than another: nobody is lost."""
    with pytest.raises(UserError, match="after 2 steps the loss is nan"):
        run(text, client, val_every=0, lr=1e30, total_batch=768)
    assert "generation" not in capsys.readouterr().out


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
    with pytest.raises(UserError, match="generations: wanted at most 1 ranks, one for each micro-batch of a step, got 2"):
        run(text, client, steps=3, set=["generations=0x2"], total_batch=256, save_every=1)
    with pytest.raises(UserError, match="with zero, no rank has the whole state to go on from; give the run a folder for it, --out"):
        run(text, client, set=["zero=true", "generations=0x2 3x1"])
    assert run(text, client, steps=2, save_every=1)["steps"] == 2  # without a folder
