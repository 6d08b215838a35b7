"""What a run on a cluster does when something goes wrong at a bad moment; here without worker processes, each part by itself."""

import asyncio
import itertools
import json
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from distributed import Scheduler, Worker

from taskgpt.cluster import hangs, membership, mpi_links, on_disk
from taskgpt.cluster import kept as keeping
from taskgpt.cluster.checks import Member
from taskgpt.cluster.driver import Driver
from taskgpt.cluster.job import Ended
from taskgpt.cluster.kept import NO_STATE, Held, Kept, Offer, fetch, forget, holding, kept, make_room, reserve, take, want
from taskgpt.cluster.membership import Membership, Roster
from taskgpt.cluster.mpi_links import MpiLinks
from taskgpt.cluster.offers import Offers
from taskgpt.cluster.rank_training import Asked, RankSaver
from taskgpt.collectives import PeerLost
from taskgpt.config import load_graph, load_scheduler
from taskgpt.errors import UserError
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.runs.training import Training
from taskgpt.schedulers.native.doing import Doing

RUN = "a run"


def on_worker(test):
    """Run a test with a worker of a cluster in this process."""

    async def all_of_it():
        where = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
        async with Scheduler(port=0, **where) as scheduler, Worker(scheduler.address, nthreads=1, **where) as worker, asyncio.timeout(20):
            await test(worker)

    asyncio.run(all_of_it())


def members(*addresses: str) -> list[Member]:
    return [Member(address, "host", address, 1, 1, 0, None) for address in addresses]


def about(step: int) -> About:
    return About(RUN, step, load_graph("tiny").model, {}, "1", None, "")


# What is kept -----------------------------------------------------------------------------------------------------------------------------


def test_an_offer_is_fetched_whole_or_not_at_all():
    """When it is taken back while it is fetched, what has the same names since is not taken for it; and a silent worker ends a fetch."""

    async def test(worker):
        here, wanted = kept(worker, RUN), {name: np.full(3, number) for number, name in enumerate("ab")}
        here.offers["0 20"] = Offer(wanted)
        got = {name: np.zeros(3, int) for name in "ab"}

        def get(timeout_s=5.0):
            return fetch(worker.rpc, worker.address, RUN, "0 20", got, {"a": [(0, 3)], "b": [(0, 3)]}, timeout_s)

        await get()
        assert [got[name].tolist() for name in "ab"] == [[0] * 3, [1] * 3]
        give, asked = worker.handlers["taskgpt_state"], []

        def replace_after_one(**request):
            if asked:
                here.offers.pop("0 20", None)
                here.offers["0 end"] = Offer({name: array + 7 for name, array in wanted.items()})
            asked.append(request)
            return give(**request)

        worker.handlers["taskgpt_state"] = replace_after_one
        with pytest.raises(LookupError, match="does not offer array 'b'"):
            await get()
        assert got["b"].tolist() == [1] * 3

        async def silent(**request):
            await asyncio.sleep(20)

        worker.handlers["taskgpt_state"] = silent
        with pytest.raises(TimeoutError):
            await get(0.1)

    on_worker(test)


def test_a_state_that_is_put_is_one_when_it_is_whole():
    """Room for a state is no state; it goes if the driver does not come back."""

    async def test(worker):
        config = load_graph("tiny")
        of = config.model, config.batch, config.tiles, config.options
        await make_room(RUN, of, 60.0, dask_worker=worker)
        assert await holding(RUN, dask_worker=worker) == NO_STATE and kept(worker, RUN).offers
        await keeping.keep_room(RUN, about(20), 4, dask_worker=worker)
        assert await holding(RUN, dask_worker=worker) == (20, 4) and not kept(worker, RUN).offers
        await make_room(RUN, of, 0.0, dask_worker=worker)
        while RUN in keeping._of_worker[worker]:
            await asyncio.sleep(0.01)

    on_worker(test)


def test_a_worker_is_of_one_run_until_its_rank_has_ended():
    """Its driver lets go of it at once, and it is nobody else's before the rank has noticed; between generations it is the run's own."""

    async def test(worker):
        assert await reserve(RUN, 60.0, dask_worker=worker)
        here = kept(worker, RUN)
        here.is_training = True
        waits = asyncio.create_task(holding(RUN, dask_worker=worker))
        await reserve(RUN, 0.0, dask_worker=worker)
        await forget(RUN, dask_worker=worker)
        assert not await reserve("another", 60.0, dask_worker=worker)
        assert here.is_forgotten and not waits.done()
        here.is_training = False
        assert await waits == NO_STATE
        await reserve(RUN, 60.0, dask_worker=worker)
        keeping.give_back(worker, RUN, 5.0)
        assert not await reserve("another", 60.0, dask_worker=worker)
        keeping.give_back(worker, RUN, 0.0)
        assert await reserve("another", 60.0, dask_worker=worker)

    on_worker(test)


def test_a_rank_hangs_if_nothing_goes_on_that_it_does_not_wait_for(monkeypatch):
    """Not if it waits for others, for the driver, or for its next task; and not any more when its task has ended. It is told once."""
    monkeypatch.setattr(hangs, "LOOK_S", 0.01)
    said: list[str] = []

    async def looks_at(finished: int, task: str, is_exchanging=False, offers=(), is_moving=False) -> bool:
        count, here = itertools.count(finished), Kept(offers=dict.fromkeys(offers))

        def doing() -> Doing:
            return Doing(((7, next(count) if is_moving else finished),), (task,) if task else (), not task)

        watch = hangs.watch(doing, SimpleNamespace(is_exchanging=is_exchanging), here, 0.05, said.append)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch, 0.5)
        return here.is_hung

    assert asyncio.run(looks_at(3, "gelu")) and asyncio.run(looks_at(3, "")) and asyncio.run(looks_at(3, "gelu", True, ["0 20"]))
    assert said == [f"{what} has not gone on for 0.05 s" for what in ("task gelu", "training, outside of tasks,", "task gelu")]
    assert not asyncio.run(looks_at(3, "", is_exchanging=True)) and not asyncio.run(looks_at(3, "", offers=["0 20"]))
    assert not asyncio.run(looks_at(3, "gelu", is_moving=True)) and len(said) == 3


def test_a_worker_that_hangs_is_nobodys():
    """It says so at once, and is no newcomer of its own run either."""

    async def test(worker):
        here = kept(worker, RUN)
        here.is_training = here.is_hung = True
        assert await holding(RUN, dask_worker=worker) is None
        assert not await reserve(RUN, 60.0, dask_worker=worker) and not await reserve("another", 60.0, dask_worker=worker)
        here.is_training = here.is_hung = False
        assert await holding(RUN, dask_worker=worker) == NO_STATE and await reserve(RUN, 60.0, dask_worker=worker)

    on_worker(test)


def test_a_wish_is_heard_by_the_generation_that_it_is_meant_for():
    """Also by one that begins later than it is told; a checkpoint is made once."""

    async def test(worker):
        here, links = kept(worker, RUN), SimpleNamespace(over="")
        asked = {number: Asked(SimpleNamespace(generation=number), here, links) for number in (0, 1)}
        await want(RUN, 1, "save", dask_worker=worker)
        assert (asked[0].now, asked[1].now) == ("", "save")
        asked[1].answer_save()
        assert asked[1].now == ""
        await want(RUN, 1, "stop", dask_worker=worker)
        asked[1].answer_save()
        assert asked[1].now == "stop" and not asked[1].is_requested
        links.over = "nobody wants it"
        assert asked[1].is_requested

    on_worker(test)


# Offers -----------------------------------------------------------------------------------------------------------------------------------


def test_a_rank_offers_a_checkpoint_until_it_is_taken_or_the_generation_ends():
    """Then the offer is gone, and who stands still for it hears that nobody has it."""
    here, told, links = Kept(), threading.Event(), SimpleNamespace(over="")

    def verify_goes_on():
        if links.over:
            raise PeerLost(links.over)

    flags = {"save_every": "10m"}
    job = SimpleNamespace(
        flags=flags, run=RUN, generation=2, topic="", is_staged=False, is_in_parts=False, unsaved_s=599.0, offer_of=lambda what: f"2 {what}"
    )
    m = SimpleNamespace(state={"wte": np.zeros(3)})
    worker = SimpleNamespace(log_event=lambda topic, news: told.set())
    saver = RankSaver(job, 0, worker, here, m, None, SimpleNamespace(links=links, verify_goes_on=verify_goes_on))
    assert not saver.wants(5)
    saver._last_s -= 1.0
    assert saver.wants(5)  # ten minutes after the last checkpoint, of whatever generation
    failed = []

    def write():
        try:
            saver.write_now(about(20))
        except PeerLost as error:
            failed.append(error)

    for is_taken in (True, False):
        thread = threading.Thread(target=write)
        thread.start()
        assert told.wait(20)
        told.clear()
        if is_taken:
            here.offers["2 20"].taken.set()
        else:
            links.over = "the driver is gone"
        thread.join(20)
        assert not thread.is_alive() and not here.offers
        assert (saver.newest is not None) and bool(failed) == (not is_taken)


class Writer:
    """A saver whose thread the test plays: `work()`."""

    def __init__(self):
        self.is_writing, self.run, self.newest, self.written = False, RUN, None, []

    def write_state(self, about, state_of):
        self.is_writing, self.state_of = True, state_of

    def work(self):
        try:
            self.written.append(self.state_of())
        except OSError as error:
            self.written.append(error)
        self.is_writing = False

    def poll(self):
        pass


def test_a_state_on_the_way_lies_on_the_disk(tmp_path):
    """Of a folder that may be yet to be made, without a name; one that finds no room there is refused before it is written."""
    wanted = {"w": np.arange(5, dtype=np.float32), "step": np.arange(6).reshape(2, 3), "none": np.empty((0, 4))}
    found = on_disk.empty_like(wanted, tmp_path / "run" / "is to be")
    for name, array in wanted.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype) and not found[name].any()
        found[name][...] = array
    assert all((found[name] == array).all() for name, array in wanted.items()) and not list(tmp_path.iterdir())
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or f"{tmp_path}/" in mapped.read_text()
    with pytest.raises(OSError):
        on_disk.empty_like({"w": np.broadcast_to(np.float32(0), (1 << 60,))}, tmp_path)


def test_every_offer_is_answered_and_none_waited_for(monkeypatch):
    """While one is written, the next waits its turn; one that cannot be fetched, and one that nobody wants, are answered too."""
    answered, gone = [], []

    def sync(function, pool, address, run, offer, arrays, ranges, timeout_s):
        if gone:
            raise TimeoutError

    def ask(client, addresses, function, run, offer, timeout_s):
        assert function is take
        answered.append((addresses, offer))

    monkeypatch.setattr("taskgpt.cluster.offers.ask", ask)
    offers = Offers(SimpleNamespace(sync=sync, rpc=None), 1.0, dict)
    parts = SimpleNamespace(count=2, addresses=["w0", "w1"], run=RUN, generation=3, is_in_parts=True, offer_of=lambda what: f"3 {what}")
    offers.begin(parts)

    def offer(step):
        for rank in (1, 0):
            offers.take(rank, asdict(about(step)), {})

    offer(5)
    assert answered == [(["w1", "w0"], "3 5")]
    saver = offers.saver = Writer()
    offer(10)
    offer(20)
    assert saver.is_writing and len(answered) == 1
    saver.work()
    assert answered[1:] == [(["w1", "w0"], "3 10")] and (offers.saved_step, offers.generations) == (10, {10: 3})
    gone.append(True)
    offers.poll()
    saver.work()
    assert isinstance(saver.written[1], OSError) and answered[2:] == [(["w1", "w0"], "3 20")] and offers.saved_step == 10


# Who takes part ---------------------------------------------------------------------------------------------------------------------------


class Answering(Membership):
    """Workers of which some answer that they are reserved. `called`: (address, seconds)."""

    def __init__(self, free: set[str]):
        super().__init__(None, load_scheduler("cluster", may_be_cluster=True).settings, RUN, lambda alive: [])
        self.free, self.called = free, []

    def call(self, addresses, function, *arguments):
        self.called += [(address, *arguments) for address in addresses]
        return {address: address in self.free for address in addresses}


def test_who_has_the_newest_state_is_chosen():
    """Whatever its address, and ranks have the order of the roster; a run that does not get all that it needs holds none."""
    a, b, c = members("a", "b", "c")
    there = Answering({"a", "b", "c"})
    assert there.reserve({a: NO_STATE, b: Held(19, 3), c: Held(20, 1)}, 1, 2) == ([b, c], 0)
    assert [address for address, _ in there.called] == ["c", "b"]
    half = Answering({"a", "c"})
    assert half.reserve(dict.fromkeys((a, b, c), NO_STATE), 3, 3) == ([], 1)
    assert half.called == [("a", 60.0), ("b", 60.0), ("a", 0.0)]


def test_a_newcomer_counts_when_it_is_the_runs(monkeypatch):
    """One that another run has is none; nobody waits for its answer."""
    answer, asked = Future(), []
    there = Answering(set())
    there._roster = lambda alive: members(*sorted(alive))
    monkeypatch.setattr(membership, "asking", lambda client, addresses, *_, **__: asked.append(addresses) or answer)
    assert not there.has_newcomer(("a",), {"a"}) and not asked
    for is_mine, then in ((False, "a"), (True, "a"), (True, "ab")):  # in the last case it takes part when its answer comes
        answer = Future()
        assert not there.has_newcomer(("a",), {"a", "b"}) and not there.has_newcomer(("a",), {"a", "b"})
        answer.set_result({"b": is_mine})
        assert there.has_newcomer(tuple(then), {"a", "b"}) is (is_mine and then == "a")
    assert asked == [["b"]] * 3


def test_newcomers_are_asked_alone_and_again(monkeypatch):
    """Beside everything else; who does not answer, or is not fit now, is asked again later; so many as their machine has memory for."""
    clock, asked, answers = [0.0], [], []
    monkeypatch.setattr(membership, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(membership, "looking", lambda client, addresses: asked.append(addresses) or answers.append(Future()) or answers[-1])
    monkeypatch.setattr(membership, "fit", lambda found, needed: (members(*(each for each in found if found[each])), []))
    roster = Roster(None, members("old"), 100)

    def there():
        return [member.address for member in roster.members({"old", "b", "c", "d"})]

    assert there() == there() == ["old"] and asked == [["b", "c", "d"]]
    fits = {"free_bytes": 150}
    answers[0].set_result({"b": fits, "c": fits, "d": None})
    assert there() == ["old", "b"] and len(asked) == 1
    clock[0] = 11.0
    there()
    assert asked[1:] == [["c", "d"]]


# The driver -------------------------------------------------------------------------------------------------------------------------------


class Report:
    def __init__(self):
        self.said = []

    def say(self, line):
        self.said.append(line)

    def tell(self, key, text):
        self.said.append(f"{key} {text}")


@pytest.fixture
def driver():
    """A driver without a cluster."""
    flags = {"max_tokens": None, "steps": 50, "init": None}
    stop = SimpleNamespace(is_requested=False, wants_save=False)
    return Driver(
        None, load_scheduler("cluster", may_be_cluster=True).settings, lambda alive: [], load_graph("tiny"), flags, Report(), stop
    )


def test_a_generation_begins_with_what_workers_say_that_they_have(driver):
    """The newest state; what is printed of generations is the way to that state, without those that led nowhere."""
    two = members("a", "b")
    first = driver._job(two, [], {"a": NO_STATE, "b": NO_STATE})
    assert (first.kept, driver.generations) == (None, [(0, 2)])
    second = driver._job(two[:1], [], {"a": Held(20, 0)})
    assert (second.kept, driver.generations) == (Held(20, 0), [(0, 2), (20, 1)])
    third = driver._job(two, [], {"a": Held(21, 0), "b": Held(20, 0)})  # the second did nothing, and another has a later step of the first
    assert (third.kept, driver.generations) == (Held(21, 0), [(0, 2), (21, 2)])
    again = driver._job(two, [], {"a": Held(21, 0), "b": NO_STATE})
    assert driver.generations == [(0, 2), (21, 2)] and again.generation == 3
    assert driver._job(two, [], {"a": NO_STATE, "b": NO_STATE}).kept is None and driver.generations == [(0, 2)]


def test_what_the_person_wants_is_told_until_it_is_heard(driver):
    """A checkpoint that the generation has not made is asked of the next one."""
    answers, told = [OSError(), True, True, True], []

    def call(addresses, function, generation, what):
        told.append(what)
        return {addresses[0]: answers.pop(0)}

    driver._membership.call = call
    driver.offers.saver = Writer()
    job = driver._job(members("a"), [], {"a": NO_STATE})
    driver.stop.wants_save = True
    driver._ask(job)
    assert driver.stop.wants_save
    driver._ask(job)
    driver._ask(job)
    assert not driver.stop.wants_save and told == ["save", "save"]
    driver.stop.is_requested = True
    driver._ask(job)
    driver._ask(job)
    assert told == ["save", "save", "stop"]


def test_divergence_ends_a_run_whatever_else_happened(driver):
    """A rank that is lost just then may not have the others go on with numbers that are none."""
    driver.client = SimpleNamespace(subscribe_topic=lambda *_: None, unsubscribe_topic=lambda *_: None)
    driver._choose = lambda plan: (members("a", "b"), {"a": NO_STATE, "b": NO_STATE})
    driver._generation = lambda job: {0: Ended(0, 3, "rank 1 is lost"), 1: Ended(1, 3, diverged="loss is nan")}
    assert driver.run().diverged == "loss is nan"


def test_a_scheduler_that_is_gone_is_one_message(driver):
    driver.client = driver._membership._client = SimpleNamespace(
        scheduler_info=lambda n_workers: {}, status="closed", scheduler=SimpleNamespace(address="tcp://there:8786")
    )
    with pytest.raises(UserError, match="tcp://there:8786: Dask's scheduler is gone"):
        driver._membership.alive()


def test_the_time_between_checkpoints_goes_on_between_generations(driver):
    driver.offers.saved_step, driver.offers.saved_s = 20, time.monotonic() - 300
    job = driver._job(members("a"), [], {"a": Held(30, 0)})
    assert job.saved_step == 20 and job.unsaved_s >= 300


def test_a_worker_that_is_lost_while_it_is_given_a_state_is_replaced(driver):
    """And it is said why, as it is of a rank that ends with an error of its system."""
    found = []
    driver.client = SimpleNamespace(subscribe_topic=lambda *_: None, unsubscribe_topic=lambda *_: None)
    driver.flags["init"] = "a model"
    driver._push = lambda addresses, saved: found.append(addresses) or driver._place(addresses[0], keeping.make_room)
    driver._membership.call = lambda addresses, *_: {addresses[0]: OSError("no route") if len(found) == 1 else None}
    driver._choose = lambda plan: (members("ab"[len(found)]), {"ab"[len(found)]: NO_STATE})
    driver._generation = lambda job: {0: Ended(0, 50)}
    assert driver.run().step == 50 and found == [("a",), ("b",)]
    assert "lost a worker (a), after 0 steps: no route" in driver.report.said
    job = driver._job(members("a"), [], {"a": NO_STATE})
    failed = SimpleNamespace(status="error", exception=lambda timeout: OSError("disk full"))
    assert driver._collect(job, [failed], {0: None}) == {}
    assert "lost rank 0 (a), after 0 steps: disk full" in driver.report.said and driver._whys == ["rank 0 (a): disk full"]


@pytest.mark.parametrize(("fetching_s", "ends_s"), [(0, 15), (100, 100)])
def test_who_is_late_is_waited_for_while_a_checkpoint_is_fetched(driver, monkeypatch, fetching_s, ends_s):
    """A rank that does not end when another has is lost 15 s later, its timeout and some; not while it may be giving what it has."""
    clock_s = [0.0]

    def pump(seconds):
        clock_s[0] += 0.5
        driver.offers.is_fetching = clock_s[0] < fetching_s

    def submit(function, job, rank, **_):
        return SimpleNamespace(done=lambda: rank == 1, status="finished")

    monkeypatch.setattr("taskgpt.cluster.driver.time", SimpleNamespace(monotonic=lambda: 1000 + clock_s[0]))
    driver.client = SimpleNamespace(submit=submit, cancel=lambda futures, force: None)
    driver._membership.alive = lambda: {"a", "b"}
    driver._membership.call = lambda addresses, *_: {addresses[0]: Ended(1, 5, "rank 0 is lost")}
    driver._pump = pump
    driver._collect = lambda job, futures, ended: sorted(ended)
    assert driver._generation(driver._job(members("a", "b"), [], {"a": NO_STATE, "b": NO_STATE})) == [1]
    assert clock_s[0] == pytest.approx(ends_s, abs=2)


@pytest.mark.parametrize("saved_step", [20, 50])
def test_the_last_checkpoint_is_made_by_whoever_is_there(saved_step):
    """Also by a generation that begins after the last step, if the one before has not made it; and not twice."""
    made = []
    saver = SimpleNamespace(newest=None, folder=SimpleNamespace(checkpoint=str), write_now=made.append, error=None)
    Training.save_last(SimpleNamespace(step=50, saved_step=saved_step, saver=saver, about=lambda step: step))
    assert made == ([] if saved_step == 50 else [50])


# MPI --------------------------------------------------------------------------------------------------------------------------------------


class World:
    """MPI's COMM_WORLD as rank 0 sees it. `mail`: what the other has sent, by MPI's tag."""

    def __init__(self):
        self.mail = {7701: deque(), 7702: deque()}

    def Improbe(self, source, tag, status=None):
        if not self.mail[tag]:
            return None
        message = self.mail[tag].popleft()
        if status:
            status.Get_count, status.Get_source = lambda _: len(message), lambda: 1
        return SimpleNamespace(Recv=lambda into: memoryview(into[0]).cast("B").__setitem__(slice(None), message))

    def Isend(self, *_):
        return SimpleNamespace(Test=lambda: True)

    def send(self, generation, tag, body=b"", is_stopped=False):
        self.mail[7701].append(json.dumps([RUN, generation, 1, {"tag": tag, "bytes": 4}]).encode())
        self.mail[7702] += [] if is_stopped else [body]


def test_a_rank_that_stops_half_way_through_a_message_of_mpi_is_noticed(monkeypatch):
    """What it sends when it goes on is of no later message, and nobody waits for it at the end."""
    world = World()
    mpi = {"Query_thread": lambda: 3, "THREAD_MULTIPLE": 3, "COMM_WORLD": world, "BYTE": None, "ANY_SOURCE": -1, "Status": SimpleNamespace}
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(**mpi)))
    monkeypatch.setattr(mpi_links, "_BEAT_S", 0.02)

    async def test():
        first = MpiLinks(RUN, 0, 0, (0, 1), 0.2, asyncio.get_running_loop())
        world.send(0, ["a"], is_stopped=True)
        with pytest.raises(PeerLost, match=r"rank 1 was silent for 0\.2 s"):
            await first.receive(1, ("a",))
        await first.close()
        second = MpiLinks(RUN, 1, 0, (0, 1), 5.0, asyncio.get_running_loop())
        world.mail[7702].append(b"late")
        world.send(1, ["a"], b"sent")
        assert (await second.receive(1, ("a",))).tobytes() == b"sent"
        await second.close()

    asyncio.run(test())
