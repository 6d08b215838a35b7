"""Lines of programs, kept so cheaply that every task can have the one that spawned it."""

from types import CodeType


class Line:
    """A line of a program: `FILE, line N`, looked up when somebody asks."""

    __slots__ = ("_code", "_instruction")

    def __init__(self, code: CodeType, instruction: int):
        self._code, self._instruction = code, instruction

    def __str__(self) -> str:
        lines = (line for start, end, line in self._code.co_lines() if start <= self._instruction < end)
        return f"{self._code.co_filename}, line {next(lines, None) or self._code.co_firstlineno}"


class Iteration:
    """An iteration of a loop that a line spawned as one."""

    __slots__ = ("_line", "_what")

    def __init__(self, line: Line, what: str):
        self._line, self._what = line, what

    def __str__(self) -> str:
        return f"{self._line}, {self._what}"
