"""The baseline that is no schedule of tasks: whole tensors, one NumPy call after another, with threads inside the BLAS alone.

That is what a NumPy user would write: the kernels' own NumPy bodies, on tensors that are not cut, separate as in llm.c. Its numbers agree
with the compiled kernels' to rounding, not to the bit.
"""

from threadpoolctl import threadpool_limits

from taskgpt.schedulers.prepare import InTurn
from taskgpt.tasks import Graph
from taskgpt.tasks.scratch import scratch_arrays

WHOLE = 1 << 30  # longer than any axis
NOT_CUT = {f"tiles.{key}": str(WHOLE) for key in ("rows", "columns", "pointwise_rows", "heads", "vocabulary")} | {"tiles.logits_rows": "0"}
CHANGES = tuple((NOT_CUT | {"options.kernels": "separate", "options.update": "separate"}).items())


class WholeTensor(InTurn):
    """Runs the NumPy bodies of a graph's calls in program order, with so many threads in the BLAS."""

    def __init__(self, threads: int):
        super().__init__()
        self.workers = threads

    def _start(self) -> None:
        self._blas = threadpool_limits(self.workers, user_api="blas")

    def _stop(self) -> None:
        self._blas.restore_original_limits()

    def describe(self) -> str:
        return f"whole-tensor: NumPy, {self.workers} threads in the BLAS"

    def _run(self, graph: Graph) -> None:
        for task in graph.tasks:
            for call in task.calls:
                call.kernel.body(*call.arrays, *scratch_arrays(call.scratch_shapes))
