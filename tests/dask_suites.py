"""Dask's own tests with taskgpt.get in place of Dask's schedulers: `python -m tests.dask_suites [SUITE ...]`; --help lists the suites.

taskgpt.get runs every graph that Dask would run on its threads (arrays, delayed calls, data frames, `scheduler="threads"`), by default in
processes (bags), or in the calling thread alone (`scheduler="sync"`, which most tests of arrays ask for): there on one worker. The tests
are those that Dask installs; what a test needs besides (pandas, xarray, a network) is its own business, and where it is missing, the test
skips or fails.

A test that fails is run again as Dask made it. If that fails too, it is no matter of ours. If not, dask_suites.toml must name it, with the
reason; one that it does not name, or that hangs, makes the exit status 1. Takes minutes to hours; not part of `pytest`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import dask

SUITES = {
    "core": [f"tests/test_{name}.py" for name in (
        "threaded", "local", "base", "delayed", "callbacks", "cache", "context", "core", "order", "graph_manipulation", "highgraph",
        "hlgexpr", "composite_expr", "expr", "layers", "optimization", "multiprocessing", "task_spec", "tokenize", "traceback", "typing",
        "utils",
    )],
    "diagnostics": ["diagnostics/tests"],
    "bag": ["bag/tests"],
    "array": ["array/tests"],
    "dataframe": ["dataframe/tests", "dataframe/dask_expr/tests", "dataframe/io/tests", "dataframe/tseries/tests"],
}  # fmt: skip
HERE = Path(__file__).parent
DASK = Path(dask.__file__).parent
EXCEPTIONS = HERE / "dask_suites.toml"
HANG_S = 600
AS_DASK_MADE_IT = "TASKGPT_SUITES_AS_DASK_MADE_IT"
REPORT = "TASKGPT_SUITES_REPORT"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--select", default="", metavar="EXPRESSION", help="only tests that pytest's -k selects")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"unknown suites: {', '.join(sorted(unknown))}")
    reasons = {each["test"]: each["reason"] for each in tomllib.loads(EXCEPTIONS.read_text(encoding="utf-8"))["exceptions"]}
    total: dict[str, int] = {}
    is_clean = True
    for suite in options.suites or SUITES:
        start = time.perf_counter()
        report = run([str(DASK / path) for path in SUITES[suite] if (DASK / path).exists()], options.select)
        outcomes = report["outcomes"]
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        anyway = run([str(DASK / test) for test in failed], as_dask_made_it=True)["outcomes"] if failed else {}
        counts = {kind: sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "skipped", "xfailed")}
        counts["failed under Dask's own schedulers, too"] = sum(anyway.get(test) == "failed" for test in failed)
        ours = [test for test in failed if anyway.get(test) != "failed"]
        known = [test for test in ours if without_parameters(test) in reasons]
        counts["documented exceptions"], counts["NEW failures"] = len(known), len(ours) - len(known)
        counts["graphs by taskgpt.get"] = report["graphs"]
        for kind, count in counts.items():
            total[kind] = total.get(kind, 0) + count
        print(f"{suite}, {time.perf_counter() - start:.0f} s: {in_words(counts)}", flush=True)
        for test in ours:
            print(f"  {test}: {reasons.get(without_parameters(test), 'NEW')}", flush=True)
        if not report["is_whole"]:
            print(f"  not all tests were run: one crashed, or took longer than {HANG_S} s, after {list(outcomes)[-1:]}", flush=True)
        is_clean &= len(ours) == len(known) and report["is_whole"]
    print(f"all: {in_words(total)}")
    return not is_clean


def in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def without_parameters(test: str) -> str:
    return test.partition("[")[0]


def run(tests: Iterable[str], select: str = "", as_dask_made_it: bool = False) -> dict:
    """Run tests in a process of their own; return what the plugin below reports, and whether it came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        environment = {**os.environ, REPORT: str(path), AS_DASK_MADE_IT: "1" if as_dask_made_it else ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        options = ["-q", "-c", os.devnull, "--rootdir", str(DASK), "-p", "no:cacheprovider", "-p", "dask_suites", "-W", "ignore", "--tb=no"]
        if find_spec("pytest_timeout"):
            options += [f"--timeout={HANG_S}", "--timeout-method=thread"]
        command = [sys.executable, "-m", "pytest", *options, *(["-k", select] if select else []), *tests]
        subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, check=False)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    outcomes = {line["test"]: line["outcome"] for line in lines if "test" in line}
    graphs = [line["graphs"] for line in lines if "graphs" in line]
    return {"outcomes": outcomes, "graphs": sum(graphs), "is_whole": bool(graphs)}


# As pytest's plugin, in the processes that `run` starts ---------------------------------------------------------------------------------

_graphs = 0


def replace_schedulers() -> None:
    """Let taskgpt.get stand wherever Dask has a scheduler of this process. Before anything else of Dask is imported."""
    import dask.base
    import dask.local
    import dask.threaded
    from dask.delayed import Delayed

    from taskgpt.schedulers.dask_get import workers

    class Counted(workers._Computation):
        def __init__(self, *args):
            global _graphs
            _graphs += 1
            super().__init__(*args)

    workers._Computation, get = Counted, workers.get
    ours = {dask.threaded.get: get, dask.local.get_sync: partial(get, num_workers=1)}
    for name, scheduler in dask.base.named_schedulers.items():
        dask.base.named_schedulers[name] = ours.get(scheduler, scheduler)
    dask.threaded.get = get
    Delayed.__dask_scheduler__ = staticmethod(get)  # was made when Dask was imported
    if find_spec("dask.bag"):
        import dask.bag.core

        dask.bag.core.DEFAULT_GET = get
        dask.bag.Bag.__dask_scheduler__ = staticmethod(get)


def note(line: dict) -> None:
    with open(os.environ[REPORT], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: object) -> None:
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    if report.when == "call" or outcome in ("failed", "skipped", "xfailed"):
        note({"test": report.nodeid, "outcome": outcome})


def pytest_sessionfinish() -> None:
    note({"graphs": _graphs})


if REPORT in os.environ:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs inherit that it is ignored; test_interrupt needs it
    if not os.environ[AS_DASK_MADE_IT]:
        replace_schedulers()

if __name__ == "__main__":
    sys.exit(main())
