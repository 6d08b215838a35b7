"""The program of tasks: any shape and any tiles give the same numbers, and the graph says truly what it costs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.config import folder, load_graph
from taskgpt.gpt2.model import GPT2, Batch, Model, Options, Tiles
from taskgpt.gpt2.program import loss_graph, sampling_graph, training_graph
from taskgpt.gpt2.sampling import Random, Sampler, draw
from taskgpt.tasks import check

WHOLE = Tiles(rows=10**6, columns=10**6, pointwise_rows=10**6, heads=10**6, vocabulary=10**6)


def trained(model: Model, batch: Batch, tiles: Tiles, steps: int = 2, guarded: bool = False, **options) -> GPT2:
    """Return a model after a few steps on random tokens."""
    m = GPT2(model, batch, tiles, Options(weight_decay_on="matrices", **options))
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
    tiles=st.builds(Tiles, sizes, sizes, sizes, st.integers(1, 4), st.integers(1, 200)),
)  # fmt: skip
def test_tiles_change_nothing_but_rounding(model, batch, tiles):
    """Drawn shapes under drawn tiles, ragged or larger than what they cut, give the loss and the gradients of uncut tensors."""
    cut, whole = trained(model, batch, tiles, steps=1), trained(model, batch, WHOLE, steps=1)
    assert cut.s.loss.array[0] == pytest.approx(whole.s.loss.array[0], rel=1e-5)
    for name, tensor in whole.g.tensors.items():
        scale = np.linalg.norm(tensor.array) + 1e-6
        assert np.linalg.norm(cut.g.tensors[name].array - tensor.array) <= 2e-5 * scale, name


def test_declarations_hold_for_ragged_tiles():
    """Guarded runs of a ragged model find no undeclared access and change no bit."""
    shape = Model(2, 3, 15, 130, 20), Batch(2, 17), Tiles(7, 11, 5, 2, 50)
    assert trained(*shape, guarded=True).parameters_sha256() == trained(*shape).parameters_sha256()


def test_padding_rows_stay_zero():
    """Rows of wte beyond the vocabulary never move, with weight decay too."""
    m = trained(Model(1, 1, 8, 100, 16), Batch(2, 16), Tiles(16, 8, 8, 1, 64))
    assert not m.p.wte.array[100:].any()
    assert m.p.wte.array[:100].any()


def test_weight_decay_is_on_matrices_unless_on_all():
    """The update tasks of weights and embeddings decay them; those of biases and LayerNorm only under weight_decay_on = "all"."""
    shape = Model(1, 1, 8, 64, 16), Batch(1, 16), Tiles(16, 8, 8, 1, 64)
    some, every = (GPT2(*shape, Options(weight_decay_on=on)) for on in ("matrices", "all"))
    decayed = {}
    for m in (some, every):
        for call in (call for task in training_graph(m).tasks for call in task.calls if call.kernel.name == "adamw_update"):
            decayed[m.options.weight_decay_on, call.args[0].tensor.name] = call.args[-1]
    assert {name for (on, name), flag in decayed.items() if on == "matrices" and flag} == {
        "wte",
        "wpe",
        "qkvw",
        "attprojw",
        "fcw",
        "fcprojw",
    }
    assert all(flag for (on, _), flag in decayed.items() if on == "all")


def test_commutative_sums_agree_up_to_rounding():
    """options.commutative = true frees the order of sums over vocabulary blocks: locks instead of edges, the same loss."""
    shape = Model(1, 2, 8, 300, 16), Batch(2, 16), Tiles(16, 8, 8, 1, 64)
    free = GPT2(*shape, Options(weight_decay_on="matrices", commutative=True))
    assert training_graph(free).is_commutative
    ordered = trained(*shape)
    assert trained(*shape, commutative=True).s.loss.array[0] == pytest.approx(ordered.s.loss.array[0], rel=1e-6)


def test_flops_are_those_of_the_formula():
    """The matrix products of a GPT-2 124M step are 6 x tokens x (weights of the linear layers + wte): 189.8 GFLOP."""
    config = load_graph("gpt2-124m")
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    graph = training_graph(m)
    gemm = sum(task.flops for task in graph.tasks if "gemm" in task.calls[0].kernel.tags)
    L, C, Vp = config.model.layers, config.model.channels, config.model.padded_vocabulary
    assert gemm == 6 * config.batch.rows * (12 * L * C * C + Vp * C)
    assert gemm == pytest.approx(189.8e9, rel=1e-3)
    assert {task.section[0] for task in graph.tasks} == {"forward", "loss", "backward", "update"}


def test_kernels_that_gather_count_the_rows_that_they_touch():
    """Not all of wte, not all logits: what a look-up moves does not grow with the vocabulary."""
    config = load_graph("gpt2-124m")
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    moved = {}
    for task in training_graph(m).tasks:
        moved.setdefault(task.name, []).append(task.bytes)
    rows, C = config.batch.rows, config.model.channels
    assert sum(moved["encoder_forward"]) == 4 * rows * (3 * C + 1)
    assert sum(moved["crossentropy_forward"]) < 4 * rows * 100
    assert max(moved["encoder_backward_wte"]) <= 4 * rows * (3 * C + 1)


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


@pytest.mark.parametrize("name", ["tiny", "gpt2-124m", "gpt2-medium"])
def test_memory_is_known_before_it_is_taken(name):
    """bytes_needed is what the arenas hold, but for alignment; until they are used, arenas take no memory."""
    config = load_graph(name)
    needed = GPT2.bytes_needed(config.model, config.batch, config.tiles)
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    assert needed <= m.nbytes <= needed + 64 * 200


def test_sampling_by_row_blocks_gives_the_logits_of_the_whole_sequence():
    """Rows computed block by block, reading earlier keys and values, agree with all rows computed at once."""
    m = trained(Model(2, 2, 16, 90, 32), Batch(2, 32), Tiles(16, 16, 8, 1, 64))
    for task in loss_graph(m).tasks:
        task.run()
    wanted = m.a.logits.array[:32].copy()
    m.a.logits.array[:] = 0
    m.a.qkv.array[:] = 0
    for start in range(0, 32, 12):
        for task in sampling_graph(m, start, min(start + 12, 32)).tasks:
            task.run()
    np.testing.assert_allclose(m.a.logits.array[:32], wanted, atol=2e-5)


@pytest.mark.parametrize(("B", "T"), [(4, 16), (3, 48), (2, 64), (1, 20), (70, 1)])
def test_samples_are_those_of_full_forward_passes(B, T):
    """llm.c draws 63 ids from full forward passes over the flat batch, also where T < 64 and a new sequence begins with no context."""
    m = trained(Model(1, 2, 16, 90, 64), Batch(B, T), Tiles(16, 16, 8, 1, 64))
    got = Sampler(m).sample(lambda graph: [task.run() for task in graph.tasks], end_of_text=89)
    length = min(64, B * T)
    tokens, random, full = np.full(B * T, 89, np.int32), Random(), loss_graph(m)
    for t in range(1, length):
        m.s.tokens.array[:] = tokens
        for task in full.tasks:
            task.run()
        tokens[t] = draw(m.a.logits.array[t - 1, :90], random.uniform())
    assert got == tokens[1:length].tolist()
