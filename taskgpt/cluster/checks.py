"""Whether a cluster can run a training: its workers are waited for, asked what they are, and refused in one message that says why.

Nothing is assumed of a cluster that others have set up. Whatever its settings say, Dask never steals a task that is bound to a worker, as a
rank is, and has no other worker run it when its own dies: the run itself ends such a task.
"""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client

from taskgpt.cluster.facts import facts_of, versions
from taskgpt.cluster.settings import Settings
from taskgpt.errors import UserError, shorten
from taskgpt.progress import Progress

POLL_S = 0.2
Answers = dict[str, Any]  # by address: what a worker is (facts.facts_of), or why it did not answer
ANSWER_S = 60.0  # a worker imports numba before it answers, from a disk that all share, maybe


@dataclass(frozen=True)
class Member:
    """A worker process that may become a rank."""

    address: str
    host: str  # name of its machine
    name: str  # Dask's name of the worker
    pid: int
    cores: int  # that the process may use
    memory_limit: int  # bytes that it may have before Dask pauses or ends it; without such a limit, those that its machine has free
    mpi_rank: int | None  # in the job that mpiexec started


def ready(client: Client, settings: Settings, needed_bytes: int, say: Callable[[str], None]) -> list[Member]:
    """Wait for workers; return those that take part, sorted by host and name. `needed_bytes`: of memory, by each rank.

    Raises UserError for too few of them, and for workers that a run would fail on, all in one message.
    """
    wait_for_workers(client, settings)
    found = look(client)
    while _some_left(client, found):  # one that dies is no fault of the others
        wait_for_workers(client, settings)
        found = look(client)
    members, faults = fit(found, needed_bytes)
    members = members[: settings.ranks or None]
    if faults := [*faults, *crowded(members, found, needed_bytes)]:
        raise UserError(f"{settings.where}: {'; '.join(faults)}")
    for note in notes_on(found):
        say(note)
    return members


def wait_for_workers(client: Client, settings: Settings) -> None:
    """Return when there are as many workers as the run wants, or at least one. Raises UserError if time is up."""
    wanted, deadline = settings.ranks or settings.started or 1, time.monotonic() + settings.wait_s
    with Progress("waiting for workers", wanted) as progress:
        while (count := len(workers_of(client))) < wanted:
            if (left_s := deadline - time.monotonic()) <= 0:
                do = "start more, or wait longer (wait_s)" + ", or take fewer (ranks)" * (count > 0)
                raise UserError(f"{settings.where}: wanted {_counted(wanted)} within {settings.wait_s:g} s, got {count}; {do}")
            progress.show(count, left_s=left_s)
            time.sleep(min(POLL_S, left_s))


def look(client: Client) -> Answers:
    """Return what each worker is by its address: what facts.facts_of says of it, or why it did not answer."""
    return ask(client, list(workers_of(client)), facts_of, timeout_s=ANSWER_S)


def looking(client: Client, addresses: Sequence[str]) -> Future[Answers]:
    """Begin to `look` at these workers alone; return what will have the answers."""
    return asking(client, addresses, facts_of, timeout_s=ANSWER_S)


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """Return what Dask's scheduler says of its workers, by address. Raises UserError if the connection to it is lost for good."""
    workers = client.scheduler_info(n_workers=-1).get("workers")
    if workers is None or client.status not in ("running", "connecting"):
        where = getattr(client.scheduler, "address", "the cluster")
        raise UserError(f"{where}: Dask's scheduler is gone, and its workers with it; start it and them again")
    return workers


def _some_left(client: Client, found: Answers) -> bool:
    """Return True if a worker that did not answer is the cluster's no more."""
    silent = {address for address, facts in found.items() if isinstance(facts, OSError)}
    return bool(silent - workers_of(client).keys())


def ask(client: Client, addresses: Sequence[str], function: Callable, *args: object, timeout_s: float) -> Answers:
    """Call a function in these workers, all at once; return what each answers by its address, or what was raised. One may hang alone."""
    answers: Answers = {}
    asked = asking(client, addresses, function, *args, timeout_s=timeout_s, answers=answers)
    try:
        with Progress("asking workers", len(addresses)) as progress:
            while not asked.done():
                progress.show(len(answers))
                with suppress(TimeoutError):
                    asked.result(POLL_S)
    finally:
        asked.cancel()
    return asked.result()


def asking(
    client: Client, addresses: Sequence[str], function: Callable, *args: object, timeout_s: float, answers: Answers | None = None
) -> Future[Answers]:
    """Begin to `ask`; return what will have the answers. `answers`: where they are put as they come."""
    found: Answers = {} if answers is None else answers

    async def one(address: str) -> None:
        try:
            answer = client.run(function, *args, workers=[address], on_error="return", asynchronous=True)
            found[address] = (await asyncio.wait_for(answer, timeout_s)).get(address, ConnectionError("is gone"))
        except Exception as error:
            found[address] = error

    async def every() -> Answers:
        await asyncio.gather(*map(one, addresses))
        return {address: found[address] for address in addresses}

    return asyncio.run_coroutine_threadsafe(every(), client.loop.asyncio_loop)


# What is wrong ----------------------------------------------------------------------------------------------------------------------------


def fit(found: Answers, needed_bytes: int) -> tuple[list[Member], list[str]]:
    """Return the workers that a run can use, sorted by host and name; and the faults of others, each with all that have it."""
    here, by_fault, members = versions(), defaultdict(list), []
    for address, facts in found.items():
        faults = list(_faults(facts, here, needed_bytes))
        for fault in faults:
            by_fault[fault].append(_called(address, facts))
        if not faults:
            limit = int(_limit(facts))
            members.append(Member(address, facts["host"], facts["name"], facts["pid"], facts["cores"], limit, facts["mpi_rank"]))
    members.sort(key=lambda member: (member.host, member.name.zfill(8), member.address))
    return members, [f"{', '.join(sorted(workers))}: {what}; {do}" for (what, do), workers in by_fault.items()]


def _faults(facts: Any, here: dict[str, str], needed_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield (what is wrong with a worker, what to do)."""
    if isinstance(facts, Exception) and (missing := re.search(r"No module named '([\w.]+)'", str(facts))):  # as text, from another process
        yield f"has no {missing[1].partition('.')[0]}", "install taskgpt there, in the environment of the worker"
    elif isinstance(facts, TimeoutError):
        yield f"does not answer within {ANSWER_S:.0f} s", "end it, or look at what it does"
    elif isinstance(facts, BaseException):
        yield f"answers {type(facts).__name__}: {shorten(facts, 100)}", "restart it"
    if isinstance(facts, BaseException):
        return
    differs = [f"{what} {there}, here {here.get(what)}" for what, there in facts["versions"].items() if there != here.get(what)]
    if differs:
        yield ", ".join(differs).replace("source", "taskgpt's source"), "install the same there"
    if facts["status"] != "running":
        yield f"is {facts['status']}", "wait until it runs, or restart it"
    if facts["threads"] < 1:
        yield "has no threads for tasks", "start it with --nthreads 1"
    if needed_bytes > (limit := _limit(facts)) and facts["limit_bytes"]:
        yield (
            f"a rank needs {_gib(needed_bytes)}, Dask lets the worker have {_gib(limit)} of its limit of {_gib(facts['limit_bytes'])}",
            "start it with --memory-limit 0, or a higher one",
        )


def crowded(members: Sequence[Member], found: Answers, needed_bytes: int) -> Iterator[str]:
    """Yield what is wrong with machines: memory that ranks, each of which has enough, do not have together."""
    for host, ranks in _by_host(members).items():
        free = min(found[rank.address]["free_bytes"] for rank in ranks)
        if needed_bytes * len(ranks) > free:
            do = "take fewer ranks there, or a smaller model or batch"
            yield f"{host}: {len(ranks)} ranks need {_gib(needed_bytes * len(ranks))}, {_gib(free)} are free; {do}"


def notes_on(found: Answers) -> Iterator[str]:
    """Yield what a run goes on with, and its user should know."""
    answers = {address: facts for address, facts in found.items() if isinstance(facts, dict)}
    processors = sorted({facts["processor"] for facts in answers.values()})
    if len(processors) > 1:
        yield f"workers have different processors ({', '.join(processors)}): their replicas may differ in last bits"
    for address, facts in answers.items():
        if facts["busy_with"]:
            yield f"{_called(address, facts)} is busy with {', '.join(map(shorten, facts['busy_with']))}; what both do takes longer"


def native_workers(member: Member, members: Sequence[Member], settings: Settings) -> int:
    """Return how many native workers a rank has: as set, or the cores of its process, shared with the ranks on its machine."""
    return settings.workers or max(1, member.cores // len(_by_host(members)[member.host]))


def _by_host(members: Sequence[Member]) -> dict[str, list[Member]]:
    hosts: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        hosts[member.host].append(member)
    return hosts


def _limit(facts: dict[str, Any]) -> float:
    """Return how many bytes a worker may have before Dask pauses or ends it; without a limit of Dask's, those that are free."""
    if not facts["limit_bytes"]:
        return facts["free_bytes"]
    return facts["limit_bytes"] * min([part for part in (facts["pause_at"], facts["terminate_at"]) if part] or [1.0])


def _called(address: str, facts: Any) -> str:
    return f"{address} on {facts['host']}" if isinstance(facts, dict) else address


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _counted(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"
