"""taskgpt: a task-based dataflow runtime in Python, after nOS-V and OmpSs-2, and GPT-2 training on CPUs to prove it.

The map of the house; imports point one way, from the programs down to the tasks.

    train.py programs/                  the verbs of `taskgpt`, a file each; train.py reads downwards like llm.c's main
    config.py files.py                  TOML files and flags to frozen dataclasses; how a file is read, and written whole
    errors.py palette.py                mistakes and signals; colours
    progress.py downloads.py            how far whatever takes time is; what comes from the network, and the user's cache
    runs/         a training run: its loop, what a person sees of it, its end in numbers
    cluster/      a Dask cluster: opened, checked, its ranks, a training run on it
    collectives/  messages and sums among ranks
    tasks/        room 1: kernels, accesses, tiles, graphs. Has heard of neither transformers nor threads
    sharing/      processes that share the cores of a machine; pointers.py, what compiled code needs of C
    schedulers/   room 2: ways to run a graph, a file or folder per value of --scheduler
    gpt2/         room 3: GPT-2's kernels, tensors and program, checkpoints, generation/; its data in text/. Has never heard of schedulers
    lab/          room 4: looks at runs, graphs and the machine, in rooms of its own
    graphs/             what runs: a TOML file per model, batch and tiling
    scheduler_configs/  how it runs: a TOML file per scheduler set-up

To train from a program, `taskgpt.train(graph="tiny", steps=100)`. To write one of your own, start with `taskgpt.tasks`, and run it in
`with taskgpt.scheduler("native") as scheduler`; examples/ and notebooks/cholesky.ipynb show how. To compute a Dask collection with the
runtime's own threads, `x.compute(scheduler=taskgpt.get)`.
"""

import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from taskgpt.errors import begin_program

__all__ = ["get", "scheduler", "train"]


# `python -m taskgpt.train` imports this package first, and looks for the module then; what it imports may take seconds.
def _is_our_program(words: Sequence[str]) -> bool:
    """Return True if one of the words is -m taskgpt..., also as -mtaskgpt... and behind other letters: -um taskgpt..."""
    for word, following in itertools.pairwise([*words, ""]):
        _, option, module = word.partition("m")
        if option and word.startswith("-") and not word.startswith("--") and (module or following).partition(".")[0] == __name__:
            return True
    return False


if sys.argv[:1] == ["-m"] and _is_our_program(sys.orig_argv):
    begin_program()


def __getattr__(name: str) -> Any:
    """Import what is asked for, and then only: importing taskgpt stays cheap, and does not import Dask."""
    if name == "get":
        from taskgpt.schedulers.dask_get import get

        return get
    if name == "scheduler":
        from taskgpt.config import scheduler

        return scheduler
    if name == "train":
        return importlib.import_module("taskgpt.train")  # a module that can be called
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
