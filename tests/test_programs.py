"""The command `taskgpt`: every verb answers, however Python itself was started."""

import subprocess
import sys
from pathlib import Path

HELP_OF_ALL = """
from taskgpt.__main__ import PROGRAMS, main
for verb in PROGRAMS:
    try:
        main([verb, "--help"])
    except SystemExit as end:
        print("helped", verb, end.code)
print("exit code", main([]))
"""


def test_help_needs_no_docstrings():
    """`python -OO` drops them; every --help is shown all the same, with its flags."""
    command = [sys.executable, "-OO", "-c", HELP_OF_ALL]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.startswith("helped")] == [
        f"helped {verb} 0" for verb in ("train", "data", "bench", "trace", "show", "compare", "simulate", "tune")
    ]
    assert ended.stdout.endswith("verbs: train, data, bench, trace, show, compare, simulate, tune, sizes\nexit code 0\n")
