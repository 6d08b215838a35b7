"""GPT-2's tensors: each declared once, here, under llm.c's name.

Dimensions are those of shape.py. A gradient is `d` + name; weights are (OC, C), as in llm.c, so that one row makes one output column.
"""

import copy
import hashlib

import numpy as np

from taskgpt.gpt2.gradients import LOSS_OUTLIER, NORM_OUTLIER, NOT_FINITE, UPDATED, WINDOW
from taskgpt.gpt2.grid import Grid
from taskgpt.gpt2.replicas import WORDS, Replica
from taskgpt.gpt2.shape import Batch, MicroBatch, Model, Options, Tiles
from taskgpt.products import way_for
from taskgpt.tasks import Arena, TensorSpec

MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")  # what weight decay is for; the rest are biases and norms


class GPT2:
    """The memory of a model in training: parameters, gradients, AdamW's moments, activations, and what changes with every step.

    `p`, `g`, `m`, `v`, `a`, `d`, `w` and `s` are arenas of tensors: parameters, those of their gradients that are stored, first and second
    moments, activations, gradients of activations, what the guard has seen, and the step's inputs and outputs. Of the last there are two,
    `slots`, so that the next step's inputs can be written while a step runs; `s` is the first. `micro` says which micro-batch of a step is
    recorded: one that is all of it, if not told otherwise. `shared=True` makes the arenas visible to worker processes. `replica`: if it is
    one of several (replicas.py). Raises ValueError if the sequence is longer than the model's maximum, MemoryError if there is no room for
    shared memory.
    """

    SLOTS = 2

    def __init__(self, model: Model, batch: Batch, tiles: Tiles, options: Options, shared: bool = False, replica: Replica | None = None):
        if batch.seq_len > model.max_seq_len:
            raise ValueError(f"seq_len = {batch.seq_len} is longer than the model's max_seq_len = {model.max_seq_len}")
        self.model, self.batch, self.options, self.grid = model, batch, options, Grid(model, batch, tiles)
        self.micro, self.replica = MicroBatch(), replica
        self.p, self.m, self.v, self.g, self.a, self.d, self.w, *slots = (Arena(specs, shared) for specs in self._specs())
        self.slots = tuple(slots)
        self.s = self.slots[0]

    def with_slot(self, slot: int, micro: MicroBatch = MicroBatch()) -> "GPT2":  # noqa: B008 - a constant
        """Return the same memory, with another slot as its `s`, for a micro-batch of a step."""
        other = copy.copy(self)
        other.s, other.micro = self.slots[slot], micro
        return other

    def take_state(self, other: "GPT2") -> None:
        """Have the memory of another model of the same shape as `state`. Before graphs are recorded."""
        self.p, self.m, self.v, self.w = other.state_arenas

    @property
    def products(self) -> int:
        """Return the way to multiply that the options name."""
        return way_for(self.options.products, self.options.precision)

    @property
    def update(self) -> str:
        """Return `options.update`, or "separate" where it must be."""
        return "separate" if self.replica or self.options.separate_because(self.batch) else self.options.update

    @property
    def is_scaled(self) -> bool:
        """Return True if an update depends on the gradient of all parameters."""
        return self.replica is not None or self.options.is_scaled

    @property
    def step_tokens(self) -> int:
        """Tokens that a step trains on, those of all replicas."""
        return self.replica.micro_batches * self.batch.rows if self.replica else self.batch.tokens

    def _specs(self) -> list[dict[str, TensorSpec]]:
        """Return what each arena holds: p, m, v, g, a, d, w, then the slots."""
        parameters = self._parameter_specs()
        p, m, v, g = ({prefix + name: spec for name, spec in parameters.items()} for prefix in ("", "m_", "v_", "d"))
        if self.update == "fused":
            # All rows of a gradient come in one product, but for the logits if they come in blocks of rows.
            g = {"dwte": g["dwte"]} if self.grid.logits_rows < self.batch.rows else {}
        if self.batch.accumulate > 1:
            # Of weights and of wte, products add to what is there; of the others there is a place for one micro-batch's part.
            g |= {f"part_{name}": spec for name, spec in g.items() if name[1:] not in MATRICES or name == "dwpe"}
        arenas = self._activation_specs(), self._activation_gradient_specs(), self._guard_specs()
        return [p, m, v, g, *arenas, *[self._step_specs()] * self.SLOTS]

    def _parameter_specs(self) -> dict[str, TensorSpec]:
        """Weights and their biases are cut by output columns, wte by vocabulary; what is stacked by layers is cut between them."""
        columns, vocabulary = self.grid.tiles.columns, self.grid.tiles.vocabulary
        specs = {}
        for name, shape in self.model.parameter_shapes().items():
            if name in ("wte", "wpe"):
                cuts = (vocabulary, None)
            elif name.startswith("ln"):
                cuts = (1, None)
            else:
                cuts = (1, columns, None)[: len(shape)]
            specs[name] = TensorSpec(shape, cuts)
        return specs

    def _activation_specs(self) -> dict[str, TensorSpec]:
        L, C, NH, R = self.model.layers, self.model.channels, self.model.heads, self.batch.rows
        rows, columns, heads = self.grid.row_cuts, self.grid.tiles.columns, self.grid.tiles.heads
        by_rows = TensorSpec((L, R, C), (1, rows, None))
        by_columns = TensorSpec((L, R, C), (1, rows, columns))
        hidden = TensorSpec((L, R, 4 * C), (1, rows, columns))
        statistic = TensorSpec((L, R), (1, rows))
        by_heads = TensorSpec((L, R, NH), (1, self.batch.seq_len, heads))
        numbers = TensorSpec((R,), (rows,))
        specs = {
            "encoded": TensorSpec((R, C), (rows, None)),
            "ln1": by_rows,
            **self._statistics("ln1", statistic),
            "qkv": TensorSpec((L, R, 3 * C), (1, rows, self.grid.head_cuts)),
            "atty": TensorSpec((L, R, C), (1, rows, self.grid.head_cuts)),
            "att_max": by_heads,
            "att_rsum": by_heads,
            "attproj": by_columns,
            "residual2": by_columns,
            "ln2": by_rows,
            **self._statistics("ln2", statistic),
            "fch": hidden,
            "fch_gelu": hidden,
            "fcproj": by_columns,
            "residual3": by_columns,
            "lnf": TensorSpec((1, R, C), (1, rows, None)),
            **self._statistics("lnf", TensorSpec((1, R), (1, rows))),
            "logits": self._logits_spec(),
            "logits_max": numbers,
            "logits_rsum": numbers,
            "losses": numbers,
        }
        if self.batch.accumulate > 1:
            specs["loss_sum"] = TensorSpec((1,), dtype=np.dtype(np.float64))
        if self.options.kernels == "fused":
            del specs["attproj"], specs["fcproj"]  # go straight into the residual stream
        return specs

    def _statistics(self, place: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {place + suffix: spec for suffix in self.model.norms.statistics}

    def _logits_spec(self) -> TensorSpec:
        """All logits, or two blocks of rows that take turns, so that one can be filled while the other is still read."""
        held = self.grid.logits_rows
        shape = (1 if held == self.batch.rows else 2, held, self.model.padded_vocabulary)
        return TensorSpec(shape, (1, *self.grid.logits_cuts))

    def _activation_gradient_specs(self) -> dict[str, TensorSpec]:
        """Layers take turns in two slots: the weight gradients of one layer may still read theirs while the next layer fills the other.

        The gradient of the logits takes the place of the logits.
        """
        C, R = self.model.channels, self.batch.rows
        rows, columns = self.grid.row_cuts, self.grid.tiles.columns
        by_rows = TensorSpec((2, R, C), (1, rows, None))
        by_columns = TensorSpec((2, R, C), (1, rows, columns))
        return {
            "dlnf": TensorSpec((R, C), (rows, columns)),
            "dresidual3": by_rows,
            "dfch": TensorSpec((2, R, 4 * C), (1, rows, columns)),
            "dln2": by_columns,
            "dresidual2": by_rows,
            "datty": TensorSpec((2, R, C), (1, rows, self.grid.head_cuts)),
            "dqkv": TensorSpec((2, R, 3 * C), (1, rows, self.grid.head_cuts)),
            "dln1": by_columns,
            **({"all_dencoded": TensorSpec((self.replica.count * R, C))} if self.replica else {}),
            **({"all_tokens": TensorSpec((self.replica.count * R,), dtype=np.dtype(np.int32))} if self.replica else {}),
        }

    def _guard_specs(self) -> dict[str, TensorSpec]:
        if not self.options.is_guarded:
            return {}
        window = TensorSpec((WINDOW,), dtype=np.dtype(np.float64))
        return {"loss_window": window, "norm_window": window, "seen": TensorSpec((2,), dtype=np.dtype(np.int64))}

    def _step_specs(self) -> dict[str, TensorSpec]:
        R, rows, number = self.batch.rows, self.grid.row_cuts, TensorSpec((1,))
        tokens = TensorSpec((R,), (rows,), np.dtype(np.int32))
        f64 = np.dtype(np.float64)
        squares = TensorSpec((self.grid.square_places[""],), (1,), f64)
        specs = {"tokens": tokens, "targets": tokens, "hyper": TensorSpec((7,)), "loss": number, "squares": squares, "norm": number}
        if self.is_scaled:
            specs |= {"scale": number, "verdict": TensorSpec((1,), dtype=np.dtype(np.int32))}
        if self.options.is_guarded:
            specs["z"] = TensorSpec((2,), dtype=f64)
        if self.replica:
            specs |= {"words": TensorSpec((WORDS,), dtype=f64), "all_words": TensorSpec((self.replica.count * WORDS,), dtype=f64)}
        return specs

    def inputs(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of a slot, (B, T) each, to be written."""
        B, of_slot = self.batch.batch_size, self.slots[slot]
        return of_slot.tokens.array.reshape(B, -1), of_slot.targets.array.reshape(B, -1)

    def loss_of(self, slot: int) -> float:
        """Return the mean loss that the last run with a slot found."""
        return float(self.slots[slot].loss.array[0])

    def norm_of(self, slot: int) -> float:
        """Return the norm of the gradient that the last step with a slot found."""
        return float(self.slots[slot].norm.array[0])

    def skipped_of(self, slot: int) -> str:
        """Return why the last step with a slot updated nothing, "" if it did: `loss z 7.2 > 6`."""
        s, options = self.slots[slot], self.options
        verdict = s.verdict.array[0] if self.is_scaled else UPDATED
        if verdict == NOT_FINITE:
            return "loss or norm is not finite"
        if verdict in (LOSS_OUTLIER, NORM_OUTLIER):
            name, at, most = {LOSS_OUTLIER: ("loss", 0, options.skip_loss_z), NORM_OUTLIER: ("norm", 1, options.skip_norm_z)}[verdict]
            return f"{name} z {s.z.array[at]:.1f} > {most:g}"
        return ""

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The arrays of all parameters, in the order of an llm.c checkpoint."""
        return {name: tensor.array for name, tensor in self.p.tensors.items()}

    @property
    def state(self) -> dict[str, np.ndarray]:
        """The arrays that a step hands to the next one: `parameters`, AdamW's moments, m_ + name and v_ + name, what the guard has seen."""
        return {name: tensor.array for arena in self.state_arenas for name, tensor in arena.tensors.items()}

    @property
    def state_arenas(self) -> tuple[Arena, ...]:
        """The arenas of `state`."""
        return self.p, self.m, self.v, self.w

    @property
    def nbytes(self) -> int:
        return sum(arena.nbytes for arena in (self.p, self.m, self.v, self.g, self.a, self.d, self.w, *self.slots))

    @classmethod
    def bytes_needed(cls, model: Model, batch: Batch, tiles: Tiles, options: Options, replica: Replica | None = None) -> int:
        """Return `nbytes` of such a model without making it."""
        shape = cls.__new__(cls)
        shape.model, shape.batch, shape.options, shape.grid, shape.replica = model, batch, options, Grid(model, batch, tiles), replica
        return sum(spec.nbytes for specs in shape._specs() for spec in specs.values())

    def initialize(self, seed: int) -> None:
        """Draw the parameters as llm.c does: weights N(0, 0.02), those that add to the residual stream N(0, 0.02 / sqrt(2 L)).

        Biases are 0, norms begin as they say. The generator of a tensor depends on the seed and the tensor alone, not on tiles or order.
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
                array[...] = self.model.norms.parameters[name[3:]] if name.startswith("ln") else 0.0

    def set_hyper(
        self, step: int, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, slot: int = 0
    ) -> None:
        """Write what AdamW needs in a step (counted from 0), in float32 as llm.c computes it, into a slot."""
        f = np.float32
        corrections = [f(1) - np.power(f(beta), f(step + 1), dtype=f) for beta in (beta1, beta2)]
        self.slots[slot].hyper.array[:] = [lr, beta1, beta2, eps, weight_decay, *corrections]

    def parameters_sha256(self) -> str:
        """Return the SHA-256 of all parameters in checkpoint order, padding included: equal hashes mean equal bits."""
        digest = hashlib.sha256()
        for tensor in self.p.tensors.values():
            digest.update(tensor.array)
        return digest.hexdigest()
