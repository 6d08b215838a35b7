"""The kernels of generating: what training's do forward, on the first `count` rows of a tile. Other rows stay as they are.

A row is a token of some sequence: the number of its `slot` in the cache, and its position there. Tiles of integers say both, and how many
rows there are, so that a graph that was recorded once serves every step. What a row becomes depends on its own sequence alone.
"""

import math

import numba
import numpy as np

from taskgpt.gpt2.generation.products import SIDE, products
from taskgpt.gpt2.kernels import gelu_forward, gelu_gate
from taskgpt.gpt2.vector_math import exp_row
from taskgpt.tasks import In, InOut, Scratch, dense, dims, kernel

R, C, OC, V, P, S, L, H, N, D = dims("R C OC V P S L H N D")
_f = np.float32
ZERO, ONE = _f(0), _f(1)


@kernel(bytes=lambda R, C: 4 * (3 * R * C + 2 * R))  # at most: `count` of the rows
def encoder_rows(out: InOut[R, C], tokens: In[R, np.int32], at: In[R, np.int32], count: In[1, np.int32], wte: In[V, C], wpe: In[P, C]):
    """out[r] = wte[tokens[r]] + wpe[at[r]]; `at` are positions."""
    rows = slice(count[0])
    out[rows] = wte[tokens[rows]] + wpe[at[rows]]


@encoder_rows.compiled
def encoder_rows_twin(out, tokens, at, count, wte, wpe):
    for r in range(count[0]):
        o, token, position = dense(out[r]), dense(wte[tokens[r]]), dense(wpe[at[r]])
        for c in range(o.shape[0]):
            o[c] = token[c] + position[c]


@kernel(flops=lambda R, OC, C: 2 * R * OC * C)
def lmhead_rows(out: InOut[R, OC], inp: In[R, C], weight: In[OC, C], count: In[1, np.int32]):
    """out = inp @ weight.T."""
    rows = slice(count[0])
    out[rows] = inp[rows] @ weight.T


@lmhead_rows.compiled
def lmhead_rows_twin(out, inp, weight, count):
    products(out, inp, weight, count[0])


@kernel(flops=lambda R, OC, C: 2 * R * OC * C)
def matmul_rows(out: InOut[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], count: In[1, np.int32]):
    """out = inp @ weight.T + bias."""
    rows = slice(count[0])
    out[rows] = inp[rows] @ weight.T + bias


@numba.njit(nogil=True, error_model="numpy")
def _linear(out, inp, weight, bias, count):
    products(out, inp, weight, count)
    for r in range(count):
        o = dense(out[r])
        for c in range(o.shape[0]):
            o[c] += bias[c]


@matmul_rows.compiled
def matmul_rows_twin(out, inp, weight, bias, count):
    _linear(out, inp, weight, bias, count[0])


@kernel(flops=lambda R, OC, C: 2 * R * OC * C)
def matmul_gelu_rows(out: InOut[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], count: In[1, np.int32]):
    """out = gelu_forward(inp @ weight.T + bias)."""
    matmul_rows.body(out, inp, weight, bias, count)
    gelu_forward.body(out[: count[0]], out[: count[0]].copy())


@matmul_gelu_rows.compiled
def matmul_gelu_rows_twin(out, inp, weight, bias, count):
    _linear(out, inp, weight, bias, count[0])
    for r in range(count[0]):
        o = dense(out[r])
        for c in range(o.shape[0]):
            o[c] = o[c] * gelu_gate(o[c])


@kernel(flops=lambda R, OC, C: 2 * R * OC * C)
def matmul_residual_rows(out: InOut[R, OC], residual: In[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], count: In[1, np.int32]):
    """out = residual + (inp @ weight.T + bias)."""
    matmul_rows.body(out, inp, weight, bias, count)
    out[: count[0]] += residual[: count[0]]


@matmul_residual_rows.compiled
def matmul_residual_rows_twin(out, residual, inp, weight, bias, count):
    _linear(out, inp, weight, bias, count[0])
    for r in range(count[0]):
        o, a = dense(out[r]), dense(residual[r])
        for c in range(o.shape[0]):
            o[c] = a[c] + o[c]


@kernel(flops=lambda R, L, H: 4 * R * L * H)  # at most: every row at the end of the cache
def attention_rows(
    atty: InOut[R, H],
    keys: InOut[N, S, L, D],
    values: InOut[N, S, L, D],
    q: In[R, H],
    k: In[R, H],
    v: In[R, H],
    slots: In[R, np.int32],
    at: In[R, np.int32],
    count: In[1, np.int32],
    scores: Scratch[SIDE, L],
):
    """Put k and v of each row into the cache, at its slot and position; then atty = softmax(q @ keys.T / sqrt(D)) @ values, head by head.

    A row sees its own slot up to its own position, which is its own key among others: rows of one call may follow each other.
    """
    heads, _, _, size = keys.shape
    for cache, new in ((keys, k), (values, v)):
        for r in range(count[0]):
            cache[:, slots[r], at[r]] = new[r].reshape(heads, size)
    for r in range(count[0]):
        for n in range(heads):
            head, seen = slice(n * size, (n + 1) * size), at[r] + 1
            raw = keys[n, slots[r], :seen] @ q[r, head] * _f(1 / math.sqrt(size))
            weights = np.exp(raw - raw.max())
            atty[r, head] = weights @ values[n, slots[r], :seen] / weights.sum()


@attention_rows.compiled
def attention_rows_twin(atty, keys, values, q, k, v, slots, at, count, scores):
    size = keys.shape[3]
    scale = _f(1 / math.sqrt(size))
    for r in range(count[0]):
        for n in range(keys.shape[0]):
            key, value = dense(keys[n, slots[r], at[r]]), dense(values[n, slots[r], at[r]])
            for d in range(size):
                key[d] = k[r, n * size + d]
                value[d] = v[r, n * size + d]
    start = 0
    while start < count[0]:
        stop, most = start, 0  # rows of one slot meet its keys together
        while stop < min(start + SIDE, count[0]) and slots[stop] == slots[start]:
            most = max(most, at[stop] + 1)
            stop += 1
        for n in range(keys.shape[0]):
            head = slice(n * size, (n + 1) * size)
            products(scores[:, :most], q[start:stop, head], keys[n, slots[start], :most], stop - start)
            for r in range(start, stop):
                row = dense(scores[r - start, : at[r] + 1])
                for t in range(row.shape[0]):
                    row[t] *= scale
                factor = ONE / exp_row(row)[1]
                o = dense(atty[r, head])
                _weighted_sum(o, row, values[n, slots[r]])
                for d in range(size):
                    o[d] *= factor
        start = stop


@numba.njit(nogil=True, error_model="numpy")
def _weighted_sum(out, weights, rows):
    """out = weights @ rows, the rows in their order: four at a time, so that `out` is read and written a quarter as often."""
    for d in range(out.shape[0]):
        out[d] = ZERO
    count = weights.shape[0]
    whole = count - count % 4
    for t in range(0, whole, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        r0, r1, r2, r3 = dense(rows[t]), dense(rows[t + 1]), dense(rows[t + 2]), dense(rows[t + 3])
        for d in range(out.shape[0]):
            out[d] = out[d] + w0 * r0[d] + w1 * r1[d] + w2 * r2[d] + w3 * r3[d]
    for t in range(whole, count):
        row = dense(rows[t])
        for d in range(out.shape[0]):
            out[d] = out[d] + weights[t] * row[d]
