"""Whether a rank hangs: its worker answers, as Dask's event loop lives, but a task of it does not end, and the others would wait for ever.

A rank that does nothing because it waits for others, or for the driver to fetch a checkpoint, does not hang.
"""

import asyncio
from collections.abc import Callable

from taskgpt.cluster.kept import Kept
from taskgpt.collectives import Communicator
from taskgpt.schedulers.native.doing import Doing

LOOK_S = 0.5  # looks are counted, not seconds: of those that this process is stopped for none is a hang


async def watch(doing: Callable[[], Doing], communicator: Communicator, here: Kept, hang_s: float, hangs: Callable[[str], None]) -> None:
    """Call `hangs` with what hangs, once, when nothing has gone on for `hang_s`; here.is_hung says so for as long as that is true."""
    before, looks = None, 0
    while True:
        await asyncio.sleep(LOOK_S)
        now = doing()
        waits = now.is_idle and (communicator.is_exchanging or bool(here.offers))
        looks = 0 if waits or now != before else looks + 1
        before = now
        if here.is_hung and not looks:
            here.is_hung = False
        elif looks * LOOK_S >= hang_s and not here.is_hung:
            here.is_hung = True
            what = f"task {' and '.join(now.tasks)}" if now.tasks else "training, outside of tasks," if now.is_idle else "a task"
            hangs(f"{what} has not gone on for {hang_s:g} s")
