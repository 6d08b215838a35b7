"""Kill a run that saves (kill -9) and go on with it: `python -m tests.kill_and_resume [KILLS] [SEED]`. Not part of the suite.

A run with a checkpoint after every step is killed at random moments, each time under another scheduler, and gone on with until its last
step. After every kill, all that carries a checkpoint's name is whole. In the end parameters, losses, validations and samples are those of a
run that nothing interrupted. Then the next run begins. Prints one line for each fault, then what the killed programs were doing, by what
they left. 50 kills take some minutes.
"""

import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from taskgpt.errors import UserError
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.checkpoints.resumable import ABOUT, TENSORS

SCHEDULERS = ["native", "native", "sequential", "loops", "threads", "local-cluster"]
STEPS = 40
RUN = f"--graph tiny --set model.channels=256 --steps {STEPS} --save-every 1 --val-every 5 --val-batches 2 --sample-every 7".split()
EARLIEST_S = 0.05
PROGRAM = [sys.executable, "-u", "-m", "taskgpt.train"]


def main(kills: int = 50, seed: int = 0) -> int:
    """Run it; return how many faults there were."""
    choose, counts, faults = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("to be or not to be, that is the question. " * 400)
        run = [*RUN, "--data", str(text), "--resume", "latest", "--out"]
        whole = Path(folder, "whole")
        for part in (whole, Path(folder, "again")):  # the second one finds all kernels compiled
            began = time.monotonic()
            subprocess.run([*PROGRAM, *run, str(part)], check=True, capture_output=True)
            took = time.monotonic() - began
        number = 0
        while counts["kills"] < kills:
            number += 1
            out = Path(folder, f"run{number}")
            command = [*PROGRAM, *run, str(out), "--scheduler"]
            while (moment := killed([*command, choose.choice(SCHEDULERS)], out, choose, took)) != "ended":
                counts["kills"] += 1
                counts[moment] += 1
                for fault in broken(out):
                    faults += 1
                    print(f"run {number}, kill {counts['kills']}, {moment}: {fault}", flush=True)
            counts["runs gone on with to their end"] += 1
            for got, wanted in itertools.zip_longest(said(out), said(whole)):
                if got != wanted:
                    faults += 1
                    print(f"run {number}: got {got}, and without interruption {wanted}", flush=True)
                    break
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")
    print(f"{faults:4} faults")
    return faults


def killed(argv: list[str], out: Path, choose: random.Random, took: float) -> str:
    """Run and kill; return what the program was doing, or "ended" if it was faster. Raises CalledProcessError if it failed."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    time.sleep(choose.uniform(EARLIEST_S, 1.5 * took))
    process.send_signal(signal.SIGKILL)
    lines, errors = process.communicate()
    if process.returncode == 0:
        return "ended"
    if process.returncode != -signal.SIGKILL:
        raise subprocess.CalledProcessError(process.returncode, argv, lines, errors)
    for left in out.glob(".step-*"):
        if left.name.endswith(".going"):
            return "removed a checkpoint"
        if (left / ABOUT).exists():
            return "was about to rename a checkpoint"
        if (left / TENSORS).exists():
            return "wrote a checkpoint"
    last = next((line for line in reversed(lines.splitlines()) if line.strip()), "")
    doing = {"": "started", "val loss": "validated or took a step", "step": "took a step", "checkpoint": "took a step"}
    return next(
        (what for word, what in doing.items() if word and last.startswith(word)), "started" if "\nstep " not in lines else "sampled"
    )


def broken(out: Path) -> list[str]:
    """Return what is wrong with the checkpoints of a run."""
    faults = []
    for checkpoint in resumable.checkpoints_in(out):
        try:
            resumable.verify(checkpoint)
        except UserError as error:
            faults.append(str(error))
    return faults


def said(out: Path) -> list[dict]:
    """Return what a run's log says, without times; of the summary the parameters alone."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in each.items() if key not in ("ms", "tokens_per_s")} for each in records if "summary" not in each]
    return [*kept, records[-1]["summary"]["parameters_sha256"]]


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
