"""Graphs among Dask's collections: `dask.compute(graph)`, `dask.visualize(graph)`, a graph beside arrays, in a delayed call, on a Client.

Dask takes a collection of the same keys for the same values. A graph that runs again does something again: so the keys change as soon as
Dask has been handed a run to compute. Here they are asked for in the order in which Dask asks: graph and keys, then the finalizer.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskgpt.tasks.dask_graph import Key, Run


class DaskCollection:
    """What a Graph inherits: Dask's collection protocol, by way of the run that Dask is to be given next.

    Computed, a graph gives None: what its tasks made is in their tensors. Runs that a Client is given before others have ended, of a graph
    or of several, run together, whatever tensors they share: wait for one before you ask for the next. A cluster that loses a worker runs
    tasks again, whose tensors have moved on: if that happens, go on from what was saved.
    """

    _run: "Run | None" = None
    _is_handed_over = False
    _version_in_run: object = None

    def _next_run(self) -> "Run":
        from taskgpt.tasks.dask_graph import Run, to_dask  # Dask loads slowly

        if self._run is None or self._is_handed_over or self._version_in_run != self.version:
            self._run = Run(*to_dask(self))
            self._is_handed_over, self._version_in_run = False, self.version
        else:
            self.verify_untouched()  # as `to_dask` does
        return self._run

    def _latest_run(self) -> "Run":
        return self._run or self._next_run()

    def __dask_graph__(self) -> Mapping:
        return self._next_run().__dask_graph__()

    def __dask_keys__(self) -> "list[Key]":
        return self._latest_run().__dask_keys__()

    def __dask_layers__(self) -> tuple[str, ...]:
        return self._latest_run().__dask_layers__()

    def __dask_tokenize__(self) -> tuple:
        return self._latest_run().__dask_tokenize__()

    def __dask_postcompute__(self) -> tuple[Callable, tuple]:
        self._is_handed_over = True
        return self._latest_run().__dask_postcompute__()

    def __dask_postpersist__(self) -> tuple[Callable, tuple]:
        return self._latest_run().__dask_postpersist__()

    @property
    def __dask_optimize__(self) -> Callable:
        return self._latest_run().__dask_optimize__

    @property
    def __dask_scheduler__(self) -> Callable:
        return self._latest_run().__dask_scheduler__

    def compute(self, **options: Any) -> None:
        """Run the graph as dask.compute does: `scheduler` and others are its options."""
        self._run_of_its_own().compute(**options)

    def persist(self, **options: Any) -> "Run":
        """Begin to run the graph on a Client, or run it elsewhere; return the run, which any collection may be bound to."""
        return self._run_of_its_own().persist(**options)

    def visualize(self, *args: Any, **options: Any) -> Any:
        """Draw the graph with graphviz, as dask.visualize does."""
        return self._latest_run().visualize(*args, **options)

    def _run_of_its_own(self) -> "Run":
        run = self._next_run()
        self._is_handed_over = True
        return run
