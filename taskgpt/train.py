"""Train GPT-2 as a graph of tasks.

    taskgpt train                                        # GPT-2 124M from scratch on tinyshakespeare, 40 steps
    taskgpt train --graph tiny --steps 100               # a toy, seconds on any machine
    taskgpt train --scheduler loops --workers 2          # the same bits, run as fork-join loops
    taskgpt train --init gpt2_124M.bin --data my.txt --lr 1e-5 --save tuned.bin       # fine-tune an llm.c checkpoint
    taskgpt train --out runs/a --save-every 10m         # checkpoints on the way, with all that is needed to go on
    taskgpt train --resume runs/a                       # go on from the newest one, to the same bits
    taskgpt train --total-batch 4096 --clip-norm 1 --warmup 100 --lr 6e-4             # 16 micro-batches a step, gradients clipped
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
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

from taskgpt.config import CLUSTER, GraphConfig, SchedulerConfig, load_graph, load_scheduler
from taskgpt.errors import SAVE_SIGNALS, UserError, on_signals, run_program, shorten
from taskgpt.files import verify_can_write
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.learning_rate import FALLS
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph
from taskgpt.gpt2.sampling import Sampler
from taskgpt.gpt2.shape import Batch
from taskgpt.gpt2.steps import Steps
from taskgpt.gpt2.text.data import open_data
from taskgpt.lab import machine, run_page
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.disturbance import Disturbance
from taskgpt.lab.named import overridden
from taskgpt.lab.traces.formats import has_trace, save, verify_can_save
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.lab.tuning import tuned
from taskgpt.products import verify_callers
from taskgpt.programs.arguments import (
    AUTO,
    MODEL_HELP,
    Parser,
    add_changes,
    add_graph,
    add_scheduler,
    add_share,
    add_workers,
    count,
    part,
    positive,
    rate,
)
from taskgpt.runs.console import Console, StopRequest
from taskgpt.runs.saving import Every
from taskgpt.runs.start import LATEST, Start, as_argv, opened
from taskgpt.runs.summary import memory_in_use, summarize
from taskgpt.runs.training import Training
from taskgpt.schedulers import WorkerError, open_scheduler
from taskgpt.tasks import AccessError, TaskError, TwinError, check

GRAPH = "gpt2-124m"  # where none is named
GRAPH_FLAGS = ("batch.batch_size", "batch.seq_len", "options.clip_norm", "options.skip_loss_z", "options.skip_norm_z", "options.on_nan")


def parser() -> argparse.ArgumentParser:
    """Return the flags; their defaults are llm.c's."""
    p = Parser("taskgpt train", __doc__)
    what = p.add_argument_group("what runs")
    add_graph(what, GRAPH)
    add_changes(what, has_auto=True)
    what.add_argument("--init", metavar="MODEL", help=f"start from a model, which gives the shape too: {MODEL_HELP}")
    what.add_argument(
        "--resume",
        nargs="?",
        const=LATEST,
        metavar="DIR",
        help="go on with a run, from its newest checkpoint or from the one named; `latest`: with the run in --out, if there is one",
    )
    what.add_argument(
        "--data",
        default="tinyshakespeare",
        help="tinyshakespeare, tinystories, a text file, a folder or glob of token files, or a mixture: tinyshakespeare=0.3,my.txt=0.7",
    )
    what.add_argument("--steps", type=count, default=40, help="optimizer steps (default 40)")
    what.add_argument("--batch-size", type=positive, metavar="B", help="sequences a step (default: the graph file's)")
    what.add_argument("--seq-len", type=positive, metavar="T", help="tokens in a sequence (default: the graph file's)")
    what.add_argument("--lr", type=rate, default=1e-4, help="AdamW's learning rate, at its highest (default 1e-4)")
    what.add_argument("--lr-schedule", choices=FALLS, default="constant", help="how the learning rate goes on (default constant)")
    what.add_argument("--warmup", type=count, default=0, metavar="N", help="steps in which the learning rate rises (default 0)")
    what.add_argument("--final-lr", type=part, default=0.0, metavar="PART", help="of --lr, at the end of the schedule (default 0)")
    what.add_argument("--weight-decay", type=rate, default=0.0, help="AdamW's weight decay (default 0, as in llm.c)")
    what.add_argument(
        "--total-batch", type=positive, metavar="TOKENS", help="tokens a step: gradients of so many B * T are added up (default: B * T)"
    )
    what.add_argument("--clip-norm", type=rate, metavar="NORM", help="scale the gradient to this norm at most (default: the graph file's)")
    what.add_argument("--skip-loss-z", type=rate, metavar="Z", help="skip the update after a loss so many deviations above the last 128")
    what.add_argument("--skip-norm-z", type=rate, metavar="Z", help="the same of the gradient's norm")
    what.add_argument("--on-nan", choices=("stop", "skip"), help="after a loss that is no number: end, or skip the update (default stop)")
    what.add_argument("--max-tokens", type=positive, metavar="N", help="end when so many tokens were trained on, with a checkpoint")
    what.add_argument("--max-minutes", type=rate, metavar="M", help="end after so many minutes, with a checkpoint")
    what.add_argument("--seed", type=count, default=42, help="of the initial parameters (default 42)")
    how = p.add_argument_group("how it runs")
    add_scheduler(how, "native")
    add_workers(how, "default: the scheduler file's")
    add_share(how)
    how.add_argument("--check", action="store_true", help="run every task on guarded copies and report undeclared accesses (slow)")
    out = p.add_argument_group("what comes out")
    out.add_argument("--val-every", type=count, default=10, metavar="N", help="validation loss every N steps, 0 = never (default 10)")
    out.add_argument("--val-batches", type=positive, default=5, metavar="N", help="batches of a validation (default 5)")
    out.add_argument("--sample-every", type=count, default=20, metavar="N", help="a sample every N steps, 0 = never (default 20)")
    out.add_argument("--out", metavar="DIR", help="the run's folder: its checkpoints and its log, a run each")
    out.add_argument(
        "--save-every",
        metavar="N|TIME",
        help="a checkpoint every N steps, or every 10m say, made while training goes on (default: at the end)",
    )
    out.add_argument("--keep", type=positive, default=2, metavar="N", help="checkpoints kept: the last N, and the best (default 2)")
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
    out.add_argument("--csv", metavar="FILE.csv", help="write losses, norms, learning rates and times as a table, a row a step")
    out.add_argument(
        "--tensorboard",
        nargs="?",
        const="",
        metavar="DIR",
        help="write TensorBoard's event files (default: in `tensorboard` of --out; needs taskgpt[tensorboard])",
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: as errors.py says, 2 also for a diverged loss.

    A run that a signal ended after a step, with checkpoint and summary, has the exit code of the signal too.
    """

    def run() -> int:
        command = list(sys.argv[1:] if argv is None else argv)
        join_mpi(command)
        with Console() as report, opened(parser, command, report.say) as start:
            stop = StopRequest(report)
            with on_signals(stop.request), on_signals(stop.request_save, SAVE_SIGNALS if start.folder else ()):
                return train(start, command, report, stop)

    return run_program("taskgpt train", run, (TaskError, TwinError, AccessError, WorkerError))


def join_mpi(command: Sequence[str]) -> None:
    """Have each process under mpiexec be what it is of the cluster that the command starts, before it opens a folder, which is the run's.

    Returns in one of them, the program, and where MPI starts nothing. Raises UserError.
    """
    flags = parser().parse_args(command)
    sizes = [word for word in flags.tiles if word != AUTO]
    _, of_scheduler = overridden(flags.graph or GRAPH, flags.scheduler, sizes, flags.set, flags.workers)
    config = load_scheduler(*of_scheduler, may_be_cluster=True)
    if config.scheduler == CLUSTER and config.settings.start == "mpi":
        from taskgpt.cluster import opening, starting  # here, as they import Dask's cluster

        starting.join_mpi(config.settings, opening.security_of(config.settings))


class _Callable(ModuleType):
    """This module, which is a function, too: `taskgpt.train(graph="tiny", steps=100, client=client)`."""

    def __call__(self, *words: str, client: Any = None, **flags: Any) -> dict[str, Any]:
        """Train as the command `taskgpt train` does with these words and flags, `batch_size=2` for --batch-size 2; return the summary.

        A flag that takes several words is given a list, one without a word True. `client`: a dask.distributed.Client; the run is then on
        its cluster. Raises UserError for what the command would refuse, TaskError, WorkerError.
        """
        argv = list(words)
        for name, value in flags.items():
            given = value if isinstance(value, list | tuple) else [] if value is True else [value]
            argv += [f"--{name.replace('_', '-')}", *map(str, given)] if value is not None and value is not False else []
        if client is not None and "scheduler" not in flags:
            argv += ["--scheduler", CLUSTER]

        def silent_parser() -> argparse.ArgumentParser:
            p = parser()
            p.error = _refuse  # type: ignore[method-assign]
            return p

        with Console() as report, opened(silent_parser, argv, report.say) as start:
            code = train(start, argv, report, StopRequest(report), client)
            return report.told | {"exit_code": code}


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def train(start: Start, argv: Sequence[str], report: Console, stop: StopRequest, client: Any = None) -> int:
    """Train as a command says; return the exit code. Raises what `main` answers."""
    flags = start.flags
    if flags.save is not None and flags.steps == 0 and os.path.exists(flags.save):
        raise UserError(f"--save {shorten(flags.save)}: is there already, and --steps 0 trains nothing; name another file")
    every = Every.of("--save-every", flags.save_every)
    disturbance = Disturbance()
    graph_config, scheduler_config = configure(start)
    if scheduler_config.scheduler == CLUSTER:
        from taskgpt.cluster.training import ClusterTraining  # here, as it imports Dask's cluster

        command = shlex.join(["taskgpt", "train", *argv])
        return ClusterTraining(start, command, parser().parse_args([]), (graph_config, scheduler_config), report, stop).run(client)
    model, batch = graph_config.model, graph_config.batch
    needed = GPT2.bytes_needed(model, batch, graph_config.tiles, graph_config.options)
    held, do = "parameters, gradients, moments and activations", "choose a smaller graph, --batch-size or --seq-len"
    machine.verify_memory(graph_config.name, "training", needed, held, do)
    data = open_data(flags.data, batch.batch_size, batch.seq_len, model.vocabulary, report.say)
    changes = start.verify(graph_config, data.fingerprint) if start.about else []
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
    if start.checkpoint is not None:
        resumable.load_state(start.checkpoint, m.state)
    elif flags.init is not None:
        checkpoints.load(flags.init, model, m.parameters)
    else:
        m.initialize(flags.seed)
    report.open_logs(start.logs())

    crowd = verify_callers(m.products, scheduler.workers)
    prepare = check if flags.check else lambda graph: graph
    steps, val_graphs = Steps(m, prepare), [prepare(loss_graph(m, slot)) for slot in range(len(m.slots))]
    sampler = Sampler(m, prepare)
    training = Training(flags, scheduler, m, data, steps, val_graphs, sampler, report, stop)
    if start.about:
        training.resume(start.about, start.best_val_loss)
    if start.folder:
        argv_kept = as_argv(flags, parser().parse_args([]))
        training.saver = start.saver(m, every, argv_kept, graph_config, data.fingerprint, report, stop)
        training.run_name = training.saver.run
    saver = training.saver
    graphs = [*val_graphs, *sampler.graphs, *([saver.graph] if saver and saver.graph else [])]
    report.compiling([*steps.kernels, *(kernel for graph in graphs for kernel in graph.kernels)])

    stop.can_wait = True  # from here on, as workers that start or end are not to be interrupted
    with scheduler, dashboard.serve(bare) if dashboard else nullcontext(), saver or nullcontext():
        report.begin(graph_config, scheduler.describe(), data.description, m, steps, training.last_step)
        if start.checkpoint:
            report.tell("resumed", f"from {shorten(start.checkpoint)}, after {start.about.step:,} steps")
        if dashboard:
            report.tell("dashboard", dashboard.url)
        report.notes([*changes, *crowd, *disturbance.found(machine.usable_cores()).notes()])
        if flags.max_minutes is not None:
            stop.end_after(60 * flags.max_minutes)
        with report.progress(training.last_step):
            training.run()
        seconds = training.seconds
        failures = [why] if (why := divergence(training, m)) else []
        if saver and not failures:
            failures += training.save_last()
        if flags.save is not None and not failures:
            failures += save_model(flags, m, len(seconds), report, stop)
        memory = memory_in_use(m)
    stop.can_wait = False

    found = disturbance.found(machine.usable_cores())
    setup = flags, graph_config, scheduler_config, scheduler.workers, data.description, report
    summary = summarize(*setup, m, steps, seconds, memory, found)
    report.summary(summary, is_wanted=bool(seconds))
    report.notes(dataclasses.replace(found, variables={}).notes())  # of those it was told before
    command = shlex.join(["taskgpt", "train", *argv])
    if flags.report is not None:
        failures += write_page(flags, live, summary, command, report)
    if flags.trace is not None and (seconds or not has_trace(flags.trace)):  # after what a full disk cannot take away
        about = {"command": command, "machine": machine.describe()}
        about["limits"] = machine.limits(scheduler.workers)
        report.tell("trace", str(save(scheduler.trace(about), flags.trace)))
    elif flags.trace is not None:
        report.tell("trace", f"no step ran; {flags.trace} stays as it was")
    if saver and saver.newest and training.step < flags.steps:
        report.tell("go on with", f"taskgpt train --resume {shlex.quote(str(start.folder.path))}")
    if failures:
        raise UserError("; ".join(failures))
    return stop.exit_code or (2 if report.has_lost_log or report.has_lost_output else 0)


def divergence(training: Training, m: GPT2) -> str:
    """Return why the model is of no use, "" if it is: the last loss is of the parameters before the last update."""
    loss, norm = training.loss, training.norm
    found = "" if checkpoints.is_finite(m.parameters) else "parameters are not finite"
    if training.has_diverged:
        found = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
    return found and f"after {training.step} steps the {found}, and nothing was saved; try a smaller --lr, or another --init"


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


def is_watched(flags: argparse.Namespace) -> bool:
    """Return True if somebody wants to know which task ran when."""
    return any(flag is not None for flag in (flags.trace, flags.dashboard, flags.report))


def configure(start: Start) -> tuple[GraphConfig, SchedulerConfig]:
    """Return both configurations: files, then tiles that tuning found, then what names, --tiles, --set and the other flags change.

    The graph of a run that goes on is the one that it began with, with the changes of this command alone.
    """
    flags, of_graph = start.flags, start.own if start.about else start.flags
    is_auto, sizes = AUTO in of_graph.tiles, [word for word in of_graph.tiles if word != AUTO]
    settings = [word for word in flags.set if start.about is None or word in start.own.set or "." not in word.partition("=")[0]]
    (graph_name, graph_overrides), (scheduler_name, scheduler_overrides) = overridden(
        of_graph.graph or GRAPH, flags.scheduler, sizes, settings, flags.workers
    )
    for key in GRAPH_FLAGS:
        if (value := getattr(of_graph, key.partition(".")[2])) is not None:
            graph_overrides[key] = value
    if is_watched(flags):
        scheduler_overrides["record"] = RECORD
    scheduler = load_scheduler(scheduler_name, scheduler_overrides, may_be_cluster=True)
    if start.about:
        load = partial(start.graph, graph_name if of_graph.graph else None)
    else:
        load = partial(load_graph, graph_name, model=checkpoints.read_shape(flags.init) if flags.init is not None else None)
    graph = load(graph_overrides)
    if of_graph.total_batch is not None:
        graph_overrides["batch.accumulate"] = micro_batches(of_graph.total_batch, graph.batch)
        graph = load(graph_overrides)
    if is_auto:
        workers = scheduler.settings.workers or machine.usable_cores()
        tiles = tuned.remembered(graph, workers, tuned.tune_command(graph_name, graph, flags.workers))
        found = {f"tiles.{key}": size for key, size in dataclasses.asdict(tiles).items()}
        graph = load(found | graph_overrides)
    return graph, scheduler


def micro_batches(tokens: int, batch: Batch) -> int:
    """Return how many micro-batches have so many tokens. Raises UserError if no whole number has."""
    if tokens % batch.rows:
        B, T, rows = batch.batch_size, batch.seq_len, batch.rows
        near = max(1, round(tokens / rows)) * rows
        raise UserError(f"--total-batch {tokens}: wanted a multiple of B * T = {B} * {T} = {rows} tokens, for example {near}")
    return tokens // batch.rows


def _left(path: str) -> str:
    """Return what became of a file that is not written."""
    return f"{shorten(path)} stays as it was" if os.path.exists(path) else f"{shorten(path)} was not written"


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
