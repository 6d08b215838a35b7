"""Which token comes next: repetition penalty, temperature, top-k, top-p, then a draw. The order and the rules are those of transformers.

Of equal logits the one with the smaller id comes first. Sums are float64, so that they hardly depend on how many tokens there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SORTED_AT_ONCE = 1024  # tokens, the likeliest: to sort GPT-2's 50,257 takes a third of the time of a step


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen; the defaults draw from the model's own distribution.

    temperature: logits are divided by it; 0 takes the largest. top_k: only the k largest stay, and what equals the last of them; 0: all.
    top_p: only the fewest of the most likely that together have this probability. repetition_penalty: logits of tokens that have occurred
    are divided by it if positive, else multiplied (Keskar et al. 2019); 1: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def next_token(self, logits: np.ndarray, earlier: Sequence[int], random: np.random.Generator) -> int:
        """Return an id, given the logits (V,) after the earlier ids, the prompt's too. At temperature 0, nothing is drawn."""
        ids, left = self.candidates(logits, earlier)
        if len(ids) == 1:
            return int(ids[0])
        cumulated = np.cumsum(_likelihoods(left), dtype=np.float64)
        drawn = np.searchsorted(cumulated, random.random() * cumulated[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def candidates(self, logits: np.ndarray, earlier: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that may come next, in ascending order, and their logits after temperature, float32."""
        logits = penalized(logits, earlier, self.repetition_penalty)
        if self.temperature == 0:
            best = logits.argmax(keepdims=True)
            return best, logits[best]
        logits = logits / np.float32(self.temperature)
        ids = largest(logits, self.top_k)
        ids = ids[most_likely(logits[ids], self.top_p)]
        return ids, logits[ids]


def penalized(logits: np.ndarray, earlier: Sequence[int], penalty: float) -> np.ndarray:
    """Return logits with those of earlier ids divided by the penalty where positive, multiplied by it elsewhere."""
    if penalty == 1:
        return logits
    logits, ids = logits.copy(), np.unique(earlier)
    found = logits[ids]
    logits[ids] = np.where(found < 0, found * np.float32(penalty), found / np.float32(penalty))
    return logits


def largest(logits: np.ndarray, k: int) -> np.ndarray:
    """Return where the k largest logits are, with all that equal the last of them, in order; 0: everywhere."""
    if not 0 < k < len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def most_likely(logits: np.ndarray, p: float) -> np.ndarray:
    """Return where the fewest logits are that together have the probability p or more, at least one, in order."""
    if p >= 1:
        return np.arange(len(logits))
    likelihoods = _likelihoods(logits)
    wanted, count = p * likelihoods.sum(dtype=np.float64), SORTED_AT_ONCE
    while True:
        ids = largest(logits, count if count < len(logits) else 0)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        cumulated = np.cumsum(likelihoods[ids], dtype=np.float64)
        if cumulated[-1] >= wanted or len(ids) == len(logits):
            return np.sort(ids[: int(np.searchsorted(cumulated, wanted)) + 1])
        count *= 8


def _likelihoods(logits: np.ndarray) -> np.ndarray:
    """Return what is proportional to the probabilities, float32."""
    return np.exp(logits - logits.max())
