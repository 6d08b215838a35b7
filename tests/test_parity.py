"""The numbers are llm.c's: logits, gradients, losses over 41 steps, sampled ids, under every scheduler."""

import json
import re

import numpy as np
import pytest

from taskgpt.gpt2.program import loss_graph, training_graph, training_step
from taskgpt.gpt2.sampling import Random
from taskgpt.tasks import run_now
from taskgpt.train import main

SCHEDULERS = {
    "sequential": [],
    "loops": [],
    "loops-dynamic": [],
    "loops-llmc": [],
    "threads": [],
    "local-cluster": ["--set", "coarsen=10"],  # few tasks: each costs it a millisecond, and sampling runs 126 graphs
    "local-cluster-processes": ["--set", "coarsen=10", "--workers", "1"],
}
WAYS = {  # the graph file's fused kernels; llm.c's own; logits in blocks of rows
    "": [],
    "separate": ["--set", "options.kernels=separate", "--set", "options.update=separate"],
    "logits in blocks": ["--set", "tiles.logits_rows=96"],
    "blas": ["--set", "options.products=blas"],
    "bf16": ["--set", "options.precision=bf16"],
}
RUNS = [
    *[(scheduler, "") for scheduler in SCHEDULERS],
    ("sequential", "separate"),
    ("loops-llmc", "separate"),
    ("loops", "logits in blocks"),
    ("threads", "blas"),
    ("sequential", "bf16"),
    ("loops-llmc", "bf16"),
]
ROWS = 4 * 64
OPTIONS = {"fused": {}, "separate": {"kernels": "separate"}, "blas": {"products": "blas"}, "bf16": {"precision": "bf16"}}
every_way = pytest.mark.parametrize("parity_model", OPTIONS.values(), ids=OPTIONS, indirect=True)


def norm_relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.fixture
def debug_state(parity_folder, parity_model):
    """x, y, logits, loss and gradients, written by PyTorch in llm.c's debug-state format."""
    words = np.fromfile(parity_folder / "debug_state.bin", "<i4")
    assert list(words[:4]) == [20240327, 2, 4, 64]
    x, y = words[256 : 256 + ROWS], words[256 + ROWS : 256 + 2 * ROWS]
    floats = words[256 + 2 * ROWS :].view("<f4")
    V = parity_model.model.vocabulary
    parity_model.s.tokens.array[:], parity_model.s.targets.array[:] = x, y
    parity_model.set_hyper(0, lr=0.0, weight_decay=0.0)
    return floats[: ROWS * V].reshape(ROWS, V), float(floats[ROWS * V]), floats[ROWS * V + 1 :]


@every_way
def test_logits_and_loss_agree_with_the_debug_state(parity_model, debug_state):
    """The forward-only graph gives PyTorch's logits to 1e-5 (norm-relative), and its loss; with products in bfloat16 to 1e-2."""
    logits, wanted_loss, _ = debug_state
    for task in loss_graph(parity_model).tasks:
        task.run()
    is_bf16 = parity_model.options.precision == "bf16"
    assert norm_relative(parity_model.a.logits.array[0, :, : logits.shape[1]], logits) < (1e-2 if is_bf16 else 1e-5)
    assert parity_model.s.loss.array[0] == pytest.approx(wanted_loss, abs=1e-2 if is_bf16 else 1e-6)


@every_way
def test_all_gradients_agree_with_the_debug_state(parity_model, debug_state):
    """Each of the 16 tensors to 1e-5 (norm-relative), with products in bfloat16 to 2e-2; the padding rows of dwte are exactly zero."""
    for task in training_graph(parity_model).tasks:
        task.run()
    gradients, at = debug_state[2], 0
    for name, tensor in parity_model.g.tensors.items():
        want = gradients[at : at + tensor.array.size].reshape(tensor.array.shape)
        at += tensor.array.size
        assert norm_relative(tensor.array, want) < (2e-2 if parity_model.options.precision == "bf16" else 1e-5), name
    assert at == len(gradients)
    assert not parity_model.g.dwte.array[parity_model.model.vocabulary :].any()


@every_way
def test_without_a_graph_the_program_gives_the_same_bits(parity_model, debug_state):
    """Serial elision: given run_now as its spawn, the program simply runs."""
    for task in training_graph(parity_model).tasks:
        task.run()
    recorded = {name: tensor.array.copy() for name, tensor in parity_model.g.tensors.items()}
    for tensor in parity_model.g.tensors.values():
        tensor.array[:] = 0
    training_step(run_now, parity_model)
    for name, tensor in parity_model.g.tensors.items():
        np.testing.assert_array_equal(tensor.array, recorded[name], err_msg=name)


@pytest.mark.parametrize(("scheduler", "way"), RUNS)
def test_training_prints_what_llmc_printed(scheduler, way, parity_folder, expected, tmp_path, capsys):
    """41 train losses and 5 validation losses within 5e-5, both sampled sequences id for id; then one more of each, after the last step.

    With products in bfloat16, losses are within 2e-2, and what is sampled is nobody's.
    """
    log = tmp_path / "log.jsonl"
    flags = ["--graph", "tiny", "--init", str(parity_folder / "model.bin"), "--data", str(parity_folder), "--lr", "3e-3", "--steps", "41"]
    assert main([*flags, *WAYS[way], "--scheduler", scheduler, *SCHEDULERS[scheduler], "--log", str(log)]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    train = [r["train_loss"] for r in records if "train_loss" in r]
    val = [r["val_loss"] for r in records if "val_loss" in r]
    close = 2e-2 if way == "bf16" else 5e-5
    assert train == pytest.approx(expected["train"], abs=close)
    assert val[:-1] == pytest.approx(expected["val"], abs=close)
    if way == "bf16":
        return
    sampled = [[int(i) for i in re.findall(r"\d+", text)] for text in expected["generated"]]
    assert [r["ids"] for r in records if "ids" in r][:-1] == sampled
    printed = capsys.readouterr().out
    assert f"val loss {expected['val'][0]:.4f}" in printed
    assert re.search(
        r"^step 41/41: train loss 5\.29\d{4}, norm \d+\.\d{4}, lr 0\.\d+ \(took \d+\.\d ms, \d+ tok/s\)$", printed, re.MULTILINE
    )


def test_random_numbers_are_llmcs():
    """xorshift* from state 1337: the first coins that llm.c tosses."""
    random = Random()
    assert [float(random.uniform()) for _ in range(5)] == pytest.approx([0.230317, 0.190518, 0.310865, 0.902659, 0.684918], abs=1e-6)
