"""Evaluate a model: loss, perplexity and bits per byte, on a dataset or on your own text; or how often it makes the right choice.

taskgpt eval --init gpt2 --data tinyshakespeare              # its validation part, whole
taskgpt eval --init model.bin --data my.txt --part train     # the part that training would see
taskgpt eval --init model.bin --batches 50 --json eval.json  # the first 50 batches; numbers for a program
taskgpt eval --init gpt2 --choices hellaswag_val.bin         # HellaSwag, as llm.c's dev/data/hellaswag.py writes it

The graph file gives tiles and the batch, which change the speed; --set batch.seq_len=1024 lets the model see further back.
For --choices, seq_len is what the longest example needs; each completion is a sequence of the batch, behind its context.
"""

import argparse
import json
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from typing import Any

import numpy as np

from taskgpt.config import load_graph, load_scheduler
from taskgpt.errors import UserError, run_program, shorten
from taskgpt.files import verify_can_write, write_whole
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph
from taskgpt.gpt2.text.choices import Example, Score, judged, read_choices, rows_of, scores_of, write_rows
from taskgpt.gpt2.text.data import Data, open_data
from taskgpt.gpt2.text.tokenizer import Tokenizer
from taskgpt.lab import machine
from taskgpt.lab.layout import field
from taskgpt.lab.named import overridden
from taskgpt.lab.report import compile_with_progress
from taskgpt.programs.arguments import MODEL_HELP, Parser, add_changes, add_graph, add_scheduler, add_share, add_workers, positive
from taskgpt.progress import Progress
from taskgpt.schedulers import Scheduler, WorkerError, open_scheduler
from taskgpt.tasks import AccessError, Graph, TaskError, TwinError

PARTS = ("val", "train")
DAMAGED = "the model is damaged, or was trained with too large a --lr"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""

    def run() -> int:
        p = Parser("taskgpt eval", __doc__)
        p.add_argument("--init", required=True, metavar="MODEL", help=MODEL_HELP)
        what = p.add_mutually_exclusive_group()
        what.add_argument("--data", default="tinyshakespeare", help="as `taskgpt train` takes it (default tinyshakespeare)")
        what.add_argument("--choices", metavar="FILE", help="an evaluation file of llm.c's instead: multiple choice, as HellaSwag")
        p.add_argument("--part", choices=PARTS, help="of the data (default val)")
        p.add_argument("--batches", type=positive, metavar="N", help="so many at most (default: all)")
        add_graph(p, "gpt2-124m")
        add_changes(p)
        add_scheduler(p, "native")
        add_workers(p, "default: the scheduler file's")
        add_share(p)
        p.add_argument("--json", metavar="FILE", help="write the numbers")
        flags = p.parse_args(argv)
        if flags.json is not None:
            verify_can_write(flags.json)
        found = evaluate(flags)
        if flags.json is not None:
            write_whole(flags.json, json.dumps(found, indent=1) + "\n")
        return 0

    return run_program("taskgpt eval", run, (TaskError, TwinError, AccessError, WorkerError))


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the flags say; print and return what was found. Raises UserError, also for a loss that is not finite."""
    of_graph, of_scheduler = overridden(flags.graph, flags.scheduler, flags.tiles, flags.set, flags.workers)
    if flags.choices is not None and flags.part is not None:
        raise UserError(f"--part {flags.part}: is a part of --data, and --choices has none; leave it out")
    part = flags.part or PARTS[0]
    model = checkpoints.read_shape(flags.init)
    examples = read_choices(flags.choices, model.vocabulary) if flags.choices is not None else []
    if examples:
        of_graph[1].setdefault("batch.seq_len", min(model.max_seq_len, max(example.positions for example in examples)))
    config, setup = load_graph(*of_graph, model), load_scheduler(*of_scheduler)
    B, T = config.batch.batch_size, config.batch.seq_len
    data = None if examples else open_data(flags.data, B, T, model.vocabulary)
    verify_fit(examples, T, model.max_seq_len, flags.choices)
    chosen = first(examples, flags.batches, B)
    scheduler = open_scheduler(setup.scheduler, setup.settings)
    m = GPT2(model, config.batch, config.tiles, config.options, shared=scheduler.needs_shared_memory)
    machine.verify_memory(flags.init, "evaluating", m.p.nbytes + m.a.nbytes)  # the rest is not touched
    checkpoints.load(flags.init, model, m.parameters)
    graphs = [loss_graph(m, slot) for slot in range(len(m.slots) if data else 1)]
    compile_with_progress(graphs[0].kernels)
    print(field("model", f"{model.parameter_count():,} parameters, L {model.layers}, NH {model.heads}, C {model.channels}"))
    what = f"{data.description}; the {part} part" if data else f"{shorten(flags.choices)}: {len(examples):,} examples, T {T}"
    print(field("data", what))
    with scheduler:
        print(field("scheduler", scheduler.describe()))
        if data:
            found = measured(scheduler, m, graphs, data, part, flags.batches)
        else:
            found = examined(scheduler, m, graphs[0], chosen) | {"examples_of_file": len(examples)}
    (print_found if data else print_choices)(found)
    return found


def verify_fit(examples: Sequence[Example], T: int, most: int, name: str) -> None:
    """Raise UserError for an example that has more positions than a sequence, T, or even the model, `most`."""
    longest = max((example.positions for example in examples), default=0)
    for number, example in enumerate(examples, 1):
        if example.positions > T:
            do = f"leave out batch.seq_len, or give {longest}" if longest <= most else f"choose a model with {longest}"
            got = f"a sequence has {T}" if most > T else f"the model has {most}"
            raise UserError(f"{shorten(name)}: example {number:,} needs {example.positions} positions, {got}; {do}")


def first(examples: Sequence[Example], batches: int | None, B: int) -> Sequence[Example]:
    """Return the examples all of whose completions are in so many batches of B; all for None. Raises UserError if there are none."""
    if batches is None:
        return examples
    ends = list(accumulate(len(example.completions) for example in examples))
    if (count := bisect_right(ends, batches * B)) == 0 < len(examples):
        do = f"choose at least {-(-ends[0] // B)}"
        raise UserError(f"--batches {batches}: of {B} sequences each have no room for the {ends[0]} completions of an example; {do}")
    return examples[:count]


def examined(scheduler: Scheduler, m: GPT2, graph: Graph, examples: Sequence[Example]) -> dict[str, Any]:
    """Return in how many examples the model finds the right completion the likeliest. Each row of a batch is a completion."""
    B, rows = m.batch.batch_size, list(rows_of(examples))

    def scores() -> Iterator[Score]:
        for at in range(0, len(rows), B):
            part = rows[at : at + B]
            write_rows(part, *m.inputs(0))
            scheduler.run(graph)
            for score in scores_of(part, m.a.losses.array.reshape(B, -1)):
                if not math.isfinite(score.total):
                    raise UserError(f"the loss of a completion is {score.total}; {DAMAGED}")
                yield score

    correct = correct_norm = 0
    begin = time.perf_counter()
    with Progress("evaluating", len(examples)) as progress:
        for done, (is_right, is_right_norm) in enumerate(judged(examples, scores()), 1):
            correct, correct_norm = correct + is_right, correct_norm + is_right_norm
            progress.show(done, f"acc_norm {correct_norm / done:.4f}")
    tokens = sum(len(row.tokens) - 1 for row in rows)
    return {
        "acc_norm": correct_norm / len(examples),
        "acc": correct / len(examples),
        "correct_norm": correct_norm,
        "correct": correct,
        "examples": len(examples),
        "tokens": tokens,
        "tokens_per_s": tokens / (time.perf_counter() - begin),
    }


def measured(scheduler: Scheduler, m: GPT2, graphs: Sequence[Graph], data: Data, part: str, most: int | None) -> dict[str, Any]:
    """Return the mean loss over the part's batches, and what follows from it. All batches have as many tokens."""
    loader = getattr(data, part)
    count = min(most or loader.num_batches, loader.num_batches)
    nbytes, lengths, losses = 0, lengths_of(data.tokenizer), []

    def batches() -> Iterator[Graph]:
        nonlocal nbytes
        for n in range(count):
            tokens, targets = m.inputs(n % 2)
            loader.next_batch(tokens, targets)
            nbytes += int(lengths[targets].sum()) if lengths is not None else 0
            yield graphs[n % 2]

    begin = time.perf_counter()
    with Progress("evaluating", count) as progress, closing(scheduler.run_each(batches())) as runs:
        for n, _ in enumerate(runs):
            losses.append(m.loss_of(n % 2))
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss of batch {n + 1} is {losses[-1]}; {DAMAGED}")
            progress.show(n + 1, f"loss {math.fsum(losses) / len(losses):.4f}")
    tokens, loss = count * m.batch.rows, math.fsum(losses) / count
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < math.log(sys.float_info.max) else None,
        "bits_per_byte": loss * tokens / math.log(2) / nbytes if nbytes else None,
        "tokens": tokens,
        "tokens_of_part": loader.num_tokens,
        "bytes": nbytes or None,
        "tokens_per_s": tokens / (time.perf_counter() - begin),
    }


def lengths_of(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return how many bytes of text each id stands for, int64; an end of text stands for none. None where pieces are not known."""
    if not tokenizer.pieces:
        return None
    lengths = np.zeros(1 << 16, np.int64)
    lengths[: len(tokenizer.pieces)] = [len(piece) for piece in tokenizer.pieces]
    lengths[tokenizer.end_of_text] = 0
    return lengths


def print_found(found: dict[str, Any]) -> None:
    """Print what was found."""
    print(field("loss", f"{found['loss']:.6f} nats a token"))
    print(field("perplexity", "more than a number holds" if found["perplexity"] is None else f"{found['perplexity']:,.2f}"))
    if found["bits_per_byte"] is not None:
        print(field("bits/byte", f"{found['bits_per_byte']:.4f}, of {found['bytes']:,} bytes of text"))
    print(field("tokens", f"{found['tokens']:,} of {found['tokens_of_part']:,}; what fills no batch is left out"))
    print(field("speed", f"{found['tokens_per_s']:,.0f} tok/s"))


def print_choices(found: dict[str, Any]) -> None:
    """Print what was found by multiple choice."""
    of = f"of {found['examples']:,} examples"
    print(field("acc_norm", f"{found['acc_norm']:.4f}, {found['correct_norm']:,} {of}, by the mean loss of a completion's tokens"))
    print(field("acc", f"{found['acc']:.4f}, {found['correct']:,}, by their sum"))
    print(field("speed", f"{found['tokens_per_s']:,.0f} tok/s, padding not counted"))


if __name__ == "__main__":
    sys.exit(main())
