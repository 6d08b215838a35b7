"""A token of generated text, against what streaming the weights from memory takes: the least that it can, as it needs all of them once.

Both run on as many threads and read the same memory, in turns. Streaming only adds up what it reads. A token is a step of the decoder and
the choice of what comes next, as `taskgpt sample` does both. The weights are random: their values do not change the time.
"""

import argparse
import time
from functools import partial

import numpy as np

from taskgpt.errors import UserError
from taskgpt.gpt2.generation.decoder import Decoder
from taskgpt.gpt2.generation.next_token import Choice
from taskgpt.gpt2.model import MATRICES
from taskgpt.lab import machine
from taskgpt.lab.named import make_config, named_scheduler
from taskgpt.lab.report import Report, compile_with_progress, in_range, quartiles
from taskgpt.progress import Progress
from taskgpt.schedulers.cores import usable_cores
from taskgpt.tasks import Tensor

TOKENS = 64  # before the first that is decoded, and decoded in a turn, where there is room
STREAM_SECONDS = 0.3  # of streaming, in a round
CHOICE = Choice(temperature=0.8, top_k=50)
COLUMNS = {
    "what": ("what", ""),
    "median ms": ("median_ms", ".2f"),
    "q1": ("q1_ms", ".2f"),
    "q3": ("q3_ms", ".2f"),
    "GB/s": ("gb_per_s", ".1f"),
    "tok/s": ("tokens_per_s", ".1f"),
    "x stream": ("x_stream", ".2f"),
}


def decode(flags: argparse.Namespace) -> None:
    """Time streaming and decoding, in turns."""
    for flag in ("rounds", "tokens", "context", "batch_size"):
        in_range(f"--{flag.replace('_', '-')}", getattr(flags, flag))
    report = Report(flags)
    model = make_config(flags.graph).model
    context = flags.context or min(TOKENS, max(1, model.max_seq_len // 2))
    length = context + (flags.tokens or max(1, min(TOKENS, model.max_seq_len - context)))
    if length > model.max_seq_len:
        raise UserError(f"--context {context} and --tokens {length - context}: the model has {model.max_seq_len} positions; choose less")
    scheduler = named_scheduler(flags.scheduler, flags.workers)
    machine.verify_memory(flags.graph, "decoding", Decoder.bytes_needed(model, flags.batch_size, length))
    decoder = Decoder(model, flags.batch_size, length, shared=scheduler.needs_shared_memory)
    fill(decoder)
    compile_with_progress([kernel for graph in decoder.graphs for kernel in graph.kernels])
    weights = [decoder.p.tensors[name] for name in MATRICES if name != "wpe"]
    nbytes = sum(tensor.array.nbytes for tensor in weights)
    streams = stream_calls(weights, min(scheduler.workers, usable_cores()))
    random = np.random.default_rng(0)
    prompt = random.integers(0, model.vocabulary, context).tolist()
    streaming: list[float] = []
    decoding: list[float] = []
    with scheduler, Progress("measuring", flags.rounds + 1) as progress:
        decoder.warm_up(scheduler.run)
        decoder.feed(scheduler.run, [(slot, at, token) for slot in range(flags.batch_size) for at, token in enumerate(prompt)])
        for number in range(flags.rounds + 1):
            progress.show(number, f"round {number}/{flags.rounds}")
            streaming += machine.timed_together(streams, STREAM_SECONDS)
            tokens = [prompt[-1]] * flags.batch_size
            for at in range(context, length):
                begin = time.perf_counter()
                logits = decoder.step(scheduler.run, [(slot, at, token) for slot, token in enumerate(tokens)])
                tokens = [CHOICE.next_token(row, prompt, random) for row in logits]
                decoding.append(time.perf_counter() - begin)
            if number == 0:  # touches all memory for the first time
                streaming.clear()
                decoding.clear()
    cache = 2 * decoder.c.keys.array[:, :, 0, 0].nbytes * flags.batch_size
    report.line("weights", f"{nbytes / 1e6:,.0f} MB of matrices, read once for a token, or for one of each of {flags.batch_size} texts")
    report.line("cache", f"positions {context} to {length - 1}: {cache * length / 1e6:,.1f} MB more at the last one")
    report.line("scheduler", scheduler.describe())
    if nbytes < 2 * machine.cache_bytes():
        report.line("caches", "hold a large part of the weights, so nothing is streamed from memory")
    report.table("decode", COLUMNS, rows(streaming, decoding, nbytes, flags.batch_size))
    report.save()


def fill(decoder: Decoder) -> None:
    """Give the parameters values: small ones, so that no logits overflow."""
    for at, array in enumerate(decoder.parameters.values()):
        np.random.default_rng([42, at]).standard_normal(dtype=np.float32, out=array)
        array *= np.float32(0.02)


def stream_calls(weights: list[Tensor], threads: int) -> list[partial]:
    """Return a call for each thread, which adds up its part of each matrix, so many times."""

    def add_up(parts: list[np.ndarray], times: int) -> None:
        total = np.zeros(1, np.int64)
        for _ in range(times):
            for part in parts:
                machine.read.run(total, part, 1)

    words = [tensor.array.reshape(-1)[: tensor.array.size // 2 * 2].view(np.int64) for tensor in weights]
    machine.read.compile()
    return [partial(add_up, [np.array_split(each, threads)[thread] for each in words]) for thread in range(threads)]


def rows(streaming: list[float], decoding: list[float], nbytes: int, batch_size: int) -> list[dict]:
    """Return the table; ratios are of medians."""
    found = []
    for what, seconds, tokens in (("stream the weights", streaming, 0), ("decode", decoding, batch_size)):
        q1, median, q3 = quartiles(seconds)
        found.append(
            {
                "what": what,
                "median_ms": median * 1e3,
                "q1_ms": q1 * 1e3,
                "q3_ms": q3 * 1e3,
                "gb_per_s": nbytes / median / 1e9,
                "tokens_per_s": tokens / median if tokens else None,
                "x_stream": median / quartiles(streaming)[1],
                "seconds": seconds,
            }
        )
    return found
