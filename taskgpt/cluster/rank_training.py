"""The loop of training in a rank: the one of every training run, with what ranks say to each other on the way.

Whatever decides how the run goes on, a stop, a checkpoint, new members, is said by rank 0 in a word of a step, and heard by all ranks at
the end of that step: so all do the same after the same step. What a person sees comes from rank 0, by the driver, and from each rank how it
is itself.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Worker

from taskgpt.cluster.job import Job
from taskgpt.cluster.kept import Kept, Offer
from taskgpt.collectives import SPREAD, Communicator, Links, Transfer
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import WORDS
from taskgpt.gpt2.snapshot import Snapshot
from taskgpt.runs.saving import Every, Saver
from taskgpt.runs.training import Training
from taskgpt.tasks import Graph

ASKED = ("", "stop", "regroup")  # what the driver can ask for, by the word that says it
_ASKED_WORD, _SAVE_WORD = 1, 2
_LOOK_S = 0.1
_TELL_S = 0.5  # between what a rank says of itself: a page looks once a second


class Asked:
    """In place of StopRequest: what rank 0 was asked for, and all ranks have heard."""

    def __init__(self, job: Job, here: Kept, links: Links):
        self._job, self._here, self._links = job, here, links
        self.heard, self.wants_save = "", False

    @property
    def is_requested(self) -> bool:
        return self.heard != "" or self.is_unwanted

    @property
    def is_unwanted(self) -> bool:
        """True once the generation is over, which a rank alone has nobody to hear from: then no further step begins."""
        return self._links.over != ""

    @property
    def now(self) -> str:
        """What the driver asks this rank for."""
        generation, what = self._here.asked
        return what if generation == self._job.generation else ""

    def answer_save(self) -> None:
        """Have a checkpoint not asked for any more, as all ranks have heard that one is due."""
        if self.now == "save":
            self._here.asked = self._job.generation, ""


class RankReport:
    """In place of Console: rank 0 tells the driver, the others nothing but how they are. What the last steps found is kept, for one that is
    rank 0 next.
    """

    def __init__(self, job: Job, rank: int, worker: Worker, here: Kept):
        self._job, self._rank, self._worker, self._here = job, rank, worker, here
        self._told_s = -math.inf

    def tell(self, what: str, *found: Any) -> None:
        if self._rank == 0:
            self._send(what, found)

    def _send(self, what: str, found: tuple) -> None:
        self._worker.log_event(self._job.topic, {"generation": self._job.generation, "what": what, "found": found})

    def say(self, line: str) -> None:
        self.tell("say", line)

    def data(self, description: str, fingerprint: dict[str, Any]) -> None:
        self.tell("data", description, json.dumps(fingerprint))  # a message would make tuples of lists
        for found in self._here.steps:
            self.tell("step", *found)

    def validation(self, step: int, loss: float) -> None:
        self.tell("validation", step, loss)

    def sample(self, step: int, ids: list[int], text: str, printable: str) -> None:
        self.tell("sample", step, list(ids), text, printable)

    def step(self, step: int, loss: float, norm: float, skipped: str, rate: float, seconds: float) -> None:
        found = step, float(loss), float(norm), skipped, float(rate), seconds
        self._here.steps.append(found)
        self.tell("step", *found)

    def network(self, step: int, network_s: float, exposed_s: float, payload_bytes: int) -> None:
        self.tell("network", step, network_s, exposed_s, payload_bytes)

    def rank(self, step: int, seconds: float, wait_s: float | None) -> None:
        """Say how this rank is, if somebody is shown that, and it was not said a moment ago; whatever becomes of that, the rank goes on."""
        now_s = time.monotonic()
        if self._job.is_watched and now_s - self._told_s >= _TELL_S:
            self._told_s = now_s
            with suppress(Exception):
                self._send("rank", (self._rank, step, seconds, wait_s))


class _Names:
    """In place of a run's folder, which is the driver's: names of checkpoints."""

    def checkpoint(self, step: int) -> Path:
        return Path(resumable.NAME.format(step))


class RankSaver(Saver):
    """Offers checkpoints to the driver, who fetches and writes them. Shards and stages offer their parts at the same time."""

    def __init__(self, job: Job, rank: int, worker: Worker, here: Kept, m: GPT2, snapshot: Snapshot | None, communicator: Communicator):
        every = Every.of("--save-every", job.flags["save_every"])
        super().__init__(_Names(), job.run, m, snapshot, every, 0, lambda line: None)  # type: ignore[arg-type]
        self._job, self._rank, self._worker, self._here, self._communicator = job, rank, worker, here, communicator
        self._last_s -= job.unsaved_s
        self.is_told = False  # rank 0 has said that one is due, and all have heard it
        self._has_said = False

    def wants(self, step: int) -> bool:
        """Return True, once, if rank 0 is to say that one is due for which there is no agreed step."""
        by_time = self.every.seconds is not None and time.monotonic() - self._last_s >= self.every.seconds
        if self._has_said or not (by_time or self._is_owed):
            return False
        self._has_said = True
        return True

    def is_due(self, step: int) -> bool:
        return self.is_told or (self.every.steps is not None and step % self.every.steps == 0)

    def hold(self, about: About) -> None:
        super().hold(about)
        self.is_told = self._has_said = False

    def write_now(self, about: About) -> None:
        """Offer the model itself, which does not change meanwhile. Raises PeerLost if the generation ends before it is fetched."""
        super().write_now(about)
        self._communicator.verify_goes_on()

    def _write(self, about: About, state: dict, how: str) -> None:
        """Offer a state until the driver has it, or the generation is over."""
        name = self._job.offer_of(about.step)
        offer = self._here.offers[name] = Offer(state)
        found = self._rank, dataclasses.asdict(about), self._ranges()
        self._worker.log_event(self._job.topic, {"generation": self._job.generation, "what": "offer", "found": found})
        while not offer.taken.wait(_LOOK_S) and not self._communicator.links.over:
            pass
        self._here.offers.pop(name, None)
        if offer.taken.is_set():
            self.newest = self.folder.checkpoint(about.step)

    def _ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Return which elements of each array are this rank's to give."""
        if self._job.is_staged:
            return self._m.elements_here()
        if not self._job.is_in_parts:
            return {name: [(0, array.size)] for name, array in self._m.state.items()}
        mine = {name: [(0, array.size)] for name, array in self._m.state.items() if name[:2] not in ("m_", "v_") and self._rank == 0}
        for name, at in self._m.replica.owned():
            for moments in ("m_", "v_"):
                mine.setdefault(moments + name, []).append(at)
        return mine


class RankTraining(Training):
    """A rank's training. `join` comes before `run`."""

    saver: RankSaver | None
    stop: Asked

    def join(self, job: Job, rank: int, communicator: Communicator, saver: RankSaver | None) -> None:
        """Say which rank this is."""
        self.job, self.rank, self.communicator = job, rank, communicator
        self.saver, self.run_name = saver, job.run
        self.payload_bytes = 0
        self.transfers: list[Transfer] = []  # all, where the job is recorded
        self._abouts: dict[int, About] = {}  # by steps done: what the state is then, of the last few
        self._said: dict[int, np.ndarray] = {}  # words, where there is nobody else
        self._transfers: dict[int, list[Transfer]] = {}  # by turn
        self._turn = 0
        self._until = job.until  # after how many steps it ends, as all ranks know
        self._network: list[float] = []
        self._exposed: list[float] = []
        self.busy_s: list[float] = []

    @property
    def wants_last(self) -> bool:
        """True if a checkpoint is due at an agreed end: the run's, that of a stop, or any where no rank has the whole state."""
        return self.saver is not None and (self.step >= self.last_step or self.stop.heard == "stop" or self.job.is_in_parts)

    def about_now(self) -> About:
        """Return what the state is after the steps done, also if one more has begun, and was not finished."""
        return self._abouts.get(self.step) or self.about(self.step)

    def network_times(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return for each step the seconds of its exchanges, and of those in which nothing else was left to do."""
        return tuple(self._network), tuple(self._exposed)

    # What differs from training alone ---------------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self.has_diverged or self._ends_before(self.step)

    def _ends_before(self, step: int) -> bool:
        return step >= self._until or self.stop.is_unwanted

    def _next_pause(self) -> int:
        return min(super()._next_pause(), self._until)

    def _fill(self, slot: int, step: int, number: int) -> None:
        first, last = number % self.steps.count == 0, (number + 1) % self.steps.count == 0
        if first:
            self._abouts[step] = self.about(step)
            self._abouts.pop(step - 3, None)
        super()._fill(slot, step, number)
        if last and self._has_others:
            self.m.slots[slot].words.array[:] = self._words(step)
        elif last:
            self._said[step] = self._words(step)

    @property
    def _has_others(self) -> bool:
        return (self.m.replica or self.m.stage) is not None

    def _words(self, step: int) -> np.ndarray:
        words = np.zeros(WORDS)
        if self.rank == 0:
            asked = self.stop.now
            words[_ASKED_WORD] = ASKED.index(asked) if asked in ASKED else 0
            words[_SAVE_WORD] = self.saver is not None and (asked == "save" or (step > self.saved_step and self.saver.wants(step)))
        return words

    def _end_step(self, slot: int, seconds: float) -> None:
        step = self.step
        super()._end_step(slot, seconds)
        self._hear(self.m.slots[slot].all_words.array[:WORDS] if self._has_others else self._said.pop(step))
        if self._has_others:
            self._note_transfers(step)
        self.report.rank(self.step, seconds, self._exposed[-1] if self._exposed else None)

    def _hear(self, words: np.ndarray) -> None:
        """Take what rank 0 has said in the step that has ended. Some ranks have begun the next step, which is the last of all, then."""
        self.stop.heard = self.stop.heard or ASKED[int(words[_ASKED_WORD])]
        if self.stop.heard or self.has_diverged:
            self._until = min(self._until, self.step + 1)
        if words[_SAVE_WORD] and self.saver:
            self.saver.is_told = True
            self.stop.answer_save()

    def _note_transfers(self, step: int) -> None:
        for transfer in self.communicator.take_transfers():
            self._transfers.setdefault(transfer.turn, []).append(transfer)
            self.payload_bytes += transfer.payload_bytes
            if self.job.record:
                self.transfers.append(transfer)
        mine = self._transfers.pop(self._turn, [])
        self._turn += 1
        busy, exposed = _busy_s(mine), _exposed_s([each for each in mine if each.what != SPREAD])
        self._network.append(busy)
        self._exposed.append(exposed)
        self.report.network(step, busy, exposed, sum(each.payload_bytes for each in mine))

    def _validate(self) -> None:
        """The same, each rank some of the batches."""
        count, batches = self.job.count, self.flags.val_batches
        if count == 1:
            super()._validate()
            return
        mine = range(self.rank, batches, count)
        of_others = np.empty((2, self.m.batch.batch_size, self.m.batch.seq_len), np.int32)

        def graphs() -> Iterator[Graph]:
            for n in range(batches):
                if self.stop.is_unwanted:
                    return
                slot = mine.index(n) % 2 if n in mine else -1
                self.data.val.next_batch(*(of_others if slot < 0 else self.m.inputs(slot)))
                if slot >= 0:
                    yield self.val_graphs[slot]

        self.data.val.reset()
        with closing(self.scheduler.run_each(graphs())) as runs:
            losses = [self.m.loss_of(n % 2) for n, _ in enumerate(runs)]
        found = np.zeros((count, -(-batches // count)))
        found[self.rank, : len(losses)] = losses
        self.communicator.gather(found)
        self._take_validation(statistics.fmean(found.T.ravel()[:batches].tolist()))


def _busy_s(transfers: list[Transfer]) -> float:
    """Return the seconds in which at least one of them was under way."""
    busy = end = 0
    for each in sorted(transfers, key=lambda transfer: transfer.begin_ns):
        busy += max(0, each.end_ns - max(each.begin_ns, end))
        end = max(end, each.end_ns)
    return busy / 1e9


def _exposed_s(transfers: list[Transfer]) -> float:
    """Return the seconds from when the last was handed in until all were done."""
    return (max(each.end_ns for each in transfers) - max(each.begin_ns for each in transfers)) / 1e9 if transfers else 0.0
