"""Kill a training run at random moments, and look at what it leaves: `python -m tests.kill [RUNS] [SEED]`. Not part of the suite.

Every run trains tiny with --save over a good checkpoint, and gets SIGINT, SIGTERM or SIGHUP, in one run of five twice, while it starts, as
modules are imported say, or while it trains. Afterwards the checkpoint is the good one, to the byte, or a trained new one, whole; the exit
code is the signal's; at most one line is on standard error; no unfinished file and nothing in /dev/shm is left.
Prints one line for each run that left anything else, then counts, after Ctrl-C too. 60 runs take some minutes. Where other programs use
/dev/shm, give it one of its own: `unshare -m sh -c 'mount -t tmpfs tmpfs /dev/shm; python -m tests.kill'`.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.text.tokens import HEADER_BYTES

SCHEDULERS = ["native", "native", "sequential", "loops", "threads", "local-cluster"]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
HANGS_S = 120  # then it is made to say where
EARLIEST_S = 0.05  # Python itself is up by then, and has our handler


def main(runs: int = 60, seed: int = 0) -> int:
    """Run it; return how many runs left something wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would what it starts
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
    choose, counts = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder, "model.bin"), Path(folder, "text.txt")
        text.write_text("to be or not to be, that is the question. " * 400)
        base = [sys.executable, "-m", "taskgpt.train", "--graph", "tiny", "--data", str(text), "--save", str(model)]
        subprocess.run([*base, "--steps", "3"], check=True, capture_output=True)
        took = time.monotonic()
        subprocess.run([*base, "--steps", "3"], check=True, capture_output=True)
        took = time.monotonic() - took
        good = model.read_bytes()
        with suppress(KeyboardInterrupt):
            for run in range(runs):
                model.write_bytes(good)
                told, faults = killed(base, model, choose, took)
                counts[told] += 1
                counts["wrong"] += bool(faults)
                if faults:
                    print(f"run {run}: {told}: {', '.join(faults)}", flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")
    return counts["wrong"]


def killed(base: list[str], model: Path, choose: random.Random, took: float) -> tuple[str, list[str]]:
    """Run once, over a good checkpoint; return what happened, and what is wrong with what is left."""
    good, shared = model.read_bytes(), set(os.listdir("/dev/shm"))
    scheduler, number = choose.choice(SCHEDULERS), choose.choice(NUMBERS)
    argv = [*base, "--scheduler", scheduler, "--steps", "1000000", "--lr", "1e-2", "--sample-every", "0", "--val-every", "50"]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(choose.uniform(EARLIEST_S, 1.2 * took))
    process.send_signal(number)
    if choose.random() < 0.2:
        time.sleep(choose.uniform(0, 0.5))
        process.send_signal(number)
    try:
        out, err = process.communicate(timeout=HANGS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
    state = "old" if model.read_bytes() == good else "new" if is_whole(model) else "damaged"
    ended = {128 + number: "ended by the program", -number: "ended by the system"}.get(process.returncode, "ended else")
    steps = "\nstep " in out
    faults = {
        "damaged checkpoint": state == "damaged",
        "untrained checkpoint": state == "new" and not steps,
        f"exit code {process.returncode}": ended == "ended else",
        f"standard error: {err}": "Traceback" in out + err or len(err.splitlines()) > 1,
        f"files {os.listdir(model.parent)}": set(os.listdir(model.parent)) != {"model.bin", "text.txt"},
        f"/dev/shm {set(os.listdir('/dev/shm')) - shared}": bool(set(os.listdir("/dev/shm")) - shared),
    }
    told = f"{number.name}, {ended}, {'some' if steps else 'no'} steps, {state} checkpoint"
    return told, [fault for fault, is_so in faults.items() if is_so]


def is_whole(path: Path) -> bool:
    """Return True if the checkpoint has a right header, the length that belongs to it, and finite parameters."""
    checkpoints.read_shape(path)
    return bool(np.isfinite(np.fromfile(path, "<f4", offset=HEADER_BYTES)).all())


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
