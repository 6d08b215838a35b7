"""Messages between ranks over Dask's comms: in any order, whole, and an error for all when one rank is gone."""

import asyncio
import contextlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading

import numpy as np
import pytest
from distributed import Scheduler, Worker
from distributed.core import connect
from distributed.security import Security

from taskgpt.cluster.dask_links import connected, listen
from taskgpt.collectives import PeerLost

MIB = 1 << 20


def run(test, count=2, protocol="tcp", security=None):
    """Run a test with workers of a cluster in this process."""

    async def all_of_it():
        async with contextlib.AsyncExitStack() as stack:
            where = {"protocol": protocol, "security": security, **({"host": "127.0.0.1"} if protocol != "inproc" else {})}
            scheduler = await stack.enter_async_context(Scheduler(port=0, dashboard=False, dashboard_address="127.0.0.1:0", **where))
            workers = [
                await stack.enter_async_context(
                    Worker(scheduler.address, nthreads=1, dashboard=False, dashboard_address="127.0.0.1:0", **where)
                )
                for _ in range(count)
            ]
            async with asyncio.timeout(20):
                await test(workers)

    asyncio.run(all_of_it())


async def all_connected(workers, run_id="a run", generation=0, timeout_s=10.0, start_s=120.0):
    addresses = [worker.address for worker in workers]
    return [await connected(worker, run_id, generation, rank, addresses, timeout_s, start_s) for rank, worker in enumerate(workers)]


def close_all(links):
    return asyncio.gather(*(each.close() for each in links))


def numbers(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 60, n)


def what_is_left(workers):
    """Return tasks of links that still run, and comms that they hold open."""
    tasks = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__.startswith("DaskLinks")]
    return tasks + [comm for worker in workers for comm, op in worker._comms.items() if op == "taskgpt_links"]


@pytest.mark.parametrize("protocol", ["tcp", "inproc"])
def test_messages_arrive_whole_and_in_any_order_of_tags(protocol):
    """Whatever their size, and whether they come before somebody asks for them or after."""

    async def test(workers):
        links = await all_connected(workers)
        sizes = {("empty",): 0, ("small", 1): 5, ("a piece", "and", 1): MIB, ("more", 2): 3 * MIB + 1, ("small", 2): 17}
        for to in (1, 2):
            later = [asyncio.create_task(links[to].receive(0, tag)) for tag in list(sizes)[::2]]
            await asyncio.gather(*(links[0].send(to, tag, [numbers(n, n)]) for tag, n in sizes.items()))
            early = [await links[to].receive(0, tag) for tag in reversed(list(sizes)[1::2])]
            got = dict(zip(list(sizes)[::2], [await task for task in later], strict=True))
            got |= dict(zip(reversed(list(sizes)[1::2]), early, strict=True))
            for tag, n in sizes.items():
                assert got[tag].dtype == np.uint8
                assert got[tag].ctypes.data % 16 == 0
                np.testing.assert_array_equal(got[tag].view(np.int64), numbers(n, n))
        await close_all(links)

    run(test, 3, protocol)


def test_arrays_of_any_layout_are_one_message():
    """Their bytes follow each other as they lie in memory."""

    async def test(workers):
        links = await all_connected(workers)
        parts = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)), np.empty(0), np.array(7)]
        await links[1].send(0, ("parts",), parts)
        assert (await links[0].receive(1, ("parts",))).tobytes() == b"".join(part.tobytes("A") for part in parts)
        await close_all(links)

    run(test)


@pytest.mark.parametrize("protocol", ["tcp", "inproc"])
def test_what_was_sent_may_be_written_again(protocol):
    """Dask's own write returns while the data is still to be read from the array."""

    async def test(workers):
        links = await all_connected(workers)
        array = np.ones(32 * MIB, np.uint8)
        arriving = asyncio.create_task(links[1].receive(0, ("ones",)))
        await links[0].send(1, ("ones",), [array])
        array[:] = 0
        assert (await arriving).all()
        await close_all(links)

    run(test, protocol=protocol)


def test_two_ranks_that_dial_each_other_at_once_understand_each_other():
    """Each sends on the first comm that it has."""

    async def test(workers):
        links = await all_connected(workers)
        for step in range(3):
            await asyncio.gather(*(links[i].send(1 - i, ("step", step), [numbers(MIB, i)]) for i in (0, 1)))
            for i in (0, 1):
                np.testing.assert_array_equal((await links[i].receive(1 - i, ("step", step))).view(np.int64), numbers(MIB, 1 - i))
        await close_all(links)
        assert not what_is_left(workers)

    run(test)


def test_bytes_are_counted_with_what_frames_them():
    """Both sides count the same; for a message of a MiB, frames are less than a thousandth."""

    async def test(workers):
        links = await all_connected(workers)
        for i in range(5):
            await links[0].send(1, ("big", i), [np.ones(MIB, np.uint8)])
            await links[1].receive(0, ("big", i))
        await close_all(links)
        assert 5 * MIB < links[0].sent_bytes < 5.005 * MIB
        assert [links[1].received_bytes, links[0].received_bytes] == [links[0].sent_bytes, links[1].sent_bytes]

    run(test)


def test_who_closes_leaves_what_it_has_sent_and_nothing_else():
    """Messages that came are there, others are not waited for, and neither task nor comm stays."""

    async def test(workers):
        links = await all_connected(workers)
        waiting = asyncio.create_task(links[1].receive(0, ("never",)))
        await links[0].send(1, ("last",), [np.ones(9 * MIB, np.uint8)])
        await links[0].close()
        assert (await links[1].receive(0, ("last",))).all()
        ended = "rank 0 .* has ended its part of generation 0"
        for attempt in (waiting, links[1].receive(0, ("other",)), links[1].send(0, ("x",), [])):
            with pytest.raises(PeerLost, match=ended):
                await attempt
        with pytest.raises(PeerLost, match="over: this rank has closed its links"):
            await links[0].receive(1, ("x",))
        await links[1].close()
        assert not what_is_left(workers)

    run(test)


def test_a_rank_that_fails_tells_the_others_why():
    """Who waits for it, and who waits for others, gets PeerLost with its rank, address and reason."""

    async def test(workers):
        links = await all_connected(workers)
        waiting = [asyncio.create_task(links[i].receive(j, ("never",))) for i, j in [(0, 1), (1, 0), (1, 2), (2, 1)]]
        while sum(len(each._links) for each in links) < 4:
            await asyncio.sleep(0.01)
        thread = threading.Thread(target=links[0].fail, args=["out of ideas"])
        thread.start()
        for task in waiting[1:]:
            with pytest.raises(PeerLost, match=rf"generation 0 is over: rank 0 \({workers[0].address}\): out of ideas"):
                await task
        with pytest.raises(PeerLost, match="over: out of ideas"):
            await waiting[0]
        await close_all(links)
        assert not what_is_left(workers)
        thread.join()

    run(test, 3)


def test_other_generations_are_refused():
    """An older one, with the reason; a newer one ends the one before; two generations do not mix."""

    async def test(workers):
        old = await all_connected(workers[:2], generation=3)
        await old[0].send(1, ("x",), [numbers(1)])
        new = await connected(workers[1], "a run", 4, 1, [worker.address for worker in workers])
        with pytest.raises(PeerLost, match=r"generation 3 is over: rank 1 .*: generation 4 has begun"):
            await old[0].receive(1, ("x",))
        late = await connected(workers[0], "a run", 4, 0, [worker.address for worker in workers])
        await new.send(0, ("x",), [numbers(1, 4)])
        np.testing.assert_array_equal((await late.receive(1, ("x",))).view(np.int64), numbers(1, 4))
        with pytest.raises(PeerLost, match=r"generation 4 of run a run is over: rank 1 .* has seen 4"):
            await connected(workers[1], "a run", 4, 1, [worker.address for worker in workers])
        await close_all([*old, new, late])
        stale = await connected(workers[2], "a run", 3, 2, [worker.address for worker in workers])
        with pytest.raises(PeerLost, match=r"rank 0 .* refused: generation 3 of run a run is over there, the newest is 4"):
            await stale.send(0, ("x",), [numbers(1)])
        await stale.close()
        assert not what_is_left(workers)

    run(test, 3)


def test_ranks_that_do_not_agree_on_their_number_are_refused():
    """With what each believes."""

    async def test(workers):
        addresses = [worker.address for worker in workers]
        first = await connected(workers[0], "a run", 0, 0, addresses)
        second = await connected(workers[1], "a run", 0, 1, [*addresses, "tcp://127.0.0.1:1"])
        with pytest.raises(PeerLost, match="it is rank 0 of 2, and was dialled by rank 1 of 3"):
            await second.send(0, ("x",), [])
        await close_all([first, second])

    run(test)


@pytest.mark.parametrize("listens", [True, False])
def test_a_rank_that_begins_late_is_waited_for(listens):
    """As long as its worker answers, if only that it has heard of no ranks; `start_s` at most."""

    async def test(workers):
        addresses = [worker.address for worker in workers]
        if listens:
            listen(workers[1])
        first = await connected(workers[0], "a run", 0, 0, addresses)
        sending = asyncio.create_task(first.send(1, ("x",), [numbers(3)]))
        await asyncio.sleep(0.1)
        assert not sending.done()
        second = await connected(workers[1], "a run", 0, 1, addresses)
        await sending
        np.testing.assert_array_equal((await second.receive(0, ("x",))).view(np.int64), numbers(3))
        await close_all([first, second])
        alone = await connected(workers[0], "other", 5, 0, addresses, start_s=0)
        with pytest.raises(PeerLost, match=r"rank 1 .* has not begun generation 5 of run other"):
            await alone.receive(1, ("x",))
        await alone.close()

    run(test)


def test_a_worker_that_closes_ends_its_part():
    """Dask closes the comms that others dialled; the rank ends the rest."""

    async def test(workers):
        links = await all_connected(workers, timeout_s=1)
        await links[1].send(0, ("x",), [])
        await links[0].receive(1, ("x",))
        waiting = asyncio.create_task(links[1].receive(0, ("never",)))
        await workers[0].close()
        with pytest.raises(PeerLost, match="rank 0"):
            await waiting
        await close_all(links)
        assert not what_is_left(workers)

    run(test)


CHILD = """
import asyncio, sys
import numpy as np
from distributed import Worker
from taskgpt.cluster.dask_links import connected

async def main(scheduler, parent):
    async with Worker(scheduler, nthreads=1, dashboard=False, host="127.0.0.1") as worker:
        links = await connected(worker, "a run", 0, 1, [parent, worker.address])
        print(worker.address, flush=True)
        await links.send(0, ("hello",), [])
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "number, reason",
    [(signal.SIGKILL, "is lost: its connection closed"), (signal.SIGSTOP, "was silent for 2 s")],
    ids=["killed", "stopped"],
)
def test_a_process_that_is_gone_ends_the_generation(number, reason):
    """Killed, at once; stopped, after the timeout. Who sends notices too, and nothing waits for it at the end."""

    async def test(workers):
        command = [sys.executable, "-c", CHILD, workers[0].scheduler.address, workers[0].address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            try:
                address = (await asyncio.to_thread(child.stdout.readline)).strip()
                links = await connected(workers[0], "a run", 0, 0, [workers[0].address, address], 2)
                while not links._links:  # the child dials, as late as it likes
                    await asyncio.sleep(0.01)
                await links.receive(1, ("hello",))
                waiting = asyncio.create_task(links.receive(1, ("never",)))
                os.kill(child.pid, number)
                sending = asyncio.create_task(links.send(1, ("much",), [np.ones(64 * MIB, np.uint8)]))
                for task in (waiting, sending):
                    with pytest.raises(PeerLost, match=rf"generation 0 is over: rank 1 \({address}\) {reason}"):
                        await task
                await links.close()
                assert not what_is_left(workers)
            finally:
                child.kill()

    run(test, 1)


def test_a_rank_that_cannot_be_reached_is_lost():
    """With its address, and what the operating system says."""

    async def test(workers):
        links = await connected(workers[0], "a run", 0, 0, [workers[0].address, "tcp://127.0.0.1:1"], 1)
        with pytest.raises(PeerLost, match=r"rank 1 \(tcp://127.0.0.1:1\) cannot be reached: .*"):
            await links.receive(1, ("x",))
        await links.close()
        assert not what_is_left(workers)

    run(test, 1)


@pytest.fixture
def security(tmp_path):
    """Certificates made for this test."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl, which makes certificates")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=taskgpt -keyout {key} -out {certificate}"
    subprocess.run(words.split(), check=True, capture_output=True)
    files = {
        f"tls_{role}_{what}": str(path)
        for role in ("scheduler", "worker", "client")
        for what, path in (("key", key), ("cert", certificate))
    }
    return Security(require_encryption=True, tls_ca_file=str(certificate), **files)


def test_the_clusters_certificates_hold_for_messages(security):
    """Ranks talk over TLS; who has no certificate is not let in, nor who comes without TLS."""

    async def test(workers):
        links = await all_connected(workers)
        await links[0].send(1, ("x",), [numbers(2 * MIB)])
        np.testing.assert_array_equal((await links[1].receive(0, ("x",))).view(np.int64), numbers(2 * MIB))
        [link] = links[0]._links
        assert link.comm.extra_info["cipher"]
        stranger = ssl.create_default_context(cafile=security.tls_ca_file)
        stranger.check_hostname = False
        hello = {"op": "taskgpt_links", "run": "a run", "generation": 0, "rank": 0, "count": 2}
        with pytest.raises(OSError):
            comm = await connect(workers[1].address, timeout=0.5, ssl_context=stranger)
            await comm.write(hello)
            await comm.read()
        with pytest.raises(OSError):
            await connect(workers[1].address.replace("tls://", "tcp://"), timeout=0.5)
        await close_all(links)

    run(test, protocol="tls", security=security)
