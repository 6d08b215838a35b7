"""How long each step of training takes where steps overlap: by what the workers have done, not by when the caller was told."""


class Pace:
    """The times of runs that `run_each` yields.

    A scheduler may begin the next run while one is under way, and its caller may come late: ends of runs, as the caller sees them, can lie
    a millisecond apart. So a run's time goes from the moment when the machine had done the work of all runs before it to the moment when it
    has done its own too; between two looks, work is taken to go on evenly. Times then add up to the time that went by, and none is shorter
    than the work needs.

        pace = Pace(time.perf_counter())
        for graph in scheduler.run_each(graphs):
            seconds = pace.step(time.perf_counter(), scheduler.ahead())
    """

    def __init__(self, now: float):
        self._looked_at = self._done_until = now
        self._ahead = 0.0

    def step(self, now: float, ahead: float) -> float:
        """Return the seconds of the run that was just yielded. ahead: which part of the next run's work is done."""
        left = 1 - self._ahead  # of this run, at the last look
        end = self._looked_at + (now - self._looked_at) * (left / (left + ahead) if left > 0 else 0)
        seconds = end - self._done_until
        self._looked_at, self._done_until, self._ahead = now, end, ahead
        return seconds
