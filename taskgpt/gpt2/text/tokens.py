"""llm.c's token files, and the loader that cuts them into batches in llm.c's order.

A token file is a header of 256 int32 {20240520, 1, number of tokens, 0...} and then the ids as uint16, all little-endian.
`TokenWriter` and `write_tokens` write one whole or not at all; `TokenFile` reads one, having checked it; `Loader` serves batches from one
or more of them, a *shard* each. Source: llm.c, `dev/data/data_common.py`, `llmc/dataloader.h` and `llmc/rand.h`.
"""

import dataclasses
import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import atomic_file, file_size, fill
from taskgpt.gpt2.text.kinds import TOKENS, refuse_another_kind

HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
TOKENS_MAGIC, TOKENS_VERSION = 20240520, 1
MOST_TOKENS = 2**31 - 1  # the header counts them in an int32
SHUFFLE_SEED = 42  # llm.c's
CHECK_TOKENS = 1 << 20  # ids are checked in chunks of this many: 2 MB fit the cache
TWISTER_WORDS = 624  # of 32 bits: the state of a Mersenne Twister


class TokenWriter:
    """Write a token file piece by piece, holding none of it: `append` ids inside `with TokenWriter.open(path) as writer`."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.num_tokens = 0

    @classmethod
    @contextmanager
    def open(cls, path: str | Path) -> Iterator["TokenWriter"]:
        """Begin a token file; it appears under its name when the block ends. Raises: UserError as `atomic_file`, or if no token came."""
        with atomic_file(path) as file:
            file.write(bytes(HEADER_BYTES))
            writer = cls(file)
            yield writer
            if not 1 <= writer.num_tokens <= MOST_TOKENS:
                raise UserError(f"{shorten(path)}: a token file holds 1 to {MOST_TOKENS:,} tokens, not {writer.num_tokens:,}")
            file.seek(0)
            file.write(np.array([TOKENS_MAGIC, TOKENS_VERSION, writer.num_tokens], "<i4").tobytes())

    def append(self, ids: Sequence[int] | np.ndarray):
        """Add token ids (n,). Raises: ValueError if one is negative or above 65,535."""
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < 2**16:
            raise ValueError(f"token ids from {ids.min()} to {ids.max()} do not fit uint16")
        self.file.write(np.ascontiguousarray(ids, "<u2").data)
        self.num_tokens += ids.size


def write_tokens(path: str | Path, ids: Sequence[int] | np.ndarray):
    """Write token ids (n,) as an llm.c token file, whole or not at all. Raises: UserError as `TokenWriter.open`, ValueError as `append`."""
    with TokenWriter.open(path) as writer:
        writer.append(ids)


class TokenFile:
    """The ids of an llm.c token file: `len` tells how many, a slice reads some of them, uint16 (n,), and nothing is held in memory.

    Read, not mapped: where a mapped file became shorter, the system would kill the program. The file stays open, so that it may be deleted.
    """

    def __init__(self, path: str | Path):
        """Raises: UserError if it cannot be read, is another kind of file, holds no token, or is longer or shorter than its header says."""
        self.path = path
        try:
            size = file_size(path)  # before it is opened: to open a pipe is to wait for its writer
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._cannot_read(error) from error
        weakref.finalize(self, os.close, self._descriptor)
        header = self._read(0, min(size, HEADER_BYTES))
        refuse_another_kind(path, header, TOKENS, "tokenize the text for GPT-2, or give the text itself to --data")
        if size < HEADER_BYTES:
            raise UserError(
                f"{shorten(path)}: {size} bytes are too few for a token file's header of {HEADER_BYTES}; copy or prepare the file again"
            )
        magic, version, self._count = np.frombuffer(header, "<i4", 3).tolist()
        if magic != TOKENS_MAGIC:
            raise UserError(
                f"{shorten(path)}: no llm.c token file, which begins with {TOKENS_MAGIC}, not {magic}; nanoGPT's files have no header"
            )
        if version != TOKENS_VERSION:
            raise UserError(
                f"{shorten(path)}: token file version {version}, wanted {TOKENS_VERSION} (uint16, GPT-2); tokenize the text again"
            )
        if self._count < 1:
            raise UserError(f"{shorten(path)}: the header counts {self._count} tokens; tokenize the text again")
        if size != (wanted := HEADER_BYTES + 2 * self._count):
            raise UserError(
                f"{shorten(path)}: {self._count:,} tokens need {wanted:,} bytes, but the file has {size:,}; copy or prepare the file again"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the ids of a slice without a step. Raises: UserError if the file cannot be read, or has become shorter."""
        start, stop, _ = part.indices(self._count)
        return np.frombuffer(self._read(HEADER_BYTES + 2 * start, 2 * max(stop - start, 0)), "<u2")

    def _read(self, offset: int, count: int) -> bytes:
        content = b""
        try:
            while len(content) < count and (more := os.pread(self._descriptor, count - len(content), offset + len(content))):
                content += more
        except OSError as error:
            raise self._cannot_read(error) from error
        if len(content) < count:
            raise UserError(f"{shorten(self.path)}: the file became shorter while it was read; copy or prepare it again")
        return content

    def _cannot_read(self, error: OSError) -> UserError:
        return UserError(f"{shorten(self.path)}: cannot read tokens: {error.strerror or error}; choose a token file that you may read")


@dataclass(frozen=True)
class _Cursor:
    """Where a loader is. Orders of samples are not in it: they are drawn again, by the generator as it was before it drew them."""

    batches: int
    """Of an epoch, by which a cursor of other data, or of other sizes, is mostly known."""
    shards: list[int]
    """The order of this epoch."""
    turn: int = field(metadata={"at_least": 0})
    """Which place of that order is being served."""
    place: int = field(metadata={"at_least": 0})
    """Samples of that shard that were served."""
    random: str
    """The Mersenne Twister's words before it drew the order of the shard's samples, little-endian in hexadecimal."""
    random_at: int = field(metadata={"at_least": 0, "at_most": TWISTER_WORDS})
    """How many of its words were drawn already."""


class Loader:
    """Batches of inputs and targets from shards of tokens, in the order of llm.c's DataLoader (one process).

    Sample i of a shard is its B*T+1 tokens from i*B*T on: the inputs, and one further on the targets. A tail too short for a sample is
    dropped. Without `shuffle`, shards and samples come in the order given. With it, a Mersenne Twister of seed 42, the same as torch's,
    draws at each epoch's start an order of the shards, and at each shard's start an order of its samples; epochs continue one stream.
    """

    def __init__(
        self,
        shards: Sequence[str | Path | TokenFile | np.ndarray],
        B: int,
        T: int,
        vocab_size: int,
        *,
        shuffle: bool = False,
        name: str = "tokens",
    ):
        """Open all shards and check that each holds a sample and no strange id: better now than half way through a run.

        Args: shards: token files, by name or open, or uint16 arrays (n,), which errors call `name`.
        B, T: sequences per batch, tokens per sequence.
        Raises: UserError if a file is no good (`TokenFile`), if a shard is too short, or if an id is >= vocab_size.
        """
        self.B, self.T, self.shuffle = B, T, shuffle
        self._vocab_size = vocab_size
        self._tokens = [TokenFile(shard) if isinstance(shard, str | Path) else shard for shard in shards]
        self._names = [shorten(tokens.path if isinstance(tokens, TokenFile) else name) for tokens in self._tokens]
        for shard_name, tokens in zip(self._names, self._tokens, strict=True):
            _check_length(shard_name, len(tokens), B, T)
            for start in range(0, len(tokens), CHECK_TOKENS):
                _check_ids(shard_name, tokens[start : start + CHECK_TOKENS], start, vocab_size)
        self._random = np.random.RandomState(SHUFFLE_SEED)
        self._shard_order = np.arange(len(shards))
        self.reset()

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards. llm.c prints num_tokens // (B*T) as its number of batches, which can be one more than it serves."""
        return sum(map(len, self._tokens))

    @property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return sum(self._num_samples(tokens) for tokens in self._tokens)

    def reset(self):
        """Begin an epoch. A shuffled loader draws a new order; it does not return to the first one."""
        if self.shuffle:
            self._permute(self._shard_order)
        self._begin_shard(0)

    def cursor(self) -> dict[str, Any]:
        """Return where the loader is, for JSON: `restore` with it goes on with the batch that is next here. About 5 KB."""
        _, words, at, *_ = self._random_before
        state = words.astype("<u4").tobytes().hex()
        return dataclasses.asdict(_Cursor(self.num_batches, self._shard_order.tolist(), self._turn, self._place, state, int(at)))

    def restore(self, cursor: Any):
        """Go on where another loader of the same data was, from its `cursor()`.

        Raises: UserError, and stays where it is, if that is none, or one of other data or sizes.
        """
        found: _Cursor = fill(_Cursor, cursor, "cursor: ")
        if (found.batches, sorted(found.shards)) != (self.num_batches, list(range(len(self._tokens)))):
            raise UserError(
                f"cursor: of {found.batches:,} batches an epoch in {len(found.shards):,} shards, but this data has {self.num_batches:,} in "
                f"{len(self._tokens):,}; give the data, batch size and sequence length that the run had"
            )
        if found.turn >= len(found.shards) or found.place > self._num_samples(self._tokens[found.shards[found.turn]]):
            raise UserError(f"cursor: turn {found.turn:,}, place {found.place:,} is behind the end of the data; take an earlier checkpoint")
        try:
            words = np.frombuffer(bytes.fromhex(found.random), "<u4")
        except ValueError:
            words = np.empty(0)
        if len(words) != TWISTER_WORDS:
            raise UserError(f"cursor: random: wanted {TWISTER_WORDS} words of 8 hexadecimal digits; take an earlier checkpoint")
        self._random.set_state(("MT19937", words.astype(np.uint32), found.random_at))
        self._shard_order[:] = found.shards
        self._begin_shard(found.turn)
        self._place = found.place

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells other tokens, or another order of them, apart, for JSON. Reads all tokens: a second for each 2 GB or so.

        Raises: UserError as `next_batch`.
        """
        shards = []
        for name, tokens in zip(self._names, self._tokens, strict=True):
            digest = hashlib.sha256()
            for start in range(0, len(tokens), CHECK_TOKENS):
                digest.update(np.ascontiguousarray(tokens[start : start + CHECK_TOKENS], "<u2"))
            shards.append({"name": Path(name).name, "tokens": len(tokens), "sha256": digest.hexdigest()})
        return {"shuffle": self.shuffle, "shards": shards}

    def next_batch(self, inputs: np.ndarray, targets: np.ndarray):
        """Fill inputs and targets, int32 (B, T) each, with the next batch; after the last one of an epoch the next epoch begins.

        Raises: UserError if a file became shorter, or was changed so that an id is >= vocab_size: kernels would index with it.
        """
        start = self._next_sample() * self.B * self.T
        shard = self._shard_order[self._turn]
        sample = self._tokens[shard][start : start + self.B * self.T + 1]
        _check_ids(self._names[shard], sample, start, self._vocab_size)
        inputs[:] = sample[:-1].reshape(self.B, self.T)
        targets[:] = sample[1:].reshape(self.B, self.T)

    def _next_sample(self) -> int:
        if self._place == len(self._samples):
            if self._turn == len(self._tokens) - 1:
                self.reset()
            else:
                self._begin_shard(self._turn + 1)
        self._place += 1
        return int(self._samples[self._place - 1])

    def _begin_shard(self, turn: int):
        self._turn, self._place = turn, 0
        self._random_before = self._random.get_state()
        self._samples = np.arange(self._num_samples(self._tokens[self._shard_order[turn]]))
        if self.shuffle:
            self._permute(self._samples)

    def _num_samples(self, tokens: TokenFile | np.ndarray) -> int:
        return (len(tokens) - 1) // (self.B * self.T)

    def _permute(self, order: np.ndarray):
        # Written out because NumPy's own shuffle draws its numbers in another way than llm.c's `random_permutation`.
        draws = self._random.randint(0, 2**32, size=len(order) - 1, dtype=np.uint32).tolist()
        values = order.tolist()
        for i, draw in zip(range(len(values) - 1, 0, -1), draws, strict=True):
            j = draw % (i + 1)
            values[i], values[j] = values[j], values[i]
        order[:] = values


def _check_length(name: str, num_tokens: int, B: int, T: int):
    if num_tokens >= B * T + 1:
        return
    if num_tokens > T:
        fits = f"batch size {(num_tokens - 1) // T} would fit"
    elif num_tokens > 1:
        fits = f"batch size 1 with sequence length {num_tokens - 1} would fit"
    else:
        fits = "take a longer text"
    raise UserError(f"{name}: {num_tokens:,} tokens, but batch size {B} and sequence length {T} need at least {B * T + 1:,}; {fits}")


def _check_ids(name: str, ids: np.ndarray, start: int, vocab_size: int):
    """Raise UserError if one of the ids, which stand in their shard from position `start` on, is outside the vocabulary."""
    if ids.max() >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{name}: token {int(ids[at])} at position {start + at:,} is outside the model's vocabulary of {vocab_size}; "
            "choose a graph with the vocabulary that these tokens were made for (GPT-2's is 50257)"
        )
