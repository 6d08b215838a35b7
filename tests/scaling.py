"""Scaling of ranks, predicted beside measured: `python -m tests.scaling [GRAPH [GBITS ...]]`. Not part of the suite.

Two hosts of network namespaces share this machine's cores, one each. First, what messages cost a core is measured with the ranks' own ring,
without a rate. With that `taskgpt simulate --ranks 2` predicts a step, on both hosts at the same time: ranks slow each other down as they
do in training. Then `taskgpt train --scheduler tcp://...` trains at each rate, 1 and 10 Gb/s if none is given. Returns 1 if a prediction is
off by more than 15 %. Some 5 minutes for gpt2-124m, with 2 x 4 GiB. It wants the machine for itself: what other programs take of the cores
during one part they do not take during the other.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import DaskHosts, why_not

GBITS = ("1", "10")
STEPS, COLD = 8, 2
CLOSE = 0.15
TEXT = "\n\n".join(
    f"{n}. To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer {n} slings." for n in range(2000)
)
SIZES = (1 << 10, 16 << 20)  # bytes of an array that is added up
TURNS = 20

RING = """
import sys
from dask.distributed import Client

async def turns(addresses, sizes, count, dask_worker=None):
    import statistics, time
    import numpy as np
    from taskgpt.cluster.dask_links import connected
    from taskgpt.collectives.ring import all_gather, deal, reduce_scatter
    links = await connected(dask_worker, "costs", 0, addresses.index(dask_worker.address), addresses)
    found = []
    for at, size in enumerate(sizes):
        array, taken = np.zeros(size // 4, np.float32), []
        for turn in range(count):
            since, chunks = time.thread_time(), deal([array], len(addresses))
            await reduce_scatter(links, chunks, (at, turn, 0))
            between = time.thread_time()
            await all_gather(links, chunks, (at, turn, 1))
            taken.append((between - since, time.thread_time() - between))
        found += [statistics.median(each) for each in zip(*taken)]
    await links.close()
    return found

with Client(sys.argv[1]) as client:
    addresses = sorted(client.scheduler_info()["workers"])
    found = client.run(turns, addresses, [int(size) for size in sys.argv[3:]], int(sys.argv[2]), workers=addresses)
    print(*[sum(each) / len(found) for each in zip(*found.values())])
"""


def costs(hosts: DaskHosts) -> dict[str, float]:
    """Return what messages cost a core, as keys of a machine file."""
    with hosts.popen(0, [sys.executable, "-c", RING, hosts.scheduler, TURNS, *SIZES], stdout=subprocess.PIPE, text=True) as client:
        small_add, small, added, passed_on = map(float, client.communicate()[0].split())
    mib = SIZES[1] / 2 / 2**20  # of a message
    message_s = (small_add + small) / 2
    return {
        "message_us": message_s * 1e6,
        "copy_mib_us": max(0.0, passed_on - message_s) / mib * 1e6,
        "add_mib_us": max(0.0, added - passed_on) / mib * 1e6,
    }


def predicted(hosts: DaskHosts, graph: str, gbits: Sequence[str], machine: dict[str, float], folder: Path) -> dict[float, float]:
    """Return ms a step by rate: the mean of what both hosts say, each of which measures while the other does."""
    keys = ",".join(f"{key}={value:.4g}" for key, value in machine.items())
    flags = ["--graph", graph, "--machine", f"here:{keys}", "--schedulers", "native", "--workers", 1]
    flags += ["--ranks", 2, "--gbits", *gbits, "--latency-us", 0]
    command = [sys.executable, "-m", "taskgpt", "simulate", *flags, "--json"]
    both = [hosts.popen(number, [*command, folder / f"{number}.json"], stdout=subprocess.DEVNULL) for number in (1, 2)]
    assert [process.wait() for process in both] == [0, 0]
    rows = [json.loads((folder / f"{number}.json").read_text())["ranks"] for number in (1, 2)]
    return {each["gbits"]: (each["step_ms"] + other["step_ms"]) / 2 for each, other in zip(*rows, strict=True)}


def trained(hosts: DaskHosts, graph: str, folder: Path) -> tuple[float, list[float]]:
    """Train; return the median of ms a step, and all of them."""
    text, log = folder / "text.txt", folder / "log.jsonl"
    text.write_text(TEXT)
    flags = [
        "--graph",
        graph,
        "--scheduler",
        hosts.scheduler,
        "--set",
        "workers=1",
        "--steps",
        STEPS,
        "--val-every",
        0,
        "--sample-every",
        0,
    ]
    command = [sys.executable, "-m", "taskgpt", "train", *flags, "--data", text, "--log", log]
    with hosts.popen(0, command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as training:
        said = training.communicate()[0]
    assert training.returncode == 0, said
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    taken = [record["ms"] for record in records if "train_loss" in record][COLD:]
    return statistics.median(taken), taken


def main(graph: str = "gpt2-124m", *gbits: str) -> int:
    """Print a line for each rate; return 1 if one is not predicted."""
    if reason := why_not():
        print(reason)
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory() as name, DaskHosts(2) as hosts:
        folder = Path(name)
        machine = costs(hosts)
        print(", ".join(f"{key} {value:.0f}" for key, value in machine.items()), flush=True)
        before = predicted(hosts, graph, gbits or GBITS, machine, folder)
        print("Gb/s  predicted ms  measured ms  from    to       ratio", flush=True)
        for rate, wanted in before.items():
            hosts.shape(rate)
            measured, taken = trained(hosts, graph, folder)
            print(f"{rate:4g}  {wanted:12.1f}  {measured:11.1f}  {min(taken):7.1f} {max(taken):7.1f}  {wanted / measured:5.3f}", flush=True)
            wrong += abs(wanted / measured - 1) > CLOSE
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
