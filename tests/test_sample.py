"""`taskgpt sample`: the same tokens as without a cache, whatever else is generated; how the next one is chosen; what comes out."""

import io
import json
import signal
import sys
from itertools import product

import numpy as np
import pytest

from taskgpt.config import load_scheduler
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.generation import decoder as room
from taskgpt.gpt2.generation import next_token
from taskgpt.gpt2.generation.decoder import FEED_ROWS, Decoder
from taskgpt.gpt2.generation.generate import Continuation, Speed, generate
from taskgpt.gpt2.generation.next_token import Choice, largest, most_likely, penalized
from taskgpt.gpt2.generation.text_stream import TextStream
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import forward, head_forward
from taskgpt.gpt2.shape import Batch, Model, Options, Tiles
from taskgpt.gpt2.text.tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer, gpt2_tokenizer
from taskgpt.lab.benchmarks.decode import stream_calls
from taskgpt.programs import bench
from taskgpt.programs import sample as program
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import check, run_now
from tests.programs import started

MODEL = Model(2, 4, 48, BYTE_VOCAB_SIZE, 160)
SHAPES = {"bytes": MODEL, "odd": Model(3, 3, 39, 130, 100), "one": Model(1, 1, 20, 131, 90)}
END = byte_tokenizer().end_of_text
DRAWN = Choice(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1)


def drawn(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random parameters, large enough that the model is sure of some tokens; padding rows of wte are 0."""
    rng = np.random.default_rng(seed)
    parameters = {name: rng.standard_normal(shape, np.float32) * np.float32(0.2) for name, shape in model.parameter_shapes().items()}
    parameters["wte"][model.vocabulary :] = 0
    return parameters


def make(model: Model = MODEL, slots: int = 1, length: int | None = None, shared: bool = False) -> Decoder:
    decoder = Decoder(model, slots, length or model.max_seq_len, shared)
    for name, array in drawn(model).items():
        decoder.parameters[name][...] = array
    return decoder


def run_graph(graph) -> None:
    for task in graph.tasks:
        task.run()


def logits_of(model: Model, ids: list[int]) -> np.ndarray:
    """Return the logits (T, V) of a sequence by training's forward pass over all of it."""
    m = GPT2(model, Batch(1, len(ids)), Tiles(16, 16, 16, 1, 64), Options("matrices"))
    for name, array in drawn(model).items():
        m.parameters[name][...] = array
    m.s.tokens.array[:] = ids
    forward(run_now, m, m.grid.all_rows)
    head_forward(run_now, m, m.grid.all_rows, m.a.logits[0])
    return m.a.logits.array[0, :, : model.vocabulary]


def some_ids(model: Model, count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.vocabulary, count).tolist()


# The decoder ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("prompt", [1, 7, FEED_ROWS + 3])
def test_logits_are_those_of_the_whole_sequence(name, prompt):
    """Prefill and then a token at a time, against training's forward pass: to float32's rounding, at every position."""
    model, decoder = SHAPES[name], make(SHAPES[name])
    ids = some_ids(model, prompt + 12)
    wanted = logits_of(model, ids)
    decoder.feed(run_graph, [(0, at, token) for at, token in enumerate(ids[: prompt - 1])])
    for at in range(prompt - 1, len(ids)):
        found = decoder.step(run_graph, [(0, at, ids[at])])
        np.testing.assert_allclose(found[0], wanted[at], rtol=0, atol=2e-5 * abs(wanted).max())


def test_bits_of_logits_depend_on_the_sequence_alone():
    """Not on what else is in the cache, on the slot, on how many tokens were fed at once, nor on where matrices are cut."""
    ids, others = some_ids(MODEL, 70), some_ids(MODEL, 30, seed=2)

    def found(slots: int, slot: int, at_once: int, neighbours: int) -> bytes:
        decoder = make(slots=slots)
        rows = [(slot, at, token) for at, token in enumerate(ids[:-1])]
        beside = [(n, at, token) for n in range(neighbours) for at, token in enumerate(others[:-1])]
        if at_once == 1:
            for row in beside + rows:
                decoder.feed(run_graph, [row])
        else:
            decoder.feed(run_graph, beside + rows)
        last = [(n, len(others) - 1, others[-1]) for n in range(neighbours)]
        return decoder.step(run_graph, [*last, (slot, len(ids) - 1, ids[-1])])[neighbours].tobytes()

    alone = found(1, 0, 64, 0)
    assert found(1, 0, 1, 0) == alone
    assert found(6, 5, 64, 0) == alone
    assert [found(slots, slots - 1, 64, slots - 1) for slots in (2, 3, 6)] == [alone] * 3
    before, room.PIECE_BYTES = room.PIECE_BYTES, 2000
    try:
        assert found(2, 0, 64, 0) == alone
    finally:
        room.PIECE_BYTES = before


def test_kernels_do_what_they_declare():
    """Every task of both graphs on guarded copies, and with indices checked."""
    decoder = make(slots=2, length=20)
    decoder.step(run_graph, [(0, 0, 5), (1, 0, 6)])
    for graph in decoder.graphs:
        run_graph(check(graph))


def test_compiled_kernels_agree_with_their_bodies(monkeypatch):
    """Of all kernels at once: the logits of a step after three tokens, by what is compiled and by what specifies it."""
    ids = some_ids(MODEL, 4)
    decoder = make(length=10)

    def run_bodies(graph) -> None:
        for task in graph.tasks:
            for call in task.calls:
                arrays = [a.array if hasattr(a, "array") else a for a in call.args]
                scratch = [np.empty(shape, dtype) for shape, dtype in call.scratch_shapes]
                call.kernel.body(*arrays, *scratch)

    found = []
    for run in (run_graph, run_bodies):
        decoder.c.keys.array[...] = decoder.c.values.array[...] = 0
        decoder.feed(run, [(0, at, token) for at, token in enumerate(ids[:3])])
        found.append(decoder.step(run, [(0, 3, ids[3])]).copy())
    np.testing.assert_allclose(*found, rtol=0, atol=2e-5 * abs(found[1]).max())


def test_one_graph_serves_all_steps():
    """A decoder records two graphs when it is made, and runs no other."""
    decoder = make()
    ran = []
    for _ in generate(decoder, lambda graph: (ran.append(graph), run_graph(graph)), [Continuation([1, 2, 3], 20)], DRAWN, END):
        pass
    assert len(ran) > 15 and set(map(id, ran)) == set(map(id, decoder.graphs))


# Generating -----------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_fed_once():
    """Several continuations share it, also one that begins while another is under way; their tokens are the same as alone."""
    prompt, other = some_ids(MODEL, 40), some_ids(MODEL, 20, seed=9)

    def found(slots: int) -> tuple[list[list[int]], int]:
        sequences = [Continuation(ids, most, (n,)) for n, (ids, most) in enumerate([(prompt, 12), (prompt, 3), (other, 9), (prompt, 9)])]
        speed = Speed()
        for _ in generate(make(slots=slots), run_graph, sequences, DRAWN, END, speed):
            pass
        return [each.ids for each in sequences], speed.prefill_tokens

    alone, together = found(1), found(3)
    assert together[0] == alone[0]
    assert (alone[1], together[1]) == (3 * 39 + 19, 39 + 19)


def uncached(model: Model, sequence: Continuation, choice: Choice, end: int) -> list[int]:
    """Return what follows, each token by a forward pass of training over all tokens so far."""
    random, ids = np.random.default_rng(list(sequence.seed)), list(sequence.prompt)
    for _ in range(sequence.most):
        token = choice.next_token(logits_of(model, ids)[-1], ids, random)
        if token == end:
            break
        ids.append(token)
    return ids[len(sequence.prompt) :]


@pytest.mark.parametrize("choice", [Choice(temperature=0), Choice(), DRAWN], ids=["greedy", "plain", "all"])
@pytest.mark.parametrize("name", SHAPES)
def test_tokens_are_those_without_a_cache(name, choice):
    """Of three prompts of different lengths in two slots, greedy and drawn."""
    model = SHAPES[name]
    prompts = [some_ids(model, count, seed=count) for count in (1, 5, 30)]
    sequences = [Continuation(prompt, 25, (3, n)) for n, prompt in enumerate(prompts)]
    for _ in generate(make(model, slots=2), run_graph, sequences, choice, END):
        pass
    assert [each.ids for each in sequences] == [uncached(model, Continuation(e.prompt, 25, e.seed), choice, END) for e in sequences]
    assert {each.end for each in sequences} <= {"length", "end of text"}


@pytest.mark.parametrize("name", ["loops", "threads", "native", "native-stealing", "local-cluster-processes"])
def test_every_scheduler_generates_the_same(name):
    """And any number of workers: the last logits have the same bits as in program order."""
    sequences = [Continuation(some_ids(MODEL, count), 10, (count,)) for count in (3, 70)]

    def found(run, shared: bool = False):
        decoder, fresh = make(slots=2, shared=shared), [Continuation(each.prompt, each.most, each.seed) for each in sequences]
        for _ in generate(decoder, run, fresh, DRAWN, END):
            pass
        return [each.ids for each in fresh], decoder.a.logits.array.tobytes()

    wanted = found(run_graph)
    for workers in (1, 2, 3):
        config = load_scheduler(name, {"workers": workers})
        with open_scheduler(config.scheduler, config.settings) as scheduler:
            assert found(scheduler.run, scheduler.needs_shared_memory) == wanted
        if "cluster" in name:
            break


def test_numbers_that_are_none_are_named(tmp_path, capsys):
    """A damaged model is answered in a line."""
    parameters = {name: array * np.float32(np.nan) for name, array in drawn(MODEL).items()}
    checkpoints.save(tmp_path / "nan.bin", MODEL, parameters)
    assert program.main(["--init", str(tmp_path / "nan.bin"), "--max-tokens", "1"]) == 2
    assert "the model's logits are no numbers" in capsys.readouterr().err


# The next token -------------------------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest():
    """The first of equals; without drawing a number."""
    random = np.random.default_rng(0)
    assert Choice(temperature=0).next_token(np.float32([1, 3, 2, 3]), [], random) == 1
    assert Choice(temperature=0, repetition_penalty=2).next_token(np.float32([1, 3, 2, 3]), [1], random) == 3
    assert random.random() == np.random.default_rng(0).random()


def test_processors_by_hand():
    """The penalty lowers logits of either sign, once for each token; what equals the last of k stays; p takes at least one."""
    logits = np.float32([2, -1, 0, 4])
    assert penalized(logits, [0, 1, 0], 2).tolist() == [1, -2, 0, 4] and logits.tolist() == [2, -1, 0, 4]
    assert largest(np.float32([5, 1, 3, 3]), 2).tolist() == [0, 2, 3]
    assert largest(logits, 0).tolist() == largest(logits, 9).tolist() == [0, 1, 2, 3]
    likely = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))
    assert [most_likely(likely, p).tolist() for p in (0, 0.4, 0.6, 0.8, 0.95, 1)] == [
        [1], [1], [1, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]
    ]  # fmt: skip


def test_the_most_likely_are_found_without_sorting_all(monkeypatch):
    """The same of 5,000 logits with many ties as when all are sorted at once, whatever part of the probability is wanted."""
    logits = np.random.default_rng(3).integers(-40, 40, 5000).astype(np.float32) / np.float32(40)
    parts = (0.001, 0.2, 0.5, 0.9, 0.9999)
    found = [most_likely(logits, p).tolist() for p in parts]
    monkeypatch.setattr(next_token, "SORTED_AT_ONCE", 10_000)
    assert found == [most_likely(logits, p).tolist() for p in parts]
    assert [len(ids) for ids in found] == sorted(len(ids) for ids in found) and len(found[-1]) > 4900


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """20,000 draws of four tokens: each within five standard deviations of its probability, at temperature 2."""
    logits, random, count = np.float32([0, 1, 2, -1]), np.random.default_rng(7), 20_000
    likely = np.exp(logits / 2) / np.exp(logits / 2).sum()
    found = np.bincount([Choice(temperature=2).next_token(logits, [], random) for _ in range(count)], minlength=4)
    assert (abs(found - count * likely) < 5 * np.sqrt(count * likely * (1 - likely))).all()


@pytest.mark.parametrize("processor", ["penalty", "temperature", "top_k", "top_p", "all"])
def test_transformers_leaves_the_same_tokens(processor):
    """Its logits processors, alone and in its order: the same ids, with logits that are equal to float32's rounding."""
    torch = pytest.importorskip("torch", reason="compared with transformers: pip install torch transformers")
    pytest.importorskip("transformers", reason="compared with transformers: pip install torch transformers")
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    wanted = {"penalty": ["repetition_penalty"], "all": ["repetition_penalty", "temperature", "top_k", "top_p"]}.get(processor, [processor])
    values = {"repetition_penalty": (1.3, 0.7), "temperature": (0.7, 1.9), "top_k": (1, 40), "top_p": (0.3, 0.93)}
    theirs = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
    }
    rng = np.random.default_rng(5)
    for values_now in product(*(values[name] for name in wanted)):
        settings = dict(zip(wanted, values_now, strict=True))
        for _ in range(20):
            logits, earlier = rng.standard_normal(500, np.float32) * np.float32(3), rng.integers(0, 500, 60)
            chain = LogitsProcessorList([theirs[name](value) for name, value in settings.items()])
            left = chain(torch.from_numpy(earlier[None]), torch.from_numpy(logits[None].copy()))[0].numpy()
            ids, found = Choice(**settings).candidates(logits, earlier.tolist())
            assert ids.tolist() == np.flatnonzero(np.isfinite(left)).tolist()
            np.testing.assert_allclose(found, left[ids], rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_transformers_generates_the_same(penalty, tmp_path):
    """Its own greedy generation, from the folder that both read."""
    torch = pytest.importorskip("torch", reason="compared with transformers: pip install torch transformers")
    transformers = pytest.importorskip("transformers", reason="compared with transformers: pip install torch transformers")
    checkpoints.save(tmp_path / "model", MODEL, drawn(MODEL))
    prompt = torch.tensor([list(b"hello")])
    settings = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": penalty, "eos_token_id": END, "pad_token_id": END}
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :].tolist()
    flags = ["--prompt", "hello", "--max-tokens", "60", "--temperature", "0", "--repetition-penalty", str(penalty)]
    assert run(tmp_path, str(tmp_path / "model"), *flags)["texts"][0]["ids"] == [token for token in wanted if token != END]


# Text -----------------------------------------------------------------------------------------------------------------------------------


def test_characters_come_when_they_are_whole():
    """Bytes of a letter in three tokens are given out with the last one; what never becomes one reads U+FFFD."""
    stream, data = TextStream(), "a€b".encode()
    assert [stream.add(bytes([byte])) for byte in data] == ["a", "", "", "€", "b"]
    assert stream.add(b"\xe2\x82") == "" and stream.end() == "\ufffd"


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
def test_stop_strings_span_tokens(cut):
    """Nothing of one is given out, wherever tokens end; what only began like one is."""
    text = "a STO? b STOP c"
    stream, found = TextStream(["STOP", "never"]), ""
    for at in range(0, len(text), cut):
        found += stream.add(text[at : at + cut].encode())
        assert "STO" not in found.replace("STO?", "") and (found == text[: len(found)])
    assert found + stream.end() == "a STO? b " and stream.is_stopped
    unfinished = TextStream(["STOP"])
    assert unfinished.add(b"x ST") == "x " and unfinished.end() == "ST" and not unfinished.is_stopped


# The program ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file with a model of bytes."""
    path = tmp_path_factory.mktemp("model") / "model.bin"
    checkpoints.save(path, MODEL, drawn(MODEL))
    return str(path)


def run(tmp_path, saved, *words: str) -> dict:
    assert program.main(["--init", saved, "--json", str(tmp_path / "s.json"), *words]) == 0
    return json.loads((tmp_path / "s.json").read_text())


def test_a_prompt_goes_on(tmp_path, saved, capsys):
    """Standard output has prompt and text, and nothing else; standard error the speeds; the file what was generated."""
    found = run(tmp_path, saved, "--prompt", "hello", "--max-tokens", "12", "--temperature", "0")
    out, err = capsys.readouterr()
    (text,) = found["texts"]
    assert out == f"hello{text['text']}\n"
    ids = list(b"hello")
    assert text["ids"] == uncached(MODEL, Continuation(ids, 12), Choice(temperature=0), END)
    assert (text["prompt"], text["prompt_tokens"], text["end"]) == ("hello", 5, "length")
    assert text["text"] == byte_tokenizer().decode(text["ids"])
    assert found["speed"]["prefill_tokens"] == 4 and found["speed"]["decode_tokens"] == 12
    assert "prefill    4 tokens in" in err and "decode     12 tokens in" in err


def test_texts_do_not_depend_on_what_is_beside_them(tmp_path, saved):
    """Two prompts of two continuations each: one at a time, all at once, and one of the prompts alone."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\nthe second of them\n")
    flags = ["--prompts", str(prompts), "--num", "2", "--max-tokens", "20", "--top-k", "50", "--seed", "5"]
    together = run(tmp_path, saved, *flags)["texts"]
    assert run(tmp_path, saved, *flags, "--batch-size", "1", "--scheduler", "sequential")["texts"] == together
    alone = run(tmp_path, saved, "--prompt", "one", *flags[2:])["texts"]
    assert alone == together[:2]
    assert [(each["prompt"], each["sample"]) for each in together] == list(product(["one", "the second of them"], [0, 1]))
    assert len({tuple(each["ids"]) for each in together}) == 4
    assert run(tmp_path, saved, "--prompt", "one", *flags[2:-1], "6")["texts"] != alone


def test_texts_are_shown_in_their_order(tmp_path, saved, capsys):
    """Whichever ends first."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "id": 1}\n\n{"prompt": "b\\nc"}\n{"prompt": ""}\n')
    texts = run(tmp_path, saved, "--prompts", str(tmp_path / "p.jsonl"), "--max-tokens", "30", "--stop", "e", "--stop", "\n")["texts"]
    assert capsys.readouterr().out == "\n---\n".join(each["prompt"] + each["text"] for each in texts) + "\n"
    assert [each["prompt"] for each in texts] == ["a", "b\nc", ""]
    assert not any("e" in each["text"] or "\n" in each["text"] for each in texts)


def test_a_stop_string_ends_a_text(tmp_path, saved):
    """Where it first occurs in what greedy decoding says without it, and not in the prompt."""
    flags = ["--prompt", "hello", "--max-tokens", "60", "--temperature", "0"]
    text = run(tmp_path, saved, *flags)["texts"][0]["text"]
    stop = text[7:9]
    found = run(tmp_path, saved, *flags, "--stop", stop, "--stop", "hello")["texts"][0]
    assert found["text"] == text[: text.index(stop)] and found["end"] == "stop"


def test_an_end_of_text_ends_a_text(tmp_path):
    """A model that is sure of it generates nothing; written in a prompt it is the token, and it stands before an empty one."""
    parameters = {name: np.zeros_like(array) for name, array in drawn(MODEL).items()}
    parameters["lnfb"][0, 0] = parameters["wte"][END, 0] = 10
    checkpoints.save(tmp_path / "end.bin", MODEL, parameters)
    found = run(tmp_path, str(tmp_path / "end.bin"), "--prompt", "a<|endoftext|>b")["texts"][0]
    assert (found["text"], found["ids"], found["end"], found["prompt_tokens"]) == ("", [], "end of text", 3)
    assert run(tmp_path, str(tmp_path / "end.bin"))["texts"][0]["prompt_tokens"] == 1


def test_ids_of_prompts():
    """In GPT-2's encoding too."""
    ids = program.ids_of("Hello world<|endoftext|>", gpt2_tokenizer(), "")
    assert ids == [15496, 995, 50256]
    assert program.ids_of("", gpt2_tokenizer(), "") == [50256]


def test_a_prompt_from_standard_input(tmp_path, saved, monkeypatch):
    """In UTF-8, without its last line end."""
    for data in (b"caf\xc3\xa9\n", b"\xef\xbb\xbfcaf\xc3\xa9\r\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run(tmp_path, saved, "--prompt", "-", "--max-tokens", "1")["texts"][0]["prompt"] == "café"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert program.main(["--init", saved, "--prompt", "-"]) == 2


def test_without_max_tokens_a_text_fits(tmp_path, saved):
    """128 tokens, or as many as there are positions left."""
    words = ["--temperature", "0"]
    assert len(run(tmp_path, saved, "--prompt", "a", *words)["texts"][0]["ids"]) == 128
    assert len(run(tmp_path, saved, "--prompt", "a" * 150, *words)["texts"][0]["ids"]) == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "none.bin"], "none.bin: cannot read the checkpoint"),
        (
            ["--prompt", "a" * 150, "--max-tokens", "11"],
            "150 tokens and 11 to be generated do not fit into the model's 160 positions; choose",
        ),
        (["--prompt", "a" * 160], "160 tokens and 1 to be generated do not fit into the model's 160 positions; shorten the prompt"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--num", "0"], "--num"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0: wanted a number above 0"),
        (["--stop", ""], "--stop: wanted a text"),
        (["--prompts", "EMPTY"], "empty.txt: not a text file: it is empty"),
        (["--prompts", "none.txt"], "none.txt: no such file"),
        (["--prompts", "BROKEN"], "broken.jsonl: line 2: not JSON"),
        (["--prompts", "OTHER"], 'other.jsonl: line 1: wanted an object with a text, {"prompt": "..."}, got {'),
        (["--prompts", "SURROGATE"], "prompt 1: not a text in UTF-8"),
        (["--prompt", "a", "--prompts", "b"], "not allowed with"),
        (["--set", "tiles.rows=3"], "--set tiles.rows: a key of graph files"),
        (["--set", "idel=busy"], "idel"),
        (["--json", "none/s.json"], "cannot write"),
        (["--batch-size", "1000000", "--num", "1000000", "--max-tokens", "150"], "generating needs"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, message, saved, tmp_path, capsys):
    """And exit code 2; flags that argparse refuses are answered with the usage too."""
    files = {
        "EMPTY": ("empty.txt", "\n  \n"),
        "BROKEN": ("broken.jsonl", '{"prompt": "a"}\n{"prompt"\n'),
        "OTHER": ("other.jsonl", '{"text": "a"}\n'),
        "SURROGATE": ("surrogate.jsonl", '{"prompt": "\\ud800"}\n'),
    }
    for name, text in files.values():
        (tmp_path / name).write_text(text)
    words = [str(tmp_path / files[word][0]) if word in files else word for word in words]
    try:
        code = program.main(["--init", saved, *words])
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and message in error
    assert error.count("\n") == 1 or error.startswith("usage:")


def test_ctrl_c_ends_with_what_there_is(tmp_path):
    """Exit code 130, the text so far on standard output, and in the file, whose text says that it was interrupted."""
    model = Model(2, 2, 32, BYTE_VOCAB_SIZE, 30_000)
    parameters = drawn(model)
    parameters["wte"][END] = 0
    checkpoints.save(tmp_path / "long.bin", model, parameters)
    flags = [
        "--init",
        tmp_path / "long.bin",
        "--prompt",
        "hello",
        "--max-tokens",
        "29000",
        "--num",
        "3",
        "--top-k",
        "5",
        "--batch-size",
        "2",
    ]
    command = [sys.executable, "-m", "taskgpt", "sample", *map(str, flags), "--json", str(tmp_path / "s.json")]
    with started(command, errors="replace") as process:
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert first.startswith("hello") and rest.endswith("\n")
    texts = json.loads((tmp_path / "s.json").read_text())["texts"]
    assert [each["end"] for each in texts] == ["interrupted"] * 3
    assert 0 < len(texts[0]["ids"]) < 29000 and texts[2]["ids"] == []
    assert (first + rest).count("\n---\nhello") == 1
    assert "decode" in err and "Traceback" not in err


# The benchmark --------------------------------------------------------------------------------------------------------------------------


def test_decoding_is_measured_beside_streaming(tmp_path, capsys):
    """Every token of every round but the first counts; the ratio is that of the medians; what fits into caches is said to."""
    flags = ["--graph", "tiny", "--rounds", "2", "--context", "5", "--tokens", "4", "--batch-size", "3", "--scheduler", "sequential"]
    assert bench.main(["decode", *flags, "--json", str(tmp_path / "d.json")]) == 0
    stream, tokens = json.loads((tmp_path / "d.json").read_text())["decode"]
    assert len(tokens["seconds"]) == 2 * 4 and len(stream["seconds"]) >= 2
    assert tokens["x_stream"] == pytest.approx(np.median(tokens["seconds"]) / np.median(stream["seconds"]))
    assert tokens["tokens_per_s"] == pytest.approx(3 / np.median(tokens["seconds"])) and stream["tokens_per_s"] is None
    assert bench.main(["decode", "--graph", "tiny", "--context", "60", "--tokens", "5"]) == 2
    assert "the model has 64 positions" in capsys.readouterr().err


def test_streaming_reads_every_weight_once():
    """Threads share the matrices out without gap or overlap: what they add up is the sum of all words."""
    matrices = [make().p.tensors[name] for name in ("wte", "qkvw", "fcprojw")]
    parts = [part for call in stream_calls(matrices, 3) for part in call.args[0]]
    assert sum(part.nbytes for part in parts) == sum(tensor.array.nbytes for tensor in matrices)
    wanted = sum(int(tensor.array.reshape(-1).view(np.int64).sum(dtype=object)) for tensor in matrices)
    assert sum(int(part.sum(dtype=object)) for part in parts) == wanted
