"""What a run goes on from: its checkpoints, also with seals that are right, what run.json says, its logs; and curves of them."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from taskgpt.config import load_graph
from taskgpt.errors import UserError
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.shape import Model
from taskgpt.lab import run_page
from taskgpt.lab.curves import terminal
from taskgpt.lab.curves.panels import panels
from taskgpt.lab.curves.run_log import read_all
from taskgpt.runs import start
from taskgpt.runs.console import Console
from taskgpt.runs.folder import Identity, RunFolder
from taskgpt.runs.logs import Csv, JsonLines
from taskgpt.train import parser

from . import Case

MODEL = Model(1, 2, 8, 100, 16)
STEP = "step-00000003"


def _state() -> dict[str, np.ndarray]:
    state = {prefix + name: np.ones(shape, np.float32) for prefix in ("", "m_") for name, shape in MODEL.parameter_shapes().items()}
    return state | {"loss_window": np.ones(4), "seen": np.ones(2, np.int64)}


def _make_checkpoint(folder: Path) -> None:
    about = resumable.About("run", 3, MODEL, {"batches": 7}, "ff", 2.5, "now")
    resumable.save(folder / STEP, about, _state())


def _read_checkpoint(folder: Path) -> None:
    model = resumable.read_shape(folder / STEP)
    resumable.verify(folder / STEP)
    resumable.load(folder / STEP, model, {name: np.empty(shape, np.float32) for name, shape in MODEL.parameter_shapes().items()})
    resumable.load_state(folder / STEP, _state())


def _read_sealed(folder: Path) -> None:
    """Make hashes right that damage has made wrong, as who wants to do harm would; then read."""
    about, tensors = folder / STEP / resumable.ABOUT, folder / STEP / resumable.TENSORS
    if about.is_file() and about.stat().st_size < 1 << 20 and tensors.is_file():
        try:
            content = json.loads(about.read_bytes())
            content["tensors"] |= {"sha256": hashlib.sha256(tensors.read_bytes()).hexdigest(), "bytes": tensors.stat().st_size}
            content.pop("sha256", None)
            about.write_bytes(resumable.sealed(content))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
    _read_checkpoint(folder)


def _make_run(folder: Path) -> None:
    graph = load_graph("tiny")
    RunFolder(folder).describe(
        Identity.new(["--graph=tiny", "--set", "idle=busy", "--steps=7"], graph, {"train": {"shards": [{"sha256": "0"}]}})
    )


def _read_run(folder: Path) -> None:
    run = RunFolder(folder)
    if (identity := run.identity) is None:
        raise UserError(f"{folder}: no run")
    began = start._parsed(parser, identity, run)
    start.as_argv(began, argparse.Namespace(**vars(began)))
    start._difference(identity.data, {"train": {"shards": [{"sha256": "1"}]}})


def _make_log(folder: Path) -> None:
    records = [{"step": n, "train_loss": 5.0 - n, "lr": 1e-4, "ms": 1.0, "tokens_per_s": 9.0} for n in range(5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def _read_log(folder: Path) -> None:
    with Console() as console:
        console.open_logs([JsonLines(folder / "log.jsonl", 3)])


def _make_table(folder: Path) -> None:
    (folder / "steps.csv").write_bytes(Csv.head + b"".join(b"%d,5.0,,1.0,1e-4,1.0,9.0,\n" % n for n in range(5)))


def _read_table(folder: Path) -> None:
    log = Csv(folder / "steps.csv", 3)
    log.begin()
    log.close()


def _read_curves(folder: Path) -> None:
    logs = read_all([folder])
    terminal.draw(panels(logs, [], "step", None), 80)
    run_page.write_of_log(folder / "run.html", logs[0])


CASES = (
    Case("resumable", _make_checkpoint, _read_checkpoint),
    Case("resumable_sealed", _make_checkpoint, _read_sealed),
    Case("run_json", _make_run, _read_run),
    Case("log", _make_log, _read_log),
    Case("table", _make_table, _read_table),
    Case("curves", _make_log, _read_curves),
)
