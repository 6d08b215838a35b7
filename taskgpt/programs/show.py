"""Show the graph of a training step, without running it.

taskgpt show graph --graph tiny                                   # as text, a task a line, <- what it waits for
taskgpt show graph --graph tiny --format svg --output tiny.svg    # as a picture; a browser shows each task's call
taskgpt show graph --graph gpt2-124m --by section --colour phase --format svg --output layers.svg   # a task a layer
taskgpt show graph --graph gpt2-124m --format html --output graph.html                             # to zoom and to click
taskgpt show graph --graph gpt2-124m --layer 0 --colour path --format svg --output layer.svg       # a layer, its longest path
taskgpt show graph --graph gpt2-124m --coarsen 400 --format json                                   # or dot, or graphml
taskgpt show graph --graph gpt2-124m --format dask --output dask.html          # as Dask sees it: its layers, to unfold
"""

import argparse
import sys
from collections.abc import Sequence

from taskgpt.errors import UserError, did_you_mean, run_program
from taskgpt.files import write_whole
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import MicroBatch
from taskgpt.lab.graph_formats import to_dask_html, to_dot, to_graphml, to_html, to_json
from taskgpt.lab.named import graph_words, make_config
from taskgpt.programs.arguments import Parser, add_changes, add_graph
from taskgpt.tasks import Graph, by_section, coarsen, part
from taskgpt.tasks.picture import to_svg

FORMATS = ("text", "svg", "html", "dot", "graphml", "json", "dask")
COLOURS = ("kernel", "layer", "phase", "path")  # path: the longest, by estimated times


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt show", __doc__)
    verbs = p.add_subparsers(required=True, metavar="VERB")
    graph = verbs.add_parser("graph", help="show a graph", doc=__doc__)
    add_graph(graph, "tiny")
    add_changes(graph, has_scheduler=False)
    graph.add_argument(
        "--by", choices=("task", "section"), default="task", help="section: one task for each phase and layer (default task)"
    )
    graph.add_argument("--layer", type=int, metavar="L", help="only the tasks of this layer of the model, from 0")
    graph.add_argument("--phase", metavar="NAME", help="only the tasks of this phase: forward, backward, ...")
    graph.add_argument("--coarsen", type=int, metavar="N", help="merge tasks until there are at most N")
    graph.add_argument("--format", choices=FORMATS, default="text", help=f"{', '.join(FORMATS)} (default text)")
    graph.add_argument("--colour", choices=COLOURS, default="kernel", help="what colours tell, in svg and html")
    graph.add_argument("--output", metavar="FILE", help="default: standard output")
    return run_program("taskgpt show", lambda: show_graph(p.parse_args(argv)))


def show_graph(flags: argparse.Namespace) -> int:
    """Write the graph in the format asked for. Raises UserError."""
    (word,) = graph_words([flags.graph], flags.tiles, flags.set)
    config = make_config(word)
    micro = MicroBatch(is_first=config.batch.accumulate == 1)  # the last of a step
    graph = training_graph(GPT2(config.model, config.batch, config.tiles, config.options), micro=micro)
    if flags.layer is not None or flags.phase is not None:
        graph = chosen(graph, flags)
    if flags.coarsen is not None and flags.coarsen < 1:
        raise UserError(f"--coarsen: wanted at least 1 task, got {flags.coarsen}")
    if flags.coarsen is not None:
        graph = coarsen(graph, flags.coarsen)
    if flags.by == "section":
        graph = by_section(graph)
    parts = [f"layer {flags.layer}"] * (flags.layer is not None) + [flags.phase] * (flags.phase is not None)
    what = "one training step" if micro.is_first else f"the last of {config.batch.accumulate} micro-batches of a training step"
    title = ", ".join([f"{what} of {config.name}", *parts])
    writers = {
        "text": graph.listing,
        "svg": lambda: to_svg(graph, title, flags.colour),
        "html": lambda: to_html(graph, title, flags.colour),
        "dot": lambda: to_dot(graph),
        "graphml": lambda: to_graphml(graph),
        "json": lambda: to_json(graph),
        "dask": lambda: to_dask_html(graph, title),
    }
    text = writers[flags.format]()
    if flags.output is None:
        sys.stdout.write(text)
    else:
        write_whole(flags.output, text)
    return 0


def chosen(graph: Graph, flags: argparse.Namespace) -> Graph:
    """Return the tasks of one phase, or layer, or both. Raises UserError if there are none."""
    sections = dict.fromkeys(task.section for task in graph.tasks)
    if flags.phase is not None and flags.phase not in (phases := dict.fromkeys(phase for phase, _ in sections if phase)):
        raise UserError(f"--phase: unknown phase '{flags.phase}'{did_you_mean(flags.phase, phases)}")
    found = part(graph, lambda task: flags.phase in (None, task.section[0]) and flags.layer in (None, task.section[1]))
    if not found.tasks:
        raise UserError(
            f"--layer {flags.layer}: wanted a layer from 0 to {max(layer for _, layer in sections)} with such tasks; choose another"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
