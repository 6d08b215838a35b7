"""Logs of a run: the same numbers as JSON lines, as CSV and for TensorBoard, gone on with after --resume; a full disk ends none of it."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from taskgpt.errors import UserError
from taskgpt.runs.logs import CSV_COLUMNS, CURVES, Csv, JsonLines, Logs, TensorBoard
from taskgpt.train import main

TINY = ["--graph", "tiny", "--workers", "2", "--val-every", "3", "--val-batches", "1", "--sample-every", "4"]
DISK = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
READ = """
import json, sys
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
found, curves, texts = EventAccumulator(sys.argv[1], {"tensors": 0}).Reload(), {}, {}
for tag in found.Tags()["tensors"]:
    for each in found.Tensors(tag):
        value = make_ndarray(each.tensor_proto)
        of = (texts, value.item().decode()) if value.dtype == object else (curves, value.item())
        of[0].setdefault(tag, []).append((each.step, of[1]))
print(json.dumps([curves, texts]))
"""  # as TensorBoard itself does; event_accumulator.py beside it forgets no texts


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"To be {n} or not to be {n}, that is the question." for n in range(300)))
    return str(path)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict]:
    """Return the table's rows, with their numbers, None for an empty cell."""
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    return [{key: None if cell == "" else cell if key == "skipped" else float(cell) for key, cell in row.items()} for row in table]


def curves(folder: Path) -> tuple[dict, dict]:
    """Return what TensorBoard's own reader finds: of each tag (step, value), and (step, text)."""
    pytest.importorskip("tensorboard", reason="pip install 'taskgpt[test]'")
    done = subprocess.run([sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def events() -> None:
    pytest.importorskip("tensorboardX", reason="pip install 'taskgpt[tensorboard]'")


def verify_table(table: Path, log: list[dict]) -> None:
    """A row for each step, with the validation before it; one of the validation after the last."""
    found = rows(table)
    assert {row["step"]: row["val_loss"] for row in found if row["val_loss"] is not None} == {
        r["step"]: r["val_loss"] for r in log if "val_loss" in r
    }
    steps = [r for r in log if "train_loss" in r]
    assert [row["step"] for row in found] == [r["step"] for r in steps] + [len(steps)]
    for row, step in zip(found, steps, strict=False):
        assert {key: row[key] for key in step} == step


def verify_events(folder: Path, log: list[dict]) -> None:
    """As float32, in which TensorBoard keeps numbers."""
    found, texts = curves(folder)
    for key, tag in CURVES.items():
        assert found.pop(tag) == [[r["step"], float(np.float32(r[key]))] for r in log if key in r]
    assert not found
    samples = [[r["step"], "    " + r["sample"].replace("\n", "\n    ")] for r in log if "sample" in r]
    assert texts == {"sample/text_summary": samples}


def test_all_logs_say_the_same(text, tmp_path, capsys):
    """Before and after a run goes on from a checkpoint that is earlier than its end; all of them, as if it had never stopped."""
    events()
    run, table = tmp_path / "run", tmp_path / "run.csv"
    flags = [*TINY, "--data", text, "--steps", "12", "--out", str(run), "--csv", str(table), "--tensorboard"]
    assert main([*flags, "--save-every", "4", "--max-tokens", str(256 * 8)]) == 0
    verify_table(table, records(run / "log.jsonl"))
    verify_events(run / "tensorboard", records(run / "log.jsonl"))
    assert main(["--resume", str(run / "step-00000004")]) == 0
    log = records(run / "log.jsonl")
    assert [r["step"] for r in log if "train_loss" in r] == list(range(12))
    verify_table(table, log)
    verify_events(run / "tensorboard", log)
    assert len(list((run / "tensorboard").iterdir())) == 2


def test_a_table_that_was_cut_off(text, tmp_path):
    """In a row, as a killed program leaves it; it goes on without that row."""
    run, table = tmp_path / "run", tmp_path / "run.csv"
    flags = [*TINY, "--data", text, "--steps", "6", "--out", str(run), "--csv", str(table)]
    assert main([*flags, "--max-tokens", str(256 * 3)]) == 0
    with table.open("a") as file:
        file.write("4,1.0,,1.0,1.0,1.0,1.0,\n5,2.")
    assert main(["--resume", str(run)]) == 0
    verify_table(table, records(run / "log.jsonl"))


def test_an_earlier_table_stays_until_there_is_a_step(text, tmp_path, capsys):
    """As an earlier log does; then it is replaced."""
    table = tmp_path / "run.csv"
    table.write_bytes(Csv.head + b"0,1.0,,,,,,\n")
    flags = ["--graph", "tiny", "--data", text, "--val-every", "0", "--sample-every", "0", "--csv", str(table)]
    assert main([*flags, "--steps", "0"]) == 0
    assert rows(table)[0]["train_loss"] == 1.0
    assert "run.csv stays as it was" in capsys.readouterr().out
    assert main([*flags, "--steps", "2"]) == 0
    assert [row["step"] for row in rows(table)] == [0, 1]
    assert rows(table)[0]["train_loss"] > 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--csv", "{folder}/notes.csv"], "notes.csv: is there already and is no table of steps; name another file"),
        (["--csv", "{folder}/none/run.csv"], "run.csv: cannot write: No such file or directory"),
        (["--csv", "{folder}/x", "--log", "{folder}/./x"], "is the log already; name another file"),
        (["--tensorboard"], "--tensorboard: where to? Name a folder, or the run's with --out"),
        (["--tensorboard", "{folder}/notes.csv"], "notes.csv: cannot write: File exists"),
    ],
)
def test_a_mistake_is_one_line(text, tmp_path, capsys, flags, message):
    """With exit code 2, before the first step; what is there stays."""
    if "where to" not in message and "--tensorboard" in flags:
        events()
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    words = [flag.format(folder=tmp_path) for flag in flags]
    assert main(["--graph", "tiny", "--data", text, "--steps", "1", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "step 1/1" not in shown.out
    assert (tmp_path / "notes.csv").read_text() == "a,b\n1,2\n"


def test_without_the_library(text, tmp_path, capsys, monkeypatch):
    """A message says what to install."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["--graph", "tiny", "--data", text, "--steps", "1", "--tensorboard", str(tmp_path / "t")]) == 2
    assert "needs tensorboardX; pip install 'taskgpt[tensorboard]', or take --csv" in capsys.readouterr().err


@DISK
def test_a_full_disk_ends_no_training(text, tmp_path, capsys, monkeypatch):
    """Each log that cannot be written is named once; the run, its other log and its model are whole, and the exit code is 2."""
    events()
    from tensorboardX import record_writer

    monkeypatch.setattr(record_writer, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115 - its writer closes it
    run, model = tmp_path / "run", tmp_path / "model.bin"
    flags = [*TINY, "--data", text, "--steps", "3", "--out", str(run), "--save", str(model)]
    assert main([*flags, "--csv", "/dev/full", "--tensorboard"]) == 2
    out = capsys.readouterr().out
    assert out.count("--csv /dev/full: cannot write: No space left on device; going on without it") == 1
    assert out.count("tensorboard: cannot write: No space left on device; going on without it") == 1
    assert "step 3/3" in out
    assert model.exists()
    assert (run / "step-00000003").is_dir()
    assert "summary" in records(run / "log.jsonl")[-1]


def test_numbers_that_are_not_finite(tmp_path):
    """Null in JSON, which has none; nan and inf in a table, as programs read them; NaN for TensorBoard."""
    events()
    logs = Logs(lambda line: pytest.fail(line))
    for log in (JsonLines(tmp_path / "l", None), Csv(tmp_path / "c", None), TensorBoard(tmp_path / "t", None)):
        logs.add(log)
    logs.begin()
    logs.write({"step": 0, "train_loss": math.nan, "norm": math.inf, "lr": 1e-3, "ms": 1.0, "tokens_per_s": 1.0, "skipped": "loss, norm"})
    logs.write({"summary": {}})
    logs.close()
    assert records(tmp_path / "l")[0]["norm"] is None
    [row] = rows(tmp_path / "c")
    assert math.isnan(row["train_loss"])
    assert row["norm"] == math.inf
    assert row["skipped"] == "loss, norm"
    found, _ = curves(tmp_path / "t")
    assert math.isnan(found["loss/train"][0][1])


def test_event_files_are_read_in_order(tmp_path):
    """A later part of a run has a later name, whatever the clock says: TensorBoard goes by names."""
    events()
    for step in (0, 5, 2):
        log = TensorBoard(tmp_path, step)
        log.begin()
        log.write({"step": step, "val_loss": float(step)})
        log.write({"summary": {}})
        log.close()
    (earlier,) = (int(name.split(".")[3]) for name in sorted(os.listdir(tmp_path))[:1])
    assert [int(name.split(".")[3]) for name in sorted(os.listdir(tmp_path))] == [earlier, earlier + 1, earlier + 2]
    assert curves(tmp_path)[0] == {"loss/validation": [[0, 0.0], [2, 2.0]]}


def test_the_table_is_described():
    """Each column stands in the page of file formats."""
    page = (Path(__file__).parent.parent / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    section = page[page.index("## Table of steps") :]
    assert not [name for name in CSV_COLUMNS if f"`{name}`" not in section]
    assert not [tag for tag in CURVES.values() if f"`{tag}`" not in section]


def test_a_log_of_another_kind_is_refused(tmp_path):
    """JSON lines where a table is wanted, and the other way round."""
    (tmp_path / "l").write_text('{"step": 0}\n')
    (tmp_path / "c").write_bytes(Csv.head)
    with pytest.raises(UserError, match="is no table of steps"):
        Csv(tmp_path / "l", None)
    with pytest.raises(UserError, match="is no log"):
        JsonLines(tmp_path / "c", None)
