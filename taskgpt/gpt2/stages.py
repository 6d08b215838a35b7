"""A model as a row of stages: ranks that have consecutive layers each, and pass micro-batches on to each other.

The last stage also has what belongs to no layer, in which all gradients of wte come together: the embedding, the norm before the head, the
head. It embeds the tokens and sends them to the first stage; the residual stream goes from stage to stage and comes back to the last one;
its gradient goes the same way in the other direction. So wte is in one place, and every sum is made in the order of one machine.

Micro-batches follow each other, one forward, one backward (1F1B: Narayanan et al. 2019, PipeDream-Flush): stage r of P has at most P - r of
them in flight, and no room for the activations of more. What a stage does next follows from that and from the dependencies alone.
"""

from collections.abc import Callable

import numpy as np

from taskgpt.collectives import GATHER, MOVE, REDUCE
from taskgpt.collectives.kernels import exchange_numbers, gather_numbers, receive_rows, send_rows
from taskgpt.gpt2.replicas import Exchange
from taskgpt.gpt2.shape import Model
from taskgpt.tasks import InOut, Tile, dims, kernel

(W,) = dims("W")
Spawn = Callable[..., object]


def layers_of(model: Model, rank: int, count: int) -> range:
    """Return the layers of a stage: as many products as on others, where the head counts as Vp / 12 C layers, and one at least.

    Raises ValueError if there are more stages than layers.
    """
    if count > model.layers:
        raise ValueError(f"{count} stages, but the model has {model.layers} layers; take {model.layers} stages or fewer")
    whole = model.layers + model.padded_vocabulary / (12 * model.channels)
    begins = [min(max(round(at * whole / count), at), model.layers - count + at) for at in range(count)]
    return range(begins[rank], [*begins, model.layers][rank + 1])


class Stage:
    """Which stage a model is, and what its program exchanges. `micro_batches`: of a step; `slots`: of the model."""

    def __init__(self, rank: int, count: int, model: Model, micro_batches: int, slots: int, exchange: Exchange | None):
        self.rank, self.count, self.micro_batches, self.exchange = rank, count, micro_batches, exchange
        self.layers = layers_of(model, rank, count)
        if exchange is None:
            return
        into = [((at - 1) % count, at) for at in range(count)]  # of each stage: where its residual stream comes from
        self._residuals = [[exchange.new_bucket(MOVE, 1, hop) for _ in range(micro_batches)] for hop in into]
        self._gradients = [[exchange.new_bucket(MOVE, 1, hop[::-1]) for _ in range(micro_batches)] for hop in into]
        # Of each slot: nothing else keeps a step from these exchanges while those of the step before are under way.
        self._numbers = [exchange.new_bucket(REDUCE, 1) for _ in range(slots)]
        self._words = [exchange.new_bucket(GATHER, 1) for _ in range(slots)]

    @property
    def is_last(self) -> bool:
        return self.rank == self.count - 1

    @property
    def in_flight(self) -> int:
        """How many micro-batches can have begun here and not be finished."""
        return min(self.count - self.rank, self.micro_batches)

    # What programs spawn ------------------------------------------------------------------------------------------------------------

    def receive_residual(self, spawn: Spawn, number: int, tile: Tile) -> None:
        """Receive the residual stream of a micro-batch as it enters this stage."""
        self._pass(receive_rows, spawn, tile, self._residuals[self.rank][number])

    def send_residual(self, spawn: Spawn, number: int, tile: Tile) -> None:
        """Send it to the next stage, or what is embedded to the first."""
        self._pass(send_rows, spawn, tile, self._residuals[(self.rank + 1) % self.count][number])

    def receive_gradient(self, spawn: Spawn, number: int, tile: Tile) -> None:
        """Receive the gradient of what `send_residual` has sent."""
        self._pass(receive_rows, spawn, tile, self._gradients[(self.rank + 1) % self.count][number])

    def send_gradient(self, spawn: Spawn, number: int, tile: Tile) -> None:
        """Send the gradient of what `receive_residual` has received."""
        self._pass(send_rows, spawn, tile, self._gradients[self.rank][number])

    def _pass(self, kernel: Callable, spawn: Spawn, tile: Tile, bucket: int) -> None:
        spawn(kernel, tile, self.exchange.number, bucket, section=("network", -1))

    def reduce_numbers(self, spawn: Spawn, slot: int, numbers: Tile) -> None:
        """Add numbers up over all stages; each but one is 0 on all stages but one."""
        spawn(exchange_numbers, numbers, self.exchange.number, self._numbers[slot], 0, section=("network", -1))

    def gather_words(self, spawn: Spawn, slot: int, words: Tile, all_words: Tile) -> None:
        """Gather what ranks say."""
        spawn(gather_numbers, all_words, words, self.exchange.number, self._words[slot], 0, section=("network", -1))


@kernel
def say_no_loss(words: InOut[W, np.float64]):
    """Leave the loss to the last stage, before the other words."""
    words[0] = 0
