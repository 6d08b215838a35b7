"""What several test files share: the parity case that llm.c made, and models small enough to train in a test."""

import gc
import json
import signal
from pathlib import Path

import pytest
from plain_schedulers import scheduler

from taskgpt.config import load_graph
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.shape import Batch, Options
from taskgpt.lab import machine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a script; what tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

PARITY = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    return PARITY


@pytest.fixture(scope="session")
def expected() -> dict:
    """What llm.c printed."""
    return json.loads((PARITY / "expected.json").read_text())


@pytest.fixture
def parity_model(request) -> GPT2:
    """The parity case's model with its parameters, B = 4, T = 64; its gradients are stored. A parameter: options."""
    options = Options("matrices", update="separate", **getattr(request, "param", {}))
    m = GPT2(checkpoints.read_shape(PARITY / "model.bin"), Batch(4, 64), load_graph("tiny").tiles, options)
    checkpoints.load(PARITY / "model.bin", m.model, m.parameters)
    return m


@pytest.fixture(params=["sequential", "native-1", "native-2", "native-8", "native-stealing-4"])
def each(request):
    """A scheduler, open, of those that run programs."""
    name, _, workers = request.param.rpartition("-")
    with scheduler(name or request.param, workers=int(workers) if name else 1) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def cheap_collections():
    """Take what is there out of the garbage collector's sight: after a few files, to look at all that numba made takes it a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def alike_everywhere(monkeypatch):
    """Measure the machine in moments and on little memory: no test asks how fast this one is. No terminal has a width."""
    measure, cache_bytes = machine.timed_together, machine.cache_bytes
    monkeypatch.setattr(machine, "timed_together", lambda calls, seconds: measure(calls, min(seconds, 0.002)))
    monkeypatch.setattr(machine, "BANDWIDTH_BYTES", 1 << 16)
    monkeypatch.setattr(machine, "cache_bytes", lambda *args, **level: cache_bytes(*args, **level) if args or level else 0)
    monkeypatch.delenv("COLUMNS", raising=False)
