"""GPT-2's training step as a program of tasks: ordinary loops in ordinary order.

Every function takes `spawn` and calls it with a kernel and tiles. Given `run_now` the program simply runs; given a graph's `spawn` it is
recorded, and the dependencies follow from the tiles. Loops stand kernel by kernel, as in llm.c, which is what the fork-join scheduler
needs; the others do not care. `m` is the model's memory: `p` parameters, `g` gradients, `a` activations, `d` gradients of activations,
`s` the step.
"""

from collections.abc import Callable
from functools import partial

from taskgpt.gpt2.attention import attention_backward, attention_forward
from taskgpt.gpt2.kernels import (
    adamw_update,
    crossentropy_backward,
    crossentropy_forward,
    encoder_backward_wpe,
    encoder_backward_wte,
    encoder_forward,
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_backward_weight,
    layernorm_forward,
    layernorm_residual_backward,
    lmhead_forward,
    loss_forward,
    matmul_backward_bias,
    matmul_backward_input,
    matmul_backward_input_add,
    matmul_backward_weight,
    matmul_forward,
    residual_forward,
    softmax_forward_block,
)
from taskgpt.gpt2.model import GPT2, MATRICES
from taskgpt.tasks import Graph, Tensor, Tile

Spawn = Callable[..., object]


def training_graph(m: GPT2) -> Graph:
    """Record one training step: forward, loss, backward, update."""
    graph = Graph("training step", allow_commutative=m.options.commutative)
    forward(graph.spawn, m)
    loss(graph.spawn, m)
    backward(graph.spawn, m)
    return graph


def loss_graph(m: GPT2) -> Graph:
    """Record the forward pass and the loss, for validation."""
    graph = Graph("loss")
    forward(graph.spawn, m)
    loss(graph.spawn, m)
    return graph


def sampling_graph(m: GPT2, start: int, stop: int) -> Graph:
    """Record the forward pass of the rows [start, stop) of one sequence, whose earlier rows must have been computed.

    What later rows need of earlier ones, their keys and values, still lies in the activations.
    """
    graph = Graph(f"sampling {start}:{stop}")
    forward(graph.spawn, m, start, stop)
    return graph


def blocks(start: int, stop: int, size: int) -> list[slice]:
    """Cut [start, stop) into slices of `size`; the last may be shorter."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


# Forward --------------------------------------------------------------------------------------------------------------------------------


def forward(spawn: Spawn, m: GPT2, start: int = 0, stop: int | None = None) -> None:
    """Compute the logits of the rows [start, stop): all, or some of one sequence."""
    stop = m.batch.rows if stop is None else stop
    encode(partial(spawn, section=("forward", -1)), m, start, stop)
    for l in range(m.model.layers):
        block_forward(partial(spawn, section=("forward", l)), m, l, start, stop)
    head_forward(partial(spawn, section=("forward", m.model.layers)), m, start, stop)


def encode(spawn: Spawn, m: GPT2, start: int, stop: int) -> None:
    for r in blocks(start, stop, m.tiles.pointwise_rows):
        spawn(encoder_forward, m.a.encoded[r], m.s.tokens[r], m.p.wte[:], m.p.wpe[: m.batch.seq_len], r.start)


def block_forward(spawn: Spawn, m: GPT2, l: int, start: int, stop: int) -> None:
    p, a = m.p, m.a
    residual = stream(m, l)
    pointwise = blocks(start, stop, m.tiles.pointwise_rows)
    for r in pointwise:
        spawn(layernorm_forward, a.ln1[l, r], a.ln1_mean[l, r], a.ln1_rstd[l, r], residual[r], p.ln1w[l], p.ln1b[l])
    linear_forward(spawn, m, l, start, stop, a.qkv, a.ln1, p.qkvw, p.qkvb)
    attend(spawn, m, l, start, stop)
    linear_forward(spawn, m, l, start, stop, a.attproj, a.atty, p.attprojw, p.attprojb)
    for r in pointwise:
        spawn(residual_forward, a.residual2[l, r], residual[r], a.attproj[l, r])
    for r in pointwise:
        spawn(layernorm_forward, a.ln2[l, r], a.ln2_mean[l, r], a.ln2_rstd[l, r], a.residual2[l, r], p.ln2w[l], p.ln2b[l])
    linear_forward(spawn, m, l, start, stop, a.fch, a.ln2, p.fcw, p.fcb)
    for r in pointwise:
        spawn(gelu_forward, a.fch_gelu[l, r], a.fch[l, r])
    linear_forward(spawn, m, l, start, stop, a.fcproj, a.fch_gelu, p.fcprojw, p.fcprojb)
    for r in pointwise:
        spawn(residual_forward, a.residual3[l, r], a.residual2[l, r], a.fcproj[l, r])


def linear_forward(spawn: Spawn, m: GPT2, l: int, start: int, stop: int, out: Tensor, inp: Tensor, weight: Tensor, bias: Tensor) -> None:
    for r in blocks(start, stop, m.tiles.rows):
        for c in blocks(0, weight.array.shape[1], m.tiles.columns):
            spawn(matmul_forward, out[l, r, c], inp[l, r], weight[l, c], bias[l, c])


def attend(spawn: Spawn, m: GPT2, l: int, start: int, stop: int) -> None:
    """One task per sequence and group of heads."""
    a, T = m.a, m.batch.seq_len
    for r in blocks(start, stop, T):
        seen = slice(r.start // T * T, r.stop)  # keys and values from the beginning of the sequence
        for h, columns, (q, k, v) in head_groups(m):
            spawn(
                attention_forward, a.atty[l, r, columns], a.att_max[l, r, h], a.att_rsum[l, r, h],
                a.qkv[l, r, q], a.qkv[l, seen, k], a.qkv[l, seen, v], m.model.head_size,
            )  # fmt: skip


def head_groups(m: GPT2) -> list[tuple[slice, slice, list[slice]]]:
    """Return (heads, their columns in atty, their columns of Q, K and V in qkv) of each attention task."""
    size, C = m.model.head_size, m.model.channels
    groups = []
    for h in blocks(0, m.model.heads, m.tiles.heads):
        start, stop = h.start * size, h.stop * size
        groups.append((h, slice(start, stop), [slice(start + part * C, stop + part * C) for part in range(3)]))
    return groups


def head_forward(spawn: Spawn, m: GPT2, start: int, stop: int) -> None:
    a, p = m.a, m.p
    last = stream(m, m.model.layers)
    for r in blocks(start, stop, m.tiles.pointwise_rows):
        spawn(layernorm_forward, a.lnf[r], a.lnf_mean[r], a.lnf_rstd[r], last[r], p.lnfw[0], p.lnfb[0])
    for r in blocks(start, stop, m.tiles.rows):
        for words in vocabulary_blocks(m):
            spawn(lmhead_forward, a.logits[r, words], a.lnf[r], p.wte[words])


def loss(spawn: Spawn, m: GPT2) -> None:
    """Cross-entropy of every row, and its mean. Row blocks and vocabulary blocks are independent but for one small task per row block."""
    spawn = partial(spawn, section=("loss", -1))
    a, s = m.a, m.s
    pointwise = blocks(0, m.batch.rows, m.tiles.pointwise_rows)
    for r in pointwise:
        for at, words in enumerate(vocabulary_blocks(m)):
            part = slice(at, at + 1)
            spawn(softmax_forward_block, a.block_max[r, part], a.block_sum[r, part], a.logits[r, words], real_words(m, words))
    for r in pointwise:
        spawn(
            crossentropy_forward, a.losses[r], a.logits_max[r], a.logits_rsum[r],
            a.block_max[r], a.block_sum[r], a.logits[r], s.targets[r],
        )  # fmt: skip
    spawn(loss_forward, s.loss[:], a.losses[:])


def vocabulary_blocks(m: GPT2) -> list[slice]:
    return blocks(0, m.model.padded_vocabulary, m.tiles.vocabulary)


def real_words(m: GPT2, words: slice) -> int:
    """Return how many entries of a vocabulary block are no padding."""
    return max(0, min(words.stop, m.model.vocabulary) - words.start)


# Backward and update --------------------------------------------------------------------------------------------------------------------


def backward(spawn: Spawn, m: GPT2) -> None:
    """Compute all gradients, each followed by the update that uses it while it is still in cache; wte, used first and last, comes last."""
    head_backward(partial(spawn, section=("backward", m.model.layers)), m)
    for l in reversed(range(m.model.layers)):
        block_backward(partial(spawn, section=("backward", l)), m, l)
    encoder_backward(partial(spawn, section=("backward", -1)), m)


def head_backward(spawn: Spawn, m: GPT2) -> None:
    a, d, p, g, s = m.a, m.d, m.p, m.g, m.s
    L, R, C = m.model.layers, m.batch.rows, m.model.channels
    words_of = vocabulary_blocks(m)
    pointwise = blocks(0, R, m.tiles.pointwise_rows)
    for r in pointwise:
        for words in words_of:
            spawn(
                crossentropy_backward, a.logits[r, words], a.logits_max[r], a.logits_rsum[r], s.targets[r],
                words.start, real_words(m, words), 1 / R,
            )  # fmt: skip
    for words in words_of:
        backward_kernel = matmul_backward_input if words.start == 0 else matmul_backward_input_add
        for r in blocks(0, R, m.tiles.rows):
            for c in blocks(0, C, m.tiles.columns):
                spawn(backward_kernel, d.dlnf[r, c], a.logits[r, words], p.wte[words, c])
    for words in words_of:
        spawn(matmul_backward_weight, g.dwte[words], a.logits[:, words], a.lnf[:])
    last, dlast = stream(m, L), d.dresidual3[(L - 1) % 2]
    for r in pointwise:
        spawn(layernorm_backward, dlast[r], d.dlnf[r], last[r], p.lnfw[0], a.lnf_mean[r], a.lnf_rstd[r])
    spawn(layernorm_backward_weight, g.dlnfw[0], g.dlnfb[0], d.dlnf[:], last[:], a.lnf_mean[:], a.lnf_rstd[:])
    update(spawn, m, "lnfw")
    update(spawn, m, "lnfb")


def block_backward(spawn: Spawn, m: GPT2, l: int) -> None:
    a, d = m.a, m.d
    slot, below = l % 2, d.dresidual3[(l - 1) % 2]
    dresidual3, dresidual2, dfch, dln2 = d.dresidual3[slot], d.dresidual2[slot], d.dfch[slot], d.dln2[slot]
    datty, dqkv, dln1 = d.datty[slot], d.dqkv[slot], d.dln1[slot]

    linear_backward(spawn, m, l, "fcproj", dfch, dresidual3, a.fch_gelu[l])
    for r in blocks(0, m.batch.rows, m.tiles.pointwise_rows):
        spawn(gelu_backward, dfch[r], a.fch[l, r])
    linear_backward(spawn, m, l, "fc", dln2, dfch, a.ln2[l])
    norm_backward(spawn, m, l, "ln2", dresidual2, dresidual3, dln2, a.residual2[l])
    linear_backward(spawn, m, l, "attproj", datty, dresidual2, a.atty[l])
    attend_backward(spawn, m, l, dqkv, datty)
    linear_backward(spawn, m, l, "qkv", dln1, dqkv, a.ln1[l])
    norm_backward(spawn, m, l, "ln1", below, dresidual2, dln1, stream(m, l))


def linear_backward(spawn: Spawn, m: GPT2, l: int, layer: str, dinp: Tile, dout: Tile, inp: Tile) -> None:
    """Backward of a linear layer, then the update of its weight and bias. dinp comes first: it still needs the old weight."""
    weight = m.p.tensors[layer + "w"][l]
    dweight, dbias = m.g.tensors[f"d{layer}w"][l], m.g.tensors[f"d{layer}b"][l]
    outputs = blocks(0, weight.shape[0], m.tiles.columns)
    for r in blocks(0, m.batch.rows, m.tiles.rows):
        for c in blocks(0, weight.shape[1], m.tiles.columns):
            spawn(matmul_backward_input, dinp[r, c], dout[r], weight[:, c])
    for c in outputs:
        spawn(matmul_backward_weight, dweight[c], dout[:, c], inp)
    for c in outputs:
        spawn(matmul_backward_bias, dbias[c], dout[:, c])
    update(spawn, m, layer + "w", l)
    update(spawn, m, layer + "b", l)


def norm_backward(spawn: Spawn, m: GPT2, l: int, layer: str, dinp: Tile, dresidual: Tile, dout: Tile, inp: Tile) -> None:
    """Backward of a LayerNorm and of the residual connection around what follows it, then the update of weight and bias."""
    weight = m.p.tensors[layer + "w"][l]
    mean, rstd = m.a.tensors[layer + "_mean"][l], m.a.tensors[layer + "_rstd"][l]
    for r in blocks(0, m.batch.rows, m.tiles.pointwise_rows):
        spawn(layernorm_residual_backward, dinp[r], dresidual[r], dout[r], inp[r], weight, mean[r], rstd[r])
    dweight, dbias = m.g.tensors[f"d{layer}w"][l], m.g.tensors[f"d{layer}b"][l]
    spawn(layernorm_backward_weight, dweight, dbias, dout, inp, mean, rstd)
    update(spawn, m, layer + "w", l)
    update(spawn, m, layer + "b", l)


def attend_backward(spawn: Spawn, m: GPT2, l: int, dqkv: Tile, datty: Tile) -> None:
    a = m.a
    for r in blocks(0, m.batch.rows, m.batch.seq_len):
        for h, columns, (q, k, v) in head_groups(m):
            spawn(
                attention_backward, dqkv[r, q], dqkv[r, k], dqkv[r, v], datty[r, columns], a.atty[l, r, columns],
                a.qkv[l, r, q], a.qkv[l, r, k], a.qkv[l, r, v], a.att_max[l, r, h], a.att_rsum[l, r, h], m.model.head_size,
            )  # fmt: skip


def encoder_backward(spawn: Spawn, m: GPT2) -> None:
    dencoded = m.d.dresidual3[(0 - 1) % 2]
    for words in vocabulary_blocks(m):
        spawn(encoder_backward_wte, m.g.dwte[words], dencoded, m.s.tokens[:], words.start)
    spawn(encoder_backward_wpe, m.g.dwpe[: m.batch.seq_len], dencoded)
    update(spawn, m, "wte")
    update(spawn, m, "wpe")


def update(spawn: Spawn, m: GPT2, name: str, l: int = -1) -> None:
    """AdamW on a parameter tensor, or on layer l of it: a task per weight tile."""
    is_decayed = int(m.options.weight_decay_on == "all" or name in MATRICES)
    for index in weight_tiles(m, name, l):
        param, grad = m.p.tensors[name][index], m.g.tensors[f"d{name}"][index]
        first, second = m.m.tensors[f"m_{name}"][index], m.v.tensors[f"v_{name}"][index]
        spawn(adamw_update, param, first, second, grad, m.s.hyper[:], is_decayed, section=("update", l))


def weight_tiles(m: GPT2, name: str, l: int) -> list[tuple]:
    """Return the indices that cut layer l of a parameter tensor into update tasks; biases and LayerNorm are not cut."""
    shape = m.p.tensors[name].array.shape
    if len(shape) == 3:
        return [(l, c) for c in blocks(0, shape[1], m.tiles.columns)]
    if name in MATRICES:
        return [(r,) for r in blocks(0, shape[0], m.tiles.vocabulary)]
    return [(slice(max(l, 0), max(l, 0) + 1),)]


def stream(m: GPT2, l: int) -> Tile:
    """Return the residual stream as it enters layer l."""
    return m.a.encoded[:] if l == 0 else m.a.residual3[l - 1]
