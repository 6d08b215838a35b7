"""Training steps as a row of graphs: one for each micro-batch, of a stage one for each step, the slots of the model's inputs in turns."""

from collections import Counter
from collections.abc import Callable

from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.pipeline import stage_graph
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import MicroBatch
from taskgpt.tasks import Graph, Kernel


class Steps:
    """The graphs of all steps. count: graphs of a step; kernels, tasks, flops: what a step has of them.

    Graphs are counted over all steps, from 0: those of step n begin with n * count. `prepare` is given every graph first.
    """

    def __init__(self, gpt: GPT2, prepare: Callable[[Graph], Graph] = lambda graph: graph):
        self.count = 1 if gpt.stage else gpt.batch.accumulate
        self._slots = len(gpt.slots)
        times = Counter({self._place(at): 1 for at in (0, self.count - 1)})  # of each place in a step
        if self.count > 2:
            times[MicroBatch(False, False)] = self.count - 2
        self._graphs = {(slot, at): prepare(_graph(gpt, slot, at)) for slot in range(self._slots) for at in times}
        self.kernels: list[Kernel] = list(dict.fromkeys(kernel for graph in self._graphs.values() for kernel in graph.kernels))
        self.tasks = sum(n * len(self._graphs[0, at].tasks) for at, n in times.items())
        self.flops = sum(n * self._graphs[0, at].flops for at, n in times.items())

    def _place(self, at: int) -> MicroBatch:
        return MicroBatch(at == 0, at == self.count - 1)

    def micro_batch(self, number: int) -> tuple[int, Graph]:
        """Return (slot, graph) of a micro-batch, of a stage those of a step."""
        slot = number % self._slots
        return slot, self._graphs[slot, self._place(number % self.count)]


def _graph(gpt: GPT2, slot: int, at: MicroBatch) -> Graph:
    return stage_graph(gpt, slot) if gpt.stage else training_graph(gpt, slot, at)
