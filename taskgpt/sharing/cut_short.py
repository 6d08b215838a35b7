"""A segment whose file is cut short while programs share it: its pages are gone, and the kernel sends SIGBUS to who touches them.

That is answered with pages of zeros, this process' own, in their place. No other program is in these, and all cores are free: so the
process goes on by itself, in the middle of whatever it did, until it finds that it has no place there (member.py).
"""

import ctypes
import mmap
import signal
import threading

import numpy as np
from numba import cfunc, types

from taskgpt.pointers import words_at

_ROOM = 256  # segments at once
_SEGMENTS = np.zeros((_ROOM, 2), np.int64)  # address and bytes of each; 0 bytes: none
_SEGMENTS_AT = _SEGMENTS.ctypes.data
_PAGES = mmap.PROT_READ | mmap.PROT_WRITE, getattr(mmap, "MAP_PRIVATE", 2) | getattr(mmap, "MAP_ANONYMOUS", 32) | 16  # MAP_FIXED
_SIGBUS = int(getattr(signal, "SIGBUS", 7))
_SIGINFO, _CODE, _ADDRESS = 4, 1, 2  # SA_SIGINFO; in what the handler is told: the word whose first half is why, and that of the address

_mmap = types.ExternalFunction("mmap", types.int64(types.int64, types.int64, types.int32, types.int32, types.int32, types.int64))
_raise = types.ExternalFunction("raise", types.int32(types.int32))
_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.int64, types.int64))
_lock = threading.Lock()
_installed: list = []  # what must not be freed


class _Action(ctypes.Structure):
    """The C library's struct sigaction, on Linux."""

    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


def guard(address: int, nbytes: int) -> None:
    """Have pages that are gone be replaced, from now on until `forget`."""
    with _lock:
        if not _installed:
            _install()
        for free in np.flatnonzero(_SEGMENTS[:, 1] == 0)[:1]:
            _SEGMENTS[free, 0] = address
            _SEGMENTS[free, 1] = nbytes  # last: with it the row counts


def forget(address: int) -> None:
    """Have no pages at an address be replaced any more."""
    with _lock:
        _SEGMENTS[_SEGMENTS[:, 0] == address] = 0


def replace(address: int, nbytes: int) -> None:
    """Put pages of zeros in the place of a segment's."""
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap(address, nbytes, *_PAGES, -1, 0)


def _install() -> None:
    """Answer SIGBUS, which for other addresses is left to who answered it before."""
    before, action, libc = _Action(), _Action(), ctypes.CDLL(None)
    before_at, (protection, flags) = ctypes.addressof(before), _PAGES

    @cfunc(types.void(types.int32, types.int64, types.int64))
    def answer(number, about, context):
        code, at, segments = words_at(about)[_CODE] << 32 >> 32, words_at(about)[_ADDRESS], words_at(_SEGMENTS_AT)
        for i in range(_ROOM):
            begin, nbytes = segments[2 * i], segments[2 * i + 1]
            if code > 0 and begin <= at < begin + nbytes and _mmap(begin, nbytes, protection, flags, -1, 0) == begin:
                return
        _sigaction(number, before_at, 0)  # and what has failed is tried again
        if code <= 0:
            _raise(number)  # a process has sent it: nothing has failed

    action.handler, action.flags = answer.address, _SIGINFO
    libc.sigaction(_SIGBUS, ctypes.byref(action), ctypes.byref(before))
    _installed.extend((answer, before))
