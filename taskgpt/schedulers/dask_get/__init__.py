"""taskgpt.get, a scheduler for any Dask graph: ranking.py keeps a graph's tasks as numbers and has the policies; workers.py runs them."""

from taskgpt.schedulers.dask_get.workers import get

__all__ = ["get"]
