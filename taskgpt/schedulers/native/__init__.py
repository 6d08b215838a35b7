"""Our own scheduler, after nOS-V, read in this order:

table.py      what the workers share, and where it is
ring.py       queues without waiting: deques and inboxes
heap.py       instances in the order of their ranks
idle.py       workers without work: the watch, cells, sleep
queues.py     where ready tasks go, and who gets which
release.py    what happens when a task has run
places.py     places of open tasks, and edges between them
open_run.py   tasks that are spawned while others run
regions.py    who waits for whom, of what compiled code spawns
nested.py     what compiled code spawns with
worker.py     what a worker does, and what the submitting thread does to start, await and stop runs
held.py       tasks that wait for events after their body
plan.py       a graph as flat arrays
policies.py   which ready task goes first
crew.py       the threads that are workers
program_engine.py  programs on these workers
scheduler.py  the contract, kept: threads that are workers, runs that overlap
"""

from taskgpt.schedulers.native.scheduler import Scheduler, Settings

__all__ = ["Scheduler", "Settings"]
