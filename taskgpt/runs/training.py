"""The loop of a training run: validate, sample and train, step by step, as llm.c's main does; and save on the way."""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.learning_rate import LearningRate
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.sampling import Sampler
from taskgpt.gpt2.steps import Steps
from taskgpt.gpt2.text.data import Data
from taskgpt.lab.pace import Pace
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.runs.console import Console, StopRequest
from taskgpt.runs.folder import now
from taskgpt.runs.saving import Saver
from taskgpt.schedulers import Scheduler
from taskgpt.tasks import Graph


class Training:
    """A run as it goes on. step: how many are done; loss, norm: the last ones that the run depends on; seconds: of each step.

    Micro-batches, and the graphs of validation, take turns in the slots of the model's inputs: while one runs, the next batch goes into the
    other slot, and that one may begin. Steps do not overlap with validation and samples.
    """

    def __init__(
        self,
        flags: argparse.Namespace,
        scheduler: Scheduler,
        m: GPT2,
        data: Data,
        steps: Steps,
        val_graphs: Sequence[Graph],
        sampler: Sampler,
        report: Console,
        stop: StopRequest,
    ):
        self.flags, self.scheduler, self.m, self.data = flags, scheduler, m, data
        self.steps, self.val_graphs, self.sampler = steps, val_graphs, sampler
        self.report, self.stop = report, stop
        self.saver: Saver | None = None  # which is set when nothing is left that could be refused: from then on the folder is its own
        self.run_name = ""  # in checkpoints
        self.learning_rate = LearningRate(flags.lr, flags.steps, flags.lr_schedule, flags.warmup, flags.final_lr)
        self.step = 0
        self.saved_step = 0  # after which no checkpoint is needed: the run begins there, or has one
        self.loss = self.norm = 0.0
        self.seconds: list[float] = []
        self._paused = 0, sampler.random.state  # after how many steps training last stood still, and the random numbers before it sampled
        self._validated: tuple[int, float] | None = None  # the last one: after how many steps, and what it found
        self._best_val_loss = math.inf

    def resume(self, about: About, best_val_loss: float) -> None:
        """Go on from a checkpoint, whose tensors are in the model. Raises UserError if it does not fit the data."""
        self.data.train.restore(about.train_data)
        self.sampler.random.state = int(about.sampler, 16)
        self.step = self.saved_step = about.step
        self._best_val_loss = best_val_loss

    def about(self, step: int) -> About:
        """Return what a checkpoint after so many steps says, when the batch of the step after it has not been read."""
        val_loss = self._validated[1] if self._validated and self._validated[0] == step and math.isfinite(self._validated[1]) else None
        random = self._paused[1] if self._paused[0] == step else self.sampler.random.state  # a run that goes on samples here once more
        return About(self.run_name, step, self.m.model, self.data.train.cursor(), format(random, "x"), val_loss, now())

    def run(self) -> None:
        """Train until the last step is done.

        Ends early if a stop is requested, or if a loss or a norm is not finite, unless such steps are skipped: then a step that has begun
        is finished, and the model is of no more use.
        """
        flags = self.flags
        while flags.steps:
            self._paused = self.step, self.sampler.random.state
            if self._is_due(flags.val_every):
                self._validate()
            if self.step and self._is_due(flags.sample_every) and not self.stop.is_requested:
                self._sample()
            if self._is_over:
                break
            if self.saver and not self.saver.graph and self._may_save(self.step):
                self.saver.write_now(self.about(self.step))
            self._train(self._next_pause())

    def save_last(self) -> list[str]:
        """Have a checkpoint of the model as it is; return why there is none. Between steps, when all has gone well."""
        saver = self.saver
        if self.step > self.saved_step and saver.newest != saver.folder.checkpoint(self.step):
            saver.write_now(self.about(self.step))
        return [str(saver.error)] if saver.error else []

    def _may_save(self, step: int) -> bool:
        """Return True if a checkpoint is due, which the one that the run goes on from is not."""
        if self.stop.wants_save:
            self.stop.wants_save = False
            self.saver.owe()
        return step > self.saved_step and self.saver.is_due(step)

    @property
    def _is_over(self) -> bool:
        return self.step >= self.last_step or self.stop.is_requested or self.has_diverged

    def _ends_before(self, step: int) -> bool:
        """Return True if a step is not to begin, when the one before it is under way."""
        return self.stop.is_requested or self.has_diverged

    @property
    def last_step(self) -> int:
        """How many steps are done when the run ends: --steps, or fewer by --max-tokens."""
        flags = self.flags
        return flags.steps if flags.max_tokens is None else min(flags.steps, -(-flags.max_tokens // self.m.step_tokens))

    @property
    def has_diverged(self) -> bool:
        return not (math.isfinite(self.loss) and math.isfinite(self.norm))

    def _is_due(self, every: int) -> bool:
        return every != 0 and (self.step % every == 0 or self.step == self.last_step)

    def _next_pause(self) -> int:
        """Return the step before which something else is due, or the most steps that can be recorded are done."""
        flags, step, last = self.flags, self.step, self.last_step
        tasks = self.steps.tasks + (len(self.saver.graph.tasks) if self.saver and self.saver.graph else 0)
        most = RECORD // tasks or 1 if isinstance(self.scheduler, Traced) else last
        return min([last, step + most, *(every * (step // every + 1) for every in (flags.val_every, flags.sample_every) if every)])

    def _validate(self) -> None:
        """Find the mean loss of the first batches of the validation part."""

        def batches() -> Iterator[Graph]:
            for n in range(self.flags.val_batches):
                if self.stop.is_requested:
                    return
                self.data.val.next_batch(*self.m.inputs(n % 2))
                yield self.val_graphs[n % 2]

        self.data.val.reset()
        with closing(self.scheduler.run_each(batches())) as runs:
            losses = [self.m.loss_of(n % 2) for n, _ in enumerate(runs)]
        if len(losses) == self.flags.val_batches:
            self._take_validation(statistics.fmean(losses))

    def _take_validation(self, loss: float) -> None:
        """Take what a validation has found."""
        self.loss = loss
        self._validated = self.step, self.loss
        self.report.validation(self.step, self.loss)
        if self.loss < self._best_val_loss and self.step and self.saver:
            self.saver.owe_best()
        self._best_val_loss = min(self.loss, self._best_val_loss)

    def _sample(self) -> None:
        tokenizer = self.data.tokenizer
        ids = self.sampler.sample(self.scheduler.run, tokenizer.end_of_text)
        self.report.sample(self.step, ids, tokenizer.decode(ids), tokenizer.printable(ids))

    def _train(self, last: int) -> None:
        """Do steps until `last` are done, a stop is requested or one has diverged; save what is due before the last."""
        saver, first, count = self.saver, self.step, self.steps.count

        def graphs() -> Iterator[Graph]:
            for step in range(first, last):
                if self._ends_before(step):
                    return
                if saver and saver.graph and self._may_save(step):
                    saver.hold(self.about(step))
                    yield saver.graph
                elif saver and not saver.graph and step > first and self._may_save(step):
                    return  # for no step is to run meanwhile
                for number in range(step * count, (step + 1) * count):
                    slot, graph = self.steps.micro_batch(number)
                    self._fill(slot, step, number)
                    yield graph

        pace, seconds, number = Pace(time.perf_counter()), 0.0, first * count
        with closing(self.scheduler.run_each(graphs())) as runs:
            for graph in runs:
                if self.has_diverged:
                    continue  # what has begun is finished, and is of no use
                if saver:
                    if graph is saver.graph:
                        saver.write()
                        continue
                    saver.poll()
                ahead = 0.0 if saver and saver.is_copying else self.scheduler.ahead()  # of a step
                seconds += pace.step(time.perf_counter(), ahead)
                number += 1
                if number % count:
                    continue
                self._end_step((number - 1) % len(self.m.slots), seconds)
                seconds = 0.0

    def _fill(self, slot: int, step: int, number: int) -> None:
        """Write into a slot what a graph of a step begins with."""
        for held in range(self.m.held):
            self.data.train.next_batch(*self.m.inputs(slot, held))
        self.m.set_hyper(step, self.learning_rate(step), self.flags.weight_decay, slot=slot)

    def _end_step(self, slot: int, seconds: float) -> None:
        """Take what a step has found in its slot, and say it."""
        loss, norm, skipped = self.m.loss_of(slot), self.m.norm_of(slot), self.m.skipped_of(slot)
        if not skipped or self.m.options.on_nan == "stop":
            self.loss, self.norm = loss, norm
        self.seconds.append(seconds)
        self.report.step(self.step, loss, norm, skipped, self.learning_rate(self.step), seconds)
        self.step += 1
