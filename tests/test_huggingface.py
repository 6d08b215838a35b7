"""Hugging Face's GPT-2: what is written is read back to the bit, transformers agrees, and what is no GPT-2 is refused in a line."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT, files
from safetensors.numpy import load_file, save_file

from taskgpt import train
from taskgpt.errors import UserError
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import huggingface
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import forward, head_forward
from taskgpt.gpt2.shape import Batch, Model, Options, Tiles
from taskgpt.programs.convert import main as convert
from taskgpt.programs.sample import main as sample
from taskgpt.tasks import run_now

SHAPES = {"small": Model(2, 4, 32, 300, 64), "one layer": Model(1, 1, 16, 130, 16), "wide": Model(3, 8, 64, 257, 32)}


def drawn(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random parameters; padding rows of wte are 0."""
    rng = np.random.default_rng(seed)
    parameters = {name: rng.standard_normal(shape, np.float32) * np.float32(0.1) for name, shape in model.parameter_shapes().items()}
    parameters["wte"][model.vocabulary :] = 0
    return parameters


def empty(model: Model) -> dict[str, np.ndarray]:
    return {name: np.full(shape, np.nan, np.float32) for name, shape in model.parameter_shapes().items()}


def read(path) -> tuple[Model, dict[str, np.ndarray]]:
    model = checkpoints.read_shape(path)
    parameters = empty(model)
    checkpoints.load(path, model, parameters)
    return model, parameters


def logits_of(model: Model, parameters: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Return the logits of (B, T) tokens, as the forward pass computes them, without padding."""
    m = GPT2(model, Batch(*tokens.shape), Tiles(16, 16, 16, 1, 64), Options("matrices"))
    for name, array in m.parameters.items():
        array[...] = parameters[name]
    m.s.tokens.array[:] = tokens.reshape(-1)
    forward(run_now, m, m.grid.all_rows)
    head_forward(run_now, m, m.grid.all_rows, m.a.logits[0])
    return m.a.logits.array[0, :, : model.vocabulary].reshape(*tokens.shape, -1)


def is_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path):
    """A folder, its model, its parameters."""
    model = SHAPES["small"]
    parameters = drawn(model)
    checkpoints.save(tmp_path / "model", model, parameters)
    return tmp_path / "model", model, parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read_back(tmp_path, shape):
    """Shape and parameters, to the bit; nothing else is left beside the folder."""
    model = SHAPES[shape]
    parameters = drawn(model)
    checkpoints.verify_can_save(tmp_path / "model", model, 10**6)
    checkpoints.save(tmp_path / "model", model, parameters)
    found, again = read(tmp_path / "model")
    assert found == model
    assert is_same(parameters, again)
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["model"]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    """A model in a shared folder: the large file as the small one."""
    before = os.umask(0o027)
    try:
        checkpoints.save(tmp_path / "model", SHAPES["one layer"], drawn(SHAPES["one layer"]))
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "model").iterdir()} == {0o640}


def test_both_formats_hold_the_same(saved, tmp_path):
    """From Hugging Face's to llm.c's and back: the same bits."""
    path, model, parameters = saved
    checkpoints.save(tmp_path / "model.bin", *read(path))
    assert checkpoints.read_shape(tmp_path / "model.bin") == model
    assert is_same(parameters, read(tmp_path / "model.bin")[1])


def test_shards_prefixes_masks_and_a_tied_head(saved, tmp_path):
    """As older and larger models have them: two files and an index, names without transformer., masks, and wte twice."""
    path, model, parameters = saved
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.uint8), "h.1.attn.masked_bias": np.array(-1e4, np.float32)}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(path / "config.json", shards)
    files = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    for word in (shards, shards / "model.safetensors.index.json"):
        found, again = read(word)
        assert found == model
        assert is_same(parameters, again)


def test_half_precision(saved, tmp_path):
    """float16 and bfloat16 become float32 of the same values."""
    path, _, parameters = saved
    tensors = load_file(path / "model.safetensors")
    (tmp_path / "half").mkdir()
    shutil.copy(path / "config.json", tmp_path / "half")
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, tmp_path / "half" / "model.safetensors")
    assert is_same({name: a.astype(np.float16).astype(np.float32) for name, a in parameters.items()}, read(tmp_path / "half")[1])

    header, data = {}, b""
    for name, value in tensors.items():
        upper = (value.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [len(data), len(data) + len(upper)]}
        data += upper
    text = json.dumps(header).encode()
    (tmp_path / "half" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    cut = {name: (a.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, a in parameters.items()}
    assert is_same(cut, read(tmp_path / "half")[1])


def test_a_file_alone_has_heads_of_64_channels(tmp_path):
    """As every GPT-2; with config.json beside it, those that it says."""
    model = Model(1, 2, 128, 130, 16)
    checkpoints.save(tmp_path / "model", model, drawn(model))
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "alone.safetensors")
    assert checkpoints.read_shape(tmp_path / "alone.safetensors").heads == 2
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 4}))
    assert checkpoints.read_shape(tmp_path / "alone.safetensors").heads == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "model_type = 'llama', wanted 'gpt2'"),
        ("activation_function", "relu", "activation_function = 'relu'"),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon = 1e-06"),
        ("tie_word_embeddings", False, "tie_word_embeddings = False"),
        ("n_inner", 100, "n_inner = 100, wanted 4 x 32"),
        ("n_layer", 3, "n_layer = 3, but the tensors have 2"),
        ("n_head", 5, "not a multiple of heads"),
        ("n_head", "four", "n_head: wanted a number of heads, got 'four'"),
    ],
)
def test_another_model_is_refused(saved, key, value, message):
    """What config.json says that GPT-2 here is not."""
    path = saved[0]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError) as caught:
        checkpoints.read_shape(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "has no tensor h.1.ln_2.bias"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((64, 33), np.float32)}), r"wpe.weight: wanted \(64, 32\), got \(64, 33\)"),
        (lambda t: t.update({"transformer.h.0.mlp.gate.weight": np.zeros(3, np.float32)}), "h.0.mlp.gate.weight: GPT-2 has no such tensor"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((64, 32), np.int32)}), "wanted float32, float16 or bfloat16, got I32"),
        (lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}), "its head, lm_head.weight, is not wte"),
        (lambda t: [t.pop(name) for name in list(t) if ".h.0." in name], "wanted the layers h.0 and so on"),
    ],
)
def test_other_tensors_are_refused(saved, change, message):
    """Missing, of another shape or type, unknown, an untied head, a layer that is not there."""
    path = saved[0]
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_folder_without_a_model(tmp_path):
    """Nothing there; a file that is none of this kind; a pickle, which is never loaded."""
    with pytest.raises(UserError, match=r"found neither model.safetensors nor model.safetensors.index.json"):
        checkpoints.read_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\4anything")
    with pytest.raises(UserError, match=r"a Python pickle .* which is never loaded"):
        checkpoints.read_shape(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((10**15).to_bytes(8, "little") + b'{"')
    with pytest.raises(UserError, match=r"model.safetensors: damaged: .*; get the file again"):
        checkpoints.read_shape(tmp_path)


def test_a_folder_of_something_else_is_kept(saved, tmp_path):
    """A model's folder is replaced by a model; no other folder, and no file."""
    path, model, parameters = saved
    checkpoints.verify_can_save(path, model, 10**6)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").touch()
    (tmp_path / "file").touch()
    shutil.copytree(path, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").touch()
    messages = {"texts": "holds mine.txt", "theirs": "holds tokenizer.json", "file": "is no folder", "none/x": "there is no folder"}
    for name, message in messages.items():
        with pytest.raises(UserError, match=message):
            checkpoints.verify_can_save(tmp_path / name, model, 10**6)
    with pytest.raises(UserError, match="bytes, the disk has"):
        checkpoints.verify_can_save(path, model, 10**18)
    assert is_same(parameters, read(path)[1])


def test_the_folder_that_one_is_in_is_kept(tmp_path, monkeypatch):
    """Also while it is empty, by whatever name, and those around it: files named later would have no place."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "..", str(tmp_path / "here"), "/"):
        with pytest.raises(UserError, match="is a folder that you are in"):
            checkpoints.verify_can_save(name, SHAPES["small"], 10**6)


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupt_leaves_the_former_folder(saved, monkeypatch, at):
    """Ctrl-C at either of the two renames that put a model into the place of another."""
    path, model, parameters = saved
    renames, replace = [], os.replace

    def interrupted(source, target):
        renames.append(source)
        if len(renames) == at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, model, drawn(model, seed=1))
    assert is_same(parameters, read(path)[1])
    assert os.listdir(path.parent) == [path.name]


def test_training_goes_on_from_a_folder_as_from_a_file(tmp_path):
    """--save and --init in either format: the same parameters, and the same after another step."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 300)
    flags = ["--graph", "tiny", "--data", str(text), "--steps", "1", "--val-every", "0", "--sample-every", "0", "--scheduler", "sequential"]
    results = {}
    for first, last in (("a.bin", "b.bin"), ("a", "b")):
        assert train.main([*flags, "--save", str(tmp_path / first)]) == 0
        assert train.main([*flags, "--init", str(tmp_path / first), "--save", str(tmp_path / last)]) == 0
        results[last] = read(tmp_path / last)[1]
    assert is_same(results["b.bin"], results["b"])


def test_the_program(saved, tmp_path, capsys):
    """There and back; a model that is not there, a target that cannot be, the same in a line."""
    path, _, parameters = saved
    assert convert([str(path), str(tmp_path / "model.bin")]) == 0
    assert "parameters, L 2, NH 4, C 32, V 300, T at most 64" in capsys.readouterr().out
    assert convert([str(tmp_path / "model.bin"), str(tmp_path / "again")]) == 0
    assert is_same(parameters, read(tmp_path / "again")[1])
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\4anything")
    for words in ([str(tmp_path / "ckpt.pt"), "x.bin"], [str(tmp_path / "none"), "x.bin"], [str(path), str(tmp_path / "none" / "x")]):
        assert convert(words) == 2
        assert capsys.readouterr().err.count("\n") == 1


def as_nanogpt(model: Model, parameters: dict[str, np.ndarray], has_bias: bool) -> dict[str, np.ndarray]:
    """Return the tensors of nanoGPT's state_dict, compiled, with its masks: matrices are (out, in), as ours."""
    found = {"transformer.wte.weight": parameters["wte"][: model.vocabulary], "transformer.wpe.weight": parameters["wpe"]}
    found |= {"transformer.ln_f.weight": parameters["lnfw"][0], "transformer.ln_f.bias": parameters["lnfb"][0]}
    for l in range(model.layers):
        found |= {f"transformer.h.{l}.{theirs}": parameters[ours][l] for ours, (theirs, _) in huggingface.OF_LAYER.items()}
        found[f"transformer.h.{l}.attn.bias"] = np.tril(np.ones((1, 1, model.max_seq_len, model.max_seq_len), np.float32))
    found["lm_head.weight"] = found["transformer.wte.weight"]
    return {f"_orig_mod.{name}": array for name, array in found.items() if has_bias or not name.endswith(".bias") or ".attn.bias" in name}


@pytest.mark.parametrize("has_bias", [True, False])
def test_nanogpt_is_refused_and_its_recipe_reads_it(tmp_path, monkeypatch, has_bias):
    """ckpt.pt is named for what it is, and where the program stands that makes a folder of it; that one holds the same parameters."""
    torch = pytest.importorskip("torch", reason="pip install torch transformers")
    monkeypatch.chdir(tmp_path)
    model, parameters = SHAPES["small"], drawn(SHAPES["small"])
    names = {"n_layer": "layers", "n_head": "heads", "n_embd": "channels", "block_size": "max_seq_len", "vocab_size": "vocabulary"}
    shape = {theirs: getattr(model, ours) for theirs, ours in names.items()} | {"bias": has_bias, "dropout": 0.0}
    tensors = {name: torch.tensor(array) for name, array in as_nanogpt(model, parameters, has_bias).items()}
    torch.save({"model": tensors, "model_args": shape, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"lr": 1}}, "ckpt.pt")
    with pytest.raises(UserError, match=r"PyTorch checkpoint .* never loaded.*docs/tutorials/gpt.md has a program for nanoGPT's"):
        checkpoints.read_shape("ckpt.pt")
    exec(files(ROOT / "docs" / "tutorials" / "gpt.md")["from_nanogpt.py"], {})
    found, again = read("from-nanogpt")
    assert found == model
    if not has_bias:
        parameters = {name: np.zeros_like(array) if name.endswith("b") else array for name, array in parameters.items()}
    assert is_same(parameters, again)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_agrees(tmp_path, shape):
    """It loads what is written here, and gives the logits that the forward pass gives here, within 1e-4; and the other way round."""
    pytest.importorskip("torch", reason="pip install torch transformers")
    transformers = pytest.importorskip("transformers", reason="pip install torch transformers")
    import torch

    model = SHAPES[shape]
    parameters = drawn(model)
    checkpoints.save(tmp_path / "ours", model, parameters)
    tokens = np.random.default_rng(1).integers(0, model.vocabulary, (2, model.max_seq_len))
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    assert np.abs(logits_of(model, parameters, tokens) - expected).max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    found, again = read(tmp_path / "theirs")
    assert found == model
    assert is_same(parameters, again)
    assert huggingface.FILE in os.listdir(tmp_path / "theirs")


@pytest.mark.parametrize(("program", "folder", "vocabulary"), [("generate.py", "my-gpt2", 50257), ("generate_bytes.py", "mine", 257)])
def test_the_programs_of_the_how_to_print_what_sample_does(program, folder, vocabulary, tmp_path, monkeypatch, capsys):
    """As the page has them, GPT-2's with the tokenizer's files where the page puts them."""
    pytest.importorskip("torch", reason="pip install torch transformers")
    pytest.importorskip("transformers", reason="pip install torch transformers")
    shown = files(ROOT / "docs" / "howto" / "transformers.md")
    model = Model(2, 4, 32, vocabulary, 64)
    checkpoints.save(tmp_path / folder, model, drawn(model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if folder == "my-gpt2":
        copies = shown["tokenizer.sh"].replace("python", shlex.quote(sys.executable))
        subprocess.run(["sh", "-e", "-c", copies], check=True)
    exec(shown[program], {"__name__": "__main__"})
    theirs = capsys.readouterr().out
    words = ["--init", folder, "--prompt", "The sea", "--temperature", "0", "--max-tokens", "40"]
    assert sample(words) == 0
    assert capsys.readouterr().out == theirs
    assert len(theirs) > len("The sea\n")
