"""llm.c's evaluation files: multiple choice, as HellaSwag and MMLU, where a model is right if it finds the right completion the likeliest.

A file is a header of 256 int32 {20240522, 1, number of examples, bytes of the longest one, 0...} and then uint16, of each example: 65535,
its bytes, its number, the index of the right completion, the number of completions, then tokens of the context and of each completion,
their number before them; all little-endian. Source: llm.c, `dev/data/data_common.py` (`write_evalfile`) and `llmc/dataloader.h`
(`EvalLoader`), which has four completions everywhere; here there may be any number from two on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import file_size
from taskgpt.gpt2.text.kinds import CHOICES, refuse_another_kind
from taskgpt.gpt2.text.tokens import HEADER_BYTES

MAGIC, VERSION = 20240522, 1
START = 65535  # before each example
MOST_EXAMPLES, MOST_BYTES = 1 << 16, (1 << 16) - 1  # a word counts them
AGAIN = "copy or prepare the file again"


@dataclass(frozen=True)
class Example:
    """A context, what may follow it, and which of these does: index `label`. Tokens are uint16 (n,)."""

    context: np.ndarray
    completions: tuple[np.ndarray, ...]
    label: int

    @property
    def positions(self) -> int:
        """How many positions a model needs: the last token of a completion is only predicted."""
        return len(self.context) + max(map(len, self.completions)) - 1


class Row(NamedTuple):
    """A completion behind its context, uint16 (n,), and how many of the tokens are the context's."""

    tokens: np.ndarray
    context: int


class Score(NamedTuple):
    """What a model's loss is over the tokens of a completion: in all, and of one."""

    total: float
    mean: float


def read_choices(path: str | Path, vocabulary: int) -> list[Example]:
    """Return the examples of a file. Raises UserError for another kind of file, a damaged one, or ids outside the model's vocabulary."""
    words = _read(path)
    header = np.frombuffer(words[: HEADER_BYTES // 2], "<i4", 4).tolist()
    examples, at = [], HEADER_BYTES // 2
    for number in range(header[2]):
        where = f"{shorten(path)}: example {number + 1:,}"
        example, at = _example(words, at, number, header[3], where)
        largest = max(int(tokens.max()) for tokens in (example.context, *example.completions))
        if largest >= vocabulary:
            do = "these files are for GPT-2's encoding of 50257 ids; choose a model that has them"
            raise UserError(f"{where}: token {largest} is outside the model's vocabulary of {vocabulary}; {do}")
        examples.append(example)
    if at != len(words):
        raise UserError(f"{shorten(path)}: the examples end at byte {2 * at:,}, the file at {2 * len(words):,}; {AGAIN}")
    return examples


def _read(path: str | Path) -> np.ndarray:
    """Return all of a file as uint16 words, having looked at the header: there is an example, and no more bytes than so many can have."""
    try:
        size = file_size(path)  # before it is opened: to open a pipe is to wait for its writer
        with open(path, "rb") as file:
            beginning = file.read(HEADER_BYTES)
            refuse_another_kind(path, beginning, CHOICES, "llm.c's dev/data/hellaswag.py writes one")
            if len(beginning) < HEADER_BYTES:
                raise UserError(f"{shorten(path)}: {size} bytes are too few for an evaluation file's header of {HEADER_BYTES}; {AGAIN}")
            magic, version, count, longest = np.frombuffer(beginning, "<i4", 4).tolist()
            if magic != MAGIC:
                raise UserError(f"{shorten(path)}: no llm.c evaluation file, which begins with {MAGIC}, not {magic}; give another file")
            if version != VERSION:
                raise UserError(f"{shorten(path)}: evaluation file version {version}, wanted {VERSION}; write it with a current llm.c")
            if not (0 < count <= MOST_EXAMPLES and 0 < longest <= MOST_BYTES):
                raise UserError(f"{shorten(path)}: the header counts {count} examples of at most {longest} bytes; {AGAIN}")
            if size % 2 or size > HEADER_BYTES + count * longest:
                raise UserError(f"{shorten(path)}: {size:,} bytes are not {count:,} examples of at most {longest:,} bytes; {AGAIN}")
            content = beginning + file.read(size - HEADER_BYTES)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{shorten(path)}: cannot read the evaluation file: {reason}; choose a file that you may read") from None
    return np.frombuffer(content[: len(content) // 2 * 2], "<u2")  # whole words, should it have become shorter meanwhile


def _example(words: np.ndarray, at: int, number: int, longest: int, where: str) -> tuple[Example, int]:
    """Return the example that begins at a word, and where the next one does. Raises UserError."""

    def take(count: int) -> np.ndarray:
        nonlocal at
        if at + count > end:
            raise UserError(f"{where}: ends before what it should hold; {AGAIN}")
        at += count
        return words[at - count : at]

    begin, end = at, len(words)
    start, nbytes, index, label, completions = take(5).tolist()
    if start != START or index != number or nbytes % 2 or nbytes > longest:
        raise UserError(f"{where}: wanted the words {START}, bytes up to {longest}, {number}; got {start}, {nbytes}, {index}; {AGAIN}")
    if not 0 <= label < completions or completions < 2:
        raise UserError(f"{where}: number {label} of {completions} completions is said to be right; {AGAIN}")
    end = min(end, begin + nbytes // 2)
    parts = [take(int(take(1)[0])) for _ in range(1 + completions)]
    if not all(map(len, parts)):
        raise UserError(f"{where}: a context or completion has no token; {AGAIN}")
    if at != begin + nbytes // 2:
        raise UserError(f"{where}: has {nbytes:,} bytes by its header, {2 * (at - begin):,} by what it holds; {AGAIN}")
    return Example(parts[0], tuple(parts[1:]), label), at


def rows_of(examples: Iterable[Example]) -> Iterator[Row]:
    """Yield a row for each completion."""
    for example in examples:
        for completion in example.completions:
            yield Row(np.concatenate([example.context, completion]), len(example.context))


def write_rows(rows: Sequence[Row], tokens: np.ndarray, targets: np.ndarray) -> None:
    """Write at most B rows into tokens and targets, (B, T) each; behind a row are zeros, which nothing before them sees."""
    tokens[:], targets[:] = 0, 0
    for b, (row, _) in enumerate(rows):
        tokens[b, : len(row) - 1], targets[b, : len(row) - 1] = row[:-1], row[1:]


def scores_of(rows: Sequence[Row], losses: np.ndarray) -> Iterator[Score]:
    """Yield the score of each row's completion from losses (B, T), added up in their order in float32, as llm.c does."""
    for b, (row, context) in enumerate(rows):
        of_completion = losses[b, context - 1 : len(row) - 1]
        total = np.add.accumulate(of_completion)[-1]
        yield Score(float(total), float(total / np.float32(len(of_completion))))


def judged(examples: Iterable[Example], scores: Iterator[Score]) -> Iterator[tuple[bool, bool]]:
    """Yield of each example whether the right completion has the smallest loss, and whether it has the smallest mean loss of a token.

    Among equals the first one counts, as in llm.c. scores: of all completions, in order; as many are taken as an example has.
    """
    for example in examples:
        found = list(islice(scores, len(example.completions)))
        right = found[example.label]
        yield min(found, key=lambda score: score.total) is right, min(found, key=lambda score: score.mean) is right
