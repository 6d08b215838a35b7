"""The learning rate of each step is what llm.c's schedules say."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskgpt import train
from taskgpt.gpt2.learning_rate import FALLS, LearningRate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    {
        "constant": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "linear": [0.5, 1, 1, *(1 - 0.9 * n / 8 for n in range(1, 9))],
        "cosine": [0.5, 1, 1, *(0.1 + 0.45 * (1 + math.cos(math.pi * n / 8)) for n in range(1, 9))],
        "wsd": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1],
    }.items(),
)
def test_ten_steps(schedule, expected):
    """Two up to the peak, then as the schedule goes; what would be step 10 has the last value, a tenth."""
    rate = LearningRate(3.0, 10, schedule, warmup=2, final=0.1)
    assert [rate(step) / 3.0 for step in range(11)] == pytest.approx(expected)


@given(st.sampled_from(sorted(FALLS)), st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.floats(1e-9, 1e3))
def test_up_then_down(schedule, steps, warmup, final, peak):
    """Whatever the numbers: it rises while it warms up, never exceeds the peak, then does not rise again, nor fall below its last value."""
    rate = LearningRate(peak, steps, schedule, warmup, final)
    rates = [rate(step) for step in range(steps)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert all(0 < each <= peak for each in up)
    assert all(peak * final * (1 - 1e-9) - 1e-300 <= each <= peak for each in down)
    assert schedule != "constant" or all(each == peak for each in down)


def test_a_training_learns_with_it(tmp_path, capsys):
    """The log and each line say the rate; a constant one is another training than one that falls."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 300)
    flags = ["--graph", "tiny", "--data", str(text), "--steps", "6", "--val-every", "0", "--sample-every", "0", "--scheduler", "sequential"]
    hashes = []
    for more in ([], ["--lr-schedule", "cosine", "--warmup", "2", "--final-lr", "0.5"]):
        log = tmp_path / f"{len(more)}.jsonl"
        assert train.main([*flags, "--lr", "1e-3", "--log", str(log), *more]) == 0
        *steps, last = [json.loads(line) for line in log.read_text().splitlines()]
        hashes.append(last["summary"]["parameters_sha256"])
    assert [record["lr"] for record in steps if "lr" in record] == [LearningRate(1e-3, 6, "cosine", 2, 0.5)(n) for n in range(6)]
    assert "step 1/6: train loss" in (said := capsys.readouterr().out)
    assert ", lr 0.0005 (took" in said
    assert hashes[0] != hashes[1]
    with pytest.raises(SystemExit, match="2"):
        train.main([*flags, "--final-lr", "2"])
    assert "wanted a number from 0 to 1, got 2" in capsys.readouterr().err
