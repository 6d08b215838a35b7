"""The kernels of GPT-2: matrix products, GELU, residual, embeddings. Norms, attention, classifier and updates have their own files.

Each NumPy body is the formula; the twin below it is what runs. Outputs come first, then inputs, then constants. A tag "llmc" marks the
loops that carry an OpenMP pragma in llm.c (`train_gpt2.c`), for the loops scheduler's coverage; "gemm" marks what sgemm's speed bounds, and
their flops count the product alone. Everything is float32, as in llm.c; `products` says how products are computed, which may be by way of
bfloat16 (see taskgpt.products), and `work` is what they need for it.

Two kernels in one are named after both: matmul_gelu_forward is matmul_forward, then gelu_forward while the tile is in cache. They share
their loops, and give the same bits.
"""

import math

import numba
import numpy as np

from taskgpt.gpt2.vector_math import exp32
from taskgpt.products import WORK, operand, product
from taskgpt.tasks import Commutative, In, InOut, Out, Scratch, dense, dims, kernel

R, C, OC, T, V = dims("R C OC T V")
_f = np.float32
ZERO, ONE, TWO, THREE = _f(0), _f(1), _f(2), _f(3)
GELU_SCALE = _f(math.sqrt(2 / math.pi))
GELU_CUBE = _f(0.044715)


# Matrix products ------------------------------------------------------------------------------------------------------------------------


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], products: int, work: Scratch[WORK]):
    """out = inp @ weight.T + bias."""
    np.matmul(operand(products, inp), operand(products, weight).T, out=out)
    out += bias


@numba.njit(nogil=True, error_model="numpy")
def _linear(out, inp, weight, bias, products, work):
    """The bias goes in first and the product is added to it: one pass over `out` less than adding it afterwards."""
    for r in range(out.shape[0]):
        row = dense(out[r])
        for c in range(row.shape[0]):
            row[c] = bias[c]
    product(products, out, inp, weight, 0, 1, 1, work)


@matmul_forward.compiled
def matmul_forward_twin(out, inp, weight, bias, products, work):
    _linear(out, inp, weight, bias, products, work)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_gelu_forward(
    gelu: Out[R, OC], out: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], products: int, work: Scratch[WORK]
):
    """out = inp @ weight.T + bias, gelu = gelu_forward(out)."""
    matmul_forward.body(out, inp, weight, bias, products, work)
    gelu_forward.body(gelu, out)


@matmul_gelu_forward.compiled
def matmul_gelu_forward_twin(gelu, out, inp, weight, bias, products, work):
    _linear(out, inp, weight, bias, products, work)
    _gelu(gelu, out)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_residual_forward(
    out: Out[R, OC], residual: In[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC], products: int, work: Scratch[WORK]
):
    """out = residual + (inp @ weight.T + bias)."""
    matmul_forward.body(out, inp, weight, bias, products, work)
    out += residual


@matmul_residual_forward.compiled
def matmul_residual_forward_twin(out, residual, inp, weight, bias, products, work):
    _linear(out, inp, weight, bias, products, work)
    for r in range(out.shape[0]):
        o, a = dense(out[r]), dense(residual[r])
        for c in range(o.shape[0]):
            o[c] = a[c] + o[c]


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_input(dinp: Out[R, C], dout: In[R, OC], weight: In[OC, C], products: int, work: Scratch[WORK]):
    """dinp = dout @ weight."""
    np.matmul(operand(products, dout), operand(products, weight), out=dinp)


@matmul_backward_input.compiled
def matmul_backward_input_twin(dinp, dout, weight, products, work):
    product(products, dinp, dout, weight, 0, 0, 0, work)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_input_add(dinp: Commutative[R, C], dout: In[R, OC], weight: In[OC, C], products: int, work: Scratch[WORK]):
    """dinp += dout @ weight: one block more of a sum over output columns."""
    dinp += operand(products, dout) @ operand(products, weight)


@matmul_backward_input_add.compiled
def matmul_backward_input_add_twin(dinp, dout, weight, products, work):
    product(products, dinp, dout, weight, 0, 0, 1, work)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_gelu_backward(dinp: Out[R, C], dout: In[R, OC], weight: In[OC, C], inp: In[R, C], products: int, work: Scratch[WORK]):
    """dinp = dout @ weight * d gelu(inp) / d inp: backward of a linear layer that takes gelu(inp)."""
    matmul_backward_input.body(dinp, dout, weight, products, work)
    gelu_backward.body(dinp, inp)


@matmul_gelu_backward.compiled
def matmul_gelu_backward_twin(dinp, dout, weight, inp, products, work):
    product(products, dinp, dout, weight, 0, 0, 0, work)
    _times_gelu_slope(dinp, inp)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_weight(dweight: Out[OC, C], dout: In[R, OC], inp: In[R, C], products: int, work: Scratch[WORK]):
    """dweight = dout.T @ inp, over all rows at once: no sum that could depend on an order."""
    np.matmul(operand(products, dout).T, operand(products, inp), out=dweight)


@matmul_backward_weight.compiled
def matmul_backward_weight_twin(dweight, dout, inp, products, work):
    product(products, dweight, dout, inp, 1, 0, 0, work)


@kernel(flops=lambda R, OC, C: 2 * R * OC * C, tags=["llmc", "gemm"])
def matmul_backward_weight_add(dweight: InOut[OC, C], dout: In[R, OC], inp: In[R, C], products: int, work: Scratch[WORK]):
    """dweight += dout.T @ inp: one block of rows more."""
    dweight += operand(products, dout).T @ operand(products, inp)


@matmul_backward_weight_add.compiled
def matmul_backward_weight_add_twin(dweight, dout, inp, products, work):
    product(products, dweight, dout, inp, 1, 0, 1, work)


@kernel(flops=lambda R, OC: R * OC, tags=["llmc"])
def matmul_backward_bias(dbias: Out[OC], dout: In[R, OC]):
    """dbias = the sum of dout over its rows, in their order."""
    dbias[:] = 0
    for row in dout:
        dbias += row


@numba.njit(nogil=True, error_model="numpy")
def sum_rows(total, rows):
    for c in range(total.shape[0]):
        total[c] = ZERO
    for r in range(rows.shape[0]):
        row = dense(rows[r])
        for c in range(total.shape[0]):
            total[c] += row[c]


@matmul_backward_bias.compiled
def matmul_backward_bias_twin(dbias, dout):
    sum_rows(dbias, dout)


# GELU (tanh form) and residual ----------------------------------------------------------------------------------------------------------


@numba.njit(nogil=True, error_model="numpy")
def gelu_gate(x):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)): one exp, and no cancellation where tanh is near -1.

    Off by 1.2e-7 at most, and by 2e-5 of itself; NaN gives NaN, inf 1 and -inf 0.
    """
    return ONE / (ONE + exp32(-TWO * GELU_SCALE * (x + GELU_CUBE * x * x * x)))


@kernel(flops=lambda R, C: 8 * R * C)
def gelu_forward(out: Out[R, C], inp: In[R, C]):
    """out = inp / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (inp + 0.044715 inp^3). Hendrycks and Gimpel 2016, the form of GPT-2."""
    out[:] = 0.5 * inp * (1 + np.tanh(GELU_SCALE * (inp + GELU_CUBE * inp**3)))


@numba.njit(nogil=True, error_model="numpy")
def _gelu(out, inp):
    for r in range(inp.shape[0]):
        x, y = dense(inp[r]), dense(out[r])
        for c in range(x.shape[0]):
            y[c] = x[c] * gelu_gate(x[c])


@gelu_forward.compiled
def gelu_forward_twin(out, inp):
    _gelu(out, inp)


@kernel(flops=lambda R, C: 16 * R * C)
def gelu_backward(dinp: InOut[R, C], inp: In[R, C]):
    """dinp *= d gelu(inp) / d inp, in place: on entry, dinp is the gradient of GELU's output."""
    tanh = np.tanh(GELU_SCALE * (inp + GELU_CUBE * inp**3))
    dinp *= 0.5 * (1 + tanh) + 0.5 * inp * (1 - tanh**2) * GELU_SCALE * (1 + 3 * GELU_CUBE * inp**2)


@numba.njit(nogil=True, error_model="numpy")
def _times_gelu_slope(dinp, inp):
    for r in range(inp.shape[0]):
        x, d = dense(inp[r]), dense(dinp[r])
        for c in range(x.shape[0]):
            gate = gelu_gate(x[c])
            slope = TWO * GELU_SCALE * (ONE + THREE * GELU_CUBE * x[c] * x[c])
            d[c] *= gate + x[c] * gate * (ONE - gate) * slope


@gelu_backward.compiled
def gelu_backward_twin(dinp, inp):
    _times_gelu_slope(dinp, inp)


@kernel
def residual_forward(out: Out[R, C], inp1: In[R, C], inp2: In[R, C]):
    """out = inp1 + inp2."""
    np.add(inp1, inp2, out=out)


@residual_forward.compiled
def residual_forward_twin(out, inp1, inp2):
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
def encoder_forward_twin(out, tokens, wte, wpe, first_row):
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


@numba.njit(nogil=True, error_model="numpy")
def scatter_rows(dwte, dout, tokens, first_token):
    for r in range(tokens.shape[0]):
        at = tokens[r] - first_token
        if 0 <= at < dwte.shape[0]:
            d, row = dense(dwte[at]), dense(dout[r])
            for c in range(d.shape[0]):
                d[c] += row[c]


@encoder_backward_wte.compiled
def encoder_backward_wte_twin(dwte, dout, tokens, first_token):
    scatter_rows(dwte, dout, tokens, first_token)


@kernel(flops=lambda R, C: R * C)
def encoder_backward_wpe(dwpe: Out[T, C], dout: In[R, C]):
    """dwpe[t] = the sum of dout over the sequences, at position t."""
    dwpe[:] = 0
    for start in range(0, len(dout), len(dwpe)):
        dwpe += dout[start : start + len(dwpe)]


@encoder_backward_wpe.compiled
def encoder_backward_wpe_twin(dwpe, dout):
    length = dwpe.shape[0]
    for r in range(dout.shape[0]):
        d, row = dense(dwpe[r % length]), dense(dout[r])
        for c in range(d.shape[0]):
            d[c] = row[c] if r < length else d[c] + row[c]
