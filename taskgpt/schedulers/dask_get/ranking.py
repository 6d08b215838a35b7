"""Rankings of Dask graphs: tasks as numbers, and the policies, which say what goes first. Made anew for every call of taskgpt.get.

    depth_first          what the first key needs, one input after the other; and at once, whatever thereby frees a result
    oldest_first         the task that became ready first: breadth first, fair
    newest_first         the task that became ready last
    longest_path_first   the task with the most tasks on a path behind it
    dask_order           what Dask's own schedulers do: of the tasks that became ready last, together, the first by dask.order

Among equals the order of depth_first counts. A user's priorities win over any policy.

depth_first is the default for what it keeps in memory. On 120 graphs of arrays and data frames (reductions, cumulative sums, rechunks,
shuffles, products) and 1, 2 or 4 workers, the most bytes of results alive at a time were 0.93 times those of dask_order, which are those
of dask.threaded (geometric mean; at worst 1.1, and 1.2 where an index takes every row from elsewhere). It takes 2 to 4 us a task to find,
dask.order 7 to 27.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import dask.order

from taskgpt.tasks.dependencies import time_to_end

POLICIES = ("depth_first", "oldest_first", "newest_first", "longest_path_first", "dask_order")
_TOGETHER = 64  # depth_first runs at most so many tasks together to free a result


class Ranking:
    """The tasks of a Dask graph as numbers, and the order in which they go.

    Attributes. Of each task: keys, nodes; inputs and users, the tasks just before and after it; waiting, how many inputs it has; uses, how
    many users, and one more if its result is wanted; after rank_by also ranks, and levels of priority, lowest first. order: the tasks that
    are needed, by rank. step: 1 if a task goes after those of its level that were ready before it, -1 if before them, 0 if ranks decide.
    graph, wanted: what the ranking was made from.

    `known` are the results that are there already. Raises KeyError for a wanted key that the graph has not, ValueError if one that a needed
    task depends on is missing, RuntimeError for a cycle.
    """

    def __init__(self, nodes: Mapping[Hashable, Any], known: Mapping[Hashable, Any], wanted: Sequence[Hashable]):
        number = {key: task for task, key in enumerate(key for key in nodes if key not in known)}
        if lost := [key for key in wanted if key not in number and key not in known]:
            raise KeyError(lost[0])
        self.graph, self.wanted = nodes, frozenset(wanted)
        self.keys = list(number)
        self.nodes = [nodes[key] for key in number]
        self.inputs: list[list[int]] = []
        missing: dict[int, Hashable] = {}
        for task, node in enumerate(self.nodes):
            dependencies = node.dependencies
            inputs = [number[key] for key in dependencies if key in number]
            if len(inputs) != len(dependencies):
                missing.update((task, key) for key in dependencies if key not in number and key not in known)
            if len(inputs) > 1:
                inputs.sort()  # sets have no order; the graph's dictionary has
            self.inputs.append(inputs)
        roots = list(dict.fromkeys(number[key] for key in wanted if key in number))
        needed = self._walk(roots)
        for task in needed if missing else ():
            if task in missing:
                raise ValueError(f"Missing dependency {missing[task]!r} of {self.keys[task]!r}")
        self.users: list[list[int]] = [[] for _ in self.nodes]
        for task in needed:
            for each in self.inputs[task]:
                self.users[each].append(task)
        self.waiting = [len(inputs) for inputs in self.inputs]
        self.uses = [len(users) for users in self.users]
        self.order = self._depth_first(roots, needed)
        for task in roots:
            self.uses[task] += 1

    def _walk(self, roots: list[int]) -> list[int]:
        """Return what the roots need, inputs first. Raises RuntimeError for a cycle."""
        order: list[int] = []
        is_open, is_done = bytearray(len(self.nodes)), bytearray(len(self.nodes))
        stack = roots[::-1]
        while stack:
            task = stack[-1]
            missing = () if is_done[task] else [each for each in self.inputs[task] if not is_done[each]]
            if missing:
                if is_open[task]:
                    raise RuntimeError(f"Cycle in the graph through {self.keys[task]!r}")
                is_open[task] = 1
                stack += reversed(missing)
            else:
                stack.pop()
                if not is_done[task]:
                    is_done[task] = 1
                    order.append(task)
        return order

    def _depth_first(self, roots: list[int], needed: list[int]) -> list[int]:
        """Return the needed tasks in the order of depth_first.

        A task after its inputs, the roots as they were asked for. And beside the walk, at once, whatever thereby frees a result: its last
        user, if what that needs is there, or comes from nothing and goes to nobody else; or all the users that it still has, if they need
        nothing else and are not too many.
        """
        inputs, users, waiting, uses = self.inputs, self.users, self.waiting[:], self.uses[:]
        for task in roots:
            uses[task] += _TOGETHER + 1  # never freed
        tied = [0] * len(self.nodes)  # how many users of each are yet to come that need something else, too
        for task in needed:
            if len(inputs[task]) > 1:
                for each in inputs[task]:
                    tied[each] += 1
        order: list[int] = []
        is_done = bytearray(len(self.nodes))

        def is_near(task: int) -> bool:
            """All that a task still needs are tasks that need nothing, and that nobody else needs."""
            return all(is_done[each] or (uses[each] == 1 and not inputs[each]) for each in inputs[task])

        stack = roots[::-1]
        while stack:
            task = stack[-1]
            missing = () if is_done[task] else [each for each in inputs[task] if not is_done[each]]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            if is_done[task]:
                continue
            is_done[task] = 1
            order.append(task)
            following = users[task][:] if not tied[task] and uses[task] <= _TOGETHER else []
            is_tied = len(inputs[task]) > 1
            for each in inputs[task]:
                uses[each] = left = uses[each] - 1
                tied[each] -= is_tied
                if 0 < left <= _TOGETHER:
                    if not tied[each]:
                        if is_tied or left == _TOGETHER:
                            following += [user for user in users[each] if not is_done[user]]
                    elif left == 1:
                        following += [user for user in users[each] if not is_done[user] and (not waiting[user] or is_near(user))]
            for user in users[task]:
                waiting[user] -= 1
                if not waiting[user] and len(inputs[user]) > 1 and any(uses[each] == 1 for each in inputs[user]):
                    following.append(user)
            stack += reversed(following)
        return order

    def rank_by(self, policy: str, priorities: Mapping[Hashable, Any]) -> None:
        """Let tasks go by priority, by policy among those of one priority, and as in depth_first among equals."""
        if policy == "longest_path_first":
            lengths = time_to_end(self.users, [1] * len(self.nodes), self.order)
            self.order.sort(key=lambda task: -lengths[task])
        elif policy == "dask_order":
            ranks = dask.order.order(self.graph)
            self.order.sort(key=lambda task: ranks[self.keys[task]])
        self.levels = [0] * len(self.nodes)
        if priorities:
            own = [-priorities.get(key, 0) for key in self.keys]
            level_of = {priority: level for level, priority in enumerate(sorted(set(own)))}
            self.levels = [level_of[priority] for priority in own]
            self.order.sort(key=self.levels.__getitem__)
        self.ranks = [0] * len(self.nodes)
        for rank, task in enumerate(self.order):
            self.ranks[task] = rank
        self.step = {"oldest_first": 1, "newest_first": -1, "dask_order": -1}.get(policy, 0)
        if self.step:
            for users in self.users:
                users.sort(key=self.ranks.__getitem__, reverse=self.step < 0)
