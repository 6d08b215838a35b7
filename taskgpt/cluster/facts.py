"""What a process of the cluster is: asked of each, by reference, so that it must have a taskgpt. Importing this costs nothing.

What takes time, libraries and files, happens beside the event loop, which goes on answering others.
"""

import asyncio
import hashlib
import platform
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from distributed import Worker

PACKAGES = ("numpy", "numba", "llvmlite", "scipy", "dask", "distributed", "taskgpt")  # that must be the same everywhere


async def facts_of(dask_worker: "Worker") -> dict[str, Any]:
    """Return what a worker is, of plain types. Dask gives a function that it runs in a worker that worker."""
    found = await asyncio.to_thread(_of_process)
    manager = dask_worker.memory_manager
    return found | {
        "name": str(dask_worker.name),
        "status": dask_worker.status.name,
        "threads": dask_worker.state.nthreads,
        "busy_with": sorted({_first_word(key) for key in (task.key for task in dask_worker.state.executing)}),
        "limit_bytes": manager.memory_limit or 0,
        "pause_at": manager.memory_pause_fraction or 0.0,
        "terminate_at": _terminate_at() if dask_worker.nanny else 0.0,
        "clock_offset_s": -dask_worker.scheduler_delay,  # as Dask's heartbeats measure both
        "latency_s": dask_worker.latency,
    }


def versions() -> dict[str, str]:
    """Return the versions of what must be the same everywhere; `source` is a digest of taskgpt's own files."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found | {"source": _source()}


def _of_process() -> dict[str, Any]:
    from llvmlite import binding  # here, as these take seconds to import

    from taskgpt.lab.machine import free_memory_bytes
    from taskgpt.schedulers.cores import usable_cores

    return {
        "host": socket.gethostname(),
        "pid": psutil.Process().pid,
        "cores": usable_cores(),
        "processor": binding.get_host_cpu_name(),
        "total_bytes": psutil.virtual_memory().total,
        "free_bytes": free_memory_bytes(),
        "versions": versions(),
        "mpi_rank": _mpi_rank(),
    }


def _source() -> str:
    """Return a digest of taskgpt's own files: two of one version may differ while one is being written."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _mpi_rank() -> int | None:
    """Return this process' rank of a job that MPI started, and initialized; MPI is not imported for that, as that would begin one."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi.COMM_WORLD.Get_rank() if mpi is not None and mpi.Is_initialized() and mpi.COMM_WORLD.Get_size() > 1 else None


def _terminate_at() -> float:
    import dask

    return dask.config.get("distributed.worker.memory.terminate") or 0.0


def _first_word(key: object) -> str:
    return str(key[0] if isinstance(key, tuple) else key).partition("-")[0][:40]
