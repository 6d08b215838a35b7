"""One grammar for all programs: what --graph, --scheduler, --workers, --tiles and --set mean, and what help looks like.

p = Parser("taskgpt compare", __doc__)
add_graphs(p, ["gpt2-124m"])           # flags.graphs: a list. add_graph: flags.graph, one
add_schedulers(p, ["loops", "native"])
add_workers(p, "default: all cores", several=True)
add_changes(p, several=True)           # --tiles, --set: words KEY=VALUE,... for product_of and graph_words

Everywhere singular and plural name the same flag, names and values are lists with commas or spaces, and NAME may carry changes:
NAME:KEY=VALUE,... A program that takes one of them refuses several.
"""

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from taskgpt.config import available
from taskgpt.errors import UserError, shorten
from taskgpt.lab.named import choices, listed, worker_counts

CHANGES = "; with changes: NAME:KEY=VALUE,..."
INDENTS = {"initial_indent": "  ", "subsequent_indent": "      "}  # of a command
LEAST_WIDTH = 11  # of help, where a terminal is narrower still; argparse's own
AUTO = "auto"  # of --tiles: what tuning found
MODEL_HELP = (
    "a file of llm.c's, a file or folder of Hugging Face's, a run's folder; or gpt2, gpt2-medium, gpt2-large, gpt2-xl: OpenAI's weights, "
    "downloaded into the cache, unless a file or folder here has that name"
)
SEVERAL = "`taskgpt compare` takes several"
FLOAT32_MAX = 3.4e38  # a learning rate beyond it would be infinite
Flags = argparse.ArgumentParser  # or a group of one


class Parser(argparse.ArgumentParser):
    """A parser whose help is a docstring: its first paragraph, then what follows the flags. Lines of `taskgpt` are commands."""

    def __init__(self, prog: str, doc: str | None = None, **others: Any):
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, **others)
        self._title, _, self._rest = (doc or "").partition("\n\n")  # none under python -OO
        self.add_argument("--version", action=_Version, nargs=0, dest=argparse.SUPPRESS, help="print the version and end")

    def format_help(self) -> str:
        """Return the help for a terminal as wide as this one."""
        width = max(LEAST_WIDTH, shutil.get_terminal_size().columns - 2)  # as argparse leaves
        self.description, self.epilog = wrapped(self._title, width), wrapped(self._rest, width)
        return super().format_help()

    def examples(self, verb: str) -> str:
        """Return the docstring's commands that have this verb of their own: the docstring of its parser, below a title."""
        return "\n".join(line for line in self._rest.splitlines() if f" {verb} " in line)


class _Version(argparse.Action):
    """Looks the version up when it is asked for: it stands in a file."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"taskgpt {version('taskgpt')}")
        parser.exit()


def wrapped(text: str, width: int) -> str:
    """Return paragraphs filled to a width; of commands, each below its remark, in lines that a shell puts together again."""
    return "\n\n".join(_paragraph(each, width) for each in textwrap.dedent(text).strip().split("\n\n"))


def _paragraph(text: str, width: int) -> str:
    lines = [line.strip() for line in text.splitlines()]
    if not text.lstrip().startswith(("taskgpt ", "python -m ")):
        return textwrap.fill(" ".join(lines), width)
    found = ["examples:"]
    for line in lines:
        command, _, remark = (part.strip() for part in line.partition("  #"))
        found += textwrap.wrap(remark, width, initial_indent="  # ", subsequent_indent="  # ")
        parts = textwrap.wrap(command, width - 2, break_on_hyphens=False, break_long_words=False, **INDENTS)
        found.append(" \\\n".join(parts))
    return "\n".join(found)


# Flags ----------------------------------------------------------------------------------------------------------------------------------


class _Words(argparse.Action):
    """Takes one word or more, and keeps what `read(flag, words)` makes of them. `extends`: behind the words that the flag had before."""

    def __init__(self, *names: Any, read: Callable[[str, list[str]], Any], extends: bool = False, **others: Any):
        super().__init__(*names, nargs="+", **others)
        self._read, self._extends = read, extends

    def __call__(self, parser: object, flags: argparse.Namespace, words: Any, flag: str | None = None) -> None:
        before = getattr(flags, self.dest) if self._extends else []
        setattr(flags, self.dest, self._read(flag or "", [*before, *words]))


def _add(to: Flags, flag: str, alias: str, help: str, **others: Any) -> None:
    """Add a flag, and its other number, of which help does not speak."""
    to.add_argument(flag, action=_Words, help=help, **others)
    to.add_argument(alias, action=_Words, help=argparse.SUPPRESS, **others)


def add_graphs(to: Flags, default: Sequence[str]) -> None:
    """Add --graph for a program that takes several."""
    add_names(to, "graph", default, "graph files")


def add_graph(to: Flags, default: str) -> None:
    """Add --graph for a program that takes one."""
    _add_name(to, "graph", default, f"graph file: {', '.join(available('graphs'))}, or a path")


def add_schedulers(to: Flags, default: Sequence[str]) -> None:
    """Add --scheduler for a program that takes several."""
    add_names(to, "scheduler", default, "scheduler files")


def add_scheduler(to: Flags, default: str) -> None:
    """Add --scheduler for a program that takes one."""
    _add_name(to, "scheduler", default, f"scheduler file: {', '.join(available('scheduler_configs'))}, or a path")


def add_names(to: Flags, flag: str, default: Sequence[str], help: str, changes: str = CHANGES) -> None:
    """Add --flag, or --flags, for a list of names, which is flags.flags."""

    def read(flag: str, words: list[str]) -> list[str]:
        if not (names := listed(words)):
            raise UserError(f"{flag}: wanted names, got none")
        return names

    told = f"{help}{changes} (default {' '.join(default)})"
    _add(to, f"--{flag}s", f"--{flag}", told, dest=f"{flag}s", read=read, default=list(default), metavar="NAME")


def _add_name(to: Flags, flag: str, default: str, help: str) -> None:
    told = f"{help}{CHANGES} (default {default})"
    _add(to, f"--{flag}", f"--{flag}s", told, dest=flag, read=lambda f, words: _one(f, listed(words)), default=default, metavar="NAME")


def _one(flag: str, found: Sequence[Any]) -> Any:
    """Return the only one. Raises UserError."""
    if not found:
        raise UserError(f"{flag}: wanted one, got none")
    if len(found) > 1:
        raise UserError(f"{flag} {shorten(','.join(map(str, found)))}: wanted one, got {len(found)}; {SEVERAL}")
    return found[0]


def add_workers(to: Flags, help: str, several: bool = False) -> None:
    """Add --workers: a list of numbers, or one number; None if it is not given."""

    def read(flag: str, words: list[str]) -> list[int] | int:
        counts = worker_counts(flag, words)
        return counts if several else _one(flag, counts)

    told = f"numbers of workers, 1,2 for example ({help})" if several else f"number of workers ({help})"
    _add(to, "--workers", "--worker", told, dest="workers", read=read, metavar="N")


def add_share(to: Flags) -> None:
    """Add --share NAME, which is --set share=NAME."""
    told = "share the cores, task by task, with the programs that name the same share, `node` say: --set share=NAME"
    to.add_argument("--share", action="append", type="share={}".format, help=told, dest="set", default=[], metavar="NAME")


def add_numbers(to: Flags, flag: str, read_one: Callable[[str], float], help: str, **others: Any) -> None:
    """Add a flag for a list of numbers. `read_one`: see below."""

    def read(flag: str, words: list[str]) -> list[float]:
        try:
            return [read_one(word) for word in listed(words)]
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{flag}: {error}") from None

    to.add_argument(flag, action=_Words, read=read, help=help, **others)


def add_changes(to: Flags, several: bool = False, has_auto: bool = False, has_scheduler: bool = True) -> None:
    """Add --tiles and --set, of whose values every combination is meant. `has_auto`: tiles may be `auto`, those that tuning found."""

    def read(flag: str, words: list[str]) -> list[str]:
        if not several:
            for key, values in choices(flag, [word for word in words if not (has_auto and word == AUTO)]).items():
                if len(values) > 1:
                    raise UserError(f"{flag} {shorten(key)}={shorten(','.join(values))}: wanted one value, got {len(values)}; {SEVERAL}")
        return words

    auto = "; auto: those that `taskgpt tune` found for this machine, shape and number of workers" * has_auto
    of = (
        "of the graph file, or of the schedulers that have them: model.layers=2, idle=busy"
        if has_scheduler
        else "of the graph file: model.layers=2"
    )
    shared = {"read": read, "extends": True, "default": [], "metavar": "KEY=V,V" if several else "KEY=V"}
    _add(to, "--tiles", "--tile", f"tile sizes: rows={'64,128' if several else '64'}{auto}", dest="tiles", **shared)
    to.add_argument("--set", action=_Words, help=f"keys {of}", **shared)


def add_wide(to: Flags) -> None:
    """Add --wide, which `layout.terminal_width` heeds."""
    to.add_argument("--wide", action="store_true", help="tables with all their columns, however wide")


# Numbers, for `type=` of a flag -----------------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """Return an integer of 0 or more. Raises ArgumentTypeError, as parsers want it."""
    return int(_number(text, int, 0))


def positive(text: str) -> int:
    """Return an integer of 1 or more. Raises ArgumentTypeError, as parsers want it."""
    return int(_number(text, int, 1))


def rate(text: str) -> float:
    """Return a number of 0 or more. Raises ArgumentTypeError, as parsers want it."""
    return _number(text, float, 0)


def part(text: str) -> float:
    """Return a number from 0 to 1. Raises ArgumentTypeError, as parsers want it."""
    return _number(text, float, 0, 1)


def _number(text: str, kind: type, least: int, most: float = FLOAT32_MAX) -> float:
    try:
        number = kind(text)
        if least <= number <= most:
            return number
    except ValueError:
        pass
    wanted = f"from {least} to {most:g}" if most < FLOAT32_MAX else f"of {least} or more"
    raise argparse.ArgumentTypeError(f"wanted {'an integer' if kind is int else 'a number'} {wanted}, got {shorten(text)}")
