"""Get training data ready.

    taskgpt data prepare tinyshakespeare                    # download 1.1 MB, write 0.7 MB of tokens into the cache
    taskgpt data prepare tinyshakespeare --from input.txt   # the same on a machine without network
    taskgpt data prepare tinystories --folder /scratch/me   # download 1.6 GB, write 1.9 GB of tokens
    taskgpt data list                                       # what is prepared, and where

Training opens data by one word: a name above, a text file, or a folder or pattern of llm.c's token files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from taskgpt.errors import UserError, run_program
from taskgpt.gpt2.text.datasets import DATASETS, prepare
from taskgpt.gpt2.text.tokens import TokenFile
from taskgpt.lab import layout
from taskgpt.programs.arguments import Parser, add_wide


def list_datasets(width: int | None) -> str:
    """Return what is in the cache, a row for each dataset."""
    rows = []
    for dataset in DATASETS.values():
        state = f"not prepared; a download of {dataset.num_bytes / 1e6:,.1f} MB"
        try:
            place = folder = dataset.folder
            if dataset.is_in(folder):
                train, val = (len(TokenFile(folder / file)) for file in (dataset.train, dataset.val))
                state = f"{train:,} train and {val:,} val tokens"
            elif (part := dataset.part(folder)).is_file():
                state += f", of which {part.stat().st_size / 1e6:,.1f} MB are here"
        except UserError as error:
            place = error
        rows.append([dataset.name, state, str(place)])
    return layout.to_text({"caption": "", "head": ["dataset", "state", "folder"], "rows": rows}, width)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    parser = Parser("taskgpt data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    what = "download a dataset and write its token files"
    prepare_parser = commands.add_parser("prepare", help=what, doc=f"{what}\n\n{parser.examples('prepare')}")
    prepare_parser.add_argument("name", metavar="NAME", help=" or ".join(DATASETS))
    prepare_parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write the token files (default: the cache)")
    prepare_parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="take this downloaded file, no network")
    what = "show what is prepared, and where"
    add_wide(commands.add_parser("list", help=what, doc=f"{what}\n\n{parser.examples('list')}"))

    def run() -> int:
        chosen = parser.parse_args(arguments)
        try:
            if chosen.command == "list":
                print(list_datasets(layout.terminal_width(chosen)))
            else:
                prepare(chosen.name, chosen.folder, chosen.source)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; what is downloaded stays, the same command goes on from there") from None
        return 0

    return run_program("taskgpt data", run)


if __name__ == "__main__":
    sys.exit(main())
