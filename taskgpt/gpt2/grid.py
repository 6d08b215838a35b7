"""Where tensors are cut, and which part of them a task takes: the one place that knows what the tile sizes mean.

A tensor is cut wherever a task's part of it begins, so cuts and parts stand side by side. Parts are slices; the last may be shorter.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from taskgpt.gpt2.shape import Batch, Model, Tiles

LINEAR = {"qkv": 3, "attproj": 1, "fc": 4, "fcproj": 1}  # linear layers, and how many times C their outputs are


def blocks(rows: slice, size: int) -> list[slice]:
    """Cut a slice into slices of `size`; the last may be shorter."""
    return [slice(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size)]


@dataclass(frozen=True)
class Grid:
    """The cuts and parts of a model's tensors."""

    model: Model
    batch: Batch
    tiles: Tiles

    # Rows of (B, T)

    @property
    def row_cuts(self) -> tuple[int, ...]:
        """Rows are cut where a matrix product, a pointwise task, a sequence (attention) or a block of logits begins."""
        return self.tiles.rows, self.tiles.pointwise_rows, self.batch.seq_len, self.logits_rows

    @property
    def all_rows(self) -> slice:
        return slice(0, self.batch.rows)

    def products(self, rows: slice) -> list[slice]:
        return blocks(rows, self.tiles.rows)

    def pointwise(self, rows: slice) -> list[slice]:
        return blocks(rows, self.tiles.pointwise_rows)

    def sequences(self, rows: slice) -> list[slice]:
        return blocks(rows, self.batch.seq_len)

    # Logits: all rows, or a block of them at a time

    @property
    def logits_rows(self) -> int:
        """How many rows of logits are held at a time."""
        return min(self.tiles.logits_rows or self.batch.rows, self.batch.rows)

    @property
    def logits_cuts(self) -> tuple:
        return (self.tiles.rows, self.tiles.pointwise_rows), self.tiles.vocabulary

    def logits(self) -> list[slice]:
        return blocks(self.all_rows, self.logits_rows)

    # Columns, and with them the rows of weights, which are (OC, C)

    def columns(self, count: int) -> list[slice]:
        """Cut so many columns, each `tiles.columns` wide."""
        return blocks(slice(0, count), self.tiles.columns)

    @property
    def head_cuts(self) -> tuple[int, ...]:
        """Columns are cut where a matrix product begins, and where a group of heads begins, in each of Q, K and V.

        Groups that do not divide the heads begin at different places in the three: then every head is a cell.
        """
        group = self.tiles.heads if self.model.heads % self.tiles.heads == 0 else 1
        return self.tiles.columns, group * self.model.head_size, self.model.channels

    def heads(self) -> list[tuple[slice, slice, list[slice]]]:
        """Return (heads, their columns in atty, their columns of Q, K and V in qkv) of each attention task."""
        size, C = self.model.head_size, self.model.channels
        groups = []
        for h in blocks(slice(0, self.model.heads), self.tiles.heads):
            start, stop = h.start * size, h.stop * size
            groups.append((h, slice(start, stop), [slice(start + part * C, stop + part * C) for part in range(3)]))
        return groups

    # Rows of the embeddings

    def vocabulary(self) -> list[slice]:
        return blocks(slice(0, self.model.padded_vocabulary), self.tiles.vocabulary)

    def positions(self) -> list[slice]:
        return blocks(slice(0, self.model.max_seq_len), self.tiles.vocabulary)

    # Sums of squares: a place for each part of a parameter's gradient that one task has

    @cached_property
    def square_places(self) -> dict[str, int]:
        """Return where the places of each layer begin, and, under "", how many there are."""
        L, C, of_norm = self.model.layers, self.model.channels, len(self.model.norms.parameters)
        counts = {layer: 2 * L * -(-wide * C // self.tiles.columns) for layer, wide in LINEAR.items()}
        counts |= {"ln1": L * of_norm, "ln2": L * of_norm, "lnf": of_norm}
        rows_of = {"wte": self.model.padded_vocabulary, "wpe": self.model.max_seq_len}
        counts |= {name: -(-rows // self.tiles.vocabulary) for name, rows in rows_of.items()}
        return dict(zip([*counts, ""], accumulate(counts.values(), initial=0), strict=True))

    def squares(self, layer: str, part: int, count: int) -> slice:
        """Return the places of a part of a layer, which has `count` tensors: 2 of a linear layer, weight and bias."""
        first = self.square_places[layer] + part * count
        return slice(first, first + count)
