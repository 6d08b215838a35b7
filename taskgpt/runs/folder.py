"""The folder of a run, `--out`: what the run is, its checkpoints and its log; used by one program at a time.

run.json         what the run is: its command, its graph file's numbers, what its data is
log.jsonl        losses, norms, samples, a JSON object a line
step-00000100/   a checkpoint (gpt2/checkpoints/resumable.py); the last few of them are kept, and the one with the best validation
"""

import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from taskgpt.config import GraphConfig
from taskgpt.errors import UserError, shorten
from taskgpt.files import cannot_write, fill, read_json, refuse_newer, write_whole
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.lab.curves.run_log import LOG, RUN

LOCK = ".lock"
FORMAT = 1


@dataclass(frozen=True)
class Identity:
    """What run.json says. argv: the flags that the run was given last; data: the fingerprint of what it trains on."""

    run: str
    argv: list[str]
    graph: GraphConfig
    data: dict[str, Any]
    made: str
    format: int = FORMAT
    taskgpt: str = field(default_factory=lambda: version("taskgpt"))

    @classmethod
    def new(cls, argv: list[str], graph: GraphConfig, data: dict[str, Any]) -> "Identity":
        return cls(uuid.uuid4().hex, argv, graph, data, now())


def now() -> str:
    """Return the time of day, for people; nothing depends on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


class RunFolder:
    """A run's folder, locked inside a `with` block. Raises UserError, there, if another program uses it, or if it cannot be made."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(self.path / LOCK)

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            for left in self.path.glob(".step-*"):  # of a run that was killed while it wrote or removed a checkpoint
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            raise UserError(
                f"{shorten(self.path)}: another run is using this folder; wait for its end, or name another with --out"
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @property
    def log(self) -> Path:
        return self.path / LOG

    @property
    def identity(self) -> Identity | None:
        """What run is here, None if there is none. Raises UserError if run.json is damaged, or of a newer taskgpt."""
        file = self.path / RUN
        if not file.exists():
            return None
        content = read_json(file)
        refuse_newer(content, FORMAT, file)
        match content:
            case {"graph": {"options": dict(options)}}:
                options.setdefault("products", "blas")  # what runs had that began before there were others
        return fill(Identity, content, f"{shorten(file)}: ")

    def describe(self, identity: Identity) -> None:
        """Write down what the run is, a new one or one that goes on otherwise. Raises UserError."""
        write_whole(self.path / RUN, json.dumps(dataclasses.asdict(identity), indent=1) + "\n")

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, the newest last."""
        return resumable.checkpoints_in(self.path)

    def checkpoint(self, step: int) -> Path:
        """Return the name of the checkpoint after so many steps."""
        return self.path / resumable.NAME.format(step)

    def abandon(self, checkpoint: Path) -> Path:
        """Rename a checkpoint that the run will not go on from, so that it is none of the run's any more; return its new name."""
        left = checkpoint.with_name(f"abandoned-{checkpoint.name}")
        number = 1
        while left.exists():
            number += 1
            left = checkpoint.with_name(f"abandoned-{checkpoint.name}-{number}")
        try:
            checkpoint.rename(left)
        except OSError as error:
            raise cannot_write(checkpoint, error) from None
        return left

    def validated(self) -> Iterator[tuple[float, Path]]:
        """Yield (validation loss, checkpoint) of those that have one, the newest last."""
        for each in self.checkpoints:
            with suppress(UserError):  # a damaged one has no validation, and goes when its time has come
                if (loss := resumable.read_about(each).val_loss) is not None:
                    yield loss, each

    def prune(self, keep: int) -> None:
        """Remove all checkpoints but the last `keep`, and the one with the best validation."""
        best = min(self.validated(), default=(0, None))[1]
        for each in self.checkpoints[:-keep]:
            if each != best:
                going = each.with_name(f".{each.name}.going")  # whoever is killed now leaves no part of one under its name
                with suppress(OSError):
                    each.rename(going)
                    shutil.rmtree(going)


def newest_whole(checkpoints: list[Path], may_go_back: Callable[[str], bool]) -> tuple[Path, resumable.About]:
    """Return the newest checkpoint and what it says; the one before it if that is damaged and `may_go_back` says yes to the message.

    Raises UserError.
    """
    *earlier, newest = checkpoints
    try:
        return newest, resumable.verify(newest)
    except UserError as error:
        if not earlier:
            raise
        if not may_go_back(f"{error}\nThe checkpoint before it is {shorten(earlier[-1])}."):
            raise UserError(f"{error}; the one before it: --resume {shorten(earlier[-1])}") from None
        return newest_whole(earlier, may_go_back)
