"""Get training data ready, and open it.

    python -m taskgpt.data prepare tinyshakespeare                    # download 1.1 MB, write 0.7 MB of tokens into the cache
    python -m taskgpt.data prepare tinyshakespeare --from input.txt   # the same on a machine without network
    python -m taskgpt.data prepare tinystories --folder /scratch/me   # download 1.6 GB, write 1.9 GB of tokens
    python -m taskgpt.data list                                       # what is prepared, and where

Training opens data by one word: a name above, a text file, or a folder or pattern of llm.c's token files.
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taskgpt.errors import UserError, did_you_mean, run_program
from taskgpt.gpt2.datasets import DATASETS, VAL_TOKENS, Dataset, prepare, split_sections
from taskgpt.gpt2.tokenizer import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE, Tokenizer, byte_tokenizer, gpt2_tokenizer, read_tokenizer
from taskgpt.gpt2.tokens import Loader, read_tokens

SMALL_DOWNLOAD_BYTES = 10_000_000  # up to here training fetches a dataset unasked
SECONDS_TO_CONNECT = 5  # then training goes on without the network
TRAIN_FILES, VAL_FILES, TOKENIZER_FILES = "*train*.bin", "*val*.bin", "*tokenizer*.bin"
MOST_TOKENS_AS_BYTES = 4_000_000  # of each part of a prepared dataset: about 16 MB of text


@dataclass(frozen=True)
class Data:
    """What a run trains on, checks itself with, and speaks in."""

    train: Loader
    """Shuffled, as in llm.c."""
    val: Loader
    """In order."""
    tokenizer: Tokenizer
    description: str
    """One line for people: what, how much, in which encoding."""


def open_data(spec: str, batch_size: int, seq_len: int, vocab_size: int, say: Callable[[str], None] = print) -> Data:
    """Open the data that `spec` names, as batches of batch_size sequences of seq_len tokens for a model with vocab_size ids.

    `spec` is one of:

    - `tinyshakespeare`, `tinystories`: from the cache. The small one is downloaded if it is not there; without a network, training goes on
      with the reference of the Python language that comes with Python, and `say` tells so;
    - a text file in UTF-8: documents end at empty lines; validation gets the first tenth of the tokens, at most 32,768, at least one batch;
    - a folder, or a pattern such as `data/fineweb_*.bin`: llm.c's token files `*train*.bin` and `*val*.bin`, in the order of their names,
      and `*tokenizer*.bin` if there is one, to decode what is sampled.

    Text is in GPT-2's encoding if vocab_size has room for its 50,257 ids, else in bytes (257 ids); token files are taken as they are.

    Raises: UserError if nothing of that name exists or it may not be read, the text is empty or not UTF-8, a file is no good or too short
    for one batch, or the vocabulary is too small.
    """
    sizes = Sizes(batch_size, seq_len, vocab_size)
    if spec in DATASETS:
        return _open_dataset(DATASETS[spec], sizes, say)
    path = Path(os.path.expanduser(spec))  # Path.expanduser would raise RuntimeError for an unknown user
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise _cannot_read(spec, error) from error
    if is_folder:
        return _open_files(spec, sorted(path.glob("*.bin")), sizes)
    if exists and path.suffix == ".bin":
        raise UserError(f"{spec}: one token file is not enough; give its folder, or a pattern that matches a train and a val file")
    if exists:
        return _open_text(spec, _read_text(path), sizes)
    if any(c in spec for c in "*?["):
        return _open_files(spec, [Path(file) for file in sorted(glob.glob(str(path)))], sizes)
    raise UserError(f"data '{spec}': no such file or folder, and no such dataset{did_you_mean(spec, DATASETS)}")


class Sizes(NamedTuple):
    """What a Loader wants to know beside its tokens, in its order."""

    B: int
    T: int
    vocab_size: int


def _open_dataset(dataset: Dataset, sizes: Sizes, say: Callable[[str], None]) -> Data:
    tokenizer, encoding = _text_encoding(dataset.name, sizes.vocab_size)
    how_to = f"python -m taskgpt.data prepare {dataset.name}"
    if not dataset.is_in(dataset.folder):
        if dataset.num_bytes > SMALL_DOWNLOAD_BYTES:
            raise UserError(f"{dataset.name} is not in {dataset.folder}; do: {how_to} (downloads {dataset.num_bytes / 1e9:.1f} GB)")
        try:
            prepare(dataset.name, seconds=SECONDS_TO_CONNECT, say=say)
        except UserError as error:
            say(
                f"{dataset.name} is not cached and cannot be fetched ({error}): training on Python's own language reference "
                f"(pydoc_data.topics) instead; to get {dataset.name}, do: {how_to}"
            )
            return _open_text("Python's language reference", _python_reference(), sizes)
    train, val = dataset.folder / dataset.train, dataset.folder / dataset.val
    if sizes.vocab_size >= GPT2_VOCAB_SIZE:
        return _open_shards(dataset.name, [train], [val], sizes, tokenizer, encoding)
    extent = f" (the first {MOST_TOKENS_AS_BYTES:,} GPT-2 tokens of each file)" if dataset.num_bytes > SMALL_DOWNLOAD_BYTES else ""
    return _open_shards(dataset.name + extent, [_as_bytes(train)], [_as_bytes(val)], sizes, tokenizer, encoding)


def _open_text(name: str, text: str, sizes: Sizes) -> Data:
    tokenizer, encoding = _text_encoding(name, sizes.vocab_size)
    if not text.strip():
        raise UserError(f"{name}: the text is empty")
    ids = tokenizer.encode_documents(split_sections(text))
    num_val = max(min(VAL_TOKENS, len(ids) // 10), min(sizes.B * sizes.T + 1, len(ids) // 2))
    return _open_shards(name, [ids[num_val:]], [ids[:num_val]], sizes, tokenizer, encoding)


def _open_files(spec: str, files: list[Path], sizes: Sizes) -> Data:
    train, val = ([file for file in files if fnmatch(file.name, pattern)] for pattern in (TRAIN_FILES, VAL_FILES))
    if not train or not val:
        found = f"{len(train)} and {len(val)} of them among {len(files)} files"
        raise UserError(f"data '{spec}': looked for token files {TRAIN_FILES} and {VAL_FILES}, found {found}; give a text by its file")
    if both := set(train) & set(val):
        raise UserError(f"{min(both)}: is it for training or for validation? Its name matches {TRAIN_FILES} and {VAL_FILES}; rename it")
    tokenizers = sorted(train[0].parent.glob(TOKENIZER_FILES))
    if tokenizers:
        tokenizer = read_tokenizer(tokenizers[0])
        if tokenizer.end_of_text >= sizes.vocab_size:
            raise UserError(
                f"{tokenizers[0]}: end of text is {tokenizer.end_of_text}, outside the model's vocabulary of {sizes.vocab_size}; "
                "choose a graph with the vocabulary of this tokenizer"
            )
        if tokenizer.pieces == gpt2_tokenizer().pieces:
            tokenizer = gpt2_tokenizer()  # which can also encode
        return _open_shards(spec, train, val, sizes, tokenizer, f"decoded by {tokenizer.name}")
    if sizes.vocab_size >= GPT2_VOCAB_SIZE:
        return _open_shards(spec, train, val, sizes, gpt2_tokenizer(), "GPT-2's encoding")
    return _open_shards(spec, train, val, sizes, Tokenizer("none", [], 0), f"no {TOKENIZER_FILES} beside them: ids are shown as numbers")


def _open_shards(name: str, train: Sequence, val: Sequence, sizes: Sizes, tokenizer: Tokenizer, encoding: str) -> Data:
    train_loader = Loader(train, *sizes, shuffle=True, name=f"{name}, train part")
    val_loader = Loader(val, *sizes, name=f"{name}, val part")
    description = f"{name}: {train_loader.num_tokens:,} train and {val_loader.num_tokens:,} val tokens, {encoding}"
    return Data(train_loader, val_loader, tokenizer, description)


def _text_encoding(name: str, vocab_size: int) -> tuple[Tokenizer, str]:
    if vocab_size >= GPT2_VOCAB_SIZE:
        return gpt2_tokenizer(), "GPT-2's encoding"
    if vocab_size >= BYTE_VOCAB_SIZE:
        return byte_tokenizer(), f"in bytes, as a vocabulary of {vocab_size} is too small for GPT-2's encoding"
    raise UserError(
        f"{name}: the model's vocabulary of {vocab_size} is too small for GPT-2's encoding of {GPT2_VOCAB_SIZE} ids, "
        f"and even for bytes, which take {BYTE_VOCAB_SIZE}; choose a graph with a larger one"
    )


def _as_bytes(path: Path) -> np.ndarray:
    """Read a token file in GPT-2's encoding as byte tokens, uint16 (n,)."""
    values = [np.frombuffer(piece, np.uint8) for piece in gpt2_tokenizer().pieces]
    values[gpt2_tokenizer().end_of_text] = np.array([byte_tokenizer().end_of_text], np.uint16)
    return np.concatenate([values[i] for i in read_tokens(path)[:MOST_TOKENS_AS_BYTES].tolist()], dtype=np.uint16)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at position {error.start:,}"
        raise UserError(f"{path}: not a text in UTF-8: {found}; convert it, for instance with iconv") from error
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(name: str | Path, error: OSError) -> UserError:
    return UserError(f"{name}: cannot read: {error.strerror or error}; choose a file or folder that you may read")


def _python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def list_datasets() -> str:
    """Return what is in the cache, a line per dataset."""
    lines = []
    for dataset in DATASETS.values():
        if dataset.is_in(dataset.folder):
            train, val = (len(read_tokens(dataset.folder / file)) for file in (dataset.train, dataset.val))
            state = f"{train:,} train and {val:,} val tokens"
        else:
            state = f"not prepared; a download of {dataset.num_bytes / 1e6:,.1f} MB"
            if (part := dataset.part(dataset.folder)).is_file():
                state += f", of which {part.stat().st_size / 1e6:,.1f} MB are here"
        lines.append(f"{dataset.name:15} {state:56} {dataset.folder}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m taskgpt.data", description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_parser = commands.add_parser("prepare", help="download a dataset and write its token files")
    prepare_parser.add_argument("name", metavar="NAME", help=" or ".join(DATASETS))
    prepare_parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write the token files (default: the cache)")
    prepare_parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="take this downloaded file, no network")
    commands.add_parser("list", help="show what is prepared, and where")
    chosen = parser.parse_args(arguments)

    def run() -> int:
        try:
            if chosen.command == "list":
                print(list_datasets())
            else:
                prepare(chosen.name, chosen.folder, chosen.source)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; what is downloaded stays, the same command goes on from there") from None
        return 0

    return run_program("taskgpt.data", run)


if __name__ == "__main__":
    sys.exit(main())
