"""A cluster that is started for a run, and ends with it: worker processes here, by SSH, in jobs of a batch system, under mpiexec."""

from collections.abc import Callable
from contextlib import ExitStack

from distributed import Client
from distributed.security import Security

from taskgpt.cluster.settings import Settings
from taskgpt.schedulers import local_cluster


def described(settings: Settings) -> str:
    """Return a few words for people: what is started, and where."""
    return f"{settings.members} worker process{'es' * (settings.members > 1)} on 127.0.0.1"


def _local(stack: ExitStack, settings: Settings, security: Security) -> Client:
    protocol = "tls://" if security.require_encryption else "tcp://"
    options = {"threads_per_worker": 1, "scheduler_kwargs": {"dashboard": False}, "dashboard_address": "127.0.0.1:0"}
    return local_cluster.start(stack, True, n_workers=settings.members, protocol=protocol, security=security, **options)[1]


STARTERS: dict[str, Callable[[ExitStack, Settings, Security], Client]] = {"local": _local}
