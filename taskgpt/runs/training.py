"""The loop of a training run: validate, sample and train, step by step, as llm.c's main does."""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

from taskgpt.gpt2.learning_rate import LearningRate
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.sampling import Sampler
from taskgpt.gpt2.text.data import Data
from taskgpt.lab.pace import Pace
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.runs.console import Console, StopRequest
from taskgpt.schedulers import Scheduler
from taskgpt.tasks import Graph


class Training:
    """A run as it goes on. step: how many are done; loss: the last one found; seconds: of each step.

    Of `step_graphs` and `val_graphs` there is one for each slot of the model's inputs: while a step runs, the next batch goes into the
    other slot, and that step may begin. Steps do not overlap with validation and samples.
    """

    def __init__(
        self,
        flags: argparse.Namespace,
        scheduler: Scheduler,
        m: GPT2,
        data: Data,
        step_graphs: Sequence[Graph],
        val_graphs: Sequence[Graph],
        sampler: Sampler,
        report: Console,
        stop: StopRequest,
    ):
        self.flags, self.scheduler, self.m, self.data = flags, scheduler, m, data
        self.step_graphs, self.val_graphs, self.sampler = step_graphs, val_graphs, sampler
        self.report, self.stop = report, stop
        self.learning_rate = LearningRate(flags.lr, flags.steps, flags.lr_schedule, flags.warmup, flags.final_lr)
        self.step, self.loss = 0, 0.0
        self.seconds: list[float] = []

    def run(self) -> None:
        """Train until the last step is done.

        Ends early if a stop is requested, or if a loss is not finite: then a step that has begun is finished, and the model is of no more
        use.
        """
        flags = self.flags
        while flags.steps:
            if self._is_due(flags.val_every):
                self._validate()
            if self.step and self._is_due(flags.sample_every) and not self.stop.is_requested:
                self._sample()
            if self.step == flags.steps or self.stop.is_requested or not math.isfinite(self.loss):
                break
            self._train(self._next_pause())

    def _is_due(self, every: int) -> bool:
        return every != 0 and (self.step % every == 0 or self.step == self.flags.steps)

    def _next_pause(self) -> int:
        """Return the step before which something else is due, or the most steps that can be recorded are done."""
        flags, step = self.flags, self.step
        most = RECORD // len(self.step_graphs[0].tasks) or 1 if isinstance(self.scheduler, Traced) else flags.steps
        return min([flags.steps, step + most, *(every * (step // every + 1) for every in (flags.val_every, flags.sample_every) if every)])

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
            self.loss = statistics.fmean(losses)
            self.report.validation(self.step, self.loss)

    def _sample(self) -> None:
        tokenizer = self.data.tokenizer
        ids = self.sampler.sample(self.scheduler.run, tokenizer.end_of_text)
        self.report.sample(self.step, ids, tokenizer.decode(ids), tokenizer.printable(ids))

    def _train(self, last: int) -> None:
        """Do steps until `last` are done, a stop is requested or a loss is not finite."""

        def steps() -> Iterator[Graph]:
            for step in range(self.step, last):
                if self.stop.is_requested:
                    return
                self.data.train.next_batch(*self.m.inputs(step % 2))
                self.m.set_hyper(step, self.learning_rate(step), self.flags.weight_decay, slot=step % 2)
                yield self.step_graphs[step % 2]

        pace = Pace(time.perf_counter())
        with closing(self.scheduler.run_each(steps())) as runs:
            for _ in runs:
                self.seconds.append(pace.step(time.perf_counter(), self.scheduler.ahead()))
                self.loss = self.m.loss_of(self.step % 2)
                self.report.step(self.step, self.loss, self.learning_rate(self.step), self.seconds[-1])
                self.step += 1
                if not math.isfinite(self.loss):
                    return
