"""The training step of a stage as a program of tasks: all micro-batches of a step in one graph, so that they overlap.

Sends and receives are tasks that wait for an event (taskgpt.collectives). Micro-batches stand in the order of 1F1B; see stages.py.
"""

from functools import partial

from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import (
    block_forward,
    classify,
    embeddings_update,
    encode,
    gradient_of_stream,
    head_backward,
    head_forward,
    head_norm_backward,
    layers_backward,
    logits_blocks,
    loss,
    row_losses,
    step_loss,
    stream,
)
from taskgpt.gpt2.replicas import clear, loss_of_all, say_loss
from taskgpt.gpt2.shape import MicroBatch
from taskgpt.gpt2.stages import say_no_loss
from taskgpt.gpt2.stored_updates import Spawn, norm_of_gradient, scaled_updates
from taskgpt.tasks import Graph


def stage_graph(gpt: GPT2, slot: int = 0) -> Graph:
    """Record a stage's part of a training step. Its inputs are those of a slot, and what it finds is there, too."""
    graph = Graph(f"training step, stage {gpt.stage.rank} of {gpt.stage.count}", allow_commutative=gpt.options.commutative)
    stage_step(graph.spawn, gpt, slot)
    return graph


def stage_loss_graph(gpt: GPT2, slot: int = 0) -> Graph:
    """Record a stage's part of the forward pass and the loss, for validation; the last stage finds the loss."""
    graph = Graph(f"loss, stage {gpt.stage.rank} of {gpt.stage.count}")
    view = gpt.with_slot(slot)
    embed(graph.spawn, view)
    forward(graph.spawn, view)
    if gpt.stage.is_last:
        for rows, logits in logits_blocks(view):
            head_forward(graph.spawn, view, rows, logits)
            row_losses(graph.spawn, view, rows, logits)
        loss(graph.spawn, view)
    return graph


def stage_step(spawn: Spawn, gpt: GPT2, slot: int) -> None:
    """Forward, loss, backward of all micro-batches, one forward, one backward; then the norm, and what waits for it."""
    stage, count = gpt.stage, gpt.batch.accumulate
    micro_batches = [gpt.with_slot(slot, MicroBatch(n == 0, n == count - 1, n)) for n in range(count)]
    spawn(clear, gpt.slots[slot].squares[:], section=("update", -1))
    for each in micro_batches:
        embed(spawn, each)
    for at, each in enumerate(micro_batches):
        for begins in micro_batches[0 if at == 0 else at + stage.in_flight - 1 : at + stage.in_flight]:
            forward(spawn, begins)
            if stage.is_last:
                head(spawn, begins)
        backward(spawn, each)
    say_and_hear(spawn, last := micro_batches[-1])
    norm_of_gradient(spawn, last)
    if last.is_scaled:
        scaled_updates(spawn, last)


def embed(spawn: Spawn, gpt: GPT2) -> None:
    """Embed the tokens of a micro-batch, in the last stage, for the first one."""
    if gpt.stage.is_last:
        embedded = gpt.a.embedded[gpt.micro.number % 2]
        encode(partial(spawn, section=("forward", -1)), gpt, embedded, gpt.grid.all_rows)
        gpt.stage.send_residual(spawn, gpt.micro.number, embedded)


def forward(spawn: Spawn, gpt: GPT2) -> None:
    """Compute the layers of a stage."""
    stage, number = gpt.stage, gpt.micro.number
    stage.receive_residual(spawn, number, gpt.a.encoded[:])
    for l in stage.layers:
        block_forward(partial(spawn, section=("forward", l)), gpt, l, gpt.grid.all_rows)
    if not stage.is_last:
        stage.send_residual(spawn, number, stream(gpt, stage.layers.stop))


def head(spawn: Spawn, gpt: GPT2) -> None:
    """Compute the loss, and go back to what entered the head."""
    for rows, logits in logits_blocks(gpt):
        head_forward(spawn, gpt, rows, logits)
        classify(spawn, gpt, rows, logits)
        head_backward(spawn, gpt, rows, logits)
    loss(spawn, gpt)
    step_loss(spawn, gpt)


def backward(spawn: Spawn, gpt: GPT2) -> None:
    """Go back through the layers of a stage; in the last one, wait for the gradient of the embedding, which has gone through all."""
    stage, number = gpt.stage, gpt.micro.number
    if stage.is_last:
        head_norm_backward(spawn, gpt)
    else:
        stage.receive_gradient(spawn, number, gradient_of_stream(gpt, stage.layers.stop))
    layers_backward(spawn, gpt)
    stage.send_gradient(spawn, number, gradient_of_stream(gpt, stage.layers.start))
    if stage.is_last:
        stage.receive_gradient(spawn, number, gpt.d.dencoded[:])
        embeddings_update(spawn, gpt, gpt.d.dencoded[:])


def say_and_hear(spawn: Spawn, gpt: GPT2) -> None:
    """Have all stages know the loss."""
    s, stage = gpt.s, gpt.stage
    if stage.is_last:
        spawn(say_loss, s.words[:], s.loss[:], stage.micro_batches, section=("loss", -1))
    else:
        spawn(say_no_loss, s.words[:], section=("loss", -1))
    stage.gather_words(spawn, gpt.slot, s.words[:], s.all_words[:])
    spawn(loss_of_all, s.loss[:], s.all_words[:], stage.micro_batches, section=("loss", -1))
