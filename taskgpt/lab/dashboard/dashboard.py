"""Dask's dashboard for schedulers that are not Dask's: its task stream, /tasks, shows their tasks; and a page of ours in it, /taskgpt.

    dashboard = Dashboard(live)                             # before the scheduler starts
    with Traced(scheduler, on_run=dashboard.look) as traced, dashboard.serve(scheduler):
        ...                                                 # dashboard.url is http://127.0.0.1:8787/taskgpt, or a free port

    with dashboard.serve():                                 # a run whose tasks are elsewhere: /taskgpt shows its ranks, without /tasks
        ...

The server is a Dask cluster without workers, inside this process. Bound to 127.0.0.1 unless asked for more: whoever can reach it can look.
"""

import importlib.util
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import key_split
from distributed import LocalCluster
from distributed import Scheduler as DaskScheduler
from distributed.diagnostics import progress_stream, task_stream
from distributed.diagnostics.task_stream import TaskStreamPlugin

from taskgpt import palette
from taskgpt.errors import UserError, shorten
from taskgpt.lab.dashboard.live import Live
from taskgpt.lab.traces.trace import Trace
from taskgpt.schedulers import Scheduler

if TYPE_CHECKING:
    from bokeh.document import Document

PORT = 8787  # Dask's
# Dask's pages, and their parts, that have something to show without Dask's workers; the first ones are of tasks.
PAGES, PLOTS = ("tasks", "system"), ("individual-task-stream", "individual-scheduler-system")
SPANS = 5000  # tasks that the task stream shows: some steps
GOODBYE_SECONDS = 2  # for a page to say that the run is over
_CONFIG = {
    "distributed.scheduler.dashboard.status.task-stream-length": SPANS,
    "distributed.scheduler.dashboard.tasks.task-stream-length": SPANS,
    "distributed.admin.system-monitor.gil.enabled": False,
}


class Dashboard:
    """The page /taskgpt shows what `live` holds. Made before a cluster starts, so that the cluster's own dashboard has the page too."""

    def __init__(self, live: Live, address: str = ""):
        """`address`: where to serve, `[HOST:]PORT`; "": at 127.0.0.1 and Dask's port, or a free one if that is in use.

        Raises UserError if bokeh is missing, or if the address cannot be used.
        """
        self.live, self.address, self.url = live, address, ""
        if importlib.util.find_spec("bokeh") is None:
            raise UserError("--dashboard: needs bokeh; install it with: pip install 'taskgpt[dashboard]'")
        from distributed.dashboard.scheduler import applications

        _paint_as_ours()
        self.viewers: dict[Document, Callable[[], None]] = {}
        applications["/taskgpt"] = lambda _scheduler, extra, document: self._open(document, extra)
        self._host, self._port = _parse(address) if address else ("127.0.0.1", PORT if _why_not("127.0.0.1", PORT) is None else 0)
        if why := _why_not(self._host, self._port):
            raise UserError(f"--dashboard {shorten(address)}: cannot listen there: {why}; choose another port, or 0 for any")
        self._to_wall_ns = time.time_ns() - time.monotonic_ns()
        self.task_stream: TaskStreamPlugin | None = None

    @contextmanager
    def serve(self, scheduler: Scheduler | None = None) -> Iterator[None]:
        """Serve the pages; those of a scheduler that has a dashboard, and so a task stream, already are joined by ours.

        None: no task runs here.

        Raises UserError if that scheduler has its dashboard switched off, or elsewhere than at the address asked for.
        """
        self.live.share = getattr(scheduler.settings, "share", "") if scheduler is not None else ""
        with dask.config.set(_CONFIG):
            if scheduler is not None and scheduler.serves_dashboard:
                if self.address or scheduler.settings.dashboard < 0:
                    raise UserError("--dashboard: local-cluster serves its own; choose its port with --set dashboard=PORT, 0 for any")
                self._link(scheduler.dask_scheduler, "127.0.0.1")
                with self._showing_the_end():
                    yield
                return
            # In a thread of its own: Ctrl-C in the middle of a start waits for its end, and then finds a cluster that can be closed.
            with ThreadPoolExecutor(1) as starter:
                cluster = starter.submit(self._start).result()
            with cluster:
                if scheduler is not None:
                    self.task_stream, self._loop = TaskStreamPlugin(cluster.scheduler), cluster.loop
                    cluster.scheduler.add_plugin(self.task_stream)
                _leave(cluster.scheduler, *((PAGES, PLOTS) if scheduler is not None else (PAGES[1:], PLOTS[1:])))
                self._link(cluster.scheduler, self._host)
                with self._showing_the_end():
                    yield

    def _start(self) -> LocalCluster:
        from distributed.dashboard.scheduler import applications

        status = applications["/status"]  # where / leads: mostly panels of Dask's workers, of which there are none
        applications["/status"] = applications["/taskgpt"]
        try:
            return LocalCluster(
                n_workers=0,
                processes=False,
                dashboard_address=[(self._host, self._port)],  # as a string, an IPv6 address is one colon too many
                silence_logs=logging.CRITICAL,
            )
        finally:
            applications["/status"] = status

    def _link(self, dask_scheduler: DaskScheduler, host: str) -> None:
        """Put the page into the bar at the top of every page."""
        pages, _ = _bar(dask_scheduler)
        pages[:] = ["taskgpt", *(page for page in pages if page != "taskgpt")]
        name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{dask_scheduler.http_server.port}/taskgpt"

    def _open(self, document: "Document", extra: dict[str, Any]) -> None:
        from taskgpt.lab.dashboard import page

        self.viewers[document] = page.fill(document, self.live, extra)
        document.on_session_destroyed(lambda _: self.viewers.pop(document, None))

    @contextmanager
    def _showing_the_end(self) -> Iterator[None]:
        """At the end of the run, say so on every page that somebody looks at, before the server is gone."""
        try:
            yield
        finally:
            self.live.end = "ended early" if self.live.trains and self.live.done != self.live.total else "finished"
            told = []
            for document, update in list(self.viewers.items()):
                told.append(threading.Event())
                document.add_next_tick_callback(update)
                document.add_next_tick_callback(told[-1].set)  # after what `update` changed was sent
            for event in told:
                event.wait(GOODBYE_SECONDS)

    def look(self, part: Trace) -> None:
        """Take note of what ran since the last look: for the page, and for the task stream, if it is ours to fill."""
        self.live.look(part)
        if self.task_stream is not None and len(part.records):
            self._loop.add_callback(self._append, part)

    def _append(self, part: Trace) -> None:
        """Add tasks to Dask's buffer by the time they ended, as its own come; in the thread of the server."""
        names, kernel = part.names("kernel"), part.column("kernel")
        order = part.records["stop_ns"].argsort()
        steps, records = part.runs["step"][part.records["run"]][order].tolist(), part.records[order]
        name = part.about["scheduler"].partition(":")[0]
        columns = (records[field].tolist() for field in ("task", "start_ns", "stop_ns", "worker"))
        for k, step, moved, task, start, stop, worker in zip(
            kernel[order].tolist(), steps, part.column("bytes")[order].tolist(), *columns, strict=True
        ):
            span = {"action": "compute", "start": (start + self._to_wall_ns) / 1e9, "stop": (stop + self._to_wall_ns) / 1e9}
            self.task_stream.buffer.append(
                {
                    "key": (names[k], step, task),
                    "status": "OK",
                    "worker": name,
                    "thread": worker,
                    "type": "",
                    "nbytes": moved,
                    "startstops": [span],
                }
            )
            self.task_stream.index += 1


def _bar(dask_scheduler: DaskScheduler) -> tuple[list[str], list[dict[str, str]]]:
    """Return the pages and the plots that the bar leads to, lists that all pages share."""
    from distributed.dashboard.scheduler import template_variables

    variables = template_variables(dask_scheduler)
    return variables["pages"], variables["plots"]


def _leave(dask_scheduler: DaskScheduler, names: Sequence[str], of_plots: Sequence[str]) -> None:
    """Leave, of Dask's own pages, those that have something to show."""
    pages, plots = _bar(dask_scheduler)
    pages[:], plots[:] = names, [plot for plot in plots if plot["url"] in of_plots]


def _colour(kernel: str) -> str:
    return palette.of_kernels([kernel])[kernel]


def _paint_as_ours() -> None:
    """Give tasks in Dask's pages the colours that they have in ours. Dask has no setting for it: it picks one by a checksum of the name."""
    from distributed.dashboard.components import scheduler as pages

    task_stream.colors["compute"] = lambda message: _colour(key_split(message["key"])) if message["status"] == "OK" else "black"
    progress_stream.color_of = pages.color_of = pages.ts_color_of = _colour


def _parse(address: str) -> tuple[str, int]:
    """Return (host, port) of `[HOST:]PORT`; an IPv6 address stands in brackets, as in a link, and comes out without."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_host = ":" not in host or (bare != host and _is_ipv6(bare))
    if not (is_host and port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 1 << 16):
        raise UserError(
            f"--dashboard {shorten(address)}: wanted [HOST:]PORT, the port from 0 to 65535; 8787 say, [::1]:8787, or 0.0.0.0:8787 for all "
            "who can reach it"
        )
    return bare or "127.0.0.1", int(port)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def _why_not(host: str, port: int) -> str | None:
    """Return why nothing can listen there, or None."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        return getattr(error, "strerror", None) or shorten(error)
