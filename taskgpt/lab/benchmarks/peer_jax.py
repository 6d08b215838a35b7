"""GPT-2 in JAX: one compiled step that updates parameters and moments in place. XLA's threads are as many as our workers.

Each layer has arrays of its own: gradients of stacked ones are added up layer by layer, which takes 1.7 x as long (CPU time of GPT-2 124M's
step, B=4, T=64, on one thread).
"""

import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from taskgpt.lab.benchmarks.peer_process import Peer, Start

VERSION = jax.__version__
TOP = ("wte", "wpe", "lnfw", "lnfb")
Parameters = dict  # {name: array} of the top, and under "layers" a list of such dictionaries


def prepare(workers: int) -> None:
    os.environ["PJRT_NPROC"] = str(workers)  # read when JAX first computes


def remark() -> str:
    return ""


def loss_of(p: Parameters, tokens: jax.Array, targets: jax.Array, heads: int, dtype: jnp.dtype) -> jax.Array:
    """Return the mean cross-entropy. Products take operands of that type and give float32, in which all else is computed."""
    B, T = tokens.shape
    C = p["wte"].shape[1]
    x = p["wte"][tokens] + p["wpe"][:T]
    for q in p["layers"]:
        qkv = linear(norm(x, q["ln1w"], q["ln1b"]), q["qkvw"], dtype) + q["qkvb"]
        y = jax.nn.dot_product_attention(*(part.reshape(B, T, heads, -1) for part in jnp.split(qkv, 3, axis=-1)), is_causal=True)
        x = x + linear(y.reshape(B, T, C), q["attprojw"], dtype) + q["attprojb"]
        fch = linear(norm(x, q["ln2w"], q["ln2b"]), q["fcw"], dtype) + q["fcb"]
        x = x + linear(jax.nn.gelu(fch, approximate=True), q["fcprojw"], dtype) + q["fcprojb"]
    logits = linear(norm(x, p["lnfw"], p["lnfb"]), p["wte"], dtype)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - at_target).mean()


def linear(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x @ weight.T in float32."""
    over_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), over_last, preferred_element_type=jnp.float32)


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * weight + bias


def multiply(a: np.ndarray, weight: np.ndarray, precision: str) -> Callable[[], object]:
    """Return what computes a @ weight.T."""
    product = jax.jit(lambda a, weight: linear(a, weight, a.dtype))
    operands = [jnp.array(array, precision) for array in (a, weight)]
    return lambda: jax.block_until_ready(product(*operands))


def peers(start: Start, precisions: list[str]) -> Iterator[Peer]:
    """Yield JAX's way to train in each precision; they take turns with one set of parameters."""
    lr, beta1, beta2, eps, decay = start.hyper
    heads, tokens, targets = start.heads, jnp.array(start.tokens, jnp.int32), jnp.array(start.targets, jnp.int32)
    state: dict = {}

    def reset() -> None:
        state["p"] = {name: jnp.array(start.parameters[name]) for name in TOP[:2]}
        state["p"] |= {name: jnp.array(start.parameters[name][0]) for name in TOP[2:]}
        names = [name for name in start.parameters if name not in TOP]
        layers = len(start.parameters["ln1w"])
        state["p"]["layers"] = [{name: jnp.array(start.parameters[name][l]) for name in names} for l in range(layers)]
        state["m"], state["v"] = (jax.tree.map(jnp.zeros_like, state["p"]) for _ in range(2))
        state["t"] = jnp.zeros((), jnp.float32)

    def way(precision: str) -> Peer:
        def update(state: dict, tokens: jax.Array, targets: jax.Array) -> tuple[dict, jax.Array]:
            loss, g = jax.value_and_grad(loss_of)(state["p"], tokens, targets, heads, jnp.dtype(precision))
            t = state["t"] + 1
            m = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], g)
            v = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state["v"], g)
            p = jax.tree.map(
                lambda p, m, v: p - lr * ((m / (1 - beta1**t)) / (jnp.sqrt(v / (1 - beta2**t)) + eps) + decay * p), state["p"], m, v
            )
            return {"p": p, "m": m, "v": v, "t": t}, loss

        compiled = jax.jit(update, donate_argnums=0)

        def step() -> float:
            after, loss = compiled(dict(state), tokens, targets)
            state.update(jax.block_until_ready(after))
            return float(loss)

        return Peer("jax.jit", precision, reset, step)

    yield from map(way, precisions)
