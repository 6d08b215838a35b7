"""The learning rate of each step: a straight way up, then one of four ways on. The formulas are those of llm.c's CUDA program.

constant   stays at the peak
linear     falls in a straight line to its last value
cosine     falls as half a cosine does: slowly, fast, slowly
wsd        stays at the peak for 80 % of all steps, then falls with the square root (warm-up, stable, decay)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

STABLE = 0.8  # part of all steps before wsd falls
FALLS: dict[str, Callable[[float], float]] = {  # from 1 to 0, while the part of the way that is done goes from 0 to 1
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "wsd": lambda done: 1.0 - math.sqrt(done),
}


@dataclass(frozen=True)
class LearningRate:
    """What a step is to learn with, `steps` being all of them, counted from 0.

    `warmup` steps lead up to `peak`, the first of them already above 0. After the fall it would be `final` x peak at step `steps`.
    """

    peak: float
    steps: int
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * ((step + 1) / self.warmup)
        first = max(self.warmup, int(STABLE * self.steps)) if self.schedule == "wsd" else self.warmup
        if step < first:
            return self.peak
        done = (step - first) / max(1, self.steps - first)
        fallen = 1.0 - FALLS[self.schedule](min(1.0, done))
        return self.peak * (1.0 - fallen * (1.0 - self.final))
