"""What workers log while a rank runs in them: warnings and errors go to the driver, without those of Dask's own, which its logs have."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from distributed import Worker

from taskgpt.cluster.job import Job
from taskgpt.collectives import PeerLost
from taskgpt.errors import UserError, shorten

_OF_OTHERS = ("distributed", "tornado", "bokeh", "asyncio")
_LONGEST = 2000  # characters of a message


class _ToDriver(logging.Handler):
    def __init__(self, worker: Worker, job: Job, rank: int):
        super().__init__(logging.WARNING)
        self._worker, self._job, self._who = worker, job, f"rank {rank} ({socket.gethostname()}, {worker.address})"

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] not in _OF_OTHERS:
            text = shorten(f"{record.levelname} {record.name}: {self.format(record)}", _LONGEST)
            told = {"generation": self._job.generation, "what": "log", "found": (f"{self._who}: {text}",)}
            self._worker.log_event(self._job.topic, told)


@contextmanager
def told_to_driver(worker: Worker, job: Job, rank: int) -> Iterator[None]:
    """Tell the driver what is logged as a warning or an error meanwhile, and what ends the rank, unless a user can mend it."""
    handler, root = _ToDriver(worker, job, rank), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except (PeerLost, UserError):  # which the driver says itself
        raise
    except BaseException:
        logging.getLogger("taskgpt").exception("ended")
        raise
    finally:
        root.removeHandler(handler)
