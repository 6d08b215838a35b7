"""The limits that speeds are stated against: measured in a moment, on no more threads than can run."""

import numpy as np
import pytest

from taskgpt.lab import machine


def test_sgemm_is_measured():
    """One thread, a small product: some positive number."""
    assert 0 < machine.sgemm_gflops(1, 16, 16, 16, seconds=0.01) < float("inf")


def test_more_threads_than_cores_are_not_started(monkeypatch):
    """Ten thousand workers would each have 13 MB of operands, and together the speed of the cores."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    started = []
    monkeypatch.setattr(machine, "_timed_together", lambda calls, seconds: started.append(len(calls)) or [1e-3])
    speeds = [machine.sgemm_gflops(threads, 100, 100, 100) for threads in (1, 2, 10_000)]
    assert started == [1, 2, 2]
    assert speeds == pytest.approx([2, 4, 4])


def test_what_is_measured_is_a_product():
    """The twin computes what its body says."""
    inp, weight = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32).reshape(4, 3)
    out, wanted = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    machine.product(out, inp, weight)
    machine.product.body(wanted, inp, weight)
    assert out.tolist() == wanted.tolist()


def test_describe_says_what_a_measurement_needs():
    """Text under every heading."""
    described = machine.describe()
    assert {"processor", "cores", "memory", "blas"} <= described.keys()
    assert described["cores"] == str(machine.usable_cores())
    assert all(described.values())


def test_a_containers_limit_counts_as_free_memory(tmp_path):
    """The smaller of the machine's free memory and what the container may still take; no limit, no difference."""
    machine_free = machine.free_memory_bytes(tmp_path / "none")
    assert machine_free > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory_bytes(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.free_memory_bytes(tmp_path) == 4000
