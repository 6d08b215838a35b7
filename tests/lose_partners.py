"""Lose partners of a share: `python -m tests.lose_partners [KILLS] [STOPS] [PROGRAMS] [SEED]`. Not part of the suite.

First eight processes on all cores run so many random programs, each in a share with the others: every result has the bits of a run alone.
Then pairs of processes run programs, and one of them is killed (SIGKILL), or stopped for a while (SIGSTOP), at a random moment. The other
one goes on with the right bits, and no program takes it a second longer than one takes two that share. In the end the segment is gone, and
nothing else is left in /dev/shm. Last, every order of the protocol's steps with more switches between threads than the suite has.
100, 30 and 200 take some 10 minutes.
"""

import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import taskgpt
from taskgpt.sharing.segment import path_of
from taskgpt.tasks import Graph, In, InOut, dims, kernel, wrap

sys.path.append(str(Path(__file__).parent))  # as a command

PROCESSES, WORKERS, TASKS, CELLS, CELL = 8, 2, 600, 10, 256
NAME = f"proof-{os.getpid()}"
DELAY_S = 1.0
N, M = dims("N M")


@kernel(compiled=True)
def stir(a: InOut[N, np.int64], b: In[M, np.int64], turns: int):
    """Of some length that `turns` says, 0.1 us each and element."""
    for turn in range(turns):
        for i in range(a.shape[0]):
            a[i] = a[i] * 31 + b[(i + turn) % b.shape[0]]


class Program:
    """A graph at random."""

    def __init__(self, seed: int):
        choose = random.Random(seed)
        self.cells = wrap(np.zeros(CELLS * CELL, np.int64), (CELL,), "cells")
        self.graph = Graph(f"random {seed}")
        for _ in range(TASKS):
            own, other = choose.sample(range(CELLS), 2)
            self.graph.spawn(stir, self.cells.cell(own), self.cells.cell(other), int(10 ** choose.uniform(0, 3.5)))

    def run(self, scheduler) -> str:
        self.cells.array[:] = np.arange(CELLS * CELL)
        scheduler.run(self.graph)
        return hashlib.sha256(self.cells.array.tobytes()).hexdigest()


def serve(share: str, weight: int) -> None:
    """Run the programs whose seeds are asked for on standard input; print how long each took, and its bits."""
    with taskgpt.scheduler("native", workers=WORKERS, share=share, share_weight=weight, quantum_ms=5.0) as scheduler:
        print("ready", flush=True)
        for line in sys.stdin:
            program = Program(int(line))
            begin = time.monotonic()
            bits = program.run(scheduler)
            print(time.monotonic() - begin, bits, flush=True)


class Partner:
    """A process that serves."""

    def __init__(self, share: str, weight: int = 1):
        command = [sys.executable, "-m", "tests.lose_partners", "serve", share, str(weight)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, seed: int) -> None:
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()

    def answer(self) -> tuple[float, str]:
        seconds, bits = self.process.stdout.readline().split()
        return float(seconds), bits

    def end(self) -> None:
        self.process.stdin.close()
        if self.process.wait(30):
            raise RuntimeError(f"a partner ended with exit code {self.process.returncode}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def many(programs: int, alone: dict[int, str]) -> int:
    """Have eight processes run them at once; return how many results were others."""
    partners = [Partner(NAME, 1 + number % 3) for number in range(PROCESSES)]
    bad, begin = 0, time.monotonic()
    for first in range(0, programs, PROCESSES):
        asked = list(zip(partners, range(first, min(first + PROCESSES, programs)), strict=False))
        for partner, seed in asked:
            partner.ask(seed)
        bad += sum(partner.answer()[1] != alone[seed] for partner, seed in asked)
    for partner in partners:
        partner.end()
    print(f"{programs} programs on {PROCESSES} processes: {bad} with other bits, {time.monotonic() - begin:.0f} s", flush=True)
    return bad + left()


def left() -> int:
    """Return 1, and say so, if the segment is there though nobody is."""
    if not path_of(NAME).exists():
        return 0
    print("the segment is left")
    path_of(NAME).unlink()
    return 1


def strike(what: str, turns: int, choose: random.Random, alone: dict[int, str], usual_s: float) -> int:
    """Strike a partner so often; return how often something went wrong."""
    bad, delays = 0, []
    survivor = Partner(NAME)
    for turn in range(turns):
        victim, seed = Partner(NAME), choose.randrange(len(alone))
        victim.ask(choose.randrange(len(alone)))
        survivor.ask(seed)
        time.sleep(choose.uniform(0, usual_s))
        victim.process.send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
        seconds, bits = survivor.answer()
        delays.append(seconds - usual_s)
        wrong = [*(["other bits"] if bits != alone[seed] else []), *([f"{seconds:.2f} s"] if delays[-1] > DELAY_S else [])]
        if what == "stopped":
            victim.process.send_signal(signal.SIGCONT)
            seconds, bits = victim.answer()
            wrong += ["other bits of who was stopped"] if bits not in alone.values() else []
        if turn % 5 == 4:  # who survives is who was struck at other times
            survivor, victim = victim, survivor
            if what == "killed":
                survivor = Partner(NAME)
        (victim.kill if what == "killed" or victim.process.poll() is not None else victim.end)()
        bad += bool(wrong)
        if wrong:
            print(f"turn {turn}, {what}: {', '.join(wrong)}", flush=True)
    survivor.end()
    print(f"{turns} {what}: {bad} wrong; delays {statistics.median(delays):+.2f} s in the median, {max(delays):+.2f} s at most", flush=True)
    return bad + left()


def main(kills: int = 100, stops: int = 30, programs: int = 200, seed: int = 0) -> int:
    """Run it; return how much went wrong."""
    choose, before = random.Random(seed), set(os.listdir("/dev/shm"))
    with taskgpt.scheduler("sequential") as scheduler:
        alone = {seed: Program(seed).run(scheduler) for seed in range(max(programs, 20))}
    one, other = Partner(NAME), Partner(NAME)
    taken = []
    for at in range(10):
        one.ask(at)
        other.ask(at)
        taken += [one.answer()[0], other.answer()[0]]
    one.end()
    other.end()
    usual_s = statistics.median(taken)
    print(f"a program takes two that share {usual_s:.3f} s", flush=True)
    bad = many(programs, alone) + strike("killed", kills, choose, alone, usual_s) + strike("stopped", stops, choose, alone, usual_s)
    if more := {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("taskgpt-")}:
        print(f"left in /dev/shm: {', '.join(sorted(more))}")
        bad += 1
    import test_sharing

    for test in (
        test_sharing.test_leases_of_two_workers_of_a_member_and_one_of_another,
        test_sharing.test_leases_of_three_members_on_two_cores,
        test_sharing.test_whoever_is_killed_leaves_its_core_to_others,
        test_sharing.test_a_member_that_is_stopped_for_a_while_goes_on,
    ):
        begin = time.monotonic()
        test(most_switches=3)
        print(f"{test.__name__}, 3 switches: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{bad} wrong")
    return bad


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        sys.exit(min(1, main(*map(int, sys.argv[1:]))))
