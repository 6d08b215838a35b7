"""Kernels and programs for test_schedulers.py, in a module of their own: worker processes must be able to import them.

Run as a program, it is one that Ctrl-C has to stop: `python kernels_for_tests.py SCHEDULER_CONFIG`.
"""

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_info

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import Arena, Commutative, Graph, In, InOut, TensorSpec, dims, kernel

N, F = dims("N F")

START, STOP, RUNS, THREAD, PROCESS = range(5)  # what a task writes into its line of the log
CELLS, TASKS = 8, 200


def arena(is_shared: bool) -> Arena:
    """Return values for tasks to work on, and a log with a line for each task."""
    specs = {"x": TensorSpec((CELLS, 4), (1, None)), "log": TensorSpec((TASKS, 5), (1, None), np.dtype(np.int64))}
    a = Arena(specs, is_shared)
    a.x.array[:] = np.arange(CELLS * 4).reshape(CELLS, 4)
    return a


def begin(log: np.ndarray) -> None:
    log[START] = time.monotonic_ns()  # one clock for all processes
    log[THREAD], log[PROCESS] = threading.get_native_id(), os.getpid()


def end(log: np.ndarray) -> None:
    log[RUNS] += 1
    log[STOP] = time.monotonic_ns()


@kernel
def mix(out: InOut[N], a: In[N], b: In[N], log: InOut[F, np.int64], salt: int):
    """Something whose rounding depends on the order."""
    begin(log)
    out += np.sin(a) * np.float32(salt) - out * b / (1 + np.abs(b) + np.abs(a))
    end(log)


@kernel(tags=["covered"])
def swirl(out: InOut[N], a: In[N], log: InOut[F, np.int64]):
    """Another, so that loops have more than one kernel; schedulers may ask for its tag."""
    begin(log)
    out -= np.cos(out + a)
    end(log)


@kernel
def nap(out: InOut[N], log: InOut[F, np.int64], milliseconds: int):
    """Take time."""
    begin(log)
    time.sleep(milliseconds / 1000)
    out += 1
    end(log)


@kernel
def fail(out: InOut[N], log: InOut[F, np.int64]):
    """Raise."""
    begin(log)
    raise ZeroDivisionError("this kernel always fails")


@kernel
def die(out: InOut[N], log: InOut[F, np.int64]):
    """End the worker process as the out-of-memory killer would."""
    begin(log)
    log[RUNS] += 1
    os.kill(os.getpid(), signal.SIGKILL)


@kernel
def hold(flag: InOut[N], log: InOut[F, np.int64]):
    """Wait until somebody outside writes a negative number to the flag."""
    begin(log)
    while flag[0] >= 0:
        time.sleep(0.001)
    end(log)


within: dict[str, Callable[[], object]] = {}  # "act": what the task `act` is to do, in this process
OUTSIDE = Graph("outside")  # in a worker process another one than in the main process


@kernel
def act(out: InOut[N], log: InOut[F, np.int64]):
    """Do as the test says."""
    begin(log)
    within["act"]()
    end(log)


@kernel
def spawn_outside(out: InOut[N], log: InOut[F, np.int64]):
    """Spawn into a graph that this task did not make."""
    begin(log)
    OUTSIDE.spawn(double, Arena({"y": TensorSpec((1, 4), (1, None))}).y[0])


@kernel
def spawn_inside(out: InOut[N], log: InOut[F, np.int64]):
    """Record a graph of one's own, and run it with a scheduler of one's own."""
    begin(log)
    y = Arena({"y": TensorSpec((1, 4), (1, None))}).y
    y.array[:] = 1
    graph = Graph("inside")
    graph.spawn(double, y[0])
    chosen = load_scheduler("sequential")
    with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
        scheduler.run(graph)
    out += y.array[0]
    end(log)


@kernel
def count_blas_threads(out: InOut[N]):
    """Write the largest number of threads that a BLAS of this process may use."""
    out[:] = max(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")


@kernel
def add_one(total: Commutative[N]):
    """Lose an addition if two run at a time."""
    before = total.copy()
    time.sleep(0.001)
    total[:] = before + 1


FACTOR, TABLE = 2, np.ones(1)


@kernel
def double(out: InOut[N]):
    """The only one here with a compiled twin, which numba makes of the numbers that FACTOR and TABLE have then."""
    out *= FACTOR * TABLE[0]


@double.compiled
def double_twin(out):
    for i in range(out.shape[0]):
        out[i] *= FACTOR * TABLE[0]


def random_program(spawn: Callable, a: Arena, seed: int, length: int = 60) -> None:
    """Spawn `length` tasks on random cells; task i logs in line i."""
    draw = random.Random(seed)
    for number in range(length):
        out, first, second = draw.sample(range(CELLS), 3)
        if draw.random() < 0.6:
            spawn(mix, a.x[out], a.x[first], a.x[second], a.log[number], draw.randrange(5))
        else:
            spawn(swirl, a.x[out], a.x[first], a.log[number])


def random_graph(a: Arena, seed: int, length: int = 60) -> Graph:
    graph = Graph(f"random program {seed}")
    random_program(graph.spawn, a, seed, length)
    return graph


def naps(a: Arena, milliseconds: int, chains: int = 2, length: int = 50) -> Graph:
    """Record chains of naps: `chains` of them can run at a time."""
    graph = Graph("naps")
    for number in range(chains * length):
        graph.spawn(nap, a.x[number % chains], a.log[number], milliseconds)
    return graph


if __name__ == "__main__":
    config = load_scheduler(sys.argv[1])
    print("opening", flush=True)
    with open_scheduler(config.scheduler, config.settings) as scheduler:
        # By its importable name: workers look kernels up in modules, and `__main__` is another one there.
        import kernels_for_tests

        graph = kernels_for_tests.naps(kernels_for_tests.arena(scheduler.needs_shared_memory), milliseconds=100, length=100)
        scheduler.run(kernels_for_tests.random_graph(kernels_for_tests.arena(scheduler.needs_shared_memory), seed=0))
        print("running", flush=True)
        scheduler.run(graph)
