"""The segment as a file of memory, /dev/shm/taskgpt-UID-NAME: made by the first who opens it, removed by the last who leaves.

Who joins or leaves holds the file's lock meanwhile, which the kernel frees whatever becomes of the process. Only its owner can open it
(0600), and nothing in it is executed: it is numbers, and names to show.
"""

import contextlib
import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.sharing import cut_short
from taskgpt.sharing import layout as w
from taskgpt.sharing.liveness import look

FOLDER = Path("/dev/shm")  # memory, by POSIX's shm_open() on Linux
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_BYTES = w.SEGMENT_WORDS * 8
_PATIENCE_S = 5.0  # of who joins or leaves, for another who is at it


def path_of(name: str) -> Path:
    """Return the file of a share of this user. Raises UserError for what is no name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"share '{shorten(name)}': wanted a name of letters, digits, '.', '_' and '-', at most 40; `node` for one")
    return FOLDER / f"taskgpt-{os.getuid()}-{name}"


def names() -> list[str]:
    """Return the names of this user's shares, by what files there are."""
    prefix = f"taskgpt-{os.getuid()}-"
    return sorted(path.name.removeprefix(prefix) for path in FOLDER.glob(f"{prefix}*") if _NAME.fullmatch(path.name.removeprefix(prefix)))


class Segment:
    """An open segment: `words`, its memory as int64."""

    def __init__(self, name: str, descriptor: int):
        self.name, self._descriptor = name, descriptor
        self._memory = mmap.mmap(descriptor, _BYTES)
        self.words = np.frombuffer(self._memory, np.int64)
        cut_short.guard(self.words.ctypes.data, _BYTES)

    @property
    def slots(self) -> np.ndarray:
        """The words of the slots there are, a row each."""
        return self.words[w.SLOTS_AT :].reshape(w.MOST_SLOTS, w.SLOT_WORDS)[: self.words[w.SLOTS]]

    @property
    def members(self) -> np.ndarray:
        """The words of all members that there can be, a row each."""
        return self.words[w.MEMBERS_AT : w.SLOTS_AT].reshape(w.MOST_MEMBERS, w.MEMBER_WORDS)

    def living(self) -> list[int]:
        """Return the numbers of the members whose process lives."""
        return [number for number, member in enumerate(self.members) if member[w.IDENTITY] and is_living(member)]

    def verify(self) -> None:
        """Raise UserError if this is no segment, or a damaged one."""
        words = self.words
        found = int(words[w.MAGIC_AT]), int(words[w.VERSION_AT])
        if found != (w.MAGIC, w.VERSION):
            wanted = f"wanted a segment of version {w.VERSION}"
            self._refuse(f"{wanted}, got {'version ' + str(found[1]) if found[0] == w.MAGIC else 'something else'}")
        if not 1 <= words[w.SLOTS] <= w.MOST_SLOTS:
            self._refuse(f"wanted 1 to {w.MOST_SLOTS} cores, got {words[w.SLOTS]}")
        cores = self.slots[:, w.CORE]
        if ((cores < 0) | (cores >= w.MOST_SLOTS)).any() or len(np.unique(cores)) < len(cores):
            self._refuse("its list of cores is damaged")

    def _refuse(self, why: str) -> None:
        raise UserError(
            f"share {self.name}: {path_of(self.name)}: {why}; end the programs that share it and remove the file, or take another name"
        )

    def make(self, cores: Sequence[int]) -> None:
        """Write a segment without members."""
        self.words[:] = 0
        self.words[[w.VERSION_AT, w.SLOTS]] = w.VERSION, len(cores)
        self.slots[:, w.CORE] = cores
        self.words[w.MAGIC_AT] = w.MAGIC

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock. Raises UserError if another process has held it too long."""
        _lock(self.name, self._descriptor)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove the file; who has it open keeps the memory."""
        path_of(self.name).unlink(missing_ok=True)

    def cut_off(self, cores: Sequence[int]) -> None:
        """Have a segment of this process alone, without members, in the place of what others may read and write."""
        cut_short.replace(self.words.ctypes.data, _BYTES)
        self.make(cores)

    def close(self) -> None:
        """Let go of the memory, which nobody may touch any more."""
        cut_short.forget(self.words.ctypes.data)
        self.words = np.zeros(0, np.int64)
        with contextlib.suppress(BufferError):  # a view of it is still there
            self._memory.close()
        os.close(self._descriptor)


def is_living(member: np.ndarray) -> bool:
    """Return True if the process lives that a member's words name."""
    seen = look(int(member[w.IDENTITY]) & 0xFFFFFFFF)
    return seen is not None and seen.started == member[w.STARTED]


@contextlib.contextmanager
def opened(name: str, cores: Sequence[int] = ()) -> Iterator[Segment]:
    """Give a `with` block the segment of a name, its lock held. With `cores` it is made if there is none or nobody lives in it.

    Raises UserError for a file that is none, or another's, or that others could open; FileNotFoundError if there is none.
    """
    path = path_of(name)
    while True:
        segment = _open(name, path, bool(cores))
        with contextlib.ExitStack() as undo:
            undo.callback(segment.close)
            with segment.locked():
                if not _is_at(path, segment):
                    continue  # removed since, by the last who has left
                if cores and (not segment.words[w.MAGIC_AT] or not _is_used(segment)):
                    segment.make(cores)
                segment.verify()
                yield segment
                undo.pop_all()
                return


def _is_used(segment: Segment) -> bool:
    """Return True if somebody lives in a segment, or it is none of ours, which nobody can say of."""
    is_ours = segment.words[w.MAGIC_AT] == w.MAGIC and segment.words[w.VERSION_AT] == w.VERSION
    return not is_ours or bool(segment.living())


def _open(name: str, path: Path, is_made: bool) -> Segment:
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if is_made else 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if is_made:
            raise UserError(f"share {name}: {FOLDER} is not there, which it is on Linux alone; leave share out") from None
        raise
    except OSError as error:
        raise UserError(f"share {name}: {path}: {error.strerror}; remove it, or take another name") from None
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            found = f"user {about.st_uid}, {stat.filemode(about.st_mode)}"
            raise UserError(f"share {name}: {path}: wanted a file of yours that nobody else may open, got {found}; remove it")
        if about.st_size not in (0, _BYTES):
            raise UserError(f"share {name}: {path}: wanted {_BYTES} bytes, got {about.st_size}; remove it, or take another name")
        if about.st_size == 0:
            if not is_made:
                raise FileNotFoundError(path)
            os.posix_fallocate(descriptor, 0, _BYTES)  # now, as a full disk is no error later on, but a crash
        return Segment(name, descriptor)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"share {name}: {path}: {error.strerror}; make room in {FOLDER}") from None
    except BaseException:
        os.close(descriptor)
        raise


def _is_at(path: Path, segment: Segment) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(segment._descriptor))
    except FileNotFoundError:
        return False


def _lock(name: str, descriptor: int) -> None:
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(
                    f"share {name}: another program has been joining or leaving for {_PATIENCE_S:g} s, stopped perhaps; "
                    "let it go on or end it, or take another name"
                ) from None
            time.sleep(0.005)
