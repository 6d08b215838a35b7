"""A client of a Dask cluster: of one that is there, by its address or the file of its scheduler, or of one that is started for the run.

with opened(settings, print) as client:
    members = ready(client, settings, needed_bytes, print)

Nothing listens on another address than 127.0.0.1 unless the settings name one: hosts, an interface.
"""

import asyncio
import logging
import os
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from distributed import Client
from distributed.comm import CommClosedError
from distributed.core import rpc
from distributed.security import Security
from distributed.utils import silence_logging_cmgr
from distributed.versions import VersionMismatchWarning

from taskgpt.cluster.settings import Settings, full_address
from taskgpt.cluster.starting import STARTERS, described
from taskgpt.errors import UserError, shorten
from taskgpt.files import read_bytes, read_json
from taskgpt.progress import Progress

CONNECT_S = 10.0
_FILE_BYTES = 1 << 20  # of a scheduler file: Dask's have 1 KB, and more for each worker that was there when it was written
_POLL_S = 0.2


@contextmanager
def opened(settings: Settings, say: Callable[[str], None]) -> Iterator[Client]:
    """Give a client of the cluster, which is not Dask's default. A cluster that is started here ends with the block.
    Raises UserError.
    """
    security = security_of(settings)
    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what goes wrong is raised
        if settings.start:
            if settings.start != "mpi":  # all of whose processes get here, and one further
                say(f"starting a cluster: {described(settings)}")
            yield STARTERS[settings.start](stack, settings, security)
        else:
            yield stack.enter_context(_connected(_address(settings), settings, security))


def security_of(settings: Settings) -> Security:
    """Return the certificates of the settings, else those of Dask's own configuration. Raises UserError for files that are none."""
    if not settings.tls_ca_file:
        security = Security()
        if settings.address.startswith("tls://") and not security.tls_ca_file:
            what = "needs certificates, got none; set tls_ca_file, tls_cert and tls_key, or distributed.comm.tls in Dask's configuration"
            raise UserError(f"{settings.address}: {what}")
        return security
    if settings.address.startswith("tcp://"):
        raise UserError(f"{settings.address}: tls_ca_file is for tls://, got tcp://; take tls:// if the cluster has TLS, else leave it out")
    for path in (settings.tls_ca_file, settings.tls_cert, settings.tls_key):
        read_bytes(path, 1 << 20)
    mine = {f"tls_{who}_{what}": getattr(settings, f"tls_{what}") for who in ("client", "worker", "scheduler") for what in ("cert", "key")}
    security = Security(
        tls_ca_file=os.path.abspath(settings.tls_ca_file),
        **{name: os.path.abspath(path) for name, path in mine.items()},
        require_encryption=True,
    )
    _verify_certificates(security, f"tls_ca_file {settings.tls_ca_file}, tls_cert {settings.tls_cert}, tls_key {settings.tls_key}")
    return security


def _verify_certificates(security: Security, where: str) -> None:
    try:
        security.get_connection_args("client")
    except (ssl.SSLError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shorten(where)}: no certificates and key in PEM that belong together: {shorten(reason)}") from None


# A cluster that is there ------------------------------------------------------------------------------------------------------------------


def _address(settings: Settings) -> str:
    """Return the address of a cluster that is there; its scheduler file is waited for. Raises UserError."""
    if settings.address:
        return settings.address
    if not (path := settings.scheduler_file):
        raise UserError("cluster: which one? --scheduler tcp://HOST:8786, --set scheduler_file=FILE, or cluster-local, which starts one")
    with Progress(f"waiting for {path}", settings.wait_s, None) as progress:
        while not os.path.exists(path) and progress.passed_s < settings.wait_s:
            progress.show_time("dask scheduler --scheduler-file writes it")
            time.sleep(_POLL_S)
    content = read_json(path, _FILE_BYTES)
    address = content.get("address") if isinstance(content, dict) else None
    if not isinstance(address, str):
        raise UserError(f"{shorten(path)}: no scheduler file: wanted the key address; `dask scheduler --scheduler-file` writes one")
    try:
        return full_address(address)
    except ValueError as error:
        raise UserError(f"{shorten(path)}: {error}") from None


def _connected(address: str, settings: Settings, security: Security) -> Client:
    """Return a client. It is asked first who is there: Dask's client would wait for ever for whoever listens and does not answer."""
    why, answer = "", {}
    try:
        _dial(address)
        with ThreadPoolExecutor(1) as asking:  # whose thread has no event loop yet, as that of a notebook has
            answer = asking.submit(asyncio.run, _identity(address, security)).result()
    except Exception as error:
        why = _reason(error, address)
    if why:
        raise UserError(f"cluster {shorten(address)}: {why}")
    if answer.get("type") != "Scheduler":
        found = shorten(answer.get("type"), 40)
        raise UserError(f"cluster {address}: wanted the address of Dask's scheduler, got that of a {found}; the scheduler prints its own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VersionMismatchWarning)  # checks.py says it, of all sides
        try:
            return Client(address, security=security, set_as_default=False, timeout=CONNECT_S, name="taskgpt")
        except (OSError, ValueError, RuntimeError, TimeoutError) as error:
            raise UserError(f"cluster {shorten(address)}: {_reason(error, address)}") from None


def _dial(address: str) -> None:
    """Connect, and hang up, as soon as somebody listens. Raises OSError, which Dask, as it tries again until time is up, may not know."""
    protocol, _, place = address.partition("://")
    if protocol not in ("tcp", "tls"):
        return
    host, _, port = place.rpartition(":")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            return
        except ConnectionRefusedError:  # it may be about to begin
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


async def _identity(address: str, security: Security) -> dict[str, Any]:
    async with rpc(address, connection_args=security.get_connection_args("client"), timeout=CONNECT_S) as there:
        return await asyncio.wait_for(there.identity(), CONNECT_S + 1)


def _reason(error: BaseException, address: str) -> str:
    """Return why there is no connection, and what to do."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    said = " ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    for words, meaning in _MEANINGS.items():
        if words in said:
            return meaning
    if isinstance(error, TimeoutError | MemoryError):  # the size of an answer, read from what is none
        return f"somebody listens there, but does not answer as Dask's scheduler does; {_DO}"
    if isinstance(error, CommClosedError):
        return _CLOSED[address.startswith("tls://")]
    return f"{type(error).__name__}: {shorten(error)}; {_DO}"


_DO = "start one there with `dask scheduler`, or correct the address"
_NO_TLS = "answers, but not with TLS; take tcp:// if the cluster has none"
_MEANINGS = {  # words in what is raised, the first ones first
    "gaierror": "no host of that name; correct the address",
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "IOStream is not idle": _NO_TLS,
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of the authority in tls_ca_file; take that of the cluster",
    "encryption required": "Dask's configuration requires encryption, got tcp://; take tls://",
    "ConnectionRefusedError": f"nobody listens there; {_DO}",
    "timed out": f"nobody takes the connection; is a firewall between? {_DO}",  # as the system says it
    "Timed out": f"nobody takes the connection; is a firewall between? {_DO}",  # and Dask
}
_CLOSED = {  # at once, by whoever listens; of TLS or not
    False: "closes the connection at once; if the cluster has TLS, take tls://, and set tls_ca_file, tls_cert and tls_key",
    True: "closes the connection at once; it may not know the authority of tls_cert: both sides need one that the other trusts",
}
