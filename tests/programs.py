"""Programs that tests start and talk to."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def started(command: list, **options) -> Iterator[subprocess.Popen]:
    """Start a program, its output and errors on pipes; one that still runs when the test leaves is killed, so that nothing waits for it."""
    environment = dict(os.environ)  # not what libraries have set beside Python: GNU's readline says how wide the terminal is
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment, **options}
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()
