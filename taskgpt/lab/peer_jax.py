"""GPT-2 in JAX: one compiled step that updates parameters and moments in place. XLA's threads are as many as our workers."""

import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from taskgpt.gpt2.model import GPT2
from taskgpt.lab.peers import Peer


def loss_of(p: dict[str, jax.Array], tokens: jax.Array, targets: jax.Array, heads: int) -> jax.Array:
    """Return the mean cross-entropy; `p` holds our tensors under our names."""
    B, T = tokens.shape
    C = p["wte"].shape[1]
    x = p["wte"][tokens] + p["wpe"][:T]
    for l in range(p["ln1w"].shape[0]):
        q, k, v = (
            part.reshape(B, T, heads, -1)
            for part in jnp.split(linear(norm(x, p["ln1w"][l], p["ln1b"][l]), p["qkvw"][l], p["qkvb"][l]), 3, axis=-1)
        )
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(B, T, C)
        x = x + linear(y, p["attprojw"][l], p["attprojb"][l])
        fch = linear(norm(x, p["ln2w"][l], p["ln2b"][l]), p["fcw"][l], p["fcb"][l])
        x = x + linear(jax.nn.gelu(fch, approximate=True), p["fcprojw"][l], p["fcprojb"][l])
    logits = norm(x, p["lnfw"][0], p["lnfb"][0]) @ p["wte"].T
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - at_target).mean()


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ weight.T + bias


def norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5) * weight + bias


def adamw(p: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, t: jax.Array, hyper: list[float]) -> tuple[jax.Array, ...]:
    lr, beta1, beta2, eps, decay = hyper
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    return p - lr * ((m / (1 - beta1**t)) / (jnp.sqrt(v / (1 - beta2**t)) + eps) + decay * p), m, v


def multiply(a: np.ndarray, weight: np.ndarray, workers: int) -> Callable[[], object]:
    """Return what computes a @ weight.T."""
    os.environ["PJRT_NPROC"] = str(workers)  # read when JAX first computes
    product = jax.jit(lambda a, weight: a @ weight.T)
    operands = jnp.array(a), jnp.array(weight)
    return lambda: jax.block_until_ready(product(*operands))


def peers(m: GPT2, workers: int) -> Iterator[Peer]:
    """Yield JAX's way to train, on as many threads as the first product."""
    hyper = m.s.hyper.array[:5].tolist()
    shape = m.batch.batch_size, m.batch.seq_len
    state: dict[str, dict] = {}

    def reset() -> None:
        # Without the padding of wte, which is no part of the model.
        state["p"] = {name: jnp.array(t.array[: m.model.vocabulary] if name == "wte" else t.array) for name, t in m.p.tensors.items()}
        state["m"], state["v"] = ({name: jnp.zeros_like(array) for name, array in state["p"].items()} for _ in range(2))
        state["t"] = jnp.zeros((), jnp.float32)

    def update(state: dict, tokens: jax.Array, targets: jax.Array) -> tuple[dict, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(state["p"], tokens, targets, m.model.heads)
        t = state["t"] + 1
        new = {name: adamw(state["p"][name], state["m"][name], state["v"][name], g, t, hyper) for name, g in gradients.items()}
        return {"t": t, **{key: {name: each[at] for name, each in new.items()} for at, key in enumerate("pmv")}}, loss

    compiled = jax.jit(update, donate_argnums=0)

    def step() -> float:
        after, loss = compiled(dict(state), *(tensor.array.reshape(shape) for tensor in (m.s.tokens, m.s.targets)))
        state.update(jax.block_until_ready(after))
        return float(loss)

    yield Peer("jax.jit, float32", reset, step)
