"""Causal self-attention of one sequence and a few heads, forward and backward, without storing a T x T matrix.

The forward pass keeps two numbers per row and head, the largest score and 1 / sum of exp(score - largest). The backward pass computes the
probabilities again from them: T^2 work in both directions, and memory that grows with T. Queries go in blocks, and a block meets only the
keys up to its last query, so the masked half of the products is skipped. Products of our own leave more to gain: attention_strips.py does
all of a head that is made of whole vectors.

Q, K and V are columns of one tensor: a tile of H columns holds N = H / head_size heads side by side. Queries may be the last T of S
positions (sampling computes only the new rows).
"""

import math

import numpy as np

from taskgpt.gpt2 import attention_strips
from taskgpt.gpt2.attention_strips import COLUMNS, STRIP
from taskgpt.gpt2.vector_math import exp32, exp_row, row_sum
from taskgpt.products import BLAS, WORK, operand, product
from taskgpt.products.packed import GRAIN
from taskgpt.tasks import In, Out, Scratch, dense, dims, kernel

T, S, H, N = dims("T S H N")
_f = np.float32
ZERO, ONE = _f(0), _f(1)
MASKED = _f(-np.inf)  # the score of a later position: exp gives 0
BLOCK = 64  # queries at a time: the block's scores stay in L2 (64 x 1024 floats = 256 KiB)


@kernel(flops=lambda T, S, H: 4 * H * (T * (S - T) + T * (T + 1) // 2), tags=["llmc"])
def attention_forward(
    atty: Out[T, H],
    att_max: Out[T, N],
    att_rsum: Out[T, N],
    q: In[T, H],
    k: In[S, H],
    v: In[S, H],
    head_size: int,
    products: int,
    scores: Scratch[BLOCK, S],
    work: Scratch[WORK],
    packed: Scratch[2, S, H],
    blocks: Scratch[COLUMNS, H],
    turned: Scratch[H, COLUMNS],
    strips: Scratch[2 * STRIP * COLUMNS],
    statistics: Scratch[3 * COLUMNS],
):
    """atty = softmax(q @ k.T / sqrt(head_size), over positions up to the query's own) @ v, head by head.

    Source: Vaswani et al. 2017; same formula as llm.c. Keeps: att_max, att_rsum for attention_backward.
    """
    masked = _masked(len(q), len(k))
    for n, at in enumerate(range(0, q.shape[1], head_size)):
        head = slice(at, at + head_size)
        raw = np.where(masked, _f(-np.inf), operand(products, q[:, head]) @ operand(products, k[:, head]).T * _f(1 / math.sqrt(head_size)))
        att_max[:, n] = raw.max(axis=1)
        probabilities = np.exp(raw - att_max[:, n, None])
        att_rsum[:, n] = 1 / probabilities.sum(axis=1)
        atty[:, head] = operand(products, probabilities) @ operand(products, v[:, head]) * att_rsum[:, n, None]


@attention_forward.compiled
def attention_forward_twin(atty, att_max, att_rsum, q, k, v, head_size, products, scores, work, packed, blocks, turned, strips, statistics):
    queries, past = q.shape[0], k.shape[0] - q.shape[0]
    scale = _f(1 / math.sqrt(head_size))
    for n in range(q.shape[1] // head_size):
        first, last = n * head_size, (n + 1) * head_size
        if products != BLAS and head_size % GRAIN == 0:
            attention_strips.forward(
                products, atty[:, first:last], att_max[:, n], att_rsum[:, n], q[:, first:last], k[:, first:last], v[:, first:last], scale,
                packed, blocks, turned, strips, statistics,
            )  # fmt: skip
            continue
        for start in range(0, queries, BLOCK):
            stop = min(start + BLOCK, queries)
            seen = past + stop
            block = scores[: stop - start, :seen]
            product(products, block, q[start:stop, first:last], k[:seen, first:last], 0, 1, 0, work)
            for r in range(start, stop):
                row = dense(block[r - start])
                for t in range(past + r + 1):
                    row[t] *= scale
                row[past + r + 1 :] = MASKED
                largest, total = exp_row(row)
                att_max[r, n], att_rsum[r, n] = largest, ONE / total
            product(products, atty[start:stop, first:last], block, v[:seen, first:last], 0, 0, 0, work)
            for r in range(start, stop):
                row, factor = dense(atty[r, first:last]), att_rsum[r, n]
                for c in range(head_size):
                    row[c] *= factor


@kernel(flops=lambda T, H: 10 * H * T * (T + 1) // 2)
def attention_backward(
    dq: Out[T, H],
    dk: Out[T, H],
    dv: Out[T, H],
    datty: In[T, H],
    atty: In[T, H],
    q: In[T, H],
    k: In[T, H],
    v: In[T, H],
    att_max: In[T, N],
    att_rsum: In[T, N],
    head_size: int,
    products: int,
    probabilities: Scratch[BLOCK, T],
    gradients: Scratch[BLOCK, T],
    pairs: Scratch[H],
    work: Scratch[WORK],
    packed: Scratch[5, T, H],
    blocks: Scratch[3, COLUMNS, H],
    turned: Scratch[2, H, COLUMNS],
    strips: Scratch[5 * STRIP * COLUMNS],
    statistics: Scratch[T, 3],
):
    """The gradients of q, k and v, given that of atty.

    With p the probabilities and dp = datty @ v.T: dv = p.T @ datty, ds = p * (dp - sum(datty * atty)), dq = ds @ k / sqrt(head_size) and
    dk = ds.T @ q / sqrt(head_size). The sum over a row of p * dp equals that of datty * atty (Dao et al. 2022), at no T x T cost.
    """
    masked, scale = _masked(len(q), len(k)), _f(1 / math.sqrt(head_size))
    q, k, v, datty_operand = (operand(products, x) for x in (q, k, v, datty))
    for n, at in enumerate(range(0, q.shape[1], head_size)):
        head = slice(at, at + head_size)
        scores = np.where(masked, _f(-np.inf), q[:, head] @ k[:, head].T * scale)
        p = np.exp(scores - att_max[:, n, None]) * att_rsum[:, n, None]
        dv[:, head] = operand(products, p).T @ datty_operand[:, head]
        ds = p * (datty_operand[:, head] @ v[:, head].T - (datty[:, head] * atty[:, head]).sum(axis=1, keepdims=True)) * scale
        ds = operand(products, ds)
        dq[:, head] = ds @ k[:, head]
        dk[:, head] = ds.T @ q[:, head]


@attention_backward.compiled
def attention_backward_twin(
    dq, dk, dv, datty, atty, q, k, v, att_max, att_rsum, head_size, products, probabilities, gradients, pairs, work, packed, blocks, turned,
    strips, statistics,
):  # fmt: skip
    length = q.shape[0]
    scale = _f(1 / math.sqrt(head_size))
    for n in range(q.shape[1] // head_size):
        first, last = n * head_size, (n + 1) * head_size
        if products != BLAS and head_size % GRAIN == 0:
            attention_strips.backward(
                products, dq[:, first:last], dk[:, first:last], dv[:, first:last], datty[:, first:last], atty[:, first:last],
                q[:, first:last], k[:, first:last], v[:, first:last], att_max[:, n], att_rsum[:, n], scale, pairs, packed, blocks, turned,
                strips, statistics,
            )  # fmt: skip
            continue
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            p, ds = probabilities[: stop - start, :stop], gradients[: stop - start, :stop]
            product(products, p, q[start:stop, first:last], k[:stop, first:last], 0, 1, 0, work)
            product(products, ds, datty[start:stop, first:last], v[:stop, first:last], 0, 1, 0, work)
            for r in range(start, stop):
                d_row, y_row = dense(datty[r, first:last]), dense(atty[r, first:last])
                for c in range(head_size):
                    pairs[c] = d_row[c] * y_row[c]
                mean, largest, factor = row_sum(pairs[:head_size]), att_max[r, n], att_rsum[r, n]
                p_row, ds_row = dense(p[r - start]), dense(ds[r - start])
                p_row[r + 1 :] = MASKED
                for t in range(stop):
                    p_row[t] = exp32(p_row[t] * scale - largest) * factor
                    ds_row[t] = p_row[t] * (ds_row[t] - mean) * scale
            product(products, dq[start:stop, first:last], ds, k[:stop, first:last], 0, 0, 0, work)
            # Keys before this block have a sum already; those of the block itself get their first contribution.
            if start > 0:
                product(products, dk[:start, first:last], ds[:, :start], q[start:stop, first:last], 1, 0, 1, work)
                product(products, dv[:start, first:last], p[:, :start], datty[start:stop, first:last], 1, 0, 1, work)
            product(products, dk[start:stop, first:last], ds[:, start:], q[start:stop, first:last], 1, 0, 0, work)
            product(products, dv[start:stop, first:last], p[:, start:], datty[start:stop, first:last], 1, 0, 0, work)


def _masked(queries: int, keys: int) -> np.ndarray:
    """Return a (queries, keys) mask of the keys after each query, the queries being the last positions."""
    return np.arange(keys)[None, :] > np.arange(keys - queries, keys)[:, None]
