"""Turn texts, JSONL and Parquet into llm.c's token files: in parallel, in shards, and so that a killed run goes on.

Files are cut into *pieces*, whose tokens are written by processes into a hidden folder, each whole or not at all. When all are there,
shards are copied from them in order, so that neither the number of processes nor when they ended is seen in the result. A piece or a shard
that is there is not made again. The manifest beside them says what they were made of: another run's pieces are never taken.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from taskgpt.downloads import only_one, progress
from taskgpt.errors import UserError, shorten
from taskgpt.files import atomic_file, cannot_write, fill, read_json, write_whole
from taskgpt.gpt2.text.documents import ENCODINGS, SPAN_BYTES, Reading, Span, spans_of, tokens_of
from taskgpt.gpt2.text.tokenizer import byte_tokenizer, tokenizer_bytes
from taskgpt.gpt2.text.tokens import MOST_TOKENS, TokenFile, TokenWriter

MANIFEST, PIECES, SHARDS = "prepared.json", ".pieces", "tokens_*.bin"
SHARD_NAME = re.compile(r"tokens_(train|val)_[0-9]{6,10}\.bin")
VERSION = 1  # of the manifest, and of how files are cut: another version's pieces have other ends
MANIFEST_BYTES = 1 << 26  # some 500,000 inputs
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
SHARD_TOKENS = 100_000_000  # 200 MB, as llm.c's FineWeb
VAL_TOKENS = 1 << 20  # at most, where nothing else is said
COPY_TOKENS = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What a preparation makes of its inputs."""

    reading: Reading = field(default_factory=Reading)
    shard_tokens: int = field(default=SHARD_TOKENS, metadata={"at_least": 1, "at_most": MOST_TOKENS})
    val_tokens: int | None = None
    """How many of the first tokens are for validation."""
    val_share: float | None = None
    """Or which part of them. With neither, a tenth, at most VAL_TOKENS."""


@dataclass(frozen=True)
class Manifest:
    """What token files were, or are being, made of."""

    version: int
    settings: Settings
    inputs: list[str]
    """`SIZE MTIME_NS PATH` of each file, in order."""
    shards: dict[str, int] = field(default_factory=dict)
    """Tokens of each token file; none until all are there."""


def prepare_texts(
    sources: Sequence[str | Path],
    folder: Path,
    settings: Settings,
    suffixes: Sequence[str] = SUFFIXES,
    workers: int = 1,
    say: Callable[[str], None] = print,
):
    """Write token files of all documents of files, and of folders' files with these suffixes, into a folder of their own.

    Raises: UserError if a source cannot be read or is not what its name says, if the folder holds something else or was begun with other
    inputs or settings, or if the disk is full; what is done is kept, and the same call goes on from there.
    """
    spans = [span for path in find_files(sources, suffixes) for span in spans_of(path)]
    inputs = list(dict.fromkeys(f"{span.size} {span.mtime_ns} {span.path}" for span in spans))
    wanted = Manifest(VERSION, settings, inputs)
    tokenizer = ENCODINGS[settings.reading.encoding]()
    with only_one(folder, say):
        if _begin(folder, wanted):
            say(f"already prepared in {folder}; to prepare it anew, delete that folder first")
            return
        pieces = _tokenize(_grouped(spans), folder / PIECES, settings.reading, workers)
        shards = _assemble(pieces, folder, settings)
        if tokenizer is byte_tokenizer():  # without it, ids would be taken for another encoding's
            with atomic_file(folder / "bytes_tokenizer.bin") as file:
                file.write(tokenizer_bytes(tokenizer))
        _write(folder, dataclasses.replace(wanted, shards=shards))
        shutil.rmtree(folder / PIECES, ignore_errors=True)
    train, val = ({name: count for name, count in shards.items() if part in name} for part in ("_train_", "_val_"))
    counts = f"{sum(train.values()):,} train tokens in {len(train)} and {sum(val.values()):,} val tokens in {len(val)} files"
    say(f"wrote {counts} into {folder}; train with: --data {folder}")


def find_files(sources: Sequence[str | Path], suffixes: Sequence[str]) -> list[str]:
    """Return the files to read, absolute: sources in their order, files of a folder in the order of their paths. Hidden ones do not count.

    Raises: UserError if a folder may not be looked into, or has no such file, or if a file is given twice.
    """
    found: list[str] = []
    for source in map(os.path.abspath, sources):
        if not os.path.isdir(source):
            found.append(source)
            continue
        inside = []
        for folder, folders, names in os.walk(source, onerror=_cannot_look):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [os.path.join(folder, name) for name in names if name.endswith(tuple(suffixes)) and not name.startswith(".")]
            inside += filter(os.path.isfile, paths)
        if not inside:
            raise UserError(f"{shorten(source)}: no file in it ends in {', '.join(suffixes)}; choose with --suffixes")
        found += sorted(inside, key=lambda path: path.split(os.sep))
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise UserError(f"{shorten(twice)}: given twice; give each file once")
    return found


def _cannot_look(error: OSError):
    raise UserError(f"{shorten(error.filename)}: cannot read: {error.strerror}; choose a folder that you may read") from error


# The manifest ---------------------------------------------------------------------------------------------------------------------------


def _begin(folder: Path, wanted: Manifest) -> bool:
    """Make a folder ready; return True if all is done already. Raises: UserError if what is in it is of other inputs or settings."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        if there := sorted(folder.glob("*.bin")):
            raise UserError(
                f"{shorten(there[0])}: a file that is not of this preparation, and training would read it; choose another --folder"
            )
        _write(folder, wanted)
        return False
    found: Manifest = fill(Manifest, read_json(path, MANIFEST_BYTES), f"{shorten(path)}: ")
    if not any(folder.glob(SHARDS)):  # pieces do not depend on how they are put together
        found = dataclasses.replace(found, settings=dataclasses.replace(wanted.settings, reading=found.settings.reading))
        _write(folder, found)
    if difference := _difference(found, wanted):
        raise UserError(f"{shorten(folder)}: was begun otherwise: {difference}; choose another --folder, or delete this one")
    for leftover in folder.glob(".*.tmp*"):  # of a run that was killed; nobody else writes here now
        leftover.unlink()
    for name, count in found.shards.items():
        if not (SHARD_NAME.fullmatch(name) and _is_whole(folder / name, count)):
            raise UserError(f"{shorten(folder / name)}: missing or not of {count:,} tokens; delete {shorten(folder)}, and prepare it again")
    if found.shards:
        shutil.rmtree(folder / PIECES, ignore_errors=True)  # of a run that was killed at its very end
    return bool(found.shards)


def _write(folder: Path, manifest: Manifest):
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    if len(text) > MANIFEST_BYTES:
        count = f"{len(manifest.inputs):,} files, whose names take more than {MANIFEST_BYTES:,} bytes"
        raise UserError(f"{shorten(folder)}: the inputs are {count}; put many small texts into a JSONL file")
    write_whole(folder / MANIFEST, text)


def _difference(found: Manifest, wanted: Manifest) -> str:
    """Return what differs between a manifest and the one that is wanted now, in words; empty if nothing does."""
    if found.version != wanted.version:
        return f"by version {found.version} of taskgpt's manifest, this is {wanted.version}"
    before, now = ({**dataclasses.asdict(each.settings), **dataclasses.asdict(each.settings.reading)} for each in (found, wanted))
    for key in now:
        if key != "reading" and before[key] != now[key]:
            return f"{key} was {shorten(before[key])}, now {shorten(now[key])}"
    if found.inputs == wanted.inputs:
        return ""
    inputs = [{line.split(" ", 2)[-1]: line for line in each.inputs} for each in (found, wanted)]
    for path in inputs[0].keys() - inputs[1].keys():
        return f"{shorten(path)} is no longer among the inputs"
    for path in inputs[1].keys() - inputs[0].keys():
        return f"{shorten(path)} is a new input"
    changed = [path for path in inputs[1] if inputs[0][path] != inputs[1][path]]
    return f"{shorten(changed[0])} has changed" if changed else "the inputs had another order"


def _is_whole(path: Path, count: int) -> bool:
    """Return whether a token file of so many tokens is there."""
    try:
        return len(TokenFile(path)) == count
    except UserError:
        return False


# Pieces ---------------------------------------------------------------------------------------------------------------------------------


def _grouped(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Put small files together, so that there are as many pieces as the sizes want, and not as there are files."""
    group: list[Span] = []
    nbytes = 0
    for span in spans:
        if group and nbytes + span.nbytes > SPAN_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(span)
        nbytes += span.nbytes
    if group:
        yield group


def _tokenize(groups: Iterator[list[Span]], folder: Path, reading: Reading, workers: int) -> list[Path]:
    """Write the pieces that are not there, and return all of them in order. A piece without tokens is an empty file."""
    try:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.tmp*"):
            leftover.unlink()
        there = set(os.listdir(folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    jobs = [(folder / f"{number:08d}.bin", group, reading) for number, group in enumerate(groups)]
    sizes = {path: sum(span.nbytes for span in group) for path, group, _ in jobs}
    missing = [job for job in jobs if job[0].name not in there]
    total, done = sum(sizes.values()), sum(sizes[path] for path in sizes if path.name in there)
    first, begin = done, time.monotonic()
    with progress("tokenizing", total, done) as show:
        for path in _in_parallel(missing, workers):
            done += sizes[path]
            show(done, f"{(done - first) / 1e6 / max(time.monotonic() - begin, 1e-3):,.1f} MB/s")
    return list(sizes)


def _in_parallel(jobs: Sequence[tuple[Path, list[Span], Reading]], workers: int) -> Iterator[Path]:
    """Do the jobs, in this process if one worker is wanted; yield each piece when it is there. Raises: UserError."""
    if workers == 1 or len(jobs) <= 1:
        yield from (_write_piece(*job) for job in jobs)
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forked, a process would have the locks of threads that it has not
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin_worker)
    try:
        for future in as_completed([pool.submit(_write_piece, *job) for job in jobs]):
            yield future.result()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:  # nobody waits for what they do
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a process was killed, perhaps for want of memory; take fewer --workers, the same command goes on") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker():
    """Have a worker leave when its parent is gone, which it would not see otherwise; Ctrl-C is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_piece(path: Path, spans: Sequence[Span], reading: Reading) -> Path:
    ids = (part for span in spans for part in tokens_of(span, reading) if len(part))
    first = next(ids, None)
    if first is None:
        write_whole(path, "")
        return path
    with TokenWriter.open(path) as writer:
        writer.append(first)
        for part in ids:
            writer.append(part)
    return path


# Shards ---------------------------------------------------------------------------------------------------------------------------------


def _assemble(pieces: Sequence[Path], folder: Path, settings: Settings) -> dict[str, int]:
    """Copy the pieces' tokens into shards of nearly the same length: a last one of a few tokens would be too short for a batch."""
    counts = [0 if _is_empty(path) else len(TokenFile(path)) for path in pieces]
    ends = list(accumulate(counts, initial=0))
    total = ends[-1]
    val = _val_tokens(total, settings)
    shards, done = {}, 0
    with progress("writing shards", 2 * total) as show:
        for part, begin, end in (("val", 0, val), ("train", val, total)):
            number = -(-(end - begin) // settings.shard_tokens)
            cuts = [begin + (end - begin) * cut // number for cut in range(number + 1)]
            for start, stop in pairwise(cuts):
                name = f"tokens_{part}_{len(shards):06d}.bin"
                if not _is_whole(folder / name, stop - start):
                    with TokenWriter.open(folder / name) as writer:
                        for ids in _tokens_between(pieces, ends, start, stop):
                            writer.append(ids)
                shards[name] = stop - start
                show(done := done + 2 * (stop - start))
    return shards


def _is_empty(path: Path) -> bool:
    with suppress(OSError):
        return path.stat().st_size == 0
    return False


def _val_tokens(total: int, settings: Settings) -> int:
    if settings.val_tokens is not None:
        val, wanted = settings.val_tokens, f"{settings.val_tokens:,} of them"
    elif settings.val_share is not None:
        val, wanted = round(settings.val_share * total), f"{settings.val_share:g} of them"
    else:
        val, wanted = min(VAL_TOKENS, max(total // 10, 1)), "some of them"
    if not 0 < val < total:
        raise UserError(
            f"the inputs have {total:,} tokens, and {wanted} for validation leave nothing for it or for training; choose another part"
        )
    return val


def _tokens_between(pieces: Sequence[Path], ends: Sequence[int], start: int, stop: int) -> Iterator[np.ndarray]:
    """Yield the ids at the places from start to stop of all pieces; piece i has those from ends[i] to ends[i + 1]."""
    at = bisect_right(ends, start) - 1
    while start < stop:
        piece, until = TokenFile(pieces[at]), min(stop, ends[at + 1])
        while start < until:
            ids = piece[start - ends[at] : min(until - ends[at], start - ends[at] + COPY_TOKENS)]
            yield ids
            start += len(ids)
        at = bisect_right(ends, start) - 1
