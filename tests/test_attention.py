"""Attention in strips, with products of our own: right for long sequences and at every edge, and its bits depend on positions alone."""

import numpy as np
import pytest

from taskgpt.gpt2.attention import attention_backward, attention_forward
from taskgpt.products import OWN_BF16, OWN_FP32
from taskgpt.products.instruction_sets import of_this_machine
from taskgpt.tasks.scratch import scratch_arrays

pytestmark = pytest.mark.skipif(of_this_machine() is None, reason="no vector instructions that products of our own are written for")
WAYS = {"fp32": OWN_FP32, "bf16": OWN_BF16}
CLOSE = {OWN_FP32: 2e-6, OWN_BF16: 4e-3}  # of float64, norm-relative; where scores are nearly the same, bfloat16 of them may be neighbours
# (T, S, head size, heads): each edge of groups (16), blocks (64) and strips (128), and long sequences.
SHAPES = [(1, 1, 16, 1), (16, 16, 16, 2), (17, 17, 32, 1), (63, 63, 64, 1), (65, 65, 16, 3), (129, 129, 80, 1), (257, 257, 112, 1)]
LONG = [(1000, 1000, 64, 1), (1024, 1024, 64, 2)]
LAST = [(1, 300, 64, 1), (16, 64, 64, 2), (31, 128, 16, 1), (64, 191, 16, 1), (100, 1023, 64, 1)]  # queries are the last of the positions
way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def tensors(shape: tuple[int, int, int, int], growth: float = 0) -> dict[str, np.ndarray]:
    """Return q, k, v, datty as tiles of one tensor whose other elements are NaN; by `growth`, scores grow with the position."""
    T, S, size, heads = shape
    rng, H = np.random.default_rng(shape), size * heads
    whole = np.full((S + 2, 4 * H + 7), np.nan, np.float32)
    tiles = {
        name: whole[S - n + 1 : S + 1, 3 + i * H : 3 + (i + 1) * H] for i, (name, n) in enumerate(zip("qkvd", (T, S, S, T), strict=True))
    }
    for tile in tiles.values():
        tile[...] = rng.standard_normal(tile.shape)
    if growth:
        tiles["k"][...] = np.linspace(-growth, growth, S)[:, None] + tiles["k"] / 8
        tiles["q"][...] = 1 + tiles["q"] / 8
    return tiles


def forward(q, k, v, size: int, way: int, call=attention_forward) -> list[np.ndarray]:
    """Return atty, att_max, att_rsum in the type of q; what is not written is NaN."""
    heads = q.shape[1] // size
    out = [np.full((len(q), columns), np.nan, q.dtype) for columns in (q.shape[1], heads, heads)]
    call(*out, q, k, v, size, way)
    return out


def backward(q, k, v, datty, atty, largest, rsum, size: int, way: int, call=attention_backward) -> list[np.ndarray]:
    """Return dq, dk, dv."""
    out = [np.full(q.shape, np.nan, q.dtype) for _ in range(3)]
    call(*out, datty, atty, q, k, v, largest, rsum, size, way)
    return out


def body(kernel):
    return lambda *args: kernel.body(*args, *scratch_arrays(kernel.scratch_shapes(args)))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_forward(shape, way, growth=0, close=None):
    q, k, v, _ = tensors(shape, growth).values()
    wanted = forward(*(x.astype(np.float64) for x in (q, k, v)), shape[2], way, body(attention_forward))
    for got, want in zip(forward(q, k, v, shape[2], way), wanted, strict=True):
        assert error(got, want) < (close or CLOSE[way]), shape


@way
def test_attention_agrees_with_its_body(way):
    """Output and statistics, whatever is left over of groups, blocks and strips; the queries all positions, or the last of them."""
    for shape in SHAPES + LAST + LONG:
        check_forward(shape, way)


@way
def test_the_gradients_agree_with_their_body(way):
    """Given the same output and statistics. A sequence of one has no gradient but v's."""
    for shape in SHAPES[1:] + LONG:
        q, k, v, datty = tensors(shape).values()
        statistics = forward(q, k, v, shape[2], way)
        wide = [x.astype(np.float64) for x in (q, k, v, datty, *statistics)]
        wanted = backward(*wide, shape[2], way, body(attention_backward))
        for got, want in zip(backward(q, k, v, datty, *statistics, shape[2], way), wanted, strict=True):
            assert error(got, want) < CLOSE[way], shape
    q, k, v, datty = tensors(SHAPES[0]).values()
    dq, dk, dv = backward(q, k, v, datty, *forward(q, k, v, 16, OWN_FP32), 16, OWN_FP32)
    assert np.allclose(dv, datty, rtol=1e-6)
    assert abs(dq).max() < 1e-5 and abs(dk).max() < 1e-5


@way
def test_scores_that_grow_from_strip_to_strip(way):
    """What was summed before is scaled down, until it is nothing beside the rest."""
    check_forward((500, 500, 64, 1), way, growth=2, close=10 * CLOSE[way])
    check_forward((500, 500, 64, 1), way, growth=20, close=10 * CLOSE[way])


@way
def test_bits_of_a_row_depend_on_its_position_alone(way):
    """Not on the rows before it in the call, by which the blocks shift, nor on the heads beside it."""
    size, S = 32, 333
    q, k, v, datty = tensors((S, S, size, 3)).values()
    whole = forward(q, k, v, size, way)
    for T in (1, 2, 31, 100, 206, 332):
        for got, want in zip(forward(q[S - T :], k, v, size, way), whole, strict=True):
            assert np.array_equal(got, want[S - T :])
    gradients = backward(q, k, v, datty, *whole, size, way)
    one, numbers = slice(size, 2 * size), slice(1, 2)
    alone = forward(q[:, one], k[:, one], v[:, one], size, way)
    assert all(np.array_equal(got, want[:, at]) for got, want, at in zip(alone, whole, (one, numbers, numbers), strict=True))
    alone = backward(*(x[:, one] for x in (q, k, v, datty, whole[0])), whole[1][:, numbers], whole[2][:, numbers], size, way)
    assert all(np.array_equal(got, want[:, one]) for got, want in zip(alone, gradients, strict=True))


@way
def test_nan_of_a_query_stays_in_its_row(way):
    """And that of a key reaches every row that sees it."""
    q, k, v, _ = tensors((150, 150, 16, 1)).values()
    q[140, 3] = np.nan
    assert np.isnan(forward(q, k, v, 16, way)[0]).any(axis=1).nonzero()[0].tolist() == [140]
    k[20, 5] = np.nan
    assert np.isnan(forward(q, k, v, 16, way)[0])[20:].all()
