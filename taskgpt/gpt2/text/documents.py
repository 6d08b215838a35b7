"""Documents in files of any size, as token ids: texts, JSONL and Parquet, cut into spans that processes read independently of each other.

    for span in spans_of(path):
        for ids in tokens_of(span, reading): ...

A text and JSONL are cut where the bytes say, so that no process needs to know what another one read. Within a text GPT-2's tokens do not
change where it is cut between a character that is no white space and one that is: none of the pieces that its regular expression cuts a
text into goes on from the one to the other, and none looks behind its beginning.
"""

import codecs
import gzip
import importlib.util
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import file_size
from taskgpt.gpt2.text.datasets import split_sections
from taskgpt.gpt2.text.kinds import LOOK_BYTES, encoding_of, refuse_another_kind
from taskgpt.gpt2.text.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer

END_OF_TEXT = "<|endoftext|>"
ENCODINGS = {"gpt2": gpt2_tokenizer, "bytes": byte_tokenizer}
SPAN_BYTES = 1 << 22  # of text, whose ids take 20 times as much memory while they are made
FARTHEST = 1 << 22  # where a cut that changes no token is looked for; a longer word, or longer white space, is cut anywhere
LONGEST_LINE = 1 << 24  # of JSONL, bytes: parsed, hostile ones take 25 times the memory
ROWS = 256  # of Parquet at a time
_MAY_CUT = re.compile(rb"(?<=[^\s])[ \t\r\n]")


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    encoding: str = field(default="gpt2", metadata={"choices": tuple(ENCODINGS)})
    field: str = "text"
    """Key of JSONL's objects, or column of Parquet's tables, that holds the text."""
    sections: bool = False
    """Whether an empty line ends a document of a text, as in llm.c's tinyshakespeare; otherwise only `<|endoftext|>` and its end do."""


class Span(NamedTuple):
    """A part of a file, and what the file was when it was cut."""

    path: str
    size: int
    mtime_ns: int
    number: int
    nbytes: int
    """Of the file, about: for progress."""


def spans_of(path: str) -> list[Span]:
    """Return the spans of a file, which its name tells the kind of. Raises: UserError if it cannot be read."""
    with _reading(path):
        size, mtime_ns = file_size(path), os.stat(path).st_mtime_ns
        if path.endswith(".gz"):
            count = 1
        elif path.endswith(".parquet"):
            with _table(path) as table:
                count = table.num_row_groups
        else:
            count = -(-size // SPAN_BYTES)
    return [Span(path, size, mtime_ns, number, size * (number + 1) // count - size * number // count) for number in range(count)]


def tokens_of(span: Span, reading: Reading) -> Iterator[np.ndarray]:
    """Yield the ids of a span's documents, uint16 (n,) each time: an end of text, then the document's own; empty documents are left out.

    A text's span may begin and end inside a document. Raises: UserError if the file is not what its name says, or has changed.
    """
    tokenizer, parts = ENCODINGS[reading.encoding](), _parts(span.path)
    with _reading(span.path):
        _verify_unchanged(span)
        yield from parts(span, reading, tokenizer)
        _verify_unchanged(span)


def decoded(path: str | Path, content: bytes | bytearray, start: int = 0) -> str:
    """Return a text, each line ended as in Python, of content that stands in its file from byte `start` on.

    Raises: UserError if it is no text in UTF-8.
    """
    if not start and content.startswith(codecs.BOM_UTF8):  # as some editors begin a file
        content = content[len(codecs.BOM_UTF8) :]
    try:
        text = content.decode()
        at = content.find(0)
    except UnicodeDecodeError as error:
        at = error.start
    if at >= 0:
        if encoding := encoding_of(content[:LOOK_BYTES]):
            problem = f"it looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8"
        elif 0 in content:
            problem = (
                f"byte 0x00 at position {start + content.find(0):,}, which no text has; give a text, or a folder of llm.c's token files"
            )
        else:
            problem = f"byte {content[at]:#04x} at position {start + at:,}; convert it, for instance: iconv -f WINDOWS-1252 -t UTF-8"
        raise UserError(f"{shorten(path)}: not a text in UTF-8: {problem}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Say what is wrong with a file in one line. Raises: UserError instead of OSError and what zlib raises."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or shorten(error)
        raise UserError(f"{shorten(path)}: cannot read: {reason}; choose a file that you may read, or copy it again") from error


def _verify_unchanged(span: Span):
    if (os.stat(span.path).st_size, os.stat(span.path).st_mtime_ns) != (span.size, span.mtime_ns):
        raise UserError(f"{shorten(span.path)}: it changed while it was read; prepare into another folder when nobody writes it any more")


def _parts(path: str):
    if path.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl
    return _parquet if path.endswith(".parquet") else _text


# Texts ----------------------------------------------------------------------------------------------------------------------------------


def _text(span: Span, reading: Reading, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    with open(span.path, "rb", buffering=0) as file:
        if not span.number:
            refuse_another_kind(span.path, file.read(LOOK_BYTES), "a text", "give texts in UTF-8, JSONL or Parquet")
        start, end = (_cut(file, number * SPAN_BYTES, span.size) for number in (span.number, span.number + 1))
        mark = END_OF_TEXT.encode()
        begins = not start or _at(file, max(start - len(mark), 0), start) == mark
        text = decoded(span.path, _at(file, start, end), start)
    ids = array("H")
    for document in text.split(END_OF_TEXT):
        for section in split_sections(document) if reading.sections else [document]:
            if section:
                if begins:
                    ids.append(tokenizer.end_of_text)
                ids.extend(tokenizer.encode_ordinary(section))
            begins = True
    yield np.frombuffer(ids, np.uint16)


def _cut(file: BinaryIO, at: int, size: int) -> int:
    """Return the first place from `at` on where a text can be cut without changing a token, or one near `at` if there is none for long."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    looked = at
    while looked < min(at + FARTHEST, size):
        begin = max(looked - 4, 0)  # of the character before
        block = _at(file, begin, min(looked + (1 << 16), at + FARTHEST, size))
        for found in _MAY_CUT.finditer(block, looked - begin):
            before = block[max(found.start() - 4, 0) : found.start()].decode(errors="ignore")
            if before and not before[-1].isspace():
                return begin + found.start()
        looked = begin + len(block)
    if looked >= size:
        return size
    around = _at(file, at - 1, at + 4)
    if around[:2] == b"\r\n":
        return at - 1
    while around[1:] and around[1] & 0xC0 == 0x80:  # inside a character
        around, at = around[1:], at + 1
    return at


def _at(file: BinaryIO, start: int, end: int) -> bytes:
    content = b""
    while len(content) < end - start and (more := os.pread(file.fileno(), end - start - len(content), start + len(content))):
        content += more
    return content


# JSONL ----------------------------------------------------------------------------------------------------------------------------------


def _jsonl(span: Span, reading: Reading, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the documents of the lines that begin in the span."""
    is_packed, begin = span.path.endswith(".gz"), span.number * SPAN_BYTES
    end = None if is_packed else begin + SPAN_BYTES
    with gzip.open(span.path, "rb") if is_packed else open(span.path, "rb") as file:
        if not begin:
            refuse_another_kind(span.path, file.peek(LOOK_BYTES)[:LOOK_BYTES], "JSONL", "give JSONL, an object in each line")
        yield from _encoded(_lines(span.path, file, begin, end, reading.field), tokenizer)


def _lines(path: str, file: Any, at: int, end: int | None, key: str) -> Iterator[str]:
    if at:
        file.seek(at - 1)
        at += len(_line(path, file, at)) - 1
    while (end is None or at < end) and (line := _line(path, file, at)):
        if line.strip():
            yield _document(path, line, at, key)
        at += len(line)


def _line(path: str, file: Any, at: int) -> bytes:
    line = file.readline(LONGEST_LINE + 1)
    if len(line) > LONGEST_LINE:
        raise UserError(f"{shorten(path)}: the line at byte {at:,} has more than {LONGEST_LINE:,} bytes; give so long a document as a text")
    return line


def _document(path: str, line: bytes, at: int, key: str) -> str:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shorten(error)
        raise UserError(f"{shorten(path)}: the line at byte {at:,} is no JSON: {reason}; mend or remove it") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{shorten(path)}: the line at byte {at:,} is no JSON object, such as {{{json.dumps(key)}: ...}}; mend or remove it"
        )
    if key not in found:
        keys = ", ".join(shorten(each, 40) for each in list(found)[:10])
        raise UserError(
            f"{shorten(path)}: the object at byte {at:,} has no '{shorten(key)}', but: {keys or 'nothing'}; choose with --field"
        )
    if not isinstance(text := found[key], str | None):
        kind = type(text).__name__
        raise UserError(f"{shorten(path)}: '{shorten(key)}' of the object at byte {at:,} is a {kind}, no text; choose with --field")
    return text or ""


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield the ids of whole documents, of some megabytes of them at a time."""
    some: list[str] = []
    size = 0
    for document in documents:
        if document:
            some.append(document)
            size += len(document)
        if size >= SPAN_BYTES:
            yield tokenizer.encode_documents(some)
            some, size = [], 0
    yield tokenizer.encode_documents(some)


# Parquet --------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _table(path: str) -> Iterator[Any]:
    """Open a Parquet table. Raises: UserError for what pyarrow raises while it is open."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{shorten(path)}: Parquet needs pyarrow; install it with: pip install 'taskgpt[parquet]'")
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{shorten(path)}: no Parquet table that can be read: {shorten(error)}; copy it again") from None


def _parquet(span: Span, reading: Reading, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    with _table(span.path) as table:
        schema = table.schema_arrow
        if reading.field not in schema.names:
            names = ", ".join(shorten(name, 40) for name in schema.names[:10])
            raise UserError(f"{shorten(span.path)}: no column '{shorten(reading.field)}', but: {names or 'none'}; choose with --field")
        if (kind := str(schema.field(reading.field).type)) not in ("string", "large_string"):
            raise UserError(f"{shorten(span.path)}: column '{shorten(reading.field)}' holds {shorten(kind)}, no text; choose with --field")
        batches = table.iter_batches(ROWS, row_groups=[span.number], columns=[reading.field])
        yield from _encoded((text or "" for batch in batches for text in batch.column(0).to_pylist()), tokenizer)
