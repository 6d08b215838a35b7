"""How fast a cluster is: products in each worker, and messages around a ring of all workers, by the links that gradients take."""

import asyncio
import itertools
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from distributed import Client, Worker

from taskgpt.cluster.checks import Member, ask
from taskgpt.cluster.dask_links import DaskLinks, connected

MESSAGE_BYTES = 1 << 25
_TIMES = 5
_LATENCIES = 50
MEASURED_S = 120.0  # within which a worker has measured, or has something wrong with it


def measure(client: Client, members: Sequence[Member]) -> dict[str, dict[str, Any]]:
    """Return what is measured of each worker, by its address: what `product_speed` and `ring_speed` say, or `failed`, why not.

    Workers of one machine multiply one after another.
    """
    found: dict[str, dict[str, Any]] = {member.address: {} for member in members}

    def take(answers: dict[str, Any]) -> None:
        for address, answer in answers.items():
            found[address] |= answer if isinstance(answer, dict) else {"failed": f"{type(answer).__name__}: {answer}"}

    for group in _one_of_each_host(members):
        take(ask(client, group, product_speed, timeout_s=MEASURED_S))
    addresses = [member.address for member in members]
    if len(addresses) > 1:
        take(ask(client, addresses, ring_speed, f"check-{uuid.uuid4().hex[:12]}", addresses, timeout_s=MEASURED_S))
    return found


def _one_of_each_host(members: Sequence[Member]) -> list[list[str]]:
    hosts: dict[str, list[str]] = defaultdict(list)
    for member in members:
        hosts[member.host].append(member.address)
    return [[address for address in group if address] for group in itertools.zip_longest(*hosts.values())]


# In the workers ---------------------------------------------------------------------------------------------------------------------------


async def product_speed() -> dict[str, Any]:
    """Return the BLAS of this process, and GFLOP/s of its float32 products on all cores that it may use."""
    return await asyncio.to_thread(_product_speed)


def _product_speed() -> dict[str, Any]:
    from taskgpt.lab import machine  # here, as it takes seconds to import

    return {"blas": machine.describe()["blas"], "gflops": machine.sgemm_gflops(machine.usable_cores())}


async def ring_speed(run: str, addresses: Sequence[str], dask_worker: Worker) -> dict[str, float]:
    """Return what this worker sees of its neighbours in the ring, which all measure at once: of the next one, and of the one before.

    latency_s: half of what an empty message and its answer take. bytes_s: of messages of MESSAGE_BYTES that come, while as many go.
    Each is a median. Raises PeerLost.
    """
    rank, found = addresses.index(dask_worker.address), {}
    links = await connected(dask_worker, run, 0, rank, addresses)
    try:
        for direction, step in (("next", 1), ("previous", -1)):
            to, source = (rank + step) % links.count, (rank - step) % links.count
            latencies, _ = await asyncio.gather(_asked(links, to, direction), _answered(links, source, direction))
            found[f"{direction}_latency_s"] = statistics.median(latencies) / 2
            seconds = await _exchanged(links, to, source, direction)
            found[f"{direction}_bytes_s"] = MESSAGE_BYTES / statistics.median(seconds)
    finally:
        await links.close()
    return found


async def _asked(links: DaskLinks, to: int, direction: str) -> list[float]:
    """Send empty messages, and wait for the answer of each; return the seconds."""
    seconds = []
    for number in range(_LATENCIES):
        begin = time.perf_counter()
        await links.send(to, ("ask", direction, number), [])
        await links.receive(to, ("answer", direction, number))
        seconds.append(time.perf_counter() - begin)
    return seconds


async def _answered(links: DaskLinks, source: int, direction: str) -> None:
    for number in range(_LATENCIES):
        await links.receive(source, ("ask", direction, number))
        await links.send(source, ("answer", direction, number), [])


async def _exchanged(links: DaskLinks, to: int, source: int, direction: str) -> list[float]:
    """Send large messages one way, as many as come from the other; return the seconds of each."""
    message, seconds = np.ones(MESSAGE_BYTES, np.uint8), []
    for number in range(_TIMES):
        begin = time.perf_counter()
        await asyncio.gather(links.send(to, ("bytes", direction, number), [message]), links.receive(source, ("bytes", direction, number)))
        seconds.append(time.perf_counter() - begin)
    return seconds
