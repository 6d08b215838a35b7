"""Train GPT-2 as a graph of tasks.

    python -m taskgpt.train                                        # GPT-2 124M from scratch on tinyshakespeare, 40 steps
    python -m taskgpt.train --graph tiny --steps 100               # a toy, seconds on any machine
    python -m taskgpt.train --scheduler loops --workers 2          # the same bits, run as fork-join loops
    python -m taskgpt.train --init gpt2_124M.bin --data my.txt --lr 1e-5 --save tuned.bin       # fine-tune an llm.c checkpoint
    python -m taskgpt.train --set tiles.rows=128 --set coarsen=0 --log run.jsonl                # other tiles, another set-up

The graph file (graphs/) says what is computed, the scheduler file (scheduler_configs/) how. Prints what llm.c prints, then a summary.
"""

import argparse
import dataclasses
import json
import math
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from taskgpt.config import GraphConfig, SchedulerConfig, available, load_graph, load_scheduler, parse_settings
from taskgpt.data import open_data
from taskgpt.errors import UserError
from taskgpt.gpt2 import checkpoint
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph, training_graph
from taskgpt.gpt2.sampling import Sampler
from taskgpt.lab import machine
from taskgpt.schedulers import WorkerError, open_scheduler
from taskgpt.tasks import Graph, Kernel, TaskError, check, compile_kernels


def parser() -> argparse.ArgumentParser:
    """Return the flags; their defaults are llm.c's."""
    title, _, examples = __doc__.partition("\n\n")
    p = argparse.ArgumentParser("taskgpt train", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what runs")
    what.add_argument("--graph", default="gpt2-124m", metavar="NAME", help=f"graph file: {', '.join(available('graphs'))}, or a path")
    what.add_argument("--init", metavar="MODEL.bin", help="start from an llm.c checkpoint, which also gives the model's shape")
    what.add_argument(
        "--data", default="tinyshakespeare", help="tinyshakespeare, tinystories, a text file, a folder or glob of token files"
    )
    what.add_argument("--steps", type=_count, default=40, help="optimizer steps (default 40)")
    what.add_argument("--batch-size", type=_positive, metavar="B", help="sequences a step (default: the graph file's)")
    what.add_argument("--seq-len", type=_positive, metavar="T", help="tokens in a sequence (default: the graph file's)")
    what.add_argument("--lr", type=_rate, default=1e-4, help="AdamW's learning rate (default 1e-4)")
    what.add_argument("--weight-decay", type=_rate, default=0.0, help="AdamW's weight decay (default 0, as in llm.c)")
    what.add_argument("--seed", type=_count, default=42, help="of the initial parameters (default 42)")
    how = p.add_argument_group("how it runs")
    schedulers = ", ".join(available("scheduler_configs"))
    how.add_argument("--scheduler", default="threads", metavar="NAME", help=f"scheduler file: {schedulers}, or a path")
    how.add_argument("--workers", type=_positive, metavar="N", help="workers (default: the scheduler file's)")
    how.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the graph or the scheduler file")
    how.add_argument("--check", action="store_true", help="run every task on guarded copies and report undeclared accesses (slow)")
    out = p.add_argument_group("what comes out")
    out.add_argument("--val-every", type=_count, default=10, metavar="N", help="validation loss every N steps, 0 = never (default 10)")
    out.add_argument("--val-batches", type=_positive, default=5, metavar="N", help="batches of a validation (default 5)")
    out.add_argument("--sample-every", type=_count, default=20, metavar="N", help="a sample every N steps, 0 = never (default 20)")
    out.add_argument("--save", metavar="MODEL.bin", help="write the trained parameters as an llm.c checkpoint")
    out.add_argument("--log", metavar="FILE.jsonl", help="write losses, samples and summary, one JSON object a line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0, 1 for a failed task or a lost worker, 2 for a user's mistake, 130 after Ctrl-C."""
    flags = parser().parse_args(argv)
    try:
        with Report(flags) as report:
            return train(flags, report)
    except (UserError, MemoryError) as error:
        print(f"taskgpt.train: error: {error}", file=sys.stderr)
        return 2
    except (TaskError, WorkerError) as error:
        print(f"taskgpt.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("taskgpt.train: interrupted in the middle of a step; nothing was saved", file=sys.stderr)
        return 130


def train(flags: argparse.Namespace, report: "Report") -> int:
    """Train as the flags say. Raises UserError, TaskError, MemoryError or KeyboardInterrupt."""
    graph_config, scheduler_config = configure(flags)
    model, batch = graph_config.model, graph_config.batch
    if batch.seq_len > model.max_seq_len:
        raise UserError(f"--seq-len: the model has {model.max_seq_len} positions, got sequences of {batch.seq_len} tokens")
    verify_memory(graph_config)
    data = open_data(flags.data, batch.batch_size, batch.seq_len, model.vocabulary, report.say)
    scheduler = open_scheduler(scheduler_config.scheduler, scheduler_config.settings)
    m = GPT2(model, batch, graph_config.tiles, graph_config.options, shared=scheduler.needs_shared_memory)
    if flags.save:
        checkpoint.verify_can_save(flags.save, m)
    if flags.init:
        checkpoint.load(flags.init, m)
    else:
        m.initialize(flags.seed)

    prepare = check if flags.check else lambda graph: graph
    step_graph, val_graph = prepare(training_graph(m)), prepare(loss_graph(m))
    sampler = Sampler(m, prepare)
    compile_with_progress([step_graph, val_graph, *sampler.graphs], report)
    inputs, targets = (tensor.array.reshape(batch.batch_size, batch.seq_len) for tensor in (m.s.tokens, m.s.targets))
    seconds: list[float] = []

    with scheduler, report.progress(flags.steps), StopRequest(report.say) as stop:
        report.begin(graph_config, scheduler.describe(), data.description, m, step_graph)
        for step in range(flags.steps):
            if flags.val_every and step % flags.val_every == 0:
                data.val.reset()
                losses = []
                for _ in range(flags.val_batches):
                    data.val.next_batch(inputs, targets)
                    scheduler.run(val_graph)
                    losses.append(float(m.s.loss.array[0]))
                report.validation(step, statistics.fmean(losses))
            if flags.sample_every and step and step % flags.sample_every == 0:
                ids = sampler.sample(scheduler.run, data.tokenizer.end_of_text)
                report.sample(step, ids, data.tokenizer.decode(ids), data.tokenizer.printable(ids))
            start = time.perf_counter()
            data.train.next_batch(inputs, targets)
            m.set_hyper(step, flags.lr, flags.weight_decay)
            scheduler.run(step_graph)
            seconds.append(time.perf_counter() - start)
            report.step(step, float(m.s.loss.array[0]), seconds[-1])
            if stop.is_requested:
                break

    if flags.save:
        checkpoint.save(flags.save, m)
        report.say(f"saved {flags.save}")
    report.summary(summarize(flags, graph_config, scheduler_config, scheduler.workers, data.description, m, step_graph, seconds))
    return 130 if stop.is_requested else 0


def configure(flags: argparse.Namespace) -> tuple[GraphConfig, SchedulerConfig]:
    """Return both configurations: files, then `--set`, then the flags that name a key of their own."""
    graph_overrides, scheduler_overrides = parse_settings(flags.set)
    for key, value in (("batch.batch_size", flags.batch_size), ("batch.seq_len", flags.seq_len)):
        if value is not None:
            graph_overrides[key] = value
    if flags.workers is not None:
        scheduler_overrides["workers"] = flags.workers
    graph = load_graph(flags.graph, graph_overrides)
    if flags.init:
        graph = dataclasses.replace(graph, model=checkpoint.read_shape(flags.init))
    return graph, load_scheduler(flags.scheduler, scheduler_overrides)


def verify_memory(config: GraphConfig) -> None:
    """Raise UserError if the machine has not enough memory for the model: better than being killed in the first step."""
    needed, free = GPT2.bytes_needed(config.model, config.batch, config.tiles), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{config.name}: training needs {needed / 2**30:.1f} GiB for parameters, gradients, moments and activations, this machine has "
            f"{free / 2**30:.1f} GiB free; choose a smaller graph, --batch-size or --seq-len"
        )


def compile_with_progress(graphs: Sequence[Graph], report: "Report") -> None:
    """Compile every kernel, saying so if it takes long: once per machine, then they come from numba's cache."""

    def tell(done: int, total: int, kernel: Kernel, seconds: float, was_cached: bool) -> None:
        if not was_cached:
            report.say(f"compiling kernels, once for this machine: {done}/{total} {kernel.name} ({seconds:.1f} s)")

    compile_kernels([kernel for graph in graphs for kernel in graph.kernels], tell)


def summarize(flags, graph_config, scheduler_config, workers, description, m, graph, seconds) -> dict[str, Any]:
    """Return what is worth knowing about a run; times leave out the first step, which touches all memory for the first time."""
    steady = seconds[1:] or seconds
    summary: dict[str, Any] = {"steps": len(seconds), "parameters_sha256": m.parameters_sha256()}
    if seconds:
        median = statistics.median(steady)
        sgemm = machine.sgemm_gflops(workers)
        summary |= {
            "first_step_ms": seconds[0] * 1e3,
            "mean_ms": statistics.fmean(steady) * 1e3,
            "median_ms": median * 1e3,
            "min_ms": min(steady) * 1e3,
            "tokens_per_s": m.batch.rows / median,
            "gflops": graph.flops / median / 1e9,
            "sgemm_gflops": sgemm,
            "share_of_sgemm": graph.flops / median / 1e9 / sgemm,
        }
    scale = 1 if sys.platform == "darwin" else 1024
    return summary | {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
        "workers": workers,
        "tasks_per_step": len(graph.tasks),
        "gflop_per_step": graph.flops / 1e9,
        "data": description,
        "flags": vars(flags),
        "graph": dataclasses.asdict(graph_config),
        "scheduler": {
            "name": scheduler_config.name,
            "scheduler": scheduler_config.scheduler,
            **dataclasses.asdict(scheduler_config.settings),
        },
        "machine": machine.describe(),
    }


class Report:
    """Everything the program says: lines on standard output, a progress bar on a terminal, JSON lines in the log.

    Raises UserError if the log cannot be written.
    """

    def __init__(self, flags: argparse.Namespace):
        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        self.rows = 0
        self._bar: Progress | None = None
        self._log = None
        if flags.log:
            try:
                self._log = open(flags.log, "w", encoding="utf-8")  # noqa: SIM115 - open until the program ends
            except OSError as error:
                raise UserError(f"--log {flags.log}: cannot write: {error.strerror}") from None

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_) -> None:
        if self._log:
            self._log.close()

    def say(self, line: str) -> None:
        self.console.print(line)

    @contextmanager
    def progress(self, steps: int) -> Iterator[None]:
        """On a terminal, show a bar with the time left; elsewhere the lines are progress enough."""
        if not self.console.is_terminal:
            yield
            return
        text, left = TextColumn("{task.description}"), TextColumn("left")
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left, TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._bar.add_task("training", total=steps)
            yield

    def begin(self, config: GraphConfig, scheduler: str, data: str, m: GPT2, graph: Graph) -> None:
        shape = m.model
        self.rows = m.batch.rows
        sizes = f"L {shape.layers}, NH {shape.heads}, C {shape.channels}, V {shape.vocabulary}"
        work = f"{len(graph.tasks)} tasks of {len(graph.kernels)} kernels, {graph.flops / 1e9:.4g} GFLOP a step"
        self.say(f"model      {config.name}: {shape.parameter_count():,} parameters, {sizes}")
        self.say(f"batch      B {m.batch.batch_size}, T {m.batch.seq_len}")
        self.say(f"data       {data}")
        self.say(f"graph      {work}, {m.nbytes / 2**30:.2f} GiB of tensors")
        self.say(f"scheduler  {scheduler}")

    def validation(self, step: int, loss: float) -> None:
        self.say(f"val loss {loss:.6f}")
        self._write({"step": step, "val_loss": loss})

    def step(self, step: int, loss: float, seconds: float) -> None:
        speed = self.rows / seconds
        self.say(f"step {step}: train loss {loss:.6f} (took {seconds * 1e3:.1f} ms, {speed:.0f} tok/s)")
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=1, description=f"loss {loss:.3f}  {speed:.0f} tok/s")
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the train loss is {loss}; a smaller --lr may help, or another --init")
        self._write({"step": step, "train_loss": loss, "ms": seconds * 1e3, "tokens_per_s": speed})

    def sample(self, step: int, ids: list[int], text: str, printable: str) -> None:
        self.say(f"generating:\n---\n{printable}\n---")
        self._write({"step": step, "sample": text, "ids": ids})

    def summary(self, summary: dict[str, Any]) -> None:
        if "median_ms" in summary:
            s = summary
            steady = f"mean {s['mean_ms']:.1f}, median {s['median_ms']:.1f}, min {s['min_ms']:.1f} ms a step"
            self.say(f"time       first step {s['first_step_ms']:.1f} ms; then {steady}")
            self.say(
                f"speed      {s['tokens_per_s']:.0f} tok/s, {s['gflops']:.1f} GFLOP/s = {s['share_of_sgemm']:.0%} of this machine's sgemm "
                f"on {s['workers']} thread{'s' if s['workers'] > 1 else ''} ({s['sgemm_gflops']:.0f})"
            )
        self.say(f"memory     {summary['peak_memory_bytes'] / 2**30:.2f} GiB at most")
        self.say(f"parameters sha256 {summary['parameters_sha256']}")
        self._write({"summary": summary})

    def _write(self, record: dict[str, Any]) -> None:
        if self._log:
            try:
                print(json.dumps(record), file=self._log, flush=True)
            except OSError as error:
                raise UserError(f"--log {self._log.name}: cannot write: {error.strerror}") from None


class StopRequest:
    """The first Ctrl-C ends the run after the step in progress, with summary and checkpoint; the second ends it at once."""

    def __init__(self, say: Callable[[str], None]):
        self.is_requested = False
        self._say = say

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _request(self, *_) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        self._say("stopping after this step; press Ctrl-C again to stop at once")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"wanted 0 or more, got {text}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"wanted a number of 0 or more, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
