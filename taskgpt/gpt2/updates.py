"""AdamW, alone and in one task with the gradient that it needs, which then is stored nowhere.

Both ways share their loops and their products, and give the same bits. `hyper` holds: lr, beta1, beta2, eps, weight decay, 1 - beta1^t,
1 - beta2^t; decay applies where `is_decayed`. A task that has a gradient for itself alone leaves the sum of its squares in `squares`, as
sum_of_squares does with one that is stored.
"""

import numba
import numpy as np

from taskgpt.gpt2.gradients import sum_of_squares
from taskgpt.gpt2.kernels import encoder_backward_wte, scatter_rows, sum_rows
from taskgpt.gpt2.vector_math import row_squares
from taskgpt.products import WORK, operand, product
from taskgpt.tasks import In, InOut, Out, Scratch, dense, dims, kernel

R, C, OC, T, V = dims("R C OC T V")
_f = np.float32
ZERO, ONE = _f(0), _f(1)


@kernel(flops=lambda OC, C: 14 * OC * C)
def adamw_update(param: InOut[OC, C], m: InOut[OC, C], v: InOut[OC, C], grad: In[OC, C], hyper: In[7], is_decayed: int):
    """One AdamW step. Loshchilov and Hutter 2019, operation by operation as in llm.c."""
    lr, beta1, beta2, eps, decay, correction1, correction2 = hyper
    m[:] = beta1 * m + (ONE - beta1) * grad
    v[:] = beta2 * v + (ONE - beta2) * grad * grad
    param -= lr * ((m / correction1) / (np.sqrt(v / correction2) + eps) + (decay if is_decayed else ZERO) * param)


@numba.njit(nogil=True, error_model="numpy")
def adamw_row(param, m, v, grad, scale, hyper, is_decayed):
    lr, beta1, beta2, eps, correction1, correction2 = hyper[0], hyper[1], hyper[2], hyper[3], hyper[5], hyper[6]
    decay = hyper[4] if is_decayed else ZERO
    for c in range(param.shape[0]):
        g = scale * grad[c]
        m_new = beta1 * m[c] + (ONE - beta1) * g
        v_new = beta2 * v[c] + (ONE - beta2) * g * g
        m[c], v[c] = m_new, v_new
        param[c] -= lr * ((m_new / correction1) / (np.sqrt(v_new / correction2) + eps) + decay * param[c])


@numba.njit(nogil=True, error_model="numpy")
def _adamw(param, m, v, grad, scale, hyper, is_decayed):
    for r in range(param.shape[0]):
        adamw_row(dense(param[r]), dense(m[r]), dense(v[r]), dense(grad[r]), scale, hyper, is_decayed)


@numba.njit(nogil=True, error_model="numpy")
def _adamw_and_squares(param, m, v, grad, hyper, is_decayed):
    """Update, and return the sum of the gradient's squares: row by row, while a row is in the cache."""
    total = 0.0
    for r in range(param.shape[0]):
        row = dense(grad[r])
        total += row_squares(row)
        adamw_row(dense(param[r]), dense(m[r]), dense(v[r]), row, ONE, hyper, is_decayed)
    return total


@adamw_update.compiled
def adamw_update_twin(param, m, v, grad, hyper, is_decayed):
    _adamw(param, m, v, grad, ONE, hyper, is_decayed)


@kernel(flops=lambda OC, C: 15 * OC * C)
def adamw_scaled_update(
    param: InOut[OC, C], m: InOut[OC, C], v: InOut[OC, C], grad: In[OC, C], scale: In[1], hyper: In[7], is_decayed: int
):
    """adamw_update with scale * grad; nothing at all if scale is 0."""
    if scale[0] != 0:
        adamw_update.body(param, m, v, scale * grad, hyper, is_decayed)


@adamw_scaled_update.compiled
def adamw_scaled_update_twin(param, m, v, grad, scale, hyper, is_decayed):
    if scale[0] != ZERO:
        _adamw(param, m, v, grad, scale[0], hyper, is_decayed)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def linear_update(
    weight: InOut[OC, C],
    m_weight: InOut[OC, C],
    v_weight: InOut[OC, C],
    bias: InOut[OC],
    m_bias: InOut[OC],
    v_bias: InOut[OC],
    squares: Out[2, np.float64],
    dout: In[R, OC],
    inp: In[R, C],
    hyper: In[7],
    is_decayed: int,
    is_bias_decayed: int,
    products: int,
    dweight: Scratch[OC, C],
    dbias: Scratch[OC],
    work: Scratch[WORK],
):
    """matmul_backward_weight and matmul_backward_bias, then sum_of_squares and adamw_update of both."""
    grad, bias_grad = operand(products, dout).T @ operand(products, inp), dout.sum(axis=0)
    sum_of_squares.body(squares[:1], grad)
    sum_of_squares.body(squares[1:], bias_grad)
    adamw_update.body(weight, m_weight, v_weight, grad, hyper, is_decayed)
    adamw_update.body(bias, m_bias, v_bias, bias_grad, hyper, is_bias_decayed)


@linear_update.compiled
def linear_update_twin(
    weight, m_weight, v_weight, bias, m_bias, v_bias, squares, dout, inp, hyper, is_decayed, is_bias_decayed, products, dweight, dbias, work
):
    product(products, dweight, dout, inp, 1, 0, 0, work)
    squares[0] = _adamw_and_squares(weight, m_weight, v_weight, dweight, hyper, is_decayed)
    sum_rows(dbias, dout)
    squares[1] = row_squares(dbias)
    adamw_row(bias, m_bias, v_bias, dbias, ONE, hyper, is_bias_decayed)


@kernel(flops=lambda R, V, C: 2 * R * V * C, tags=["llmc", "gemm"])
def wte_update(
    wte: InOut[V, C],
    m: InOut[V, C],
    v: InOut[V, C],
    squares: Out[1, np.float64],
    dlogits: In[R, V],
    lnf: In[R, C],
    dencoded: In[R, C],
    tokens: In[R, np.int32],
    hyper: In[7],
    first_token: int,
    is_decayed: int,
    products: int,
    dwte: Scratch[V, C],
    work: Scratch[WORK],
):
    """matmul_backward_weight for a block of the vocabulary, encoder_backward_wte on top of it, then sum_of_squares and adamw_update."""
    grad = operand(products, dlogits).T @ operand(products, lnf)
    encoder_backward_wte.body(grad, dencoded, tokens, first_token)
    sum_of_squares.body(squares, grad)
    adamw_update.body(wte, m, v, grad, hyper, is_decayed)


@wte_update.compiled
def wte_update_twin(wte, m, v, squares, dlogits, lnf, dencoded, tokens, hyper, first_token, is_decayed, products, dwte, work):
    product(products, dwte, dlogits, lnf, 1, 0, 0, work)
    scatter_rows(dwte, dencoded, tokens, first_token)
    squares[0] = _adamw_and_squares(wte, m, v, dwte, hyper, is_decayed)


@kernel(flops=lambda R, T, C: R * C + 14 * T * C)
def wpe_update(
    wpe: InOut[T, C],
    m: InOut[T, C],
    v: InOut[T, C],
    squares: Out[1, np.float64],
    dencoded: In[R, C],
    hyper: In[7],
    first_position: int,
    seq_len: int,
    is_decayed: int,
    dwpe: Scratch[C],
):
    """encoder_backward_wpe for a block of the positions, sum_of_squares, adamw_update. Positions from `seq_len` on have gradient 0."""
    grad = np.zeros_like(wpe)
    for r in range(len(dencoded)):
        if 0 <= r % seq_len - first_position < len(wpe):
            grad[r % seq_len - first_position] += dencoded[r]
    sum_of_squares.body(squares, grad)
    adamw_update.body(wpe, m, v, grad, hyper, is_decayed)


@wpe_update.compiled
def wpe_update_twin(wpe, m, v, squares, dencoded, hyper, first_position, seq_len, is_decayed, dwpe):
    total = 0.0
    for t in range(wpe.shape[0]):
        dwpe[:] = ZERO
        if first_position + t < seq_len:
            sum_rows(dwpe, dencoded[first_position + t :: seq_len])
            total += row_squares(dwpe)
        adamw_row(dense(wpe[t]), dense(m[t]), dense(v[t]), dwpe, ONE, hyper, is_decayed)
    squares[0] = total
