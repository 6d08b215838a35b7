"""Hosts made of network namespaces are hosts: rates, cuts and counts of their links are what tests of clusters rely on."""

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hosts import ASK, ECHO, LEAST_BURST, SINK, SOURCE, DaskHosts, Hosts, seconds_for, why_no_delay, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts can be made")


@pytest.fixture(scope="module")
def hosts():
    """Three hosts; what is sent to the first one is counted, or sent back."""
    with Hosts(3) as hosts:
        for program in (SINK, ECHO):
            assert hosts.python(0, program, hosts.addresses[0]).stdout.readline() == "ready\n"
        yield hosts


def test_a_link_is_no_faster_than_its_rate(hosts):
    """But for what both ends of a link let through at once."""
    hosts.shape(gbits=0.1)
    assert seconds_for(hosts, 4) > (4 * 2**20 - 2 * LEAST_BURST) * 8 / 0.1e9


def test_a_rate_changes_while_the_link_is_used(hosts):
    """What would take two and a half minutes is there in time."""
    hosts.shape(gbits=0.005)
    with hosts.python(1, SOURCE, hosts.addresses[0], 90) as source:
        before = hosts.bytes(0)[0]
        while hosts.bytes(0)[0] < before + 4 * LEAST_BURST:
            assert source.poll() is None
        hosts.shape()
        source.communicate(timeout=60)
    assert hosts.bytes(0)[0] - before >= 90 * 2**20 * 0.99


def test_who_is_cut_off_is_silent_and_comes_back(hosts):
    """Neither end of a comm hears of it; the third host does not notice. Mended, the same comm goes on."""
    hosts.shape()

    def answer(process: subprocess.Popen) -> str:
        process.stdin.write("?\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with hosts.python(1, ASK, hosts.addresses[0]) as one, hosts.python(2, ASK, hosts.addresses[0]) as two:
        assert "silence" not in (answer(one), answer(two))
        hosts.cut(1)
        assert answer(one) == "silence" != answer(two)
        hosts.mend(1)
        while answer(one) == "silence":  # TCP sends again, at longer and longer intervals
            pass
        one.communicate(), two.communicate()


@pytest.mark.skipif(bool(why_no_delay()), reason=why_no_delay() or "links can have a delay")
def test_a_round_trip_takes_the_delay(hosts):
    """No answer comes sooner."""
    hosts.shape(delay_ms=20)
    with hosts.python(1, ASK, hosts.addresses[0]) as ask:
        took, _ = ask.communicate("?\n" * 5)
    assert min(map(float, took.split())) >= 0.02


def test_bytes_are_those_of_the_wire(hosts):
    """What host 1 sends, host 0 receives, and there is more of it than the program sent; host 2 has nothing to do with it."""
    hosts.shape()
    before = [hosts.bytes(number) for number in range(3)]
    seconds_for(hosts, 8)
    (received, _), (_, sent), others = [
        tuple(now - then for now, then in zip(hosts.bytes(number), before[number], strict=True)) for number in range(3)
    ]
    assert 8 * 2**20 < received == sent < 8 * 2**20 * 1.02
    assert max(others) < 10000


def test_a_host_sees_its_own_network_alone(hosts):
    """And has the address that it was given."""
    with hosts.popen(2, ["ip", "-brief", "address"], stdout=subprocess.PIPE, text=True) as process:
        seen = process.communicate()[0].split()
    assert [word for word in seen if word.startswith(("lo", "eth"))] == ["lo", *[word for word in seen if word.startswith("eth0")]]
    assert f"{hosts.addresses[2]}/24" in seen


def test_nothing_is_left(tmp_path):
    """Not when the program that made hosts is killed, either: what it started ends, and the namespaces with it."""
    program = (
        "import os, signal, sys\nfrom hosts import Hosts\n"
        "with Hosts(2) as hosts:\n"
        "    print(hosts.popen(1, ['sleep', 1000]).pid, hosts._hub.pid, *[host.pid for host in hosts._hosts], flush=True)\n"
        "    sys.argv[1] == 'killed' and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    raise KeyError\n"
    )
    for how, code in (("killed", -signal.SIGKILL), ("failed", 1)):
        done = subprocess.run([sys.executable, "-c", program, how], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.returncode == code
        for pid in map(int, done.stdout.split()):
            with suppress(ProcessLookupError):  # gone already
                ended = os.pidfd_open(pid)
                assert select.select([ended], [], [], 30)[0], f"{how}: process {pid} is still there"
                os.close(ended)


def test_a_cluster_on_hosts():
    """A client on the scheduler's host finds a worker on each of the others; it has the host's address."""
    program = (
        "import sys\nfrom dask.distributed import Client\n"
        "with Client(sys.argv[1]) as client:\n"
        "    print(*sorted(worker.partition('//')[2].partition(':')[0] for worker in client.scheduler_info()['workers']))\n"
    )
    with (
        DaskHosts(2) as hosts,
        hosts.popen(0, [sys.executable, "-c", program, hosts.scheduler], stdout=subprocess.PIPE, text=True) as client,
    ):
        assert client.communicate()[0].split() == hosts.addresses[1:]
