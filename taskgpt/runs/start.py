"""How a run begins: anew, in a folder or without one, or from a checkpoint of its own."""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskgpt.config import GraphConfig, graph_from, load_graph
from taskgpt.errors import UserError, shorten
from taskgpt.files import as_written, verify_room
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.snapshot import Snapshot
from taskgpt.lab.machine import free_memory_bytes
from taskgpt.runs.folder import RUN, Identity, RunFolder, newest_whole
from taskgpt.runs.logs import Csv, JsonLines, Log, TensorBoard
from taskgpt.runs.saving import Every, Saver

EVENTS = "tensorboard"  # folder in a run's folder
LATEST = "latest"  # of --resume: the newest checkpoint in --out, or a new run if there is none
# Not taken from the command that began a run. Who copied the folder does not know it, and is not to write over files that it names.
NOT_CARRIED = ("out", "resume", "save", "trace", "dashboard", "report", "check", "max_minutes", "max_tokens")
NUMBERS = ("lr", "lr_schedule", "warmup", "final_lr", "weight_decay")  # flags that change what the steps to come compute
FIXED = ("seed", "init")  # flags that a run has once and for all


@dataclass(frozen=True)
class Start:
    """How a run begins. own: what this command itself says, graph and scheduler None where it does not; flags: with what began the run.

    checkpoint, about: what it goes on from; identity, began: what run it is, and the flags that it began with. None for a new run.
    """

    flags: argparse.Namespace
    own: argparse.Namespace
    folder: RunFolder | None = None
    identity: Identity | None = None
    checkpoint: Path | None = None
    about: resumable.About | None = None
    began: argparse.Namespace | None = None

    def graph(self, name: str | None, overrides: dict[str, Any]) -> GraphConfig:
        """Return the graph of a run that goes on: as it was, or the one that is named, with changes. Raises UserError as `load_graph`."""
        if name is not None:
            return load_graph(name, overrides)
        tables = dataclasses.asdict(self.identity.graph)
        return graph_from(tables.pop("name"), tables, overrides)

    def verify(self, graph: GraphConfig, data: dict[str, Any]) -> list[str]:
        """Return notes on what is computed otherwise than when the run began. Raises UserError for what makes another run of it."""
        was, where = self.identity, shorten(self.folder.path)
        for part in ("model", "batch"):
            old, new = dataclasses.asdict(getattr(was.graph, part)), dataclasses.asdict(getattr(graph, part))
            for key, value in new.items():
                if value != old[key]:
                    raise UserError(f"{where}: is a run with {part}.{key} = {old[key]}, got {value}; leave it out, or begin another run")
        if other := _difference(was.data, data):
            raise UserError(f"{where}: is a run on other data: {other}; give the --data that it began with, or begin another run")
        if self.about.run != was.run or self.about.model != was.graph.model:
            raise UserError(f"{shorten(self.checkpoint)}: is a checkpoint of another run; take it away, or begin from it with --init")
        changes = [f"--{name.replace('_', '-')} {getattr(self.flags, name)}" for name in NUMBERS if self._differs(name)]
        if self.flags.lr_schedule != "constant" and self._differs("steps"):
            changes.append(f"--steps {self.flags.steps}")
        for part in ("tiles", "options"):
            if getattr(graph, part) != getattr(was.graph, part):
                changes.append(f"other {part}")
        return [f"{', '.join(changes)}: from here on the run is not what it would have been"] if changes else []

    def _differs(self, name: str) -> bool:
        return getattr(self.flags, name) != getattr(self.began, name)

    def logs(self) -> Iterator[Log]:
        """Yield the logs that the flags ask for; those of an earlier part are gone on with. Raises UserError."""
        flags, resumed = self.flags, self.about.step if self.about else None
        if (log := flags.log or (self.folder and self.folder.log)) is not None:
            yield JsonLines(log, resumed)
        if flags.csv is not None:
            if log is not None and os.path.realpath(log) == os.path.realpath(flags.csv):
                raise UserError(f"--csv {shorten(flags.csv)}: is the log already; name another file")
            yield Csv(flags.csv, resumed)
        if flags.tensorboard == "" and self.folder is None:
            raise UserError("--tensorboard: where to? Name a folder, or the run's with --out")
        if flags.tensorboard is not None:
            yield TensorBoard(flags.tensorboard or self.folder.path / EVENTS, resumed)

    @property
    def best_val_loss(self) -> float:
        """The best validation of the checkpoints that the run keeps, infinity if none has one."""
        there = self.folder.checkpoints
        kept = there[: there.index(self.checkpoint) + 1]
        return min((loss for loss, each in self.folder.validated() if each in kept), default=math.inf)

    def saver(self, m: GPT2, every: Every, argv: list[str], graph: GraphConfig, data: dict[str, Any], report, stop) -> Saver:
        """Return what saves the run, which the folder knows from now on. Raises UserError if nothing could be saved now."""
        nbytes = sum(array.nbytes for array in m.state.values())
        verify_room(self.folder.path / RUN, nbytes)
        was = self.identity
        identity = dataclasses.replace(was, argv=argv, graph=graph) if was else Identity.new(argv, graph, data)
        if identity != was:
            self.folder.describe(identity)
        if was:  # not before: a command that is refused leaves everything where it is
            self._abandon_later(report)
        is_room = m.nbytes + nbytes <= free_memory_bytes()
        if not is_room and every != Every():
            report.tell(
                "note", f"no {nbytes / 2**30:.1f} GiB of memory for a copy: training will stand still while a checkpoint is written"
            )

        def tell(line: str) -> None:
            report.tell("checkpoint", line)
            stop.consequence = saver.left

        saver = Saver(self.folder, identity.run, m, Snapshot(m) if is_room else None, every, self.flags.keep, tell)
        saver.newest = self.checkpoint
        stop.consequence = saver.left
        return saver

    def _abandon_later(self, report) -> None:
        """Put aside the checkpoints that come later than what the run goes on from."""
        there = self.folder.checkpoints
        for later in there[there.index(self.checkpoint) + 1 :]:
            left = self.folder.abandon(later)
            report.say(f"{shorten(later)}: comes later than what the run goes on from; it is {shorten(left)} now")


@contextmanager
def opened(parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str], say: Callable[[str], None]) -> Iterator[Start]:
    """Give what a command begins, its folder locked. Raises UserError."""
    flags = parser().parse_args(argv)
    own = parser().parse_args(argv, argparse.Namespace(graph=None, scheduler=None))
    with ExitStack() as stack:
        if (path := _folder_of(flags)) is None:
            yield Start(flags, own)
            return
        if flags.resume not in (None, LATEST) and not path.is_dir():
            raise UserError(f"--resume {shorten(flags.resume)}: no such folder; name a run's folder, or one of its checkpoints")
        if flags.resume not in (None, LATEST) and not (path / RUN).exists():
            raise UserError(f"{shorten(path)}: has no {RUN}, without which nothing goes on; get it back, or begin from it with --init")
        folder = stack.enter_context(RunFolder(path))
        flags.out, found, identity = str(path), folder.checkpoints, folder.identity
        if flags.resume is None and found:
            do = f"continue it with --resume {shorten(path)}, or name another folder"
            raise UserError(f"--out {shorten(path)}: holds a run already, up to {found[-1].name}; {do}")
        if flags.resume in (None, LATEST) and not found:
            if flags.resume:
                say(f"{shorten(path)}: no checkpoint yet; a new run begins")
            yield Start(flags, own, folder)
            return
        if identity is None:
            raise UserError(f"{shorten(path)}: has no {RUN}, without which nothing goes on; get it back, or begin from it with --init")
        yield _resumed(parser, argv, flags, own, folder, identity, found)


def as_argv(flags: argparse.Namespace, default: argparse.Namespace) -> list[str]:
    """Return a command's flags as its run's folder keeps them: those that another command may take over, where they say something."""
    words = []
    for name, value in vars(flags).items():
        if name not in NOT_CARRIED and value != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag, *_once(value)] if isinstance(value, list) else [f"{flag}={value}"]
    return words


def _once(words: list[str]) -> list[str]:
    """Return each word once, where it stood last: a command that is given again adds its own to those that it gave before."""
    return list(dict.fromkeys(reversed(words)))[::-1]


def _folder_of(flags: argparse.Namespace) -> Path | None:
    """Return the folder that the flags name. Raises UserError if they name none, or two."""
    if flags.resume in (None, LATEST):
        if flags.resume and flags.out is None:
            raise UserError("--resume latest: of which run? Name its folder, with --out or as --resume FOLDER")
        return None if flags.out is None else Path(flags.out)
    named = Path(flags.resume)
    run = _run_of(named) if (named / resumable.ABOUT).exists() else named
    if flags.out is not None and Path(flags.out).resolve() != run.resolve():
        do = "a run goes on in its own folder; to branch off, take --init in the place of --resume"
        raise UserError(f"--resume {shorten(flags.resume)} --out {shorten(flags.out)}: {do}")
    return run


def _run_of(checkpoint: Path) -> Path:
    """Return the folder that a checkpoint lies in, which may be named by a link to it, or by `.`."""
    run = checkpoint.parent
    return run if checkpoint.name and (run / RUN).exists() else checkpoint.resolve().parent


def _resumed(parser, argv, flags, own, folder: RunFolder, identity: Identity, found: list[Path]) -> Start:
    """Return the start of a run that goes on, with the flags that it began with where the command says nothing else."""
    named = Path(flags.resume) / "" if flags.resume != LATEST else folder.path
    if (named / resumable.ABOUT).exists():
        checkpoint = next((each for each in found if each.resolve() == named.resolve()), None)
        if checkpoint is None:
            raise UserError(f"--resume {shorten(flags.resume)}: a run goes on from what is named step-...; rename it")
        about = resumable.verify(checkpoint)
    elif not found:
        raise UserError(f"--resume {shorten(flags.resume)}: there is no checkpoint; give the command that began the run again")
    else:
        checkpoint, about = newest_whole(found, _ask)
    if (name := folder.checkpoint(about.step).name) != checkpoint.name:  # else it would count as newer, or older, than it is
        raise UserError(f"{shorten(checkpoint)}: is a checkpoint after {about.step:,} steps; rename it to {name}")
    began = _parsed(parser, identity, folder)
    default = parser().parse_args([])
    carried = vars(began) | {name: getattr(default, name) for name in NOT_CARRIED}
    if own.scheduler is not None:  # which need not know the keys of the other one
        carried["set"] = [word for word in carried["set"] if "." in word.partition("=")[0]]
    flags = parser().parse_args(argv, argparse.Namespace(**carried))
    flags.out = str(folder.path)
    for name in FIXED:
        if getattr(flags, name) != getattr(began, name):
            was, got = (shorten(getattr(each, name)) for each in (began, flags))
            raise UserError(f"{shorten(folder.path)}: is a run with --{name} {was}, got {got}; leave it out, or begin another run")
    if flags.steps < about.step:
        raise UserError(f"{shorten(checkpoint)}: {about.step:,} steps are done already, got --steps {flags.steps}; give as many or more")
    return Start(flags, own, folder, identity, checkpoint, about, began)


def _difference(was: Any, now: Any, where: str = "") -> str:
    """Return in words where two values for JSON differ, "" where nowhere; files may have other names."""
    if isinstance(was, dict) and isinstance(now, dict) and was.keys() == now.keys():
        return next((found for key in was if key != "name" and (found := _difference(was[key], now[key], f"{where} {key}"))), "")
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        return next((found for at in range(len(was)) if (found := _difference(was[at], now[at], f"{where} {at + 1}"))), "")
    return "" if was == now else f"{where.strip()} was {as_written(was)}, is {as_written(now)}"


def _parsed(parser, identity: Identity, folder: RunFolder) -> argparse.Namespace:
    """Return the flags of the command that began a run. Raises UserError for what is no command of this version."""
    where = f"{shorten(folder.path / RUN)}: argv"
    p = parser()

    def refuse(message: str) -> None:
        raise UserError(message)

    p.error = refuse
    if {"-h", "--help", "--version"} & {*identity.argv}:
        raise UserError(f"{where}: no command that trains; begin from its checkpoint with --init")
    try:
        return p.parse_args(identity.argv)
    except UserError as error:
        raise UserError(f"{where}: {shorten(error)}; begin from its checkpoint with --init") from None


def _ask(message: str) -> bool:
    """Ask whether to go on from the checkpoint before a damaged one; no where nobody can answer."""
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(message, file=sys.stderr)
    print("Go on from there? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
