"""Steps of many ranks, predicted: the arithmetic by hand, its limits, and the buckets of a real graph."""

import json

import pytest

from taskgpt.config import load_scheduler
from taskgpt.lab.named import make
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.scaling import Bucket, Network, Timeline, rows, step, timeline_of
from taskgpt.lab.simulator.task_costs import Times
from taskgpt.lab.traces.trace import RECORD
from taskgpt.programs.simulate import main as simulate

MB = 10**6


def machine(message_us: float = 0.0, copy_mib_us: float = 0.0, add_mib_us: float = 0.0) -> Machine:
    """Return a machine on which messages cost so much of a core."""
    settings = f"message_us={message_us},copy_mib_us={copy_mib_us},add_mib_us={add_mib_us}"
    return Machine.load(f"2x56:{settings}")


def timeline(*buckets: Bucket, backward_s: float = 1.0, update_s: float = 0.25, cores: int = 2) -> Timeline:
    return Timeline(buckets, backward_s, update_s, backward_s + 0.125, cores, 1000)


def test_two_ranks_by_hand():
    """At 1 Gb/s two messages of 50 MB take 0.8 s: of the first bucket from 0.5 on, so that the second, ready at 1, begins at 1.3.

    compute  |-------------- 1.0|
    link           0.5|---- 1.3|-------- 2.1 + 2 messages' latency|
    """
    found = step(timeline(Bucket(100 * MB, 0.5), Bucket(100 * MB, 1.0)), Network(1, 1000), machine(), ranks=2)
    assert found.seconds == pytest.approx(2.1 + 0.002 + 0.25)
    assert found.exposed_s == pytest.approx(1.1 + 0.002)
    assert found.exchange_s == pytest.approx(1.6 + 0.002)
    assert found.hidden == pytest.approx(1 - 1.102 / 1.602)


def test_what_is_exchanged_takes_from_the_tasks():
    """A core adds for 0.5 s of a bucket's exchange, of two that compute: backward goes on at half the speed of one, and is over later."""
    adding = machine(add_mib_us=1e6)  # 0.5 MiB are added
    found = step(timeline(Bucket(2**20, 0.5)), Network(1e9, 0), adding, ranks=2)
    assert found.seconds == pytest.approx(0.5 + 0.5 + 0.25 + 0.25)  # of the 0.5 s that are left, 0.25 s are done meanwhile
    assert found.exposed_s == 0
    alone = step(timeline(Bucket(2**20, 0.5), cores=1), Network(1e9, 0), adding, ranks=2)
    assert alone.seconds == pytest.approx(0.5 + 0.5 + 0.5 + 0.25)  # nothing is


@pytest.mark.parametrize("ranks", [2, 3, 64, 1024])
def test_without_a_network_in_the_way_a_step_takes_its_own_time(ranks):
    """Messages that cost nothing on links of no end."""
    found = step(timeline(Bucket(100 * MB, 0.5), Bucket(MB, 1.0, is_gathered=True)), Network(1e12, 0), machine(), ranks)
    assert found.seconds == pytest.approx(1.25, rel=1e-6)
    assert step(timeline(Bucket(100 * MB, 0.5)), Network(1, 1e6), machine(1e6, 1e6, 1e6), 1).seconds == 1.25  # nor one rank, by any


@pytest.mark.parametrize("ranks", [2, 3, 64, 1024])
def test_without_backward_a_step_is_the_rings_alpha_beta_gamma(ranks):
    """2 (N - 1) (latency + message) + 2 (N - 1) / N n beta + (N - 1) / N n gamma; beta is the link's, or a core's where that is slower."""
    n, network = 96 << 20, Network(10, 50)
    around, share = 2 * (ranks - 1), n * (ranks - 1) / ranks
    for copy_mib_us, a_byte in ((100, 0.8e-9), (5000, 5e-3 / 2**20)):
        found = step(timeline(Bucket(n, 0.0), backward_s=0.0), network, machine(300, copy_mib_us, 250), ranks)
        wanted = around * 350e-6 + 2 * share * a_byte + share * 250e-6 / 2**20
        assert found.seconds == pytest.approx(wanted + 0.25)
        assert found.hidden == pytest.approx(0)


def test_rows_that_are_gathered_grow_with_the_ranks():
    """N - 1 messages of what each has."""
    found = [step(timeline(Bucket(MB, 1.0, is_gathered=True)), Network(1, 0), machine(), ranks).exchange_s for ranks in (2, 11, 101)]
    assert found == pytest.approx([0.008, 0.08, 0.8])


def test_weak_and_strong_scaling_by_hand():
    """Of 4 micro-batches: two ranks have two each, and exchange behind the second. One machine needs not store gradients."""
    one, two, four = rows(timeline(Bucket(100 * MB, 1.0)), [Network(1, 0)], machine(), [1, 2, 4])
    assert one["step_ms"] == 1125 and one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(1.125 / 2.05)
    assert two["step_ms"] == pytest.approx(2050) and two["tokens_per_s"] == pytest.approx(2000 / 2.05)
    assert [row["strong_ms"] for row in (one, two, four)] == pytest.approx([4250, 1000 + 2050, 1000 + 1200 + 250])
    assert four["strong_speedup"] == pytest.approx(4.25 / 2.45) and four["strong_efficiency"] == pytest.approx(4.25 / 2.45 / 4)


def test_buckets_of_a_graph():
    """All parameters in buckets, and the embedding's rows and ids and the loss; none is ready before the forward pass or after backward."""
    found = timeline_of(
        "tiny", Times("rates"), load_scheduler("native", {"workers": 2, "record": RECORD}), Machine.load("2x56"), bucket_bytes=1 << 16
    )
    m = make("tiny")
    gathered = sorted(bucket.nbytes for bucket in found.buckets if bucket.is_gathered)
    assert gathered == [32, m.batch.rows * (m.model.channels + 1) * 4]
    assert sum(bucket.nbytes for bucket in found.buckets if not bucket.is_gathered) == m.p.nbytes
    ready = [bucket.ready_s for bucket in found.buckets]
    assert 0 < min(ready) < found.backward_s == max(ready)
    assert found.update_s > 0


def test_the_program(tmp_path, capsys):
    """A table, JSON and a picture; mistakes in a line."""
    argv = ["--graph", "tiny", "--machine", "2x56", "--times", "rates", "--schedulers", "native", "--workers", "2", "--t1", "100"]
    files = ["--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "s.svg")]
    assert simulate([*argv, "--ranks", "4,2", "1024", "--gbits", "1,10", *files]) == 0
    found = json.loads((tmp_path / "s.json").read_text())["ranks"]
    assert [(row["gbits"], row["ranks"]) for row in found] == [(gbits, ranks) for gbits in (1, 10) for ranks in (2, 4, 1024)]
    assert found[0]["efficiency"] * found[0]["step_ms"] == pytest.approx(50, rel=0.2)  # 100 ms of tasks on two workers
    assert all(slow["step_ms"] > fast["step_ms"] for slow, fast in zip(found[:3], found[3:], strict=True))
    assert (tmp_path / "s.svg").read_text().startswith("<svg")
    capsys.readouterr()
    for wrong, message in {
        ("--ranks", "0"): "--ranks: wanted an integer of 1 or more, got 0",
        ("--ranks", "2", "--workers", "1,2"): "wanted one graph, scheduler and number of workers, got 2 combinations",
        ("--ranks", "2", "--gbits", "0"): "--gbits: wanted at least 0.001",
        ("--ranks", "2", "--gbits", "fast"): "--gbits: wanted a number of 0 or more, got fast",
        ("--ranks", "2", "--latency-us", "-1"): "--latency-us: wanted at least 0",
        ("--ranks", "2", "--bucket-mib", "nan"): "--bucket-mib: wanted at least 0.001",
        ("--ranks", "2", "--measure"): "--measure: is about one machine",
        ("--picture", str(tmp_path / "p.svg")): "--picture: draws how ranks scale; give --ranks",
    }.items():
        assert simulate([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err
