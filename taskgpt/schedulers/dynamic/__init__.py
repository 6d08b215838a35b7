"""Programs whose tasks start as they are spawned, from the program and from tasks: `with scheduler.program() as spawn`, read in this order:

futures.py    a task that was spawned, and what comes of it
domain.py     which tasks an access must wait for
recording.py  what ran when, as a graph
program.py    what all tasks of a program share, and its end
spawner.py    spawning, waiting, events: what a program and its tasks have in their hands

A scheduler that runs them gives an `Engine` (program.py). Without one, every task runs at once, where it is spawned: program order, what
all others must agree with.
"""

from taskgpt.schedulers.dynamic.recording import Recording
from taskgpt.schedulers.dynamic.spawner import run_program

__all__ = ["Recording", "run_program"]
