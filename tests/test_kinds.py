"""Kinds of files: what is not the file that was wanted is named, with what to do, and a pickle is never loaded."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_tokens import header

from taskgpt.errors import UserError
from taskgpt.gpt2.checkpoints import llmc
from taskgpt.gpt2.text.data import open_data
from taskgpt.gpt2.text.tokenizer import read_tokenizer
from taskgpt.gpt2.text.tokens import TokenFile


class Bomb:
    """Unpickled, it leaves a file where it was."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def archive(**members: bytes) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zip_file:
        for name, content in members.items():
            zip_file.writestr(name, content)
    return file.getvalue()


def numpy_file(save, *arrays) -> bytes:
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


OF_A_PICKLE = "make a folder of it for --init: docs/tutorials/gpt.md has a program for nanoGPT's"
TENSORS = json.dumps({"wte": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
FILES = {  # name: (content, what the message says, what to do; None: what depends on what was wanted)
    "model.pt": (
        archive(**{"model/data.pkl": pickle.dumps(Bomb()), "model/version": b"3"}),
        "a PyTorch checkpoint .* never loaded.*",
        OF_A_PICKLE,
    ),
    "script.pt": (archive(**{"script/data/0": bytes(16), "script/data.pkl": b""}), "a PyTorch checkpoint .* never loaded.*", OF_A_PICKLE),
    "pytorch_model.bin": (pickle.dumps(Bomb(), protocol=2), "a Python pickle .* never loaded.*", OF_A_PICKLE),
    "model.pkl": (pickle.dumps(Bomb(), protocol=5), "a Python pickle .* never loaded.*", OF_A_PICKLE),
    "model.safetensors": (
        struct.pack("<Q", len(TENSORS)) + TENSORS + bytes(4),
        "a safetensors model",
        "give it, or its folder, to --init or to `taskgpt convert`",
    ),
    "model.gguf": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "a GGUF model, as llama.cpp has them", None),
    "ids.npy": (numpy_file(np.save, np.arange(5)), r"a NumPy array \(.npy\)", None),
    "ids.npz": (numpy_file(np.savez, np.arange(5)), r"an archive of NumPy arrays \(.npz\)", None),
    "text.docx": (archive(**{"[Content_Types].xml": b"<xml/>"}), "a zip archive", "unpack it first"),
    "text.gz": (gzip.compress(b"text " * 500), "compressed by gzip", "unpack it first, with gunzip"),
    "text.xz": (lzma.compress(b"text " * 500), "compressed by xz", "unpack it first, with unxz"),
    "text.bz2": (bz2.compress(b"text " * 500), "compressed by bzip2", "unpack it first, with bunzip2"),
    "text.zst": (b"\x28\xb5\x2f\xfd\x04\x58" + bytes(50), "compressed by zstd", "unpack it first, with unzstd"),
    "book.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(50), "a PDF document", "extract its text first"),
    "table.parquet": (b"PAR1\x15\x04" + bytes(50), "a Parquet table", None),
    "debug_state.bin": (header(20240327, 2), "an llm.c debug state", None),
    "hellaswag_val.bin": (header(20240522, 1), r"an llm.c evaluation file \(HellaSwag, MMLU\)", "give it to `taskgpt eval --choices`"),
}
READERS = {  # what is wanted: (reader, what to do)
    "an llm.c model checkpoint": (llmc.read_shape, "llm.c's train_gpt2.py writes one, also from Hugging Face's models"),
    "an llm.c token file": (TokenFile, "tokenize the text for GPT-2, or give the text itself to --data"),
    "an llm.c tokenizer": (read_tokenizer, "llm.c's train_gpt2.py writes one"),
    "a text": (lambda path: open_data(str(path), 1, 8, 50257), "give a text in UTF-8, or a folder of llm.c's token files"),
}


@pytest.mark.parametrize("wanted", READERS)
@pytest.mark.parametrize("name", FILES)
def test_another_kind_of_file_is_named(tmp_path, monkeypatch, name, wanted):
    """Whatever reads it says what it is, what was wanted, and what to do; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    content, what, advice = FILES[name]
    (tmp_path / name).write_bytes(content)
    read, otherwise = READERS[wanted]
    with pytest.raises(UserError, match=f"{name}: this is {what}, and {wanted} is wanted; {advice or otherwise}"):
        read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("wanted", READERS)
def test_llmcs_own_files_in_each_others_place(parity_folder, tmp_path, wanted):
    """A checkpoint given to --data, tokens given to --init, and so on: each says where the file belongs."""
    (tmp_path / "text.txt").write_text("Once upon a time.\n" * 50)
    files = {
        "model.bin": "give it to --init",
        "tokens_train.bin": "give its folder to --data",
        "tokenizer.bin": "put it beside token files",
    }
    own = {"an llm.c model checkpoint": "model.bin", "an llm.c token file": "tokens_train.bin", "an llm.c tokenizer": "tokenizer.bin"}
    for name, advice in files.items():
        if own.get(wanted) != name:
            with pytest.raises(UserError, match=f"{name}: this is an llm.c .*, and {wanted} is wanted; {advice}"):
                READERS[wanted][0](parity_folder / name)
    READERS[wanted][0](parity_folder / own[wanted] if wanted in own else tmp_path / "text.txt")
