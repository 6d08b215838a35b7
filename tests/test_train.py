"""The program: what it prints and logs, what it refuses, and what Ctrl-C leaves behind."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from programs import started

from taskgpt.__main__ import main as taskgpt
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.text.tokens import write_tokens
from taskgpt.lab.traces.trace import Trace
from taskgpt.runs.console import Console
from taskgpt.runs.training import Training
from taskgpt.train import main

PARITY = Path(__file__).parent / "parity"
TINY = ["--graph", "tiny", "--scheduler", "sequential", "--val-every", "0", "--sample-every", "0"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"To be {n} or not to be {n}, that is the question." for n in range(300)))
    return str(path)


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_log_and_summary(text, tmp_path, capsys):
    """Validation before the updates 1, 3, 5 and after the last; a sample after three and after the last; then the summary."""
    log = tmp_path / "log.jsonl"
    flags = ["--graph", "tiny", "--scheduler", "sequential", "--data", text, "--steps", "5", "--val-every", "2", "--val-batches", "1"]
    assert main([*flags, "--sample-every", "3", "--log", str(log)]) == 0
    out = capsys.readouterr().out
    events = re.findall(r"^(val loss|generating|step \d+/5|parameters sha256)", out, re.MULTILINE)
    assert events == [
        "val loss",
        "step 1/5",
        "step 2/5",
        "val loss",
        "step 3/5",
        "generating",
        "step 4/5",
        "val loss",
        "step 5/5",
        "val loss",
        "generating",
        "parameters sha256",
    ]
    assert re.search(
        r"^step 4/5: train loss \d+\.\d{6}, norm \d+\.\d{4}, lr 0\.0001 \(took \d+\.\d ms, \d+ tok/s, 0:0\d left\)$", out, re.MULTILINE
    )
    assert re.search(r"^step 5/5: train loss \d+\.\d{6}, norm \d+\.\d{4}, lr 0\.0001 \(took \d+\.\d ms, \d+ tok/s\)$", out, re.MULTILINE)
    assert re.search(r"first step .* mean .* median .* min .* ms a step", out)
    assert re.search(r"tok/s, .* GFLOP/s = \d+% of this machine's sgemm on 1 thread", out)
    logged = records(log)
    assert set(logged[1]) == {"step", "train_loss", "norm", "lr", "ms", "tokens_per_s"}
    sample = next(r for r in logged if "ids" in r)
    assert sample["step"] == 3
    assert len(sample["ids"]) == 63
    summary = logged[-1]["summary"]
    assert re.fullmatch(r"[0-9a-f]{64}", summary["parameters_sha256"])
    assert summary["graph"]["tiles"]["rows"] == 128
    assert summary["flags"]["lr"] == 1e-4
    assert summary["scheduler"]["scheduler"] == "sequential"


def test_the_loss_falls(text, tmp_path):
    """Training learns."""
    log = tmp_path / "log.jsonl"
    assert main([*TINY, "--data", text, "--steps", "60", "--lr", "3e-3", "--log", str(log)]) == 0
    losses = [r["train_loss"] for r in records(log) if "train_loss" in r]
    assert losses[0] == pytest.approx(np.log(257), abs=0.1)
    assert losses[-1] < 2.5


def test_a_saved_model_goes_on_where_it_stopped(text, tmp_path):
    """--init of what --save wrote: the same validation loss, and the shape from the checkpoint instead of the graph file."""
    first, second, third, model = tmp_path / "1.jsonl", tmp_path / "2.jsonl", tmp_path / "3.jsonl", str(tmp_path / "model.bin")
    base = ["--scheduler", "sequential", "--sample-every", "0", "--data", text]
    assert (
        main(
            [*base, "--graph", "tiny", "--set", "model.layers=1", "--steps", "3", "--val-every", "0", "--save", model, "--log", str(first)]
        )
        == 0
    )
    assert main([*base, "--graph", "gpt2-124m", "--init", model, "--seq-len", "32", "--steps", "1", "--log", str(second)]) == 0
    summaries = [records(path)[-1]["summary"] for path in (first, second)]
    assert summaries[1]["graph"]["model"] == {**summaries[0]["graph"]["model"], "padded_vocabulary": 384}
    assert summaries[1]["graph"]["model"]["layers"] == 1
    assert main([*base, "--graph", "tiny", "--init", model, "--steps", "0", "--log", str(third)]) == 0
    assert records(third)[-1]["summary"]["parameters_sha256"] == summaries[0]["parameters_sha256"]


def refused(capsys, argv: list[str]) -> str:
    """Run the program, which must leave with exit code 2 and one line on standard error; return the line."""
    try:
        code = main(argv)
    except SystemExit as error:  # argparse
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--graph", "gpt2-124"], "unknown graph 'gpt2-124'; did you mean 'gpt2-124m'?"),
        (["--graph", "none.toml"], "none.toml: no such file"),
        (["--scheduler", "thread"], "unknown scheduler 'thread'; did you mean 'threads'?"),
        (["--set", "tiles.row=3"], "unknown key 'tiles.row'; did you mean 'tiles.rows'?"),
        (["--scheduler", "loops", "--set", "worker=3"], "loops.toml: worker: unknown key; did you mean 'workers'?"),
        (["--scheduler", "loops", "--set", "chunks=even"], "chunks: wanted one of 'static', 'dynamic', got 'even'"),
        (["--set", "tiles.rows=0"], "tiles.rows: wanted at least 1, got 0"),
        (["--set", "tiles.rows=many"], "tiles.rows: wanted int, got 'many'"),
        (["--set", "tiles.rows"], "wanted KEY=VALUE"),
        (["--set", "model.heads=3"], "channels = 64 is not a multiple of heads = 3"),
        (["--seq-len", "65"], "the model has 64 positions, got sequences of 65 tokens; choose --seq-len 64 or less"),
        (["--init", "none.bin"], "none.bin: cannot read the checkpoint"),
        (["--data", "none"], "none"),
        (["--lr", "nan"], "wanted a number of 0 or more, got nan"),
        (["--lr", "1e39"], "wanted a number of 0 or more, got 1e39"),
        (["--steps", "-1"], "wanted an integer of 0 or more, got -1"),
        (["--steps", "many"], "wanted an integer of 0 or more, got many"),
        (["--workers", "0"], "wanted a number from 1 to 4,096"),
        (["--log", str(PARITY / "model.bin")], "is there already and is no log"),
        (["--init", str(PARITY / "model.bin"), "--set", "model.layers=3"], "--set model.layers: the checkpoint gives the model's shape"),
        (["--save", ""], "folder"),
        (["--init", ""], "cannot read"),
        (["--save", "none/model.bin"], "there is no folder"),
        (["--log", "none/log.jsonl"], "cannot write"),
    ],
)
def test_a_mistake_is_answered_in_one_line(flags, message, text, capsys):
    """Exit code 2, what was wanted, what was found, what to do."""
    assert message in refused(capsys, [*TINY, "--data", text, "--steps", "1", *flags])


def test_bad_data_is_answered_in_one_line(parity_folder, tmp_path, capsys):
    """An empty text, a folder without token files, ids beyond the vocabulary, too few tokens."""
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in refused(capsys, [*TINY, "--data", str(tmp_path / "empty.txt")])
    (tmp_path / "folder").mkdir()
    assert "folder" in refused(capsys, [*TINY, "--data", str(tmp_path / "folder")])
    for part in ("train", "val"):
        write_tokens(tmp_path / "folder" / f"{part}.bin", [*range(250)] * 20)
    assert "200" in refused(capsys, [*TINY, "--data", str(tmp_path / "folder"), "--init", str(parity_folder / "model.bin")])
    assert "need at least 25,601" in refused(capsys, [*TINY, "--data", str(tmp_path / "folder"), "--batch-size", "400"])


def test_too_large_a_model_is_refused_before_memory_is_taken(text, capsys):
    """Better a line than a killed process."""
    message = refused(capsys, [*TINY, "--graph", "gpt2-xl", "--batch-size", "256", "--data", text])
    assert "GiB" in message


def test_no_room_for_the_checkpoint_is_noticed_before_training(text, tmp_path, capsys, monkeypatch):
    """Not after hours of it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    assert "the disk has 10 left" in refused(capsys, [*TINY, "--data", text, "--save", str(tmp_path / "model.bin")])


def test_a_diverged_loss_stops_the_run(text, tmp_path, capsys):
    """Exit code 2 and what to try; the log is JSON to its end, with null for the loss and a summary; nothing is saved."""
    log, model = tmp_path / "log.jsonl", tmp_path / "model.bin"
    flags = ["--data", text, "--lr", "1e30", "--steps", "20", "--log", str(log), "--save", str(model)]
    assert "try a smaller --lr" in refused(capsys, [*TINY, *flags])
    assert [r["train_loss"] for r in records(log) if "train_loss" in r][-1] is None
    assert "summary" in records(log)[-1]
    assert not model.exists()


def test_ctrl_c_ends_after_the_step_with_summary_and_checkpoint(text, tmp_path):
    """The first Ctrl-C: exit code 130, the log whole, the model saved."""
    log, model = tmp_path / "log.jsonl", tmp_path / "model.bin"
    argv = [sys.executable, "-m", "taskgpt.train", *TINY, "--data", text, "--steps", "1000000", "--log", str(log), "--save", str(model)]
    with started(argv) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping as soon as the steps under way are done" in out
    assert "Traceback" not in err
    assert "summary" in records(log)[-1]
    assert model.stat().st_size > 0
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "model.bin", "text.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", ["val loss", "step 1"])
def test_a_stop_is_orderly_at_any_time(number, after, text, tmp_path):
    """In a long validation or in training: the run ends soon, with summary, the signal's exit code, and a checkpoint if a step was done."""
    model = tmp_path / "model.bin"
    flags = ["--graph", "tiny", "--scheduler", "threads", "--data", text, "--steps", "1000000", "--val-every", "1", "--val-batches", "1"]
    if after == "val loss":
        flags[-1] = "1000000"
    argv = [sys.executable, "-u", "-m", "taskgpt.train", *flags, "--save", str(model)]
    with started(argv) as process:
        while not (line := process.stdout.readline()).startswith("scheduler" if after == "val loss" else after):
            assert line, process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "parameters sha256" in out
    assert err == ""
    assert model.exists() == ("step" in after or "step 1/" in out)


def stopping(monkeypatch, when: str, number: int) -> None:
    """Have the program get a signal at a moment before its first step."""
    module, name = {"it starts": (Console, "compiling"), "it validates": (Training, "run")}[when]
    original = getattr(module, name)

    def stopped(*arguments):
        os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(module, name, stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["it starts", "it validates"])
def test_a_stop_before_the_first_step_replaces_nothing(when, number, text, tmp_path, capsys, monkeypatch):
    """Checkpoint, log and trace of an earlier run stay as they are; the exit code is the signal's."""
    model, log, trace = tmp_path / "model.bin", tmp_path / "log.jsonl", tmp_path / "trace"
    flags = [
        *TINY[:-4],
        "--sample-every",
        "0",
        "--data",
        text,
        "--steps",
        "2",
        "--save",
        str(model),
        "--log",
        str(log),
        "--trace",
        str(trace),
    ]
    assert main(flags) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    stopping(monkeypatch, when, number)
    assert main([*flags, "--init", str(model), "--lr", "1"]) == 128 + number
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "nothing was saved" in (err if when == "it starts" else out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_second_signal_ends_the_program_at_once(text, tmp_path, capsys, monkeypatch):
    """In the middle of steps: one line, the code of the second signal, and what was there stays."""
    model = tmp_path / "model.bin"
    flags = [*TINY, "--data", text, "--steps", "3", "--save", str(model)]
    assert main(flags) == 0
    before = model.read_bytes()
    capsys.readouterr()

    def interrupted(self, step, *_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Console, "step", interrupted)
    assert main([*flags, "--lr", "1"]) == 143
    assert capsys.readouterr().err == "taskgpt train: interrupted at once; nothing was saved\n"
    assert model.read_bytes() == before


def test_no_steps_replace_no_checkpoint(text, tmp_path, capsys):
    """`--steps 0 --save` makes a new file, of what --init gave say, and is refused before the work where one is."""
    first, second = str(tmp_path / "first.bin"), str(tmp_path / "second.bin")
    flags = [*TINY, "--data", text]
    assert main([*flags, "--steps", "1", "--save", first]) == 0
    assert main([*flags, "--steps", "0", "--init", first, "--save", second]) == 0
    assert Path(first).read_bytes() == Path(second).read_bytes()
    folder = str(tmp_path / "folder")
    assert main([*flags, "--steps", "0", "--init", first, "--save", folder]) == 0
    for init, there in itertools.product(([], ["--init", first]), (first, folder)):
        assert "is there already, and --steps 0 trains nothing" in refused(capsys, [*flags, "--steps", "0", *init, "--save", there])
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_no_steps_replace_no_log(text, tmp_path, capsys):
    """An earlier log stays; a new one has the summary."""
    log = tmp_path / "log.jsonl"
    flags = [*TINY, "--data", text, "--steps", "0", "--log"]
    log.write_text('{"step": 0}\n')
    assert main([*flags, str(log)]) == 0
    assert log.read_text() == '{"step": 0}\n'
    assert "log.jsonl stays as it was" in capsys.readouterr().out.replace("\n", "")
    assert main([*flags, str(tmp_path / "new.jsonl")]) == 0
    assert records(tmp_path / "new.jsonl")[-1]["summary"]["steps"] == 0


def test_a_checkpoint_may_be_read_and_replaced(text, tmp_path, capsys):
    """--init and --save of one file: as with two."""
    first, second = str(tmp_path / "first.bin"), str(tmp_path / "second.bin")
    flags = [*TINY, "--data", text]
    assert main([*flags, "--steps", "1", "--save", first]) == 0
    assert main([*flags, "--steps", "2", "--init", first, "--save", second]) == 0
    assert main([*flags, "--steps", "2", "--init", first, "--save", first]) == 0
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_parameters_that_are_not_finite_are_not_saved(text, tmp_path, capsys):
    """The last update may have spoilt them, and the last loss is of those before."""
    model = tmp_path / "model.bin"
    assert main([*TINY, "--data", text, "--steps", "1", "--save", str(model)]) == 0
    before = model.read_bytes()
    message = refused(capsys, [*TINY, "--data", text, "--steps", "1", "--lr", "3e38", "--weight-decay", "3e38", "--save", str(model)])
    assert "after 1 steps the parameters are not finite, and nothing was saved" in message
    assert model.read_bytes() == before


def test_a_checkpoint_that_finds_no_room_costs_nothing_else(text, tmp_path, capsys, monkeypatch):
    """Exit code 2 and why; the summary, the log and the trace are there, and so is the checkpoint of before."""
    model, log, trace = tmp_path / "model.bin", tmp_path / "log.jsonl", tmp_path / "trace"
    flags = [*TINY, "--data", text, "--save", str(model), "--log", str(log), "--trace", str(trace)]
    assert main([*flags, "--steps", "1"]) == 0
    before = model.read_bytes()
    room, fsync = iter([True, True, False]), os.fsync  # for the log and its folder; none for the checkpoint, which comes next

    def full_once(descriptor):
        if not next(room, True):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", full_once)
    assert "the disk is full" in refused(capsys, [*flags, "--steps", "2"])
    assert records(log)[-1]["summary"]["steps"] == 2
    assert len(Trace.load(trace).runs) == 2
    assert model.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "model.bin", "text.txt", "trace"]


def test_a_log_that_is_a_pipe(text, tmp_path, capsys):
    """With a reader, it is a log; without one, a message, where opening it would wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = [*TINY, "--data", text, "--steps", "1", "--log", str(pipe)]
    assert "is a pipe that nobody reads; start its reader first" in refused(capsys, flags)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main(flags) == 0
    assert [set(json.loads(line)) & {"step", "summary"} for line in os.read(reader, 1 << 16).splitlines()] == [{"step"}, {"summary"}]
    os.close(reader)


def test_output_that_cannot_be_written_costs_no_model(text, tmp_path):
    """A full disk under standard output: said once, training goes on, the model is saved, exit code 2."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    model = tmp_path / "model.bin"
    argv = [sys.executable, "-m", "taskgpt.train", *TINY, "--data", text, "--steps", "2", "--save", str(model)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.stderr == "taskgpt train: standard output: cannot write: No space left on device; going on without it\n"
    assert done.returncode == 2
    assert model.exists()


def test_times_are_those_of_the_work(text, tmp_path, capsys, monkeypatch):
    """A report that takes long makes no step shorter than its work, which native does meanwhile; times add up to those of the clock."""
    took = []

    def slow(self, step, loss, norm, skipped, rate, seconds):
        took.append(seconds)
        if step % 3 == 1:
            time.sleep(0.3)

    monkeypatch.setattr(Console, "step", slow)
    start = time.perf_counter()
    flags = ["--graph", "tiny", "--val-every", "0", "--sample-every", "0", "--workers", "1", "--data", text, "--steps", "9"]
    assert main([*flags, "--log", str(tmp_path / "log.jsonl")]) == 0
    assert 0.6 < sum(took) < time.perf_counter() - start
    (summary,) = (r["summary"] for r in records(tmp_path / "log.jsonl") if "summary" in r)
    assert summary["min_ms"] / 1e3 == min(took[1:])


def test_a_log_that_cannot_be_written_does_not_cost_the_model(text, tmp_path, capsys):
    """A full disk under --log: said at once, training goes on, the model is saved, exit code 2."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    model = tmp_path / "model.bin"
    assert main([*TINY, "--data", text, "--steps", "2", "--log", "/dev/full", "--save", str(model)]) == 2
    assert "going on without it" in capsys.readouterr().out
    assert model.exists()


def test_a_reader_that_leaves_ends_the_program_quietly(text, tmp_path):
    """As `taskgpt train | head`: no traceback, and the model is saved."""
    model = tmp_path / "model.bin"
    argv = [sys.executable, "-u", "-m", "taskgpt.train", *TINY, "--data", text, "--steps", "100000", "--save", str(model)]
    with started(argv) as process:
        while not process.stdout.readline().startswith("step 1"):
            pass
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
    assert model.exists()


def test_sizes_prints_parameter_counts(capsys):
    """Of every graph file, and of one with other layers, heads and channels."""
    assert taskgpt(["sizes"]) == 0
    out = capsys.readouterr().out
    assert all(count in out for count in ("124,439,808", "354,823,168", "774,030,080", "1,557,611,200"))
    assert taskgpt(["sizes", "gpt2-124m", "--set", "model.layers=6", "--set", "model.heads=6", "--set", "model.channels=384"]) == 0
    assert "30,339,456" in capsys.readouterr().out  # 50257 x 384 + 1024 x 384 + 6 x (12 x 384^2 + 13 x 384) + 2 x 384


def test_an_unknown_verb_is_refused(capsys):
    """With a suggestion."""
    assert taskgpt(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_micro_batches_are_a_step(text, tmp_path, capsys):
    """--total-batch: lines, log and speed are of whole steps, each of which reads as many batches; what updates wait for is said."""
    log, batch = tmp_path / "log.jsonl", ["--batch-size", "1", "--total-batch", "256"]
    assert main([*TINY, *batch, "--data", text, "--steps", "3", "--clip-norm", "0.5", "--lr", "1e-3", "--log", str(log)]) == 0
    out = capsys.readouterr().out
    assert "batch      B 1, T 64, 4 micro-batches a step: 256 tokens\n" in out
    assert out.count("update     separate, because clipping needs the norm of the whole gradient before any update\n") == 1
    *steps, last = records(log)
    assert [r["step"] for r in steps] == [0, 1, 2]
    assert all(r["tokens_per_s"] == pytest.approx(256e3 / r["ms"]) for r in steps)
    assert all(r["norm"] > 0.5 for r in steps)  # before clipping
    summary = last["summary"]
    assert (summary["graph"]["batch"]["accumulate"], summary["graph"]["options"]["clip_norm"]) == (4, 0.5)
    assert f"graph      {summary['tasks_per_step']} tasks of " in out


def test_a_total_batch_is_a_number_of_batches(text, capsys):
    """What is none is refused, with one that is."""
    assert "wanted a multiple of B * T = 4 * 64 = 256 tokens, for example 1024" in refused(
        capsys, [*TINY, "--data", text, "--total-batch", "1000"]
    )


def test_a_spike_in_the_data_is_skipped(tmp_path, capsys):
    """A stretch of noise in a regular text: the steps that meet it update nothing, their lines and records say why, and the run goes on."""
    text, log, line = tmp_path / "text.txt", tmp_path / "log.jsonl", "All work and no play makes a dull text.\n"
    noise = "".join(chr(n) for n in np.random.default_rng(1).integers(33, 127, 300))
    text.write_text(line * 1152 + noise + line * 256)
    flags = ["--data", str(text), "--steps", "150", "--lr", "1e-3", "--skip-norm-z", "6", "--log", str(log)]
    assert main([*TINY, *flags]) == 0
    steps = [r for r in records(log) if "train_loss" in r]
    skipped = [r for r in steps if "skipped" in r]
    assert 1 <= len(skipped) <= 3
    assert all(128 <= r["step"] < 150 and re.fullmatch(r"norm z \d+\.\d > 6", r["skipped"]) for r in skipped)
    assert min(r["norm"] for r in skipped) > 2 * max(r["norm"] for r in steps[100:] if r not in skipped)
    printed = capsys.readouterr().out
    assert re.search(
        r"^step \d+/150: train loss \d+\.\d+, norm \d+\.\d+, lr 0\.001, skipped: norm z \d+\.\d > 6 \(took", printed, re.MULTILINE
    )


@pytest.mark.parametrize("flags", [["--on-nan", "skip"], ["--clip-norm", "1"]])
def test_a_loss_that_is_no_number(flags, text, tmp_path, capsys, monkeypatch):
    """--on-nan skip goes on without the update, and saves; where the run stops instead, and updates wait for the norm, parameters stay."""
    original, log, model = GPT2.set_hyper, tmp_path / "log.jsonl", tmp_path / "model.bin"

    def set_hyper(self, step, *args, **kwargs):
        original(self, step, *args, **kwargs)
        self.p.lnfb.array[0, 0] = np.nan if step == 1 else 0

    monkeypatch.setattr(GPT2, "set_hyper", set_hyper)
    command = [*TINY, "--data", text, "--steps", "3", "--log", str(log), "--save", str(model), *flags]
    if "skip" in flags:
        assert main(command) == 0
        assert [r["train_loss"] is None for r in records(log) if "train_loss" in r] == [False, True, False]
        assert "skipped: loss or norm is not finite" in capsys.readouterr().out
        assert model.exists()
    else:
        assert "after 2 steps the loss is nan, and nothing was saved" in refused(capsys, command)
        assert not model.exists()
