"""Lose ranks and drivers: `python -m tests.lose_ranks [FAULTS] [DEATHS] [SEED]`. Not part of the suite.

Three hosts (tests/hosts.py) train on a cluster. In every run one of them, in turn, is struck at a random moment: its worker is killed, or
stopped for a while, or its link is cut, or a task of it does not end. The run has to come to its last step by itself, and its parameters
are those of a run without faults that has the same ranks at the same steps. Then drivers are killed, and who goes on from the folder ends
with the parameters of a run that nothing interrupted. Prints a line for each, then how long it took from the news of a loss to the next
step. 30 and 10 take some 15 minutes.
"""

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.hosts import DaskHosts, why_not

WORKERS, STEPS, TIMEOUT_S, HANG_S = 3, 150, 2, 2
RUN = f"--graph tiny --steps {STEPS} --val-every 50 --sample-every 0 --total-batch 1536 --set wait_s=60".split()
RUN += f"--set timeout_s={TIMEOUT_S} --set hang_s={HANG_S}".split()
FAULTS = ("killed", "stopped", "cut off", "hung")
PATIENCE_S = 180
ALL_THERE = """
import sys, time
from distributed import Client
with Client(sys.argv[1]) as client:
    client.wait_for_workers(int(sys.argv[2]), timeout=60)
    while any(client.processing().values()):
        time.sleep(0.05)
"""
HANG = """
import sys
from distributed import Client
def hang(dask_worker):
    import time
    from taskgpt.collectives import Communicator
    Communicator.hand_in = lambda self, *part: time.sleep(10**6)
with Client(sys.argv[1]) as client:
    client.run(hang, workers=[each for each in client.scheduler_info(n_workers=-1)["workers"] if f"//{sys.argv[2]}:" in each])
"""


class Trial:
    """The hosts, and runs on them."""

    def __init__(self, hosts: DaskHosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self.text = folder / "text.txt"
        self.text.write_text("to be or not to be, that is the question. " * 2000)

    def start(self, *words: object) -> subprocess.Popen:
        """Begin a run, whose lines are in `lines.txt`, when all workers are there and have nothing to do. Raises TimeoutError."""
        waits = self.hosts.popen(0, [sys.executable, "-c", ALL_THERE, self.hosts.scheduler, str(WORKERS)], stderr=subprocess.PIPE)
        try:
            _, why = waits.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            waits.kill()
            raise TimeoutError("workers are still busy") from None
        if waits.returncode:
            raise TimeoutError(why.decode()[-1000:])
        command = [sys.executable, "-u", "-m", "taskgpt.train", *RUN, "--scheduler", self.hosts.scheduler, "--data", self.text, *words]
        with (self.folder / "lines.txt").open("w") as lines:
            return self.hosts.popen(0, command, stdout=lines, stderr=lines)

    def lines(self) -> str:
        return (self.folder / "lines.txt").read_text(errors="replace")

    def wait_for(self, process: subprocess.Popen, step: int) -> None:
        """Wait until a run has told a step. Raises TimeoutError, with its lines."""
        until = time.monotonic() + PATIENCE_S
        while f"step {step}/" not in self.lines() and process.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(self.lines()[-2000:])
            time.sleep(0.01)

    def end(self, process: subprocess.Popen) -> dict:
        """Wait for a run; return its summary. Raises TimeoutError or RuntimeError, with its lines."""
        try:
            code = process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(self.lines()[-3000:]) from None
        if code:
            raise RuntimeError(self.lines()[-3000:])
        return json.loads((self.folder / "log.jsonl").read_text().splitlines()[-1])["summary"]

    def log(self) -> list[object]:
        (self.folder / "log.jsonl").unlink(missing_ok=True)
        return ["--log", self.folder / "log.jsonl"]

    def strike(self, number: int, fault: str) -> None:
        process = self.hosts.processes[number]
        if fault == "killed":
            process.kill()
        elif fault == "stopped":
            process.send_signal(signal.SIGSTOP)
        elif fault == "hung":
            hang = [sys.executable, "-c", HANG, self.hosts.scheduler, self.hosts.addresses[number]]
            self.hosts.popen(0, hang).wait(PATIENCE_S)
        else:
            self.hosts.cut(number)

    def make_good(self, number: int, fault: str) -> None:
        """Have the host's worker there again."""
        process = self.hosts.processes[number]
        if fault == "stopped":
            process.send_signal(signal.SIGCONT)
        elif fault == "cut off":
            self.hosts.mend(number)
        process.kill()
        process.wait()
        self.hosts.start_worker(number)


def main(faults: int = 30, deaths: int = 10, seed: int = 0) -> int:
    """Run it; return how many runs did not end as they should."""
    if reason := why_not():
        print(reason)
        return 0
    choose, bad, recoveries = random.Random(seed), 0, []
    with DaskHosts(WORKERS) as hosts:
        trial = Trial(hosts, hosts.folder)
        trial.end(trial.start(*trial.log()))  # everything is compiled from here on
        for number in range(faults):
            host, fault, step = 1 + number % WORKERS, FAULTS[number // WORKERS % len(FAULTS)], choose.randint(2, STEPS - 20)
            what = f"{number + 1}: host {host} is {fault} at step {step}"
            try:
                process = trial.start(*trial.log())
                trial.wait_for(process, step)
                time.sleep(choose.uniform(0, 0.05))
                trial.strike(host, fault)
                found = trial.end(process)
                trial.make_good(host, fault)
                generations = found["cluster"]["generations"]
                planned = trial.end(trial.start(*trial.log(), "--set", f"generations={generations}"))
                same = found["parameters_sha256"] == planned["parameters_sha256"] and found["steps"] == STEPS
                bad += not same
                recoveries += found["cluster"]["recoveries_s"]
                print(f"{what}: {generations}, {'the same bits' if same else 'OTHER BITS'}, {found['cluster']['recoveries_s']}", flush=True)
                if not same:
                    print([(each["steps"], each["parameters_sha256"], each["cluster"]["generations"]) for each in (found, planned)])
            except (TimeoutError, RuntimeError) as error:
                bad += 1
                print(f"{what}: {type(error).__name__}\n{error}", flush=True)
                trial.make_good(host, fault)
        out = trial.folder / "run"
        wanted = trial.end(trial.start(*trial.log())) if deaths else {}
        for number in range(deaths):
            shutil.rmtree(out, ignore_errors=True)
            process = trial.start("--out", out, "--save-every", "10", *trial.log())
            step = choose.randint(1, STEPS - 5)
            trial.wait_for(process, step)
            process.kill()
            process.wait()
            kept = max((int(path.name[5:]) for path in out.glob("step-*")), default=0)
            same = False
            try:
                found = trial.end(trial.start("--resume", "latest", "--out", out, *trial.log()))
                same = found["parameters_sha256"] == wanted["parameters_sha256"]
                if not same:
                    print([(each["steps"], each["parameters_sha256"], each["cluster"]["generations"]) for each in (found, wanted)])
            except (TimeoutError, RuntimeError) as error:
                print(error)
            bad += not same
            print(
                f"driver {number + 1} killed after step {step}, gone on from {kept}: {'the same bits' if same else 'OTHER BITS'}",
                flush=True,
            )
    if recoveries:
        print(
            f"{len(recoveries)} recoveries, median {statistics.median(recoveries):.1f} s, at most {max(recoveries):.1f} s, after detection"
        )
    print(f"{bad} bad of {faults + deaths}")
    return bad


if __name__ == "__main__":
    sys.exit(min(1, main(*map(int, sys.argv[1:]))))
