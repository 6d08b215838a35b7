"""Print shape, parameters and training memory of graph files.

taskgpt sizes                                    # of all that are shipped
taskgpt sizes --set model.layers=6 --set model.channels=384 gpt2-124m
"""

import argparse
import sys
from collections.abc import Sequence

from taskgpt.config import available, load_graph, parse_graph_settings
from taskgpt.errors import run_program
from taskgpt.gpt2.model import GPT2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    title, _, examples = (__doc__ or "").partition("\n\n")  # none under python -OO
    p = argparse.ArgumentParser("taskgpt sizes", description=title, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("graphs", nargs="*", metavar="NAME", help="graph files (default: all)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key, for example model.layers=6")
    flags = p.parse_args(argv)
    return run_program("taskgpt sizes", lambda: print_sizes(flags))


def print_sizes(flags: argparse.Namespace) -> int:
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
