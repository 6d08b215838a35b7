"""Graphs as programs use them: a graph of tasks that in a notebook is a picture, and to Dask a collection.

    graph = Graph()
    graph.spawn(matmul_forward, a.fch[l, r, c], a.ln2[l, r], p.fcw[l, c], p.fcb[l, c])
    graph.spawn(gelu_forward, a.fch_gelu[l, r], a.fch[l, r])           # reads what the first task writes: waits for it

Whatever works on a graph without being one of these two asks for a TaskGraph, and so stays below this file.
"""

from collections.abc import Callable

from taskgpt.tasks import picture
from taskgpt.tasks.coarsen import by_section
from taskgpt.tasks.dask_collection import DaskCollection
from taskgpt.tasks.task import Task
from taskgpt.tasks.task_graph import TaskGraph

_MOST_IN_PICTURE = 400  # tasks: more are too small to point at


class Graph(DaskCollection, TaskGraph):
    """Tasks in program order with their dependencies; to Dask a collection."""

    def _repr_svg_(self) -> str:
        """In a notebook: the picture; of a graph of many tasks, one task for each phase and layer."""
        return picture.to_svg(self if len(self.tasks) <= _MOST_IN_PICTURE else by_section(self))

    def to_dask(self, call: Callable[[Task], tuple] | None = None, token: str | None = None):
        """Return (HighLevelGraph, keys of the last tasks) of one run, for any `get` of Dask's: a layer for each section.

        Keys are `(kernel-token, number)`: Dask's dashboard groups and colours by the kernel. The token is a new one every time, for
        Distributed does not run a key again that it still knows, be it of an earlier step or of another graph: ask anew for every run.
        A `token` of your own makes the same keys again, and with them the same order, which in Dask hangs on the keys' hashes.

        `call(task)` gives (function, *arguments) for the Dask task. By default that is the task itself, with BLAS on one thread. It runs in
        this process, on threads or in a Client(processes=False); and in other processes of this machine if all tensors are shared. If they
        are not, it raises TypeError there. Raises TwinError for a kernel that was compiled from what has changed since.
        """
        from taskgpt.tasks.dask_graph import to_dask  # Dask loads slowly, and only those who ask need it

        return to_dask(self, call, token)
