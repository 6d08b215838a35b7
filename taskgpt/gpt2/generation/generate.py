"""Sequences that share a decoder, from prompt to end.

    for sequence in generate(decoder, run, sequences, Choice(top_k=50), end_of_text):
        sequence.ids[-1]                 # its newest token
        sequence.end = "stop"            # to end it here

Who ends makes room for the next one that waits; a prompt that is in the cache already is copied there. A sequence draws from a random
stream of its own, and logits do not depend on what else is decoded: so its tokens do not, either.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from taskgpt.errors import UserError
from taskgpt.gpt2.generation.decoder import Decoder, Run
from taskgpt.gpt2.generation.next_token import Choice


@dataclass
class Continuation:
    """A prompt and what follows it, at most so many tokens. `seed`: integers, of its random stream; `end`: why there is no more, "" while
    there is; `slot`: its place in the cache.
    """

    prompt: Sequence[int]
    most: int
    seed: Sequence[int] = (0,)
    ids: list[int] = field(default_factory=list)
    end: str = ""
    slot: int = -1

    @cached_property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(list(self.seed))

    def add(self, token: int, end_of_text: int) -> None:
        """Add a token, or end before an end of text."""
        if token == end_of_text:
            self.end = "end of text"
        else:
            self.ids.append(token)
            self.end = "length" if len(self.ids) >= self.most else ""


@dataclass
class Speed:
    """Tokens and seconds of prefill, prompts but their last token, each prompt once; and of decoding, with the choice of the tokens."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


def generate(
    decoder: Decoder, run: Run, waiting: Iterable[Continuation], choice: Choice, end_of_text: int, speed: Speed | None = None
) -> Iterator[Continuation]:
    """Continue all; yield each after every token, and after its end of text. `run` runs a graph.

    Prompts have at least one token and, with `most`, at most decoder.length. Raises UserError for logits that are no numbers.
    """
    waiting, active, free = deque(waiting), list[Continuation](), deque(range(decoder.slots))
    speed = speed or Speed()
    decoder.warm_up(run)
    while waiting or active:
        begin = time.perf_counter()
        begun = {tuple(each.prompt): each.slot for each in active if waiting and free}
        rows, copies = [], []
        while waiting and free:
            active.append(each := waiting.popleft())
            each.slot = free.popleft()
            if (other := begun.setdefault(tuple(each.prompt), each.slot)) != each.slot:
                copies.append((other, each.slot, len(each.prompt) - 1))
            else:
                rows += [(each.slot, at, token) for at, token in enumerate(each.prompt[:-1])]
        decoder.feed(run, rows)
        for copy in copies:
            decoder.copy(*copy)
        fed = time.perf_counter()
        last = [(each.slot, len(each.prompt) + len(each.ids) - 1, (each.ids or each.prompt)[-1]) for each in active]
        for each, logits in zip(active, decoder.step(run, last), strict=True):
            if not np.isfinite(logits.max()):  # NaN, too, is its own maximum
                raise UserError("the model's logits are no numbers; the model is damaged, or was trained with too large a --lr")
            each.add(choice.next_token(logits, [*each.prompt, *each.ids], each.random), end_of_text)
        speed.prefill_tokens, speed.prefill_s = speed.prefill_tokens + len(rows), speed.prefill_s + fed - begin
        speed.decode_tokens, speed.decode_s = speed.decode_tokens + len(active), speed.decode_s + time.perf_counter() - fed
        yield from active
        free += [each.slot for each in active if each.end]
        active = [each for each in active if not each.end]
