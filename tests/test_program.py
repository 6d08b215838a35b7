"""The program of tasks: any shape and any tiles give the same numbers, and the graph says truly what it costs."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.config import folder, load_graph
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph, sampling_graph, training_graph
from taskgpt.gpt2.sampling import Random, Sampler, draw
from taskgpt.gpt2.shape import Batch, Model, Options, Tiles
from taskgpt.products.instruction_sets import of_this_machine
from taskgpt.tasks import check

WHOLE = Tiles(rows=10**6, columns=10**6, pointwise_rows=10**6, heads=10**6, vocabulary=10**6)


def trained(model: Model, batch: Batch, tiles: Tiles, steps: int = 2, guarded: bool = False, **options) -> GPT2:
    """Return a model after a few steps on random tokens."""
    m = GPT2(model, batch, tiles, Options(**{"weight_decay_on": "matrices", **options}))
    m.initialize(3)
    graph = training_graph(m)
    graph = check(graph) if guarded else graph
    rng = np.random.default_rng(5)
    for step in range(steps):
        m.s.tokens.array[:], m.s.targets.array[:] = rng.integers(0, model.vocabulary, (2, batch.rows))
        m.set_hyper(step, lr=1e-3, weight_decay=0.1)
        for task in graph.tasks:
            task.run()
    return m


sizes = st.integers(1, 40)


@settings(max_examples=25, deadline=None)
@given(
    model=st.builds(
        lambda layers, heads, head_size, vocabulary: Model(layers, heads, heads * head_size, vocabulary, 24),
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 300),
    ),
    batch=st.builds(Batch, st.integers(1, 3), st.integers(1, 24)),
    tiles=st.builds(Tiles, sizes, sizes, sizes, st.integers(1, 4), st.integers(1, 200), st.integers(0, 40)),
)  # fmt: skip
def test_tiles_change_nothing_but_rounding(model, batch, tiles):
    """Drawn shapes under drawn tiles, ragged or larger than what they cut, give the loss and the gradients of uncut tensors."""
    cut, whole = (trained(model, batch, t, steps=1, update="separate") for t in (tiles, WHOLE))
    assert cut.s.loss.array[0] == pytest.approx(whole.s.loss.array[0], rel=1e-5)
    for name, tensor in whole.g.tensors.items():
        scale = np.linalg.norm(tensor.array) + 1e-6
        assert np.linalg.norm(cut.g.tensors[name].array - tensor.array) <= 2e-5 * scale, name


RAGGED = Model(2, 3, 15, 130, 20), Batch(2, 17), Tiles(7, 11, 5, 2, 50)
WAYS = list(itertools.product(("fused", "separate"), repeat=2))


@pytest.mark.parametrize("logits_rows", [0, 9])
@pytest.mark.parametrize(("kernels", "update"), WAYS)
def test_declarations_hold_for_ragged_tiles(kernels, update, logits_rows):
    """Guarded runs of a ragged model find no undeclared access and change no bit."""
    model, batch, tiles = RAGGED
    shape = model, batch, dataclasses.replace(tiles, logits_rows=logits_rows)
    guarded = trained(*shape, guarded=True, kernels=kernels, update=update)
    assert guarded.parameters_sha256() == trained(*shape, kernels=kernels, update=update).parameters_sha256()


SHAPES = {
    "whole": (Model(2, 2, 16, 90, 32), Batch(2, 32), WHOLE),
    "even": (Model(2, 4, 64, 257, 64), Batch(4, 64), Tiles(128, 64, 64, 2, 128)),
    "ragged": RAGGED,
    "logits in blocks": (Model(1, 3, 48, 300, 24), Batch(3, 20), Tiles(17, 11, 5, 2, 70, logits_rows=23)),
    "one row": (Model(1, 1, 8, 100, 16), Batch(1, 1), Tiles(16, 8, 8, 1, 64)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_and_separate_kernels_give_the_same_bits(shape):
    """Epilogues and updates in one task with what comes before change no bit, over several steps, with decay on all parameters."""
    losses, hashes = set(), set()
    for kernels, update in WAYS:
        m = trained(*shape, steps=4, kernels=kernels, update=update, weight_decay_on="all")
        losses.add(float(m.s.loss.array[0]))
        hashes.add(m.parameters_sha256())
    assert len(losses) == len(hashes) == 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fused_and_separate_kernels_are_used(shape):
    """What is fused is not there a second time; gradients are stored only where a task cannot have the whole of it at once."""
    used = {}
    for kernels, update in WAYS:
        m = GPT2(*shape, Options("matrices", kernels=kernels, update=update))
        used[kernels, update] = {kernel.name for kernel in training_graph(m).kernels}
        in_blocks = m.grid.logits_rows < m.batch.rows
        assert list(m.g.tensors) == (["dwte"] if in_blocks else []) or update == "separate"
        assert m.a.logits.array.shape[0] == (2 if in_blocks else 1)
        assert ("attproj" in m.a.tensors) == (kernels == "separate")
    epilogues = {"gelu_forward", "residual_forward", "softmax_forward", "crossentropy_backward", "gelu_backward"}
    assert epilogues < used["separate", "separate"] and not epilogues & used["fused", "fused"]
    assert ("adamw_update" in used["fused", "fused"]) == in_blocks


def test_logits_in_blocks_change_nothing_but_rounding():
    """Rows of logits that take turns in two slots give the loss of all at once; validation too."""
    shape = Model(1, 3, 48, 300, 24), Batch(3, 20)
    tiles = Tiles(17, 11, 5, 2, 70)
    once, blocks = (trained(*shape, dataclasses.replace(tiles, logits_rows=rows), steps=3) for rows in (0, 23))
    assert blocks.s.loss.array[0] == pytest.approx(once.s.loss.array[0], rel=1e-5)
    for m in (once, blocks):
        for task in loss_graph(m).tasks:
            task.run()
    assert blocks.s.loss.array[0] == pytest.approx(once.s.loss.array[0], rel=1e-5)


def test_padding_rows_stay_zero():
    """Rows of wte beyond the vocabulary never move, with weight decay too."""
    m = trained(Model(1, 1, 8, 100, 16), Batch(2, 16), Tiles(16, 8, 8, 1, 64))
    assert not m.p.wte.array[100:].any()
    assert m.p.wte.array[:100].any()


@pytest.mark.parametrize("update", ["fused", "separate"])
def test_weight_decay_is_on_matrices_unless_on_all(update):
    """The update tasks of weights and embeddings decay them; those of biases and LayerNorm only under weight_decay_on = "all"."""
    shape = Model(1, 1, 8, 64, 16), Batch(1, 16), Tiles(16, 8, 8, 1, 64)
    for on in ("matrices", "all"):
        m, decayed, updated = GPT2(*shape, Options(weight_decay_on=on, update=update)), set(), set()
        for call in (call for task in training_graph(m).tasks for call in task.calls if call.kernel.name.endswith("_update")):
            given = dict(zip(call.kernel.parameters, call.args, strict=True))
            for name, tile in call.tiles():
                if tile.tensor in m.p.tensors.values():
                    updated.add(tile.tensor.name)
                    if given["is_bias_decayed" if name == "bias" and "is_bias_decayed" in given else "is_decayed"]:
                        decayed.add(tile.tensor.name)
        assert updated == set(m.p.tensors)
        assert decayed == (updated if on == "all" else {"wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw"})


def test_commutative_sums_agree_up_to_rounding():
    """options.commutative = true frees the order of sums over vocabulary blocks: locks instead of edges, the same loss."""
    shape = Model(1, 2, 8, 300, 16), Batch(2, 16), Tiles(16, 8, 8, 1, 64)
    free = GPT2(*shape, Options(weight_decay_on="matrices", commutative=True))
    assert training_graph(free).is_commutative
    ordered = trained(*shape)
    assert trained(*shape, commutative=True).s.loss.array[0] == pytest.approx(ordered.s.loss.array[0], rel=1e-6)


@pytest.mark.parametrize("way", ["fused", "separate"])
def test_flops_are_those_of_the_formula(way):
    """The matrix products of a GPT-2 124M step are 6 x tokens x (weights of the linear layers + wte): 189.8 GFLOP."""
    config = load_graph("gpt2-124m")
    m = GPT2(config.model, config.batch, config.tiles, Options("matrices", kernels=way, update=way))
    graph = training_graph(m)
    gemm = sum(task.flops for task in graph.tasks if "gemm" in task.calls[0].kernel.tags)
    L, C, Vp = config.model.layers, config.model.channels, config.model.padded_vocabulary
    assert gemm == 6 * config.batch.rows * (12 * L * C * C + Vp * C)
    assert gemm == pytest.approx(189.8e9, rel=1e-3)
    assert {task.section[0] for task in graph.tasks} == {"forward", "loss", "backward", "update"}


def test_kernels_that_gather_count_the_rows_that_they_touch():
    """Not all of wte, not all logits: what a look-up moves does not grow with the vocabulary."""
    config = load_graph("gpt2-124m")
    m = GPT2(config.model, config.batch, config.tiles, Options("matrices", kernels="separate", update="separate"))
    moved = {}
    for task in training_graph(m).tasks:
        moved.setdefault(task.name, []).append(task.bytes)
    rows, C = config.batch.rows, config.model.channels
    assert sum(moved["encoder_forward"]) == 4 * rows * (3 * C + 1)
    assert sum(moved["crossentropy_forward"]) < 4 * rows * 100
    assert max(moved["encoder_backward_wte"]) <= 4 * rows * (3 * C + 1)


@pytest.mark.skipif(of_this_machine() is None, reason="BLAS multiplies here, and each product says so")
def test_the_golden_graph():
    """graphs/tiny.tasks is the graph of tiny's training step as text: a change of the program shows in the diff.

    To accept a change: python -c "import tests.test_program as t; t.write_golden()"
    """
    assert golden_path().read_text() == tiny_listing(), test_the_golden_graph.__doc__


def golden_path():
    return folder("graphs") / "tiny.tasks"


def tiny_listing() -> str:
    config = load_graph("tiny")
    return training_graph(GPT2(config.model, config.batch, config.tiles, config.options)).listing()


def write_golden() -> None:
    golden_path().write_text(tiny_listing())


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2-124m", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    """Without padding, as OpenAI counts them."""
    assert load_graph(name).model.parameter_count() == count


def test_steps_take_turns_in_two_slots():
    """A step reads and writes its own slot alone, so that the next one's inputs can be written meanwhile: same bits as with one slot."""
    shape = Model(1, 2, 16, 90, 32), Batch(2, 32), Tiles(16, 16, 8, 1, 64)
    m = GPT2(*shape, Options(weight_decay_on="matrices"))
    m.initialize(3)
    rng, losses = np.random.default_rng(5), []
    graphs = [training_graph(m, slot) for slot in range(2)]
    for step in range(4):
        s, other = m.slots[step % 2], m.slots[1 - step % 2]
        s.tokens.array[:], s.targets.array[:] = rng.integers(0, 90, (2, 64))
        m.set_hyper(step, lr=1e-3, weight_decay=0.1, slot=step % 2)
        other.tokens.array[:], other.targets.array[:], other.hyper.array[:] = -1, -1, np.nan
        for task in graphs[step % 2].tasks:
            assert all(tile.tensor not in other.tensors.values() for call in task.calls for _, tile in call.tiles())
            task.run()
        losses.append(s.loss.array[0])
    alone = trained(*shape, steps=4)
    assert losses[-1] == alone.s.loss.array[0]
    assert m.parameters_sha256() == alone.parameters_sha256()


def test_state_is_all_that_a_step_hands_to_the_next():
    """Put into a model whose other memory holds anything, the state of two steps leads to the bits that the third would have had."""
    shape = Model(1, 2, 16, 90, 32), Batch(2, 32), Tiles(16, 16, 8, 1, 64)
    before, after = trained(*shape, steps=2), trained(*shape, steps=3)
    m = GPT2(*shape, Options(weight_decay_on="matrices"))
    for arena in (m.g, m.a, m.d):
        for tensor in arena.tensors.values():
            tensor.array[...] = np.nan
    for name, array in m.state.items():
        array[...] = before.state[name]
    for name in ("tokens", "targets", "hyper"):
        m.s.tensors[name].array[...] = after.s.tensors[name].array
    for task in training_graph(m).tasks:
        task.run()
    assert list(m.state) == list(after.state)
    assert all(np.array_equal(array, after.state[name]) for name, array in m.state.items())


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m", "gpt2-medium"])
def test_memory_is_known_before_it_is_taken(name):
    """bytes_needed is what the arenas hold, but for alignment; until they are used, arenas take no memory."""
    config = load_graph(name)
    needed = GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options)
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    assert needed <= m.nbytes <= needed + 64 * 200


def test_sampling_by_row_blocks_gives_the_logits_of_the_whole_sequence():
    """Rows computed block by block, reading earlier keys and values, agree with all rows at once; each block's logits come first."""
    m = trained(Model(2, 2, 16, 90, 32), Batch(2, 32), Tiles(16, 16, 8, 1, 64))
    for task in loss_graph(m).tasks:
        task.run()
    wanted = m.a.logits.array[0, :32].copy()
    m.a.logits.array[:] = 0
    m.a.qkv.array[:] = 0
    for start in range(0, 32, 12):
        stop = min(start + 12, 32)
        for task in sampling_graph(m, start, stop).tasks:
            task.run()
        np.testing.assert_allclose(m.a.logits.array[0, : stop - start], wanted[start:stop], atol=2e-5)


@pytest.mark.parametrize(("B", "T"), [(4, 16), (3, 48), (2, 64), (1, 20), (70, 1)])
def test_samples_are_those_of_full_forward_passes(B, T):
    """llm.c draws 63 ids from full forward passes over the flat batch, also where T < 64 and a new sequence begins with no context."""
    m = trained(Model(1, 2, 16, 90, 64), Batch(B, T), Tiles(16, 16, 8, 1, 64))
    got = sampled(m)
    length = min(64, B * T)
    tokens, random, full = np.full(B * T, 89, np.int32), Random(), loss_graph(m)
    for t in range(1, length):
        m.s.tokens.array[:] = tokens
        for task in full.tasks:
            task.run()
        tokens[t] = draw(m.a.logits.array[0, t - 1, :90], random.uniform())
    assert got == tokens[1:length].tolist()


def sampled(m: GPT2) -> list[int]:
    return Sampler(m).sample(lambda graph: [task.run() for task in graph.tasks], end_of_text=89)


def test_samples_do_not_depend_on_how_many_logits_are_held():
    """Also where a block of logits is shorter than the sampler's blocks."""
    shape, tiles = (Model(1, 2, 16, 90, 64), Batch(1, 40)), Tiles(16, 16, 8, 1, 64)
    m = trained(*shape, tiles)
    wanted = sampled(m)
    for rows in (5, 16, 33):
        other = GPT2(*shape, dataclasses.replace(tiles, logits_rows=rows), m.options)
        for name, tensor in m.p.tensors.items():
            other.p.tensors[name].array[:] = tensor.array
        assert sampled(other) == wanted
