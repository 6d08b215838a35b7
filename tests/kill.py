"""Kill a training run at random moments, and look at what it leaves: `python -m tests.kill [RUNS] [SEED]`. Not part of the suite.

Every run trains tiny with --save over a good checkpoint, and gets SIGINT, SIGTERM or SIGHUP, in one run of five twice, while it starts, as
modules are imported say, or while it trains. Afterwards the checkpoint is the good one, to the byte, or a trained new one, whole; the exit
code is the signal's; at most one line is on standard error; no unfinished file and nothing in /dev/shm is left.
Prints one line for each run that left anything else, then counts. 60 runs take some minutes.
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

from taskgpt.gpt2 import checkpoint

SCHEDULERS = ["native", "native", "sequential", "loops", "threads", "local-cluster"]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
HANGS_S = 30  # then it is made to say where
EARLIEST_S = 0.05  # Python itself is up by then, and has our handler


def main(runs: int = 60, seed: int = 0) -> int:
    """Run it; return how many runs left something wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would what it starts
    choose, counts, wrong = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder, "model.bin"), Path(folder, "text.txt")
        text.write_text("to be or not to be, that is the question. " * 400)
        base = [sys.executable, "-m", "taskgpt.train", "--graph", "tiny", "--data", str(text), "--save", str(model)]
        subprocess.run([*base, "--steps", "3"], check=True, capture_output=True)
        took = time.monotonic()
        subprocess.run([*base, "--steps", "3"], check=True, capture_output=True)
        took = time.monotonic() - took
        good = model.read_bytes()
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        for run in range(runs):
            shared = set(os.listdir("/dev/shm"))
            model.write_bytes(good)
            scheduler, number = choose.choice(SCHEDULERS), choose.choice(NUMBERS)
            argv = [*base, "--scheduler", scheduler, "--steps", "1000000", "--lr", "1e-2", "--sample-every", "0", "--val-every", "50"]
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
            moment = choose.uniform(EARLIEST_S, 1.2 * took)
            time.sleep(moment)
            process.send_signal(number)
            if choose.random() < 0.2:
                time.sleep(choose.uniform(0, 0.5))
                process.send_signal(number)
            try:
                out, err = process.communicate(timeout=HANGS_S)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                out, err = process.communicate()
            after = model.read_bytes()
            state = "old" if after == good else "new" if is_whole(model) else "damaged"
            ended = {128 + number: "by the program", -number: "by the system"}.get(process.returncode, "else")
            steps = out.count("\nstep ")
            faults = [
                state == "damaged" and "damaged checkpoint",
                state == "new" and not steps and "untrained checkpoint",
                ended == "else" and f"exit code {process.returncode}",
                ("Traceback" in out + err or len(err.splitlines()) > 1) and f"standard error: {err}",
                set(os.listdir(folder)) != {"model.bin", "text.txt"} and f"files {os.listdir(folder)}",
                (left := left_behind(shared)) and f"/dev/shm {left}",
            ]
            if any(faults):
                wrong += 1
                print(f"run {run}: {scheduler}, {number.name} after {moment:.2f} s: {', '.join(f for f in faults if f)}", flush=True)
            counts[f"{number.name}, ended {ended}, {'some' if steps else 'no'} steps, {state} checkpoint"] += 1
    for what, count in sorted(counts.items()):
        print(f"{count:4} {what}")
    print(f"{runs} runs, {wrong} wrong")
    return wrong


def left_behind(before: set[str]) -> set[str]:
    """Return what is new in /dev/shm and nobody's: other programs may be at work too."""
    new = set(os.listdir("/dev/shm")) - before
    for _ in range(3 if new else 0):
        maps = ""
        for path in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):  # it has ended, or is another user's
                maps += path.read_text()
        time.sleep(0.3)
        new = {name for name in new & set(os.listdir("/dev/shm")) if name not in maps}
    return new


def is_whole(path: Path) -> bool:
    """Return True if the checkpoint has a right header, the length that belongs to it, and finite parameters."""
    checkpoint.read_shape(path)
    return bool(np.isfinite(np.fromfile(path, "<f4", offset=checkpoint.HEADER_BYTES)).all())


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
