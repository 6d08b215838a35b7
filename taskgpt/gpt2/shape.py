"""GPT-2's shape, its batch, its tiles, its options: the tables of a graph file.

Dimensions: B sequences of T tokens, R = B * T rows, C channels, NH heads, L layers, V vocabulary, Vp padded to a multiple of 128, OC output
columns of a matrix.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from taskgpt.gpt2.norms import NORMS, Norm
from taskgpt.products.ways import PRECISIONS, PRODUCTS, way_for

MOST = 2**31 - 1  # of any size: what the integers of llm.c's file headers hold


def _at_least(n: int):
    return field(metadata={"at_least": n, "at_most": MOST})


@dataclass(frozen=True)
class Model:
    """The shape of a GPT-2. Raises ValueError if `heads` does not divide `channels`, or if the padded vocabulary is too small."""

    layers: int = _at_least(1)
    heads: int = _at_least(1)
    channels: int = _at_least(1)
    vocabulary: int = _at_least(1)
    max_seq_len: int = _at_least(1)
    padded_vocabulary: int = field(default=0, metadata={"at_least": 0, "at_most": MOST})  # 0: the next multiple of 128
    norm: str = field(default="layernorm", metadata={"choices": tuple(NORMS)})

    def __post_init__(self):
        if self.heads >= 1 and self.channels % self.heads:
            raise ValueError(f"channels = {self.channels} is not a multiple of heads = {self.heads}")
        if not self.padded_vocabulary:
            object.__setattr__(self, "padded_vocabulary", -(-self.vocabulary // 128) * 128)
        if self.padded_vocabulary < self.vocabulary:
            raise ValueError(f"padded_vocabulary = {self.padded_vocabulary} is smaller than vocabulary = {self.vocabulary}")

    @property
    def head_size(self) -> int:
        return self.channels // self.heads

    @property
    def norms(self) -> Norm:
        return NORMS[self.norm]

    def parameter_shapes(self, vocabulary: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the tensors in the order of an llm.c checkpoint, which has 16; wte has padded_vocabulary rows unless told otherwise."""
        L, C = self.layers, self.channels
        return {
            "wte": (vocabulary or self.padded_vocabulary, C),
            "wpe": (self.max_seq_len, C),
            **self._of_norm("ln1", (L, C)),
            "qkvw": (L, 3 * C, C),
            "qkvb": (L, 3 * C),
            "attprojw": (L, C, C),
            "attprojb": (L, C),
            **self._of_norm("ln2", (L, C)),
            "fcw": (L, 4 * C, C),
            "fcb": (L, 4 * C),
            "fcprojw": (L, C, 4 * C),
            "fcprojb": (L, C),
            **self._of_norm("lnf", (1, C)),
        }

    def _of_norm(self, place: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the parameters of the norm at a place: ln1, ln2 or lnf."""
        return {place + suffix: shape for suffix in self.norms.parameters}

    def parameter_count(self) -> int:
        """Return the number of parameters without padding: 124,439,808 for GPT-2."""
        return sum(int(np.prod(shape)) for shape in self.parameter_shapes(self.vocabulary).values())


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens at a time, a micro-batch; the gradients of `accumulate` of them make one step."""

    batch_size: int = _at_least(1)
    seq_len: int = _at_least(1)
    accumulate: int = field(default=1, metadata={"at_least": 1, "at_most": MOST})

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens that a step trains on."""
        return self.accumulate * self.rows


@dataclass(frozen=True)
class Tiles:
    """How large a task is. Every size may exceed what it cuts, and need not divide it."""

    rows: int = _at_least(1)  # rows of (B, T) in a matrix product
    columns: int = _at_least(1)  # output columns of a matrix product, and rows of a weight in its update
    pointwise_rows: int = _at_least(1)  # rows in embedding, LayerNorm, GELU, residual and classifier
    heads: int = _at_least(1)  # heads in an attention task
    vocabulary: int = _at_least(1)  # vocabulary entries in a task of the language-model head
    logits_rows: int = field(default=0, metadata={"at_least": 0, "at_most": MOST})  # rows whose logits are held at a time; 0: all


_WAYS = {"default": "fused", "metadata": {"choices": ("fused", "separate")}}
_LIMIT = {"default": 0.0, "metadata": {"at_least": 0, "at_most": MOST}}  # 0: none


@dataclass(frozen=True)
class Options:
    """Choices. All but `kernels` and `update` change the numbers; these two change time and memory, and no bit.

    Raises ValueError for a precision that this machine cannot multiply in.
    """

    weight_decay_on: str = field(metadata={"choices": ("matrices", "all")})
    commutative: bool = False
    kernels: str = field(**_WAYS)  # fused: GELU, residual and softmax in one task with what comes before; separate: as in llm.c
    update: str = field(**_WAYS)  # fused: AdamW in one task with the gradient, which is not stored; separate: as in llm.c
    clip_norm: float = field(**_LIMIT)  # the largest norm that the gradient of all parameters is left with
    skip_loss_z: float = field(**_LIMIT)  # a step whose loss has a larger z-score updates nothing
    skip_norm_z: float = field(**_LIMIT)  # a step whose gradient norm has a larger z-score updates nothing
    on_nan: str = field(default="stop", metadata={"choices": ("stop", "skip")})  # after a loss or norm that is not finite
    products: str = field(default=PRODUCTS[0], metadata={"choices": PRODUCTS})  # who multiplies matrices
    precision: str = field(default=PRECISIONS[0], metadata={"choices": PRECISIONS})  # of what is multiplied; sums are float32

    def __post_init__(self):
        way_for(self.products, self.precision)

    @property
    def is_guarded(self) -> bool:
        """Return True if outliers are looked for."""
        return self.skip_loss_z > 0 or self.skip_norm_z > 0

    @property
    def is_scaled(self) -> bool:
        """Return True if an update depends on the gradient of all parameters."""
        return self.clip_norm > 0 or self.is_guarded or self.on_nan == "skip"

    def separate_because(self, batch: Batch) -> str:
        """Return why updates cannot be in one task with their gradient, whatever `update` says; "" if they can."""
        if self.is_scaled:
            what = "clipping" if self.clip_norm else "skipping a step"
            return f"{what} needs the norm of the whole gradient before any update"
        return f"the gradients of {batch.accumulate} micro-batches are added up before it" if batch.accumulate > 1 else ""


class MicroBatch(NamedTuple):
    """Where a micro-batch stands in its step: the first writes gradients, the others add to them, the last updates.

    number: of those that one graph has, from 0.
    """

    is_first: bool = True
    is_last: bool = True
    number: int = 0
