"""N bodies that attract each other: the forces on a block of bodies are a reduction over all blocks."""

import numpy as np

from taskgpt.tasks import In, InOut, Out, Reduction, dims, kernel, wrap

N, M = dims("N M")
f64 = np.float64


@kernel(compiled=True)
def forget(force: Out[N, 3, f64]):
    """Begin with no force."""
    for n in range(force.shape[0]):
        for axis in range(3):
            force[n, axis] = 0.0


@kernel(compiled=True, flops=lambda N, M: 20 * N * M)
def attract(force: Reduction["+", N, 3, f64], here: In[N, 3, f64], there: In[M, 3, f64], mass: In[M, f64]):
    """Add what the bodies there do to those here; a small distance keeps them from flying apart."""
    for n in range(here.shape[0]):
        for m in range(there.shape[0]):
            x, y, z = there[m, 0] - here[n, 0], there[m, 1] - here[n, 1], there[m, 2] - here[n, 2]
            square = x * x + y * y + z * z + 0.01
            pull = mass[m] / (square * np.sqrt(square))
            force[n, 0] += pull * x
            force[n, 1] += pull * y
            force[n, 2] += pull * z


@kernel(compiled=True, flops=lambda N: 12 * N)
def move(place: InOut[N, 3, f64], speed: InOut[N, 3, f64], force: In[N, 3, f64], dt: float):
    """Move the bodies a step on."""
    for n in range(place.shape[0]):
        for axis in range(3):
            speed[n, axis] += dt * force[n, axis]
            place[n, axis] += dt * speed[n, axis]


class Problem:
    """`bodies` in blocks of `block`."""

    def __init__(self, bodies: int = 100, block: int = 16, steps: int = 3):
        draw = np.random.default_rng(0)
        self.at_first = draw.standard_normal((bodies, 3))
        self.mass = wrap(draw.random(bodies), block, "mass")
        self.place, self.speed, self.force = (wrap(np.empty((bodies, 3)), (block, None), name) for name in ("place", "speed", "force"))
        self.steps, self.dt = steps, 0.01

    def begin(self) -> None:
        self.place.array[...], self.speed.array[...] = self.at_first, 0

    def program(self, spawn) -> None:
        place, blocks = self.place, range(self.place.grid[0])
        for _ in range(self.steps):
            for i in blocks:
                spawn(forget, self.force.cell(i, 0))
                for j in blocks:
                    spawn(attract, self.force.cell(i, 0), place.cell(i, 0), place.cell(j, 0), self.mass.cell(j))
            for i in blocks:
                spawn(move, place.cell(i, 0), self.speed.cell(i, 0), self.force.cell(i, 0), self.dt)

    def result(self) -> np.ndarray:
        return self.place.array

    def wanted(self) -> np.ndarray:
        place, speed = self.at_first.copy(), np.zeros_like(self.at_first)
        for _ in range(self.steps):
            apart = place[None] - place[:, None]
            pull = self.mass.array / ((apart**2).sum(2) + 0.01) ** 1.5
            speed += self.dt * (pull[:, :, None] * apart).sum(1)
            place += self.dt * speed
        return place
