"""A training run in numbers, at its end."""

import dataclasses
import resource
import statistics
import sys
from typing import Any

import psutil

from taskgpt.gpt2.model import GPT2
from taskgpt.lab import machine
from taskgpt.lab.curves.run_log import Losses
from taskgpt.products import BLAS, described

SGEMM_TRIES = 4  # measurements of sgemm, where the first says that training was faster


def memory_in_use(m: GPT2) -> int:
    """Return bytes: the peak of this process; with worker processes, what each holds for itself at the end, and the shared tensors once."""
    children = psutil.Process().children(recursive=True)
    if not children:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return m.nbytes + sum(process.memory_full_info().uss for process in (psutil.Process(), *children))


def summarize(
    flags, graph_config, scheduler_config, workers, description, report, m, step, seconds, memory, found, sha256=None
) -> dict[str, Any]:
    """Return what is worth knowing about a run; times leave out the first step, which touches all memory for the first time.

    `sha256`: of the parameters, where they are on other machines: then this one's sgemm says nothing.
    """
    steady = seconds[1:] or seconds
    summary: dict[str, Any] = {"steps": len(seconds), "parameters_sha256": m.parameters_sha256() if sha256 is None else sha256}
    summary |= {"train_loss": Losses.of(report.losses).told(), "val_loss": Losses.of(report.validations).told()}
    if seconds:
        median = statistics.median(steady)
        speed = step.flops / median / 1e9
        summary |= {
            "first_step_ms": seconds[0] * 1e3,
            "mean_ms": statistics.fmean(steady) * 1e3,
            "median_ms": median * 1e3,
            "min_ms": min(steady) * 1e3,
            "tokens_per_s": m.step_tokens / median,
            "gflops": speed,
        }
    if seconds and sha256 is None:
        sgemm = machine.sgemm_gflops(workers)
        for _ in range(SGEMM_TRIES - 1):
            if m.products == BLAS and speed > sgemm:  # the machine was busier now than while it trained
                sgemm = max(sgemm, machine.sgemm_gflops(workers))
        summary |= {"sgemm_gflops": sgemm, "share_of_sgemm": speed / sgemm}
    return summary | {
        "peak_memory_bytes": memory,
        "workers": workers,
        "tasks_per_step": step.tasks,
        "gflop_per_step": step.flops / 1e9,
        "data": description,
        "flags": vars(flags),
        "graph": dataclasses.asdict(graph_config),
        "products": described(m.products),
        "scheduler": {
            "name": scheduler_config.name,
            "scheduler": scheduler_config.scheduler,
            **dataclasses.asdict(scheduler_config.settings),
        },
        "machine": machine.describe(),
        "disturbance": dataclasses.asdict(found),
    }
