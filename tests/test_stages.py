"""Stages: ranks that have some of the layers each. Here all in one process, a thread each."""

import asyncio
import threading
from functools import cache

import numpy as np
import pytest
from links_in_memory import linked
from plain_schedulers import scheduler

from taskgpt.collectives import Communicator
from taskgpt.config import load_graph
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.stages import Stage, layers_of
from taskgpt.gpt2.steps import Steps

STEPS = 3
SMALL = {"model.layers": 5, "tiles.columns": 48, "tiles.vocabulary": 100, "batch.batch_size": 2, "batch.seq_len": 32}


def configured(micro_batches: int, options: dict):
    return load_graph("tiny", SMALL | {"batch.accumulate": micro_batches} | options)


def train(m: GPT2, config, workers: int = 1, **settings):
    """Train; return (loss, norm) of each step, and what was recorded."""
    steps, found, M = Steps(m), [], config.batch.accumulate
    random = np.random.default_rng(7)
    m.initialize(3)

    def graphs():
        for step in range(STEPS):
            for n in range(steps.count):
                slot, graph = steps.micro_batch(step * steps.count + n)
                for number in range(M // steps.count):
                    tokens, targets = m.inputs(slot, number)
                    tokens[:], targets[:] = random.integers(0, config.model.vocabulary, (2, *tokens.shape))
                m.set_hyper(step, 1e-3, 0.1, slot=slot)
                yield graph

    with scheduler("native", workers=workers, **settings) as s:
        for number, _ in enumerate(s.run_each(graphs()), start=1):
            if number % steps.count == 0:
                slot = (number - 1) % 2
                found.append((m.loss_of(slot), m.norm_of(slot)))
        return found, s.take_records()[0] if settings else None


@cache
def alone(micro_batches: int, **options):
    config = configured(micro_batches, options)
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    return train(m, config)[0], m


def stages(count: int, micro_batches: int, workers: int = 1, settings: dict | None = None, watch=lambda peers: None, **options):
    """Return (what each rank finds, its model, its records) of each. `watch`: is given all links before."""
    ended: list = [None] * count
    config = configured(micro_batches, options)
    with linked(count) as peers:
        watch(peers)
        communicators = [Communicator(links) for links in peers]

        def run(rank: int) -> None:
            stage = Stage(rank, count, config.model, micro_batches, GPT2.SLOTS, communicators[rank])
            m = GPT2(config.model, config.batch, config.tiles, config.options, stage=stage)
            found, records = train(m, config, workers, **(settings or {}))
            ended[rank] = found, m, records

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(120)
        for each in communicators:
            each.close()
    assert all(ended)
    return ended


@pytest.mark.parametrize(("count", "micro_batches", "workers"), [(2, 1, 1), (2, 4, 2), (3, 4, 1), (5, 3, 1)])
def test_stages_have_the_bits_of_one_machine(count, micro_batches, workers):
    """The same losses and norms on all stages, the same state in each one's layers, and zeros in those of others: to the bit."""
    wanted, m = alone(micro_batches)
    ended = stages(count, micro_batches, workers)
    for found, staged, _ in ended:
        assert found == wanted
        for name in m.p.tensors:
            here = staged.rows_here(name)
            for arena, prefix in zip(m.state_arenas[:3], ("", "m_", "v_"), strict=True):
                array, want = staged.state[prefix + name], arena.tensors[prefix + name].array
                assert np.array_equal(array[here], want[here])
                elsewhere = np.ones(len(array), bool)
                elsewhere[here] = False
                assert not array[elsewhere].any()


def test_losses_of_blocks_of_logits_clipping_and_separate_kernels():
    """Options that change the program change no bit of it in stages either."""
    options = {"tiles.logits_rows": 24, "options.clip_norm": 0.5, "options.skip_norm_z": 4.0, "options.kernels": "separate"}
    wanted, m = alone(3, **options)
    ended = stages(2, 3, **options)
    assert [found for found, _, _ in ended] == [wanted, wanted]
    assert np.array_equal(ended[-1][1].p.wte.array, m.p.wte.array)


class Buckets:
    """Counts what a stage asks of a communicator."""

    def __init__(self):
        self.number, self.asked = 0, []

    def new_bucket(self, what, parts, owners=()):
        self.asked.append((what, owners))
        return len(self.asked) - 1


def test_one_forward_one_backward():
    """The last stage keeps the first gradient back until the next micro-batch has come: one that waited for it would wait for ever.

    And until it gives gradients, the first stage begins as many micro-batches as there are stages, and no more.
    """
    count, micro_batches = 2, 4
    buckets = Buckets()
    Stage(0, count, configured(micro_batches, {}).model, micro_batches, GPT2.SLOTS, buckets)
    forward = [number for number, each in enumerate(buckets.asked) if each == ("move", (0, 1))][:micro_batches]
    backward = [number for number, each in enumerate(buckets.asked) if each == ("move", (1, 0))][micro_batches:]
    log = []

    def watch(peers):
        first, last = peers
        next_is_there = asyncio.Event()

        async def send_forward(to, tag, buffers, send=first.send):
            if tag[0] in forward:
                log.append(("forward", tag[1], forward.index(tag[0])))
                if forward.index(tag[0]) == 1:
                    next_is_there.set()
            await send(to, tag, buffers)

        async def send_backward(to, tag, buffers, send=last.send):
            if tag[0] in backward:
                await next_is_there.wait()
                log.append(("backward", tag[1], backward.index(tag[0])))
            await send(to, tag, buffers)

        first.send, last.send = send_forward, send_backward

    stages(count, micro_batches, watch=watch)
    assert len(log) == 2 * STEPS * micro_batches
    in_flight = most = 0
    for what, _, _ in log:
        in_flight += 1 if what == "forward" else -1
        most = max(most, in_flight)
    assert most == count
    assert log[:3] == [("forward", 0, 0), ("forward", 0, 1), ("backward", 0, 0)]


def test_layers_go_by_the_products_of_a_stage():
    """GPT-2 XL's head is as much as 2.6 of its layers. Stages follow each other, and none is empty."""
    xl = load_graph("gpt2-xl").model
    assert [len(layers_of(xl, rank, 2)) for rank in range(2)] == [25, 23]
    for count in (1, 3, 48):
        found = [layers_of(xl, rank, count) for rank in range(count)]
        assert [l for each in found for l in each] == list(range(48)) and all(found)
    with pytest.raises(ValueError, match="49 stages, but the model has 48 layers"):
        layers_of(xl, 0, 49)


def test_a_stage_needs_its_part_of_the_memory():
    """Two stages of GPT-2 XL together have its state once, and each needs about half of what one machine does."""
    config = load_graph("gpt2-xl")
    of = config.model, config.batch, config.tiles, config.options
    whole = GPT2.bytes_needed(*of)
    parts = [GPT2.bytes_needed(*of, stage=Stage(rank, 2, config.model, 1, GPT2.SLOTS, Buckets())) for rank in range(2)]
    assert whole <= sum(parts) < 1.02 * whole
    assert max(parts) < 0.53 * whole
