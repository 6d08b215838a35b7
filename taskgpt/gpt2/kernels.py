"""The kernels of GPT-2: matrix products, LayerNorm, GELU, residual, embeddings, loss, AdamW. Attention has its own file.

Each NumPy body is the formula; the twin below it is what runs. Outputs come first, then inputs, then constants. A tag "llmc" marks the
loops that carry an OpenMP pragma in llm.c (`train_gpt2.c`), for the loops scheduler's coverage; "gemm" marks what sgemm's speed bounds.
Everything is float32, as in llm.c.
"""

import math

import numba
import numpy as np

from taskgpt.gpt2.vector_math import LANES, exp32, row_max, row_sum, row_sum_exp
from taskgpt.tasks import Commutative, In, InOut, Out, dense, dims, kernel
from taskgpt.tasks.blas import gemm

R, C, OC, T, V, NB, N = dims("R C OC T V NB N")
_f = np.float32
ZERO, ONE, TWO, THREE = _f(0), _f(1), _f(2), _f(3)
EPS = _f(1e-5)  # LayerNorm
GELU_SCALE = _f(math.sqrt(2 / math.pi))
GELU_CUBE = _f(0.044715)


# Matrix products ------------------------------------------------------------------------------------------------------------------------


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC]):
    """out = inp @ weight.T + bias."""
    np.matmul(inp, weight.T, out=out)
    out += bias


@matmul_forward.compiled
def _(out, inp, weight, bias):
    # The bias goes in first and the product is added to it: one pass over `out` less than adding it afterwards.
    for r in range(out.shape[0]):
        row = dense(out[r])
        for c in range(row.shape[0]):
            row[c] = bias[c]
    gemm(out, inp, weight, 0, 1, ONE, ONE)


@kernel(flops=lambda R, V, C: 2 * R * V * C, tags=["llmc", "gemm"])
def lmhead_forward(logits: Out[R, V], inp: In[R, C], wte: In[V, C]):
    """logits = inp @ wte.T, for a block of the vocabulary."""
    np.matmul(inp, wte.T, out=logits)


@lmhead_forward.compiled
def _(logits, inp, wte):
    gemm(logits, inp, wte, 0, 1, ONE, ZERO)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_input(dinp: Out[R, C], dout: In[R, OC], weight: In[OC, C]):
    """dinp = dout @ weight."""
    np.matmul(dout, weight, out=dinp)


@matmul_backward_input.compiled
def _(dinp, dout, weight):
    gemm(dinp, dout, weight, 0, 0, ONE, ZERO)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_input_add(dinp: Commutative[R, C], dout: In[R, OC], weight: In[OC, C]):
    """dinp += dout @ weight: one block more of a sum over output columns."""
    dinp += dout @ weight


@matmul_backward_input_add.compiled
def _(dinp, dout, weight):
    gemm(dinp, dout, weight, 0, 0, ONE, ONE)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_weight(dweight: Out[OC, C], dout: In[R, OC], inp: In[R, C]):
    """dweight = dout.T @ inp, over all rows at once: no sum that could depend on an order."""
    np.matmul(dout.T, inp, out=dweight)


@matmul_backward_weight.compiled
def _(dweight, dout, inp):
    gemm(dweight, dout, inp, 1, 0, ONE, ZERO)


@kernel(flops=lambda R, OC: R * OC, tags=["llmc"])
def matmul_backward_bias(dbias: Out[OC], dout: In[R, OC]):
    """dbias = the sum of dout over its rows, in their order."""
    dbias[:] = 0
    for row in dout:
        dbias += row


@matmul_backward_bias.compiled
def _(dbias, dout):
    for c in range(dbias.shape[0]):
        dbias[c] = ZERO
    for r in range(dout.shape[0]):
        row = dense(dout[r])
        for c in range(dbias.shape[0]):
            dbias[c] += row[c]


# LayerNorm: Ba et al. 2016, biased variance, eps 1e-5 as in llm.c -----------------------------------------------------------------------


@kernel(flops=lambda R, C: 8 * R * C)
def layernorm_forward(out: Out[R, C], mean: Out[R], rstd: Out[R], inp: In[R, C], weight: In[C], bias: In[C]):
    """Normalize each row to mean 0 and variance 1, then scale and shift.

    out[r, c] = (inp[r, c] - mean[r]) * rstd[r] * weight[c] + bias[c], rstd = 1 / sqrt(variance + 1e-5).
    """
    mean[:] = inp.mean(axis=1)
    rstd[:] = 1 / np.sqrt(np.square(inp - mean[:, None]).mean(axis=1) + EPS)
    out[:] = (inp - mean[:, None]) * rstd[:, None] * weight + bias


@layernorm_forward.compiled
def _(out, mean, rstd, inp, weight, bias):
    channels = inp.shape[1]
    for r in range(inp.shape[0]):
        x, y = dense(inp[r]), dense(out[r])
        m = row_sum(x) / _f(channels)
        for c in range(channels):
            centred = x[c] - m
            y[c] = centred * centred
        scale = ONE / np.sqrt(row_sum(y) / _f(channels) + EPS)
        for c in range(channels):
            y[c] = (x[c] - m) * scale * weight[c] + bias[c]
        mean[r], rstd[r] = m, scale


@numba.njit(nogil=True, error_model="numpy")
def _layernorm_backward_row(d, dy, x, weight, mean, rstd):
    """d is scratch for g and for g * n before it holds the result, so that both sums run over dense rows."""
    channels = d.shape[0]
    for c in range(channels):
        d[c] = dy[c] * weight[c]
    mean_g = row_sum(d) / _f(channels)
    for c in range(channels):
        d[c] = dy[c] * weight[c] * ((x[c] - mean) * rstd)
    mean_gn = row_sum(d) / _f(channels)
    for c in range(channels):
        d[c] = (dy[c] * weight[c] - mean_g - (x[c] - mean) * rstd * mean_gn) * rstd


@kernel(flops=lambda R, C: 11 * R * C)
def layernorm_backward(dinp: Out[R, C], dout: In[R, C], inp: In[R, C], weight: In[C], mean: In[R], rstd: In[R]):
    """dinp = rstd * (g - mean(g) - n * mean(g * n)), where n is the normalized row and g = dout * weight."""
    n = (inp - mean[:, None]) * rstd[:, None]
    g = dout * weight
    dinp[:] = (g - g.mean(axis=1, keepdims=True) - n * (g * n).mean(axis=1, keepdims=True)) * rstd[:, None]


@layernorm_backward.compiled
def _(dinp, dout, inp, weight, mean, rstd):
    for r in range(inp.shape[0]):
        _layernorm_backward_row(dense(dinp[r]), dense(dout[r]), dense(inp[r]), weight, mean[r], rstd[r])


@kernel(flops=lambda R, C: 12 * R * C)
def layernorm_residual_backward(
    dinp: Out[R, C], dresidual: In[R, C], dout: In[R, C], inp: In[R, C], weight: In[C], mean: In[R], rstd: In[R]
):
    """dinp = dresidual + layernorm_backward(dout): where the residual stream splits, its gradients add (llm.c's residual_backward)."""
    layernorm_backward.body(dinp, dout, inp, weight, mean, rstd)
    dinp += dresidual


@layernorm_residual_backward.compiled
def _(dinp, dresidual, dout, inp, weight, mean, rstd):
    for r in range(inp.shape[0]):
        d, residual = dense(dinp[r]), dense(dresidual[r])
        _layernorm_backward_row(d, dense(dout[r]), dense(inp[r]), weight, mean[r], rstd[r])
        for c in range(d.shape[0]):
            d[c] += residual[c]


@kernel(flops=lambda R, C: 5 * R * C)
def layernorm_backward_weight(dweight: Out[C], dbias: Out[C], dout: In[R, C], inp: In[R, C], mean: In[R], rstd: In[R]):
    """dweight = sum of dout * normalized row, dbias = sum of dout, over the rows in their order."""
    dweight[:] = 0
    dbias[:] = 0
    for r in range(len(inp)):
        dweight += dout[r] * ((inp[r] - mean[r]) * rstd[r])
        dbias += dout[r]


@layernorm_backward_weight.compiled
def _(dweight, dbias, dout, inp, mean, rstd):
    channels = dweight.shape[0]
    for c in range(channels):
        dweight[c] = ZERO
        dbias[c] = ZERO
    for r in range(inp.shape[0]):
        x, dy, m, scale = dense(inp[r]), dense(dout[r]), mean[r], rstd[r]
        for c in range(channels):
            dweight[c] += dy[c] * ((x[c] - m) * scale)
            dbias[c] += dy[c]


# GELU (tanh form) and residual ----------------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, error_model="numpy")
def _gelu_gate(x):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): one exp, and no cancellation where tanh is near -1."""
    return ONE / (ONE + exp32(-TWO * GELU_SCALE * (x + GELU_CUBE * x * x * x)))


@kernel(flops=lambda R, C: 8 * R * C)
def gelu_forward(out: Out[R, C], inp: In[R, C]):
    """out = inp / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (inp + 0.044715 inp^3). Hendrycks and Gimpel 2016, the form of GPT-2."""
    out[:] = 0.5 * inp * (1 + np.tanh(GELU_SCALE * (inp + GELU_CUBE * inp**3)))


@gelu_forward.compiled
def _(out, inp):
    for r in range(inp.shape[0]):
        x, y = dense(inp[r]), dense(out[r])
        for c in range(x.shape[0]):
            y[c] = x[c] * _gelu_gate(x[c])


@kernel(flops=lambda R, C: 16 * R * C)
def gelu_backward(dinp: InOut[R, C], inp: In[R, C]):
    """dinp *= d gelu(inp) / d inp, in place: on entry, dinp is the gradient of GELU's output."""
    tanh = np.tanh(GELU_SCALE * (inp + GELU_CUBE * inp**3))
    dinp *= 0.5 * (1 + tanh) + 0.5 * inp * (1 - tanh**2) * GELU_SCALE * (1 + 3 * GELU_CUBE * inp**2)


@gelu_backward.compiled
def _(dinp, inp):
    for r in range(inp.shape[0]):
        x, d = dense(inp[r]), dense(dinp[r])
        for c in range(x.shape[0]):
            gate = _gelu_gate(x[c])
            slope = TWO * GELU_SCALE * (ONE + THREE * GELU_CUBE * x[c] * x[c])
            d[c] *= gate + x[c] * gate * (ONE - gate) * slope


@kernel
def residual_forward(out: Out[R, C], inp1: In[R, C], inp2: In[R, C]):
    """out = inp1 + inp2."""
    np.add(inp1, inp2, out=out)


@residual_forward.compiled
def _(out, inp1, inp2):
    for r in range(out.shape[0]):
        o, a, b = dense(out[r]), dense(inp1[r]), dense(inp2[r])
        for c in range(o.shape[0]):
            o[c] = a[c] + b[c]


# Embeddings -----------------------------------------------------------------------------------------------------------------------------


@kernel(bytes=lambda R, C: 4 * (3 * R * C + R))  # the rows of wte and wpe that the tokens name
def encoder_forward(out: Out[R, C], tokens: In[R, np.int32], wte: In[V, C], wpe: In[T, C], first_row: int):
    """out[r] = wte[tokens[r]] + wpe[t]; `first_row` counts from the start of the batch, so t = (first_row + r) % T."""
    positions = (first_row + np.arange(len(tokens))) % len(wpe)
    np.add(wte[tokens], wpe[positions], out=out)


@encoder_forward.compiled
def _(out, tokens, wte, wpe, first_row):
    for r in range(out.shape[0]):
        o, token, position = dense(out[r]), dense(wte[tokens[r]]), dense(wpe[(first_row + r) % wpe.shape[0]])
        for c in range(o.shape[0]):
            o[c] = token[c] + position[c]


@kernel(flops=lambda R, C: R * C, bytes=lambda R, C, V: 4 * (R * C + 2 * min(R, V) * C + R))  # at most: every token in this block
def encoder_backward_wte(dwte: InOut[V, C], dout: In[R, C], tokens: In[R, np.int32], first_token: int):
    """dwte[tokens[r] - first_token] += dout[r] for the tokens of this block of the vocabulary, rows in their order."""
    for r in range(len(tokens)):
        if 0 <= tokens[r] - first_token < len(dwte):
            dwte[tokens[r] - first_token] += dout[r]


@encoder_backward_wte.compiled
def _(dwte, dout, tokens, first_token):
    for r in range(tokens.shape[0]):
        at = tokens[r] - first_token
        if 0 <= at < dwte.shape[0]:
            d, row = dense(dwte[at]), dense(dout[r])
            for c in range(d.shape[0]):
                d[c] += row[c]


@kernel(flops=lambda R, C: R * C)
def encoder_backward_wpe(dwpe: Out[T, C], dout: In[R, C]):
    """dwpe[t] = the sum of dout over the sequences, at position t."""
    dwpe[:] = 0
    for start in range(0, len(dout), len(dwpe)):
        dwpe += dout[start : start + len(dwpe)]


@encoder_backward_wpe.compiled
def _(dwpe, dout):
    length = dwpe.shape[0]
    for r in range(dout.shape[0]):
        d, row = dense(dwpe[r % length]), dense(dout[r])
        for c in range(d.shape[0]):
            d[c] = row[c] if r < length else d[c] + row[c]


# Classifier: softmax and cross-entropy over the vocabulary, in blocks -------------------------------------------------------------------


@kernel(flops=lambda R, V: 4 * R * V, tags=["llmc"])
def softmax_forward_block(block_max: Out[R, 1], block_sum: Out[R, 1], logits: In[R, V], valid: int):
    """The largest logit of each row in this block, and the sum of exp(logit - largest). Columns from `valid` on are padding."""
    real = logits[:, :valid]
    block_max[:, 0] = real.max(axis=1, initial=-np.inf)
    block_sum[:, 0] = np.exp(real - block_max).sum(axis=1)


@softmax_forward_block.compiled
def _(block_max, block_sum, logits, valid):
    lanes = np.empty(LANES, np.float32)
    for r in range(logits.shape[0]):
        row = dense(logits[r])
        largest = row_max(row, valid, lanes)
        block_max[r, 0] = largest
        block_sum[r, 0] = row_sum_exp(row, valid, largest, lanes) if valid else ZERO


@kernel(bytes=lambda R, NB: 4 * (5 * R + 2 * R * NB))  # of the logits, one a row
def crossentropy_forward(
    losses: Out[R],
    logits_max: Out[R],
    logits_rsum: Out[R],
    block_max: In[R, NB],
    block_sum: In[R, NB],
    logits: In[R, V],
    targets: In[R, np.int32],
):
    """losses[r] = -log softmax(logits[r])[targets[r]]; keeps the row's largest logit and 1 / sum of exp(logit - largest)."""
    logits_max[:] = block_max.max(axis=1)
    total = (block_sum * np.exp(block_max - logits_max[:, None])).sum(axis=1)
    logits_rsum[:] = 1 / total
    losses[:] = np.log(total) - (logits[np.arange(len(targets)), targets] - logits_max)


@crossentropy_forward.compiled
def _(losses, logits_max, logits_rsum, block_max, block_sum, logits, targets):
    for r in range(losses.shape[0]):
        largest, total = block_max[r, 0], ZERO
        for b in range(1, block_max.shape[1]):
            largest = max(largest, block_max[r, b])
        for b in range(block_max.shape[1]):
            total += block_sum[r, b] * exp32(block_max[r, b] - largest)
        logits_max[r] = largest
        logits_rsum[r] = ONE / total
        losses[r] = np.log(total) - (logits[r, targets[r]] - largest)


@kernel(flops=lambda R: R)
def loss_forward(loss: Out[1], losses: In[R]):
    """loss = the mean of losses, summed in their order in float32 as llm.c does."""
    loss[0] = np.add.accumulate(losses)[-1] / _f(len(losses))


@loss_forward.compiled
def _(loss, losses):
    total = ZERO
    for r in range(losses.shape[0]):
        total += losses[r]
    loss[0] = total / _f(losses.shape[0])


@kernel(flops=lambda R, V: 4 * R * V)
def crossentropy_backward(
    dlogits: InOut[R, V],
    logits_max: In[R],
    logits_rsum: In[R],
    targets: In[R, np.int32],
    first_token: int,
    valid: int,
    scale: float,
):
    """dlogits = (softmax(logits) - one-hot(targets)) * scale, in place: on entry, dlogits holds the logits. Padding gets 0."""
    dlogits[:, valid:] = 0
    dlogits[:, :valid] = np.exp(dlogits[:, :valid] - logits_max[:, None]) * (logits_rsum[:, None] * _f(scale))
    for r in range(len(targets)):
        if 0 <= targets[r] - first_token < valid:
            dlogits[r, targets[r] - first_token] -= _f(scale)


@crossentropy_backward.compiled
def _(dlogits, logits_max, logits_rsum, targets, first_token, valid, scale):
    for r in range(dlogits.shape[0]):
        row, largest, factor = dense(dlogits[r]), logits_max[r], logits_rsum[r] * _f(scale)
        for v in range(valid):
            row[v] = exp32(row[v] - largest) * factor
        for v in range(valid, row.shape[0]):
            row[v] = ZERO
        at = targets[r] - first_token
        if 0 <= at < valid:
            row[at] -= _f(scale)


# AdamW: Loshchilov and Hutter 2019, operation by operation as in llm.c ------------------------------------------------------------------


@kernel(flops=lambda OC, C: 14 * OC * C)
def adamw_update(param: InOut[OC, C], m: InOut[OC, C], v: InOut[OC, C], grad: In[OC, C], hyper: In[7], is_decayed: int):
    """One AdamW step. `hyper`: lr, beta1, beta2, eps, weight decay, 1 - beta1^t, 1 - beta2^t; decay applies if `is_decayed`."""
    lr, beta1, beta2, eps, decay, correction1, correction2 = hyper
    m[:] = beta1 * m + (ONE - beta1) * grad
    v[:] = beta2 * v + (ONE - beta2) * grad * grad
    param -= lr * ((m / correction1) / (np.sqrt(v / correction2) + eps) + (decay if is_decayed else ZERO) * param)


@adamw_update.compiled
def _(param, m, v, grad, hyper, is_decayed):
    lr, beta1, beta2, eps, correction1, correction2 = hyper[0], hyper[1], hyper[2], hyper[3], hyper[5], hyper[6]
    decay = hyper[4] if is_decayed else ZERO
    for r in range(param.shape[0]):
        p_row, m_row, v_row, g_row = dense(param[r]), dense(m[r]), dense(v[r]), dense(grad[r])
        for c in range(p_row.shape[0]):
            m_new = beta1 * m_row[c] + (ONE - beta1) * g_row[c]
            v_new = beta2 * v_row[c] + (ONE - beta2) * g_row[c] * g_row[c]
            m_row[c], v_row[c] = m_new, v_new
            p_row[c] -= lr * ((m_new / correction1) / (np.sqrt(v_new / correction2) + eps) + decay * p_row[c])
