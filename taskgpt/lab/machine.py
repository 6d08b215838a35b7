"""What this machine can do, measured: the limits that speeds are stated against."""

import contextlib
import importlib.metadata
import platform
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numba
import numpy as np
import psutil
import threadpoolctl

from taskgpt.errors import UserError, address_space_bytes
from taskgpt.products import BLAS, WORK, operand
from taskgpt.products import product as multiply
from taskgpt.schedulers.cores import usable_cores
from taskgpt.tasks import In, InOut, Out, Scratch, dims, kernel

A, B, M, N, K, L = dims("A B M N K L")
BANDWIDTH_BYTES = 1 << 29  # of memory that bandwidth is measured on, all threads together; more where caches are larger than a quarter


@kernel
def product(out: Out[M, N], a: In[A, K], b: In[B, L], transpose_a: int, transpose_b: int, way: int, times: int, work: Scratch[WORK]):
    """out = op(a) @ op(b), so many times; op transposes where its flag is 1."""
    a, b = operand(way, a), operand(way, b)
    for _ in range(times):
        np.matmul(a.T if transpose_a else a, b.T if transpose_b else b, out=out)


@product.compiled
def product_twin(out, a, b, transpose_a, transpose_b, way, times, work):
    for _ in range(times):
        multiply(way, out, a, b, transpose_a, transpose_b, 0, work)


@kernel
def read(total: Out[1, np.int64], x: In[N, np.int64], times: int):
    """Add up x, so many times."""
    for _ in range(times):
        total[0] = x.sum()


@read.compiled
def read_twin(total, x, times):
    for t in range(times):
        found = np.int64(t)
        for i in range(x.shape[0]):
            found += x[i]
        total[0] = found


@kernel
def update(x: InOut[N], times: int):
    """x += 1 in place, so many times: what AdamW does to parameters and moments."""
    for _ in range(times):
        x += np.float32(1)


@update.compiled
def update_twin(x, times):
    for _ in range(times):
        for i in range(x.shape[0]):
            x[i] += np.float32(1)


@kernel
def triad(x: Out[N], y: In[N], z: In[N], times: int):
    """x = y + 3 z, so many times (McCalpin's STREAM)."""
    for _ in range(times):
        x[:] = y + np.float32(3) * z


@triad.compiled
def triad_twin(x, y, z, times):
    for _ in range(times):
        for i in range(x.shape[0]):
            x[i] = y[i] + np.float32(3) * z[i]


def sgemm_gflops(
    threads: int, M: int = 256, N: int = 768, K: int = 3072, transpose_a: int = 0, transpose_b: int = 1, seconds: float = 0.3
) -> float:
    """Return GFLOP/s of BLAS's sgemm; see product_gflops."""
    return product_gflops(BLAS, threads, M, N, K, transpose_a, transpose_b, seconds)


def product_gflops(way: int, threads: int, M: int, N: int, K: int, transpose_a: int, transpose_b: int, seconds: float) -> float:
    """Return GFLOP/s of (M, K) @ (K, N) float32 products running on `threads` threads at once, one BLAS thread each: the median round.

    Each thread has operands of its own, packed, and stays with them. That is this machine's limit for so many workers. More threads than
    cores that this process may use cannot give more, so beyond that the result is that of all these cores.
    """
    threads = min(threads, usable_cores())
    shapes = ((M, N), (K, M) if transpose_a else (M, K), (N, K) if transpose_b else (K, N))
    operands = [[np.ones(shape, np.float32) for shape in shapes] for _ in range(threads)]
    calls = [partial(product, *own, transpose_a, transpose_b, way) for own in operands]
    return threads * 2 * M * N * K / statistics.median(timed_together(calls, seconds)) / 1e9


def bandwidth_gbs(stream: str, threads: int, seconds: float = 0.3, total_bytes: int | None = None) -> float:
    """Return GB/s of memory that `threads` threads at once stream through: the median round. `stream` is one of STREAMS.

    Their arrays, parts of `total_bytes`, are much larger than caches. Counted is what the memory moves: a cache line that is written was
    read before (write-allocate), so `triad` counts 16 bytes an element, and `update`, in place, 8.
    """
    threads = min(threads, usable_cores())
    loop, arrays, dtype, bytes_each = STREAMS[stream]
    length = (total_bytes or max(BANDWIDTH_BYTES, 4 * cache_bytes())) // (threads * arrays * np.dtype(dtype).itemsize)
    fixed = [np.zeros(1, np.int64)] if loop is read else []
    calls = [partial(loop, *fixed, *(np.ones(length, dtype) for _ in range(arrays))) for _ in range(threads)]
    return threads * length * bytes_each / statistics.median(timed_together(calls, seconds)) / 1e9


# Loop, arrays it goes through, their type, bytes that an element moves.
STREAMS = {"read": (read, 1, np.int64, 8), "update": (update, 1, np.float32, 8), "triad": (triad, 3, np.float32, 16)}


def limits(threads: int) -> dict[str, float]:
    """Return what so many threads reach together: sgemm in GFLOP/s, memory updated in place in GB/s. Takes a second."""
    return {"sgemm_gflops": sgemm_gflops(threads), "memory_gbs": bandwidth_gbs("update", threads)}


def cache_bytes(cpus: Path = Path("/sys/devices/system/cpu"), level: int = 3) -> int:
    """Return the size of all caches of a level together, by default the last (Linux; elsewhere 0)."""
    found = {}
    for cache in cpus.glob(f"cpu[0-9]*/cache/index{level}"):
        with contextlib.suppress(OSError, ValueError):
            found[(cache / "shared_cpu_list").read_text()] = int((cache / "size").read_text().strip().removesuffix("K")) << 10
    return sum(found.values())


def timed_together(calls: list[Callable[[int], object]], seconds: float) -> list[float]:
    """Run `call(times)` for each call, on a thread of its own, round after round for about `seconds`.

    Returns for each round the seconds of one time. The calls repeat themselves in compiled code, without the GIL; `times` is such that a
    round is long beside the start of its threads.
    """
    rounds: list[float] = []
    with threadpoolctl.threadpool_limits(1):
        for call in calls:
            call(1)  # compile, touch the memory
        times = 1
        while min(_together(calls[:1], times) for _ in range(3)) < seconds / 12:  # the least: one may have been interrupted
            times *= 4
        deadline = time.perf_counter() + seconds
        while len(rounds) < 3 or time.perf_counter() < deadline:
            rounds.append(_together(calls, times) / times)
    return rounds


def _together(calls: list[Callable[[int], object]], times: int) -> float:
    workers = [threading.Thread(target=call, args=(times,)) for call in calls]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that may still be taken: the machine's, or less: what a container (cgroup v2) or ulimit -v leaves."""
    space = address_space_bytes() - psutil.Process().memory_info().vms
    free = int(min(psutil.virtual_memory().available, max(0.0, space)))
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def verify_memory(where: str, doing: str, nbytes: int, held: str = "", do: str = "") -> None:
    """Raise UserError if so much memory is not free: better than being killed when it is touched.

    where, doing: of whom the message speaks, and of what, `training` say; held: what the memory holds; do: what to do about it.
    """
    if nbytes > (free := free_memory_bytes()):
        needed = f"{doing} needs {nbytes / 2**30:.1f} GiB{held and f' for {held}'}"
        raise UserError(f"{where}: {needed}, this machine has {free / 2**30:.1f} GiB free{do and f'; {do}'}")


def describe() -> dict[str, str]:
    """Return what a measurement should be read with: processor, cores, memory, versions, the BLAS and the kernels it chose."""
    blas = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas" and "scipy.libs" in lib["filepath"]]
    return {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "dask": importlib.metadata.version("dask"),
        "blas": ", ".join(f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}" for lib in blas) or "unknown",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
