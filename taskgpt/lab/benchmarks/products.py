"""Matrix products at the shapes that graphs have: BLAS, our own in float32 and in bfloat16, in turns, from caches and from memory."""

import argparse
import math
from collections import Counter
from functools import partial

import numpy as np

from taskgpt.errors import UserError
from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine, roofline
from taskgpt.lab.named import graph_words, make
from taskgpt.lab.report import Report, in_range, quartiles
from taskgpt.products import BLAS, OWN_BF16, OWN_FP32, WORK, described, operand, product, way_for
from taskgpt.progress import Progress
from taskgpt.tasks import In, Out, Scratch, dims, kernel

A, B, K, L, M, N, P = dims("A B K L M N P")
SECONDS = 0.03  # of a product each way, in a round
WAYS = {"blas": BLAS, "own": OWN_FP32, "bf16": OWN_BF16}
COLUMNS = {
    "product": ("product", ""),
    "count": ("count", "d"),
    "FLOP": ("share", ".0%"),
    "hot: blas": ("hot_blas", ".0f"),
    "own": ("hot_own", ".0f"),
    "bf16": ("hot_bf16", ".0f"),
    "own x": ("hot_x_own", ".2f"),
    "bf16 x": ("hot_x_bf16", ".2f"),
    "cold: blas": ("cold_blas", ".0f"),
    "own ": ("cold_own", ".0f"),
    "bf16 ": ("cold_bf16", ".0f"),
    "own x ": ("cold_x_own", ".2f"),
    "bf16 x ": ("cold_x_bf16", ".2f"),
}
DETAILS = ("count", "FLOP", "own", "bf16", "own ", "bf16 ")  # what only --wide shows


@kernel
def one_after_another(
    out: Out[P, M, N], a: In[P, A, K], b: In[P, B, L], transpose_a: int, transpose_b: int, way: int, times: int, work: Scratch[WORK]
):
    """out[p] = op(a[p]) @ op(b[p]) for p = 0, 1, 2 and so on, from the beginning again after the last, so many times."""
    for t in range(times):
        p = t % len(out)
        x, y = operand(way, a[p]), operand(way, b[p])
        np.matmul(x.T if transpose_a else x, y.T if transpose_b else y, out=out[p])


@one_after_another.compiled
def one_after_another_twin(out, a, b, transpose_a, transpose_b, way, times, work):
    for t in range(times):
        p = t % out.shape[0]
        product(way, out[p], a[p], b[p], transpose_a, transpose_b, 0, work)


def products(flags: argparse.Namespace) -> None:
    """Time every shape of the graphs' products: hot, on one set of operands for each thread; cold, on more of them than caches hold.

    Raises UserError on a machine that has no products of our own.
    """
    in_range("--rounds", flags.rounds)
    if way_for("own", "fp32") == BLAS:
        raise UserError("there is nothing to compare with BLAS: this machine has no AVX2, AVX-512 or NEON, which products of our own need")
    threads = min(flags.workers or 1, machine.usable_cores())
    counts = {name: roofline.products(training_graph(make(name))) for name in graph_words(flags.graphs, flags.tiles, flags.set)}
    report = Report(flags)
    report.line("products", "; ".join(described(way) for way in WAYS.values()))
    shapes = sorted(set().union(*counts.values()))
    found: dict[tuple, list[float]] = {}
    with Progress("measuring", len(shapes) * 2 * flags.rounds) as progress:
        for number, shape in enumerate(shapes):
            for is_cold in (False, True):
                operands = [_operands(shape, _sets(shape, threads) if is_cold else 1) for _ in range(threads)]
                for round_number in range(flags.rounds):
                    progress.show((2 * number + is_cold) * flags.rounds + round_number, f"{shape}, {'cold' if is_cold else 'hot'}")
                    for name, way in WAYS.items():
                        calls = [partial(one_after_another, *own, shape.transpose_a, shape.transpose_b, way) for own in operands]
                        took = quartiles(machine.timed_together(calls, SECONDS))[1]
                        found.setdefault((shape, is_cold, name), []).append(threads * shape.flops / took / 1e9)
    for name, count in counts.items():
        report.table(f"products of {name}", COLUMNS, _rows(count, found), DETAILS)
    report.save()


def _operands(shape: roofline.Product, sets: int) -> tuple[np.ndarray, ...]:
    def made(rows: int, columns: int) -> np.ndarray:
        return np.ones((sets, rows, columns), np.float32)

    a = made(shape.K, shape.M) if shape.transpose_a else made(shape.M, shape.K)
    return made(shape.M, shape.N), a, made(shape.N, shape.K) if shape.transpose_b else made(shape.K, shape.N)


def _sets(shape: roofline.Product, threads: int) -> int:
    """Return how many sets of operands do not fit into the caches, all threads' together."""
    nbytes = 4 * (shape.M * shape.N + shape.M * shape.K + shape.K * shape.N)
    return math.ceil(2 * max(machine.cache_bytes(), 32 << 20) / (threads * nbytes)) + 1


def _rows(count: Counter[roofline.Product], found: dict[tuple, list[float]]) -> list[dict]:
    total, rows = roofline.gemm_flops(count), []
    for shape, times in sorted(count.items(), key=lambda item: -item[0].flops * item[1]):
        row = {"product": str(shape), "count": times, "share": shape.flops * times / total}
        for is_cold, heat in ((False, "hot"), (True, "cold")):
            speeds = {name: found[shape, is_cold, name] for name in WAYS}
            row |= {f"{heat}_{name}": quartiles(each)[1] for name, each in speeds.items()}
            row |= {f"{heat}_rounds_{name}": each for name, each in speeds.items()}
            for name in ("own", "bf16"):  # in turns: of each round a ratio
                row[f"{heat}_x_{name}"] = quartiles(x / y for x, y in zip(speeds[name], speeds["blas"], strict=True))[1]
        rows.append(row)
    return rows
