"""Schedulers by name and settings, for tests."""

from taskgpt import config
from taskgpt.schedulers import Scheduler, open_scheduler


def scheduler(name: str, **settings) -> Scheduler:
    found = config.load_scheduler(name, settings)
    return open_scheduler(found.scheduler, found.settings)
