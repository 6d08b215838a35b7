"""Data by URL: `s3://bucket/tokens`, `memory://...`, whatever fsspec reads. Every host copies it once into the user's cache.

A copy is of what the URL names now: its name in the cache has the sizes and check sums that the file system tells, so that other data under
the same URL becomes another copy. What is copied appears whole or not at all.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from taskgpt.downloads import only_one, progress, user_cache
from taskgpt.errors import UserError, shorten
from taskgpt.files import cannot_write, replacing_folder, verify_room

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BLOCK = 1 << 20  # bytes copied at a time


def is_url(spec: str) -> bool:
    """Return True for what names data by protocol."""
    return _URL.match(spec) is not None


def local_copy(url: str, say: Callable[[str], None]) -> Path:
    """Return the path of a copy of a file, or of a folder's files, in the user's cache; `file://` is where it is.

    Raises UserError if nothing is there, or it cannot be read, or there is no room for it.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
        if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
            return Path(path)
        found = system.info(path)
        is_folder = found["type"] == "directory"
        names = sorted(name for name in system.ls(path, detail=False)) if is_folder else [path]
        about = [system.info(name) for name in names]
        files = [
            (name, each["size"], str(system.checksum(name))) for name, each in zip(names, about, strict=True) if each["type"] == "file"
        ]
    except ImportError as error:
        raise UserError(f"{shorten(url)}: {error}; install that on every host") from None
    except FileNotFoundError:
        raise UserError(f"{shorten(url)}: no such file or folder; name one that every host can read") from None
    except Exception as error:  # whatever a file system raises: permission, network, a protocol that nobody knows
        raise UserError(f"{shorten(url)}: cannot read: {shorten(error) or type(error).__name__}") from None
    if not files:
        raise UserError(f"{shorten(url)}: the folder has no files; name one with token files, or a text")
    digest = hashlib.sha256(json.dumps([url, files]).encode()).hexdigest()[:16]
    cache = user_cache() / "urls"
    folder = cache / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', path)[-60:].strip('-.')}-{digest}"
    if not folder.is_dir():
        with only_one(cache, say):
            if not folder.is_dir():
                _copy(system, url, files, folder)
    return folder if is_folder else folder / Path(path).name


def _copy(system: Any, url: str, files: list[tuple[str, int, str]], folder: Path) -> None:
    total, done = sum(size for _, size, _ in files), 0
    try:
        verify_room(folder, total, "{:,} bytes are to come")
        with replacing_folder(folder) as unfinished, progress(f"copying {shorten(url)}", total) as show:
            for name, *_ in files:
                with system.open(name, "rb") as source, (unfinished / Path(name).name).open("wb") as target:
                    while block := source.read(_BLOCK):
                        target.write(block)
                        done += len(block)
                        show(done)
    except OSError as error:
        raise cannot_write(folder, error) from None
