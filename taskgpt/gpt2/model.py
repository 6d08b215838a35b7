"""GPT-2's shape and its tensors: each declared once, here, under llm.c's name.

Dimensions: B sequences of T tokens, R = B * T rows, C channels, NH heads, L layers, V vocabulary, Vp padded to a multiple of 128, OC output
columns of a matrix. A gradient is `d` + name; weights are (OC, C), as in llm.c, so that one row makes one output column.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from taskgpt.tasks import Arena, TensorSpec

MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")  # what weight decay is for; the rest are biases and LayerNorm


def _at_least(n: int):
    return field(metadata={"at_least": n})


@dataclass(frozen=True)
class Model:
    """The shape of a GPT-2. Raises ValueError if `heads` does not divide `channels`, or if the padded vocabulary is too small."""

    layers: int = _at_least(1)
    heads: int = _at_least(1)
    channels: int = _at_least(1)
    vocabulary: int = _at_least(1)
    max_seq_len: int = _at_least(1)
    padded_vocabulary: int = 0  # 0: the next multiple of 128

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

    def parameter_shapes(self, vocabulary: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return the 16 tensors in the order of an llm.c checkpoint; wte has padded_vocabulary rows unless told otherwise."""
        L, C = self.layers, self.channels
        return {
            "wte": (vocabulary or self.padded_vocabulary, C),
            "wpe": (self.max_seq_len, C),
            "ln1w": (L, C),
            "ln1b": (L, C),
            "qkvw": (L, 3 * C, C),
            "qkvb": (L, 3 * C),
            "attprojw": (L, C, C),
            "attprojb": (L, C),
            "ln2w": (L, C),
            "ln2b": (L, C),
            "fcw": (L, 4 * C, C),
            "fcb": (L, 4 * C),
            "fcprojw": (L, C, 4 * C),
            "fcprojb": (L, C),
            "lnfw": (1, C),
            "lnfb": (1, C),
        }

    def parameter_count(self) -> int:
        """Return the number of parameters without padding: 124,439,808 for GPT-2."""
        return sum(int(np.prod(shape)) for shape in self.parameter_shapes(self.vocabulary).values())


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens a step."""

    batch_size: int = _at_least(1)
    seq_len: int = _at_least(1)

    @property
    def rows(self) -> int:
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Tiles:
    """How large a task is. Every size may exceed what it cuts, and need not divide it."""

    rows: int = _at_least(1)  # rows of (B, T) in a matrix product
    columns: int = _at_least(1)  # output columns of a matrix product, and rows of a weight in its update
    pointwise_rows: int = _at_least(1)  # rows in embedding, LayerNorm, GELU, residual and classifier
    heads: int = _at_least(1)  # heads in an attention task
    vocabulary: int = _at_least(1)  # vocabulary entries in a task of the language-model head


@dataclass(frozen=True)
class Options:
    """Choices that change the numbers."""

    weight_decay_on: str = field(metadata={"choices": ("matrices", "all")})
    commutative: bool = False


class GPT2:
    """The memory of a model in training: parameters, gradients, AdamW's moments, activations, and what changes with every step.

    `p`, `g`, `m`, `v`, `a`, `d` and `s` are arenas of tensors: parameters, their gradients, first and second moments, activations,
    gradients of activations, and the step's inputs and outputs. `shared=True` makes them visible to worker processes. Raises ValueError
    if the sequence is longer than the model's maximum, MemoryError if there is no room for shared memory.
    """

    def __init__(self, model: Model, batch: Batch, tiles: Tiles, options: Options, shared: bool = False):
        if batch.seq_len > model.max_seq_len:
            raise ValueError(f"seq_len = {batch.seq_len} is longer than the model's max_seq_len = {model.max_seq_len}")
        self.model, self.batch, self.tiles, self.options = model, batch, tiles, options
        parameters = self._parameter_specs()
        self.p, self.g, self.m, self.v = (
            Arena({prefix + name: spec for name, spec in parameters.items()}, shared) for prefix in ("", "d", "m_", "v_")
        )
        self.a = Arena(self._activation_specs(), shared)
        self.d = Arena(self._activation_gradient_specs(), shared)
        self.s = Arena(self._step_specs(), shared)

    def _parameter_specs(self) -> dict[str, TensorSpec]:
        """Weights are cut by output columns, wte by vocabulary; what is stacked by layers is cut between them."""
        columns, vocabulary = self.tiles.columns, self.tiles.vocabulary
        specs = {}
        for name, shape in self.model.parameter_shapes().items():
            stacked = (1, None) if len(shape) == 2 else (1, columns, None)
            specs[name] = TensorSpec(shape, (vocabulary, None) if name in ("wte", "wpe") else stacked)
        return specs

    def _activation_specs(self) -> dict[str, TensorSpec]:
        L, C, NH, R = self.model.layers, self.model.channels, self.model.heads, self.batch.rows
        rows, columns, heads = self._row_cuts(), self.tiles.columns, self.tiles.heads
        blocks = -(-self.model.padded_vocabulary // self.tiles.vocabulary)
        by_rows = TensorSpec((L, R, C), (1, rows, None))
        by_columns = TensorSpec((L, R, C), (1, rows, columns))
        statistic = TensorSpec((L, R), (1, rows))
        by_heads = TensorSpec((L, R, NH), (1, self.batch.seq_len, heads))
        return {
            "encoded": TensorSpec((R, C), (rows, None)),
            "ln1": by_rows,
            "ln1_mean": statistic,
            "ln1_rstd": statistic,
            "qkv": TensorSpec((L, R, 3 * C), (1, rows, self._head_cuts())),
            "atty": TensorSpec((L, R, C), (1, rows, self._head_cuts())),
            "att_max": by_heads,
            "att_rsum": by_heads,
            "attproj": by_columns,
            "residual2": by_rows,
            "ln2": by_rows,
            "ln2_mean": statistic,
            "ln2_rstd": statistic,
            "fch": TensorSpec((L, R, 4 * C), (1, rows, columns)),
            "fch_gelu": TensorSpec((L, R, 4 * C), (1, rows, None)),
            "fcproj": by_columns,
            "residual3": by_rows,
            "lnf": TensorSpec((R, C), (rows, None)),
            "lnf_mean": TensorSpec((R,), (rows,)),
            "lnf_rstd": TensorSpec((R,), (rows,)),
            "logits": TensorSpec((R, self.model.padded_vocabulary), (rows, self.tiles.vocabulary)),
            "block_max": TensorSpec((R, blocks), (rows, 1)),
            "block_sum": TensorSpec((R, blocks), (rows, 1)),
            "logits_max": TensorSpec((R,), (rows,)),
            "logits_rsum": TensorSpec((R,), (rows,)),
            "losses": TensorSpec((R,), (rows,)),
        }

    def _activation_gradient_specs(self) -> dict[str, TensorSpec]:
        """Layers take turns in two slots: the weight gradients of one layer may still read theirs while the next layer fills the other.

        The gradient of the logits takes the place of the logits.
        """
        C, R = self.model.channels, self.batch.rows
        rows, columns = self._row_cuts(), self.tiles.columns
        by_rows = TensorSpec((2, R, C), (1, rows, None))
        by_columns = TensorSpec((2, R, C), (1, rows, columns))
        return {
            "dlnf": TensorSpec((R, C), (rows, columns)),
            "dresidual3": by_rows,
            "dfch": TensorSpec((2, R, 4 * C), (1, rows, columns)),
            "dln2": by_columns,
            "dresidual2": by_rows,
            "datty": TensorSpec((2, R, C), (1, rows, self._head_cuts())),
            "dqkv": TensorSpec((2, R, 3 * C), (1, rows, self._head_cuts())),
            "dln1": by_columns,
        }

    def _step_specs(self) -> dict[str, TensorSpec]:
        R, rows = self.batch.rows, self._row_cuts()
        tokens = TensorSpec((R,), (rows,), np.dtype(np.int32))
        return {"tokens": tokens, "targets": tokens, "hyper": TensorSpec((7,)), "loss": TensorSpec((1,))}

    def _row_cuts(self) -> tuple[int, ...]:
        """Rows are cut where a matrix product, a pointwise task or a sequence (attention) begins."""
        return self.tiles.rows, self.tiles.pointwise_rows, self.batch.seq_len

    def _head_cuts(self) -> tuple[int, ...]:
        """Columns are cut where a matrix product begins, and where a group of heads begins, in each of Q, K and V.

        Groups that do not divide the heads begin at different places in the three: then every head is a cell.
        """
        group = self.tiles.heads if self.model.heads % self.tiles.heads == 0 else 1
        return self.tiles.columns, group * self.model.head_size, self.model.channels

    @property
    def nbytes(self) -> int:
        return sum(arena.nbytes for arena in (self.p, self.g, self.m, self.v, self.a, self.d, self.s))

    @classmethod
    def bytes_needed(cls, model: Model, batch: Batch, tiles: Tiles) -> int:
        """Return `nbytes` of such a model without making it."""
        shape = cls.__new__(cls)
        shape.model, shape.batch, shape.tiles = model, batch, tiles
        sections = (shape._activation_specs(), shape._activation_gradient_specs(), shape._step_specs())
        rest = sum(spec.nbytes for specs in sections for spec in specs.values())
        return 4 * sum(spec.nbytes for spec in shape._parameter_specs().values()) + rest

    def initialize(self, seed: int) -> None:
        """Draw the parameters as llm.c does: weights N(0, 0.02), those that add to the residual stream N(0, 0.02 / sqrt(2 L)).

        Biases are 0, LayerNorm's weights 1. The generator of a tensor depends on the seed and the tensor alone, not on tiles or order.
        Padding rows of wte stay zero.
        """
        for at, (name, tensor) in enumerate(self.p.tensors.items()):
            array = tensor.array
            if name in MATRICES:
                scale = 0.02 / np.sqrt(2 * self.model.layers) if name in ("attprojw", "fcprojw") else 0.02
                drawn = array[: self.model.vocabulary] if name == "wte" else array
                np.random.default_rng([seed, at]).standard_normal(dtype=np.float32, out=drawn)
                drawn *= np.float32(scale)
            else:
                array[...] = 1.0 if name in ("ln1w", "ln2w", "lnfw") else 0.0

    def set_hyper(self, step: int, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        """Write what AdamW needs in a step (counted from 0), in float32 as llm.c computes it."""
        f = np.float32
        corrections = [f(1) - np.power(f(beta), f(step + 1), dtype=f) for beta in (beta1, beta2)]
        self.s.hyper.array[:] = [lr, beta1, beta2, eps, weight_decay, *corrections]

    def parameters_sha256(self) -> str:
        """Return the SHA-256 of all parameters in checkpoint order, padding included: equal hashes mean equal bits."""
        digest = hashlib.sha256()
        for tensor in self.p.tensors.values():
            digest.update(tensor.array)
        return digest.hexdigest()
