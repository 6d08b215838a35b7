"""Whole steps, again and again, until something is so (OmpSs-2's taskiter with `while`)."""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

from taskgpt.tasks import Graph, Kernel, Tile
from taskgpt.tasks.access import Access, Dim


class Runs(Protocol):
    """What of a scheduler's contract this needs."""

    def run(self, graph: Graph) -> None: ...

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]: ...


def run_while(
    scheduler: Runs, step: Graph | Callable[[Callable[..., Any]], None], until: Callable[[], bool], reads: Sequence[Tile] = ()
) -> int:
    """Run a step again and again until `until()` is true after it; return how often it ran, always to its end.

    `step`: a graph, or a function that spawns the tasks of one, with what it is given. `reads`: the tiles whose arrays `until` reads.
    With them, of a function's step, it is asked by a task, so that steps overlap as in `run_each`: one more than it took may have run.
    """
    verdicts: list[bool] = []
    if isinstance(step, Graph):
        graph = step
        if reads:
            raise TypeError("a graph that is recorded has no task that asks: leave `reads` out, or give the function that spawns the step")
    else:
        graph = Graph(getattr(step, "__name__", "step"))
        step(graph.spawn)
        if reads:
            graph.spawn(_asking(until, reads, verdicts), *reads)
    if not reads:
        for runs in itertools.count(1):
            scheduler.run(graph)
            if until():
                return runs
    with closing(scheduler.run_each(itertools.repeat(graph))) as runs_done:
        for done, _ in enumerate(runs_done):
            if verdicts[done]:
                break
    return len(verdicts)


def _asking(until: Callable[[], bool], reads: Sequence[Tile], verdicts: list[bool]) -> Kernel:
    """Return a kernel that notes what `until` says, and declares that it reads tiles like these."""

    def ask(*arrays) -> None:
        verdicts.append(bool(until()))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    for at, tile in enumerate(reads):
        shape = tuple(Dim(f"N{at}_{axis}") for axis in range(len(tile.shape)))
        parameters.append(inspect.Parameter(f"read_{at}", kind, annotation=Access("in", shape, tile.tensor.array.dtype)))
    ask.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    return Kernel(ask)
