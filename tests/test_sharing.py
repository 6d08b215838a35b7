"""Processes share cores: the protocol of leases in every interleaving, whoever dies; segments; programs beside each other."""

import functools
import hashlib
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from interleavings import EVERY, ends
from programs import started

import taskgpt
from examples import cholesky
from taskgpt.errors import UserError
from taskgpt.lab.simulator.stepped import Memory, Stepped
from taskgpt.schedulers.native.table import COMPUTING, MEMORY
from taskgpt.sharing import layout as w
from taskgpt.sharing.leases import FAR, WEIGHT_UNIT
from taskgpt.sharing.member import Cores, Member, Terms
from taskgpt.sharing.seen import share
from taskgpt.sharing.segment import opened, path_of
from taskgpt.tasks import Graph, InOut, dims, kernel, wrap


class Segments:
    """A segment of so many cores, members with so many workers each, in one process, and the compiled code a step at a time."""

    def __init__(self, cores: int, *workers: int, priorities: tuple[int, ...] = ()):
        self.memory = Memory()
        self.code = Stepped(self.memory)
        self.segment = np.zeros(w.SEGMENT_WORDS, np.int64)
        self.segment[w.SLOTS] = cores
        self.inside = np.zeros(cores, np.int64)  # workers that believe to have it
        self.found: list = []
        self.may = np.arange(cores)
        self.own = [self._member(number, count) for number, count in enumerate(workers)]
        for number, priority in enumerate(priorities):
            self.segment[w.MEMBERS_AT + number * w.MEMBER_WORDS + w.PRIORITY] = priority
        # What differs between states; copying all of the segment would take the test's time.
        slots = self.segment[w.SLOTS_AT :][: cores * w.SLOT_WORDS]
        members = self.segment[w.MEMBERS_AT :][: len(workers) * w.MEMBER_WORDS]
        self.everything = [self.segment[: w.HEAD_WORDS], members, slots, self.inside, *self.own]

    def _member(self, number: int, workers: int) -> np.ndarray:
        own = w.make_own(self.segment, self.may, workers)
        own[[w.MEMBER, w.GENERATION]] = number, number + 1
        member = self.segment[w.MEMBERS_AT + number * w.MEMBER_WORDS :][: w.MEMBER_WORDS]
        member[[w.IDENTITY, w.WEIGHT]] = number + 1 << 32 | 1, 1
        member[w.MAY] = (1 << len(self.may)) - 1
        return own

    @property
    def is_clean(self) -> bool:
        """Nobody has a core, is offered one or waits."""
        owners = self.segment[w.SLOTS_AT :].reshape(-1, w.SLOT_WORDS)[:, w.OWNER]
        return not owners.any() and self.segment[w.WANTING] == 0

    def work(self, number: int, me: int, tasks: int):
        """A worker: it has a core, runs so many tasks, between which others may get the core, and gives it back."""
        address, inside = self.own[number].ctypes.data, self.memory.words_at(self.inside.ctypes.data)
        lease = w.leases_in(self.own[number])[me]
        for _ in range(tasks):
            while not (yield from self.code.hold_core(address, me)):
                pass
            core = int(lease[w.HELD])
            if (yield ("fetch_add", (inside, core, 1))):
                self.found.append(f"two on core {core}")
            yield ("fetch_add", (inside, core, -1))
        yield from self.code.let_core_go(address, me)

    def killed(self, steps, after: int, number: int, by: int):
        """A thread that is killed after so many steps; then another member finds its process dead."""
        result = None
        for _ in range(after):
            try:
                step = steps.send(result)
            except StopIteration:
                break
            if step[0] == "futex_wait":  # killed in its sleep, then, as the others may need what it has
                break
            result = yield step
        yield from self.code.forget_member(self.own[by].ctypes.data, number, number + 1 << 32 | 1)

    def lent(self, number: int, by: int):
        """Another member, who has found this one stopped."""
        yield from self.code.lend_cores(self.own[by].ctypes.data, number, number + 1 << 32 | 1)


def verify(shared: Segments, threads: list, most_switches: int = EVERY, is_alone: bool = True, sleeps: int = 0) -> None:
    """In every interleaving all threads end and nothing is left: no lease, offer or bit. `is_alone`: no two workers had a core at once."""
    count = 0
    for are_through in ends(shared, threads, most_switches, sleeps):
        count += 1
        assert are_through
        assert not (is_alone and shared.found)
        assert shared.is_clean
    assert count > 1


@pytest.mark.parametrize("priorities", [(0, 0), (0, 1)], ids=["alike", "one more urgent"])
def test_leases_of_two_members_on_a_core(priorities):
    """Also where the first has to give it up between two tasks."""
    shared = Segments(1, 1, 1, priorities=priorities)
    verify(shared, [lambda: shared.work(0, 0, 2), lambda: shared.work(1, 0, 2)])


def test_leases_of_two_workers_of_a_member_and_one_of_another(most_switches=2):
    """The bit of a member is there as long as one of its workers waits."""
    shared = Segments(1, 2, 1)
    verify(shared, [lambda: shared.work(0, 0, 1), lambda: shared.work(0, 1, 1), lambda: shared.work(1, 0, 1)], most_switches)


def test_leases_of_three_members_on_two_cores(most_switches=1):
    """The same, with a second core to be offered."""
    shared = Segments(2, 1, 1, 1)
    verify(shared, [lambda: shared.work(0, 0, 1), lambda: shared.work(1, 0, 1), lambda: shared.work(2, 0, 1)], most_switches)


def test_whoever_is_killed_leaves_its_core_to_others(most_switches=1):
    """At every step of a lease, of a wait and of a hand-over, as another member works."""
    shared = Segments(1, 1, 1, priorities=(0, 1))
    before = [array.copy() for array in shared.everything]
    for steps in range(120):
        for array, content in zip(shared.everything, before, strict=True):
            array[...] = content
        dying = functools.partial(lambda after: shared.killed(shared.work(0, 0, 2), after, 0, 1), steps)
        verify(shared, [dying, lambda: shared.work(1, 0, 1)], most_switches, is_alone=False)


def test_a_member_that_is_stopped_for_a_while_goes_on(most_switches=2):
    """Its core is lent at any moment; it asks for another one between two tasks."""
    shared = Segments(1, 1, 1)
    verify(shared, [lambda: shared.work(0, 0, 2), lambda: shared.work(1, 0, 1), lambda: shared.lent(0, 1)], most_switches, False, sleeps=2)


# The segment ----------------------------------------------------------------------------------------------------------------------------


def terms(name: str, **others) -> Terms:
    return Terms(**{"share": name, "share_weight": 1, "share_priority": 0, "quantum_ms": 20.0, **others})


@pytest.fixture
def name():
    """A share that no other test has; its file is gone at the end, or the test has left it behind."""
    found = f"test-{os.getpid()}"
    yield found
    left = path_of(found).exists()
    path_of(found).unlink(missing_ok=True)
    assert not left


@pytest.fixture
def hidden(monkeypatch, tmp_path):
    """Have shares lie where `taskgpt share` of a test beside this one does not look: it fails if one is damaged."""
    monkeypatch.setattr("taskgpt.sharing.segment.FOLDER", tmp_path)


def test_members_join_and_the_last_one_removes_the_segment(name):
    """Only its user can open it."""
    first = Member(terms(name), 2)
    second = Member(terms(name, share_weight=3), 1)
    about = path_of(name).stat()
    assert about.st_mode & 0o777 == 0o600
    assert about.st_uid == os.getuid()
    assert [each["weight"] for each in share(name)["members"]] == [1, 3]
    first.leave()
    assert [each["workers"] for each in share(name)["members"]] == [1]
    second.leave()
    assert not path_of(name).exists()


def test_cores_of_workers_in_python(name):
    """Are had one by one, are seen, and are given back."""
    with Cores(terms(name), 1) as cores:
        cores.hold(0)
        (held,) = [each for each in share(name)["cores"] if each["pid"] is not None]
        assert (held["pid"], held["worker"]) == (os.getpid(), 0)
        cores.let_go(0)
        with cores.one():
            assert share(name)["members"][0]["cores"] == 1
        assert share(name)["members"][0]["state"] == "idle"


def test_a_worker_that_waits_is_seen_by_the_others_of_its_program(name):
    """Who pauses gives its core up at once then; else it keeps it for a while."""
    workers = len(os.sched_getaffinity(0)) + 1  # one more than cores
    with Cores(terms(name), workers) as cores:
        for me in range(workers - 1):
            cores.hold(me)
        assert not cores.are_awaited()
        waits = threading.Thread(target=cores.hold, args=[workers - 1])
        waits.start()
        while not cores.are_awaited():
            time.sleep(0.001)
        cores.let_go(0)
        waits.join()
        assert not cores.are_awaited()


@pytest.mark.parametrize("has_history", [False, True])
def test_who_begins_while_all_others_pause_is_owed_little(name, has_history):
    """A day of one program, between two steps, is no debt to another: none to a new one, four quanta to one that idled."""
    day_ns, quantum_ns = 86_400 * 10**9, 20 * 10**6
    with Cores(terms(name), 1) as _, Cores(terms(name), 1) as second:
        with opened(name) as segment:
            pass
        segment.members[0, w.VIRTUAL] = WEIGHT_UNIT * day_ns
        segment.members[1, w.VIRTUAL] = int(has_history)
        second.hold(0)
        owed_ns = day_ns - segment.members[1, w.VIRTUAL] / WEIGHT_UNIT
        segment.close()
        assert owed_ns == (FAR * quantum_ns if has_history else 0)


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: (path.touch(0o600), path.write_bytes(b"x" * 100)), "wanted 162048 bytes, got 100"),
        (lambda path: (path.touch(0o600), path.write_bytes(b"x" * 8 * w.SEGMENT_WORDS)), "something else"),
        (lambda path: path.symlink_to("/dev/zero"), "symbolic link"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: (path.touch(), path.chmod(0o666)), "nobody else may open"),
    ],
    ids=["too small", "of something else", "a link", "a folder", "open to all"],
)
def test_what_is_no_segment_is_refused(name, spoil, said):
    """In one line that says where, and what to do."""
    path = path_of(name)
    spoil(path)
    try:
        with pytest.raises(UserError, match=r"remove it|take another name") as refused:
            Member(terms(name), 1)
        assert said in str(refused.value)
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_segment_of_the_dead_is_made_anew(name):
    """Whatever stands in it, if its head is one."""
    with opened(name, [0]) as segment:
        rows = segment.members
        rows[:, w.IDENTITY], rows[:, w.STARTED] = 5 << 32 | 2**22 + 1, 7  # no such process
        segment.slots[:, w.OWNER] = -1
    segment.close()
    member = Member(terms(name), 1)
    assert len(share(name)["members"]) == 1
    member.leave()


@pytest.mark.usefixtures("hidden")
def test_garbage_in_a_segment_does_no_harm(name):
    """Written while programs work: numbers that lead nowhere are not followed; who is there goes on, alone as soon as it has no place."""
    choose = np.random.default_rng(0)
    alone = pytest.warns(RuntimeWarning, match=f"share {name}: damaged; this program goes on without it")
    with alone as said, taskgpt.scheduler("native", share=name, workers=2) as scheduler:
        problem, graph = cholesky.Problem(), Graph("cholesky")
        problem.program(graph.spawn)
        problem.begin()
        scheduler.run(graph)
        wanted = problem.result().copy()
        with opened(name) as segment:
            pass
        words = segment.words[w.WANTING :]
        for _ in range(20):
            places = choose.integers(0, len(words), 2000)
            words[places] = choose.integers(-(2**63), 2**63 - 1, len(places))
            problem.begin()
            scheduler.run(graph)
            assert (problem.result() == wanted).all()
        with pytest.raises(UserError, match="list of cores is damaged"):
            share(name)
        while not said:
            time.sleep(0.01)
        segment.close()
    path_of(name).unlink()


@pytest.mark.parametrize("scheduler", ["native", "loops"])
def test_a_program_goes_on_when_its_segment_is_cut_short(name, scheduler):
    """Whose pages are gone then; it says so, and has the bits of one that shares nothing."""
    with started([sys.executable, "-c", CUT_SHORT, scheduler, name]) as program:
        assert program.stdout.readline() == "begun\n"
        os.truncate(path_of(name), 0)
        out, said = program.communicate(timeout=120)
    path_of(name).unlink()
    assert out == f"{lone_sha256()}\n" and f"share {name}: damaged; this program goes on without it" in said
    assert program.returncode == 0


def test_what_else_is_gone_still_ends_a_program(tmp_path):
    """Pages of another file are not ours to replace."""
    with started([sys.executable, "-c", ANOTHER_CUT_SHORT, str(tmp_path / "file")]) as program:
        assert program.communicate(timeout=120)[0] == "read\n"
    assert program.returncode == -signal.SIGBUS


@pytest.mark.parametrize("schedulers", [("native", "loops"), ("threads", "sequential")], ids=" beside ".join)
def test_two_programs_that_share_have_the_bits_of_one(name, schedulers):
    """Side by side in two processes, with more workers than cores; nothing is left of them."""
    first, second = ([sys.executable, "-c", BESIDE, scheduler, name] for scheduler in schedulers)
    with started(first) as one, started(second) as other:
        said = [each.communicate(timeout=120) for each in (one, other)]
    assert [out.strip() for out, _ in said] == [lone_sha256()] * 2, said


def lone_sha256() -> str:
    """Return the hash of the result of a program that shares nothing."""
    problem, graph = cholesky.Problem(), Graph("cholesky")
    problem.program(graph.spawn)
    problem.begin()
    with taskgpt.scheduler("sequential") as alone:
        alone.run(graph)
    return hashlib.sha256(problem.result().tobytes()).hexdigest()


BESIDE = """
import hashlib, sys
import taskgpt
from examples import cholesky
from taskgpt.tasks import Graph, InOut, dims, kernel, wrap
with taskgpt.scheduler(sys.argv[1], share=sys.argv[2], **({} if sys.argv[1] == "sequential" else {"workers": 3})) as scheduler:
    problem, graph = cholesky.Problem(), Graph("cholesky")
    problem.program(graph.spawn)
    for _ in range(20):
        problem.begin()
        scheduler.run(graph)
print(hashlib.sha256(problem.result().tobytes()).hexdigest())
"""
CUT_SHORT = """
import hashlib, sys, time
import taskgpt
from examples import cholesky
from taskgpt.sharing.segment import path_of
from taskgpt.tasks import Graph
with taskgpt.scheduler(sys.argv[1], share=sys.argv[2], workers=3) as scheduler:
    problem, graph = cholesky.Problem(), Graph("cholesky")
    problem.program(graph.spawn)

    def work():
        problem.begin()
        scheduler.run(graph)

    work()
    print("begun", flush=True)
    while path_of(sys.argv[2]).stat().st_size:
        work()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        work()
print(hashlib.sha256(problem.result().tobytes()).hexdigest())
"""
ANOTHER_CUT_SHORT = """
import mmap, sys
from taskgpt.sharing import cut_short
cut_short.guard(1 << 20, 1 << 20)
with open(sys.argv[1], "w+b") as file:
    file.truncate(mmap.PAGESIZE)
    memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    print("read" * (memory[0] == 0), flush=True)
    file.truncate(0)
print(memory[0])
"""


def test_complementary_tasks(name):
    """A worker takes a task that computes while the other core waits for memory, though others are older; alone the oldest."""
    n, o = dims("N O")
    ran = []

    @kernel(flops=lambda N: 0)
    def copy(a: InOut[n, np.float32], what: int):
        ran.append(what)

    @kernel(flops=lambda O: 10**9)
    def compute(a: InOut[o, np.float32], what: int):
        ran.append(what)

    graph, cells = Graph("kinds"), wrap(np.zeros(80, np.float32), (10,), "cells")
    graph.spawn(copy, cells[:], -1)  # when it has run, the others are ready, all at once
    for at in range(8):
        graph.spawn(copy if at < 4 else compute, cells.cell(at), at)
    how = {"workers": 1, "policy": "complementary", "immediate_successor": False}
    for kind, order in ((0, [0, 1, 2, 3, 4, 5, 6, 7]), (MEMORY, [4, 5, 6, 7, 0, 1, 2, 3]), (COMPUTING, [0, 1, 2, 3, 4, 5, 6, 7])):
        ran.clear()
        with taskgpt.scheduler("native", share=name, **how) as scheduler:
            with opened(name) as segment:
                other = segment.slots[1]
            other[[w.OWNER, w.KIND]] = int(segment.members[0, w.IDENTITY]) >> 32 << 32 | 4000 << 8 | 1, kind  # of another worker
            scheduler.run(graph)
            segment.close()
        assert ran == [-1, *order]
