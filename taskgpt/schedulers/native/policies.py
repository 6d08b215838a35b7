"""Policies: which of the ready tasks goes first. A new policy is a row of POLICIES, and a line for its users in native.toml.

The ready task of the lowest rank goes first. Its rank is `by_age * age + value`: its age is its place among the tasks as they became ready,
its value is a number that the policy gives each task of a graph. A task's own priority wins over its rank.

Two switches go with any policy. `work_stealing`: a queue per worker, who serves the others when his own is empty, against one queue for
all. `immediate_successor`: a worker goes on with the best task that it made ready itself, past the queue.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from taskgpt.schedulers.native.plan import Plan
from taskgpt.tasks.dependencies import time_to_end

Values = tuple[np.ndarray, int]  # one for each task, int64 and below 2**47; and how much later those of a run right after this one are


class Policy(NamedTuple):
    """How a policy ranks a ready task."""

    by_age: int = 1  # 1: the oldest first, -1: the newest first, 0: as its value says
    values: Callable[[Plan], Values] | None = None  # from what the plan knows; called anew when tasks have been timed
    is_timed: bool = False  # the values depend on how long tasks take: they are timed in the first runs
    prefers_home: bool = False  # a worker looks for tasks of whose tiles it has itself written the largest part
    complements: bool = False  # a worker looks for tasks that want of the machine what the others on the share's cores do not

    def is_ranked(self, has_queues: bool) -> bool:
        """Return True if a queue must know ranks. A worker's own queue has a newest task and an oldest without."""
        return self.values is not None or self.prefers_home or self.complements or (self.by_age < 0 and not has_queues)


def latest_starts(plan: Plan) -> Values:
    """Return when each task must start for the graph to end in time, in ns, and that time: the length of its longest path."""
    first, successor = plan.successor_first.tolist(), plan.successor.tolist()
    to_end = time_to_end([successor[a:b] for a, b in itertools.pairwise(first)], plan.seconds.tolist())
    length = max(to_end, default=0.0)
    return ((length - np.array(to_end)) * 1e9).astype(np.int64), int(length * 1e9)


POLICIES = {
    "oldest_first": Policy(),  # the task that became ready first: breadth first, fair
    "newest_first": Policy(by_age=-1),  # the task that became ready last: depth first, its inputs are still in cache
    "longest_path_first": Policy(by_age=0, values=latest_starts, is_timed=True),  # the task with the longest path behind it
    "same_core_first": Policy(prefers_home=True),  # oldest first, but rather on the worker that wrote most of its tiles
    "complementary": Policy(complements=True),  # oldest first, but rather one that computes while others wait for memory, and the reverse
}
