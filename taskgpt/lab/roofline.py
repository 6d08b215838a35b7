"""The least time that a step can take on this machine: its matrix products at sgemm's speed, its parameters at the memory's.

Products are those of tasks tagged "gemm": all but attention's, which mix with exponentials. Operands are packed and hot in cache, each
thread's its own. Of the memory's traffic only AdamW's is counted: parameters and moments do not fit into caches, all else might. A limit
is the best of its rounds.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine
from taskgpt.lab.named import graph_words, make
from taskgpt.lab.report import Report, in_range, quartiles
from taskgpt.products import BLAS
from taskgpt.progress import Progress
from taskgpt.tasks import Call, Graph

UPDATE_BYTES = 24  # a parameter and its two moments, float32, each read and written once by AdamW
PROBE_SECONDS = 0.05  # of each product and of each memory stream, in a round


@dataclass(frozen=True, order=True)
class Product:
    """The shape of a matrix product (M, K) @ (K, N), and which operands lie in memory transposed."""

    M: int
    N: int
    K: int
    transpose_a: bool
    transpose_b: bool

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    def __str__(self) -> str:
        return f"{self.M} x {self.N} x {self.K} {'NT'[self.transpose_a]}{'NT'[self.transpose_b]}"


def product_of(call: Call) -> Product:
    """Return the product that a kernel tagged "gemm" computes, whatever is fused to it, as its declaration tells.

    The first matrix that it writes is M x N: outputs come first. The first that it reads over M and a third dimension K is one operand,
    the first over that K and N the other. Raises TypeError for a declaration without such three.
    """
    sizes = call.kernel.sizes({name: tile.shape for name, tile in call.tiles()})
    matrices = [access for access in call.kernel.accesses.values() if len(access.dims) == 2]
    m, n = next((access.dims for access in matrices if access.is_written), ("", ""))
    operands = [access.dims for access in matrices if not access.is_written]
    for left in operands:
        for right in operands:
            shared = set(left) & set(right)
            if set(left) - shared == {m} and set(right) - shared == {n} and len(shared) == 1:
                (k,) = shared
                return Product(sizes[m], sizes[n], sizes[k], left[0] == k, right[1] == k)
    raise TypeError(f"{call.kernel.name} is tagged 'gemm', and does not declare a matrix written and two read that make a product")


def way_of(call: Call) -> int:
    """Return the way in which a kernel tagged "gemm" multiplies: its constant `products`, or BLAS."""
    return dict(zip(call.kernel.parameters, call.args, strict=True)).get("products", BLAS)


def products(graph: Graph) -> Counter[Product]:
    """Return how many times a graph computes which product."""
    return Counter(product_of(call) for task in graph.tasks for call in task.calls if "gemm" in call.kernel.tags)


def gemm_flops(counts: Counter[Product]) -> int:
    """Return the operations of those products."""
    return sum(product.flops * count for product, count in counts.items())


class Limits:
    """What this machine reaches, a value for each round: GFLOP/s of a product, GB/s of a memory stream, on so many threads at once."""

    def __init__(self):
        self._rounds: defaultdict[tuple[Product | str, int], list[float]] = defaultdict(list)

    def measure(self, what: Iterable[Product | str], teams: Iterable[int]) -> None:
        """Measure one more round."""
        for each in what:
            for threads in teams:
                speed = (
                    machine.bandwidth_gbs(each, threads, PROBE_SECONDS)
                    if isinstance(each, str)
                    else machine.sgemm_gflops(threads, **asdict(each), seconds=PROBE_SECONDS)
                )
                self._rounds[each, threads].append(speed)

    def clear(self) -> None:
        self._rounds.clear()

    def __getitem__(self, key: tuple[Product | str, int]) -> list[float]:
        return self._rounds[key]

    def best(self, what: Product | str, threads: int) -> float:
        """Return the most of all rounds: what else runs on the machine can only take from a limit, never add to it."""
        return max(self[what, threads])

    def gemm_seconds(self, counts: Counter[Product], threads: int) -> float:
        """Return the least time of those products, all threads busy with one shape after another."""
        return sum(product.flops * count / self.best(product, threads) for product, count in counts.items()) / 1e9


def roofline(flags: argparse.Namespace) -> None:
    """Measure the products of each graph and the memory's streams; print the floors of a step."""
    in_range("--rounds", flags.rounds)
    report = Report(flags)
    teams = flags.workers or team_sizes(machine.usable_cores())
    shapes = {name: make(name) for name in graph_words(flags.graphs, flags.tiles, flags.set)}
    counts = {name: products(training_graph(m)) for name, m in shapes.items()}
    limits = Limits()
    what = [*machine.STREAMS, *sorted(set().union(*counts.values()))]
    with Progress("measuring", (flags.rounds + 1) * len(what)) as progress:
        for done, each in enumerate(what * (flags.rounds + 1)):
            progress.show(done, f"round {done // len(what)}/{flags.rounds}: {each}")
            if done == len(what):  # the first round touched all memory for the first time
                limits.clear()
            limits.measure([each], teams)
    spread = [f"q1-q3 ({n})" for n in teams]
    rows = [{"stream": name, **spreads(limits, name, teams)} for name in machine.STREAMS]
    report.table("memory", {"memory": ("stream", ""), **headings("GB/s", teams)}, rows, spread)
    for name, found in counts.items():
        total = gemm_flops(found)
        rows = [
            {"product": str(product), "count": count, "share": product.flops * count / total, **spreads(limits, product, teams)}
            for product, count in sorted(found.items(), key=lambda item: -item[0].flops * item[1])
        ]
        columns = {f"products of {name}": ("product", ""), "count": ("count", "d"), "of FLOP": ("share", ".1%")}
        report.table(f"products of {name}", {**columns, **headings("GFLOP/s", teams)}, rows, spread)
    rows = [floor(name, counts[name], shapes[name].model.parameter_count(), limits, n) for name in counts for n in teams]
    report.table("floors", FLOORS, rows, FLOOR_DETAILS)
    report.save()


FLOORS = {
    "floor of": ("graph", ""),
    "threads": ("threads", "d"),
    "gemm GFLOP": ("gemm_gflop", ".1f"),
    "GFLOP/s": ("gflops", ".0f"),
    "gemm ms": ("gemm_ms", ".1f"),
    "update GB": ("update_gb", ".2f"),
    "GB/s": ("gbs", ".1f"),
    "memory ms": ("memory_ms", ".1f"),
    "overlapped ms": ("overlapped_ms", ".1f"),
    "in turn ms": ("in_turn_ms", ".1f"),
}
FLOOR_DETAILS = ("update GB", "GB/s")


def floor(name: str, counts: Counter[Product], parameters: int, limits: Limits, threads: int) -> dict:
    """Return both floors, and what they come to: the larger if one hides behind the other entirely, the sum if they take turns."""
    gemm = limits.gemm_seconds(counts, threads)
    bandwidth = limits.best("update", threads)
    memory = UPDATE_BYTES * parameters / bandwidth / 1e9
    return {
        "graph": name,
        "threads": threads,
        "gemm_gflop": gemm_flops(counts) / 1e9,
        "gflops": gemm_flops(counts) / gemm / 1e9,
        "gemm_ms": gemm * 1e3,
        "update_gb": UPDATE_BYTES * parameters / 1e9,
        "gbs": bandwidth,
        "memory_ms": memory * 1e3,
        "overlapped_ms": max(gemm, memory) * 1e3,
        "in_turn_ms": (gemm + memory) * 1e3,
    }


def spreads(limits: Limits, what: Product | str, teams: list[int]) -> dict:
    """Return median and quartiles by number of threads, as the columns of `headings`."""
    found = {}
    for n in teams:
        q1, middle, q3 = quartiles(limits[what, n])
        found |= {f"median_{n}": middle, f"quartiles_{n}": f"{q1:.1f}-{q3:.1f}", f"rounds_{n}": limits[what, n]}
    return found


def headings(unit: str, teams: list[int]) -> dict[str, tuple[str, str]]:
    """Return two columns for each number of threads."""
    columns = {}
    for n in teams:
        on = f"{n} thread{'s' if n > 1 else ''}"
        columns |= {f"{unit} on {on}": (f"median_{n}", ".1f"), f"q1-q3 ({n})": (f"quartiles_{n}", "")}
    return columns


def team_sizes(workers: int) -> list[int]:
    """Return 1, 2, 4, ... up to the number of workers, which comes last."""
    sizes = [1 << power for power in range(workers.bit_length()) if 1 << power < workers]
    return [*sizes, workers]
