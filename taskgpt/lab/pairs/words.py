"""How the command line names a program of a pair: NAME[:KEY=VALUE,...][@SCHEDULER[:KEY=VALUE,...]].

gpt2-124m@native                        training steps of a graph, as many as take about --seconds
gpt2-124m:times=3@loops-llmc            three of them
cholesky:n=2048,tile=64@native          one of the small programs of works.py, again and again
"""

from dataclasses import dataclass
from typing import Self

from taskgpt.config import available, load_scheduler
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.gpt2.model import GPT2
from taskgpt.lab.benchmarks.programs import program_of
from taskgpt.lab.named import make_config, prepare, scheduler_of, split_changes
from taskgpt.lab.pairs.works import PROGRAMS, Work, training, work_of

FLAG = "--pairs"
SCHEDULER = "native"  # where a word names none
MOST_TIMES = 10**6


@dataclass(frozen=True)
class Word:
    """A program as `said`: a small one or a graph, with its changes; a scheduler; `times` it runs, None: what takes about --seconds."""

    said: str
    program: str
    scheduler: str
    times: int | None

    @classmethod
    def of(cls, said: str) -> Self:
        """Read a word. Raises UserError for whatever it names that there is not, and for schedulers that cannot share cores."""
        body, _, scheduler = said.partition("@")
        name, changes = split_changes(body)
        times = [change.partition("=")[2] for change in changes if change.partition("=")[0] == "times"]
        if times and not (times[-1].isdecimal() and len(times[-1]) < 8 and 1 <= int(times[-1]) <= MOST_TIMES):
            raise UserError(f"{FLAG} {shorten(said)}: times: wanted a number from 1 to {MOST_TIMES:,}, for example {name}:times=20")
        kept = ",".join(change for change in changes if change.partition("=")[0] != "times")
        word = cls(said, f"{name}:{kept}" if kept else name, scheduler or SCHEDULER, int(times[-1]) if times else None)
        word._verify(name)
        return word

    def _verify(self, name: str) -> None:
        if name in PROGRAMS:
            program_of(self.program, FLAG, PROGRAMS)
        elif name in available("graphs") or "/" in name or name.endswith(".toml"):
            make_config(self.program)
        else:
            known, there = [*PROGRAMS, *available("graphs")], f"there are {', '.join(PROGRAMS)}, and graph files"
            raise UserError(f"{FLAG}: '{shorten(name)}' is no program and no graph{did_you_mean(name, known)}; {there}")
        config, where = load_scheduler(*scheduler_of(self.scheduler)), f"{FLAG} {shorten(self.said)}"
        if not hasattr(config.settings, "share"):
            raise UserError(f"{where}: scheduler {config.scheduler} cannot share cores; native, loops, threads and sequential can")
        if config.settings.share:
            raise UserError(f"{where}: share={config.settings.share}: pairs share and do not share by turns; leave it out")

    @property
    def is_graph(self) -> bool:
        return split_changes(self.program)[0] not in PROGRAMS

    @property
    def bytes_needed(self) -> int:
        """How much memory it takes, about."""
        if not self.is_graph:
            return program_of(self.program, FLAG, PROGRAMS).nbytes + 2**28
        config = make_config(self.program)
        return int(GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options) * 1.1) + 2**28

    def work(self) -> Work:
        """Return the work, compiled, with its memory."""
        return training(prepare(self.program)) if self.is_graph else work_of(program_of(self.program, FLAG, PROGRAMS))
