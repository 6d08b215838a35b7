"""The command `taskgpt`: one verb per program.

taskgpt train --graph tiny                   # = python -m taskgpt.train
taskgpt data prepare tinyshakespeare         # = python -m taskgpt.data
taskgpt bench step --graphs tiny             # = python -m taskgpt.bench
taskgpt trace check runs/native              # = python -m taskgpt.trace
taskgpt show graph --graph tiny              # = python -m taskgpt.show
taskgpt compare --graph tiny --workers 1,2   # = python -m taskgpt.compare
taskgpt simulate --graph tiny --workers 112  # = python -m taskgpt.simulate
taskgpt tune --graph gpt2-124m               # = python -m taskgpt.tune
taskgpt sizes                                # models, parameters, memory
taskgpt sizes --set model.layers=6 --set model.channels=384 gpt2-124m
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from taskgpt.errors import begin_program, did_you_mean, run_program, shorten

PROGRAMS = ("train", "data", "bench", "trace", "show", "compare", "simulate", "tune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code."""
    if argv is None and __name__ != "__main__":  # the installed command; `python -m taskgpt` has begun
        begin_program()
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in PROGRAMS:
        return importlib.import_module(f"taskgpt.{verb}").main(rest)
    if verb == "sizes":
        return sizes(rest)
    if verb in ("-h", "--help"):
        return run_program("taskgpt", print_help)
    print(f"taskgpt: error: unknown verb '{shorten(verb)}'{did_you_mean(verb, [*PROGRAMS, 'sizes'])}", file=sys.stderr)
    return 2


def print_help() -> int:
    print(__doc__ or f"verbs: {', '.join(PROGRAMS)}, sizes")  # none under python -OO
    return 0


def sizes(argv: Sequence[str]) -> int:
    """Print shape, parameters and training memory of graph files."""
    p = argparse.ArgumentParser("taskgpt sizes", description="Print shape, parameters and training memory of graph files.")
    p.add_argument("graphs", nargs="*", metavar="NAME", help="graph files (default: all)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, for example model.layers=6")
    flags = p.parse_args(argv)
    return run_program("taskgpt sizes", lambda: print_sizes(flags))


def print_sizes(flags: argparse.Namespace) -> int:
    from taskgpt.config import available, load_graph, parse_graph_settings
    from taskgpt.gpt2.model import GPT2

    overrides = parse_graph_settings(flags.set)
    configs = [load_graph(name, overrides) for name in flags.graphs or available("graphs")]
    print(f"{'graph':16} {'L':>3} {'NH':>3} {'C':>5} {'V':>6} {'parameters':>14} {'B':>4} {'T':>5} {'memory':>10}")
    for config in sorted(configs, key=lambda config: config.model.parameter_count()):
        model, batch = config.model, config.batch
        gib = GPT2.bytes_needed(model, batch, config.tiles, config.options) / 2**30
        print(
            f"{config.name:16} {model.layers:3} {model.heads:3} {model.channels:5} {model.vocabulary:6} {model.parameter_count():14,} "
            f"{batch.batch_size:4} {batch.seq_len:5} {gib:6.2f} GiB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
