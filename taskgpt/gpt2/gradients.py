"""The gradient of all parameters as one vector: its sum over micro-batches, its norm, and what becomes of it before the update.

`scale` is what every update multiplies its gradient by; 0: nothing is updated. Whether a loss or a norm is an outlier is found as
llm.c's OutlierDetector does: by its z-score among the last WINDOW values, itself included, and not before there are so many. A value that
is no finite number enters no window: all z-scores would be none for as long as it stays.
"""

import math

import numba
import numpy as np

from taskgpt.gpt2.vector_math import row_squares
from taskgpt.tasks import In, InOut, Out, dense, dims, kernel

OC, C, N = dims("OC C N")
_f = np.float32
ZERO, ONE = _f(0), _f(1)
EPS = _f(1e-6)  # torch.nn.utils.clip_grad_norm_'s
WINDOW = 128  # values
UPDATED, LOSS_OUTLIER, NORM_OUTLIER, NOT_FINITE = range(4)  # verdicts


# Sums -----------------------------------------------------------------------------------------------------------------------------------


@kernel(flops=lambda OC, C: OC * C)
def gradient_add(total: InOut[OC, C], part: In[OC, C]):
    """total += part: the gradient of one micro-batch more."""
    total += part


@gradient_add.compiled
def gradient_add_twin(total, part):
    for r in range(total.shape[0]):
        t, p = dense(total[r]), dense(part[r])
        for c in range(t.shape[0]):
            t[c] += p[c]


@kernel(flops=lambda OC, C: 2 * OC * C)
def sum_of_squares(squares: Out[1, np.float64], grad: In[OC, C]):
    """squares = the sum of grad^2: of each row in float32, of the rows in their order in float64."""
    squares[0] = np.square(grad).sum(dtype=np.float64)


@sum_of_squares.compiled
def sum_of_squares_twin(squares, grad):
    total = 0.0
    for r in range(grad.shape[0]):
        total += row_squares(dense(grad[r]))
    squares[0] = total


@kernel(flops=lambda N: N)
def gradient_norm(norm: Out[1], squares: In[N, np.float64]):
    """norm = sqrt(sum of squares), added in their order in float64."""
    norm[0] = np.sqrt(np.add.accumulate(squares)[-1])


@gradient_norm.compiled
def gradient_norm_twin(norm, squares):
    total = 0.0
    for n in range(squares.shape[0]):
        total += squares[n]
    norm[0] = math.sqrt(total)


# What becomes of it ---------------------------------------------------------------------------------------------------------------------


@kernel
def gradient_scale(scale: Out[1], verdict: Out[1, np.int32], loss: In[1], norm: In[1], clip_norm: float):
    """scale = min(1, clip_norm / (norm + 1e-6)), 1 for clip_norm = 0; a step whose loss or norm is not finite updates nothing."""
    verdict[0] = UPDATED if np.isfinite(loss[0]) and np.isfinite(norm[0]) else NOT_FINITE
    clipped = min(ONE, _f(clip_norm) / (norm[0] + EPS)) if clip_norm else ONE
    scale[0] = clipped if verdict[0] == UPDATED else ZERO


@numba.njit(nogil=True, error_model="numpy")
def _scale(verdict, norm, clip_norm):
    if verdict != UPDATED:
        return ZERO
    if clip_norm == 0:
        return ONE
    return min(ONE, _f(clip_norm) / (norm + EPS))


@gradient_scale.compiled
def gradient_scale_twin(scale, verdict, loss, norm, clip_norm):
    verdict[0] = UPDATED if math.isfinite(loss[0]) and math.isfinite(norm[0]) else NOT_FINITE
    scale[0] = _scale(verdict[0], norm[0], clip_norm)


def _z_score(window, seen, at, value):
    """Put a finite value into its window in the place of the oldest; return its z-score there, 0 while the window fills."""
    if not math.isfinite(value):
        return 0.0
    was_full = seen[at] >= len(window)
    window[seen[at] % len(window)] = value
    seen[at] += 1
    if not was_full:
        return 0.0
    mean = total = 0.0
    for n in range(len(window)):
        mean += window[n]
    mean /= len(window)
    for n in range(len(window)):
        total += (window[n] - mean) * (window[n] - mean)
    deviation = math.sqrt(total / len(window))
    return (value - mean) / deviation if deviation > 0 else 0.0


_compiled_z_score = numba.njit(nogil=True, error_model="numpy")(_z_score)


@kernel
def gradient_guard(
    scale: Out[1],
    verdict: Out[1, np.int32],
    z: Out[2, np.float64],
    loss_window: InOut[N, np.float64],
    norm_window: InOut[N, np.float64],
    seen: InOut[2, np.int64],
    loss: In[1],
    norm: In[1],
    clip_norm: float,
    most_loss_z: float,
    most_norm_z: float,
):
    """gradient_scale, but 0 also for a loss or a norm whose z-score is above its limit, if there is one (not 0).

    Every finite value enters its window, an outlier too. `seen` counts the values of each.
    """
    gradient_scale.body(scale, verdict, loss, norm, clip_norm)
    z[:] = _z_score(loss_window, seen, 0, float(loss[0])), _z_score(norm_window, seen, 1, float(norm[0]))
    for at, most, found in ((0, most_loss_z, LOSS_OUTLIER), (1, most_norm_z, NORM_OUTLIER)):
        if verdict[0] == UPDATED and most and z[at] > most:
            verdict[0], scale[0] = found, ZERO


@gradient_guard.compiled
def gradient_guard_twin(scale, verdict, z, loss_window, norm_window, seen, loss, norm, clip_norm, most_loss_z, most_norm_z):
    z[0] = _compiled_z_score(loss_window, seen, 0, loss[0])
    z[1] = _compiled_z_score(norm_window, seen, 1, norm[0])
    if not (math.isfinite(loss[0]) and math.isfinite(norm[0])):
        verdict[0] = NOT_FINITE
    elif most_loss_z != 0 and z[0] > most_loss_z:
        verdict[0] = LOSS_OUTLIER
    elif most_norm_z != 0 and z[1] > most_norm_z:
        verdict[0] = NORM_OUTLIER
    else:
        verdict[0] = UPDATED
    scale[0] = _scale(verdict[0], norm[0], clip_norm)
