"""A model in generation: parameters, the key-value cache, activations of some rows, and the two graphs that work on them.

    decoder = Decoder(model, slots=2, length=100)     # two sequences at a time, of up to 100 tokens
    checkpoints.load(path, model, decoder.parameters)
    decoder.feed(run, [(slot, position, token), ...])             # into the cache
    logits = decoder.step(run, [(slot, position, token), ...])    # into the cache, and the logits of what follows each

Either way rows go through the same kernels, whose results depend on a row's own sequence alone. So logits have the same bits whatever else
is in the cache, and however the tokens came there: a token at a time, or many at once.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from taskgpt.gpt2.generation.kernels import (
    attention_rows,
    encoder_rows,
    lmhead_rows,
    matmul_gelu_rows,
    matmul_residual_rows,
    matmul_rows,
)
from taskgpt.gpt2.generation.products import SIDE
from taskgpt.gpt2.grid import blocks
from taskgpt.gpt2.shape import Model
from taskgpt.tasks import Arena, Graph, Kernel, TensorSpec, Tile

FEED_ROWS = 64  # tokens that go into the cache at once: enough that arithmetic, not reading the weights, sets the time
PIECE_BYTES = 1 << 19  # of a matrix in a task, at most: some 30 us of streaming, against 0.2 us that a task costs

Row = tuple[int, int, int]  # slot, position, token
Run = Callable[[Graph], None]


class Decoder:
    """The memory and the graphs of a model in generation.

    `p`, `c`, `a` and `s` are arenas: parameters, cache, activations, and what changes with every step. `shared=True` makes them visible to
    worker processes. `graphs` are what it runs, to be compiled beforehand. Raises ValueError if `length` is more than the model's maximum,
    MemoryError if there is no room for shared memory.
    """

    def __init__(self, model: Model, slots: int, length: int, shared: bool = False):
        if length > model.max_seq_len:
            raise ValueError(f"length = {length} is longer than the model's max_seq_len = {model.max_seq_len}")
        self.model, self.slots, self.length = model, slots, length
        self.p, self.c, self.a, self.s = (Arena(specs, shared) for specs in _specs(model, slots, length))
        self._feed, self._step = self._record("prefill", FEED_ROWS, False), self._record("decode", slots, True)
        self.graphs = [self._feed, self._step]

    @staticmethod
    def bytes_needed(model: Model, slots: int, length: int) -> int:
        """Return the memory of such a decoder without making it."""
        return sum(spec.nbytes for specs in _specs(model, slots, length) for spec in specs.values())

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The arrays of all parameters, in the order of an llm.c checkpoint."""
        return {name: tensor.array for name, tensor in self.p.tensors.items()}

    def warm_up(self, run: Run) -> None:
        """Run the graphs without a row: what schedulers prepare for a graph is there then, and the first token as fast as others."""
        self.s.count.array[0] = 0
        for graph in self.graphs:
            run(graph)

    def feed(self, run: Run, rows: Sequence[Row]) -> None:
        """Put tokens into the cache. Those before them, of each slot, must be there, or among the rows."""
        for at in range(0, len(rows), FEED_ROWS):
            self._write(rows[at : at + FEED_ROWS])
            run(self._feed)

    def copy(self, slot: int, to: int, count: int) -> None:
        """Copy the first `count` positions of a slot of the cache to another."""
        for cache in (self.c.keys.array, self.c.values.array):
            cache[:, :, to, :count] = cache[:, :, slot, :count]

    def step(self, run: Run, rows: Sequence[Row]) -> np.ndarray:
        """Put one token of each of some slots into the cache; return the logits of what follows, (rows, V), valid until the next step."""
        self._write(rows)
        run(self._step)
        return self.a.logits.array[: len(rows), : self.model.vocabulary]

    def _write(self, rows: Sequence[Row]) -> None:
        for tensor, values in zip((self.s.slots, self.s.at, self.s.tokens), zip(*rows, strict=True), strict=True):
            tensor.array[: len(rows)] = values
        self.s.count.array[0] = len(rows)

    # The program --------------------------------------------------------------------------------------------------------------------

    def _record(self, name: str, rows: int, has_head: bool) -> Graph:
        graph, r = Graph(name), slice(0, rows)
        a, s, p, L = self.a, self.s, self.p, self.model.layers
        spawn = partial(graph.spawn, section=("forward", -1))
        spawn(encoder_rows, a.residual[r], s.tokens[r], s.at[r], s.count[:], p.wte[:], p.wpe[:])
        for l in range(L):
            spawn = partial(graph.spawn, section=("forward", l))
            self._norm(spawn, "ln1", l, a.residual, r)
            self._linear(spawn, matmul_rows, a.qkv, [], a.norm, "qkv", l, r)
            self._attend(spawn, l, r)
            self._linear(spawn, matmul_residual_rows, a.residual2, [a.residual], a.atty, "attproj", l, r)
            self._norm(spawn, "ln2", l, a.residual2, r)
            self._linear(spawn, matmul_gelu_rows, a.hidden, [], a.norm, "fc", l, r)
            self._linear(spawn, matmul_residual_rows, a.residual, [a.residual2], a.hidden, "fcproj", l, r)
        if has_head:
            spawn = partial(graph.spawn, section=("forward", L))
            self._norm(spawn, "lnf", 0, a.residual, r)
            for v in pieces(self.model.vocabulary, self.model.channels):
                spawn(lmhead_rows, a.logits[r, v], a.norm[r], p.wte[v], s.count[:])
        return graph

    def _norm(self, spawn: Callable, place: str, l: int, inp, r: slice) -> None:
        """All rows of the tile, those that are none too: the kernel is training's."""
        norm = self.model.norms
        statistics = [self.a.tensors[suffix][r] for suffix in norm.statistics]
        spawn(norm.forward, self.a.norm[r], *statistics, inp[r], *(self.p.tensors[place + suffix][l] for suffix in norm.parameters))

    def _linear(self, spawn: Callable, kernel: Kernel, out, others: Iterable, inp, layer: str, l: int, r: slice) -> None:
        weight, bias = self.p.tensors[layer + "w"][l], self.p.tensors[layer + "b"][l]
        for c in pieces(*weight.shape):
            spawn(kernel, out[r, c], *(other[r, c] for other in others), inp[r], weight[c], bias[c], self.s.count[:])

    def _attend(self, spawn: Callable, l: int, r: slice) -> None:
        a, s, size, C = self.a, self.s, self.model.head_size, self.model.channels

        def columns(part: int, head: int) -> Tile:
            return a.qkv[r, part * C + head * size : part * C + (head + 1) * size]

        for h in range(self.model.heads):
            cache = [each[l, h : h + 1] for each in (self.c.keys, self.c.values)]
            q, k, v = (columns(part, h) for part in range(3))
            spawn(attention_rows, a.atty[r, h * size : (h + 1) * size], *cache, q, k, v, s.slots[r], s.at[r], s.count[:])


def pieces(outputs: int, inputs: int) -> list[slice]:
    """Cut the rows of a matrix (outputs, inputs) into those of a task each. No bit depends on where."""
    return blocks(slice(0, outputs), _piece(outputs, inputs))


def _piece(outputs: int, inputs: int) -> int:
    """Return the rows of a piece: of about the same size all, as workers wait for the last one."""
    count = -(-4 * outputs * inputs // PIECE_BYTES)
    return -(-outputs // (count * SIDE)) * SIDE


def _specs(model: Model, slots: int, length: int) -> list[dict[str, TensorSpec]]:
    """Return what each arena holds: parameters, cache, activations, the step. Parameters are only read, and need no cuts."""
    rows, C, size = max(FEED_ROWS, slots), model.channels, model.head_size
    residual = TensorSpec((rows, C), (None, (_piece(C, C), _piece(C, 4 * C))))  # written in pieces of two matrices in turns
    cache = TensorSpec((model.layers, model.heads, slots, length, size), (1, 1, None, None, None))
    integers = TensorSpec((rows,), (), np.dtype(np.int32))
    activations = {
        "residual": residual,
        "residual2": residual,
        "norm": TensorSpec((rows, C)),
        **{suffix: TensorSpec((rows,)) for suffix in model.norms.statistics},
        "qkv": TensorSpec((rows, 3 * C), (None, (_piece(3 * C, C), size))),
        "atty": TensorSpec((rows, C), (None, size)),
        "hidden": TensorSpec((rows, 4 * C), (None, _piece(4 * C, C))),
        "logits": TensorSpec((slots, model.vocabulary), (None, _piece(model.vocabulary, C))),
    }
    return [
        {name: TensorSpec(shape) for name, shape in model.parameter_shapes().items()},
        {"keys": cache, "values": cache},
        activations,
        {"tokens": integers, "slots": integers, "at": integers, "count": TensorSpec((1,), (), np.dtype(np.int32))},
    ]
