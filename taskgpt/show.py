"""Show the graph of a training step, without running it.

python -m taskgpt.show graph --graph tiny                                   # as text, a task a line, <- what it waits for
python -m taskgpt.show graph --graph tiny --format svg --output tiny.svg    # as a picture; a browser shows each task's call
python -m taskgpt.show graph --graph gpt2-124m --coarsen 400 --format svg --output merged.svg
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from taskgpt.config import available, load_graph, parse_graph_settings
from taskgpt.errors import UserError, run_program
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.picture import to_svg
from taskgpt.tasks import coarsen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    title, _, examples = __doc__.partition("\n\n")
    p = argparse.ArgumentParser("taskgpt show", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, metavar="VERB")
    graph = verbs.add_parser("graph", help="show a graph", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=examples)
    names = ", ".join(available("graphs"))
    graph.add_argument("--graph", default="tiny", metavar="NAME", help=f"graph file: {names}, or a path (default tiny)")
    graph.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the graph file")
    graph.add_argument("--coarsen", type=int, metavar="N", help="merge tasks until there are at most N")
    graph.add_argument("--format", choices=("text", "svg"), default="text", help="default text")
    graph.add_argument("--output", metavar="FILE", help="default: standard output")
    flags = p.parse_args(argv)
    return run_program("taskgpt.show", lambda: show_graph(flags))


def show_graph(flags: argparse.Namespace) -> int:
    """Write the graph in the format asked for. Raises UserError or OSError."""
    config = load_graph(flags.graph, parse_graph_settings(flags.set))
    graph = training_graph(GPT2(config.model, config.batch, config.tiles, config.options))
    if flags.coarsen is not None and flags.coarsen < 1:
        raise UserError(f"--coarsen: wanted at least 1 task, got {flags.coarsen}")
    if flags.coarsen is not None:
        graph = coarsen(graph, flags.coarsen)
    text = graph.listing() if flags.format == "text" else to_svg(graph, f"one training step of {config.name}")
    if flags.output is None:
        sys.stdout.write(text)
    else:
        Path(flags.output).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
