"""Replicas: ranks that train one model, each on its micro-batches of a step. Here all in one process, a thread each."""

import threading
from functools import cache

import numpy as np
import pytest
from links_in_memory import linked
from plain_schedulers import scheduler

from taskgpt.collectives import Communicator
from taskgpt.config import load_graph
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import WORDS, Replica, share
from taskgpt.gpt2.steps import Steps

STEPS = 3
SMALL = {"tiles.columns": 48, "tiles.vocabulary": 100}


def batches(config, micro_batches: int):
    """Return tokens and targets of each micro-batch of all steps."""
    random = np.random.default_rng(7)
    B, T = config.batch.batch_size, config.batch.seq_len
    return random.integers(0, config.model.vocabulary, (STEPS * micro_batches, 2, B, T))


def train(m: GPT2, mine: range, micro_batches: int, inputs, workers: int = 1) -> list[tuple[float, float]]:
    """Train on the micro-batches of `mine` of each step; return (loss, norm) of each."""
    steps, found = Steps(m), []
    m.initialize(3)

    def graphs():
        for step in range(STEPS):
            for n, micro in enumerate(mine):
                slot, graph = steps.micro_batch(step * len(mine) + n)
                tokens, targets = m.inputs(slot)
                tokens[:], targets[:] = inputs[step * micro_batches + micro]
                m.set_hyper(step, 1e-3, 0.1, slot=slot)
                yield graph

    with scheduler("native", workers=workers) as s:
        for number, _ in enumerate(s.run_each(graphs()), start=1):
            if number % len(mine) == 0:
                slot = (number - 1) % 2
                found.append((m.loss_of(slot), m.norm_of(slot)))
    return found


@cache
def alone(micro_batches: int, **options):
    """What one machine finds, with as many micro-batches."""
    config = load_graph("tiny", SMALL | {"batch.accumulate": micro_batches} | options)
    m = GPT2(config.model, config.batch, config.tiles, config.options)
    return train(m, range(micro_batches), micro_batches, batches(config, micro_batches)), m


@cache
def replicas(count: int, micro_batches: int, is_sharded: bool = False, as_bf16: bool = False, bucket_bytes: int = 40_000, **options):
    """Return (what each rank finds, its model, its communicator's transfers)."""
    ended: list = [None] * count
    with linked(count) as peers:
        communicators = [Communicator(links, as_bf16) for links in peers]

        def run(rank: int) -> None:
            mine = share(micro_batches, rank, count)
            config = load_graph("tiny", SMALL | {"batch.accumulate": len(mine)} | options)
            replica = Replica(rank, count, micro_batches, communicators[rank], bucket_bytes, is_sharded)
            m = GPT2(config.model, config.batch, config.tiles, config.options, replica=replica)
            found = train(m, mine, micro_batches, batches(config, micro_batches))
            ended[rank] = found, m, communicators[rank].take_transfers()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(120)
        for each in communicators:
            each.close()
    assert all(ended)
    return ended


@pytest.mark.parametrize(("count", "micro_batches", "bucket_bytes"), [(2, 2, 10**9), (3, 4, 40_000), (4, 4, 1)])
def test_replicas_have_the_same_bits_and_find_what_one_machine_finds(count, micro_batches, bucket_bytes):
    """The same losses and norms on all ranks, to the bit; those of one machine to rounding; and the same parameters."""
    ended = replicas(count, micro_batches, bucket_bytes=bucket_bytes)
    found, first, _ = ended[0]
    wanted, m = alone(micro_batches)
    for others, other, _ in ended[1:]:
        assert others == found
        assert other.parameters_sha256() == first.parameters_sha256()
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    for name, array in m.parameters.items():
        np.testing.assert_allclose(first.parameters[name], array, atol=2e-3 if "b" in name[-1:] else 5e-4)


def test_run_after_run():
    first = replicas(3, 4)
    replicas.cache_clear()
    again = replicas(3, 4)
    assert again[0][0] == first[0][0] and again[2][1].parameters_sha256() == first[0][1].parameters_sha256()


@pytest.mark.parametrize(("count", "micro_batches"), [(2, 2), (3, 4)])
def test_with_shards(count, micro_batches):
    """Each rank has the moments of its part alone, and the parts cover the model. Two ranks have the bits of whole replicas, too."""
    whole, parts = replicas(count, micro_batches), replicas(count, micro_batches, is_sharded=True)
    for found, m, _ in parts:
        assert found == parts[0][0]
        assert m.parameters_sha256() == parts[0][1].parameters_sha256()
        np.testing.assert_allclose(found, whole[0][0], rtol=2e-5)
    if count == 2:
        assert parts[0][1].parameters_sha256() == whole[0][1].parameters_sha256()
    for name, tensor in whole[0][1].v.tensors.items():
        held = np.stack([m.v.tensors[name].array for _, m, _ in parts])
        assert ((held != 0).sum(0) <= 1).all()
        assert ((held.sum(0) != 0) == (tensor.array != 0)).all()


def test_clipped_and_guarded():
    options = {"options.clip_norm": 0.5, "options.skip_norm_z": 4.0}
    found = replicas(2, 2, **options)[0][0]
    wanted, _ = alone(2, **options)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    assert found == replicas(2, 2, is_sharded=True, **options)[1][0]


def test_bf16_on_the_wire():
    """Half the bytes, the same bits on both ranks, near to what float32 finds."""
    whole, halves = replicas(2, 2), replicas(2, 2, as_bf16=True)
    assert halves[0][0] == halves[1][0]
    assert halves[0][1].parameters_sha256() == halves[1][1].parameters_sha256()
    np.testing.assert_allclose(halves[0][0], whole[0][0], rtol=1e-2)
    apart = gathered(halves[0][1], 2)
    assert 2 * (sent(halves[0]) - apart) == sent(whole[0]) - apart


def sent(ended) -> int:
    return sum(transfer.payload_bytes for transfer in ended[2])


def gathered(m: GPT2, count: int) -> int:
    """Return bytes that a rank sends that are no gradients to be summed up: rows of the embedding with their tokens, and words."""
    return STEPS * (count - 1) * (m.batch.rows * (m.model.channels + 1) * 4 + WORDS * 8)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_bytes_on_the_wire_are_the_least(count):
    """2 (N - 1) / N of the gradients, and the rows of the embedding and the loss, which are few."""
    ended = replicas(count, 4 if count > 2 else 2)
    m = ended[0][1]
    least = 2 * (count - 1) * m.p.nbytes * STEPS
    assert sum(map(sent, ended)) == least + count * gathered(m, count)


def test_buckets_come_in_reverse_layer_order():
    """The head's first, then the layers from the last to the first, the embedding's rows last."""
    config = load_graph("tiny", SMALL)

    class Recorder:
        number, asked = 0, []

        def new_bucket(self, what, parts, owners=()):
            self.asked.append((what, parts))
            return len(self.asked) - 1

    m = GPT2(config.model, config.batch, config.tiles, config.options, replica=Replica(0, 2, 2, Recorder(), 1))
    graph = Steps(m).micro_batch(0)[1]
    names = [tile.tensor.name for task in graph.tasks if task.section[0] == "network" for _, tile in task.calls[0].tiles()]
    order = [name for name in dict.fromkeys(names) if name.startswith("d") and name[-1] == "w"]
    assert names[0] == "dwte" and order[0] == "dlnfw"
    layers = [tile.spans[0] for task in graph.tasks if task.section[0] == "network" for _, tile in task.calls[0].tiles()
              if tile.tensor.name == "dfcw"]  # fmt: skip
    assert layers == sorted(layers, reverse=True) and set(layers) == {0, 1}
