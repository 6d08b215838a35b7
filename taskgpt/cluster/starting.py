"""A cluster that is started for a run, and ends with it: worker processes here, by SSH, in jobs of a batch system, under mpiexec.

Everything that is started listens on the address that the settings name, a host or an interface, and on 127.0.0.1 where they name none.
"""

import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import dask
import psutil
from distributed import Client, SpecCluster
from distributed.deploy import ssh
from distributed.security import Security
from distributed.utils import silence_logging_cmgr

from taskgpt.cluster.settings import Settings
from taskgpt.errors import UserError, shorten
from taskgpt.schedulers import local_cluster
from taskgpt.schedulers.cores import usable_cores

_HERE = "127.0.0.1:0"  # where each process serves its own state over HTTP; Dask's default is every address
_IDLE = "1 hour"  # after which a scheduler on another machine ends by itself, with its workers: who started it may have been killed
_NO_SCHEDULER = "60 s"  # after which a worker ends that has not found its scheduler


def described(settings: Settings) -> str:
    """Return a few words for people: what is started, and where."""
    count = settings.started
    if settings.start == "local":
        return f"{count} worker process{'es' * (count > 1)} on 127.0.0.1"
    if settings.start == "ssh":
        return f"{count} worker process{'es' * (count > 1)} by SSH on {shorten(settings.hosts, 80)}"
    return f"{count} job{'s' * (count > 1)} of {settings.start.upper()}"


def _local(stack: ExitStack, settings: Settings, security: Security) -> Client:
    options = {"threads_per_worker": 1, "scheduler_kwargs": {"dashboard": False}, "dashboard_address": _HERE}
    return local_cluster.start(stack, True, n_workers=settings.members, protocol=_protocol(security), security=security, **options)[1]


def _ssh(stack: ExitStack, settings: Settings, security: Security) -> Client:
    """Start a scheduler on the first host, and workers, each by a connection of its own, so that a worker that is lost is one."""
    _needs("asyncssh", "cluster")
    tls = _tls_config(security)
    connect: dict[str, Any] = {"config": [settings.ssh_config]} if settings.ssh_config else {}

    def process(cls: type, host: str, **others: Any) -> dict[str, Any]:
        listens = {"interface": settings.interface} if settings.interface else {"host": host}
        options = {"address": host, "connect_options": connect, "remote_python": settings.python or None}
        kwargs = {**listens, **others, "dashboard_address": _HERE, "protocol": _protocol(security)}
        return {"cls": cls, "options": {**options, "kwargs": kwargs}}

    hosts = settings.hosts.split()
    scheduler = process(ssh.Scheduler, hosts[0], dashboard=False, port=0, idle_timeout=_IDLE)
    places = [(host, number) for host in hosts for number in range(settings.members)]
    alone = {"nthreads": 1, "memory_limit": 0, "death_timeout": _NO_SCHEDULER}
    workers = [process(ssh.Worker, host, name=f"{host}-{number}", **alone) for host, number in places]

    def make() -> SpecCluster:
        with dask.config.set(tls):  # which the processes there inherit: names of files, no keys
            return SpecCluster(dict(enumerate(workers)), scheduler, name="taskgpt", security=security)

    return _started(stack, settings, make, f"does `ssh {hosts[0]} true` work without a question, and is taskgpt there?")


def _jobs(stack: ExitStack, settings: Settings, security: Security) -> Client:
    """Start a scheduler here, and a job for each worker."""
    _needs("dask_jobqueue", "cluster")
    import dask_jobqueue

    make_cluster = {"slurm": dask_jobqueue.SLURMCluster, "pbs": dask_jobqueue.PBSCluster}[settings.start]
    worker = ["--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--dashboard-address", _HERE]  # the last of each counts
    if not settings.interface:
        worker += ["--host", "127.0.0.1"]
    listens = {"interface": settings.interface} if settings.interface else {"host": "127.0.0.1"}
    profile = "distributed.worker.profile.enabled"
    prologue = [f"export DASK_{profile.upper().replace('.', '__')}={local_cluster.CONFIG[profile]}", *settings.prologue.splitlines()]

    def make() -> SpecCluster:
        return make_cluster(
            cores=settings.cores or usable_cores(),
            processes=1,
            memory=settings.memory,
            queue=settings.queue or None,
            walltime=settings.walltime or None,
            interface=settings.interface or None,
            python=settings.python or None,
            job_name="taskgpt",
            job_extra_directives=[line.strip() for line in settings.directives.splitlines() if line.strip()],
            job_script_prologue=prologue,
            worker_extra_args=worker,
            protocol=_protocol(security),
            security=security if security.require_encryption else None,
            scheduler_options={**listens, "dashboard": False, "dashboard_address": _HERE, "port": 0},
        )

    submit = {"slurm": "sbatch", "pbs": "qsub"}[settings.start]
    return _started(stack, settings, make, f"would {submit} take such a job?", settings.members)


def _started(stack: ExitStack, settings: Settings, make: Callable[[], SpecCluster], question: str, jobs: int = 0) -> Client:
    """Start a cluster that ends with `stack`, and further jobs in it; return a client. Raises UserError, which ends in a question."""

    def begin() -> Client:
        with dask.config.set(local_cluster.CONFIG), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cluster = make()
        stack.callback(_close, cluster)

        async def whole() -> None:
            await cluster

        for _ in range(jobs):  # one by one, and not by scale(), which would log what goes wrong, and say nothing here
            cluster.worker_spec.update(cluster.new_worker_spec())
            cluster.sync(whole)
        return stack.enter_context(Client(cluster, set_as_default=False))

    try:
        with ThreadPoolExecutor(1) as starter:  # Ctrl-C in the middle waits for its end, and then finds a cluster that can be closed
            return starter.submit(begin).result()
    except Exception as error:
        why: BaseException = error
        while cause := why.__cause__ or why.__context__:
            why = cause
        found = f"{type(why).__name__}: {shorten(_last_line(str(why)))}"
        raise UserError(f"{settings.where}: did not start: {found}; {question}") from None


def _close(cluster: SpecCluster) -> None:
    with suppress(AssertionError, OSError):  # after all the rest, about a job that was refused; by a scheduler that is gone
        cluster.close()


def _last_line(text: str) -> str:
    """Return what a command that failed said last, where Dask quotes all that it said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower()]
    return (said or lines or [""])[-1]


def join_mpi(settings: Settings, security: Security) -> None:
    """Have this process be what its rank under mpiexec says: the first one the cluster's scheduler, the second the program, others workers.

    It returns in the program alone. In the others it ends the process, with exit code 0, when the cluster ends. Raises UserError for too
    few processes.
    """
    if dask.config.get(_MPI_ADDRESS, None):
        return
    _needs("dask_mpi", "mpi")
    from dask_mpi import initialize
    from mpi4py import MPI

    if (size := MPI.COMM_WORLD.Get_size()) < 3:
        what = "wanted 3 processes at least, for Dask's scheduler, the program and one worker"
        raise UserError(f"{settings.where}: {what}, got {size}; begin with `mpiexec -n 4`, say")
    dask.config.set({**local_cluster.CONFIG, **_tls_config(security)})
    with silence_logging_cmgr(logging.ERROR):  # each process would tell its whole life on the one standard error that all have
        is_program = initialize(
            interface=settings.interface or _loopback(),
            nthreads=1,
            memory_limit=0,
            dashboard=False,
            dashboard_address=_HERE,
            protocol=_protocol(security),
            worker_options={"dashboard_address": _HERE},
            exit=False,
        )
    if not is_program:
        raise SystemExit(0)


_MPI_ADDRESS = "scheduler_address"  # dask-mpi's


def _mpi(stack: ExitStack, settings: Settings, security: Security) -> Client:
    join_mpi(settings, security)
    from mpi4py import MPI

    client = Client(dask.config.get(_MPI_ADDRESS), security=security, set_as_default=False)
    stack.callback(client.shutdown)  # which ends the other processes too
    wanted = MPI.COMM_WORLD.Get_size() - 2
    try:
        client.wait_for_workers(wanted, timeout=settings.wait_s)
    except TimeoutError:
        raise UserError(
            f"{settings.where}: wanted {wanted} workers within {settings.wait_s:g} s; what do the other processes say?"
        ) from None
    return client


def _loopback() -> str:
    """Return the interface that has 127.0.0.1."""
    names = [name for name, addresses in psutil.net_if_addrs().items() if any(each.address == "127.0.0.1" for each in addresses)]
    return names[0] if names else "lo"


def _protocol(security: Security) -> str:
    return "tls://" if security.require_encryption else "tcp://"


def _tls_config(security: Security) -> dict[str, Any]:
    """Return Dask's configuration that has other processes take the same certificates: paths of files, which are there too."""
    if not security.require_encryption:
        return {}
    config: dict[str, Any] = {"distributed.comm.tls.ca-file": security.tls_ca_file, "distributed.comm.require-encryption": True}
    for role in ("scheduler", "worker", "client"):
        for what in ("cert", "key"):
            config[f"distributed.comm.tls.{role}.{what}"] = getattr(security, f"tls_{role}_{what}")
    return config


def _needs(module: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{module} cannot be imported ({shorten(error, 100)}); pip install 'taskgpt[{extra}]'") from None


STARTERS: dict[str, Callable[[ExitStack, Settings, Security], Client]] = {
    "local": _local,
    "ssh": _ssh,
    "slurm": _jobs,
    "pbs": _jobs,
    "mpi": _mpi,
}
