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
from taskgpt.gpt2.stages import Stage
from taskgpt.products import way_for
from taskgpt.tasks import Arena, Tensor, TensorSpec, Tile

MATRICES = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")  # what weight decay is for; the rest are biases and norms


class GPT2:
    """The memory of a model in training: parameters, gradients, AdamW's moments, activations, and what changes with every step.

    `p`, `g`, `m`, `v`, `a`, `d`, `w` and `s` are arenas of tensors: parameters, those of their gradients that are stored, first and second
    moments, activations, gradients of activations, what the guard has seen, and the step's inputs and outputs. Of the last there are two,
    `slots`, so that the next step's inputs can be written while a step runs; `s` is the first. `micro` says which micro-batch of a step is
    recorded: one that is all of it, if not told otherwise. `shared=True` makes the arenas visible to worker processes. `replica`: if it is
    one of several (replicas.py). `stage`: if it has some of the layers (stages.py): tensors are as long as ever, and the memory of layers
    that are elsewhere is never touched, so that the system gives none. Raises ValueError if the sequence is longer than the model's
    maximum, MemoryError if there is no room for shared memory.
    """

    SLOTS = 2

    def __init__(
        self,
        model: Model,
        batch: Batch,
        tiles: Tiles,
        options: Options,
        shared: bool = False,
        replica: Replica | None = None,
        stage: Stage | None = None,
    ):
        if batch.seq_len > model.max_seq_len:
            raise ValueError(f"seq_len = {batch.seq_len} is longer than the model's max_seq_len = {model.max_seq_len}")
        self.model, self.batch, self.options, self.grid = model, batch, options, Grid(model, batch, tiles)
        self.micro, self.replica, self.stage = MicroBatch(), replica, stage
        self.p, self.m, self.v, self.g, self.a, self.d, self.w, *slots = (Arena(specs, shared) for specs in self._specs())
        self.slots = tuple(slots)
        self.slot, self.s = 0, self.slots[0]
        self._activations = [self.a, *(Arena(specs, shared) for specs in self._specs_in_flight())]

    def with_slot(self, slot: int, micro: MicroBatch = MicroBatch()) -> "GPT2":  # noqa: B008 - a constant
        """Return the same memory, with another slot as its `s`, for a micro-batch of a step."""
        other = copy.copy(self)
        other.slot, other.s, other.micro = slot, self.slots[slot], micro
        if self.stage:
            other.a = self._activations_of(micro.number)
        return other

    def _activations_of(self, number: int) -> Arena:
        """Return the place for the activations of a micro-batch: those in flight have one each."""
        places = self._activations
        if not self.has_vocabulary:
            return places[number % len(places)]
        layers, head = self.a, places[number % len(places)]
        return _Joined(layers.tensors | {name: tensor for name, tensor in head.tensors.items() if self._is_of_head(name)})

    def take_state(self, other: "GPT2") -> None:
        """Have the memory of another model of the same shape as `state`. Before graphs are recorded."""
        self.p, self.m, self.v, self.w = other.state_arenas

    @property
    def products(self) -> int:
        """Return the way to multiply that the options name."""
        return way_for(self.options.products, self.options.precision)

    @property
    def layers(self) -> range:
        """The layers that are here."""
        return self.stage.layers if self.stage else range(self.model.layers)

    @property
    def has_vocabulary(self) -> bool:
        """Return True if the embedding and the head are here."""
        return self.stage is None or self.stage.is_last

    @property
    def held(self) -> int:
        """How many micro-batches of inputs a slot has: those of a graph."""
        return self.batch.accumulate if self.stage else 1

    @property
    def tokens(self) -> Tile:
        """The tokens of the micro-batch."""
        return self.s.tokens[self._rows_of_slot]

    @property
    def targets(self) -> Tile:
        """The targets of the micro-batch."""
        return self.s.targets[self._rows_of_slot]

    @property
    def _rows_of_slot(self) -> slice:
        R = self.batch.rows
        return slice(self.micro.number * R, (self.micro.number + 1) * R)

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
            **({"embedded": TensorSpec((2, R, C), (1, rows, None))} if self.stage else {}),
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
            **({"dencoded": TensorSpec((R, C), (rows, None))} if self.stage else {}),
            **({"all_dencoded": TensorSpec((self.replica.count * R, C))} if self.replica else {}),
            **({"all_tokens": TensorSpec((self.replica.count * R,), dtype=np.dtype(np.int32))} if self.replica else {}),
        }

    def _guard_specs(self) -> dict[str, TensorSpec]:
        if not self.options.is_guarded:
            return {}
        window = TensorSpec((WINDOW,), dtype=np.dtype(np.float64))
        return {"loss_window": window, "norm_window": window, "seen": TensorSpec((2,), dtype=np.dtype(np.int64))}

    def _step_specs(self) -> dict[str, TensorSpec]:
        rows, number = self.grid.row_cuts, TensorSpec((1,))
        tokens = TensorSpec((self.held * self.batch.rows,), (rows,), np.dtype(np.int32))
        f64 = np.dtype(np.float64)
        squares = TensorSpec((self.grid.square_places[""],), (1,), f64)
        specs = {"tokens": tokens, "targets": tokens, "hyper": TensorSpec((7,)), "loss": number, "squares": squares, "norm": number}
        if self.is_scaled:
            specs |= {"scale": number, "verdict": TensorSpec((1,), dtype=np.dtype(np.int32))}
        if self.options.is_guarded:
            specs["z"] = TensorSpec((2,), dtype=f64)
        if peers := self.replica or self.stage:
            specs |= {"words": TensorSpec((WORDS,), dtype=f64), "all_words": TensorSpec((peers.count * WORDS,), dtype=f64)}
        return specs

    def inputs(self, slot: int, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of a slot, (B, T) each, to be written; `number`: of its micro-batch."""
        B, of_slot = self.batch.batch_size, self.slots[slot]
        each = self.held, B, self.batch.seq_len
        return of_slot.tokens.array.reshape(each)[number], of_slot.targets.array.reshape(each)[number]

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
        if self.stage:
            return self._bytes_of_stage()
        return sum(arena.nbytes for arena in (self.p, self.m, self.v, self.g, self.a, self.d, self.w, *self.slots))

    @classmethod
    def bytes_needed(
        cls, model: Model, batch: Batch, tiles: Tiles, options: Options, replica: Replica | None = None, stage: Stage | None = None
    ) -> int:
        """Return `nbytes` of such a model without making it."""
        shape = cls.__new__(cls)
        shape.model, shape.batch, shape.options, shape.grid = model, batch, options, Grid(model, batch, tiles)
        shape.replica, shape.stage = replica, stage
        return shape._bytes_of_stage() if stage else sum(spec.nbytes for specs in shape._specs() for spec in specs.values())

    def initialize(self, seed: int) -> None:
        """Draw the parameters as llm.c does: weights N(0, 0.02), those that add to the residual stream N(0, 0.02 / sqrt(2 L)).

        Biases are 0, norms begin as they say. The generator of a tensor depends on the seed and the tensor alone, not on tiles or order.
        Padding rows of wte stay zero.
        """
        for at, (name, tensor) in enumerate(self.p.tensors.items()):
            here = tensor.array[self.rows_here(name)]
            if name in MATRICES:
                scale = 0.02 / np.sqrt(2 * self.model.layers) if name in ("attprojw", "fcprojw") else 0.02
                random, before = np.random.default_rng([seed, at]), np.empty(tensor.shape[1:], np.float32)
                for _ in range(0 if name in self._of_vocabulary else self.layers.start):
                    random.standard_normal(dtype=np.float32, out=before)
                drawn = here[: self.model.vocabulary] if name == "wte" else here
                random.standard_normal(dtype=np.float32, out=drawn)
                drawn *= np.float32(scale)
            else:
                here[...] = self.model.norms.parameters[name[3:]] if name.startswith("ln") else 0.0

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

    # Of a stage ---------------------------------------------------------------------------------------------------------------------

    def _specs_in_flight(self) -> list[dict[str, TensorSpec]]:
        """Return what the places have for activations beyond the first: the last stage, which ends a micro-batch before it begins the next
        one, has one place for layers, and keeps of the head what the gradient of wte waits for: that of the embedding, which comes last."""
        if not self.stage:
            return []
        places = min(self.stage.count, self.batch.accumulate) if self.has_vocabulary else self.stage.in_flight
        specs = {name: spec for name, spec in self._activation_specs().items() if self._is_of_head(name) == self.has_vocabulary}
        return [specs] * (places - 1)

    def _is_of_head(self, name: str) -> bool:
        return name.startswith(("lnf", "logits")) or name == "losses"

    def _bytes_of_stage(self) -> int:
        """Return the bytes of what a stage touches."""
        p, m, v, g, a, d, *others = self._specs()
        share = len(self.layers) / self.model.layers
        needed = sum(spec.nbytes for specs in others for spec in specs.values())
        for prefixed in (p, m, v, g):
            for name, spec in prefixed.items():
                needed += int(spec.nbytes * (share if not name.endswith(self._of_vocabulary) else self.has_vocabulary))
        for specs in (a, *self._specs_in_flight()):
            for name, spec in specs.items():
                is_of_head = self._is_of_head(name) or name in ("embedded", "loss_sum")
                needed += int(spec.nbytes * (self.has_vocabulary if is_of_head else 1 if name == "encoded" else share))
        return needed + sum(spec.nbytes for name, spec in d.items() if self.has_vocabulary or name not in ("dlnf", "dencoded"))

    @property
    def _of_vocabulary(self) -> tuple[str, ...]:
        """Parameters that belong to no layer: those of embedding, head, and the norm before it."""
        return "wte", "wpe", *("lnf" + suffix for suffix in self.model.norms.parameters)

    @property
    def of_layers(self) -> list[str]:
        """Parameters whose first axis is that of layers."""
        return [name for name in self.p.tensors if name not in self._of_vocabulary]

    def rows_here(self, name: str) -> slice:
        """Return which of a parameter's rows, or layers, are here."""
        if name in self._of_vocabulary:
            return slice(0, self.p.tensors[name].shape[0] if self.has_vocabulary else 0)
        return slice(self.layers.start, self.layers.stop)

    def elements_here(self) -> dict[str, list[tuple[int, int]]]:
        """Return which elements of the arrays of `state` are here, in ranges. What the guard has seen is everywhere."""
        found = {}
        for prefix, name in ((prefix, name) for prefix in ("", "m_", "v_") for name in self.p.tensors):
            here, row = self.rows_here(name), self.p.tensors[name].array[0].size
            found[prefix + name] = [(here.start * row, here.stop * row)]
        return found | {name: [(0, tensor.array.size)] for name, tensor in self.w.tensors.items()}


class _Joined(Arena):
    """Tensors of two arenas as those of one."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
