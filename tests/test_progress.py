"""One line of progress, on a terminal and elsewhere, for whatever takes time."""

import io
import os
import re
import sys
import termios

import kernels_for_tests as k
import pytest

from taskgpt.errors import UserError
from taskgpt.lab import report
from taskgpt.progress import BAR, DRAW_S, LINE_S, Progress, megabytes, minutes


class Screen(io.StringIO):
    """Standard error with a terminal behind it, or none; `shown` is what the terminal's last line shows."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def shown(self) -> str:
        return self.getvalue().rpartition("\r")[2].removesuffix("\x1b[K")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def screen(monkeypatch, is_terminal: bool = True) -> Screen:
    """Put it in the place of standard error; called by a test itself, as pytest puts its own there before each."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", found := Screen(is_terminal))
    return found


def test_a_terminal_shows_one_line(monkeypatch, clock):
    """A bar of fixed width, the count, the time left, what goes on; no wider than the terminal, and gone in the end."""
    terminal = screen(monkeypatch)
    with Progress("measuring", 40, clock=clock) as progress:
        progress.show(0, "tiny native")
        assert terminal.shown == f"measuring [{'-' * BAR}] 0/40  tiny native"
        clock.now += 20
        progress.show(10, "tiny loops " * 20)
        assert terminal.shown.startswith("measuring [###---------] 10/40, 1:00 left  tiny loops tiny")
        assert len(terminal.shown) == 79
    assert terminal.shown == ""
    assert "\n" not in terminal.getvalue()


def test_the_terminal_is_that_of_standard_error(monkeypatch, clock):
    """A narrow one, while standard output goes into a file: the line is no wider."""
    terminal = screen(monkeypatch)
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(sys, "__stdout__", None)
    controller, device = os.openpty()
    try:
        termios.tcsetwinsize(device, (24, 40))
        monkeypatch.setattr(terminal, "fileno", lambda: device, raising=False)
        with Progress("measuring", 40, clock=clock) as progress:
            progress.show(0, "tiny native " * 20)
            assert len(terminal.shown) == 39
    finally:
        os.close(controller)
        os.close(device)


def test_it_is_not_drawn_more_often_than_an_eye_sees(monkeypatch, clock):
    """A job of many small parts does not spend its time on that."""
    terminal = screen(monkeypatch)
    with Progress("measuring", 40, clock=clock) as progress:
        progress.show(1)
        drawn = terminal.getvalue()
        clock.now += DRAW_S / 2
        progress.show(2)
        assert terminal.getvalue() == drawn
        clock.now += DRAW_S
        progress.show(3)
        assert " 3/40" in terminal.shown


def test_other_lines_stand_above(monkeypatch, clock):
    """What is printed meanwhile has a line of its own, and progress is below it again."""
    terminal = screen(monkeypatch)
    with Progress("measuring", 2, clock=clock) as progress:
        progress.show(1, "loops")
        shown = terminal.shown
        with progress.aside():
            assert terminal.shown == ""
            print("failed     native", file=sys.stderr)
        assert re.search(r"\r\x1b\[Kfailed     native\n\r", terminal.getvalue())
        assert terminal.shown == shown


@pytest.mark.parametrize("has_lines", [True, False])
def test_elsewhere_there_are_lines_now_and_then(monkeypatch, clock, has_lines):
    """None of a short job; then whole ones, without control codes; none at all where other lines are progress enough."""
    pipe = screen(monkeypatch, is_terminal=False)
    with Progress("comparing", 300, None, has_lines=has_lines, clock=clock) as progress:
        for _ in range(31):
            progress.show_time("round 2: tiny native, 2 workers")
            clock.now += LINE_S / 10
    lines = [f"comparing: {left} left: round 2: tiny native, 2 workers" for left in ("4:50", "4:40", "4:30")]
    assert pipe.getvalue().splitlines() == (lines if has_lines else [])


def test_what_came_before_does_not_make_it_faster(monkeypatch, clock):
    """A download that goes on: the time left is by what this run did."""
    terminal = screen(monkeypatch)
    with Progress("downloading", 4e6, megabytes, done=3e6, clock=clock) as progress:
        clock.now += 10
        progress.show(3.5e6)
        assert terminal.shown == "downloading [##########--] 3.5/4.0 MB, 0:10 left"


def test_a_total_may_turn_out_otherwise(monkeypatch, clock):
    """As with medians that are known earlier than the budget says; and a job that ended gives no number below 0."""
    terminal = screen(monkeypatch)
    with Progress("comparing", 900, None, clock=clock) as progress:
        clock.now += 60
        progress.show_time("", 30)
        assert terminal.shown == f"comparing [{'#' * BAR}] 0:00 left"
        clock.now += 60
        progress.show(120, left_s=7)
        assert terminal.shown.endswith("] 0:07 left")


def test_a_reader_that_leaves_stops_nothing(monkeypatch, clock):
    """Standard error that cannot be written is no reason to end a job."""

    class Closed(Screen):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed(True))
    with Progress("measuring", 2, clock=clock) as progress:
        progress.show(1)


def test_the_line_is_gone_before_an_error_is_told(monkeypatch, clock):
    """So that the message stands alone."""
    terminal = screen(monkeypatch)
    with pytest.raises(UserError), Progress("measuring", 2, clock=clock) as progress:
        progress.show(1)
        raise UserError("x")
    assert terminal.shown == ""


@pytest.mark.parametrize(("cached", "told"), [((True, True), ""), ((True, False), "1 kernel in 0 s, once for this machine")])
def test_compiling_is_one_line(monkeypatch, cached, told):
    """Shown from the first kernel on that is not in the cache, and then told in words; nothing is said of a cache that has them all."""

    def compile_kernels(kernels, tell):
        for done, (kernel, was_cached) in enumerate(zip(kernels, cached, strict=True), 1):
            tell(done, len(cached), kernel, 0.0, was_cached)

    monkeypatch.setattr(report, "compile_kernels", compile_kernels)
    terminal = screen(monkeypatch)
    assert report.compile_with_progress([k.swirl, k.mix]) == told
    assert ("kernels, once for this machine [############] 2/2" in terminal.getvalue()) == bool(told)
    assert terminal.shown == ""


def test_times_in_minutes():
    assert [minutes(s) for s in (0, 9.6, 60, 3599, 3600, 36000)] == ["0:00", "0:10", "1:00", "59:59", "1:00:00", "10:00:00"]
