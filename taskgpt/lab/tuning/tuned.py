"""What tuning leaves behind: a graph file and a scheduler file, and in the user's cache the tiles that `taskgpt train --tiles auto` takes.

Tiles are remembered by what they are good for: the machine (processor, cores, BLAS and its kernels), the number of workers, and the shape
(model, batch, options, rows of logits held). One JSON file each, with the key inside.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskgpt.config import GraphConfig, find_file, load_graph
from taskgpt.downloads import user_cache
from taskgpt.errors import UserError
from taskgpt.files import cannot_write, fill, parse_toml, read_json, read_text, read_toml, write_whole
from taskgpt.gpt2.shape import Tiles
from taskgpt.lab import machine
from taskgpt.lab.contests.cells import Changes

_LINE = re.compile(r"(?P<key>\w+)(?P<equals>\s*=\s*)(?P<value>\"[^\"]*\"|[^#\s]+)(?P<gap>\s*)(?P<comment>#.*)?$")


@dataclass(frozen=True)
class _Remembered:
    """A file of the cache. `key`: what the tiles are good for. `settings`: of native, that won with them. `made`: when, and how."""

    key: dict[str, Any]
    tiles: Tiles
    settings: dict[str, str]
    made: str


def graph_text(name: str, changes: dict[str, Any], first_line: str) -> str:
    """Return the text of a graph file with other values, {"tiles.rows": 64, ...}, its comments kept, and another first line.

    Raises UserError for a file whose keys do not stand in lines of their own below their [table].
    """
    path = find_file("graphs", name)
    load_graph(name, changes)
    old = read_text(path)
    lines = old.splitlines()[1 if old.startswith("#") else 0 :]
    for key, value in changes.items():
        _put(lines, *key.split("."), json.dumps(value))
    wanted = read_toml(path)
    for key, value in changes.items():
        table, _, field = key.partition(".")
        wanted.setdefault(table, {})[field] = value
    text = "\n".join([first_line, *lines, ""])
    try:
        is_right = parse_toml(text) == wanted
    except ValueError:
        is_right = False
    if not is_right:
        raise UserError(f"{path}: cannot put other values into this text; write a line key = value for each below its [table]")
    return text


def _put(lines: list[str], table: str, key: str, value: str) -> None:
    """Change the value of a key in the lines of a TOML file, its comment staying in its column, or add the key to its table."""
    begin = next((at for at, line in enumerate(lines) if line.partition("#")[0].strip() == f"[{table}]"), None)
    if begin is None:
        lines += ["", f"[{table}]"]
        begin = len(lines) - 1
    last = begin
    for at in range(begin + 1, len(lines)):
        if lines[at].startswith("["):
            break
        if found := _LINE.match(lines[at]):
            last = at
            if found["key"] == key:
                room = len(found["value"] + found["gap"])
                gap = " " if found["comment"] else ""
                lines[at] = f"{key}{found['equals']}{value.ljust(room - 1) + gap}{found['comment'] or ''}".rstrip()
                return
    lines.insert(last + 1, f"{key} = {value}")


def scheduler_text(settings: Changes, workers: int | None, first_line: str) -> str:
    """Return the text of a scheduler file that changes these settings of native; `workers` None: as many as cores."""
    changes = [*([("workers", str(workers))] if workers else []), *settings]
    lines = [f"{key} = {value if value in ('true', 'false') or value.isdigit() else json.dumps(value)}" for key, value in changes]
    return "\n".join([first_line, "", 'scheduler = "native"', *lines, ""])


def make_folder(folder: Path) -> None:
    """Make a folder to write into. Raises UserError if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write(folder, error) from None


def write(path: Path, text: str) -> None:
    """Write a file, and the folder that it is in. Raises UserError."""
    make_folder(path.parent)
    write_whole(path, text)


def remember(config: GraphConfig, workers: int, tiles: Tiles, settings: dict[str, str], made: str) -> Path:
    """Keep tiles in the cache, with what else `_Remembered` has; return the file. Raises UserError."""
    key = _key(config, workers)
    path = _path(key)
    write(path, json.dumps(dataclasses.asdict(_Remembered(key, tiles, settings, made)), indent=1) + "\n")
    return path


def remembered(config: GraphConfig, workers: int, command: str) -> Tiles:
    """Return the tiles for such a graph on this machine. Raises UserError, saying what to run: `command`, if there are none."""
    key = _key(config, workers)
    path = _path(key)
    if not path.exists():
        batch = f"B {config.batch.batch_size}, T {config.batch.seq_len}"
        raise UserError(
            f"--tiles auto: {config.name} ({batch}) was not tuned on this machine for {workers} worker{'s' if workers > 1 else ''}; "
            f"run: {command}"
        )
    try:
        saved = fill(_Remembered, read_json(path), f"{path}: ")
        if saved.key != key:
            raise UserError(f"{path}: made for something else")
        return saved.tiles
    except UserError as error:
        raise UserError(f"--tiles auto: what was remembered is damaged: {error}; delete it and run: {command}") from None


def tune_command(graph: str, config: GraphConfig, workers: int | None) -> str:
    """Return the command that tunes this graph, which was read from the file `graph` and changed since."""
    file = load_graph(graph)
    changes = [
        f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for section in ("model", "batch", "options")
        for key, value in vars(getattr(config, section)).items()
        if value != getattr(getattr(file, section), key)
    ]
    return f"taskgpt tune --graph {graph}{':' * bool(changes)}{','.join(changes)}" + (f" --workers {workers}" if workers else "")


def _key(config: GraphConfig, workers: int) -> dict[str, Any]:
    about = machine.describe()
    shape = {section: dataclasses.asdict(getattr(config, section)) for section in ("model", "batch", "options")}
    return {
        "machine": {name: about[name] for name in ("processor", "cores", "blas")},
        "workers": workers,
        **shape,
        "logits_rows": config.tiles.logits_rows,
    }


def _path(key: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return user_cache() / "tiles" / f"{name}.json"
