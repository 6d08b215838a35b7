"""What runs and how it runs: frozen dataclasses, filled from TOML files, then from `--set key=value`.

A graph file (graphs/NAME.toml) fixes the numbers: model, batch, tiles. A scheduler file (scheduler_configs/NAME.toml) may change only the
time. Every key of a file is a field of the dataclass that uses it. The file that carries a scheduler's own name holds its defaults; a
variant names its scheduler and what it changes. Unknown keys, wrong types and values out of range are refused with file, key and choices.
"""

import dataclasses
import datetime
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskgpt.cluster.settings import Settings as ClusterSettings
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.files import as_written, fill, parse_toml, read_toml
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.shape import Batch, Model, Options, Tiles
from taskgpt.schedulers import Scheduler, open_scheduler

_PACKAGE = Path(__file__).resolve().parent
CLUSTER = (
    "cluster"  # what a file names as its scheduler that is none of taskgpt/schedulers: cluster/ runs on it, and it runs training alone
)
MOST_TASKS = 10**6  # of a graph: recorded, GPT-2's take 2 GB, and a minute
_MOST_BYTES = 2**60  # of its tensors: no machine has them, and sizes still fit into 64 bits
_ADDRESS = re.compile(r"[a-z]+://.*|[^/]*:\d+", re.IGNORECASE)  # tcp://10.0.0.1:8786, localhost:8786, [::1]:8786


@dataclass(frozen=True)
class GraphConfig:
    """A graph file: what is computed. `tiles` changes bits only where BLAS multiplies."""

    name: str
    model: Model
    batch: Batch
    tiles: Tiles
    options: Options


@dataclass(frozen=True)
class SchedulerConfig:
    """A scheduler file: `scheduler` is the module in taskgpt/schedulers, or CLUSTER; `settings` an instance of its Settings."""

    name: str
    scheduler: str
    settings: Any


def load_graph(name: str, overrides: dict[str, Any] | None = None, model: Model | None = None) -> GraphConfig:
    """Read graphs/NAME.toml, or the file that `name` is a path of. Overrides are {"tiles.rows": 64, ...}.

    `model`, a checkpoint's, takes the place of the file's. Raises UserError for an unknown name, key or value, for overrides of a given
    model, and for sequences longer than the model's maximum.
    """
    path = find_file("graphs", name)
    return graph_from(path.name, read_toml(path), overrides, model)


def graph_from(name: str, tables: dict[str, Any], overrides: dict[str, Any] | None = None, model: Model | None = None) -> GraphConfig:
    """Return the configuration that a graph file's tables say, as `load_graph` does. `name` is what messages call it."""
    sections = {field.name: field.type for field in dataclasses.fields(GraphConfig) if field.name != "name"}
    changes = [(*key.partition("."), value) for key, value in (overrides or {}).items()]
    for key, table in ({table: {} for table, *_ in changes} | tables).items():
        if key not in sections:
            raise UserError(f"{name}: unknown table '{shorten(key)}'{did_you_mean(key, sections)}")
        if not isinstance(table, dict):
            raise UserError(f"{name}: {key}: wanted a table, got {as_written(table)}; begin it with a line [{key}]")
    for table, _, field, value in changes:
        tables.setdefault(table, {})[field] = value
    filled = {section: fill(cls, tables.get(section, {}), f"{name}: {section}.") for section, cls in sections.items()}
    if model is not None:
        for table, _, field, _ in changes:
            if table == "model":
                raise UserError(f"--set model.{field}: the checkpoint gives the model's shape; leave one of the two out")
        if model.norm != (norm := filled["model"].norm):
            raise UserError(f"{name}: model.norm: the checkpoint's model has {model.norm}, got {norm}; choose another graph file")
        filled["model"] = model
    config = GraphConfig(Path(name).stem, **filled)
    longest, T = config.model.max_seq_len, config.batch.seq_len
    if longest < T:
        do = f"choose --seq-len {longest} or less"
        raise UserError(f"{name}: batch.seq_len: the model has {longest} positions, got sequences of {T} tokens; {do}")
    if (needed := GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options)) > _MOST_BYTES:
        raise UserError(f"{name}: needs {needed / 2**60:,.0f} EiB of memory; choose a smaller model or batch")
    if (tasks := _tasks(config)) > MOST_TASKS:
        raise UserError(
            f"{name}: about {tasks:,} tasks a step, wanted at most {MOST_TASKS:,}; choose larger tiles, a smaller model or batch"
        )
    return config


def _tasks(config: GraphConfig) -> int:
    """Return how many tasks a step has, to a third: forward, backward and updates."""
    model, batch, tiles = config.model, config.batch, config.tiles

    def parts(extent: int, size: int) -> int:
        return -(-extent // size)

    rows, pointwise = parts(batch.rows, tiles.rows), parts(batch.rows, tiles.pointwise_rows)
    columns = sum(parts(wide * model.channels, tiles.columns) for wide in (3, 1, 4, 1))
    attention = batch.batch_size * parts(model.heads, tiles.heads)
    head = rows * parts(model.padded_vocabulary, tiles.vocabulary)
    is_separate = config.options.update == "separate" or config.options.separate_because(batch)
    updates = 6 if is_separate else 1  # of weight and bias: gradient, squares, AdamW
    return model.layers * (columns * (2 * rows + updates) + 2 * attention + 6 * pointwise) + 3 * head


def load_scheduler(name: str, overrides: dict[str, Any] | None = None, may_be_cluster: bool = False) -> SchedulerConfig:
    """Read scheduler_configs/NAME.toml, or the file that `name` is a path of, over the defaults of the scheduler that it names.

    The address of a cluster is that of scheduler_configs/cluster.toml. Raises UserError for an unknown name, key or value, and for a
    cluster, unless it may be one.
    """
    if is_address(name):
        path, overrides = find_file("scheduler_configs", CLUSTER), {"address": name, **(overrides or {})}
    else:
        path = find_file("scheduler_configs", name)
    table = read_toml(path)
    scheduler = table.pop("scheduler", path.stem)
    if not isinstance(scheduler, str):
        raise UserError(f"{path.name}: scheduler: wanted the name of a scheduler, got {as_written(scheduler)}; write it in quotes")
    known = [*schedulers(), CLUSTER]
    if scheduler not in known:
        raise UserError(f"{path.name}: unknown scheduler '{shorten(scheduler)}'{did_you_mean(scheduler, known)}")
    if scheduler == CLUSTER and not may_be_cluster:
        raise UserError(
            f"scheduler {shorten(name)}: on a cluster runs `taskgpt train` alone; choose a scheduler of this machine, native say"
        )
    defaults = read_toml(find_file("scheduler_configs", scheduler))
    defaults.pop("scheduler", None)
    settings = fill(_settings_of(scheduler), {**defaults, **table, **(overrides or {})}, f"{path.name}: ", elsewhere=graph_keys())
    return SchedulerConfig(path.stem, scheduler, settings)


def _settings_of(scheduler: str) -> type:
    if scheduler == CLUSTER:
        return ClusterSettings
    return importlib.import_module(f"taskgpt.schedulers.{scheduler.replace('-', '_')}").Settings


def scheduler(name: str = "native", **settings: Any) -> Scheduler:
    """Return a scheduler for a `with` block: `taskgpt.scheduler("native", workers=2)`; settings are the keys of its file.

    Raises UserError for an unknown name, key or value, and for a cluster.
    """
    return opener(load_scheduler(name, settings))


def _open(config: SchedulerConfig) -> Scheduler:
    return open_scheduler(config.scheduler, config.settings)


opener: Callable[[SchedulerConfig], Scheduler] = _open  # what `scheduler` opens one with; another in `taskgpt run --trace`


def schedulers() -> list[str]:
    """Return the names of all schedulers: of what is in taskgpt/schedulers, that which has a file of defaults by its own name."""
    modules = {path.stem.replace("_", "-") for path in (_PACKAGE / "schedulers").iterdir()}
    return [name for name in available("scheduler_configs") if name in modules]


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
            raise UserError(f"--set {shorten(word)}: wanted key=value, for example --set tiles.rows=128 or --set workers=2")
        key = key.strip()
        if "." in key and key not in graph_keys():
            raise UserError(f"--set {shorten(word)}: unknown key '{shorten(key)}'{did_you_mean(key, graph_keys())}")
        (graph if "." in key else scheduler)[key] = _parse_value(text.strip())
    return graph, scheduler


def parse_graph_settings(words: list[str]) -> dict[str, Any]:
    """Parse `--set` words of a program that has no scheduler. Raises UserError for what is no key of a graph file."""
    graph, others = parse_settings(words)
    for key in others:
        raise UserError(f"--set {shorten(key)}: no key of a graph file{did_you_mean(key, graph_keys())}")
    return graph


def folder(kind: str) -> Path:
    """Return the folder `graphs` or `scheduler_configs`: installed, it is inside the package, in a checkout beside it."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def available(kind: str) -> list[str]:
    """Return the names in a data folder: `graphs` or `scheduler_configs`."""
    return sorted(path.stem for path in folder(kind).glob("*.toml"))


def is_address(name: str) -> bool:
    """Return True for what names a cluster's scheduler by protocol or port, not a file."""
    return _ADDRESS.fullmatch(name) is not None


def find_file(kind: str, name: str) -> Path:
    """Return the file of a name in a data folder, or the path that `name` is. Raises UserError for an unknown name."""
    path = Path(name)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return path
    if name not in available(kind):
        what = {"graphs": "graph", "scheduler_configs": "scheduler"}[kind]
        raise UserError(f"unknown {what} '{shorten(name)}'{did_you_mean(name, available(kind))}")
    return folder(kind) / f"{name}.toml"


def _parse_value(text: str) -> Any:
    """Parse a value as TOML does; a bare word, a time or a date, which no key is, or whatever else is not one value, is a string.

    So is 0x2, two ranks from step 0 on: no number here is written in sixteens.
    """
    try:
        table = parse_toml(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = table["value"]
    is_text = len(table) > 1 or isinstance(value, datetime.date | datetime.time) or text.startswith("0x")
    return text if is_text else value
