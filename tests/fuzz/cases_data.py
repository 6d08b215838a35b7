"""What data and checkpoints are read from: token files, tokenizers, checkpoints, texts, cursors, and what `data prepare` takes."""

import gzip
import json
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
from pyarrow import parquet

from taskgpt.files import read_json, read_text
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.shape import Model
from taskgpt.gpt2.text import documents, preparation
from taskgpt.gpt2.text.choices import read_choices
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.documents import Reading, spans_of, tokens_of
from taskgpt.gpt2.text.mixtures import Mixture, read_mixture
from taskgpt.gpt2.text.tokenizer import read_tokenizer
from taskgpt.gpt2.text.tokens import Loader, TokenFile, write_tokens

from . import Case

PARITY = Path(__file__).parents[1] / "parity"
WORDS = "A task waits for what it reads,\nand a reader waits for none.\n\n"


def _header(*words: int) -> bytes:
    return struct.pack("<256i", *words, *[0] * (256 - len(words)))


def _make_tokens(folder: Path) -> None:
    write_tokens(folder / "tokens.bin", [i % 200 for i in range(500)])


def _make_tokenizer(folder: Path) -> None:
    pieces = [bytes([i]) * (i % 5) for i in range(200)]
    table = b"".join(bytes([len(piece)]) + piece for piece in pieces)
    (folder / "tokenizer.bin").write_bytes(_header(20240328, 2, len(pieces), 0) + table)


def _make_choices(folder: Path) -> None:
    words = [word for n in range(3) for word in (65535, 28, n, 1, 2, 3, 1, 2, 3, 2, 4, 5, 1, 6)]
    (folder / "choices.bin").write_bytes(_header(20240522, 1, 3, 28) + struct.pack(f"<{len(words)}H", *words))


def _make_folder(folder: Path) -> None:
    write_tokens(folder / "a_train.bin", [i % 200 for i in range(300)])
    write_tokens(folder / "a_val.bin", [i % 200 for i in range(100)])
    _make_tokenizer(folder)


def _make_text(folder: Path) -> None:
    (folder / "text.txt").write_text(WORDS * 20)


def _make_checkpoint(folder: Path) -> None:
    (folder / "model.bin").write_bytes((PARITY / "model.bin").read_bytes())


def _make_half_checkpoint(folder: Path) -> None:
    words = (PARITY / "model.bin").read_bytes()
    halves = b"".join(words[at + 2 : at + 4] for at in range(1024, len(words), 4))
    (folder / "model.bin").write_bytes(words[:4] + struct.pack("<i", 5) + words[8:1024] + halves)


def _read_checkpoint(folder: Path) -> None:
    path = folder / "model.bin"
    model = checkpoints.read_shape(path)
    checkpoints.load(path, model, checkpoints.empty(model))


def _make_huggingface(folder: Path) -> None:
    model = Model(2, 2, 16, 300, 32)
    rng = np.random.default_rng(0)
    parameters = {name: rng.standard_normal(shape, np.float32) for name, shape in model.parameter_shapes().items()}
    checkpoints.save(folder / "model", model, parameters)


def _read_huggingface(folder: Path) -> None:
    model = checkpoints.read_shape(folder / "model")
    checkpoints.load(folder / "model", model, checkpoints.empty(model))


def _mixture() -> Mixture:
    sources = [Loader([np.arange(90, dtype=np.uint16), np.arange(50, dtype=np.uint16)], 1, 8, 100, shuffle=True) for _ in range(2)]
    return Mixture(sources, [1, 2], 4, shuffle=True)


def _make_cursor(folder: Path) -> None:
    (folder / "cursor.json").write_text(json.dumps(_mixture().cursor()))


def _restore(folder: Path) -> None:
    mixture, rows = _mixture(), np.zeros((2, 4, 8), np.int32)
    mixture.restore(read_json(folder / "cursor.json"))
    for _ in range(40):
        mixture.next_batch(*rows)


def _make_mixture(folder: Path) -> None:
    (folder / "mixture.txt").write_text("tinyshakespeare=0.3,my.txt=12,data/x_*.bin=1e3")


LINES = b"".join(json.dumps({"text": WORDS, "id": n, "of": [{"x": [n, None]}]}).encode() + b"\n" for n in range(5))
PREPARED = preparation.Manifest(1, preparation.Settings(), ["12 34 /a.txt", "5 6 /b.txt"], {"tokens_train_000001.bin": 300})


def _make_parquet(folder: Path) -> None:
    table = pyarrow.table({"id": range(40), "text": [WORDS, None] * 20, "of": [[1, 2]] * 40})
    parquet.write_table(table, folder / "x.parquet", row_group_size=16)


def _read_documents(path: Path) -> None:
    for span in spans_of(str(path)):
        for _ in tokens_of(span, Reading("bytes")):
            pass


def _read_in_small_spans(folder: Path) -> None:
    with mock.patch.multiple(documents, SPAN_BYTES=100, FARTHEST=150):
        _read_documents(folder / "text.txt")


def _make_prepared(folder: Path) -> None:
    write_tokens(folder / "tokens_train_000001.bin", [i % 200 for i in range(300)])
    preparation._write(folder, PREPARED)


CASES = (
    Case("token_file", _make_tokens, lambda folder: TokenFile(folder / "tokens.bin")[:].sum()),
    Case("tokenizer_file", _make_tokenizer, lambda folder: read_tokenizer(folder / "tokenizer.bin").decode(range(210))),
    Case("choices", _make_choices, lambda folder: read_choices(folder / "choices.bin", 200)),
    Case("token_folder", _make_folder, lambda folder: open_data(str(folder), 1, 8, 200)),
    Case("text", _make_text, lambda folder: open_data(str(folder / "text.txt"), 1, 8, 50257)),
    Case("text_as_bytes", _make_text, lambda folder: open_data(str(folder / "text.txt"), 1, 8, 300)),
    Case("cursor", _make_cursor, _restore, names_file=False),
    Case("mixture", _make_mixture, lambda folder: read_mixture(read_text(folder / "mixture.txt")), names_file=False),
    Case("text_in_spans", _make_text, _read_in_small_spans),
    Case("jsonl", lambda folder: (folder / "x.jsonl").write_bytes(LINES), lambda folder: _read_documents(folder / "x.jsonl")),
    Case(
        "jsonl_gzip",
        lambda folder: (folder / "x.jsonl.gz").write_bytes(gzip.compress(LINES)),
        lambda folder: _read_documents(folder / "x.jsonl.gz"),
    ),
    Case("parquet_text", _make_parquet, lambda folder: _read_documents(folder / "x.parquet")),
    Case("prepared", _make_prepared, lambda folder: preparation._begin(folder, PREPARED)),
    Case("checkpoint", _make_checkpoint, _read_checkpoint),
    Case("checkpoint_bfloat16", _make_half_checkpoint, _read_checkpoint),
    Case("huggingface", _make_huggingface, _read_huggingface),
)
