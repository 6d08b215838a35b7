"""The limits that speeds are stated against: measured in a moment, on no more threads than can run."""

import time
from functools import partial

import numpy as np
import pytest

from taskgpt.lab import machine
from taskgpt.products import BLAS, way_for


def test_sgemm_is_measured():
    """One thread, a small product: some positive number."""
    assert 0 < machine.sgemm_gflops(1, 16, 16, 16, seconds=0.01) < float("inf")


def test_more_threads_than_cores_are_not_started(monkeypatch):
    """Ten thousand workers would each have 13 MB of operands, and together the speed of the cores."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    started = []
    monkeypatch.setattr(machine, "timed_together", lambda calls, seconds: started.append(len(calls)) or [1e-3])
    speeds = [machine.sgemm_gflops(threads, 100, 100, 100) for threads in (1, 2, 10_000)]
    assert started == [1, 2, 2]
    assert speeds == pytest.approx([2, 4, 4])


@pytest.mark.parametrize("transpose_a", (0, 1))
@pytest.mark.parametrize("transpose_b", (0, 1))
@pytest.mark.parametrize("way", (BLAS, way_for("own", "fp32")))
def test_what_is_measured_is_a_product(transpose_a, transpose_b, way):
    """The twin computes what its body says, operands transposed or not, by BLAS or by our own."""
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32).reshape(3, 4)
    out, wanted = np.zeros((2, 4), np.float32), a @ b
    operands = np.ascontiguousarray(a.T) if transpose_a else a, np.ascontiguousarray(b.T) if transpose_b else b
    for product in (machine.product, partial(machine.product.body, work=None)):
        out[:] = 0
        product(out, *operands, transpose_a, transpose_b, way, 2)
        assert out.tolist() == wanted.tolist()


def test_what_is_measured_goes_through_memory():
    """The twins of the streams compute what their bodies say."""
    y, z = np.arange(100, dtype=np.float32), np.ones(100, np.float32)
    for run in (lambda kernel: kernel, lambda kernel: kernel.body):
        total, x = np.zeros(1, np.int64), np.zeros(100, np.float32)
        run(machine.triad)(x, y, z, 1)
        assert x.tolist() == (y + 3).tolist()
        run(machine.update)(x, 4)
        assert x.tolist() == (y + 7).tolist()
        run(machine.read)(total, np.arange(100), 1)
        assert total[0] == 4950


@pytest.mark.parametrize("stream", machine.STREAMS)
def test_bandwidth_is_measured(stream):
    """One thread, little memory: some positive number."""
    assert 0 < machine.bandwidth_gbs(stream, 1, seconds=0.01, total_bytes=1 << 16) < float("inf")


def test_bandwidth_counts_what_the_memory_moves(monkeypatch):
    """Two threads share the bytes; an element of triad moves 16 bytes and takes 12, one of update moves 8 and takes 4."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    lengths = []
    monkeypatch.setattr(machine, "timed_together", lambda calls, seconds: lengths.append(calls[0].args[-1].size) or [1e-3])
    speeds = {stream: machine.bandwidth_gbs(stream, 2, total_bytes=240_000) for stream in ("triad", "update", "read")}
    assert lengths == [10_000, 30_000, 15_000]
    assert speeds == pytest.approx({"triad": 0.32, "update": 0.48, "read": 0.24})


def test_caches_are_counted_once(tmp_path):
    """Two cores share the first cache, the third has another."""
    for cpu, (shared, size) in enumerate((("0-1", "32K"), ("0-1", "32K"), ("2", "16K"))):
        cache = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "shared_cpu_list").write_text(shared + "\n")
        (cache / "size").write_text(size + "\n")
    assert machine.cache_bytes(tmp_path) == 48 << 10
    assert machine.cache_bytes(tmp_path / "none") == machine.cache_bytes(tmp_path, level=2) == 0


def test_calls_run_together_and_repeat_themselves():
    """Rounds are of the same length for all; three at least."""
    asked = []

    def call(times: int) -> None:
        asked.append(times)
        time.sleep(times * 1e-5)

    rounds = machine.timed_together([call, call], seconds=0.01)
    assert len(rounds) >= 3
    assert all(seconds > 0 for seconds in rounds)
    assert asked[:2] == [1, 1]
    assert len(set(asked[-6:])) == 1


def test_describe_says_what_a_measurement_needs():
    """Text under every heading."""
    described = machine.describe()
    assert {"processor", "cores", "memory", "blas"} <= described.keys()
    assert described["cores"] == str(machine.usable_cores())
    assert all(described.values())


def test_a_limit_of_the_address_space_counts_too(tmp_path, monkeypatch):
    """What this process has taken of it is gone."""
    taken = machine.psutil.Process().memory_info().vms
    monkeypatch.setattr(machine, "address_space_bytes", lambda: taken + 100e6)
    assert 0 < machine.free_memory_bytes(tmp_path) <= 100e6
    monkeypatch.setattr(machine, "address_space_bytes", lambda: 1e6)
    assert machine.free_memory_bytes(tmp_path) == 0


def test_a_containers_limit_counts_as_free_memory(tmp_path):
    """The smaller of the machine's free memory and what the container may still take; no limit, no difference."""
    machine_free = machine.free_memory_bytes(tmp_path / "none")
    assert machine_free > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.free_memory_bytes(tmp_path) == 4000
