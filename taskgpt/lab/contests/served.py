"""An object in a process of its own, which may die without taking along who asks it.

bench = Served(Bench)                 # made there, of a class and arguments that can be pickled; closed at the end if it is a context
answer = bench.ask("timed", cell, 3)  # what its method returns
bench.tell("run", at)                 # or in two parts: several may work at the same time
answer = bench.hear()
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from taskgpt.errors import UserError
from taskgpt.schedulers import WorkerError
from taskgpt.tasks import AccessError, TaskError, TwinError

LIMIT_S = 900.0  # of an answer; one that takes longer hangs
PATIENCE_S = 20.0  # with a process that is to end


class AskingFailed(RuntimeError):
    """What was asked failed, or the process died; the message says why."""


class Served:
    """The process, and the object in it. It ends when its pipe does, so also when this process dies."""

    def __init__(self, make: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S):
        self._limit_s = limit_s
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), name=f"taskgpt-{make.__name__.strip('_').lower()}")
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """The process' id."""
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, verb: str, *arguments: Any) -> None:
        """Have it call a method. Raises AskingFailed if the process is dead."""
        try:
            self._pipe.send((verb, arguments))
        except ConnectionError:
            raise AskingFailed(self._died()) from None

    def hear(self) -> Any:
        """Return what the method returned that it was told to call. Raises AskingFailed; a process that says nothing in time is killed."""
        try:
            if not self._pipe.poll(self._limit_s):
                self._process.kill()
                self.end()
                raise AskingFailed(f"gave no answer for {self._limit_s:.0f} s")
            is_fine, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise AskingFailed(self._died()) from None
        if not is_fine:
            raise AskingFailed(answer)
        return answer

    def ask(self, verb: str, *arguments: Any) -> Any:
        """Have it call a method; return what that returned. Raises AskingFailed."""
        self.tell(verb, *arguments)
        return self.hear()

    def interrupt(self) -> None:
        """Pass a Ctrl-C on."""
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGINT)

    def end(self, patience_s: float = PATIENCE_S) -> int | None:
        """Wait for the process, which ends when its pipe does, or kill it; return its exit code."""
        self._pipe.close()
        self._process.join(patience_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def _died(self) -> str:
        return f"its process died{_cause(self.end())}"


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f" with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f" of {name}" + (", as it does where memory runs out; choose smaller graphs" if name == "SIGKILL" else "")


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer until the pipe ends. Ctrl-C at the terminal is for the parent, which passes it on."""
    os.setpgrp()
    made = make(*arguments)
    closes = made if isinstance(made, contextlib.AbstractContextManager) else contextlib.nullcontext()
    with closes, contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            verb, given = pipe.recv()
            try:
                answer = True, getattr(made, verb)(*given)
            except (UserError, MemoryError, OSError, TaskError, TwinError, AccessError, WorkerError) as error:
                answer = False, str(error) or type(error).__name__
            except Exception as error:  # a defect: what others measure is worth something without it
                traceback.print_exc(file=sys.stderr)
                answer = False, f"{type(error).__name__}: {error}"
            pipe.send(answer)
