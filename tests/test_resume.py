"""Checkpoints of a run: made while it trains, whole or not at all, and gone on from to the same bits; and what is refused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plain_schedulers import scheduler
from programs import started
from safetensors.numpy import load_file

from taskgpt.__main__ import main as taskgpt
from taskgpt.errors import Interrupted, UserError
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import Batch, Model, Options, Tiles
from taskgpt.gpt2.snapshot import Snapshot
from taskgpt.runs import folder as folders
from taskgpt.runs import start as starts
from taskgpt.runs.folder import RunFolder
from taskgpt.runs.saving import Every, Saver
from taskgpt.tasks import TaskError
from taskgpt.train import main

SCHEDULERS = [
    ["native", "--workers", "2"],
    ["sequential"],
    ["loops"],
    ["threads"],
    ["local-cluster", "--workers", "1", "--set", "processes=true", "coarsen=10"],
]
TINY = ["--graph", "tiny", "--scheduler", "native", "--val-every", "3", "--val-batches", "1", "--sample-every", "5"]
SHAPE = Model(2, 2, 16, 100, 8), Batch(2, 8), Tiles(8, 16, 4, 1, 32)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"To be {n} or not to be {n}, that is the question." for n in range(300)))
    return str(path)


def trained(*flags: object) -> dict:
    """Train; return the summary, the log's last record."""
    flags = [*map(str, flags)]
    assert main(flags) == 0
    out = flags[flags.index("--out") + 1] if "--out" in flags else flags[flags.index("--resume") + 1]
    return records(Path(out))[-1]["summary"]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    """Return what a run's log says, but for what differs from run to run."""
    return [
        {key: value for key, value in each.items() if key not in ("ms", "tokens_per_s")} for each in records(run) if "summary" not in each
    ]


@pytest.fixture(autouse=True, scope="module")
def patient():
    """Have each checkpoint written before training goes on: which ones there are does not depend on the disk or on other threads then."""
    enter, begin = Saver.__enter__, Saver.write

    def entered(self: Saver) -> Saver:
        enter(self)
        self.wait()  # for the thread that takes the copy's memory: a checkpoint due meanwhile would be made later
        return self

    def write(self: Saver) -> None:
        begin(self)
        self.wait()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Saver, "__enter__", entered)
        patched.setattr(Saver, "write", write)
        yield


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """Return the folder of a run of 12 steps that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trained(*TINY, "--data", text, "--steps", 12, "--out", run)
    return run


@pytest.fixture(scope="module")
def ended(text, tmp_path_factory) -> Path:
    """Return the folder of a run of 12 steps that has been ended after 7, with checkpoints after 6 and 7."""
    run = tmp_path_factory.mktemp("ended") / "run"
    trained(*TINY, "--data", text, "--steps", 12, "--out", run, "--save-every", 3, "--max-tokens", 7 * 256)
    assert [each.name for each in RunFolder(run).checkpoints] == ["step-00000006", "step-00000007"]
    return run


@pytest.fixture
def half(ended, tmp_path) -> Path:
    """Return a copy of it, for one test."""
    return shutil.copytree(ended, tmp_path / "run")


@pytest.fixture(scope="module")
def every_step(text, tmp_path_factory) -> Path:
    """Return the folder of a run of 12 steps with a checkpoint after each."""
    run = tmp_path_factory.mktemp("every") / "run"
    trained(*TINY, "--data", text, "--steps", 12, "--out", run, "--save-every", 1, "--keep", 20)
    return run


def refused(capsys, *flags: object) -> str:
    """Return the one line that a command ends with."""
    capsys.readouterr()
    assert main([*map(str, flags)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("taskgpt train: error: ")


# Going on ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda words: words[0])
def test_a_run_goes_on_as_if_never_stopped(scheduler, whole, half):
    """Same parameters, losses, validations and samples, whatever the scheduler of the second part."""
    summary = trained("--resume", half, "--scheduler", *scheduler)
    assert summary["parameters_sha256"] == records(whole)[-1]["summary"]["parameters_sha256"]
    assert untimed(half) == untimed(whole)


def test_state_is_the_same_in_every_bit(whole, half):
    """Moments too, which the parameters do not show."""
    trained("--resume", half)
    for name in ("run.json", "log.jsonl"):
        assert (half / name).exists()
    wanted, got = (load_file(RunFolder(run).checkpoint(12) / resumable.TENSORS) for run in (whole, half))
    assert wanted.keys() == got.keys()
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)


def test_a_checkpoint_made_while_training_goes_on_is_of_its_step(text, half, tmp_path):
    """What was copied by tasks in the middle of a run of steps is what a run has that ends there."""
    trained(*TINY, "--data", text, "--steps", 6, "--out", tmp_path / "six")
    wanted, got = (load_file(RunFolder(run).checkpoint(6) / resumable.TENSORS) for run in (tmp_path / "six", half))
    assert all(np.array_equal(wanted[name], got[name]) for name in wanted)


def test_the_command_that_began_may_be_given_again(text, half, whole):
    """As a batch system does when it puts a job in its queue again."""
    trained(*TINY, "--data", text, "--steps", 12, "--save-every", 3, "--resume", "latest", "--out", half)
    assert untimed(half) == untimed(whole)


def test_the_first_time_there_is_nothing_to_resume(text, tmp_path, capsys):
    """`--resume latest` begins a run where there is none."""
    trained(*TINY, "--data", text, "--steps", 1, "--resume", "latest", "--out", tmp_path / "run")
    assert "no checkpoint yet; a new run begins" in capsys.readouterr().out


def test_what_a_part_changed_holds_for_the_next(half, capsys):
    """A run goes on with what it was given last, and says once that it is another run from there on."""
    trained("--resume", half, "--steps", 20, "--lr", "1e-3", "--max-tokens", 9 * 256)
    assert "--lr 0.001: from here on the run is not what it would have been" in capsys.readouterr().out
    trained("--resume", half)
    assert "from here on" not in capsys.readouterr().out
    steps = [each for each in records(half) if "train_loss" in each]
    assert [each["lr"] for each in steps] == [1e-4] * 7 + [1e-3] * 13


def test_a_command_given_many_times(half):
    """What it says does not add up in run.json."""
    for steps in (8, 9, 10):
        trained("--resume", half, "--steps", steps, "--set", "idle=busy", "policy=oldest_first", "--tiles", "rows=16")
    argv = json.loads((half / "run.json").read_text())["argv"]
    assert [argv.count(word) for word in ("idle=busy", "policy=oldest_first", "rows=16")] == [1, 1, 1]


@pytest.mark.parametrize("named", ["link", "."])
def test_a_checkpoint_by_a_link_or_from_inside(named, half, whole, tmp_path, monkeypatch):
    """The run is the one that the checkpoint lies in."""
    (tmp_path / "link").symlink_to(RunFolder(half).checkpoint(6))
    monkeypatch.chdir(RunFolder(half).checkpoint(6) if named == "." else tmp_path)
    assert main(["--resume", named]) == 0
    assert untimed(half) == untimed(whole)
    assert not (tmp_path / ".lock").exists()


def test_an_earlier_checkpoint_by_name(half, whole, capsys):
    """What comes later is put aside, not lost."""
    trained("--resume", half, "--steps", 8, "--lr", 1)
    later = load_file(RunFolder(half).checkpoint(8) / resumable.TENSORS)
    folder = RunFolder(half)
    assert main(["--resume", str(folder.checkpoint(7)), "--steps", "12", "--lr", "1e-4"]) == 0
    assert f"it is {half}/abandoned-step-00000008 now" in capsys.readouterr().out
    aside = load_file(half / "abandoned-step-00000008" / resumable.TENSORS)
    assert all(np.array_equal(aside[name], later[name]) for name in later)
    assert untimed(half) == untimed(whole)


@pytest.mark.parametrize("step", range(1, 12))
def test_from_any_step(step, every_step, whole, tmp_path):
    """Before a validation, between two, right after a sample: each checkpoint leads to the same end."""
    run = shutil.copytree(every_step, tmp_path / "run")
    assert main(["--resume", str(RunFolder(run).checkpoint(step))]) == 0
    assert untimed(run) == untimed(whole)


def test_a_log_cut_off_in_a_line(half, whole):
    """As a killed program leaves it; and with a step that no checkpoint holds."""
    with (half / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "train_loss": 1.0, "ms": 1, "tokens_per_s": 1, "lr": 1}\n{"step": 8, "tra')
    trained("--resume", half)
    assert untimed(half) == untimed(whole)


def test_a_log_damaged_in_its_middle(half, whole):
    """Only the line that is damaged is lost."""
    lines = (half / "log.jsonl").read_text().splitlines(keepends=True)
    (half / "log.jsonl").write_text("".join([*lines[:2], lines[2][:9] + "\n", *lines[3:]]))
    trained("--resume", half)
    told = untimed(whole)
    assert untimed(half) == told[:2] + told[3:]


def test_killed_between_the_last_checkpoint_and_the_summary(whole, tmp_path):
    """Nothing is left to train, and the log gets its end; where it has one, it stays as it is."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    log = run / "log.jsonl"
    complete = log.read_bytes()
    trained("--resume", run)
    assert log.read_bytes() == complete
    log.write_bytes(complete[: complete.rindex(b'{"summary"')])
    summary = trained("--resume", run)
    assert summary["parameters_sha256"] == records(whole)[-1]["summary"]["parameters_sha256"]
    assert untimed(run) == untimed(whole)


@pytest.mark.parametrize("options", [{}, {"kernels": "separate", "update": "separate", "skip_loss_z": 3.0}], ids=["fused", "separate"])
def test_a_snapshot_runs_between_steps(options):
    """The copies are the state after the step before, to the bit; the steps do not notice."""
    with scheduler("native", workers=2, spins=1000) as native:
        models = [GPT2(*SHAPE, Options("matrices", **options)) for _ in range(2)]
        graphs, hashes = [], []
        for m in models:
            m.initialize(1)
            m.set_hyper(0, 1e-3, 0.1)
            graphs.append(training_graph(m))
        snapshot = Snapshot(models[0])
        for _ in native.run_each([graphs[0], snapshot.graph, graphs[0]]):
            pass
        native.run(graphs[1])
        assert snapshot.state.keys() == models[1].state.keys()
        assert all(np.array_equal(array, models[1].state[name]) for name, array in snapshot.state.items())
        native.run(graphs[1])
        hashes = [m.parameters_sha256() for m in models]
        assert hashes[0] == hashes[1]


# When ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [SCHEDULERS[0], SCHEDULERS[-1]], ids=lambda words: words[0])
def test_signals_of_a_batch_system(scheduler, text, tmp_path):
    """SIGUSR1 has a checkpoint made, and training goes on; SIGTERM ends it with one. They come to all processes of the run."""
    run = tmp_path / "run"
    argv = [sys.executable, "-u", "-m", "taskgpt.train", *TINY, "--data", text, "--steps", "1000000", "--out", str(run)]
    with started([*argv, "--scheduler", *scheduler], start_new_session=True) as process:
        said = []
        while not (line := process.stdout.readline()).startswith("step 3/"):
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGUSR1)
        while not (line := process.stdout.readline()).startswith("checkpoint"):
            assert line, process.stderr.read()
        said.append(line)
        assert process.stdout.readline()
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert "behind training" in said[0]
    first, last = RunFolder(run).checkpoints
    assert f"checkpoint {last}" in out
    assert f"go on with taskgpt train --resume {run}" in out
    assert resumable.verify(last).step > resumable.verify(first).step


def test_time_is_over(text, tmp_path, capsys):
    """--max-minutes ends the run with a checkpoint, and all is well."""
    run = tmp_path / "run"
    summary = trained(*TINY, "--data", text, "--steps", 1000000, "--out", run, "--max-minutes", 0.01)
    assert 0 < summary["steps"] == resumable.verify(run).step < 1000000


def test_the_time_of_day_does_not_matter(text, tmp_path, monkeypatch):
    """A clock that is set back, to before 1970, delays no checkpoint."""
    clock = iter(range(1, -(10**9), -1000))
    monkeypatch.setattr("time.time", lambda: next(clock))
    run = tmp_path / "run"
    trained(*TINY, "--data", text, "--steps", 30, "--out", run, "--save-every", "0.001s", "--keep", 1000)
    assert len(RunFolder(run).checkpoints) > 3


def test_the_last_few_and_the_best_are_kept(tmp_path):
    """Of the others nothing is left."""
    state = {"wte": np.arange(6, dtype=np.float32)}
    with RunFolder(tmp_path / "run") as folder:
        for step, loss in enumerate([9.0, 3.0, None, 4.0, 5.0, None]):
            about = resumable.About("run", step, SHAPE[0], {}, "1", loss, "now")
            resumable.save(folder.checkpoint(step), about, state)
            folder.prune(2)
        assert [each.name for each in folder.checkpoints] == ["step-00000001", "step-00000004", "step-00000005"]
        assert sorted(os.listdir(folder.path)) == [".lock", "step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "10", "ten", "0m", "-5m", "m", "1" * 12])
def test_how_often(word, text, tmp_path, capsys):
    """Steps, or a time with its unit; anything else is refused before any work."""
    flags = [*TINY, "--data", text, "--steps", "0", "--out", tmp_path, f"--save-every={word}"]
    if word == "10":
        assert main([*map(str, flags)]) == 0
    else:
        assert refused(capsys, *flags).startswith(f"--save-every {word}: wanted a ")


# What is refused -------------------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_anywhere_is_found(half):
    """In either file, at its ends and in between; the message names the file."""
    checkpoint, choose = RunFolder(half).checkpoints[-1], random.Random(0)
    for name in (resumable.ABOUT, resumable.TENSORS):
        file = checkpoint / name
        good = file.read_bytes()
        for at in [0, 7, 8, len(good) - 1, *(choose.randrange(len(good)) for _ in range(60))]:
            file.write_bytes(good[:at] + bytes([good[at] ^ 1 << choose.randrange(8)]) + good[at + 1 :])
            with pytest.raises(UserError, match=re.escape(name)):
                resumable.verify(checkpoint)
        for end in (0, 1, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:end])
            with pytest.raises(UserError, match=re.escape(name)):
                resumable.verify(checkpoint)
        file.write_bytes(good)
    resumable.verify(checkpoint)


def damage(checkpoint: Path) -> None:
    with (checkpoint / resumable.TENSORS).open("r+b") as file:
        file.seek(5000)
        file.write(bytes([file.read(1)[0] ^ 1]) if file.seek(5000) else b"")


def test_after_a_damaged_checkpoint_the_one_before_it(half, whole, capsys):
    """It is named, and taken by name; the damaged one is put aside."""
    folder = RunFolder(half)
    damage(folder.checkpoint(7))
    message = refused(capsys, "--resume", half)
    assert message.startswith(f"{folder.checkpoint(7)}/tensors.safetensors: damaged: ")
    assert message.endswith(f"; the one before it: --resume {folder.checkpoint(6)}")
    assert main(["--resume", str(folder.checkpoint(6))]) == 0
    assert untimed(half) == untimed(whole)


def test_after_a_damaged_checkpoint_the_one_before_it_after_asking(half, whole, monkeypatch):
    """Who sits at a terminal is asked."""
    damage(RunFolder(half).checkpoint(7))
    asked = []
    monkeypatch.setattr(starts, "_ask", lambda message: bool(asked.append(message)) or True)
    trained("--resume", half)
    assert len(asked) == 1
    assert untimed(half) == untimed(whole)


def edited(checkpoint: Path, **changes: object) -> None:
    """Change what checkpoint.json says, and seal it again."""
    content = json.loads((checkpoint / resumable.ABOUT).read_text())
    del content["sha256"]
    content["about"] |= changes
    (checkpoint / resumable.ABOUT).write_bytes(resumable.sealed(content))


def test_of_a_newer_taskgpt(half, capsys):
    """The message says which one, and what to do; nothing else of the file is looked at."""
    edited(RunFolder(half).checkpoint(7), format=2, taskgpt="9.9", more=[1])
    message = refused(capsys, "--resume", RunFolder(half).checkpoint(7))
    assert message.endswith("checkpoint.json: format 2, wanted 1 at most: taskgpt '9.9' has made it; update taskgpt")


def test_of_another_run_or_model(half, text, tmp_path, capsys):
    """A checkpoint that was copied here, one of another shape, other data, another seed, another batch."""
    folder = RunFolder(half)
    other = tmp_path / "text.txt"
    other.write_text(Path(text).read_text().replace("question", "answer"))
    for flags, message in {
        ("--seed", 7): "is a run with --seed 42, got 7; leave it out, or begin another run",
        ("--data", other): "is a run on other data: train shards 1 tokens was ",
        ("--batch-size", 2): "is a run with batch.batch_size = 4, got 2; leave it out, or begin another run",
        ("--set", "model.layers=3"): "is a run with model.layers = 2, got 3; leave it out, or begin another run",
        ("--graph", "gpt2-124m"): "is a run with model.layers = 2, got 12; leave it out, or begin another run",
    }.items():
        assert refused(capsys, "--resume", half, *flags).startswith(f"{half}: {message}")
    edited(folder.checkpoint(7), run="0" * 32)
    assert "step-00000007: is a checkpoint of another run; take it away" in refused(capsys, "--resume", half)


def test_what_is_refused_changes_nothing(half, text, tmp_path, capsys):
    """No checkpoint is put aside, and run.json says what it said, when a command that names an earlier checkpoint is not carried out."""
    run, there = (half / "run.json").read_text(), sorted(os.listdir(half))
    other = tmp_path / "text.txt"
    other.write_text(Path(text).read_text().replace("question", "answer"))
    earlier = RunFolder(half).checkpoint(6)
    assert "is a run on other data" in refused(capsys, "--resume", earlier, "--data", other)
    assert "6 steps are done already, got --steps 5; give as many or more" in refused(capsys, "--resume", earlier, "--steps", 5)
    assert "7 steps are done already, got --steps 0; " in refused(capsys, "--resume", half, "--steps", 0)
    about = json.loads((earlier / resumable.ABOUT).read_text())["about"]
    edited(earlier, train_data=about["train_data"] | {"place": 10**6})
    assert "is behind the end of the data" in refused(capsys, "--resume", earlier, "--lr", 1)
    assert (half / "run.json").read_text() == run
    assert sorted(os.listdir(half)) == there


def test_a_name_that_says_another_step(half, capsys):
    """It would count as newer than it is, and stay when newer ones go."""
    folder = RunFolder(half)
    folder.checkpoint(7).rename(folder.checkpoint(99))
    message = f"{half}/step-00000099: is a checkpoint after 7 steps; rename it to step-00000007"
    assert refused(capsys, "--resume", half) == message
    folder.checkpoint(99).rename(half / "abandoned-step-00000007")
    assert "goes on from what is named step-...; rename it" in refused(capsys, "--resume", half / "abandoned-step-00000007")


@pytest.mark.parametrize("sampler", ["zz", "", "0", "f" * 17, "-1", "0x1", "1\n"])
def test_random_numbers_that_are_none(sampler, half, capsys):
    """The file and the key are named."""
    edited(RunFolder(half).checkpoint(7), sampler=sampler)
    assert "checkpoint.json: about: sampler: wanted the hexadecimal digits" in refused(capsys, "--resume", half)


def test_a_cursor_behind_the_end(half, capsys):
    """The data's own reader says what is wrong with it; nothing is changed."""
    content = json.loads((RunFolder(half).checkpoint(7) / resumable.ABOUT).read_text())["about"]["train_data"]
    edited(RunFolder(half).checkpoint(7), train_data=content | {"place": 10**6})
    assert "is behind the end of the data" in refused(capsys, "--resume", half)


def test_a_folder_that_holds_a_run(half, text, capsys):
    """Nothing begins over a run; a run goes on in its own folder."""
    assert "holds a run already, up to step-00000007; continue it with --resume" in refused(capsys, *TINY, "--data", text, "--out", half)
    assert "a run goes on in its own folder" in refused(capsys, "--resume", half, "--out", f"{half}2")
    assert "no such folder" in refused(capsys, "--resume", f"{half}2")
    assert refused(capsys, "--resume") == "--resume latest: of which run? Name its folder, with --out or as --resume FOLDER"
    (half / "run.json").unlink()
    assert "has no run.json" in refused(capsys, "--resume", half)


def test_run_json_is_not_trusted(half, capsys):
    """No flag of another program, no help that ends the program, no file that is written without being asked for."""
    good = json.loads((half / "run.json").read_text())
    for argv, message in {
        ("--help",): "argv: no command that trains",
        ("--scheduler",): "argv: argument --scheduler: ",
        ("--eval=1",): "argv: unrecognized arguments: --eval=1",
        ("--steps=x",): "argv: argument --steps: wanted an integer",
    }.items():
        (half / "run.json").write_text(json.dumps(good | {"argv": argv}))
        assert message in refused(capsys, "--resume", half)
    written, settings = half / "trace", half / "settings.json"
    settings.write_text('{"a": 1}')
    outputs = [f"--trace={written}", f"--report={written}.html", f"--save={written}.bin"]
    (half / "run.json").write_text(json.dumps(good | {"argv": [*good["argv"], *outputs, f"--log={settings}"]}))
    assert "is there already and is no log" in refused(capsys, "--resume", half)
    assert settings.read_text() == '{"a": 1}'
    (half / "run.json").write_text(json.dumps(good | {"argv": [*good["argv"], *outputs]}))
    trained("--resume", half)
    assert not list(half.glob("trace*"))
    for content in ("", "[]", '{"format": 2}', json.dumps(good | {"graph": {}}), json.dumps(good | {"argv": "x"})):
        (half / "run.json").write_text(content)
        assert str(half / "run.json") in refused(capsys, "--resume", half)


def test_two_runs_in_one_folder(half, text, capsys):
    """The second is refused while the first one lives, and only then."""
    with RunFolder(half):
        assert refused(capsys, "--resume", half).startswith(f"{half}: another run is using this folder")
    trained("--resume", half)


def test_a_killed_writer_leaves_nothing_that_counts(half):
    """What it had begun is removed when the run goes on."""
    shutil.copytree(RunFolder(half).checkpoint(7), half / ".step-00000008.tmp1")
    (half / ".step-00000008.tmp1" / resumable.ABOUT).unlink()
    trained("--resume", half)
    assert not list(half.glob(".step-*"))


def test_a_folder_that_cannot_be_written(text, tmp_path, capsys, monkeypatch):
    """One line, before any work."""
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, *TINY, "--data", text, "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == ""


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of its own, of 6 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(small_disk, text, capsys, monkeypatch):
    """Training goes on without the checkpoint, says so, and ends with exit code 2; the last good one is whole, and is gone on from."""
    run = small_disk / "run"
    trained(*TINY, "--data", text, "--out", run, "--save-every", 2, "--steps", 2)
    monkeypatch.setattr(starts, "verify_room", lambda path, nbytes: None)  # full only later
    filler = small_disk / "filler"
    filler.write_bytes(bytes((6 << 20) - 2 * 1545216))
    capsys.readouterr()
    assert main(["--resume", str(run), "--steps", "8"]) == 2
    captured = capsys.readouterr()
    assert "step-00000004: the disk is full; free some space, or choose another folder; the last one is " in captured.out
    assert "parameters sha256" in captured.out
    assert captured.err.endswith("step-00000008: the disk is full; free some space, or choose another folder\n")
    assert resumable.verify(run).step == 2
    assert not list(run.glob(".step-*"))
    filler.unlink()
    trained("--resume", run, "--steps", 8)
    assert resumable.verify(run).step == 8


def test_no_room_is_said_before_the_work(small_disk, text, capsys):
    """Where not even one checkpoint fits."""
    (small_disk / "filler").write_bytes(bytes(5 << 20))
    assert "the disk has" in refused(capsys, *TINY, "--data", text, "--out", small_disk / "run")


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(), ZeroDivisionError("a defect")])
def test_what_the_writer_did_not_foresee(error, half, monkeypatch, capsys):
    """What may pass is said, and training goes on; a defect ends the program, and is not left behind in a thread."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(resumable, "save", fail)
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            main(["--resume", str(half), "--save-every", "3"])
    else:
        assert main(["--resume", str(half), "--save-every", "3"]) == 2
        captured = capsys.readouterr()
        why = "Input/output error" if isinstance(error, OSError) else "out of memory"
        assert f"step-00000009: {why}; the last one is {half}/step-00000007" in captured.out
        assert captured.err.splitlines()[-1].endswith(f"step-00000012: {why}")


def test_a_task_that_fails_does_not_cancel_a_checkpoint(half):
    """What is being written then is all that is left; a second Ctrl-C cancels it."""
    for kind, is_cancelled in ((TaskError, False), (Interrupted, True)):
        saver = Saver(RunFolder(half), "run", None, None, Every(), 2, lambda line: None)
        saver.__exit__(kind)
        assert saver._is_cancelled is is_cancelled


def test_no_memory_for_a_copy(half, whole, monkeypatch, capsys):
    """Then training stands still while a checkpoint is written; the bits are the same."""
    monkeypatch.setattr(starts, "free_memory_bytes", lambda: 0)
    trained("--resume", half, "--save-every", 1)
    out = capsys.readouterr().out
    assert "training will stand still" in out
    assert "step-00000009: 1.6 MB in " in out
    assert "behind training" not in out
    assert untimed(half) == untimed(whole)


def test_parameters_that_are_not_finite_are_not_saved(text, tmp_path, capsys):
    """The last good checkpoint stays."""
    run = tmp_path / "run"
    trained(*TINY, "--data", text, "--steps", 2, "--out", run)
    assert main(["--resume", str(run), "--steps", "9", "--lr", "1e30", "--save-every", "1", "--keep", "1"]) == 2
    assert resumable.verify(run).step == 2


# Elsewhere -------------------------------------------------------------------------------------------------------------------------------


def test_other_programs_read_a_run(half, text, tmp_path, capsys):
    """A run's folder, or a checkpoint of it, is a model to start from, to evaluate and to convert."""
    assert taskgpt(["convert", str(half), str(tmp_path / "model.bin")]) == 0
    assert taskgpt(["convert", str(RunFolder(half).checkpoint(6)), str(tmp_path / "six")]) == 0
    losses = []
    for model in (half, tmp_path / "model.bin"):
        assert taskgpt(["eval", "--graph", "tiny", "--init", str(model), "--data", text, "--batches", "1"]) == 0
        losses.append(re.search(r"loss +(\S+)", capsys.readouterr().out)[1])
    assert losses[0] == losses[1]
    trained(*TINY, "--data", text, "--init", half, "--steps", 1, "--out", tmp_path / "tuned")


def test_a_run_is_locked_for_as_long_as_its_program_lives(half):
    """The lock is the system's: it goes with whoever is killed."""
    code = f"from taskgpt.runs.folder import RunFolder\nimport os\nRunFolder({str(half)!r}).__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with folders.RunFolder(half):
        pass
