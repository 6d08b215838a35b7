"""Kernels compute what they say: compiled twins agree with their NumPy bodies, and backward bodies with finite differences."""

import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types
from numba.core.runtime import _nrt_python, rtsys
from numba.extending import intrinsic

from taskgpt.gpt2 import attention, classifier, gradients, kernels, norms, updates
from taskgpt.gpt2.vector_math import exp32, exp_row, power_of_2, row_max, row_sum
from taskgpt.products import BLAS, OWN_BF16, OWN_FP32
from taskgpt.products.instruction_sets import of_this_machine
from taskgpt.tasks import Kernel
from taskgpt.tasks.scratch import scratch_arrays

MODULES = kernels, norms, attention, classifier, updates, gradients
ALL = {k.name: k for module in MODULES for k in vars(module).values() if isinstance(k, Kernel)}
HEAD = 8
WAYS = {"blas": BLAS, "own": OWN_FP32, "bf16": OWN_BF16} if of_this_machine() else {"blas": BLAS}
CASES = [(name, way) for name in sorted(ALL) for way in (WAYS if "products" in ALL[name].parameters else ["blas"])]
# Sizes that no vector width divides, one of everything, and more than one attention block.
SIZES = [
    {"R": 13, "C": 19, "OC": 23, "T": 5, "S": 9, "V": 37, "H": 2 * HEAD, "N": 2},
    {"R": 1, "C": 1, "OC": 1, "T": 1, "S": 1, "V": 1, "H": HEAD, "N": 1},
    {"R": 130, "C": 64, "OC": 48, "T": 65, "S": 130, "V": 160, "H": 3 * HEAD, "N": 3},
    {"R": 7, "C": 3, "OC": 5, "T": 149, "S": 300, "V": 11, "H": 2 * 48, "N": 2},  # heads of whole vectors, more than one strip of attention
]
NAMES = ["ragged", "ones", "blocks", "strips"]


def body(kernel: Kernel, *args) -> None:
    """Run the NumPy body, which takes its scratch like the twin."""
    kernel.body(*args, *scratch_arrays(kernel.scratch_shapes(args)))


def arguments(kernel: Kernel, sizes: dict, seed: int, products: int = BLAS) -> dict:
    """Return arguments that a training step could pass: tiles inside larger arrays, ids within the vocabulary, statistics of real rows."""
    rng = np.random.default_rng(seed)
    if kernel.name in ("encoder_backward_wpe", "wpe_update"):
        sizes = {**sizes, "R": 3 * sizes["T"]}
    constants = {
        "first_row": 2,
        "first_token": 0,
        "valid": max(1, sizes["V"] - 5),
        "scale": 0.25,
        "is_decayed": 1,
        "is_bias_decayed": 0,
        "first_position": 1,
        "seq_len": max(1, sizes["T"] - 1),
        "head_size": sizes["H"] // sizes["N"],
        "clip_norm": 0.5,
        "most_loss_z": 0.5,
        "most_norm_z": 0.5,
        "is_first": 0,
        "count": 3,
        "products": products,
    }
    given = {}
    for name, declared in kernel.parameters.items():
        if name not in kernel.accesses:
            given[name] = constants[name]
            continue
        shape = [d if isinstance(d, int) else sizes[d] for d in declared.dims]
        whole = rng.normal(size=[n + 3 * (len(shape) > 1) for n in shape]).astype(declared.dtype)
        given[name] = whole[tuple(slice(1, 1 + n) for n in shape)] if len(shape) > 1 else whole
        if declared.dtype == np.int32:
            given[name] = rng.integers(0, constants["valid"], shape).astype(np.int32)
    if "hyper" in given:
        given["hyper"][:] = [1e-3, 0.9, 0.999, 1e-8, 0.1, 0.1, 0.001]
        for name in ("v", "v_weight", "v_bias"):
            if name in given:
                given[name][:] = given[name] ** 2
    for name in ("squares", "norm"):
        if name in given:
            given[name][:] = given[name] ** 2
    if "seen" in given:
        given["seen"][:] = sizes["N"] + 1  # windows are full
    if "logits_rsum" in given:
        given["logits_rsum"][:] = 1 / (1 + given["logits_rsum"] ** 2)
    if "inp" in given and "mean" in given and kernel.accesses["mean"].kind == "in":
        given["mean"][:] = given["inp"].mean(axis=1)
        given["rstd"][:] = 1 / np.sqrt(given["inp"].var(axis=1) + 1e-5)
    if kernel.name == "attention_backward":
        names = ("atty", "att_max", "att_rsum", "q", "k", "v")
        body(attention.attention_forward, *(given[n] for n in names), constants["head_size"], products)
    return given


@pytest.mark.parametrize("sizes", SIZES, ids=NAMES)
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda word: word)
def test_the_twin_agrees_with_the_body(name, way, sizes):
    """Every element that the compiled twin writes is within float32 rounding of what the NumPy body computes in float64.

    Where bfloat16 is made of what was computed before, as attention does, two that are nearly the same may round to neighbours.
    """
    kernel = ALL[name]
    given = arguments(kernel, sizes, seed=1, products=WAYS[way])
    tolerance = 2e-3 if way == "bf16" and name.startswith("attention") else 2e-6
    wanted = {n: a.astype(np.float64 if a.dtype == np.float32 else a.dtype) if isinstance(a, np.ndarray) else a for n, a in given.items()}
    body(kernel, *wanted.values())
    kernel(*given.values())
    for parameter, access in kernel.accesses.items():
        if access.is_written:
            got, want = given[parameter], wanted[parameter]
            assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want) + 1e-6, parameter


@pytest.fixture
def allocation_stats():
    _nrt_python.memsys_enable_stats()
    yield rtsys.get_allocation_stats
    _nrt_python.memsys_disable_stats()


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[3]], ids=[NAMES[0], NAMES[3]])
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda word: word)
def test_no_kernel_allocates(name, way, sizes, allocation_stats):
    """Working memory is declared: a compiled call makes nothing but numba's note of each array that it is given."""
    kernel = ALL[name]
    given = arguments(kernel, sizes, seed=1, products=WAYS[way]).values()
    arrays = [*given, *scratch_arrays(kernel.scratch_shapes(given))]
    kernel(*given)
    before = allocation_stats().mi_alloc
    kernel.function(*arrays)
    assert allocation_stats().mi_alloc - before == sum(isinstance(a, np.ndarray) for a in arrays)


def test_every_kernel_has_a_twin():
    """No kernel runs as Python: each has a compiled twin."""
    assert ALL
    assert all(kernel.function is not kernel.body for kernel in ALL.values())


# Finite differences -------------------------------------------------------------------------------------------------------------------


def numeric_gradient(forward, x: np.ndarray, dout: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """Return d sum(forward() * dout) / dx by central differences in float64; forward reads x."""
    gradient = np.empty_like(x)
    for at in np.ndindex(x.shape):
        before = x[at]
        x[at] = before + h
        high = (forward() * dout).sum()
        x[at] = before - h
        low = (forward() * dout).sum()
        x[at] = before
        gradient[at] = (high - low) / (2 * h)
    return gradient


def random(*shape) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return np.linalg.norm(got - want) <= 1e-6 * (1 + np.linalg.norm(want))


def test_matmul_backward_is_the_gradient_of_matmul_forward():
    """Input, weight and bias."""
    inp, weight, bias, dout, out = random(5, 7), random(3, 7), random(3), random(5, 3), np.empty((5, 3))

    def forward():
        kernels.matmul_forward.body(out, inp, weight, bias, BLAS, None)
        return out

    dinp, dweight, dbias = np.empty_like(inp), np.empty_like(weight), np.empty_like(bias)
    kernels.matmul_backward_input.body(dinp, dout, weight, BLAS, None)
    kernels.matmul_backward_weight.body(dweight, dout[:2], inp[:2], BLAS, None)
    kernels.matmul_backward_weight_add.body(dweight, dout[2:], inp[2:], BLAS, None)
    kernels.matmul_backward_bias.body(dbias, dout)
    for got, x in ((dinp, inp), (dweight, weight), (dbias, bias)):
        assert close(got, numeric_gradient(forward, x, dout))


def test_epilogues_are_compositions():
    """GELU, then a linear layer with its residual connection: forward is the composition, backward its gradient."""
    fch, weight, bias, residual, dout = random(5, 7), random(3, 7), random(3), random(5, 3) / 2, random(5, 3)
    gelu, out, dfch = np.empty((5, 7)), np.empty((5, 3)), np.empty((5, 7))

    def forward():
        kernels.gelu_forward.body(gelu, fch)
        kernels.matmul_residual_forward.body(out, residual, gelu, weight, bias, BLAS, None)
        return out

    wanted = numeric_gradient(forward, fch, dout)
    kernels.matmul_gelu_backward.body(dfch, dout, weight, fch, BLAS, None)
    assert close(dfch, wanted)
    both, alone = np.empty((5, 3)), np.empty((5, 3))
    kernels.matmul_gelu_forward.body(both, out, gelu, weight, bias, BLAS, None)
    kernels.gelu_forward.body(alone, out)
    assert close(both, alone)


def test_layernorm_backward_is_the_gradient_of_layernorm_forward():
    """Input, weight and bias; with a residual gradient, that is added."""
    inp, weight, bias, dout, out, mean, rstd = random(4, 9), random(9), random(9), random(4, 9), np.empty((4, 9)), np.empty(4), np.empty(4)

    def forward():
        norms.layernorm_forward.body(out, mean, rstd, inp, weight, bias)
        return out

    wanted = [numeric_gradient(forward, x, dout) for x in (inp, weight, bias)]
    forward()
    dinp, both, dweight, dbias = np.empty_like(inp), np.empty_like(inp), np.empty_like(weight), np.empty_like(bias)
    norms.layernorm_backward.body(dinp, dout, inp, weight, mean, rstd)
    norms.layernorm_backward_weight.body(dweight, dbias, dout, inp, mean, rstd)
    norms.layernorm_residual_backward.body(both, dout, dout, inp, weight, mean, rstd)
    for got, want in zip((dinp, dweight, dbias), wanted, strict=True):
        assert close(got, want)
    assert close(both, wanted[0] + dout)


def test_gelu_backward_is_the_gradient_of_gelu_forward():
    """In place: the gradient of the output becomes that of the input."""
    inp, dout, out = 3 * random(4, 9), random(4, 9), np.empty((4, 9))

    def forward():
        kernels.gelu_forward.body(out, inp)
        return out

    wanted = numeric_gradient(forward, inp, dout)
    dinp = dout.copy()
    kernels.gelu_backward.body(dinp, inp)
    assert close(dinp, wanted)


def test_attention_backward_is_the_gradient_of_attention_forward():
    """Query, key and value, several heads at once."""
    q, k, v, dout = random(6, 16), random(6, 16) / 2, random(6, 16) / 3, random(6, 16) / 4
    atty, largest, rsum = np.empty_like(q), np.empty((6, 2)), np.empty((6, 2))

    def forward():
        body(attention.attention_forward, atty, largest, rsum, q, k, v, HEAD, BLAS)
        return atty

    wanted = [numeric_gradient(forward, x, dout) for x in (q, k, v)]
    forward()
    got = [np.empty_like(q) for _ in range(3)]
    body(attention.attention_backward, *got, dout, atty, q, k, v, largest, rsum, HEAD, BLAS)
    for g, w in zip(got, wanted, strict=True):
        assert close(g, w)


@pytest.mark.parametrize("is_fused", [False, True])
def test_the_classifier_gives_the_gradient_of_the_mean_loss(is_fused):
    """In three kernels and in one; padding has gradient zero."""
    R, V, valid = 4, 12, 9
    logits, targets = random(R, V), np.array([0, 5, 6, 8])
    losses, largest, rsum = np.empty(R), np.empty(R), np.empty(R)

    def forward():
        body(classifier.softmax_forward, largest, rsum, logits, valid)
        classifier.crossentropy_forward.body(losses, logits, largest, rsum, targets)
        return losses

    wanted, wanted_losses = numeric_gradient(forward, logits, np.full(R, 1 / R)), forward().copy()
    if is_fused:
        classifier.softmax_crossentropy.body(losses, logits, targets, valid, 1 / R)
    else:
        classifier.crossentropy_backward.body(logits, largest, rsum, targets, valid, 1 / R)
    assert close(logits, wanted)
    assert close(losses, wanted_losses)
    assert not logits[:, valid:].any()


def test_encoder_backward_is_the_gradient_of_encoder_forward():
    """Token and position embedding; a token that occurs twice gets both rows, in blocks of the vocabulary."""
    tokens, wte, wpe, dout, out = np.array([3, 1, 3, 0, 5, 3]), random(7, 4), random(3, 4), random(6, 4), np.empty((6, 4))

    def forward():
        kernels.encoder_forward.body(out, tokens, wte, wpe, 0)
        return out

    dwte, dwpe = np.zeros_like(wte), np.empty_like(wpe)
    for first in (0, 4):
        kernels.encoder_backward_wte.body(dwte[first : first + 4], dout, tokens, first)
    kernels.encoder_backward_wpe.body(dwpe, dout)
    assert close(dwte, numeric_gradient(forward, wte, dout))
    assert close(dwpe, numeric_gradient(forward, wpe, dout))


# Vector math --------------------------------------------------------------------------------------------------------------------------


@numba.njit
def exp_of_all(out, x):
    for i in range(x.shape[0]):
        out[i] = exp32(x[i])


def every_exponent() -> np.ndarray:
    """float32 numbers of either sign: every exponent, subnormals among them, with mantissas drawn and at both ends."""
    mantissas = np.concatenate([[0, 1, 2**23 - 1], np.random.default_rng(7).integers(0, 2**23, 1000)])
    bits = (np.arange(255)[:, None] << 23 | mantissas[None, :]).ravel().astype(np.uint32)
    return np.concatenate([bits, bits | 1 << 31]).astype(np.uint32).view(np.float32)


def test_exp32_is_within_2e_7_of_exp_over_all_float32():
    """Against float64: where the result is a normal number, and 0 or inf where it is not."""
    dense_range = np.linspace(-87.33, 88.37, 1_000_001).astype(np.float32)
    x = np.concatenate([every_exponent(), dense_range])
    out = np.empty_like(x)
    exp_of_all(out, x)
    low, high = x < -87.3365, x > 88.3763
    normal = ~low & ~high
    assert np.abs(out[normal] / np.exp(x[normal].astype(np.float64)) - 1).max() < 2e-7
    assert (out[low] == 0).all() and (out[high] == np.inf).all()


def test_exp32_keeps_nan_and_the_limits():
    """NaN stays NaN, overflow is inf, underflow is 0, exp(0) is exactly 1."""
    x = np.array([np.nan, -np.nan, np.inf, -np.inf, 1000, -1000, 0, -0.0, 1e-30], np.float32)
    out = np.empty_like(x)
    exp_of_all(out, x)
    np.testing.assert_array_equal(out, np.array([np.nan, np.nan, np.inf, 0, np.inf, 0, 1, 1, 1], np.float32))


@intrinsic
def raise_2(typing_context, address):
    """Replace 16 float32 at an address by the powers of 2."""

    def codegen(context, build, signature, args):
        place = build.inttoptr(args[0], ir.VectorType(ir.FloatType(), 16).as_pointer())
        build.store(power_of_2(build, build.load(place, align=4)), place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@numba.njit
def raise_2_to_all(x):
    for i in range(0, x.shape[0], 16):
        raise_2(x[i:].ctypes.data)


def test_powers_of_2_are_within_2e_7_over_all_float32():
    """Against float64, up to 127; 0 where the result is no normal number, and of -inf; NaN stays NaN; 2**0 is exactly 1."""
    x = np.concatenate([every_exponent(), np.linspace(-126.5, 127, 1_000_001).astype(np.float32)])
    x = x[x <= 127]
    x = np.concatenate([x, np.zeros(-len(x) % 16, np.float32)])
    out = x.copy()
    raise_2_to_all(out)
    normal = x >= -126
    assert np.abs(out[normal] / 2.0 ** x[normal].astype(np.float64) - 1).max() < 2e-7
    assert (out[x < -126.5] == 0).all()
    limits = np.array([np.nan, -np.nan, -np.inf, -1000, 0, -0.0, 1, -1] * 2, np.float32)
    raise_2_to_all(limits)
    np.testing.assert_array_equal(limits, np.array([np.nan, np.nan, 0, 0, 1, 1, 2, 0.5] * 2, np.float32))


@numba.njit(error_model="numpy")
def gate_of_all(out, x):
    for i in range(x.shape[0]):
        out[i] = kernels.gelu_gate(x[i])


def test_the_gate_of_gelu_over_all_float32():
    """Against (1 + tanh(u)) / 2 in float64: absolute and relative error as its docstring says; NaN stays NaN, the limits are 0 and 1."""
    x = np.concatenate([every_exponent(), np.linspace(-12, 12, 1_000_001).astype(np.float32)])
    out = np.empty_like(x)
    gate_of_all(out, x)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = 1 / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    assert np.abs(out - wanted).max() < 1.2e-7
    normal = wanted > 2.0**-125
    assert np.abs(out[normal] / wanted[normal] - 1).max() < 2e-5
    limits = np.array([np.nan, np.inf, -np.inf, 0], np.float32)
    out = np.empty_like(limits)
    gate_of_all(out, limits)
    np.testing.assert_array_equal(out, np.array([np.nan, 1, 0, 0.5], np.float32))


@numba.njit
def reductions(row):
    return row_sum(row), row_max(row), exp_row(row)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 63, 64, 65, 100, 200])
def test_row_reductions_agree_with_numpy(length):
    """Sum, maximum, and exponentials with their sum, whatever is left over after whole vectors."""
    row = np.random.default_rng(length).normal(size=length).astype(np.float32)
    exponentials = np.exp(row.astype(np.float64) - row.max(initial=-np.inf))
    total, largest, (again, exp_total) = reductions(given := row.copy())
    assert total == pytest.approx(row.sum(dtype=np.float64), rel=1e-5, abs=1e-5)
    assert largest == again == row.max(initial=-np.inf)
    assert exp_total == pytest.approx(exponentials.sum(), rel=1e-6)
    np.testing.assert_allclose(given, exponentials, rtol=1e-6)


@pytest.mark.parametrize("at", [0, 7, 39])
def test_a_nan_logit_makes_the_loss_nan(at):
    """A diverged model is noticed, not averaged away."""
    logits, losses = np.zeros((1, 41), np.float32), np.zeros(1, np.float32)
    logits[0, at] = np.nan
    classifier.softmax_crossentropy(losses, logits, np.zeros(1, np.int32), 40, 1.0)
    assert np.isnan(losses[0])


def test_adamw_leaves_zero_parameters_without_gradient_at_zero():
    """So the padding rows of wte stay zero for ever, decay or not."""
    given = arguments(updates.adamw_update, SIZES[0], seed=2)
    for name in ("param", "m", "v", "grad"):
        given[name][:] = 0
    updates.adamw_update(*given.values())
    assert not given["param"].any()
