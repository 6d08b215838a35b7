"""Find the tile sizes and the scheduler's policy that are fastest for a graph on this machine.

    taskgpt tune --graph gpt2-124m                                     # five minutes at most
    taskgpt tune --graph gpt2-124m:batch.seq_len=96,model.layers=6 --budget 2m --json tuned.json
    taskgpt train --graph tuned/gpt2-124m-tuned.toml --scheduler tuned/native-tuned.toml     # what it has written
    taskgpt train --graph gpt2-124m --tiles auto                       # the tiles that it remembers for this machine and shape

First tilings are simulated, from task times measured with the shipped tiles and sgemm's speed at each shape. Then the best of these, and
what is near the best so far, run in turns against it, and what is slower is dropped; then the policies. At last default and winner run in
turns once more: if the winner is not faster beyond noise, the shipped tiles and settings are kept.
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from taskgpt.config import GraphConfig, load_scheduler
from taskgpt.errors import UserError, run_program
from taskgpt.gpt2.shape import Tiles
from taskgpt.lab import machine
from taskgpt.lab.contests.cells import Cell, Changes, product_of
from taskgpt.lab.contests.turns import CellFailed, Turns
from taskgpt.lab.named import graph_of, make_config, named_config
from taskgpt.lab.report import LEAST_TURNS, Report, median_interval, seconds_in
from taskgpt.lab.tuning import tuned
from taskgpt.lab.tuning.races import FASTER, FINAL_ROUNDS, Race, Search, Track, changes_of
from taskgpt.lab.tuning.tilings import KEYS, Forecast, Space
from taskgpt.programs.arguments import Parser, add_changes, add_graph, add_scheduler, add_wide, add_workers
from taskgpt.progress import Progress
from taskgpt.schedulers.native.policies import POLICIES

EXPLORED = 0.3  # of the budget, when simulations end
FINAL_PART = (0.1, 0.5)  # of the budget, for default against winner: what it needs, between these
CLIMBED = 0.8  # of the rest, when races of tilings end, and those of policies begin
SETTINGS = {
    "policy": tuple(name for name, policy in POLICIES.items() if not policy.complements),
    "immediate_successor": ("true", "false"),
    "work_stealing": ("true", "false"),
}
COLUMNS = {
    "race": ("race", ""),
    "phase": ("phase", ""),
    "tried": ("cell", ""),
    "against": ("against", ""),
    "forecast ms": ("forecast_ms", ".1f"),
    "median ms": ("median_ms", ".1f"),
    "ratio": ("ratio", ".3f"),
    "q1-q3": ("quartiles", ""),
    "rounds": ("rounds", "d"),
    "outcome": ("outcome", ""),
}
DETAILS = ("against", "forecast ms", "q1-q3")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 1 if there was too little time to say what is faster."""
    p = Parser("taskgpt tune", __doc__)
    add_graph(p, "gpt2-124m")
    add_scheduler(p, "native")
    add_workers(p, "default: as many as cores")
    add_changes(p)
    p.add_argument("--budget", default="5m", metavar="TIME", help="how long it may take: 90s, 5m, 1h (default 5m)")
    p.add_argument("--output", default="tuned", metavar="DIR", help="folder for NAME-tuned.toml and native-tuned.toml (default tuned)")
    p.add_argument("--json", metavar="FILE", help="write every value measured")
    add_wide(p)

    def run() -> int:
        flags = p.parse_args(argv)
        flags.argv = list(sys.argv[1:] if argv is None else argv)
        try:
            return tune(flags)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("interrupted; nothing was written") from None

    return run_program("taskgpt tune", run)


def tune(flags: argparse.Namespace) -> int:
    """Search, print what was found, write it. Raises UserError or OSError."""
    begin, budget_s, cores = time.monotonic(), seconds_in("--budget", flags.budget), machine.usable_cores()
    if flags.workers is not None and flags.workers > cores:
        raise UserError(f"--workers {flags.workers}: this machine has {cores} cores to measure on; choose --workers {cores} or fewer")
    (start,) = product_of([flags.graph], flags.tiles, [flags.scheduler], [flags.workers or cores], flags.set)
    start = Cell(start.graph_word, (), start.scheduler_word, (), start.workers)
    if (scheduler := named_config(start.scheduler, start.workers).scheduler) != "native":
        raise UserError(f"--scheduler {flags.scheduler}: wanted native or a variant of it, got {scheduler}; its settings are what is tuned")
    config = make_config(start.graph)
    tuned.graph_text(*graph_of(start.graph), "")  # better refused now than after the search, as is the folder
    tuned.make_folder(Path(flags.output))
    report, space = Report(flags), Space.here(config, start.workers)
    report.line("caches", f"{space.l2_bytes / 2**20:.1f} MiB of L2 and {space.l3_bytes / 2**20:.1f} MiB of L3 a core")
    report.line("shipped", _listed(config.tiles))
    with Progress("tuning", budget_s, None) as progress, Turns() as turns:
        search, final = find(start, space, begin, budget_s, Track(turns.timed), progress.show_time)
    report.keep("forecasts", [{"cell": changes_of(cell), "ms": ms} for cell, ms in search.forecasts.items()])
    report.table("tried", COLUMNS, search.rows(), DETAILS)
    print()
    missing = not_decided(search, final)
    if missing:
        report.line("gain", f"not known yet: {missing}; nothing is written or remembered, give more --budget")
    else:
        leave(flags, config, search.champion, gain_of(final), report)
    report.line("took", f"{time.monotonic() - begin:.0f} s of {budget_s:.0f} s")
    report.save()
    return 1 if missing else 0


def find(start: Cell, space: Space, begin: float, budget_s: float, track: Track, say: Callable[[str], None]) -> tuple[Search, Race | None]:
    """Explore, climb, and race the winner against the start; return the search and its last race. Raises UserError if the start fails."""

    def until(part: float) -> float:
        return begin + part * budget_s

    def with_tiles(others: Callable[[Tiles], list[Tiles]]) -> Callable[[Cell], list[Cell]]:
        return lambda cell: _cells(cell, space.shipped, others(_tiles_in(cell, space.shipped)))

    try:
        ms = track.begin(start)
    except CellFailed as error:
        raise UserError(f"{start}: {error}") from None
    say(f"as shipped: {ms:.1f} ms a step, {track.steps} steps a turn")
    search = Search(start, track, Forecast(start.graph), say)
    search.explore([with_tiles(partial(space.along, key=key)) for key in KEYS], until(EXPLORED))
    few: dict[str | None, Cell] = {}
    for cell in sorted(search.forecasts, key=search.forecast):
        few.setdefault(dict(cell.tiles).get("rows"), cell)  # where forecasts err, they err for all tilings alike: so one of each kind
    least, most = (part * budget_s for part in FINAL_PART)
    last = until(1) - max(least, min(most, FINAL_ROUNDS * track.round_s))
    search.climb("forecast", lambda _: list(few.values()), last)
    search.climb("near", with_tiles(space.neighbours), begin + CLIMBED * (last - begin))
    search.climb("policy", other_settings, last)
    return search, search.finish(until(1))


def _tiles_in(cell: Cell, shipped: Tiles) -> Tiles:
    return dataclasses.replace(shipped, **{key: int(size) for key, size in cell.tiles})


def _cells(cell: Cell, shipped: Tiles, tilings: Sequence[Tiles]) -> list[Cell]:
    """Return the cell with other tiles, each as what it changes of those shipped."""
    changed = [[(key, str(getattr(tiles, key))) for key in KEYS if getattr(tiles, key) != getattr(shipped, key)] for tiles in tilings]
    return [dataclasses.replace(cell, tiles=tuple(changes)) for changes in changed]


def other_settings(cell: Cell) -> list[Cell]:
    """Return the cell with each setting changed that is tuned, one at a time, as what it changes of the scheduler file."""

    def words(scheduler: str) -> dict[str, str]:
        settings = named_config(scheduler, cell.workers).settings
        return {key: _word(getattr(settings, key)) for key in SETTINGS}

    shipped, now = words(cell.scheduler), words(cell.scheduler_word)
    others = [{**now, key: value} for key, values in SETTINGS.items() for value in values if value != now[key]]
    return [
        dataclasses.replace(cell, settings=tuple((key, other[key]) for key in SETTINGS if other[key] != shipped[key])) for other in others
    ]


def not_decided(search: Search, final: Race | None) -> str:
    """Return in words what there was no time for, without which the search says nothing; "" if there was."""
    if not any(race.ratios for race in search.races):
        return "nothing was raced"
    if final is not None and len(final.ratios) < LEAST_TURNS:
        rounds = f"{len(final.ratios)} of the {LEAST_TURNS} rounds at least that tell"
        return f"{changes_of(final.challenger)} against what is shipped had {rounds} ({final.outcome})"
    return ""


def gain_of(final: Race | None) -> str:
    """Return in words what the last race says, which had its rounds."""
    if final is None:
        return "none: nothing tried was faster than what is shipped"
    low, high = median_interval(final.ratios)
    found = (
        f"{median(final.champion_ms):.1f} to {median(final.ms):.1f} ms a step, x {1 / median(final.ratios):.3f} "
        f"({1 / high:.3f}-{1 / low:.3f}, {len(final.ratios)} rounds)"
    )
    if final.outcome == FASTER:
        return found
    return f"none beyond noise: what is shipped is kept; {changes_of(final.challenger)}: {found}"


def leave(flags: argparse.Namespace, config: GraphConfig, cell: Cell, gain: str, report: Report) -> None:
    """Print what was found, and write it: a graph file, a scheduler file, and tiles into the cache."""
    tiles, settings = _tiles_in(cell, config.tiles), named_config(cell.scheduler_word, cell.workers).settings
    changed = _changed(settings)
    report.line("tiles", _listed(tiles))
    report.line("native", ", ".join(f"{key} {getattr(settings, key)}" for key in SETTINGS))
    report.line("gain", gain)
    is_shipped = not cell.tiles and not cell.settings
    where = f"on {machine.describe()['processor']} with {cell.workers} worker{'s' if cell.workers > 1 else ''}"
    found = f"nothing faster than {config.name} was found" if is_shipped else f"faster than {config.name}: {gain}"
    made = f"{datetime.date.today()} {where}: {found}. Made by `{shlex.join(['taskgpt', 'tune', *flags.argv])}`."
    name, overrides = graph_of(cell.graph)
    changes = overrides | {f"tiles.{key}": getattr(tiles, key) for key in KEYS}
    folder, stem = Path(flags.output), config.name.removesuffix("-tuned")
    graph_file, scheduler_file = folder / f"{stem}-tuned.toml", folder / "native-tuned.toml"
    tuned.write(graph_file, tuned.graph_text(name, changes, f"# Tuned {made}"))
    first_line = f"# For {graph_file.name}. Tuned {made} Says what it changes of native."
    tuned.write(scheduler_file, tuned.scheduler_text(changed, flags.workers, first_line))
    report.line("wrote", f"{graph_file}, {scheduler_file}")
    try:
        report.line("remembered", str(tuned.remember(config, cell.workers, tiles, dict(changed), made)))
    except (UserError, OSError) as error:  # the files above are what the time was spent for
        report.line("remembered", f"nothing, so --tiles auto will not find it: {error}")


def _changed(settings: Any) -> Changes:
    """Return what differs from native's defaults, but for the workers, as words."""
    usual = load_scheduler("native").settings
    return tuple((key, _word(value)) for key, value in vars(settings).items() if key != "workers" and value != getattr(usual, key))


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(tiles: Tiles) -> str:
    return ", ".join(f"{key} {size}" for key, size in dataclasses.asdict(tiles).items())


if __name__ == "__main__":
    sys.exit(main())
