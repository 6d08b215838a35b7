"""The classifier: logits, softmax and cross-entropy over the vocabulary, and the gradient of the logits. A task takes whole rows.

llm.c's three passes over the logits are here as three kernels and as one, softmax_crossentropy; both give the same bits. The vocabulary is
padded: of each row the first `valid` logits count.
"""

import numba
import numpy as np

from taskgpt.gpt2.vector_math import exp32, exp_row
from taskgpt.products import WORK, operand, product
from taskgpt.tasks import In, InOut, Out, Scratch, dense, dims, kernel

R, C, V = dims("R C V")
_f = np.float32
ZERO, ONE = _f(0), _f(1)


@kernel(flops=lambda R, V, C: 2 * R * V * C, tags=["llmc", "gemm"])
def lmhead_forward(logits: Out[R, V], inp: In[R, C], wte: In[V, C], products: int, work: Scratch[WORK]):
    """logits = inp @ wte.T, for a block of the vocabulary."""
    np.matmul(operand(products, inp), operand(products, wte).T, out=logits)


@lmhead_forward.compiled
def lmhead_forward_twin(logits, inp, wte, products, work):
    product(products, logits, inp, wte, 0, 1, 0, work)


@kernel(flops=lambda R, V: 4 * R * V, tags=["llmc"])
def softmax_forward(logits_max: Out[R], logits_rsum: Out[R], logits: In[R, V], valid: int, row: Scratch[V]):
    """What the softmax of a row is made of: its largest logit, and 1 / sum of exp(logit - largest)."""
    logits_max[:] = logits[:, :valid].max(axis=1)
    logits_rsum[:] = 1 / np.exp(logits[:, :valid] - logits_max[:, None]).sum(axis=1)


@softmax_forward.compiled
def softmax_forward_twin(logits_max, logits_rsum, logits, valid, row):
    for r in range(logits.shape[0]):
        source = dense(logits[r])
        for v in range(valid):
            row[v] = source[v]
        largest, total = exp_row(row[:valid])
        logits_max[r], logits_rsum[r] = largest, ONE / total


@numba.njit(nogil=True, error_model="numpy")
def _loss(logit, largest, rsum):
    return (largest - logit) - np.log(rsum)


@kernel(bytes=lambda R: 4 * 5 * R)  # of the logits, one a row
def crossentropy_forward(losses: Out[R], logits: In[R, V], logits_max: In[R], logits_rsum: In[R], targets: In[R, np.int32]):
    """losses[r] = -log softmax(logits[r])[targets[r]]."""
    losses[:] = logits_max - logits[np.arange(len(targets)), targets] - np.log(logits_rsum)


@crossentropy_forward.compiled
def crossentropy_forward_twin(losses, logits, logits_max, logits_rsum, targets):
    for r in range(losses.shape[0]):
        losses[r] = _loss(logits[r, targets[r]], logits_max[r], logits_rsum[r])


@kernel(flops=lambda R: R)
def loss_forward(loss: Out[1], losses: In[R]):
    """loss = the mean of losses, summed in their order in float32 as llm.c does."""
    loss[0] = np.add.accumulate(losses)[-1] / _f(len(losses))


@loss_forward.compiled
def loss_forward_twin(loss, losses):
    total = ZERO
    for r in range(losses.shape[0]):
        total += losses[r]
    loss[0] = total / _f(losses.shape[0])


@kernel
def loss_add(total: InOut[1, np.float64], loss: In[1], is_first: int):
    """total = loss, or total += loss: the sum over the micro-batches of a step."""
    total[0] = loss[0] + (0 if is_first else total[0])


@loss_add.compiled
def loss_add_twin(total, loss, is_first):
    if is_first:
        total[0] = loss[0]
    else:
        total[0] += loss[0]


@kernel
def loss_mean(loss: Out[1], total: In[1, np.float64], count: int):
    """loss = total / count: the mean over the micro-batches of a step, each of which has as many rows."""
    loss[0] = total[0] / count


@loss_mean.compiled
def loss_mean_twin(loss, total, count):
    loss[0] = total[0] / count


@kernel(flops=lambda R, V: 4 * R * V)
def crossentropy_backward(dlogits: InOut[R, V], logits_max: In[R], logits_rsum: In[R], targets: In[R, np.int32], valid: int, scale: float):
    """dlogits = (softmax(logits) - one-hot(targets)) * scale, in place: on entry, dlogits holds the logits. Padding gets 0."""
    dlogits[:, valid:] = 0
    dlogits[:, :valid] = np.exp(dlogits[:, :valid] - logits_max[:, None]) * (logits_rsum[:, None] * _f(scale))
    dlogits[np.arange(len(targets)), targets] -= _f(scale)


@numba.njit(nogil=True, error_model="numpy")
def _scale_and_subtract(row, target, valid, rsum, scale):
    """From exp(logit - largest) to the gradient."""
    factor = rsum * scale
    for v in range(valid):
        row[v] *= factor
    for v in range(valid, row.shape[0]):
        row[v] = ZERO
    row[target] -= scale


@crossentropy_backward.compiled
def crossentropy_backward_twin(dlogits, logits_max, logits_rsum, targets, valid, scale):
    for r in range(dlogits.shape[0]):
        row, largest = dense(dlogits[r]), logits_max[r]
        for v in range(valid):
            row[v] = exp32(row[v] - largest)
        _scale_and_subtract(row, targets[r], valid, logits_rsum[r], _f(scale))


@kernel(flops=lambda R, V: 6 * R * V)
def softmax_crossentropy(losses: Out[R], dlogits: InOut[R, V], targets: In[R, np.int32], valid: int, scale: float):
    """softmax_forward, crossentropy_forward and crossentropy_backward in one pass, with one exp for each logit."""
    largest, rsum = np.empty_like(losses), np.empty_like(losses)
    softmax_forward.body(largest, rsum, dlogits, valid, None)
    crossentropy_forward.body(losses, dlogits, largest, rsum, targets)
    crossentropy_backward.body(dlogits, largest, rsum, targets, valid, scale)


@softmax_crossentropy.compiled
def softmax_crossentropy_twin(losses, dlogits, targets, valid, scale):
    for r in range(dlogits.shape[0]):
        row, target = dense(dlogits[r]), targets[r]
        logit = row[target]
        largest, total = exp_row(row[:valid])
        rsum = ONE / total
        losses[r] = _loss(logit, largest, rsum)
        _scale_and_subtract(row, target, valid, rsum, _f(scale))
