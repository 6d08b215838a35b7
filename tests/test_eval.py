"""`taskgpt eval` says what a model's loss is on a text, the same as validation in a training does."""

import json
import math

import numpy as np
import pytest

from taskgpt import train
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.shape import Model
from taskgpt.gpt2.text.tokenizer import byte_tokenizer
from taskgpt.programs import eval as program

TEXT = "to be or not to be, that is the question. " * 300


@pytest.fixture
def case(tmp_path):
    """A text, and a model of tiny's shape that was trained on it for three steps, whose last validation has all batches."""
    text, log = tmp_path / "text.txt", tmp_path / "log.jsonl"
    text.write_text(TEXT)
    flags = ["--graph", "tiny", "--data", str(text), "--scheduler", "sequential", "--sample-every", "0"]
    assert train.main([*flags, "--steps", "3", "--val-batches", "4", "--save", str(tmp_path / "model.bin"), "--log", str(log)]) == 0
    losses = [record["val_loss"] for line in log.read_text().splitlines() if "val_loss" in (record := json.loads(line))]
    return text, tmp_path / "model.bin", losses[-1]


def run(tmp_path, *words: str) -> dict:
    assert program.main(["--graph", "tiny", "--json", str(tmp_path / "e.json"), *words]) == 0
    return json.loads((tmp_path / "e.json").read_text())


@pytest.mark.parametrize("scheduler", ["native", "loops", "threads"])
def test_the_loss_is_that_of_validation(case, tmp_path, scheduler):
    """The same float under every scheduler; perplexity and bits per byte follow: in bytes, each token is one, but the end of text."""
    text, model, loss = case
    found = run(tmp_path, "--init", str(model), "--data", str(text), "--batches", "4", "--scheduler", scheduler, "--workers", "2")
    assert found["loss"] == loss
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert found["tokens"] == 4 * 4 * 64
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) * found["tokens"] / found["bytes"])
    assert found["tokens"] - 2 <= found["bytes"] <= found["tokens"]


def test_a_part_whole(case, tmp_path, capsys):
    """Every batch once: of a model that knows nothing, all ids are as likely, and the loss is the vocabulary's logarithm."""
    text = case[0]
    model = Model(1, 1, 16, 257, 64)
    parameters = {name: np.zeros(shape, np.float32) for name, shape in model.parameter_shapes().items()}
    checkpoints.save(tmp_path / "zero", model, parameters)
    found = run(tmp_path, "--init", str(tmp_path / "zero"), "--data", str(text), "--part", "train")
    assert found["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert found["perplexity"] == pytest.approx(257, rel=1e-5)
    assert found["tokens"] == (found["tokens_of_part"] - 1) // 256 * 256
    ids = byte_tokenizer().encode(TEXT)
    assert found["bytes"] <= len(ids)
    assert "the train part" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "none.bin"], "none.bin: cannot read the checkpoint"),
        (["--init", "MODEL", "--data", "none.txt"], "no such file or folder"),
        (["--init", "MODEL", "--set", "batch.seq_len=128"], "the model has 64 positions"),
        (["--init", "MODEL", "--set", "model.layers=1"], "the checkpoint gives the model's shape"),
        (["--init", "MODEL", "--json", "none/e.json"], "cannot write"),
    ],
)
def test_a_mistake_is_answered_in_one_line(case, words, message, capsys):
    """And exit code 2."""
    text, model, _ = case
    words = [str(model) if word == "MODEL" else word for word in words]
    assert program.main(["--graph", "tiny", "--data", str(text), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_model_is_named(case, tmp_path, capsys):
    """Not a number in, not a number out: one line, no result."""
    text, model, _ = case
    shape = checkpoints.read_shape(model)
    parameters = {name: np.full(size, np.nan, np.float32) for name, size in shape.parameter_shapes().items()}
    checkpoints.save(tmp_path / "nan.bin", shape, parameters)
    assert program.main(["--graph", "tiny", "--init", str(tmp_path / "nan.bin"), "--data", str(text)]) == 2
    assert "the loss of batch 1 is nan" in capsys.readouterr().err
