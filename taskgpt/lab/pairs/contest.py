"""`taskgpt compare --pairs`: every pair in four ways, round after round; or, with weights, for a fixed time in a share."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from taskgpt.errors import UserError, shorten
from taskgpt.files import write_whole
from taskgpt.lab import machine
from taskgpt.lab.pairs import pair_report
from taskgpt.lab.pairs.pair_report import Measured
from taskgpt.lab.pairs.ways import WAYS, Pair, PairFailed, cores_for_pairs
from taskgpt.lab.pairs.words import FLAG, Word
from taskgpt.lab.report import Report, in_range, seconds_in, table_of
from taskgpt.progress import Progress

MOST_WEIGHT = 1000
MOST_SECONDS = 300  # of a turn, well within what a program has to answer in
FILE, PAGE = "pairs.json", "pairs.html"


def compare_pairs(flags: argparse.Namespace) -> int:
    """Measure, print and write; return the exit code: 1 if a program computed different bits, or a pair could not be run.

    `flags`: pairs, a list of two words each; rounds; seconds; weights, None or words N:M; output; wide.
    """
    in_range("--rounds", flags.rounds)
    in_range("--seconds", seconds := seconds_in("--seconds", flags.seconds), 0.001, MOST_SECONDS)
    weights = None if flags.weights is None else weights_of(flags.weights)
    pairs = list(dict.fromkeys(tuple(map(Word.of, pair)) for pair in flags.pairs))
    cores = cores_for_pairs()
    folder = Path(flags.output)
    if (folder / FILE).exists():
        raise UserError(f"--output {flags.output}: holds pairs that were measured; choose another folder")
    verify_memory(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    flags.json = str(folder / FILE)
    report = Report(flags)
    if weights:
        is_whole = fairness(report, pairs, cores, flags.rounds, seconds, weights)
        print(f"wrote      {flags.json}")
        return 0 if is_whole else 1
    found = [Measured(name_of(pair), [word.said for word in pair]) for pair in pairs]
    try:
        with Progress("measuring", len(pairs) * flags.rounds * len(WAYS)) as progress:
            for number, (each, pair) in enumerate(zip(found, pairs, strict=True)):
                measure(each, pair, cores, flags.rounds, seconds, progress, number * flags.rounds * len(WAYS))
    except KeyboardInterrupt:
        tell(report, found, folder)
        raise KeyboardInterrupt(f"interrupted; {folder} holds the rounds that were whole") from None
    return tell(report, found, folder)


def weights_of(word: str) -> tuple[int, int]:
    """Return the two weights of `3:1`. Raises UserError."""
    parts = word.split(":")
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 5 and 1 <= int(part) <= MOST_WEIGHT for part in parts):
        raise UserError(f"--weights {shorten(word)}: wanted two numbers from 1 to {MOST_WEIGHT:,}, for example --weights 3:1")
    return int(parts[0]), int(parts[1])


def verify_memory(pairs: Sequence[Sequence[Word]]) -> None:
    """Raise UserError if both programs of a pair do not fit into memory together."""
    free = machine.free_memory_bytes()
    for pair in pairs:
        if (needed := sum(word.bytes_needed for word in pair)) > free:
            what = f"{needed / 2**30:.1f} GiB at the same time, {free / 2**30:.1f} GiB are free"
            raise UserError(f"{FLAG} {name_of(pair)}: they need {what}; choose smaller graphs")


def name_of(pair: Sequence[Word]) -> str:
    """Return what tables call a pair."""
    return " + ".join(word.said for word in pair)


def measure(each: Measured, pair: Sequence[Word], cores: Sequence[int], rounds: int, seconds: float, progress: Progress, done: int) -> None:
    """Add a pair's turns, the ways in turns, each round beginning with the next. `done`: of the progress, before."""
    try:
        progress.show(done, f"preparing {each.pair}")
        with Pair(pair, cores) as running:
            each.is_exact = running.is_exact
            each.times = running.calibrate(seconds)
            for number in range(rounds):
                first = number % len(WAYS)
                turns = []
                for at, way in enumerate((*WAYS[first:], *WAYS[:first])):
                    progress.show(done + number * len(WAYS) + at, f"round {number + 1}/{rounds}: {each.pair}, {way}")
                    turns.append(running.turn(way, each.times))
                each.turns += turns  # whole rounds alone
    except PairFailed as error:
        each.failed = shorten(error)
        with progress.aside():
            print(f"failed     {each.pair}: {each.failed}", file=sys.stderr)


def tell(report: Report, found: Sequence[Measured], folder: Path) -> int:
    """Print tables, write JSON and page; return the exit code."""
    measured = [each for each in found if each.turns]
    ways, pairs = pair_report.way_rows(measured), pair_report.pair_rows(measured)
    report.table("makespans", pair_report.WAY_COLUMNS, ways, pair_report.DETAILS)
    report.table("pairs", pair_report.PAIR_COLUMNS, pairs)
    report.keep("turns", [asdict(each) for each in found])
    print()
    report.save()
    wrong = [line for each in measured for line in each.different_bits]
    if measured:
        here = {"caption": "machine", "head": ["", ""], "rows": [[key, value] for key, value in machine.describe().items()]}
        tables = [table_of("", pair_report.WAY_COLUMNS, ways), table_of("", pair_report.PAIR_COLUMNS, pairs), here]
        write_whole(folder / PAGE, pair_report.page(ways, tables, wrong))
    for path in (folder / FILE, *[folder / PAGE] * bool(measured)):
        print(f"wrote      {path}")
    print("\n".join(wrong) if wrong else "bits       the same in every way" if measured else "bits       nothing was measured")
    return 1 if wrong or any(each.failed for each in found) else 0


def fairness(
    report: Report, pairs: Sequence[Sequence[Word]], cores: Sequence[int], rounds: int, seconds: float, weights: tuple[int, int]
) -> bool:
    """Run each pair in a share for so many seconds a round; print and write the time of cores that each had; return False if one failed."""
    rows = []
    with Progress("measuring", len(pairs) * rounds) as progress:
        for number, pair in enumerate(pairs):
            try:
                progress.show(number * rounds, f"preparing {name_of(pair)}")
                with Pair(pair, cores) as running:
                    had = []
                    for at in range(rounds):
                        progress.show(number * rounds + at, f"round {at + 1}/{rounds}: {name_of(pair)}")
                        had.append(running.core_seconds(weights, seconds))
                rows.append(pair_report.fairness_row(name_of(pair), weights, had))
            except PairFailed as error:
                with progress.aside():
                    print(f"failed     {name_of(pair)}: {shorten(error)}", file=sys.stderr)
    report.table("fairness", pair_report.FAIRNESS_COLUMNS, rows)
    print()
    report.save()
    return len(rows) == len(pairs)
