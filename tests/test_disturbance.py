"""What disturbs a measurement is told: other processes, a throttled container, an environment that holds back."""

import pytest

from taskgpt import train
from taskgpt.lab import machine
from taskgpt.lab.disturbance import Clocks, Disturbance, read_clocks


def after(seconds: float, all_work: float, own_work: float, throttled: float = 0.0, **environment: str) -> list[str]:
    """Return the notes on so many seconds, in which the 4 cores, this process, and the quota did that."""
    looks = iter([Clocks(10.0, 5.0, 1.0, 0.5), Clocks(10.0 + seconds, 5.0 + all_work, 1.0 + own_work, 0.5 + throttled)])
    return Disturbance(lambda: next(looks), environment).found(4).notes()


def test_a_quiet_machine_needs_no_words():
    """Its cores work for this process, and a little for the system; variables that hold nothing back are no matter."""
    assert after(2.0, 8.0, 7.5, PATH="/bin", OPENBLAS_CORETYPE="", OMP_NUM_THREADS="1") == []
    assert after(0.1, 0.4, 0.0) == []  # too short to tell
    assert after(2.0, 0.0, 8.0) == []  # where the system says nothing of its cores


def test_each_disturbance_is_a_line():
    assert after(2.0, 8.0, 5.0) == ["other processes use 1.5 of the 4 cores; alone, it would be faster"]
    (line,) = after(2.0, 4.0, 4.0, throttled=0.5)
    assert line.startswith("the container's CPU quota stopped its processes for 25% of the time")
    (line,) = after(2.0, 4.0, 4.0, OPENBLAS_CORETYPE="Haswell", NUMBA_OPT="0")
    assert line == "the environment holds back: OPENBLAS_CORETYPE=Haswell, NUMBA_OPT=0; unset it"


def test_the_clocks_of_this_machine(tmp_path):
    """Own work is part of all; a container without cpu.stat, or with one of a version before quotas, was not throttled."""
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nnr_throttled 3\nthrottled_usec 1500000\n")
    assert read_clocks(tmp_path).throttled == 1.5
    (tmp_path / "cpu.stat").write_text("usage_usec 5\n")
    first = read_clocks(tmp_path)
    assert first.throttled == read_clocks(tmp_path / "none").throttled == 0
    sum(range(3_000_000))
    second = read_clocks(tmp_path)
    assert second.now > first.now
    assert second.own_work > first.own_work
    assert second.all_work >= first.all_work


@pytest.mark.parametrize(("rates", "is_over"), [([2.0], False), ([1e-9, 2.0], False), ([1e-9] * 4, True)])
def test_more_than_sgemm_is_measured_again_and_explained(rates, is_over, tmp_path, capsys, monkeypatch):
    """As often as it takes, four times at most; the note on the machine and what a summary keeps come with it."""
    measured = iter(rates)
    monkeypatch.setattr(machine, "sgemm_gflops", lambda _: 1000 * next(measured))
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "1000")
    flags = ["--graph", "tiny", "--scheduler", "sequential", "--val-every", "0", "--sample-every", "0", "--steps", "1"]
    assert train.main([*flags, "--data", __file__, "--set", "options.products=blas"]) == 0
    out = capsys.readouterr().out
    assert next(measured, None) is None
    assert ("faster than sgemm" in out) == is_over
    assert out.count("OPENBLAS_L2_SIZE=1000; unset it") == 1
