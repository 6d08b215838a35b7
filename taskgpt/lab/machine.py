"""What this machine can do, measured: the limits that speeds are stated against."""

import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import psutil
import threadpoolctl

from taskgpt.schedulers._prepare import usable_cores
from taskgpt.tasks import In, Out, dims, kernel
from taskgpt.tasks.blas import gemm

R, C, OC = dims("R C OC")


@kernel
def product(out: Out[R, OC], inp: In[R, C], weight: In[OC, C]):
    """out = inp @ weight.T."""
    np.matmul(inp, weight.T, out=out)


@product.compiled
def _(out, inp, weight):
    gemm(out, inp, weight, 0, 1, np.float32(1), np.float32(0))


def sgemm_gflops(threads: int, M: int = 256, N: int = 768, K: int = 3072, seconds: float = 0.3) -> float:
    """Return GFLOP/s of (M, K) @ (K, N) float32 products running on `threads` threads at once, one BLAS thread each: the median round.

    That is this machine's limit for so many workers. More threads than cores that this process may use cannot give more, so beyond that
    the result is that of all these cores.
    """
    threads = min(threads, usable_cores())
    operands = [[np.ones(shape, np.float32) for shape in ((M, N), (M, K), (N, K))] for _ in range(threads)]
    rounds = _timed_together([lambda own=own: product(*own) for own in operands], seconds)
    return threads * 2 * M * N * K / statistics.median(rounds) / 1e9


def _timed_together(calls: list[Callable[[], None]], seconds: float) -> list[float]:
    """Run each call on a thread of its own, round after round for about `seconds`; return the seconds of each round."""
    rounds: list[float] = []
    repeats = 4
    with threadpoolctl.threadpool_limits(1):
        for call in calls:
            call()  # compile, touch the memory
        deadline = time.perf_counter() + seconds
        while len(rounds) < 3 or time.perf_counter() < deadline:
            workers = [threading.Thread(target=_repeat, args=(call, repeats)) for call in calls]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            rounds.append((time.perf_counter() - start) / repeats)
    return rounds


def _repeat(call: Callable[[], None], times: int) -> None:
    for _ in range(times):
        call()


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that may still be taken: the machine's, or less where a container's limit (cgroup v2) ends before."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


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
        "blas": ", ".join(f"{lib['internal_api']} {lib['version']} {lib.get('architecture', '')}" for lib in blas) or "unknown",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
