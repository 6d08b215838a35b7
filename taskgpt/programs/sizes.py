"""Print shape, parameters and training memory of graph files.

taskgpt sizes                                    # of all that are shipped
taskgpt sizes gpt2-124m --set model.layers=6,12 model.channels=384
"""

import argparse
import sys
from collections.abc import Sequence

from taskgpt.config import available
from taskgpt.errors import run_program
from taskgpt.gpt2.model import GPT2
from taskgpt.lab import layout
from taskgpt.lab.named import graph_words, listed, make_config
from taskgpt.lab.report import table_of
from taskgpt.programs.arguments import Parser, add_changes, add_graphs, add_wide

COLUMNS = {
    "graph": ("graph", ""),
    "L": ("layers", "d"),
    "NH": ("heads", "d"),
    "C": ("channels", "d"),
    "V": ("vocabulary", "d"),
    "parameters": ("parameters", ",d"),
    "B": ("batch_size", "d"),
    "T": ("seq_len", "d"),
    "GiB": ("gib", ".2f"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("taskgpt sizes", __doc__)
    p.add_argument("names", nargs="*", metavar="NAME", help="the same as --graph NAME")
    add_graphs(p, available("graphs"))
    add_changes(p, several=True, has_scheduler=False)
    add_wide(p)
    return run_program("taskgpt sizes", lambda: print_sizes(p.parse_args(argv)))


def print_sizes(flags: argparse.Namespace) -> int:
    settings = [word for word in flags.set if "=" in word]
    names = listed(flags.names) + [word for word in flags.set if word not in settings]  # --set KEY=VALUE NAME takes the name, too
    words = graph_words(names or flags.graphs, flags.tiles, settings)
    rows = []
    for word in words:
        config = make_config(word)
        memory = GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options)
        shape = {**vars(config.model), **vars(config.batch)}
        rows.append({**shape, "graph": word, "parameters": config.model.parameter_count(), "gib": memory / 2**30})
    rows.sort(key=lambda row: row["parameters"])
    print(layout.to_text(table_of("", COLUMNS, rows), layout.terminal_width(flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
