"""Open what a run trains on, by one word: a dataset's name, a text file, a folder or pattern of llm.c's token files, a mixture of them."""

import errno
import glob
import os
import platform
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.gpt2.text.datasets import DATASETS, VAL_TOKENS, Dataset, prepare, split_sections
from taskgpt.gpt2.text.documents import END_OF_TEXT, decoded
from taskgpt.gpt2.text.kinds import LOOK_BYTES, refuse_another_kind
from taskgpt.gpt2.text.mixtures import Mixture, read_mixture
from taskgpt.gpt2.text.preparation import PIECES
from taskgpt.gpt2.text.remote import is_url, local_copy
from taskgpt.gpt2.text.tokenizer import BYTE_VOCAB_SIZE, GPT2_VOCAB_SIZE, Tokenizer, byte_tokenizer, gpt2_tokenizer, read_tokenizer
from taskgpt.gpt2.text.tokens import Loader, TokenFile

TRAIN_FILES, VAL_FILES, TOKENIZER_FILES = "*train*.bin", "*val*.bin", "*tokenizer*.bin"
SMALL_DOWNLOAD_BYTES = 10_000_000  # up to here training fetches a dataset unasked
SECONDS_TO_CONNECT = 5  # then training goes on without the network
READ_BYTES = 1 << 20
TEXT_MEMORY = 6  # bytes for each byte of a text: itself, up to 4 as a str, and its ids
MOST_TOKENS_AS_BYTES = 4_000_000  # of each part of a prepared dataset: about 16 MB of text


@dataclass(frozen=True)
class Data:
    """What a run trains on, checks itself with, and speaks in."""

    train: Loader | Mixture
    """Shuffled, as in llm.c."""
    val: Loader | Mixture
    """In order."""
    tokenizer: Tokenizer
    description: str
    """One line for people: what, how much, in which encoding."""

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What tells other data apart, for JSON: shards by name, length and SHA-256, order, encoding. Reads all tokens once."""
        return {"train": self.train.fingerprint(), "val": self.val.fingerprint(), "encoding": self.tokenizer.name}


def open_data(spec: str, batch_size: int, seq_len: int, vocab_size: int, say: Callable[[str], None] = print) -> Data:
    """Open the data that `spec` names, as batches of batch_size sequences of seq_len tokens for a model with vocab_size ids.

    `spec` is one of:

    - `tinyshakespeare`, `tinystories`: from the cache. The small one is downloaded if it is not there; without network or cache, training
      goes on with the reference of the Python language that comes with this version of Python, and `say` tells so;
    - a text file in UTF-8: documents end at empty lines, or where `<|endoftext|>` is written, if it is (`say` tells so); validation gets
      the first tenth of the tokens, at most 32,768, at least one batch;
    - a folder, or a pattern such as `data/fineweb_*.bin`: llm.c's token files `*train*.bin` and `*val*.bin`, in the order of their names,
      and `*tokenizer*.bin` if there is one, to decode what is sampled. Hidden files, such as a Mac's `._a_train.bin`, do not count;
    - a URL of a text or of such a folder, in whatever fsspec reads: `s3://bucket/tokens`;
    - several of those with weights, `tinyshakespeare=0.3,my.txt=0.7`: each sequence is from one of them, drawn with these proportions;
      validation takes turns in the same proportions.

    Text is in GPT-2's encoding if vocab_size has room for its 50,257 ids, else in bytes (257 ids); token files are taken as they are.

    Raises: UserError if nothing of that name exists or it may not be read, the text is empty or not UTF-8, a file is no good or too short
    for one batch, or the vocabulary is too small; or as `read_mixture`, or if a mixture's sources have different encodings.
    """
    sizes = Sizes(batch_size, seq_len, vocab_size)
    path = os.path.expanduser(spec)
    if "=" in spec and not os.path.lexists(path) and not glob.glob(path):
        return _open_mixture(spec, sizes, say)
    return _open_one(spec, sizes, say)


def _open_mixture(spec: str, sizes: "Sizes", say: Callable[[str], None]) -> Data:
    named = read_mixture(spec)
    weights = [weight for _, weight in named]
    sources = [_open_one(name, sizes._replace(B=1), say) for name, _ in named]
    first, *others = sources
    for source in others:
        if source.tokenizer.pieces != first.tokenizer.pieces:
            names = f"{first.tokenizer.name} and {source.tokenizer.name}"
            raise UserError(f"data '{shorten(spec)}': its sources have different encodings, {names}; prepare them with the same one")
    train, val = (
        Mixture([getattr(source, part) for source in sources], weights, sizes.B, shuffle=part == "train") for part in ("train", "val")
    )
    parts = [f"{weight / sum(weights):.1%} {source.description}" for weight, source in zip(weights, sources, strict=True)]
    return Data(train, val, first.tokenizer, "a mixture of " + "; ".join(parts))


def _open_one(spec: str, sizes: "Sizes", say: Callable[[str], None]) -> Data:
    if spec in DATASETS:
        return _open_dataset(DATASETS[spec], sizes, say)
    if is_url(spec):
        spec = str(local_copy(spec, say))
    path = Path(os.path.expanduser(spec))  # Path.expanduser would raise RuntimeError for an unknown user
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return _open_files(spec, sorted(path.glob("*.bin")), sizes)
        return _open_text(spec, _read_text(path), sizes, say)
    except FileNotFoundError:
        pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{shorten(spec)}: cannot read: {reason}; choose a file or folder that you may read") from error
    if any(c in spec for c in "*?["):
        return _open_files(spec, [Path(file) for file in sorted(glob.glob(str(path)))], sizes)
    raise UserError(f"data '{shorten(spec)}': no such file or folder, and no such dataset{did_you_mean(spec, DATASETS)}")


class Sizes(NamedTuple):
    """What a Loader wants to know beside its tokens, in its order."""

    B: int
    T: int
    vocab_size: int


def _open_dataset(dataset: Dataset, sizes: Sizes, say: Callable[[str], None]) -> Data:
    tokenizer, encoding = text_encoding(dataset.name, sizes.vocab_size)
    how_to = f"taskgpt data prepare {dataset.name}"
    is_small = dataset.num_bytes <= SMALL_DOWNLOAD_BYTES
    try:
        folder = dataset.folder
        if not dataset.is_in(folder):
            if not is_small:
                raise UserError(f"{dataset.name} is not in {folder}; do: {how_to} (downloads {dataset.num_bytes / 1e9:.1f} GB)")
            prepare(dataset.name, seconds=SECONDS_TO_CONNECT, say=say)
    except UserError as error:
        if not is_small:
            raise
        # Two patch releases of Python may differ in it, too.
        name = f"the language reference of Python {platform.python_version()}"
        say(
            f"{dataset.name} is not cached and cannot be fetched ({error}): training on {name} (pydoc_data.topics) instead, so that losses "
            f"compare only with those of this version of Python; to get {dataset.name}, do: {how_to}"
        )
        return _open_text(name, _python_reference(), sizes, say)
    name, train, val = dataset.name, TokenFile(folder / dataset.train), TokenFile(folder / dataset.val)
    if sizes.vocab_size < GPT2_VOCAB_SIZE:
        if len(train) > MOST_TOKENS_AS_BYTES:
            name += f" (the first {MOST_TOKENS_AS_BYTES:,} GPT-2 tokens of each file)"
        train, val = _as_bytes(train), _as_bytes(val)
    return _open_shards(name, [train], [val], sizes, tokenizer, encoding)


def _open_text(name: str, text: str, sizes: Sizes, say: Callable[[str], None]) -> Data:
    tokenizer, encoding = text_encoding(name, sizes.vocab_size)
    if not text.strip():
        raise UserError(f"{shorten(name)}: the text is empty")
    documents = split_sections(text)
    if count := text.count(END_OF_TEXT):
        # Who writes it means the token, as Hugging Face's tokenizer does, too; as letters, a model would learn to spell it.
        say(f"{shorten(name)}: documents end where {END_OF_TEXT} is written, which is {count:,} times, and not at empty lines")
        documents = filter(None, text.split(END_OF_TEXT))
    ids = tokenizer.encode_documents(documents)
    num_val = max(min(VAL_TOKENS, len(ids) // 10), min(sizes.B * sizes.T + 1, len(ids) // 2))
    return _open_shards(name, [ids[num_val:]], [ids[:num_val]], sizes, tokenizer, encoding)


def _open_files(spec: str, files: list[Path], sizes: Sizes) -> Data:
    files = [file for file in files if not file.name.startswith(".")]
    train, val = ([file for file in files if fnmatch(file.name, pattern)] for pattern in (TRAIN_FILES, VAL_FILES))
    if not train or not val:
        found = f"{len(train)} and {len(val)} of them among {len(files)} files"
        raise UserError(
            f"data '{shorten(spec)}': looked for token files {TRAIN_FILES} and {VAL_FILES}, found {found}; give a text by its file"
        )
    if unfinished := next((file for file in train + val if (file.parent / PIECES).is_dir()), None):
        raise UserError(
            f"{shorten(unfinished.parent)}: its token files are not all there: `taskgpt data prepare` is at work, or was interrupted; "
            "wait, or type that command again"
        )
    if both := set(train) & set(val):
        raise UserError(
            f"{shorten(min(both))}: is it for training or for validation? Its name matches {TRAIN_FILES} and {VAL_FILES}; rename it"
        )
    tokenizers = sorted(file for file in train[0].parent.glob(TOKENIZER_FILES) if not file.name.startswith("."))
    if tokenizers:
        tokenizer = read_tokenizer(tokenizers[0])
        if tokenizer.end_of_text >= sizes.vocab_size:
            raise UserError(
                f"{shorten(tokenizers[0])}: end of text is {tokenizer.end_of_text}, outside the model's vocabulary of {sizes.vocab_size}; "
                "choose a graph with the vocabulary of this tokenizer"
            )
        if tokenizer.pieces == gpt2_tokenizer().pieces:
            tokenizer = gpt2_tokenizer()  # which can also encode
        elif tokenizer.pieces == byte_tokenizer().pieces:
            tokenizer = byte_tokenizer()
        return _open_shards(spec, train, val, sizes, tokenizer, f"decoded by {tokenizer.name}")
    if sizes.vocab_size >= GPT2_VOCAB_SIZE:
        return _open_shards(spec, train, val, sizes, gpt2_tokenizer(), "GPT-2's encoding")
    return _open_shards(spec, train, val, sizes, Tokenizer("none", [], 0), f"no {TOKENIZER_FILES} beside them: ids are shown as numbers")


def _open_shards(name: str, train: Sequence, val: Sequence, sizes: Sizes, tokenizer: Tokenizer, encoding: str) -> Data:
    train_loader = Loader(train, *sizes, shuffle=True, name=f"{name}, train part")
    val_loader = Loader(val, *sizes, name=f"{name}, val part")
    description = f"{shorten(name)}: {train_loader.num_tokens:,} train and {val_loader.num_tokens:,} val tokens, {encoding}"
    return Data(train_loader, val_loader, tokenizer, description)


def text_encoding(name: str, vocab_size: int) -> tuple[Tokenizer, str]:
    """Return the tokenizer of texts for a model with so many ids, and its encoding in words. Raises UserError for too few."""
    if vocab_size >= GPT2_VOCAB_SIZE:
        return gpt2_tokenizer(), "GPT-2's encoding"
    if vocab_size >= BYTE_VOCAB_SIZE:
        return byte_tokenizer(), f"in bytes, as a vocabulary of {vocab_size} is too small for GPT-2's encoding"
    raise UserError(
        f"{shorten(name)}: the model's vocabulary of {vocab_size} is too small for GPT-2's encoding of {GPT2_VOCAB_SIZE} ids, "
        f"and even for bytes, which take {BYTE_VOCAB_SIZE}; choose a graph with a larger one"
    )


def _as_bytes(tokens: TokenFile | np.ndarray) -> np.ndarray:
    """Return tokens in GPT-2's encoding, of which there may be too many, as byte tokens, uint16 (n,)."""
    values = [np.frombuffer(piece, np.uint8) for piece in gpt2_tokenizer().pieces]
    values[gpt2_tokenizer().end_of_text] = np.array([byte_tokenizer().end_of_text], np.uint16)
    return np.concatenate([values[i] for i in tokens[:MOST_TOKENS_AS_BYTES].tolist()], dtype=np.uint16)


def _read_text(path: Path) -> str:
    """Return a text, each line ended as in Python. Raises: OSError; UserError if it is no text in UTF-8, or too large for the memory."""
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # never waits for a writer
        kind = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):  # a pipe is what the shell makes of <(zcat text.gz)
            raise OSError(errno.EINVAL, "Not a regular file")
        os.set_blocking(file.fileno(), True)
        content = bytearray(file.read(LOOK_BYTES))
        refuse_another_kind(path, content, "a text", "give a text in UTF-8, or a folder of llm.c's token files")
        most = psutil.virtual_memory().available // TEXT_MEMORY
        size = os.fstat(file.fileno()).st_size
        while size <= most and (block := file.read(READ_BYTES)):
            content += block
            size = max(size, len(content))
    if size > most:
        raise UserError(
            f"{shorten(path)}: a text of {size / 1e9:,.1f} GB or more needs {TEXT_MEMORY} times as much memory to be tokenized, and "
            f"{most * TEXT_MEMORY / 1e9:,.1f} GB are free; take a part of it, or make token files of it: "
            "taskgpt data prepare FILE --folder DIR"
        )
    return decoded(path, content)


def _python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))
