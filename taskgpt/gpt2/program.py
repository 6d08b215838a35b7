"""GPT-2's training step as a program of tasks: ordinary loops in ordinary order.

Every function takes `spawn` and calls it with a kernel and tiles. Given `run_now` the program simply runs; given a graph's `spawn` it is
recorded, and the dependencies follow from the tiles. Loops stand kernel by kernel, as in llm.c, which is what the fork-join scheduler
needs; the others do not care. `gpt` is the model's memory: `p` parameters, `g` gradients, `a` activations, `d` gradients of activations,
`s` the step, `micro` which micro-batch of a step this is.

Where `options` leave a choice between fused and separate kernels, one function makes it, and both ways give the same bits.
"""

from collections.abc import Iterator
from functools import partial

from taskgpt.gpt2.attention import attention_backward, attention_forward
from taskgpt.gpt2.classifier import (
    crossentropy_backward,
    crossentropy_forward,
    lmhead_forward,
    loss_add,
    loss_forward,
    loss_mean,
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
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import loss_of_all, say_loss
from taskgpt.gpt2.shape import MicroBatch
from taskgpt.gpt2.stored_updates import (
    Spawn,
    add_part,
    decays,
    gradient,
    is_stored,
    norm_of_gradient,
    norm_parameters,
    part,
    scaled_updates,
    state,
    stored_parts,
    stored_update,
)
from taskgpt.gpt2.updates import linear_update, wpe_update, wte_update
from taskgpt.tasks import Graph, Tile


def training_graph(gpt: GPT2, slot: int = 0, micro: MicroBatch = MicroBatch()) -> Graph:  # noqa: B008 - a constant
    """Record one training step, or one micro-batch of it. Its inputs are those of a slot, and what it finds is there, too."""
    graph = Graph("training step" if micro == MicroBatch() else "micro-batch", allow_commutative=gpt.options.commutative)
    training_step(graph.spawn, gpt.with_slot(slot, micro))
    return graph


def loss_graph(gpt: GPT2, slot: int = 0) -> Graph:
    """Record the forward pass and the loss, for validation."""
    graph = Graph("loss")
    validation(graph.spawn, gpt.with_slot(slot))
    return graph


def sampling_graph(gpt: GPT2, start: int, stop: int) -> Graph:
    """Record the forward pass of the rows [start, stop) of one sequence, whose earlier rows must have been computed.

    What later rows need of earlier ones, their keys and values, still lies in the activations.
    """
    graph = Graph(f"sampling {start}:{stop}")
    rows = slice(start, stop)
    forward(graph.spawn, gpt, rows)
    head_forward(graph.spawn, gpt, rows, gpt.a.logits[0])
    return graph


def training_step(spawn: Spawn, gpt: GPT2) -> None:
    """Forward, loss, backward, update. What leads from logits to their gradient goes block by block if they are not all held at once.

    Of a step in micro-batches, one of them: the last has the update.
    """
    forward(spawn, gpt, gpt.grid.all_rows)
    for rows, logits in logits_blocks(gpt):
        head_forward(spawn, gpt, rows, logits)
        classify(spawn, gpt, rows, logits)
        head_backward(spawn, gpt, rows, logits)
    if gpt.replica and gpt.micro.is_last:
        gpt.replica.begin()
        gpt.replica.reduce(spawn, partial(gradient, gpt), stored_parts(gpt, 0, "wte"))
        gpt.replica.flush(spawn)  # before the embedding's part is added to it, on all ranks
    loss(spawn, gpt)
    step_loss(spawn, gpt)
    backward(spawn, gpt)
    if gpt.micro.is_last:
        norm_of_gradient(spawn, gpt)
        if gpt.is_scaled:
            scaled_updates(spawn, gpt)


def validation(spawn: Spawn, gpt: GPT2) -> None:
    """Forward and loss."""
    forward(spawn, gpt, gpt.grid.all_rows)
    for rows, logits in logits_blocks(gpt):
        head_forward(spawn, gpt, rows, logits)
        row_losses(spawn, gpt, rows, logits)
    loss(spawn, gpt)


def logits_blocks(gpt: GPT2) -> list[tuple[slice, Tile]]:
    """Return (rows, where their logits go) of each block of rows whose logits are held at a time."""
    slots = gpt.a.logits.array.shape[0]
    return [(rows, gpt.a.logits[at % slots]) for at, rows in enumerate(gpt.grid.logits())]


# Forward --------------------------------------------------------------------------------------------------------------------------------


def forward(spawn: Spawn, gpt: GPT2, rows: slice) -> None:
    """Compute all layers for some rows: all, or some of one sequence."""
    encode(partial(spawn, section=("forward", -1)), gpt, gpt.a.encoded[:], rows)
    for l in gpt.layers:
        block_forward(partial(spawn, section=("forward", l)), gpt, l, rows)


def encode(spawn: Spawn, gpt: GPT2, out: Tile, rows: slice) -> None:
    for r in gpt.grid.pointwise(rows):
        spawn(encoder_forward, out[r], gpt.tokens[r], gpt.p.wte[:], gpt.p.wpe[: gpt.batch.seq_len], r.start)


def block_forward(spawn: Spawn, gpt: GPT2, l: int, rows: slice) -> None:
    a, residual = gpt.a, stream(gpt, l)
    norm_forward(spawn, gpt, l, "ln1", residual, rows)
    linear_forward(spawn, gpt, l, "qkv", a.qkv[l], a.ln1[l], rows)
    attend(spawn, gpt, l, rows)
    linear_residual_forward(spawn, gpt, l, "attproj", a.residual2[l], residual, a.atty[l], rows)
    norm_forward(spawn, gpt, l, "ln2", a.residual2[l], rows)
    linear_gelu_forward(spawn, gpt, l, rows)
    linear_residual_forward(spawn, gpt, l, "fcproj", a.residual3[l], a.residual2[l], a.fch_gelu[l], rows)


def norm_forward(spawn: Spawn, gpt: GPT2, l: int, layer: str, inp: Tile, rows: slice) -> None:
    out, parameters = gpt.a.tensors[layer][l], [gpt.p.tensors[name][l] for name in norm_parameters(gpt, layer)]
    for r in gpt.grid.pointwise(rows):
        spawn(gpt.model.norms.forward, out[r], *norm_statistics(gpt, l, layer, r), inp[r], *parameters)


def linear_forward(spawn: Spawn, gpt: GPT2, l: int, layer: str, out: Tile, inp: Tile, rows: slice) -> None:
    for r, c, weight, bias in products(gpt, l, layer, rows):
        spawn(matmul_forward, out[r, c], inp[r], weight, bias, gpt.products)


def linear_gelu_forward(spawn: Spawn, gpt: GPT2, l: int, rows: slice) -> None:
    fch, gelu, inp = gpt.a.fch[l], gpt.a.fch_gelu[l], gpt.a.ln2[l]
    if gpt.options.kernels == "fused":
        for r, c, weight, bias in products(gpt, l, "fc", rows):
            spawn(matmul_gelu_forward, gelu[r, c], fch[r, c], inp[r], weight, bias, gpt.products)
    else:
        linear_forward(spawn, gpt, l, "fc", fch, inp, rows)
        for r in gpt.grid.pointwise(rows):
            spawn(gelu_forward, gelu[r], fch[r])


def linear_residual_forward(spawn: Spawn, gpt: GPT2, l: int, layer: str, out: Tile, residual: Tile, inp: Tile, rows: slice) -> None:
    if gpt.options.kernels == "fused":
        for r, c, weight, bias in products(gpt, l, layer, rows):
            spawn(matmul_residual_forward, out[r, c], residual[r, c], inp[r], weight, bias, gpt.products)
    else:
        product = gpt.a.tensors[layer][l]
        linear_forward(spawn, gpt, l, layer, product, inp, rows)
        for r in gpt.grid.pointwise(rows):
            spawn(residual_forward, out[r], residual[r], product[r])


def products(gpt: GPT2, l: int, layer: str, rows: slice) -> Iterator[tuple[slice, slice, Tile, Tile]]:
    """Yield (rows, output columns, weight, bias) of each matrix product of a linear layer."""
    weight, bias = gpt.p.tensors[layer + "w"][l], gpt.p.tensors[layer + "b"][l]
    for r in gpt.grid.products(rows):
        for c in gpt.grid.columns(weight.shape[0]):
            yield r, c, weight[c], bias[c]


def attend(spawn: Spawn, gpt: GPT2, l: int, rows: slice) -> None:
    """One task per sequence and group of heads."""
    a, T = gpt.a, gpt.batch.seq_len
    for r in gpt.grid.sequences(rows):
        seen = slice(r.start // T * T, r.stop)  # keys and values from the beginning of the sequence
        for h, columns, (q, k, v) in gpt.grid.heads():
            spawn(
                attention_forward, a.atty[l, r, columns], a.att_max[l, r, h], a.att_rsum[l, r, h],
                a.qkv[l, r, q], a.qkv[l, seen, k], a.qkv[l, seen, v], gpt.model.head_size, gpt.products,
            )  # fmt: skip


def stream(gpt: GPT2, l: int) -> Tile:
    """Return the residual stream as it enters layer l."""
    return gpt.a.encoded[:] if l == gpt.layers.start else gpt.a.residual3[l - 1]


def norm_weight(gpt: GPT2, l: int, layer: str) -> Tile:
    """Return what scales, the first of a norm's parameters."""
    return gpt.p.tensors[norm_parameters(gpt, layer)[0]][l]


def norm_statistics(gpt: GPT2, l: int, layer: str, r: slice) -> list[Tile]:
    """Return what a norm kept of some rows: of LayerNorm, mean and 1 / standard deviation."""
    return [gpt.a.tensors[layer + suffix][l, r] for suffix in gpt.model.norms.statistics]


# From the last layer to its gradient ----------------------------------------------------------------------------------------------------


def head_forward(spawn: Spawn, gpt: GPT2, rows: slice, logits: Tile) -> None:
    """Compute the logits of some rows, the first of them at the beginning of `logits`."""
    spawn = partial(spawn, section=("forward", gpt.model.layers))
    norm_forward(spawn, gpt, 0, "lnf", stream(gpt, gpt.model.layers), rows)
    for r in gpt.grid.products(rows):
        for v in gpt.grid.vocabulary():
            spawn(lmhead_forward, logits[within(rows, r), v], gpt.a.lnf[0, r], gpt.p.wte[v], gpt.products)


def classify(spawn: Spawn, gpt: GPT2, rows: slice, logits: Tile) -> None:
    """Compute losses and the gradient of the logits, which takes the place of the logits."""
    a, targets, valid, scale = gpt.a, gpt.targets, gpt.model.vocabulary, 1 / gpt.step_tokens
    if gpt.options.kernels == "separate":
        row_losses(spawn, gpt, rows, logits)
    for r in gpt.grid.pointwise(rows):
        tile = logits[within(rows, r)]
        if gpt.options.kernels == "fused":
            spawn(softmax_crossentropy, a.losses[r], tile, targets[r], valid, scale, section=("loss", -1))
        else:
            spawn(crossentropy_backward, tile, a.logits_max[r], a.logits_rsum[r], targets[r], valid, scale, section=("loss", -1))


def row_losses(spawn: Spawn, gpt: GPT2, rows: slice, logits: Tile) -> None:
    """Compute losses, and leave the logits."""
    spawn, a = partial(spawn, section=("loss", -1)), gpt.a
    for r in gpt.grid.pointwise(rows):
        spawn(softmax_forward, a.logits_max[r], a.logits_rsum[r], logits[within(rows, r)], gpt.model.vocabulary)
    for r in gpt.grid.pointwise(rows):
        spawn(crossentropy_forward, a.losses[r], logits[within(rows, r)], a.logits_max[r], a.logits_rsum[r], gpt.targets[r])


def loss(spawn: Spawn, gpt: GPT2) -> None:
    spawn(loss_forward, gpt.s.loss[:], gpt.a.losses[:], section=("loss", -1))


def step_loss(spawn: Spawn, gpt: GPT2) -> None:
    """Make the loss of a step in micro-batches their mean, and that of replicas the mean of all."""
    if gpt.batch.accumulate > 1:
        spawn(loss_add, gpt.a.loss_sum[:], gpt.s.loss[:], int(gpt.micro.is_first), section=("loss", -1))
        if gpt.micro.is_last:
            spawn(loss_mean, gpt.s.loss[:], gpt.a.loss_sum[:], gpt.batch.accumulate, section=("loss", -1))
    if gpt.replica and gpt.micro.is_last:
        spawn(say_loss, gpt.s.words[:], gpt.s.loss[:], gpt.batch.accumulate, section=("loss", -1))
        gpt.replica.gather_words(spawn, gpt.s.words[:], gpt.s.all_words[:])
        spawn(loss_of_all, gpt.s.loss[:], gpt.s.all_words[:], gpt.replica.micro_batches, section=("loss", -1))


def head_backward(spawn: Spawn, gpt: GPT2, rows: slice, dlogits: Tile) -> None:
    """Compute the gradient of what entered the head; that of its weight, wte, only if it is stored, because it is not complete yet."""
    spawn, dlnf = partial(spawn, section=("backward", gpt.model.layers)), gpt.d.dlnf
    for v in gpt.grid.vocabulary():
        kernel = matmul_backward_input if v.start == 0 else matmul_backward_input_add
        for r in gpt.grid.products(rows):
            for c in gpt.grid.columns(gpt.model.channels):
                spawn(kernel, dlnf[r, c], dlogits[within(rows, r), v], gpt.p.wte[v, c], gpt.products)
    if is_stored(gpt, "wte"):
        kernel = matmul_backward_weight if rows.start == 0 and gpt.micro.is_first else matmul_backward_weight_add
        for v in gpt.grid.vocabulary():
            spawn(kernel, gpt.g.dwte[v], dlogits[: rows.stop - rows.start, v], gpt.a.lnf[0, rows], gpt.products)


def within(rows: slice, r: slice) -> slice:
    """Return where rows r lie in a block of rows."""
    return slice(r.start - rows.start, r.stop - rows.start)


# Backward ---------------------------------------------------------------------------------------------------------------------


def backward(spawn: Spawn, gpt: GPT2) -> None:
    """Go back through the layers. An update follows as soon as its weight is no longer needed; wte, used first and last, comes last."""
    head_norm_backward(spawn, gpt)
    layers_backward(spawn, gpt)
    embeddings_update(spawn, gpt, gradient_of_stream(gpt, 0))


def head_norm_backward(spawn: Spawn, gpt: GPT2) -> None:
    d, L = gpt.d, gpt.model.layers
    last, dlast = stream(gpt, L), gradient_of_stream(gpt, L)
    weight, head = norm_weight(gpt, 0, "lnf"), partial(spawn, section=("backward", L))
    for r in gpt.grid.pointwise(gpt.grid.all_rows):
        head(gpt.model.norms.backward, dlast[r], d.dlnf[r], last[r], weight, *norm_statistics(gpt, 0, "lnf", r))
    norm_update(partial(spawn, section=("update", -1)), gpt, 0, "lnf", d.dlnf[:], last)


def layers_backward(spawn: Spawn, gpt: GPT2) -> None:
    for l in reversed(gpt.layers):
        block_backward(partial(spawn, section=("backward", l)), gpt, l)


def embeddings_update(spawn: Spawn, gpt: GPT2, dencoded: Tile) -> None:
    update = partial(spawn, section=("update", -1))
    embedding_update(update, gpt, dencoded)
    position_update(update, gpt, dencoded)


def gradient_of_stream(gpt: GPT2, l: int) -> Tile:
    """Return the gradient of the residual stream as it enters layer l."""
    return gpt.d.dresidual3[(l - 1) % 2]


def block_backward(spawn: Spawn, gpt: GPT2, l: int) -> None:
    a, d, update = gpt.a, gpt.d, partial(spawn, section=("update", l))
    slot, below = l % 2, gradient_of_stream(gpt, l)
    dresidual3, dresidual2, dfch, dln2 = d.dresidual3[slot], d.dresidual2[slot], d.dfch[slot], d.dln2[slot]
    datty, dqkv, dln1 = d.datty[slot], d.dqkv[slot], d.dln1[slot]

    gelu_linear_backward(spawn, gpt, l, dfch, dresidual3)
    weight_update(update, gpt, l, "fcproj", dresidual3, a.fch_gelu[l])
    linear_backward(spawn, gpt, l, "fc", dln2, dfch)
    weight_update(update, gpt, l, "fc", dfch, a.ln2[l])
    norm_backward(spawn, gpt, l, "ln2", dresidual2, dresidual3, dln2, a.residual2[l])
    norm_update(update, gpt, l, "ln2", dln2, a.residual2[l])
    linear_backward(spawn, gpt, l, "attproj", datty, dresidual2)
    weight_update(update, gpt, l, "attproj", dresidual2, a.atty[l])
    attend_backward(spawn, gpt, l, dqkv, datty)
    linear_backward(spawn, gpt, l, "qkv", dln1, dqkv)
    weight_update(update, gpt, l, "qkv", dqkv, a.ln1[l])
    norm_backward(spawn, gpt, l, "ln1", below, dresidual2, dln1, stream(gpt, l))
    norm_update(update, gpt, l, "ln1", dln1, stream(gpt, l))


def linear_backward(spawn: Spawn, gpt: GPT2, l: int, layer: str, dinp: Tile, dout: Tile) -> None:
    for r, c, weight in input_products(gpt, l, layer):
        spawn(matmul_backward_input, dinp[r, c], dout[r], weight, gpt.products)


def gelu_linear_backward(spawn: Spawn, gpt: GPT2, l: int, dfch: Tile, dout: Tile) -> None:
    """Backward of fcproj and of the GELU before it."""
    fch = gpt.a.fch[l]
    if gpt.options.kernels == "fused":
        for r, c, weight in input_products(gpt, l, "fcproj"):
            spawn(matmul_gelu_backward, dfch[r, c], dout[r], weight, fch[r, c], gpt.products)
    else:
        linear_backward(spawn, gpt, l, "fcproj", dfch, dout)
        for r in gpt.grid.pointwise(gpt.grid.all_rows):
            spawn(gelu_backward, dfch[r], fch[r])


def input_products(gpt: GPT2, l: int, layer: str) -> Iterator[tuple[slice, slice, Tile]]:
    """Yield (rows, input columns, weight) of each product that goes back through a linear layer."""
    weight = gpt.p.tensors[layer + "w"][l]
    for r in gpt.grid.products(gpt.grid.all_rows):
        for c in gpt.grid.columns(weight.shape[1]):
            yield r, c, weight[:, c]


def norm_backward(spawn: Spawn, gpt: GPT2, l: int, layer: str, dinp: Tile, dresidual: Tile, dout: Tile, inp: Tile) -> None:
    """Backward of a norm and of the residual connection around what follows it."""
    weight = norm_weight(gpt, l, layer)
    for r in gpt.grid.pointwise(gpt.grid.all_rows):
        spawn(gpt.model.norms.residual_backward, dinp[r], dresidual[r], dout[r], inp[r], weight, *norm_statistics(gpt, l, layer, r))


def attend_backward(spawn: Spawn, gpt: GPT2, l: int, dqkv: Tile, datty: Tile) -> None:
    a = gpt.a
    for r in gpt.grid.sequences(gpt.grid.all_rows):
        for h, columns, (q, k, v) in gpt.grid.heads():
            spawn(
                attention_backward, dqkv[r, q], dqkv[r, k], dqkv[r, v], datty[r, columns], a.atty[l, r, columns],
                a.qkv[l, r, q], a.qkv[l, r, k], a.qkv[l, r, v], a.att_max[l, r, h], a.att_rsum[l, r, h], gpt.model.head_size,
                gpt.products,
            )  # fmt: skip


# The gradient of a parameter; AdamW in the same task, unless the gradient is stored ----------------------------------------------------


def weight_update(spawn: Spawn, gpt: GPT2, l: int, layer: str, dout: Tile, inp: Tile) -> None:
    """Weight and bias of a linear layer, by output columns."""
    weight, bias = layer + "w", layer + "b"
    outputs = gpt.grid.columns(dout.shape[1])
    if gpt.update == "fused":
        for at, c in enumerate(outputs):
            parameters = *state(gpt, weight, (l, c)), *state(gpt, bias, (l, c))
            squares = gpt.s.squares[gpt.grid.squares(layer, l * len(outputs) + at, 2)]
            are_decayed = decays(gpt, weight), decays(gpt, bias)
            spawn(linear_update, *parameters, squares, dout[:, c], inp, gpt.s.hyper[:], *are_decayed, gpt.products)
    else:
        kernel = matmul_backward_weight if gpt.micro.is_first else matmul_backward_weight_add
        for c in outputs:
            spawn(kernel, gpt.g.tensors["d" + weight][l, c], dout[:, c], inp, gpt.products)
        for c in outputs:
            spawn(matmul_backward_bias, part(gpt, bias)[l, c], dout[:, c])
        add_part(spawn, gpt, bias, [(slice(l, l + 1), c) for c in outputs])
        stored_update(spawn, gpt, l, layer)


def norm_update(spawn: Spawn, gpt: GPT2, l: int, layer: str, dout: Tile, inp: Tile) -> None:
    """All parameters of a norm."""
    names, of_rows = norm_parameters(gpt, layer), (dout, inp, *norm_statistics(gpt, l, layer, gpt.grid.all_rows))
    if gpt.update == "fused":
        parameters = [tile for name in names for tile in state(gpt, name, l)]
        squares = gpt.s.squares[gpt.grid.squares(layer, l, len(names))]
        spawn(gpt.model.norms.update, *parameters, squares, *of_rows, gpt.s.hyper[:], decays(gpt, names[0]))
    else:
        spawn(gpt.model.norms.backward_weight, *(part(gpt, name)[l] for name in names), *of_rows)
        for name in names:
            add_part(spawn, gpt, name, [slice(l, l + 1)])
        stored_update(spawn, gpt, l, layer)


def embedding_update(spawn: Spawn, gpt: GPT2, dencoded: Tile) -> None:
    """wte, by vocabulary: its gradient as weight of the head, that as embedding on top."""
    tokens, vs = gpt.tokens, gpt.grid.vocabulary()
    if gpt.replica and gpt.micro.is_last:  # whose part of the head is reduced already
        gpt.replica.gather_rows(spawn, dencoded, gpt.d.all_dencoded[:], tokens, gpt.d.all_tokens[:])
        for v in vs:
            spawn(encoder_backward_wte, gpt.g.dwte[v], gpt.d.all_dencoded[:], gpt.d.all_tokens[:], v.start)
    elif is_stored(gpt, "wte"):
        for v in vs:
            spawn(encoder_backward_wte, gpt.g.dwte[v], dencoded, tokens, v.start)
        stored_update(spawn, gpt, 0, "wte")
    else:
        [(_, dlogits)] = logits_blocks(gpt)
        for at, v in enumerate(vs):
            gradient_of = dlogits[:, v], gpt.a.lnf[0], dencoded, tokens
            squares = gpt.s.squares[gpt.grid.squares("wte", at, 1)]
            constants = v.start, decays(gpt, "wte"), gpt.products
            spawn(wte_update, *state(gpt, "wte", v), squares, *gradient_of, gpt.s.hyper[:], *constants)


def position_update(spawn: Spawn, gpt: GPT2, dencoded: Tile) -> None:
    """wpe, by positions."""
    T, positions_of = gpt.batch.seq_len, gpt.grid.positions()
    if gpt.update == "fused":
        for at, positions in enumerate(positions_of):
            of_rows = gpt.s.squares[gpt.grid.squares("wpe", at, 1)], dencoded
            spawn(wpe_update, *state(gpt, "wpe", positions), *of_rows, gpt.s.hyper[:], positions.start, T, decays(gpt, "wpe"))
    else:
        spawn(encoder_backward_wpe, part(gpt, "wpe")[:T], dencoded)
        add_part(spawn, gpt, "wpe", [slice(0, T)])
        stored_update(spawn, gpt, 0, "wpe")
