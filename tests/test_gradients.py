"""The gradient as a whole: its norm, clipping, micro-batches, and the guard against outliers and what is no number."""

import dataclasses
import math

import numpy as np
import pytest

from taskgpt.gpt2.gradients import WINDOW, gradient_guard
from taskgpt.gpt2.learning_rate import LearningRate
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import Batch, MicroBatch, Model, Options, Tiles
from taskgpt.tasks import check, one_blas_thread

MODEL, BATCH, TILES = Model(2, 3, 15, 130, 20), Batch(4, 17), Tiles(7, 11, 5, 2, 50)
IN_BLOCKS = dataclasses.replace(TILES, logits_rows=9)


class Run:
    """A model in training on random tokens; `found` has the loss, the norm and why nothing was updated, of every step."""

    def __init__(self, batch: Batch = BATCH, tiles: Tiles = TILES, guarded: bool = False, seed: int = 3, **options):
        self.m = GPT2(MODEL, batch, tiles, Options(**{"weight_decay_on": "matrices", **options}))
        self.m.initialize(seed)
        n = batch.accumulate
        prepare = check if guarded else lambda graph: graph
        self.graphs = {
            (slot, at): prepare(training_graph(self.m, slot, MicroBatch(at == 0, at == n - 1))) for slot in range(2) for at in range(n)
        }
        self.rng, self.step, self.runs = np.random.default_rng(5), 0, 0
        self.found: list[tuple[float, float, str]] = []

    def steps(self, count: int, lr: float = 1e-3, weight_decay: float = 0.1, eps: float = 1e-8) -> "Run":
        m, n = self.m, self.m.batch.accumulate
        for _ in range(count):
            tokens, targets = self.rng.integers(0, MODEL.vocabulary, (2, m.batch.tokens))
            for at in range(n):
                slot, rows = self.runs % 2, slice(at * m.batch.rows, (at + 1) * m.batch.rows)
                m.slots[slot].tokens.array[:], m.slots[slot].targets.array[:] = tokens[rows], targets[rows]
                m.set_hyper(self.step, lr, weight_decay, eps=eps, slot=slot)
                with one_blas_thread:
                    for task in self.graphs[slot, at].tasks:
                        task.run()
                self.runs += 1
            self.found.append((m.loss_of(slot), m.norm_of(slot), m.skipped_of(slot)))
            self.step += 1
        return self


def norm_of(m: GPT2) -> float:
    """Return the norm of the stored gradient, in float64."""
    return math.sqrt(sum(np.square(g.array, dtype=np.float64).sum() for name, g in m.g.tensors.items() if not name.startswith("part_")))


@pytest.mark.parametrize("tiles", [TILES, IN_BLOCKS], ids=["whole", "logits in blocks"])
def test_the_norm_is_that_of_the_gradient_of_all_parameters(tiles):
    """Of each tensor once, wte too, which is used twice; the same bits whether gradients are stored or not, clipped or not."""
    ways = [{"update": "separate"}, {"update": "fused"}, {"clip_norm": 1e9}, {"skip_norm_z": 5.0, "kernels": "separate"}]
    runs = [Run(tiles=tiles, **way).steps(3) for way in ways]
    assert runs[0].found[-1][1] == pytest.approx(norm_of(runs[0].m), rel=1e-6)
    assert {tuple(run.found) for run in runs} == {tuple(runs[0].found)}
    assert {run.m.parameters_sha256() for run in runs} == {runs[0].m.parameters_sha256()}


def test_clipping_scales_the_gradient_to_the_norm():
    """The first step's first moment is (1 - beta1) * gradient * clip_norm / (norm + 1e-6); a norm below the limit changes no bit."""
    free = Run(update="separate").steps(1)
    norm = free.found[0][1]
    clipped = Run(clip_norm=norm / 4).steps(1)
    assert clipped.found == free.found
    scale = np.float32(norm / 4) / (np.float32(norm) + np.float32(1e-6))
    for name, m in clipped.m.m.tensors.items():
        np.testing.assert_allclose(m.array, np.float32(0.1) * scale * free.m.g.tensors["d" + name[2:]].array, rtol=1e-5)
    assert Run(clip_norm=2 * norm).steps(1).m.parameters_sha256() == free.m.parameters_sha256()


@pytest.mark.parametrize("tiles", [TILES, IN_BLOCKS], ids=["whole", "logits in blocks"])
@pytest.mark.parametrize("kernels", ["fused", "separate"])
def test_four_batches_of_one_are_one_of_four(kernels, tiles):
    """Loss, norm and gradients of 4 x B = 1 equal those of B = 4 to 1e-6; so do parameters after three steps of AdamW, to the step."""
    whole = Run(tiles=tiles, kernels=kernels, update="separate").steps(1)
    parts = Run(Batch(1, 17, accumulate=4), tiles, kernels=kernels).steps(1)
    assert parts.found[0][:2] == pytest.approx(whole.found[0][:2], rel=1e-6)
    scale = whole.found[0][1]
    for name, g in whole.m.g.tensors.items():
        assert np.abs(parts.m.g.tensors[name].array - g.array).max() <= 1e-6 * scale, name
    whole.steps(2)
    parts.steps(2)
    assert parts.found[-1][:2] == pytest.approx(whole.found[-1][:2], rel=1e-4)


def test_declarations_hold_with_everything_on():
    """Guarded runs of micro-batches, clipping and guard find no undeclared access and change no bit."""
    options = {"clip_norm": 0.5, "skip_loss_z": 3.0, "skip_norm_z": 3.0, "on_nan": "skip"}
    plain, guarded = (Run(Batch(2, 17, accumulate=3), IN_BLOCKS, guarded, **options).steps(2) for guarded in (False, True))
    assert guarded.found == plain.found
    assert guarded.m.parameters_sha256() == plain.m.parameters_sha256()


def test_state_has_what_the_guard_has_seen():
    """Put into another model, the state of a guarded run leads to the steps, and the verdicts, that would have followed."""
    options = {"skip_loss_z": 2.0, "clip_norm": 1.0}
    one, other = Run(**options).steps(WINDOW + 2), Run(seed=9, **options)
    for name, array in other.m.state.items():
        array[...] = one.m.state[name]
    other.rng, other.step = np.random.default_rng(8), one.step
    one.rng = np.random.default_rng(8)
    one.found.clear()
    assert other.steps(6).found == one.steps(6).found
    assert all(np.array_equal(array, one.m.state[name]) for name, array in other.m.state.items())


class Detector:
    """llm.c's OutlierDetector, with running sums as there."""

    def __init__(self):
        self.window: list[float] = []
        self.sum = self.squares = 0.0

    def z(self, value: float) -> float:
        if len(self.window) < WINDOW:
            self.window.append(value)
            self.sum, self.squares = self.sum + value, self.squares + value * value
            return 0.0  # there, NaN
        old = self.window.pop(0)
        self.window.append(value)
        self.sum, self.squares = self.sum + value - old, self.squares + value * value - old * old
        mean = self.sum / WINDOW
        deviation = math.sqrt(self.squares / WINDOW - mean * mean)
        return (value - mean) / deviation if deviation else 0.0


@pytest.mark.parametrize("guard", [gradient_guard, gradient_guard.body], ids=["twin", "body"])
def test_outliers_are_those_of_llmc(guard):
    """Twin and body find the z-scores of llm.c's detector, and none before the window is full; skipped values are in the window too."""
    rng = np.random.default_rng(1)
    windows, seen, detectors = np.zeros((2, WINDOW)), np.zeros(2, np.int64), (Detector(), Detector())
    scale, verdict, z, verdicts = np.zeros(1, np.float32), np.zeros(1, np.int32), np.zeros(2), []
    for n in range(3 * WINDOW):
        loss, norm = (np.array([rng.normal(5, 1) + 40 * (rng.random() < 0.02)], np.float32) for _ in range(2))
        guard(scale, verdict, z, *windows, seen, loss, norm, 1.0, 4.0, 5.0)
        wanted = [detector.z(float(value[0])) for detector, value in zip(detectors, (loss, norm), strict=True)]
        np.testing.assert_allclose(z, wanted, rtol=1e-6)
        assert z.any() == (n >= WINDOW)
        assert verdict[0] == (1 if wanted[0] > 4 else 2 if wanted[1] > 5 else 0)
        assert (scale[0] == 0) == (verdict[0] != 0)
        verdicts.append(int(verdict[0]))
    assert {0, 1, 2} == set(verdicts)


def test_what_is_no_number_updates_nothing_and_is_forgotten():
    """A loss of NaN or inf enters no window: z-scores after it are those of the values that were finite."""
    windows, seen = np.zeros((2, WINDOW)), np.zeros(2, np.int64)
    scale, verdict, z = np.zeros(1, np.float32), np.zeros(1, np.int32), np.zeros(2)
    for n in range(WINDOW + 2):
        for loss, norm in ((np.nan, 1.0), (np.inf, np.nan), (n, n)):
            gradient_guard(scale, verdict, z, *windows, seen, np.float32([loss]), np.float32([norm]), 0.0, 3.0, 0.0)
            assert (verdict[0], scale[0]) == ((0, 1) if loss == n else (3, 0))
    last = np.arange(2, WINDOW + 2)
    assert z[0] == pytest.approx((last[-1] - last.mean()) / last.std())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_spike_is_skipped(accumulate):
    """A step whose loss leaps updates neither parameters nor moments; the next one does, with the count of steps that it would have had."""
    run = Run(Batch(2, 17, accumulate), skip_loss_z=6.0).steps(WINDOW + 1, lr=1e-4)
    assert not any(why for _, _, why in run.found)
    before = {name: array.copy() for name, array in run.m.state.items()}
    weight = run.m.p.lnfw.array
    kept = weight.copy()
    weight *= 100  # a spike in the parameters is one in the loss
    run.steps(1)
    assert run.found[-1][2].startswith("loss z 11.") and run.found[-1][2].endswith(" > 6")
    weight[...] = kept
    assert [name for name, array in run.m.state.items() if not np.array_equal(array, before[name])] == [
        "loss_window",
        "norm_window",
        "seen",
    ]
    run.steps(1)
    assert not run.found[-1][2]
    assert not np.array_equal(run.m.p.lnfw.array, kept)


@pytest.mark.parametrize("way", [{"on_nan": "skip"}, {"clip_norm": 1.0}, {"skip_norm_z": 6.0}])
def test_a_loss_that_is_no_number_leaves_the_parameters(way):
    """Wherever updates wait for the norm, a NaN reaches neither parameters nor moments."""
    run = Run(**way).steps(1)
    before = {name: run.m.state[name].copy() for name in run.m.state if name not in run.m.w.tensors}
    kept = run.m.p.wpe.array[0, 0]
    run.m.p.wpe.array[0, 0] = np.nan
    run.steps(1)
    run.m.p.wpe.array[0, 0] = kept
    assert math.isnan(run.found[-1][0]) and run.found[-1][2] == "loss or norm is not finite"
    assert all(np.array_equal(run.m.state[name], array) for name, array in before.items())
    run.steps(1)
    assert math.isfinite(run.found[-1][0]) and not run.found[-1][2]


@pytest.mark.parametrize(
    ("batch", "options", "why"),
    [
        (BATCH, {}, ""),
        (BATCH, {"clip_norm": 1.0}, "clipping needs the norm of the whole gradient before any update"),
        (BATCH, {"on_nan": "skip"}, "skipping a step needs the norm of the whole gradient before any update"),
        (Batch(1, 17, 4), {}, "the gradients of 4 micro-batches are added up before it"),
    ],
)
def test_updates_are_separate_only_where_they_must(batch, options, why):
    """Then all gradients are stored; otherwise none is."""
    m = GPT2(MODEL, batch, TILES, Options("matrices", **options))
    assert m.options.separate_because(batch) == why
    assert bool(m.g.tensors) == bool(why)


# PyTorch's own --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed; the extra `peers` has it")


def torch_model(m: GPT2):
    """Return PyTorch's GPT-2 with the same parameters."""
    from taskgpt.lab.benchmarks.peer_process import Start
    from taskgpt.lab.benchmarks.peer_torch import TorchGPT2

    parameters = {name: array[: MODEL.vocabulary] if name == "wte" else array for name, array in m.parameters.items()}
    empty = np.empty((0, 0), np.int32)
    net = TorchGPT2(Start(MODEL.heads, [], empty, empty, parameters))
    net.load(parameters)
    return net


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("cosine", {"clip_norm": 0.5}),
        ("linear", {"weight_decay_on": "all", "update": "separate"}),
        ("constant", {"clip_norm": 0.7, "accumulate": 2}),
        ("cosine", {}),
    ],
)
def test_twenty_steps_are_those_of_pytorch(torch, schedule, options):
    """Loss, norm, rate and parameters, with PyTorch's clip_grad_norm_, AdamW in two groups, and its schedules, to 1e-5."""
    accumulate, steps, warmup, peak, decay, eps = options.pop("accumulate", 1), 20, 4, 1e-3, 0.3, 1e-6
    run = Run(Batch(4 // accumulate, 17, accumulate), **options)
    run.m.p.wte.array[:] *= 5  # logits that differ
    net = torch_model(run.m)
    names = dict(net.named_parameters())
    are_decayed = [p for p in names.values() if p.ndim == 2 or run.m.options.weight_decay_on == "all"]
    others = [p for p in names.values() if not any(p is other for other in are_decayed)]
    groups = [{"params": are_decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.999), eps=eps)
    lrs = torch.optim.lr_scheduler
    fall = {
        "constant": lambda: lrs.ConstantLR(optimizer, 1.0),
        "linear": lambda: lrs.LinearLR(optimizer, 1.0, 0.1, steps - warmup),
        "cosine": lambda: lrs.CosineAnnealingLR(optimizer, steps - warmup, 0.1 * peak),
    }[schedule]
    rise = lrs.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    rates = lrs.SequentialLR(optimizer, [rise, fall()], [warmup])
    learning_rate = LearningRate(peak, steps, schedule, warmup, 0.1)
    clip = run.m.options.clip_norm or math.inf
    for step in range(steps):
        state = run.rng.bit_generator.state
        tokens, targets = run.rng.integers(0, MODEL.vocabulary, (2, run.m.batch.tokens)).reshape(2, accumulate, -1, 17)
        run.rng.bit_generator.state = state
        losses = []
        for at in range(accumulate):
            loss = net(torch.from_numpy(tokens[at]), torch.from_numpy(targets[at])) / accumulate
            loss.backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip).item()
        assert learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        run.steps(1, learning_rate(step), decay, eps)
        assert run.found[-1][:2] == pytest.approx((sum(losses), norm), rel=1e-5), step
    for name, array in run.m.parameters.items():
        wanted = torch_parameter(net, name)
        assert np.linalg.norm(array[: len(wanted)] - wanted) <= 1e-5 * np.linalg.norm(wanted), name


def torch_parameter(net, name: str) -> np.ndarray:
    """Return PyTorch's parameter under our name, stacked by layers."""
    owners = [net] if name in ("wte", "wpe") or name.startswith("lnf") else net.blocks
    module, part = (name, "weight") if name in ("wte", "wpe") else (name[:-1], "weight" if name.endswith("w") else "bias")
    arrays = [getattr(getattr(owner, module), part).detach().numpy() for owner in owners]
    return arrays[0] if name in ("wte", "wpe") else np.stack(arrays)
