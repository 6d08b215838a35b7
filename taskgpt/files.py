"""How a file of a user's is read: its bytes, as TOML or JSON, into dataclasses; and refused in one line that names it. How one is written.

config = fill(Settings, read_toml(path), f"{path}: ")
saved = fill(Saved, read_json(path), f"{path}: ")
write_whole(path, text)

What is read is a regular file (no pipe or device, which may never end), no larger than its kind can be, in UTF-8, with or without a byte
order mark, with line ends of any system, nested no deeper than the interpreter's stack. No key stands in it twice.
"""

import dataclasses
import errno
import json
import os
import shutil
import stat
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from taskgpt.errors import UserError, did_you_mean, shorten

TOML_BYTES = 1 << 16  # files of settings are written by hand: ours have 4 KB
TOML_LINE = 1000  # characters. A key of 20,000 parts, all in one line, keeps tomllib busy for 15 s, one of 500 for 10 ms
JSON_BYTES = 1 << 24  # parsed, it takes up to 25 times the memory
MOST_INT = 2**63 - 1


def read_bytes(path: str | Path, most: int) -> bytes:
    """Return what is in a regular file of at most so many bytes. Raises UserError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not waiting for who might write into a pipe
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            os.close(descriptor)
            raise UserError(f"{shorten(path)}: cannot read: {_kind(kind)}; choose a file")
        with open(descriptor, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{shorten(path)}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shorten(path)}: cannot read: {reason}; choose a file that you may read") from None
    if len(data) > most:
        raise UserError(f"{shorten(path)}: more than {most:,} bytes, which is too large for what it should be; choose another file")
    return data


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "Is a directory", stat.S_IFIFO: "Is a pipe", stat.S_IFSOCK: "Is a socket"}
    return kinds.get(stat.S_IFMT(mode), "Is a device")


def read_text(path: str | Path, most_bytes: int = TOML_BYTES) -> str:
    """Return the text of a file. Raises UserError."""
    return _parsed(path, "text", most_bytes, lambda text: text)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises UserError."""
    return _parsed(path, "TOML", TOML_BYTES, parse_toml)


def read_json(path: str | Path, most_bytes: int = JSON_BYTES) -> Any:
    """Return what a JSON file holds. Raises UserError."""
    return _parsed(path, "JSON", most_bytes, parse_json)


def _parsed(path: str | Path, kind: str, most: int, parse: Callable[[str], Any]) -> Any:
    data = read_bytes(path, most)
    if not data.strip():
        raise UserError(f"{shorten(path)}: not a {kind} file: it is empty")
    try:
        return parse(data.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{shorten(path)}: not a {kind} file that can be read: it is nested too deeply") from None
    except MemoryError:
        raise UserError(f"{shorten(path)}: its {len(data):,} bytes of {kind} need more memory than there is") from None
    except ValueError as error:  # of the parsers, of decoding, and of int() for thousands of digits
        raise UserError(f"{shorten(path)}: not a {kind} file: {shorten(error)}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raises ValueError, or RecursionError for one that is nested too deeply."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > TOML_LINE:
            raise ValueError(f"line {number} has {len(line):,} characters, wanted at most {TOML_LINE:,}")
    return tomllib.loads(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)


def parse_json(text: str) -> Any:
    """Return what a JSON text says. Raises ValueError, also for a key that stands twice, or RecursionError as `parse_toml` does."""
    return JSON.decode(text)


def fill(cls: type, table: Any, where: str, elsewhere: Sequence[str] = ()) -> Any:
    """Return `cls(**table)`, whose fields may be dataclasses, lists, tuples and dictionaries of such.

    Those without a default must be there. Fields may carry metadata: `choices`, a tuple, and `at_least` and `at_most`, numbers. Numbers are
    finite, and integers have 64 bits. Raises UserError, its message beginning with `where`, which ends in a separator; instead of an
    unknown key it suggests a field, or one of the keys that belong `elsewhere`.
    """
    if not isinstance(table, dict):
        raise UserError(f"{where.rstrip('.: ')}: wanted a table, got {as_written(table)}")
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}{shorten(key)}: unknown key{did_you_mean(key, fields, elsewhere)}")
        values[key] = _checked(hints[key], value, f"{where}{key}")
        _verify_limits(values[key], fields[key].metadata, f"{where}{key}")
    for key, field in fields.items():
        if key not in table and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}{key}: missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where.rstrip('.: ')}: {error}") from None


def refuse_newer(content: Any, known: int, file: str | Path) -> None:
    """Raise UserError for a table whose `format` is newer than what is known here. Tables of ours say who made them, as `taskgpt`."""
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is int and found > known:
        by = as_written(content.get("taskgpt"))
        raise UserError(f"{shorten(file)}: format {found}, wanted {known} at most: taskgpt {by} has made it; update taskgpt")


def _checked(wanted: Any, value: Any, where: str) -> Any:
    """Return the value as the type that is wanted. Raises UserError."""
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    for each in allowed:
        of, parts = typing.get_origin(each) or each, typing.get_args(each)
        if of is Any:
            return value
        if dataclasses.is_dataclass(of) and isinstance(value, dict):
            return fill(of, value, f"{where}.")
        if of is list and isinstance(value, list):
            return [_part(parts[0], part, f"{where}[{at}]") for at, part in enumerate(value)]
        if of is tuple and isinstance(value, list) and (parts[-1] is ... or len(parts) == len(value)):
            kinds = parts[:1] * len(value) if parts[-1] is ... else parts
            return tuple(_part(kind, part, f"{where}[{at}]") for at, (kind, part) in enumerate(zip(kinds, value, strict=True)))
        if of is dict and isinstance(value, dict):
            return {key: _part(parts[1], part, f"{where}.{shorten(key)}") for key, part in value.items()}
        if of is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # not NaN
            return float(value)
        if of in (bool, int, str, types.NoneType) and type(value) is of:
            return value
    names = " or ".join(_name(each) for each in allowed)
    raise UserError(f"{where}: wanted {names}, got {as_written(value)}")


def _part(wanted: Any, value: Any, where: str) -> Any:
    """Return a part of a list, a tuple or a dictionary as `_checked` does; fields' limits are not for parts. Raises UserError."""
    part = _checked(wanted, value, where)
    _verify_limits(part, {}, where)
    return part


def _name(kind: Any) -> str:
    plain = typing.get_origin(kind) or kind
    if plain is types.NoneType:
        return "nothing"
    return "a finite number" if plain is float else "a table" if dataclasses.is_dataclass(plain) else plain.__name__


def _verify_limits(value: Any, limits: typing.Mapping[str, Any], where: str) -> None:
    choices, at_least, at_most = (limits.get(name) for name in ("choices", "at_least", "at_most"))
    if choices and value not in choices:
        raise UserError(f"{where}: wanted one of {', '.join(map(repr, choices))}, got {as_written(value)}")
    if type(value) is int:
        at_least, at_most = -MOST_INT if at_least is None else at_least, MOST_INT if at_most is None else at_most
    if at_least is not None and value < at_least:
        raise UserError(f"{where}: wanted at least {_number(at_least)}, got {as_written(value)}")
    if at_most is not None and value > at_most:
        raise UserError(f"{where}: wanted at most {_number(at_most)}, got {as_written(value)}")


def _number(limit: float) -> str:
    return f"{int(limit) if limit == int(limit) else limit:,}"


def as_written(value: Any) -> str:
    """Return a value as a message repeats it: short, and whatever it is."""
    try:
        return shorten(repr(value))
    except (ValueError, RecursionError, MemoryError):  # an integer of thousands of digits; nested too deeply
        return f"a huge {type(value).__name__}"


# Writing -------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name, complete, when the block ends, and not at all if it raises.

    It is on the disk by then, and outlives a crash of the machine. Raises OSError; also if something that is no regular file has the name.
    """
    target = write_target(path)
    unfinished = _unfinished(target)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        _sync_folder(target.parent)
    finally:
        with suppress(OSError):
            unfinished.unlink()


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write files into, which appears under its name, complete, when the block ends, and not at all if it raises.

    What had the name goes after all files of the new one are on the disk, and comes back if the new one cannot take its place: who is
    killed between two renames leaves it as `.NAME.oldPID`. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    unfinished, former = _unfinished(target), target.with_name(f".{target.name}.old{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for folder, _, files in os.walk(unfinished):
            for name in files:
                with open(Path(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(folder)
        try:
            if target.is_dir():
                os.replace(target, former)
            os.replace(unfinished, target)
        finally:
            if former.exists() and not target.exists():
                os.replace(former, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if target.exists():  # else a second interrupt has kept the former one from coming back
            shutil.rmtree(former, ignore_errors=True)


def _unfinished(target: Path) -> Path:
    """Return the name of what is not complete yet. In the same folder: a rename never copies."""
    return target.with_name(f".{target.name}.tmp{os.getpid()}")


def _sync_folder(folder: str | Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file as `replacing` does. Raises UserError instead of OSError."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise cannot_write(path, error) from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; or into the pipe or the device that has the name. Raises UserError."""
    try:
        if _is_stream(path):
            # A pipe without a reader would otherwise be waited for, and for ever.
            stream = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(stream, True)
            with open(stream, "wb") as file:
                file.write(text.encode())
        else:
            with replacing(path) as file:
                file.write(text.encode())
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UserError(f"{shorten(path)}: is a pipe that nobody reads; start its reader first") from None
        raise cannot_write(path, error) from None


def verify_can_write(path: str | Path) -> None:
    """Raise UserError if `write_whole` could not write now: better before the work than after it. A pipe's reader is not asked for yet."""
    try:
        if not _is_stream(path):
            target = write_target(path)
            probe = target.with_name(f".{target.name}.probe")
            probe.touch()
            probe.unlink()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write(path, error) from None


def verify_room(path: str | Path, nbytes: int, why: str = "the checkpoint needs {:,} bytes") -> None:
    """Raise UserError if the disk of `path` has no room for so many bytes more. Raises OSError if its folder is not there."""
    free = shutil.disk_usage(Path(os.path.realpath(path)).parent).free
    if free < nbytes:
        raise UserError(f"{shorten(path)}: {why.format(nbytes)}, the disk has {free:,} left; free some space")


def _is_stream(path: str | Path) -> bool:
    """Return True for what exists and is neither a regular file nor a folder: a rename would put a file in its place."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def write_target(path: str | Path) -> Path:
    """Return the file that a write to `path` makes or replaces: symbolic links stay, and what they name is written.

    Raises: OSError if it exists and is no regular file, such as /dev/null, or cannot be looked at.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        file_size(target)
    return target


def file_size(path: str | Path) -> int:
    """Return the size of a regular file. Raises: OSError if it is anything else: a pipe, say, could be read for ever."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    return status.st_size


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """Return the UserError that says why a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{shorten(path)}: the disk is full; free some space, or choose another folder")
    return UserError(f"{shorten(path)}: cannot write: {error.strerror or error}; choose another place, where you may write")
