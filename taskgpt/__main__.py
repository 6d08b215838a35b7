"""The command `taskgpt`: one verb per program. `python -m taskgpt` is the same."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from taskgpt.errors import begin_program, did_you_mean, run_program, shorten

PROGRAMS = {
    "train": "train GPT-2",
    "sample": "generate text: continue prompts with a trained model",
    "eval": "measure a model's loss, or how often it chooses right",
    "data": "download a dataset, or list what is prepared",
    "sizes": "list the models with their parameters and memory",
    "convert": "convert a model between llm.c's and Hugging Face's formats",
    "show": "draw a graph, or write it as text, JSON, GraphML or DOT",
    "plot": "draw the curves of training runs over each other",
    "run": "run a program of your own, and trace its tasks",
    "trace": "report on traces, check them, convert them",
    "compare": "race schedulers, tiles and policies on a graph",
    "tune": "search for the fastest tiles and policy on this machine",
    "cluster": "test a Dask cluster before a long run on it",
    "share": "list the programs that share cores, and who holds which",
    "simulate": "predict a step on cores that one does not have",
    "bench": "measure a step, a task's overhead, other libraries",
}
EXAMPLES = """\
examples:
  taskgpt train --graph tiny
  taskgpt data prepare tinyshakespeare
  taskgpt show graph --graph tiny --format svg --output tiny.svg
  taskgpt plot runs/a runs/b
  taskgpt trace check runs/native
  taskgpt compare --graph tiny --workers 1,2
  taskgpt VERB --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit code."""
    if argv is None and __name__ != "__main__":  # the installed command; `python -m taskgpt` has begun
        begin_program()
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in PROGRAMS:
        return importlib.import_module("taskgpt.train" if verb == "train" else f"taskgpt.programs.{verb}").main(rest)
    if verb in ("-h", "--help"):
        return run_program("taskgpt", print_help)
    if verb == "--version":
        return run_program("taskgpt", print_version)
    print(f"taskgpt: error: unknown verb '{shorten(verb)}'{did_you_mean(verb, PROGRAMS)}", file=sys.stderr)
    return 2


def print_help() -> int:
    print("usage: taskgpt VERB ...\n\nTrain GPT-2 as a graph of tasks, and look at how it runs.\n\nverbs:")
    for verb, help in PROGRAMS.items():
        print(f"  {verb:9} {help}")
    print(f"  --version\n\n{EXAMPLES}")
    return 0


def print_version() -> int:
    print(f"taskgpt {version('taskgpt')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
