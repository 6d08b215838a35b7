"""How a file comes from the network: in part, then whole, then checked; and the user's cache, where it stays.

with only_one(folder, say):                        # of runs started together, one works
    download(url, folder / "x.part", num_bytes)    # goes on where an earlier try stopped
    verify_sha256(...)                             # what is damaged is deleted

Plain GETs of the standard library, with ranges: redirects are followed, and proxies are those of the environment.
"""

import hashlib
import http.client
import os
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from taskgpt.errors import UserError, shorten
from taskgpt.files import cannot_write, file_size, verify_room
from taskgpt.progress import Progress, megabytes, minutes

SECONDS = 30  # to wait for a server
_HASHED = 1 << 20  # bytes at a time


def user_cache() -> Path:
    """Return this package's folder in the user's cache. Raises: UserError if the system knows no place for one."""
    try:
        folder = Path(platformdirs.user_cache_dir("taskgpt", appauthor=False))
    except RuntimeError:  # newer platformdirs; older ones return a path that is not absolute
        folder = Path()
    if not folder.is_absolute():
        raise UserError(f"no cache folder: HOME is not set, and user {os.getuid()} has no home; set XDG_CACHE_HOME to a folder's full path")
    return folder


@contextmanager
def only_one(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder and hold its lock: of runs started together one works and the others wait, then find its files."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say(f"waiting for another run that writes into {folder}")
            lock.acquire()
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def progress(label: str, total_bytes: int | None, done_bytes: int = 0) -> Iterator[Callable[..., None]]:
    """Show how far a job is, yielding `show(done_bytes, words, total_bytes)`; at its end say how much it was and how long it took."""
    begin, last = time.monotonic(), total_bytes or 0
    with Progress(label, total_bytes or 0, megabytes, done_bytes) as shown:

        def show(done: int, words: str = "", total: int | None = None) -> None:
            nonlocal last
            last = total or last
            shown.show(done, words, total)

        yield show
    print(f"{label}: {last / 1e6:,.1f} MB, done after {minutes(time.monotonic() - begin)}", file=sys.stderr, flush=True)


class _Total:
    """How many bytes a file at a server has, None until that is known."""

    def __init__(self, num_bytes: int | None):
        self.num_bytes = num_bytes

    def learn(self, headers: http.client.HTTPMessage, have: int) -> None:
        """Take it from an answer that sends what is missing after `have` bytes, unless it was known before."""
        if self.num_bytes is None:
            if found := re.fullmatch(r"bytes .*/(\d{1,15})", headers.get("Content-Range", "")):
                self.num_bytes = int(found[1])
            elif re.fullmatch(r"\d{1,15}", length := headers.get("Content-Length", "")):
                self.num_bytes = have + int(length)

    def is_reached(self, have: int) -> bool:
        return self.num_bytes is not None and have >= self.num_bytes


def download(url: str, part: Path, num_bytes: int | None, otherwise: str, seconds: float = SECONDS, label: str = "downloading"):
    """Fetch a URL into `part`, going on where an earlier try stopped if the server can.

    A connection that drops is taken up again as long as each try gets further than the last.
    Args: num_bytes: of the file; None: what the server says. otherwise: what to do without a network. seconds: to wait for the server.
    Raises: UserError if the server does not answer or stops sending (what came is kept), or if the disk is full.
    """
    furthest, total = size_of(part), _Total(num_bytes)
    with progress(label, num_bytes, furthest) as show:
        while not total.is_reached(have := size_of(part)):
            try:
                _fetch(url, part, have, total, seconds, show)
                reason = "the server stopped sending"
            except urllib.error.HTTPError as error:
                error.close()  # it is the response, too
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    total.learn(error.headers, 0)
                    if have == total.num_bytes:
                        show(have, "", have)
                        break
                    part.unlink()  # the file at the server is now shorter than what came before
                reason = f"the server answers {error.code} {error.reason}"
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)  # urllib wraps what went wrong
                reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
            if size_of(part) <= furthest and not total.is_reached(size_of(part)):
                if have := size_of(part):
                    of = f" of {total.num_bytes:,}" if total.num_bytes else ""
                    raise UserError(f"{url}: {reason}; {have:,}{of} bytes are here, run again to go on")
                raise UserError(f"{url}: {reason}; {otherwise}")
            furthest = size_of(part)


def _fetch(url: str, part: Path, have: int, total: _Total, seconds: float, show: Callable[..., None]):
    headers = {"User-Agent": "taskgpt"} | ({"Range": f"bytes={have}-"} if have else {})
    with _answer(urllib.request.Request(url, headers=headers), seconds) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        done = have if resumed else 0
        total.learn(response.headers, done)
        try:
            verify_room(part, (total.num_bytes or 0) - have, "{:,} bytes are still to come")  # better now than after an hour
            file = part.open("ab" if resumed else "wb", buffering=0)
        except OSError as error:
            raise cannot_write(part, error) from error
        with file:
            while (total.num_bytes is None or done <= total.num_bytes) and (block := response.read1(1 << 18)):
                try:
                    file.write(block)
                except OSError as error:
                    raise cannot_write(part, error) from error
                done += len(block)
                show(done, "", total.num_bytes)
        if total.num_bytes is None:  # the server closes the connection where the file ends, and says so in no other way
            total.num_bytes = done


def _answer(request: urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    # In a thread: urlopen's timeout counts for each of the server's addresses anew, and not for looking up its name, so that a machine
    # behind a wall would wait for minutes. The thread is a daemon: it may be stuck in there when the program ends.
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask():
        try:
            answers.put(urllib.request.urlopen(request, timeout=seconds))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def verify_download(url: str, part: Path, sha256: str):
    """Delete a download that has another SHA-256 than wanted, and raise UserError."""
    if (found := sha256_of(part)) != sha256:
        part.unlink()
        raise UserError(f"{url}: the download was damaged and is deleted: wanted SHA-256 {sha256}, got {found}; run again")


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file in hexadecimal digits. Raises UserError if it cannot be read."""
    digest, done = hashlib.sha256(), 0
    try:
        size = file_size(path)  # refuses what could be read for ever
        with path.open("rb", buffering=0) as file, Progress("checking", size, megabytes) as shown:
            while block := file.read(_HASHED):
                digest.update(block)
                shown.show(done := done + len(block))
    except OSError as error:
        raise UserError(f"{shorten(path)}: cannot read: {error.strerror or error}") from error
    return digest.hexdigest()
