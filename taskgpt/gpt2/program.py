"""GPT-2's training step as a program of tasks: ordinary loops in ordinary order.

Every function takes `spawn` and calls it with a kernel and tiles. Given `run_now` the program simply runs; given a graph's `spawn` it is
recorded, and the dependencies follow from the tiles. Loops stand kernel by kernel, as in llm.c, which is what the fork-join scheduler
needs; the others do not care. `m` is the model's memory: `p` parameters, `g` gradients, `a` activations, `d` gradients of activations,
`s` the step.

Where `options` leave a choice between fused and separate kernels, one function makes it, and both ways give the same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from taskgpt.gpt2.attention import attention_backward, attention_forward
from taskgpt.gpt2.classifier import (
    crossentropy_backward,
    crossentropy_forward,
    lmhead_forward,
    loss_forward,
    softmax_crossentropy,
    softmax_forward,
)
from taskgpt.gpt2.kernels import (
    encoder_backward_wpe,
    encoder_backward_wte,
    encoder_forward,
    gelu_backward,
    gelu_forward,
    matmul_backward_bias,
    matmul_backward_input,
    matmul_backward_input_add,
    matmul_backward_weight,
    matmul_backward_weight_add,
    matmul_forward,
    matmul_gelu_backward,
    matmul_gelu_forward,
    matmul_residual_forward,
    residual_forward,
)
from taskgpt.gpt2.model import GPT2, MATRICES
from taskgpt.gpt2.updates import adamw_update, linear_update, wpe_update, wte_update
from taskgpt.tasks import Graph, Tile

Spawn = Callable[..., object]
Index = int | slice | tuple


def training_graph(m: GPT2, slot: int = 0) -> Graph:
    """Record one training step. Its inputs and its loss are those of a slot."""
    graph = Graph("training step", allow_commutative=m.options.commutative)
    training_step(graph.spawn, m.with_slot(slot))
    return graph


def loss_graph(m: GPT2, slot: int = 0) -> Graph:
    """Record the forward pass and the loss, for validation."""
    graph = Graph("loss")
    validation(graph.spawn, m.with_slot(slot))
    return graph


def sampling_graph(m: GPT2, start: int, stop: int) -> Graph:
    """Record the forward pass of the rows [start, stop) of one sequence, whose earlier rows must have been computed.

    What later rows need of earlier ones, their keys and values, still lies in the activations.
    """
    graph = Graph(f"sampling {start}:{stop}")
    rows = slice(start, stop)
    forward(graph.spawn, m, rows)
    head_forward(graph.spawn, m, rows, m.a.logits[0])
    return graph


def training_step(spawn: Spawn, m: GPT2) -> None:
    """Forward, loss, backward, update. What leads from logits to their gradient goes block by block if they are not all held at once."""
    forward(spawn, m, whole(m))
    for rows, logits in logits_blocks(m):
        head_forward(spawn, m, rows, logits)
        classify(spawn, m, rows, logits)
        head_backward(spawn, m, rows, logits)
    loss(spawn, m)
    backward(spawn, m)


def validation(spawn: Spawn, m: GPT2) -> None:
    """Forward and loss."""
    forward(spawn, m, whole(m))
    for rows, logits in logits_blocks(m):
        head_forward(spawn, m, rows, logits)
        row_losses(spawn, m, rows, logits)
    loss(spawn, m)


def blocks(rows: slice, size: int) -> list[slice]:
    """Cut a slice into slices of `size`; the last may be shorter."""
    return [slice(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size)]


def whole(m: GPT2) -> slice:
    return slice(0, m.batch.rows)


def logits_blocks(m: GPT2) -> list[tuple[slice, Tile]]:
    """Return (rows, where their logits go) of each block of rows whose logits are held at a time."""
    slots = m.a.logits.array.shape[0]
    return [(rows, m.a.logits[at % slots]) for at, rows in enumerate(blocks(whole(m), m.logits_rows))]


# Forward --------------------------------------------------------------------------------------------------------------------------------


def forward(spawn: Spawn, m: GPT2, rows: slice) -> None:
    """Compute all layers for some rows: all, or some of one sequence."""
    encode(partial(spawn, section=("forward", -1)), m, rows)
    for l in range(m.model.layers):
        block_forward(partial(spawn, section=("forward", l)), m, l, rows)


def encode(spawn: Spawn, m: GPT2, rows: slice) -> None:
    for r in blocks(rows, m.tiles.pointwise_rows):
        spawn(encoder_forward, m.a.encoded[r], m.s.tokens[r], m.p.wte[:], m.p.wpe[: m.batch.seq_len], r.start)


def block_forward(spawn: Spawn, m: GPT2, l: int, rows: slice) -> None:
    a, residual = m.a, stream(m, l)
    norm_forward(spawn, m, l, "ln1", residual, rows)
    linear_forward(spawn, m, l, "qkv", a.qkv[l], a.ln1[l], rows)
    attend(spawn, m, l, rows)
    linear_residual_forward(spawn, m, l, "attproj", a.residual2[l], residual, a.atty[l], rows)
    norm_forward(spawn, m, l, "ln2", a.residual2[l], rows)
    linear_gelu_forward(spawn, m, l, rows)
    linear_residual_forward(spawn, m, l, "fcproj", a.residual3[l], a.residual2[l], a.fch_gelu[l], rows)


def norm_forward(spawn: Spawn, m: GPT2, l: int, layer: str, inp: Tile, rows: slice) -> None:
    out, parameters = m.a.tensors[layer][l], [m.p.tensors[name][l] for name in norm_parameters(m, layer)]
    for r in blocks(rows, m.tiles.pointwise_rows):
        spawn(m.model.norms.forward, out[r], *statistics(m, l, layer, r), inp[r], *parameters)


def linear_forward(spawn: Spawn, m: GPT2, l: int, layer: str, out: Tile, inp: Tile, rows: slice) -> None:
    for r, c, weight, bias in products(m, l, layer, rows):
        spawn(matmul_forward, out[r, c], inp[r], weight, bias)


def linear_gelu_forward(spawn: Spawn, m: GPT2, l: int, rows: slice) -> None:
    fch, gelu, inp = m.a.fch[l], m.a.fch_gelu[l], m.a.ln2[l]
    if m.options.kernels == "fused":
        for r, c, weight, bias in products(m, l, "fc", rows):
            spawn(matmul_gelu_forward, gelu[r, c], fch[r, c], inp[r], weight, bias)
    else:
        linear_forward(spawn, m, l, "fc", fch, inp, rows)
        for r in blocks(rows, m.tiles.pointwise_rows):
            spawn(gelu_forward, gelu[r], fch[r])


def linear_residual_forward(spawn: Spawn, m: GPT2, l: int, layer: str, out: Tile, residual: Tile, inp: Tile, rows: slice) -> None:
    if m.options.kernels == "fused":
        for r, c, weight, bias in products(m, l, layer, rows):
            spawn(matmul_residual_forward, out[r, c], residual[r, c], inp[r], weight, bias)
    else:
        product = m.a.tensors[layer][l]
        linear_forward(spawn, m, l, layer, product, inp, rows)
        for r in blocks(rows, m.tiles.pointwise_rows):
            spawn(residual_forward, out[r], residual[r], product[r])


def products(m: GPT2, l: int, layer: str, rows: slice) -> Iterator[tuple[slice, slice, Tile, Tile]]:
    """Yield (rows, output columns, weight, bias) of each matrix product of a linear layer."""
    weight, bias = m.p.tensors[layer + "w"][l], m.p.tensors[layer + "b"][l]
    for r in blocks(rows, m.tiles.rows):
        for c in blocks(slice(0, weight.shape[0]), m.tiles.columns):
            yield r, c, weight[c], bias[c]


def attend(spawn: Spawn, m: GPT2, l: int, rows: slice) -> None:
    """One task per sequence and group of heads."""
    a, T = m.a, m.batch.seq_len
    for r in blocks(rows, T):
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
    for h in blocks(slice(0, m.model.heads), m.tiles.heads):
        start, stop = h.start * size, h.stop * size
        groups.append((h, slice(start, stop), [slice(start + part * C, stop + part * C) for part in range(3)]))
    return groups


def stream(m: GPT2, l: int) -> Tile:
    """Return the residual stream as it enters layer l."""
    return m.a.encoded[:] if l == 0 else m.a.residual3[l - 1]


def norm_parameters(m: GPT2, layer: str) -> list[str]:
    """Return the names of a norm's parameters: of ln1, ln1w and ln1b."""
    return [layer + suffix for suffix in m.model.norms.parameters]


def norm_weight(m: GPT2, l: int, layer: str) -> Tile:
    """Return what scales, the first of a norm's parameters."""
    return m.p.tensors[norm_parameters(m, layer)[0]][l]


def statistics(m: GPT2, l: int, layer: str, r: slice) -> list[Tile]:
    """Return what a norm kept of some rows: of LayerNorm, mean and 1 / standard deviation."""
    return [m.a.tensors[layer + suffix][l, r] for suffix in m.model.norms.statistics]


# From the last layer to its gradient ----------------------------------------------------------------------------------------------------


def head_forward(spawn: Spawn, m: GPT2, rows: slice, logits: Tile) -> None:
    """Compute the logits of some rows, the first of them at the beginning of `logits`."""
    spawn = partial(spawn, section=("forward", m.model.layers))
    norm_forward(spawn, m, 0, "lnf", stream(m, m.model.layers), rows)
    for r in blocks(rows, m.tiles.rows):
        for words in vocabulary_blocks(m):
            spawn(lmhead_forward, logits[within(rows, r), words], m.a.lnf[0, r], m.p.wte[words])


def classify(spawn: Spawn, m: GPT2, rows: slice, logits: Tile) -> None:
    """Compute losses and the gradient of the logits, which takes the place of the logits."""
    a, targets, valid, scale = m.a, m.s.targets, m.model.vocabulary, 1 / m.batch.rows
    if m.options.kernels == "separate":
        row_losses(spawn, m, rows, logits)
    for r in blocks(rows, m.tiles.pointwise_rows):
        tile = logits[within(rows, r)]
        if m.options.kernels == "fused":
            spawn(softmax_crossentropy, a.losses[r], tile, targets[r], valid, scale, section=("loss", -1))
        else:
            spawn(crossentropy_backward, tile, a.logits_max[r], a.logits_rsum[r], targets[r], valid, scale, section=("loss", -1))


def row_losses(spawn: Spawn, m: GPT2, rows: slice, logits: Tile) -> None:
    """Compute losses, and leave the logits."""
    spawn, a = partial(spawn, section=("loss", -1)), m.a
    for r in blocks(rows, m.tiles.pointwise_rows):
        spawn(softmax_forward, a.logits_max[r], a.logits_rsum[r], logits[within(rows, r)], m.model.vocabulary)
    for r in blocks(rows, m.tiles.pointwise_rows):
        spawn(crossentropy_forward, a.losses[r], logits[within(rows, r)], a.logits_max[r], a.logits_rsum[r], m.s.targets[r])


def loss(spawn: Spawn, m: GPT2) -> None:
    spawn(loss_forward, m.s.loss[:], m.a.losses[:], section=("loss", -1))


def head_backward(spawn: Spawn, m: GPT2, rows: slice, dlogits: Tile) -> None:
    """Compute the gradient of what entered the head; that of its weight, wte, only if it is stored, because it is not complete yet."""
    spawn, dlnf = partial(spawn, section=("backward", m.model.layers)), m.d.dlnf
    for words in vocabulary_blocks(m):
        kernel = matmul_backward_input if words.start == 0 else matmul_backward_input_add
        for r in blocks(rows, m.tiles.rows):
            for c in blocks(slice(0, m.model.channels), m.tiles.columns):
                spawn(kernel, dlnf[r, c], dlogits[within(rows, r), words], m.p.wte[words, c])
    if is_stored(m, "wte"):
        kernel = matmul_backward_weight if rows.start == 0 else matmul_backward_weight_add
        for words in vocabulary_blocks(m):
            spawn(kernel, m.g.dwte[words], dlogits[: rows.stop - rows.start, words], m.a.lnf[0, rows])


def within(rows: slice, r: slice) -> slice:
    """Return where rows r lie in a block of rows."""
    return slice(r.start - rows.start, r.stop - rows.start)


def vocabulary_blocks(m: GPT2) -> list[slice]:
    return blocks(slice(0, m.model.padded_vocabulary), m.tiles.vocabulary)


# Backward and update --------------------------------------------------------------------------------------------------------------------


def backward(spawn: Spawn, m: GPT2) -> None:
    """Go back through the layers. An update follows as soon as its weight is no longer needed; wte, used first and last, comes last."""
    d, L = m.d, m.model.layers
    last, dlast, update = stream(m, L), d.dresidual3[(L - 1) % 2], partial(spawn, section=("update", -1))
    weight, head = norm_weight(m, 0, "lnf"), partial(spawn, section=("backward", L))
    for r in blocks(whole(m), m.tiles.pointwise_rows):
        head(m.model.norms.backward, dlast[r], d.dlnf[r], last[r], weight, *statistics(m, 0, "lnf", r))
    norm_update(update, m, 0, "lnf", d.dlnf[:], last)
    for l in reversed(range(L)):
        block_backward(partial(spawn, section=("backward", l)), m, l)
    dencoded = d.dresidual3[(0 - 1) % 2]
    embedding_update(update, m, dencoded)
    position_update(update, m, dencoded)


def block_backward(spawn: Spawn, m: GPT2, l: int) -> None:
    a, d, update = m.a, m.d, partial(spawn, section=("update", l))
    slot, below = l % 2, d.dresidual3[(l - 1) % 2]
    dresidual3, dresidual2, dfch, dln2 = d.dresidual3[slot], d.dresidual2[slot], d.dfch[slot], d.dln2[slot]
    datty, dqkv, dln1 = d.datty[slot], d.dqkv[slot], d.dln1[slot]

    gelu_linear_backward(spawn, m, l, dfch, dresidual3)
    weight_update(update, m, l, "fcproj", dresidual3, a.fch_gelu[l])
    linear_backward(spawn, m, l, "fc", dln2, dfch)
    weight_update(update, m, l, "fc", dfch, a.ln2[l])
    norm_backward(spawn, m, l, "ln2", dresidual2, dresidual3, dln2, a.residual2[l])
    norm_update(update, m, l, "ln2", dln2, a.residual2[l])
    linear_backward(spawn, m, l, "attproj", datty, dresidual2)
    weight_update(update, m, l, "attproj", dresidual2, a.atty[l])
    attend_backward(spawn, m, l, dqkv, datty)
    linear_backward(spawn, m, l, "qkv", dln1, dqkv)
    weight_update(update, m, l, "qkv", dqkv, a.ln1[l])
    norm_backward(spawn, m, l, "ln1", below, dresidual2, dln1, stream(m, l))
    norm_update(update, m, l, "ln1", dln1, stream(m, l))


def linear_backward(spawn: Spawn, m: GPT2, l: int, layer: str, dinp: Tile, dout: Tile) -> None:
    for r, c, weight in input_products(m, l, layer):
        spawn(matmul_backward_input, dinp[r, c], dout[r], weight)


def gelu_linear_backward(spawn: Spawn, m: GPT2, l: int, dfch: Tile, dout: Tile) -> None:
    """Backward of fcproj and of the GELU before it."""
    fch = m.a.fch[l]
    if m.options.kernels == "fused":
        for r, c, weight in input_products(m, l, "fcproj"):
            spawn(matmul_gelu_backward, dfch[r, c], dout[r], weight, fch[r, c])
    else:
        linear_backward(spawn, m, l, "fcproj", dfch, dout)
        for r in blocks(whole(m), m.tiles.pointwise_rows):
            spawn(gelu_backward, dfch[r], fch[r])


def input_products(m: GPT2, l: int, layer: str) -> Iterator[tuple[slice, slice, Tile]]:
    """Yield (rows, input columns, weight) of each product that goes back through a linear layer."""
    weight = m.p.tensors[layer + "w"][l]
    for r in blocks(whole(m), m.tiles.rows):
        for c in blocks(slice(0, weight.shape[1]), m.tiles.columns):
            yield r, c, weight[:, c]


def norm_backward(spawn: Spawn, m: GPT2, l: int, layer: str, dinp: Tile, dresidual: Tile, dout: Tile, inp: Tile) -> None:
    """Backward of a norm and of the residual connection around what follows it."""
    weight = norm_weight(m, l, layer)
    for r in blocks(whole(m), m.tiles.pointwise_rows):
        spawn(m.model.norms.residual_backward, dinp[r], dresidual[r], dout[r], inp[r], weight, *statistics(m, l, layer, r))


def attend_backward(spawn: Spawn, m: GPT2, l: int, dqkv: Tile, datty: Tile) -> None:
    a = m.a
    for r in blocks(whole(m), m.batch.seq_len):
        for h, columns, (q, k, v) in head_groups(m):
            spawn(
                attention_backward, dqkv[r, q], dqkv[r, k], dqkv[r, v], datty[r, columns], a.atty[l, r, columns],
                a.qkv[l, r, q], a.qkv[l, r, k], a.qkv[l, r, v], a.att_max[l, r, h], a.att_rsum[l, r, h], m.model.head_size,
            )  # fmt: skip


# Updates: the gradient of a parameter, and AdamW on it ----------------------------------------------------------------------------------


def weight_update(spawn: Spawn, m: GPT2, l: int, layer: str, dout: Tile, inp: Tile) -> None:
    """Weight and bias of a linear layer, by output columns."""
    weight, bias = layer + "w", layer + "b"
    outputs = blocks(slice(0, dout.shape[1]), m.tiles.columns)
    if m.options.update == "fused":
        for c in outputs:
            parameters = *state(m, weight, (l, c)), *state(m, bias, (l, c))
            spawn(linear_update, *parameters, dout[:, c], inp, m.s.hyper[:], decays(m, weight), decays(m, bias))
    else:
        for c in outputs:
            spawn(matmul_backward_weight, m.g.tensors["d" + weight][l, c], dout[:, c], inp)
        for c in outputs:
            spawn(matmul_backward_bias, m.g.tensors["d" + bias][l, c], dout[:, c])
        adamw(spawn, m, weight, [(l, c) for c in outputs])
        adamw(spawn, m, bias, [slice(l, l + 1)])


def norm_update(spawn: Spawn, m: GPT2, l: int, layer: str, dout: Tile, inp: Tile) -> None:
    """All parameters of a norm."""
    names, of_rows = norm_parameters(m, layer), (dout, inp, *statistics(m, l, layer, whole(m)))
    if m.options.update == "fused":
        parameters = [tile for name in names for tile in state(m, name, l)]
        spawn(m.model.norms.update, *parameters, *of_rows, m.s.hyper[:], decays(m, names[0]))
    else:
        spawn(m.model.norms.backward_weight, *(m.g.tensors["d" + name][l] for name in names), *of_rows)
        for name in names:
            adamw(spawn, m, name, [slice(l, l + 1)])


def embedding_update(spawn: Spawn, m: GPT2, dencoded: Tile) -> None:
    """wte, by vocabulary: its gradient as weight of the head, that as embedding on top."""
    tokens, words_of = m.s.tokens[:], vocabulary_blocks(m)
    if is_stored(m, "wte"):
        for words in words_of:
            spawn(encoder_backward_wte, m.g.dwte[words], dencoded, tokens, words.start)
        adamw(spawn, m, "wte", words_of)
    else:
        [(_, dlogits)] = logits_blocks(m)
        for words in words_of:
            gradient_of = dlogits[:, words], m.a.lnf[0], dencoded, tokens
            spawn(wte_update, *state(m, "wte", words), *gradient_of, m.s.hyper[:], words.start, decays(m, "wte"))


def position_update(spawn: Spawn, m: GPT2, dencoded: Tile) -> None:
    """wpe, by positions."""
    T, positions_of = m.batch.seq_len, blocks(slice(0, m.model.max_seq_len), m.tiles.vocabulary)
    if m.options.update == "fused":
        for positions in positions_of:
            spawn(wpe_update, *state(m, "wpe", positions), dencoded, m.s.hyper[:], positions.start, T, decays(m, "wpe"))
    else:
        spawn(encoder_backward_wpe, m.g.dwpe[:T], dencoded)
        adamw(spawn, m, "wpe", positions_of)


def adamw(spawn: Spawn, m: GPT2, name: str, indices: Iterable[Index]) -> None:
    """Update a parameter tensor, a task for each index, from its stored gradient."""
    for index in indices:
        spawn(adamw_update, *state(m, name, index), m.g.tensors["d" + name][index], m.s.hyper[:], decays(m, name))


def state(m: GPT2, name: str, index: Index) -> tuple[Tile, Tile, Tile]:
    """Return a tile of a parameter and of its two moments."""
    return m.p.tensors[name][index], m.m.tensors["m_" + name][index], m.v.tensors["v_" + name][index]


def is_stored(m: GPT2, name: str) -> bool:
    """Return True if the gradient of a parameter has a tensor."""
    return "d" + name in m.g.tensors


def decays(m: GPT2, name: str) -> int:
    return int(m.options.weight_decay_on == "all" or name in MATRICES)
