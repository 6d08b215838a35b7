"""Train GPT-2 as a graph of tasks.

    taskgpt train                                        # GPT-2 124M from scratch on tinyshakespeare, 40 steps
    taskgpt train --graph tiny --steps 100               # a toy, seconds on any machine
    taskgpt train --scheduler loops --workers 2          # the same bits, run as fork-join loops
    taskgpt train --init gpt2_124M.bin --data my.txt --lr 1e-5 --save tuned.bin       # fine-tune an llm.c checkpoint
    taskgpt train --set tiles.rows=128 --set coarsen=0 --log run.jsonl                # other tiles, another set-up
    taskgpt train --dashboard           # watch it: tasks in Dask's dashboard, loss and efficiency on a page beside them
    taskgpt train --report run.html     # a page of the run at its end: losses, samples, settings, efficiency
    taskgpt train --steps 5 --trace runs/native        # which task ran when, on which worker: for Perfetto, Paraver and ovni

The graph file (graphs/) says what is computed, the scheduler file (scheduler_configs/) how. Prints what llm.c prints, then a summary.
"""

import argparse
import dataclasses
import math
import os
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from typing import Any

import psutil

from taskgpt.config import GraphConfig, SchedulerConfig, load_graph, load_scheduler
from taskgpt.console import Console, StopRequest, told
from taskgpt.errors import UserError, on_signals, run_program, shorten
from taskgpt.files import verify_can_write
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.learning_rate import FALLS, LearningRate
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph, training_graph
from taskgpt.gpt2.sampling import Sampler
from taskgpt.gpt2.text.data import Data, open_data
from taskgpt.lab import machine, run_page
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.disturbance import Disturbance
from taskgpt.lab.named import overridden
from taskgpt.lab.pace import Pace
from taskgpt.lab.traces.formats import has_trace, save, verify_can_save
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.lab.tuning import tuned
from taskgpt.programs.arguments import AUTO, Parser, add_changes, add_graph, add_scheduler, add_workers, count, part, positive, rate
from taskgpt.schedulers import Scheduler, WorkerError, open_scheduler
from taskgpt.tasks import AccessError, Graph, TaskError, TwinError, check

SGEMM_TRIES = 4  # measurements of sgemm, where the first says that training was faster


def parser() -> argparse.ArgumentParser:
    """Return the flags; their defaults are llm.c's."""
    p = Parser("taskgpt train", __doc__)
    what = p.add_argument_group("what runs")
    add_graph(what, "gpt2-124m")
    add_changes(what, has_auto=True)
    what.add_argument(
        "--init", metavar="MODEL", help="start from a checkpoint, llm.c's file or Hugging Face's folder, which gives the shape too"
    )
    what.add_argument(
        "--data", default="tinyshakespeare", help="tinyshakespeare, tinystories, a text file, a folder or glob of token files"
    )
    what.add_argument("--steps", type=count, default=40, help="optimizer steps (default 40)")
    what.add_argument("--batch-size", type=positive, metavar="B", help="sequences a step (default: the graph file's)")
    what.add_argument("--seq-len", type=positive, metavar="T", help="tokens in a sequence (default: the graph file's)")
    what.add_argument("--lr", type=rate, default=1e-4, help="AdamW's learning rate, at its highest (default 1e-4)")
    what.add_argument("--lr-schedule", choices=FALLS, default="constant", help="how the learning rate goes on (default constant)")
    what.add_argument("--warmup", type=count, default=0, metavar="N", help="steps in which the learning rate rises (default 0)")
    what.add_argument("--final-lr", type=part, default=0.0, metavar="PART", help="of --lr, at the end of the schedule (default 0)")
    what.add_argument("--weight-decay", type=rate, default=0.0, help="AdamW's weight decay (default 0, as in llm.c)")
    what.add_argument("--seed", type=count, default=42, help="of the initial parameters (default 42)")
    how = p.add_argument_group("how it runs")
    add_scheduler(how, "native")
    add_workers(how, "default: the scheduler file's")
    how.add_argument("--check", action="store_true", help="run every task on guarded copies and report undeclared accesses (slow)")
    out = p.add_argument_group("what comes out")
    out.add_argument("--val-every", type=count, default=10, metavar="N", help="validation loss every N steps, 0 = never (default 10)")
    out.add_argument("--val-batches", type=positive, default=5, metavar="N", help="batches of a validation (default 5)")
    out.add_argument("--sample-every", type=count, default=20, metavar="N", help="a sample every N steps, 0 = never (default 20)")
    out.add_argument("--save", metavar="MODEL", help="write the trained parameters: name.bin is llm.c's format, a folder Hugging Face's")
    out.add_argument("--trace", metavar="DIR", help="write what each worker did when, for Perfetto, Paraver, ovni and `taskgpt trace`")
    out.add_argument(
        "--dashboard",
        nargs="?",
        const="",
        metavar="[HOST:]PORT",
        help="show the run, while it goes on, in Dask's dashboard and on a page /taskgpt there (default 127.0.0.1:8787, or a free port)",
    )
    out.add_argument("--report", metavar="FILE.html", help="write a page of the run: losses, speed, efficiency, samples, settings")
    out.add_argument("--log", metavar="FILE.jsonl", help="write losses, samples and summary, one JSON object a line")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: as errors.py says, 2 also for a diverged loss.

    A run that a signal ended after a step, with checkpoint and summary, has the exit code of the signal too.
    """

    def run() -> int:
        flags = parser().parse_args(argv)
        flags.argv = list(sys.argv[1:] if argv is None else argv)
        with Console() as report:
            stop = StopRequest(report)
            with on_signals(stop.request):
                return train(flags, report, stop)

    return run_program("taskgpt train", run, (TaskError, TwinError, AccessError, WorkerError))


def train(flags: argparse.Namespace, report: Console, stop: StopRequest) -> int:
    """Train as the flags say; return the exit code. Raises what `main` answers."""
    if flags.save is not None and flags.steps == 0 and os.path.exists(flags.save):
        raise UserError(f"--save {shorten(flags.save)}: is there already, and --steps 0 trains nothing; name another file")
    disturbance = Disturbance()
    graph_config, scheduler_config = configure(flags)
    model, batch = graph_config.model, graph_config.batch
    verify_memory(graph_config)
    data = open_data(flags.data, batch.batch_size, batch.seq_len, model.vocabulary, report.say)
    bare = scheduler = open_scheduler(scheduler_config.scheduler, scheduler_config.settings)
    dashboard = None
    if flags.trace is not None:
        verify_can_save(flags.trace)
    if flags.report is not None:
        verify_can_write(flags.report)
    live = report.open_live(scheduler.workers) if is_watched(flags) else None
    if flags.dashboard is not None:
        from taskgpt.lab.dashboard.dashboard import Dashboard  # here, as it takes half a second, and needs bokeh

        dashboard = Dashboard(live, flags.dashboard)
    if is_watched(flags):
        scheduler = Traced(scheduler, (dashboard or live).look, keeps=flags.trace is not None)
    m = GPT2(model, batch, graph_config.tiles, graph_config.options, shared=scheduler.needs_shared_memory)
    if flags.save is not None:
        checkpoints.verify_can_save(flags.save, model, m.p.nbytes)
    if flags.init is not None:
        checkpoints.load(flags.init, model, m.parameters)
    else:
        m.initialize(flags.seed)
    if flags.log is not None:
        report.open_log(flags.log)

    prepare = check if flags.check else lambda graph: graph
    step_graphs, val_graphs = ([prepare(record(m, slot)) for slot in range(len(m.slots))] for record in (training_graph, loss_graph))
    sampler = Sampler(m, prepare)
    report.compiling([kernel for graph in (*step_graphs, *val_graphs, *sampler.graphs) for kernel in graph.kernels])

    stop.can_wait = True  # from here on, as workers that start or end are not to be interrupted
    with scheduler, dashboard.serve(bare) if dashboard else nullcontext():
        report.begin(graph_config, scheduler.describe(), data.description, m, step_graphs[0], flags.steps)
        if dashboard:
            report.tell("dashboard", dashboard.url)
        report.notes(disturbance.found(machine.usable_cores()).notes())
        with report.progress(flags.steps):
            seconds, loss = run_steps(flags, scheduler, m, data, step_graphs, val_graphs, sampler, report, stop)
        failures = [why] if (why := divergence(loss, len(seconds), m)) else []
        if flags.save is not None and not failures:
            failures += save_model(flags, m, len(seconds), report, stop)
        memory = memory_in_use(m)
    stop.can_wait = False

    found = disturbance.found(machine.usable_cores())
    setup = flags, graph_config, scheduler_config, scheduler.workers, data.description, report
    summary = summarize(*setup, m, step_graphs[0], seconds, memory, found)
    report.summary(summary, is_wanted=bool(seconds))
    report.notes(dataclasses.replace(found, variables={}).notes())  # of those it was told before
    command = shlex.join(["taskgpt", "train", *flags.argv])
    if flags.report is not None:
        failures += write_page(flags, live, summary, command, report)
    if flags.trace is not None and (seconds or not has_trace(flags.trace)):  # after what a full disk cannot take away
        about = {"command": command, "machine": machine.describe()}
        about["limits"] = machine.limits(scheduler.workers)
        report.tell("trace", str(save(scheduler.trace(about), flags.trace)))
    elif flags.trace is not None:
        report.tell("trace", f"no step ran; {flags.trace} stays as it was")
    if failures:
        raise UserError("; ".join(failures))
    return stop.exit_code or (2 if report.has_lost_log or report.has_lost_output else 0)


def divergence(loss: float, steps: int, m: GPT2) -> str:
    """Return why the model is of no use, "" if it is: the last loss is of the parameters before the last update."""
    found = f"loss is {loss}" if not math.isfinite(loss) else "parameters are not finite" if not checkpoints.is_finite(m.parameters) else ""
    return found and f"after {steps} steps the {found}, and nothing was saved; try a smaller --lr, or another --init"


def save_model(flags: argparse.Namespace, m: GPT2, steps: int, report: Console, stop: StopRequest) -> list[str]:
    """Save what was trained; return why not. The run goes on to its summary and its trace, which a full disk cannot take away."""
    if not steps and stop.is_requested:
        report.say(f"nothing was saved, as no step ran; {_left(flags.save)}")
        return []
    stop.consequence = f"{shorten(flags.save)} is what it was, or the new model, whole"
    try:
        checkpoints.save(flags.save, m.model, m.parameters)
    except UserError as error:
        stop.consequence = "nothing was saved"
        return [str(error)]
    report.say(f"saved {flags.save}")
    stop.consequence = f"{shorten(flags.save)} was saved"
    return []


def write_page(flags: argparse.Namespace, live: Live, summary: dict[str, Any], command: str, report: Console) -> list[str]:
    """Write the page of a run that did a step; return why not."""
    if not summary["steps"]:
        report.tell("report", f"no step ran; {_left(flags.report)}")
        return []
    try:
        run_page.write(flags.report, live, summary, command)
    except UserError as error:
        return [str(error)]
    report.tell("report", shorten(flags.report))
    return []


def run_steps(
    flags: argparse.Namespace,
    scheduler: Scheduler,
    m: GPT2,
    data: Data,
    step_graphs: Sequence[Graph],
    val_graphs: Sequence[Graph],
    sampler: Sampler,
    report: Console,
    stop: StopRequest,
) -> tuple[list[float], float]:
    """Validate, sample and train, step by step, as llm.c's main does; return the seconds of each step and the last loss.

    Ends early if a stop is requested, or if a loss is not finite: then a step that has begun is finished, and the model is of no more use.
    The graphs are one for each slot of the model's inputs: while a step runs, the next batch goes into the other slot, and that step may
    begin.
    Steps do not overlap with validation and samples.
    """

    def validation() -> Iterator[Graph]:
        for n in range(flags.val_batches):
            if stop.is_requested:
                return
            data.val.next_batch(*m.inputs(n % 2))
            yield val_graphs[n % 2]

    def training(first: int, last: int) -> Iterator[Graph]:
        for step in range(first, last):
            if stop.is_requested:
                return
            data.train.next_batch(*m.inputs(step % 2))
            m.set_hyper(step, learning_rate(step), flags.weight_decay, slot=step % 2)
            yield step_graphs[step % 2]

    def is_due(every: int) -> bool:
        return every != 0 and (step % every == 0 or step == flags.steps)

    learning_rate = LearningRate(flags.lr, flags.steps, flags.lr_schedule, flags.warmup, flags.final_lr)
    seconds: list[float] = []
    loss, step = 0.0, 0
    while flags.steps:
        if is_due(flags.val_every):
            data.val.reset()
            with closing(scheduler.run_each(validation())) as batches:
                losses = [m.loss_of(n % 2) for n, _ in enumerate(batches)]
            if len(losses) == flags.val_batches:
                loss = statistics.fmean(losses)
                report.validation(step, loss)
        if step and is_due(flags.sample_every) and not stop.is_requested:
            ids = sampler.sample(scheduler.run, data.tokenizer.end_of_text)
            report.sample(step, ids, data.tokenizer.decode(ids), data.tokenizer.printable(ids))
        if step == flags.steps or stop.is_requested or not math.isfinite(loss):
            break
        most = RECORD // len(step_graphs[0].tasks) or 1 if isinstance(scheduler, Traced) else flags.steps  # steps that can be recorded
        pause = min([flags.steps, step + most, *(every * (step // every + 1) for every in (flags.val_every, flags.sample_every) if every)])
        pace = Pace(time.perf_counter())
        with closing(scheduler.run_each(training(step, pause))) as steps:
            for _ in steps:
                seconds.append(pace.step(time.perf_counter(), scheduler.ahead()))
                loss = m.loss_of(step % 2)
                report.step(step, loss, learning_rate(step), seconds[-1])
                step += 1
                if not math.isfinite(loss):
                    return seconds, loss
    return seconds, loss


def is_watched(flags: argparse.Namespace) -> bool:
    """Return True if somebody wants to know which task ran when."""
    return any(flag is not None for flag in (flags.trace, flags.dashboard, flags.report))


def configure(flags: argparse.Namespace) -> tuple[GraphConfig, SchedulerConfig]:
    """Return both configurations: files, then tiles that tuning found, then what names, --tiles, --set and the other flags change."""
    is_auto, sizes = AUTO in flags.tiles, [word for word in flags.tiles if word != AUTO]
    of_graph, of_scheduler = overridden(flags.graph, flags.scheduler, sizes, flags.set, flags.workers)
    (graph_name, graph_overrides), (scheduler_name, scheduler_overrides) = of_graph, of_scheduler
    for key, value in (("batch.batch_size", flags.batch_size), ("batch.seq_len", flags.seq_len)):
        if value is not None:
            graph_overrides[key] = value
    if is_watched(flags):
        scheduler_overrides["record"] = RECORD
    model = checkpoints.read_shape(flags.init) if flags.init is not None else None
    graph = load_graph(graph_name, graph_overrides, model)
    scheduler = load_scheduler(scheduler_name, scheduler_overrides)
    if is_auto:
        workers = scheduler.settings.workers or machine.usable_cores()
        tiles = tuned.remembered(graph, workers, tuned.tune_command(graph_name, graph, flags.workers))
        found = {f"tiles.{key}": size for key, size in dataclasses.asdict(tiles).items()}
        graph = load_graph(graph_name, found | graph_overrides, model)
    return graph, scheduler


def verify_memory(config: GraphConfig) -> None:
    """Raise UserError if the machine has not enough memory for the model: better than being killed in the first step."""
    needed, free = GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options), machine.free_memory_bytes()
    if needed > free:
        raise UserError(
            f"{config.name}: training needs {needed / 2**30:.1f} GiB for parameters, gradients, moments and activations, this machine has "
            f"{free / 2**30:.1f} GiB free; choose a smaller graph, --batch-size or --seq-len"
        )


def memory_in_use(m: GPT2) -> int:
    """Return bytes: the peak of this process; with worker processes, what each holds for itself at the end, and the shared tensors once."""
    children = psutil.Process().children(recursive=True)
    if not children:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return m.nbytes + sum(process.memory_full_info().uss for process in (psutil.Process(), *children))


def summarize(flags, graph_config, scheduler_config, workers, description, report, m, graph, seconds, memory, found) -> dict[str, Any]:
    """Return what is worth knowing about a run; times leave out the first step, which touches all memory for the first time."""
    steady = seconds[1:] or seconds
    summary: dict[str, Any] = {"steps": len(seconds), "parameters_sha256": m.parameters_sha256()}
    summary |= {"train_loss": told(report.losses), "val_loss": told(report.validations)}
    if seconds:
        median = statistics.median(steady)
        speed = graph.flops / median / 1e9
        sgemm = machine.sgemm_gflops(workers)
        for _ in range(SGEMM_TRIES - 1):
            if speed > sgemm:  # the machine was busier now than while it trained
                sgemm = max(sgemm, machine.sgemm_gflops(workers))
        summary |= {
            "first_step_ms": seconds[0] * 1e3,
            "mean_ms": statistics.fmean(steady) * 1e3,
            "median_ms": median * 1e3,
            "min_ms": min(steady) * 1e3,
            "tokens_per_s": m.batch.rows / median,
            "gflops": speed,
            "sgemm_gflops": sgemm,
            "share_of_sgemm": speed / sgemm,
        }
    return summary | {
        "peak_memory_bytes": memory,
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
        "disturbance": dataclasses.asdict(found),
    }


def _left(path: str) -> str:
    """Return what became of a file that is not written."""
    return f"{shorten(path)} stays as it was" if os.path.exists(path) else f"{shorten(path)} was not written"


if __name__ == "__main__":
    sys.exit(main())
