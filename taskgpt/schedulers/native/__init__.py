"""Our own scheduler, after nOS-V, read in this order:

pointers.py   memory by address, atomics, the clock and threads that sleep, for compiled code
queues.py     what the workers share; the policies that rank ready tasks; the queues that hold them
worker.py     what a worker does, and what the submitting thread does to start, await and stop runs
plan.py       a graph as flat arrays
scheduler.py  the contract, kept: threads that are workers, runs that overlap
"""

from taskgpt.schedulers.native.scheduler import Scheduler, Settings

__all__ = ["Scheduler", "Settings"]
