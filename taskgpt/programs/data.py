"""Get training data ready.

    taskgpt data prepare tinyshakespeare                    # download 1.1 MB, write 0.7 MB of tokens into the cache
    taskgpt data prepare tinyshakespeare --from input.txt   # the same on a machine without network
    taskgpt data prepare tinystories --folder /scratch/me   # download 1.6 GB, write 1.9 GB of tokens
    taskgpt data prepare books/ more.jsonl --folder tokens  # any texts, of any size, into token files: --data tokens
    taskgpt data list                                       # what is prepared, and where

Training opens data by one word: a name above, a text file, or a folder or pattern of llm.c's token files.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from taskgpt.errors import UserError, did_you_mean, run_program, shorten
from taskgpt.gpt2.text.datasets import DATASETS, prepare
from taskgpt.gpt2.text.documents import ENCODINGS, Reading
from taskgpt.gpt2.text.preparation import SHARD_TOKENS, SUFFIXES, VAL_TOKENS, Settings, prepare_texts
from taskgpt.gpt2.text.tokens import MOST_TOKENS, TokenFile
from taskgpt.lab import layout
from taskgpt.programs.arguments import Parser, add_wide, add_workers, part, positive
from taskgpt.schedulers.cores import usable_cores

OF_TEXTS = ("suffixes", "field", "sections", "encoding", "shard_tokens", "val_tokens", "val_share", "workers")


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
            elif (fetched := dataset.part(folder)).is_file():
                state += f", of which {fetched.stat().st_size / 1e6:,.1f} MB are here"
        except UserError as error:
            place = error
        rows.append([dataset.name, state, str(place)])
    return layout.to_text({"caption": "", "head": ["dataset", "state", "folder"], "rows": rows}, width)


def add_prepare(p: Parser):
    """Add the flags of `prepare`."""
    p.add_argument("sources", metavar="NAME", nargs="+", help=f"{' or '.join(DATASETS)}; or texts, JSONL, Parquet, and folders of them")
    p.add_argument("--folder", type=Path, metavar="DIR", help="where to write the token files (default for a dataset: the cache)")
    p.add_argument("--from", type=Path, metavar="FILE", dest="source", help="take this downloaded file, no network")
    of = p.add_argument_group("of texts, JSONL and Parquet")
    of.add_argument("--suffixes", metavar="A,B", help=f"files of a folder to take (default {','.join(SUFFIXES)})")
    of.add_argument("--field", metavar="KEY", help="of JSONL's objects, or column of Parquet, that holds the text (default text)")
    of.add_argument("--sections", action="store_true", default=None, help="an empty line ends a document of a text; as in tinyshakespeare")
    of.add_argument("--encoding", choices=ENCODINGS, help="bytes: for models whose vocabulary is smaller than GPT-2's (default gpt2)")
    of.add_argument("--shard-tokens", type=positive, metavar="N", help=f"of a token file, at most (default {SHARD_TOKENS:,})")
    val = of.add_mutually_exclusive_group()
    val.add_argument("--val-tokens", type=positive, metavar="N", help="first tokens, which are for validation")
    val.add_argument(
        "--val-share", type=part, metavar="PART", help=f"the same as a part of all (default 0.1, at most {VAL_TOKENS:,} tokens)"
    )
    add_workers(of, "default: all cores")


def run_prepare(flags: argparse.Namespace):
    """Prepare a dataset, or texts. Raises: UserError as both, and for flags that do not go together."""
    [name, *more] = flags.sources
    given = [f"--{flag.replace('_', '-')}" for flag in OF_TEXTS if getattr(flags, flag) is not None]
    if not more and (name in DATASETS or not os.path.lexists(name)):
        if name not in DATASETS:
            raise UserError(f"'{shorten(name)}': no such file or folder, and no such dataset{did_you_mean(name, DATASETS)}")
        if given:
            raise UserError(f"{given[0]}: is for texts, and {name} is prepared as llm.c does; leave it out")
        prepare(name, flags.folder, flags.source)
        return
    if flags.source or not flags.folder:
        flag, advice = ("--from", "leave it out") if flags.source else ("--folder", "say where to write the token files")
        raise UserError(f"{flag}: {'is for datasets, these are texts' if flags.source else 'missing'}; {advice}")
    if flags.shard_tokens and flags.shard_tokens > MOST_TOKENS:
        raise UserError(f"--shard-tokens: wanted at most {MOST_TOKENS:,}, which a token file can hold; got {flags.shard_tokens:,}")
    reading = Reading(flags.encoding or "gpt2", flags.field or "text", bool(flags.sections))
    settings = Settings(reading, flags.shard_tokens or SHARD_TOKENS, flags.val_tokens, flags.val_share)
    suffixes = tuple(filter(None, flags.suffixes.replace(" ", ",").split(","))) if flags.suffixes else SUFFIXES
    prepare_texts(flags.sources, flags.folder, settings, suffixes, flags.workers or usable_cores())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    parser = Parser("taskgpt data", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    what = "write token files of a dataset, which is downloaded, or of texts"
    add_prepare(commands.add_parser("prepare", help=what, doc=f"{what}\n\n{parser.examples('prepare')}"))
    what = "show what is prepared, and where"
    add_wide(commands.add_parser("list", help=what, doc=f"{what}\n\n{parser.examples('list')}"))

    def run() -> int:
        chosen = parser.parse_args(arguments)
        try:
            if chosen.command == "list":
                print(list_datasets(layout.terminal_width(chosen)))
            else:
                run_prepare(chosen)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; what is done stays, the same command goes on from there") from None
        return 0

    return run_program("taskgpt data", run)


if __name__ == "__main__":
    sys.exit(main())
