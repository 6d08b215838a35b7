"""Sampling text as llm.c does: from the full distribution, with its random numbers.

A token needs one new row of logits. Rows are computed in blocks of a recorded graph each; what a block needs of earlier ones, their keys
and values, still lies in the activations from when they were computed. That is a key-value cache made of nothing but tiles.
"""

from collections.abc import Callable

import numpy as np

from taskgpt.gpt2.grid import blocks
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import sampling_graph
from taskgpt.tasks import Graph

LENGTH = 64  # tokens, the first of them end-of-text; shorter sequences go on in the next one of the batch, with nothing before them
BLOCK = 16  # rows: few enough that reading the weights, not arithmetic, sets the time


class Random:
    """llm.c's random numbers: xorshift* of Marsaglia and Vigna, 64-bit state, seed 1337."""

    def __init__(self, state: int = 1337):
        self.state = state

    def uniform(self) -> np.float32:
        """Return the next number in [0, 1)."""
        state = self.state
        state ^= state >> 12
        state ^= state << 25 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        self.state = state
        return np.float32((state * 0x2545F4914F6CDD1D & 0xFFFFFFFFFFFFFFFF) >> 32 >> 8) / np.float32(2**24)


class Sampler:
    """Draws sequences from a model; its random numbers go on from one sequence to the next.

    `graphs` are what it runs, to be compiled or checked beforehand; `run` runs one of them.
    """

    def __init__(self, gpt: GPT2, prepare: Callable[[Graph], Graph] = lambda graph: graph):
        self.gpt = gpt
        self.length = min(LENGTH, gpt.batch.rows)
        sequences = gpt.grid.sequences(slice(0, self.length - 1))
        self.rows = [rows for sequence in sequences for rows in blocks(sequence, min(BLOCK, gpt.grid.logits_rows))]
        self.graphs = [prepare(sampling_graph(gpt, rows.start, rows.stop)) for rows in self.rows]
        self.random = Random()

    def sample(self, run: Callable[[Graph], None], end_of_text: int) -> list[int]:
        """Return the ids drawn after an end-of-text, `length` - 1 of them. Overwrites the step's tokens and the activations."""
        tokens, logits = self.gpt.s.tokens.array, self.gpt.a.logits.array
        tokens[: self.length] = end_of_text
        for rows, graph in zip(self.rows, self.graphs, strict=True):
            for at in range(rows.start, rows.stop):
                run(graph)
                tokens[at + 1] = draw(logits[0, at - rows.start, : self.gpt.model.vocabulary], self.random.uniform())
        return tokens[1 : self.length].tolist()


def draw(logits: np.ndarray, coin: np.float32) -> int:
    """Return the first id whose cumulated probability exceeds `coin`: temperature 1, float32 sums in order, as in llm.c."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= np.add.accumulate(probabilities)[-1]
    cumulated = np.add.accumulate(probabilities)
    return min(int(np.searchsorted(cumulated, coin, side="right")), len(logits) - 1)
