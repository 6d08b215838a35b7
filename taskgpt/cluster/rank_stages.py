"""What differs in ranks that are stages of one model: what they validate, what they measure, and the digest of what they have together."""

import hashlib
import statistics
from collections.abc import Iterator
from contextlib import closing

import numpy as np

from taskgpt.cluster.rank_training import RankTraining
from taskgpt.collectives import Links
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.stages import layers_of
from taskgpt.tasks import Graph

_PIECE_BYTES = 16 << 20


class StageTraining(RankTraining):
    """A stage's training. busy_s: of each step, the seconds in which its workers ran tasks, those of all workers added up."""

    def _validate(self) -> None:
        """The same, each rank its layers of all batches."""
        batches = self.flags.val_batches

        def graphs() -> Iterator[Graph]:
            for n in range(batches):
                self.data.val.next_batch(*self.m.inputs(n % 2))
                yield self.val_graphs[n % 2]

        self.data.val.reset()
        with closing(self.scheduler.run_each(graphs())) as runs:
            losses = [self.m.loss_of(n % 2) for n, _ in enumerate(runs)]
        self.scheduler.take_records()
        found = np.zeros((self.job.count, batches))
        found[self.rank] = losses  # those of the last stage are the loss
        self.communicator.gather(found)
        self._take_validation(statistics.fmean(found[-1].tolist()))

    def _note_transfers(self, step: int) -> None:
        """Note what was sent since the step before; how long a stage waits for another one is no time of the network's."""
        transfers = self.communicator.take_transfers()
        self.transfers += transfers if self.job.record else []
        sent = sum(transfer.payload_bytes for transfer in transfers)
        self.payload_bytes += sent
        self.report.network(step, 0.0, 0.0, sent)
        records, _ = self.scheduler.take_records()
        self.busy_s.append(float((records["stop_ns"] - records["start_ns"]).sum()) / 1e9)


async def sha256_of_stages(links: Links, m: GPT2) -> str:
    """Return, on rank 0, GPT2.parameters_sha256 of the whole model, whose pieces the others send; "" on these. Raises PeerLost."""
    digest = hashlib.sha256()
    for number, (owner, piece) in enumerate(_pieces(m)):
        flat, tag = piece.reshape(-1), ("sha256", number)
        if links.rank == 0:
            digest.update(flat if owner == 0 else await links.receive(owner, tag))
        elif links.rank == owner:
            await links.send(0, tag, [flat])
    return digest.hexdigest() if links.rank == 0 else ""


def _pieces(m: GPT2) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (the stage that has it, some rows or layers) of all parameters, in the order of a checkpoint."""
    assert m.stage is not None
    owner_of = [rank for rank in range(m.stage.count) for _ in layers_of(m.model, rank, m.stage.count)]
    for name, array in m.parameters.items():
        rows = max(1, _PIECE_BYTES // array[0].nbytes)
        for start in range(0, len(array), 1 if name in m.of_layers else rows):
            yield (owner_of[start], array[start : start + 1]) if name in m.of_layers else (m.stage.count - 1, array[start : start + rows])
