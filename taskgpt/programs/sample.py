"""Generate text: continue a prompt with a trained model, token by token, as it comes.

taskgpt sample --init gpt2 --prompt "The sea" --temperature 0.8 --top-k 50     # from a folder in Hugging Face's layout
taskgpt sample --init model.bin --prompt "The sea" --num 3 --seed 7            # three continuations, the same every time
taskgpt sample --init model.bin --prompt - --stop "END" < question.txt         # a prompt from standard input, up to a word
taskgpt sample --init model.bin --prompts questions.jsonl --json answers.json  # many prompts, {"prompt": "..."} a line

Text goes to standard output, with its prompt before it; all else goes to standard error. An empty prompt starts after an end of text, and
an end of text ends what is generated. The same seed gives the same text under every scheduler, whatever is generated beside it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from taskgpt.config import load_scheduler, parse_settings
from taskgpt.errors import Interrupted, UserError, on_signals, run_program, shorten
from taskgpt.files import JSON_BYTES, as_written, parse_json, read_text, verify_can_write, write_whole
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.generation.decoder import Decoder
from taskgpt.gpt2.generation.generate import Continuation, Speed, generate
from taskgpt.gpt2.generation.next_token import Choice
from taskgpt.gpt2.generation.text_stream import TextStream
from taskgpt.gpt2.text.data import END_OF_TEXT, text_encoding
from taskgpt.gpt2.text.tokenizer import Tokenizer, printable
from taskgpt.lab import machine
from taskgpt.lab.layout import field
from taskgpt.lab.named import scheduler_of
from taskgpt.lab.report import compile_with_progress
from taskgpt.programs.arguments import MODEL_HELP, Parser, add_scheduler, add_share, add_workers, count, part, positive, rate
from taskgpt.progress import Progress
from taskgpt.schedulers import Scheduler, WorkerError, open_scheduler
from taskgpt.tasks import AccessError, TaskError, TwinError

MOST_TOKENS = 128  # unless --max-tokens says otherwise
BATCH_SIZE = 8  # sequences at a time
BETWEEN = "\n---\n"  # two texts


def parser() -> argparse.ArgumentParser:
    """Return the flags."""
    p = Parser("taskgpt sample", __doc__)
    p.add_argument("--init", required=True, metavar="MODEL", help=MODEL_HELP)
    what = p.add_argument_group("what is continued")
    one = what.add_mutually_exclusive_group()
    one.add_argument("--prompt", default="", metavar="TEXT", help="the beginning; -: what standard input says (default: none)")
    one.add_argument("--prompts", metavar="FILE", help='several, one a line; of a file.jsonl the "prompt" of each line\'s object')
    what.add_argument("--num", type=positive, default=1, metavar="N", help="continuations of each prompt (default 1)")
    most = f"default {MOST_TOKENS}, or as many as the model has room for"
    what.add_argument("--max-tokens", type=positive, metavar="N", help=f"of each continuation ({most})")
    what.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    how = p.add_argument_group("how the next token is chosen")
    how.add_argument("--temperature", type=rate, default=1.0, metavar="T", help="below 1: likelier ones; 0: the likeliest (default 1)")
    how.add_argument("--top-k", type=count, default=0, metavar="K", help="one of the K likeliest; 0: of all (default 0)")
    how.add_argument("--top-p", type=part, default=1.0, metavar="P", help="one of the likeliest that together have this part (default 1)")
    how.add_argument("--repetition-penalty", type=rate, default=1.0, metavar="R", help="above 1: rather what is new (default 1)")
    how.add_argument("--seed", type=count, default=42, help="of the random numbers (default 42)")
    run = p.add_argument_group("how it runs")
    run.add_argument("--batch-size", type=positive, default=BATCH_SIZE, metavar="B", help=f"texts at a time (default {BATCH_SIZE})")
    add_scheduler(run, "native")
    add_workers(run, "default: the scheduler file's")
    add_share(run)
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=V", help="keys of the scheduler file: idle=busy")
    p.add_argument("--json", metavar="FILE", help="write texts, token ids and speeds")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code, of a signal that ended it too: then what was generated so far is there."""

    def run() -> int:
        flags = parser().parse_args(argv)
        if flags.json is not None:
            verify_can_write(flags.json)
        return sample(flags)

    return run_program("taskgpt sample", run, (TaskError, TwinError, AccessError, WorkerError))


def sample(flags: argparse.Namespace) -> int:
    """Generate as the flags say; return the exit code. Raises UserError."""
    if flags.repetition_penalty == 0:
        raise UserError("--repetition-penalty 0: wanted a number above 0; choose 1 for none")
    if "" in flags.stop:
        raise UserError("--stop: wanted a text, got an empty one; leave the flag out to go on to --max-tokens")
    choice = Choice(flags.temperature, flags.top_k, flags.top_p, flags.repetition_penalty)
    model = checkpoints.read_shape(flags.init)
    tokenizer, encoding = text_encoding(flags.init, model.vocabulary)
    prompts = read_prompts(flags)
    sequences = continuations(flags, prompts, tokenizer, model.max_seq_len)
    scheduler = opened(flags)
    slots, length = min(flags.batch_size, len(sequences)), max(len(each.prompt) + each.most for each in sequences)
    do = "choose a smaller --batch-size or --max-tokens"
    machine.verify_memory(flags.init, "generating", Decoder.bytes_needed(model, slots, length), do=do)
    decoder = Decoder(model, slots, length, shared=scheduler.needs_shared_memory)
    checkpoints.load(flags.init, model, decoder.parameters)
    compile_with_progress([kernel for graph in decoder.graphs for kernel in graph.kernels])
    say("model", f"{model.parameter_count():,} parameters, {encoding}")

    texts = [TextStream(flags.stop) for _ in sequences]
    shown = Shown([prompts[n // flags.num] for n in range(len(sequences))])
    stop, speed, places = Stop(), Speed(), {id(each): n for n, each in enumerate(sequences)}
    with scheduler, progress_of(sequences) as progress:
        say("scheduler", scheduler.describe())
        shown.begin()
        with on_signals(stop.request):
            for each in generate(decoder, scheduler.run, sequences, choice, tokenizer.end_of_text, speed):
                n = places[id(each)]
                if each.end != "end of text":
                    shown.add(n, texts[n].add(tokenizer.bytes_of(each.ids[-1:])))
                if texts[n].is_stopped:
                    each.end = "stop"
                if each.end:
                    shown.add(n, texts[n].end())
                    shown.end(n)
                if progress:
                    progress.show(speed.decode_tokens)
                if stop.number:
                    break
    for n, each in enumerate(sequences):
        if not each.end:
            each.end = "interrupted"
            shown.add(n, texts[n].end())
    shown.close()
    told = speeds(speed)
    if flags.json is not None:
        record = {"model": flags.init, "settings": vars(choice) | {"seed": flags.seed}, "speed": told}
        record["texts"] = [described(n, each, prompts, shown, flags.num) for n, each in enumerate(sequences)]
        write_whole(flags.json, json.dumps(record, indent=1) + "\n")
    for key in ("prefill", "decode"):
        if tokens := told[f"{key}_tokens"]:
            say(key, f"{tokens:,} tokens in {told[f'{key}_s']:.2f} s, {told[f'{key}_tokens_per_s']:,.0f} tok/s")
    return 128 + stop.number if stop.number else 0


def say(key: str, text: str) -> None:
    """Say something that is no generated text."""
    print(field(key, text), file=sys.stderr)


def opened(flags: argparse.Namespace) -> Scheduler:
    """Return the scheduler. Raises UserError, also for keys of a graph file: the checkpoint says what runs, and no tile matters."""
    name, overrides = scheduler_of(flags.scheduler)
    of_graph, of_scheduler = parse_settings(flags.set)
    for key in of_graph:
        raise UserError(f"--set {shorten(key)}: a key of graph files, and generating takes none; the checkpoint gives the model")
    workers = {} if flags.workers is None else {"workers": flags.workers}
    setup = load_scheduler(name, overrides | of_scheduler | workers)
    return open_scheduler(setup.scheduler, setup.settings)


def progress_of(sequences: Iterable[Continuation]) -> Any:
    """Return progress where no terminal shows the text itself."""
    return nullcontext() if sys.stdout.isatty() else Progress("generating, tokens", sum(each.most for each in sequences))


class Stop:
    """A signal ends the program after the token under way, a second one at once."""

    def __init__(self):
        self.number = 0

    def request(self, number: int, _frame: object) -> None:
        if self.number:
            raise Interrupted(number, "interrupted at once")
        self.number = number


# Prompts --------------------------------------------------------------------------------------------------------------------------------


def read_prompts(flags: argparse.Namespace) -> list[str]:
    """Return the prompts, at least one. Raises UserError for what is no text, and for a file that has none."""
    if flags.prompts is not None:
        return prompts_of(flags.prompts)
    if flags.prompt != "-":
        return [flags.prompt]
    data = sys.stdin.buffer.read(JSON_BYTES + 1)
    if len(data) > JSON_BYTES:
        raise UserError(f"standard input: more than {JSON_BYTES:,} bytes are no prompt; give less")
    try:
        return [data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not a text in UTF-8: byte {data[error.start]:#04x} at position {error.start:,}") from None


def prompts_of(path: str) -> list[str]:
    """Return the prompts of a file: its lines, or "prompt" of each line's JSON object; blank lines do not count. Raises UserError."""
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(read_text(path, JSON_BYTES).split("\n"), 1) if line.strip()]
    if not path.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_prompt(line, f"{shorten(path)}: line {number}") for number, line in lines]


def _prompt(line: str, where: str) -> str:
    try:
        found = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {shorten(error)}") from None
    if not (isinstance(found, dict) and isinstance(found.get("prompt"), str)):
        raise UserError(f'{where}: wanted an object with a text, {{"prompt": "..."}}, got {as_written(found)}')
    return found["prompt"]


def continuations(flags: argparse.Namespace, prompts: Sequence[str], tokenizer: Tokenizer, positions: int) -> list[Continuation]:
    """Return what is to be generated: --num of each prompt. Raises UserError for a prompt that leaves too little room."""
    found = []
    for number, prompt in enumerate(prompts):
        ids = ids_of(prompt, tokenizer, f"prompt {number + 1}")
        room, wanted = positions - len(ids), flags.max_tokens or 1
        if room < wanted:
            have = f"{len(ids):,} tokens and {wanted:,} to be generated do not fit into the model's {positions:,} positions"
            does = f"choose --max-tokens {room:,} or less, or a shorter prompt" if room > 0 else "shorten the prompt"
            raise UserError(f"prompt {number + 1}: {have}; {does}")
        most = flags.max_tokens or min(MOST_TOKENS, room)
        found += [Continuation(ids, most, (flags.seed, number, sample)) for sample in range(flags.num)]
    return found


def ids_of(prompt: str, tokenizer: Tokenizer, name: str) -> list[int]:
    """Return the ids of a prompt, an end of text where it is written, and for an empty prompt. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: not a text in UTF-8; convert it, for instance with iconv -t UTF-8") from None
    first, *others = prompt.split(END_OF_TEXT)
    ids = tokenizer.encode(first).tolist()
    for text in others:
        ids += [tokenizer.end_of_text, *tokenizer.encode(text).tolist()]
    return ids or [tokenizer.end_of_text]


# Texts ----------------------------------------------------------------------------------------------------------------------------------


class Shown:
    """Texts on standard output, in their order: the first that has not ended as it comes, others when it is their turn."""

    def __init__(self, prompts: Sequence[str]):
        self._prompts, self.texts = prompts, [""] * len(prompts)
        self._turn, self._ended = 0, set[int]()
        self._as_shown: Callable[[str], str] = printable if sys.stdout.isatty() else str

    def begin(self) -> None:
        self._write(self._prompts[0])

    def add(self, n: int, text: str) -> None:
        """Add to a text."""
        self.texts[n] += text
        if n == self._turn:
            self._write(text)

    def end(self, n: int) -> None:
        """End a text. When it was its turn, it is that of the next one."""
        self._ended.add(n)
        while self._turn in self._ended:
            self._turn += 1
            if self._turn < len(self.texts):
                self._write_text(self._turn)

    def close(self) -> None:
        """Show what was begun and did not come to its turn; end the last line."""
        for n in range(self._turn + 1, len(self.texts)):
            if self.texts[n]:
                self._write_text(n)
        self._write("\n")

    def _write_text(self, n: int) -> None:
        self._write(BETWEEN + self._prompts[n] + self.texts[n])

    def _write(self, text: str) -> None:
        sys.stdout.write(self._as_shown(text))
        sys.stdout.flush()


def described(n: int, each: Continuation, prompts: Sequence[str], shown: Shown, num: int) -> dict[str, Any]:
    """Return what the JSON file says of a text. `ids` may go on behind a stop string, as far as they were generated."""
    number, sample = divmod(n, num)
    return {
        "prompt": prompts[number],
        "sample": sample,
        "text": shown.texts[n],
        "end": each.end,
        "prompt_tokens": len(each.prompt),
        "ids": each.ids,
    }


def speeds(speed: Speed) -> dict[str, Any]:
    """Return tokens, seconds and tokens a second, None where there was nothing to measure."""
    found = vars(speed).copy()
    for key in ("prefill", "decode"):
        tokens, seconds = found[f"{key}_tokens"], found[f"{key}_s"]
        found[f"{key}_tokens_per_s"] = tokens / seconds if tokens else None
    return found


if __name__ == "__main__":
    sys.exit(main())
