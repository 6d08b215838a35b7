"""Hosts made of network namespaces, on one bridge, whose links have a rate and a delay and can be cut; and a Dask cluster on them.

    with Hosts(3, gbits=1) as hosts:
        process = hosts.popen(0, ["python", "server.py"])     # sees its host's network alone; its pid is its own
        hosts.shape(gbits=10, delay_ms=0.5)                   # of all links, in both directions, while they are used
        hosts.cut(2), hosts.mend(2)                           # frames go nowhere, and nobody is told
        hosts.addresses[1], hosts.bytes(1)                    # 10.77.0.2; (received, sent), headers too

    with DaskHosts(2) as hosts:                               # a scheduler on host 0, a worker on 1 and on 2
        hosts.popen(0, ["python", "client.py", hosts.scheduler])

A namespace is held by a process that ends when this one does, however that ends; then the namespace goes, with its devices. Nothing is made
outside of namespaces of our own, so that several programs can do this at a time. Whoever is not root needs to be allowed user namespaces.
`why_not()` says what this machine lacks, `why_no_delay()` what it lacks for delays: netem, which not every kernel has.

`python -m tests.hosts` measures links: what rate and what round trip they have, of those asked for; what they have at most on this machine.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Self

PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "tc")  # of util-linux and iproute2
HUB, DEVICE = "hub", "eth0"
QUEUE_MS = 20  # of what waits at a link that is full; the rest is lost, and TCP sends it again
BURST_MS, LEAST_BURST = 0.25, 128 << 10  # a timer may be so late and no rate is lost; twice what TCP hands over as one segment
READY_S = 60
_names = itertools.count()

SINK = """
import socket, sys
server, buffer = socket.create_server((sys.argv[1], 5000)), bytearray(1 << 20)
print("ready", flush=True)
while True:
    comm, _ = server.accept()
    while comm.recv_into(buffer):
        pass
    comm.sendall(b"!")
    comm.close()
"""
SOURCE = """
import socket, sys, time
comm, data = socket.create_connection((sys.argv[1], 5000)), bytes(1 << 20)
since = time.perf_counter()
for _ in range(int(sys.argv[2])):
    comm.sendall(data)
comm.shutdown(socket.SHUT_WR)
comm.recv(1)
print(time.perf_counter() - since)
"""
ECHO = """
import socket, sys, threading
def echo(comm):
    while data := comm.recv(100):
        comm.sendall(data)
server = socket.create_server((sys.argv[1], 5001))
print("ready", flush=True)
while True:
    threading.Thread(target=echo, args=server.accept()[:1], daemon=True).start()
"""
ASK = """
import socket, sys, time
comm = socket.create_connection((sys.argv[1], 5001))
comm.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
comm.settimeout(0.4)
for line in sys.stdin:
    since = time.perf_counter()
    comm.sendall(b"?")
    try:
        comm.recv(1)
        print(time.perf_counter() - since, flush=True)
    except TimeoutError:
        print("silence", flush=True)
"""


def _end(process: subprocess.Popen) -> None:
    """Kill a process that still runs, and close its pipes."""
    process.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe and not pipe.closed:
            pipe.close()
    process.wait()


class _Namespace:
    """A network namespace, and the process that holds it: it reads until its standard input ends, as it does when this process is gone."""

    def __init__(self, beside: "_Namespace | None" = None):
        """Make it, if root is not who asks in a new user namespace, or in that of another one. Raises OSError."""
        user = ["--user", "--map-root-user"] if os.geteuid() and beside is None else []
        command = [*(beside.enter() if beside else []), "unshare", *user, "--net", "cat"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._holder = subprocess.Popen(command, **pipes, bufsize=0, start_new_session=True)
        with suppress(BrokenPipeError):
            self._holder.stdin.write(b"?\n")
        if self._holder.stdout.readline() != b"?\n":  # it echoes as soon as it is where it shall be
            said = self._holder.stderr.read().decode().strip()
            _end(self._holder)
            raise OSError(f"{' '.join(command)}: {said}")
        self.pid = self._holder.pid
        self._place = os.readlink(f"/proc/{self.pid}/ns/net")

    def enter(self) -> list[str]:
        """Return the words before a command that runs inside, as one process, which ends with the thread that starts it."""
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        is_still_there = f'[ "$PPID" = {os.getpid()} ] && exec "$@"'  # who has ended before this would send no signal any more
        return ["nsenter", f"--target={self.pid}", *user, "--net", "setpriv", "--pdeathsig=KILL", "sh", "-c", is_still_there, "sh"]

    def run(self, program: str, lines: list[str]) -> None:
        """Have `ip` or `tc` do these lines inside. Raises OSError."""
        done = subprocess.run([*self.enter(), program, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{program}: {' '.join(done.stderr.split())}: {'; '.join(lines)}")

    def close(self) -> None:
        """Kill what runs inside, and let it go."""
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # others' processes, and those that have just ended
                if int(path.name) != self.pid and os.readlink(path / "ns" / "net") == self._place:
                    os.kill(int(path.name), signal.SIGKILL)
        _end(self._holder)


class Hosts:
    """Hosts, numbered from 0, each with one link to a bridge, which is in a namespace of its own."""

    def __init__(self, count: int, gbits: float | None = None, delay_ms: float = 0.0):
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self._asked = gbits, delay_ms
        self._is_shaped = False

    def __enter__(self) -> Self:
        """Make them. Raises OSError."""
        with ExitStack() as stack:
            self._hub = _Namespace()
            stack.callback(self._hub.close)
            # Nobody speaks unasked: no host has an address of IPv6 to tell of, and the bridge looks for no groups.
            self._hub.run(
                "ip", [f"link add name {HUB} type bridge mcast_snooping 0", f"link set {HUB} addrgenmode none", f"link set {HUB} up"]
            )
            self._hosts: list[_Namespace] = []
            for number, address in enumerate(self.addresses):
                host = _Namespace(self._hub)
                stack.callback(host.close)
                self._hosts.append(host)
                self._hub.run("ip", [f"link add name port{number} type veth peer name {DEVICE} netns {host.pid}"])
                self._hub.run("ip", [f"link set port{number} addrgenmode none", f"link set port{number} master {HUB} up"])
                host.run(
                    "ip",
                    [
                        "link set lo up",
                        f"addr add {address}/24 dev {DEVICE}",
                        f"link set {DEVICE} addrgenmode none",
                        f"link set {DEVICE} up",
                    ],
                )
            self.shape(*self._asked)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def shape(self, gbits: float | None = None, delay_ms: float = 0.0) -> None:
        """Give each link a rate, both ways, or none, and a delay, of a round trip. What waits at links is lost, as on a line that flaps.

        Raises OSError where the kernel has no netem, for delays.
        """
        lines = ["qdisc del dev DEVICE root"] if self._is_shaped else []
        if gbits is not None:
            burst = max(LEAST_BURST, int(gbits * 1e9 / 8 * BURST_MS / 1e3))
            lines.append(f"qdisc add dev DEVICE root handle 1: tbf rate {int(gbits * 1e9)}bit burst {burst} latency {QUEUE_MS}ms")
        if delay_ms:  # a quarter at each of the four queues on the way from host to host and back
            where = "root" if gbits is None else "parent 1:1"
            lines.append(f"qdisc add dev DEVICE {where} handle 2: netem delay {delay_ms / 4}ms limit 100000")
        self._is_shaped = gbits is not None or delay_ms > 0
        for number, host in enumerate(self._hosts):
            self._hub.run("tc", [line.replace("DEVICE", f"port{number}") for line in lines])
            host.run("tc", [line.replace("DEVICE", DEVICE) for line in lines])

    def cut(self, number: int) -> None:
        """Take a host off the bridge. Its device has a carrier all the same, as behind a switch that fails."""
        self._hub.run("ip", [f"link set port{number} nomaster"])

    def mend(self, number: int) -> None:
        """Put it back."""
        self._hub.run("ip", [f"link set port{number} master {HUB}"])

    def bytes(self, number: int) -> tuple[int, int]:
        """Return how many bytes a host has received and sent since it was made, with headers down to those of Ethernet."""
        lines = Path(f"/proc/{self._hosts[number].pid}/net/dev").read_text().splitlines()
        [counts] = [line.split() for line in lines if line.strip().startswith(f"{DEVICE}:")]
        return int(counts[1]), int(counts[9])

    def popen(self, number: int, command: list, **options) -> subprocess.Popen:
        """Start a program on a host. It is killed at the end at the latest, or when the thread that starts it ends."""
        process = subprocess.Popen([*self._hosts[number].enter(), *map(str, command)], **options)
        self._stack.callback(_end, process)
        return process

    def python(self, number: int, program: str, *arguments: object) -> subprocess.Popen:
        """Start a program that is given as text, without pages of its own that Python would have to find; its ends are text pipes."""
        command = [sys.executable, "-I", "-S", "-c", program, *arguments]
        return self.popen(number, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class DaskHosts(Hosts):
    """A Dask cluster: a scheduler on host 0, where clients belong too, and a worker of one thread on each of the others."""

    def __init__(self, workers: int, gbits: float | None = None, delay_ms: float = 0.0, environment: dict[str, str] | None = None):
        """environment: what scheduler and workers see besides this process' own."""
        super().__init__(1 + workers, gbits, delay_ms)
        self.scheduler = f"tcp://{self.addresses[0]}:8786"
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Self:
        """Start it, and wait until all workers are there. Raises OSError."""
        super().__enter__()
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.push(super().__exit__)
            self.processes: list[subprocess.Popen] = []  # by host
            self._start(["scheduler", "--port", "8786"])
            self._wait(0, "Scheduler at")
            for number in range(1, len(self.addresses)):
                self._start(self._worker(number))
            for number in range(1, len(self.addresses)):
                self._wait(number, "Registered to")
            self._cluster = stack.pop_all()
        return self

    def start_worker(self, number: int) -> None:
        """Start a host's worker again, which has ended, and wait until it is there. Raises OSError."""
        self._start(self._worker(number), number)
        self._wait(number, "Registered to")

    def _worker(self, number: int) -> list[str]:
        words = ["--nthreads", "1", "--memory-limit", "0", "--no-nanny", "--name", f"{number}-{next(_names)}"]  # another each time
        return ["worker", self.scheduler, *words, "--local-directory", str(self.folder / f"worker-{number}")]

    def __exit__(self, *_: object) -> None:
        self._cluster.close()

    def log(self, number: int) -> str:
        """Return what the host's scheduler or worker has said."""
        return (self.folder / f"{number}.log").read_text()

    def _start(self, words: list[str], again: int | None = None) -> None:
        number = len(self.processes) if again is None else again
        command = [sys.executable, "-m", "dask", *words, "--host", self.addresses[number], "--no-dashboard"]
        with (self.folder / f"{number}.log").open("w") as log:
            self.processes[number:] = [
                self.popen(number, command, stdout=log, stderr=log, env=self._environment), *self.processes[number + 1 :]
            ]  # fmt: skip

    def _wait(self, number: int, words: str) -> None:
        until = time.monotonic() + READY_S
        while words not in self.log(number):
            if self.processes[number].poll() is not None or time.monotonic() > until:
                raise OSError(f"host {number}, wanted '{words}', got: {self.log(number)}")
            time.sleep(0.02)


@cache
def why_not() -> str:
    """Return why there can be no hosts on this machine, or nothing."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install util-linux iproute2"
    try:
        with Hosts(2, gbits=1):
            return ""
    except OSError as error:
        return f"no hosts of network namespaces: {error}"


@cache
def why_no_delay() -> str:
    """Return why links can have no delay on this machine, or nothing."""
    try:
        with Hosts(2, delay_ms=1):
            return ""
    except OSError as error:
        return why_not() or f"links have no delay: {error}"


def seconds_for(hosts: Hosts, mebibytes: int) -> float:
    """Return how long host 1 takes to send so much to host 0, where SINK runs."""
    with hosts.python(1, SOURCE, hosts.addresses[0], mebibytes) as source:
        return float(source.stdout.read())


def main() -> int:
    """Print what links have of what they are asked for; return 1 if a rate or a delay is off by more than 15 %."""
    if reason := why_not():
        print(reason)
        return 0
    wrong = 0
    with Hosts(2) as hosts, hosts.python(0, SINK, hosts.addresses[0]) as sink, hosts.python(0, ECHO, hosts.addresses[0]) as echo:
        assert sink.stdout.readline() == echo.stdout.readline() == "ready\n"
        for gbits, mebibytes in ((0.1, 10), (1, 100), (10, 2000), (None, 4000)):
            hosts.shape(gbits)
            got = sorted(mebibytes * 2**20 * 8 / 1e9 / seconds_for(hosts, mebibytes) for _ in range(3))
            print(f"{'no limit' if gbits is None else f'{gbits} Gb/s':>9}: {got[1]:7.3f} Gb/s  ({got[0]:.3f} to {got[2]:.3f})", flush=True)
            wrong += gbits is not None and abs(got[1] / gbits - 1) > 0.15
        for delay_ms in (0.0, 1.0, 10.0):
            if delay_ms and why_no_delay():
                print(why_no_delay())
                break
            hosts.shape(1, delay_ms)
            with hosts.python(1, ASK, hosts.addresses[0]) as ask:
                took, _ = ask.communicate("?\n" * 101)
            got_ms = sorted(map(float, took.split()))[50] * 1e3
            print(f"{delay_ms:6.1f} ms: {got_ms:7.3f} ms a round trip", flush=True)
            wrong += delay_ms > 0 and abs(got_ms / delay_ms - 1) > 0.15
        sink.kill(), echo.kill()
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
