"""Workers of a foreign cluster are asked what they are; those that a run would fail on are named in one message, with what to do."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from distributed import LocalCluster

from taskgpt.cluster import checks
from taskgpt.cluster.checks import Member, crowded, fit, native_workers, notes_on, ready
from taskgpt.cluster.facts import versions
from taskgpt.cluster.opening import opened
from taskgpt.config import load_scheduler
from taskgpt.errors import UserError

GIB = 1 << 30


def settings(**changes):
    return load_scheduler("cluster", changes, may_be_cluster=True).settings


def facts(**changes) -> dict:
    """Return what a worker on the machine `a` answers that a run can use."""
    memory = {"total_bytes": 8 * GIB, "free_bytes": 4 * GIB, "limit_bytes": 0, "pause_at": 0.8, "terminate_at": 0.95}
    process = {"host": "a", "pid": 1, "cores": 4, "processor": "x", "versions": versions(), "mpi_rank": None}
    of_dask = {"name": "0", "status": "running", "threads": 1, "busy_with": [], "clock_offset_s": 0.0, "latency_s": 0.001}
    return memory | process | of_dask | changes


def test_workers_that_differ_are_named_together():
    """Each difference with all that have it, what is there, what is here, and what to do; the others can be used."""
    older = versions() | {"numpy": "1.26.0", "source": "0123456789ab"}
    found = {
        "tcp://a:1": facts(),
        "tcp://b:1": facts(host="b", versions=older),
        "tcp://b:2": facts(host="b", versions=older),
        "tcp://c:1": Exception("ModuleNotFoundError(\"No module named 'taskgpt'\")"),
        "tcp://d:1": TimeoutError(),
        "tcp://e:1": facts(host="e", status="paused", threads=0),
        "tcp://f:1": OSError("connection\nreset"),
    }
    members, faults = fit(found, 0)
    here = versions()
    assert [member.address for member in members] == ["tcp://a:1"]
    assert faults == [
        f"tcp://b:1 on b, tcp://b:2 on b: numpy 1.26.0, here {here['numpy']}, taskgpt's source 0123456789ab, here {here['source']}; "
        "install the same there",
        "tcp://c:1: has no taskgpt; install taskgpt there, in the environment of the worker",
        "tcp://d:1: does not answer within 60 s; end it, or look at what it does",
        "tcp://e:1 on e: is paused; wait until it runs, or restart it",
        "tcp://e:1 on e: has no threads for tasks; start it with --nthreads 1",
        r"tcp://f:1: answers OSError: connection\nreset; restart it",
    ]


def test_memory_that_is_not_there():
    """Of a worker that Dask would pause or end first, and of a machine whose ranks have enough each, but not together."""
    limited = facts(limit_bytes=2 * GIB)
    assert fit({"w": limited}, 1 * GIB)[1] == []
    assert fit({"w": limited}, int(1.8 * GIB))[1] == [
        "w on a: a rank needs 1.8 GiB, Dask lets the worker have 1.6 GiB of its limit of 2.0 GiB; "
        "start it with --memory-limit 0, or a higher one"
    ]
    assert fit({"w": facts(limit_bytes=2 * GIB, pause_at=0.0)}, int(1.8 * GIB))[0][0].memory_limit == int(1.9 * GIB)
    assert fit({"w": facts(limit_bytes=2 * GIB, pause_at=0.0, terminate_at=0.0)}, 2 * GIB)[1] == []
    found = {"v": facts(name="1"), "w": facts()}
    members, _ = fit(found, 3 * GIB)
    assert list(crowded(members, found, 3 * GIB)) == [
        "a: 2 ranks need 6.0 GiB, 4.0 GiB are free; take fewer ranks there, or a smaller model or batch"
    ]
    assert list(crowded(members[:1], found, 3 * GIB)) == []


def test_members_are_sorted_and_share_their_cores():
    """By machine, then by name, numbers as numbers; native workers of a rank are its cores, divided by the ranks there."""
    found = {f"tcp://{host}:{name}": facts(host=host, name=name) for host, name in (("b", "0"), ("a", "10"), ("a", "9"))}
    members, _ = fit(found, 0)
    assert [(member.host, member.name) for member in members] == [("a", "9"), ("a", "10"), ("b", "0")]
    assert [native_workers(member, members, settings()) for member in members] == [2, 2, 4]
    assert native_workers(members[0], members, settings(workers=3)) == 3


def test_what_a_run_goes_on_with_is_noted():
    """Processors that differ, and workers that have something else to do."""
    found = {"v": facts(busy_with=["inc"]), "w": facts(processor="y")}
    assert list(notes_on(found)) == [
        "workers have different processors (x, y): their replicas may differ in last bits",
        "v on a is busy with inc; what both do takes longer",
    ]


@pytest.fixture(scope="module")
def there():
    """A cluster of two workers in threads of this process."""
    quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}, "silence_logs": 50}
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", memory_limit=0, **quiet) as cluster:
        yield cluster


def test_members_of_a_cluster(there):
    """As many as wanted; with too few, how many there are, and what to do."""
    with opened(settings(address=there.scheduler_address), print) as client:
        both = ready(client, settings(address=there.scheduler_address), 1, print)
        assert [type(member) for member in both] == [Member, Member]
        assert {member.pid for member in both} == {os.getpid()}
        [one] = ready(client, settings(address=there.scheduler_address, ranks=1), 1, print)
        assert one.address == both[0].address
        few = settings(address=there.scheduler_address, ranks=3, wait_s=0.1)
        with pytest.raises(UserError, match=r"wanted 3 workers within 0\.1 s, got 2; start more, or wait longer \(wait_s\), or take fewer"):
            ready(client, few, 1, print)
        with pytest.raises(UserError, match=r"2 ranks need .* are free; take fewer ranks"):
            ready(client, settings(address=there.scheduler_address), 1 << 60, print)


def test_processes_that_a_run_cannot_use(tmp_path, monkeypatch):
    """One without taskgpt, one with a small memory limit, one that is stopped: each is named, the stopped one too."""
    (tmp_path / "without.py").write_text(
        textwrap.dedent("""
            import sys

            class Without:
                def find_spec(self, name, *others):
                    if name.partition(".")[0] == "taskgpt":
                        raise ModuleNotFoundError("No module named 'taskgpt'", name="taskgpt")

            sys.meta_path.insert(0, Without())
        """)
    )
    quiet = {"dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}, "silence_logs": 50}
    with LocalCluster(n_workers=0, processes=False, protocol="tcp://", **quiet) as cluster:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--no-nanny", "--no-dashboard"]
        worker += ["--host", "127.0.0.1", "--nthreads", "1", "--local-directory", str(tmp_path), "--name"]
        more = {"without": ["--preload", str(tmp_path / "without.py")], "small": ["--memory-limit", "1GiB"], "stopped": []}
        processes = [subprocess.Popen([*worker, name, *flags], stderr=subprocess.DEVNULL) for name, flags in more.items()]
        try:
            chosen = settings(address=cluster.scheduler_address, ranks=3)
            with opened(chosen, print) as client:
                checks.wait_for_workers(client, chosen)
                names = {str(of["name"]): address for address, of in client.scheduler_info(n_workers=-1)["workers"].items()}
                checks.look(client)  # which has them import what takes longer
                monkeypatch.setattr(checks, "ANSWER_S", 3.0)
                processes[2].send_signal(signal.SIGSTOP)
                with pytest.raises(UserError) as told:
                    ready(client, chosen, 2 * GIB, print)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert f"{names['without']}: has no taskgpt; install taskgpt there" in str(told.value)
    assert f"{names['small']} on " in str(told.value) and "of its limit of 1.0 GiB; start it with --memory-limit 0" in str(told.value)
    assert f"{names['stopped']}: does not answer within 3 s" in str(told.value)
