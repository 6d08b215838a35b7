"""What runs and how it runs: frozen dataclasses, filled from TOML files, then from `--set key=value`.

A graph file (graphs/NAME.toml) fixes the numbers: model, batch, tiles. A scheduler file (scheduler_configs/NAME.toml) may change only the
time. Every key of a file is a field of the dataclass that uses it. The file that carries a scheduler's own name holds its defaults; a
variant names its scheduler and what it changes. Unknown keys, wrong types and values out of range are refused with file, key and choices.
"""

import dataclasses
import importlib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskgpt.errors import UserError, did_you_mean
from taskgpt.gpt2.model import Batch, Model, Options, Tiles

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class GraphConfig:
    """A graph file: what is computed. `tiles` may change the rounding; nothing else of a run does."""

    name: str
    model: Model
    batch: Batch
    tiles: Tiles
    options: Options


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler file: `scheduler` is the module in taskgpt/schedulers, `settings` an instance of its Settings."""

    name: str
    scheduler: str
    settings: Any


def load_graph(name: str, overrides: dict[str, Any] | None = None, model: Model | None = None) -> GraphConfig:
    """Read graphs/NAME.toml, or the file that `name` is a path of. Overrides are {"tiles.rows": 64, ...}.

    `model`, a checkpoint's, takes the place of the file's. Raises UserError for an unknown name, key or value, for overrides of a given
    model, and for sequences longer than the model's maximum.
    """
    path = find_file("graphs", name)
    tables = _read(path)
    sections = {field.name: field.type for field in dataclasses.fields(GraphConfig) if field.name != "name"}
    changes = [(*key.partition("."), value) for key, value in (overrides or {}).items()]
    for key, table in ({table: {} for table, *_ in changes} | tables).items():
        if key not in sections:
            raise UserError(f"{path.name}: unknown table '{key}'{did_you_mean(key, sections)}")
        if not isinstance(table, dict):
            raise UserError(f"{path.name}: {key}: wanted a table, got {table!r}; begin it with a line [{key}]")
    for table, _, field, value in changes:
        tables.setdefault(table, {})[field] = value
    filled = {section: fill(cls, tables.get(section, {}), f"{path.name}: {section}.") for section, cls in sections.items()}
    if model is not None:
        for table, _, field, _ in changes:
            if table == "model":
                raise UserError(f"--set model.{field}: the checkpoint gives the model's shape; leave one of the two out")
        filled["model"] = model
    config = GraphConfig(path.stem, **filled)
    longest, T = config.model.max_seq_len, config.batch.seq_len
    if longest < T:
        raise UserError(
            f"batch.seq_len: the model has {longest} positions, got sequences of {T} tokens; choose --seq-len {longest} or less"
        )
    return config


def load_scheduler(name: str, overrides: dict[str, Any] | None = None) -> SchedulerConfig:
    """Read scheduler_configs/NAME.toml, or the file that `name` is a path of, over the defaults of the scheduler that it names.

    Raises UserError for an unknown name, key or value.
    """
    path = find_file("scheduler_configs", name)
    table = _read(path)
    scheduler = table.pop("scheduler", path.stem)
    if not isinstance(scheduler, str):
        raise UserError(f"{path.name}: scheduler: wanted the name of a scheduler, got {scheduler!r}; write it in quotes")
    known = {p.stem for p in (_PACKAGE / "schedulers").glob("*.py") if not p.stem.startswith("_")}
    module_name = scheduler.replace("-", "_")
    if module_name not in known:
        raise UserError(f"{path.name}: unknown scheduler '{scheduler}'{did_you_mean(scheduler, [k.replace('_', '-') for k in known])}")
    defaults = _read(find_file("scheduler_configs", scheduler))
    defaults.pop("scheduler", None)
    module = importlib.import_module(f"taskgpt.schedulers.{module_name}")
    settings = fill(module.Settings, {**defaults, **table, **(overrides or {})}, f"{path.name}: ", elsewhere=graph_keys())
    return SchedulerConfig(path.stem, scheduler, settings)


def graph_keys() -> list[str]:
    """Return every key of a graph file, with its table: `tiles.rows`."""
    sections = [(field.name, field.type) for field in dataclasses.fields(GraphConfig) if field.name != "name"]
    return [f"{section}.{field.name}" for section, cls in sections for field in dataclasses.fields(cls)]


def parse_settings(words: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse `--set key=value` words into (overrides of the graph file, overrides of the scheduler file): the graph's keys have a dot."""
    graph: dict[str, Any] = {}
    scheduler: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {word}: wanted key=value, for example --set tiles.rows=128 or --set workers=2")
        key = key.strip()
        if "." in key and key not in graph_keys():
            raise UserError(f"--set {word}: unknown key '{key}'{did_you_mean(key, graph_keys())}")
        (graph if "." in key else scheduler)[key] = _parse_value(text.strip())
    return graph, scheduler


def parse_graph_settings(words: list[str]) -> dict[str, Any]:
    """Parse `--set` words of a program that has no scheduler. Raises UserError for what is no key of a graph file."""
    graph, others = parse_settings(words)
    for key in others:
        raise UserError(f"--set {key}: no key of a graph file{did_you_mean(key, graph_keys())}")
    return graph


def folder(kind: str) -> Path:
    """Return the folder `graphs` or `scheduler_configs`: installed, it is inside the package, in a checkout beside it."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def available(kind: str) -> list[str]:
    """Return the names in a data folder: `graphs` or `scheduler_configs`."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def find_file(kind: str, name: str) -> Path:
    """Return the file of a name in a data folder, or the path that `name` is. Raises UserError for an unknown name."""
    path = Path(name)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    if name not in available(kind):
        what = {"graphs": "graph", "scheduler_configs": "scheduler"}[kind]
        raise UserError(f"unknown {what} '{name}'{did_you_mean(name, available(kind))}")
    return folder(kind) / f"{name}.toml"


def fill(cls: type, table: dict[str, Any], where: str, elsewhere: Sequence[str] = ()) -> Any:
    """Return `cls(**table)`; every field without a default must be there.

    Fields may carry metadata: `choices`, a tuple, and `at_least`, a number. Raises UserError, its message beginning with `where`; instead
    of an unknown key it suggests a field, or one of the keys that belong `elsewhere`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key, value in table.items():
        if key not in fields:
            raise UserError(f"{where}{key}: unknown key{did_you_mean(key, [*fields, *elsewhere])}")
        wanted = hints[key]
        allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            table = {**table, key: float(value)}
        elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(t.__name__ for t in allowed)
            raise UserError(f"{where}{key}: wanted {names}, got {value!r}")
        choices, at_least = fields[key].metadata.get("choices"), fields[key].metadata.get("at_least")
        if choices and value not in choices:
            raise UserError(f"{where}{key}: wanted one of {', '.join(map(repr, choices))}, got {value!r}")
        if at_least is not None and value < at_least:
            raise UserError(f"{where}{key}: wanted at least {at_least}, got {value!r}")
    for key, field in fields.items():
        if key not in table and field.default is dataclasses.MISSING:
            raise UserError(f"{where}{key}: missing; add '{key} = ...'")
    try:
        return cls(**table)
    except ValueError as error:
        raise UserError(f"{where.rstrip('.: ')}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}; choose a file that you may read") from None


def _parse_value(text: str) -> Any:
    """Parse a value as TOML does; a bare word, or whatever else is not one value, is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text
