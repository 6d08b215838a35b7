"""Norms: what is done to the rows that enter attention, the MLP and the head. GPT-2's is LayerNorm.

To add one: its kernels and a row of NORMS, here; then `model.norm` of a graph file can name it.
"""

from typing import NamedTuple

import numba
import numpy as np

from taskgpt.gpt2.gradients import sum_of_squares
from taskgpt.gpt2.updates import adamw_row, adamw_update
from taskgpt.gpt2.vector_math import row_squares, row_sum
from taskgpt.tasks import In, InOut, Kernel, Out, Scratch, dense, dims, kernel

R, C = dims("R C")
_f = np.float32
ZERO, ONE = _f(0), _f(1)
EPS = _f(1e-5)


class Norm(NamedTuple):
    """The tensors of a norm, and its kernels. A tensor is named after its place and its suffix: `ln1` + `w`.

    Of parameters, (C,) each, the first is what scales: backward reads no other. Statistics, (R,) each, are what forward keeps of each row
    for backward. Kernels take them in the order given here:

        forward(out, *statistics, inp, *parameters)
        backward(dinp, dout, inp, weight, *statistics)
        residual_backward(dinp, dresidual, dout, inp, weight, *statistics)   # dresidual + backward
        backward_weight(*gradients of parameters, dout, inp, *statistics)
        update(*(parameter, m, v of each), squares, dout, inp, *statistics, hyper, is_decayed)   # backward_weight, then AdamW

    `squares`, as many as parameters, are to hold the sum of squares of each one's gradient.
    """

    parameters: dict[str, float]  # suffix, and what the parameter begins with
    statistics: tuple[str, ...]  # suffixes
    forward: Kernel
    backward: Kernel
    residual_backward: Kernel
    backward_weight: Kernel
    update: Kernel


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
def layernorm_forward_twin(out, mean, rstd, inp, weight, bias):
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
def layernorm_backward_twin(dinp, dout, inp, weight, mean, rstd):
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
def layernorm_residual_backward_twin(dinp, dresidual, dout, inp, weight, mean, rstd):
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


@numba.njit(nogil=True, error_model="numpy")
def _layernorm_gradient(dweight, dbias, dout, inp, mean, rstd):
    channels = dweight.shape[0]
    for c in range(channels):
        dweight[c] = ZERO
        dbias[c] = ZERO
    for r in range(inp.shape[0]):
        x, dy, m, scale = dense(inp[r]), dense(dout[r]), mean[r], rstd[r]
        for c in range(channels):
            dweight[c] += dy[c] * ((x[c] - m) * scale)
            dbias[c] += dy[c]


@layernorm_backward_weight.compiled
def layernorm_backward_weight_twin(dweight, dbias, dout, inp, mean, rstd):
    _layernorm_gradient(dweight, dbias, dout, inp, mean, rstd)


@kernel(flops=lambda R, C: 5 * R * C + 28 * C)
def layernorm_update(
    weight: InOut[C],
    m_weight: InOut[C],
    v_weight: InOut[C],
    bias: InOut[C],
    m_bias: InOut[C],
    v_bias: InOut[C],
    squares: Out[2, np.float64],
    dout: In[R, C],
    inp: In[R, C],
    mean: In[R],
    rstd: In[R],
    hyper: In[7],
    is_decayed: int,
    dweight: Scratch[C],
    dbias: Scratch[C],
):
    """layernorm_backward_weight, then sum_of_squares and adamw_update of weight and bias."""
    grad, bias_grad = np.empty_like(weight), np.empty_like(bias)
    layernorm_backward_weight.body(grad, bias_grad, dout, inp, mean, rstd)
    sum_of_squares.body(squares[:1], grad)
    sum_of_squares.body(squares[1:], bias_grad)
    adamw_update.body(weight, m_weight, v_weight, grad, hyper, is_decayed)
    adamw_update.body(bias, m_bias, v_bias, bias_grad, hyper, is_decayed)


@layernorm_update.compiled
def layernorm_update_twin(
    weight, m_weight, v_weight, bias, m_bias, v_bias, squares, dout, inp, mean, rstd, hyper, is_decayed, dweight, dbias
):
    _layernorm_gradient(dweight, dbias, dout, inp, mean, rstd)
    squares[0], squares[1] = row_squares(dweight), row_squares(dbias)
    adamw_row(weight, m_weight, v_weight, dweight, ONE, hyper, is_decayed)
    adamw_row(bias, m_bias, v_bias, dbias, ONE, hyper, is_decayed)


NORMS = {
    "layernorm": Norm(
        {"w": 1.0, "b": 0.0},
        ("_mean", "_rstd"),
        layernorm_forward,
        layernorm_backward,
        layernorm_residual_backward,
        layernorm_backward_weight,
        layernorm_update,
    )
}
