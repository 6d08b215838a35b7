"""Hugging Face's GPT-2: a folder with config.json and model.safetensors, or several such files and their index.

Its four matrices of a layer are (in, out), ours (out, in). The head is tied to wte, and not stored twice. Masks, which older files hold as
`attn.bias`, are no parameters. Names may begin with `transformer.`. What is read is float32, float16 or bfloat16; what is written is
float32. Source: transformers, `modeling_gpt2.py`; the format is huggingface/safetensors'.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from taskgpt.errors import UserError, shorten
from taskgpt.files import as_written, cannot_write, file_size, read_json, replacing_folder, verify_room
from taskgpt.gpt2.checkpoints.llmc import from_bfloat16
from taskgpt.gpt2.shape import Model
from taskgpt.gpt2.text.kinds import LOOK_BYTES, refuse_another_kind

FILE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SAFETENSORS = "a safetensors model"
HEAD_SIZE = 64  # of every GPT-2, where no config.json says how many heads there are
NOT_HERE = "this model computes otherwise than GPT-2, and cannot be run here"
# Our names, those of Hugging Face after `h.N.` or at the top, and whether theirs is transposed.
OF_LAYER = {
    "ln1w": ("ln_1.weight", False),
    "ln1b": ("ln_1.bias", False),
    "qkvw": ("attn.c_attn.weight", True),
    "qkvb": ("attn.c_attn.bias", False),
    "attprojw": ("attn.c_proj.weight", True),
    "attprojb": ("attn.c_proj.bias", False),
    "ln2w": ("ln_2.weight", False),
    "ln2b": ("ln_2.bias", False),
    "fcw": ("mlp.c_fc.weight", True),
    "fcb": ("mlp.c_fc.bias", False),
    "fcprojw": ("mlp.c_proj.weight", True),
    "fcprojb": ("mlp.c_proj.bias", False),
}
AT_TOP = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
# What config.json may say that we compute no other way, and what it is when it says nothing.
ONLY = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def read_shape(path: str | Path) -> Model:
    """Return the model's shape, from config.json, or, of a file alone, from its tensors, with heads of 64 channels.

    Raises UserError for what is missing, damaged or of another model.
    """
    with _Weights(path) as weights:
        config = _config(path)
        vocabulary, C = weights.shape("wte.weight", 2)
        shape = {
            "layers": weights.layers(),
            "heads": config.get("n_head", max(1, C // HEAD_SIZE)),
            "channels": C,
            "vocabulary": vocabulary,
            "max_seq_len": weights.shape("wpe.weight", 2)[0],
        }
        said = {"n_layer": "layers", "n_embd": "channels", "vocab_size": "vocabulary", "n_positions": "max_seq_len"}
        for key, name in said.items():
            if config.get(key, shape[name]) != shape[name]:
                got = as_written(config[key])
                raise UserError(f"{_config_file(path)}: {key} = {got}, but the tensors have {shape[name]}; get both again")
        if not isinstance(shape["heads"], int) or shape["heads"] < 1:
            raise UserError(f"{_config_file(path)}: n_head: wanted a number of heads, got {as_written(shape['heads'])}")
        if config.get("n_inner") not in (None, 4 * C):
            got = as_written(config["n_inner"])
            raise UserError(f"{_config_file(path)}: n_inner = {got}, wanted 4 x {C}; {NOT_HERE}")
        try:
            model = Model(**shape)
        except ValueError as error:
            raise UserError(f"{shorten(path)}: {error}; get the file again, with its {CONFIG}") from None
        for _, wanted, name, is_transposed in _places(model):
            got, wanted = weights.shape(name, len(wanted)), wanted[::-1] if is_transposed else wanted
            if got != wanted:
                raise UserError(f"{shorten(path)}: {name}: wanted {wanted}, got {got}; get the file again")
        weights.refuse_others({name for *_, name, _ in _places(model)})
    return model


def load(path: str | Path, model: Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Fill the parameters from a checkpoint of the model's shape. Raises UserError as `read_shape` does."""
    with _Weights(path) as weights:
        for place, shape, name, is_transposed in _places(model):
            found = weights.read(name)
            target = parameters[place[0]][place[1:]]
            target[: shape[0]] = found.T if is_transposed else found
        parameters["wte"][model.vocabulary :] = 0
        weights.verify_tied(parameters["wte"][: model.vocabulary])


def save(path: str | Path, model: Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Write the folder, whole or not at all. Raises UserError if it cannot be written."""
    tensors = {}
    for place, shape, name, is_transposed in _places(model):
        array = parameters[place[0]][place[1:]][: shape[0]]
        tensors[f"transformer.{name}"] = np.ascontiguousarray(array.T if is_transposed else array)
    try:
        with replacing_folder(path) as folder:
            save_file(tensors, folder / FILE, {"format": "pt"})
            (folder / CONFIG).write_text(json.dumps(_as_config(model), indent=2) + "\n", encoding="utf-8")
            shutil.copymode(folder / CONFIG, folder / FILE)  # which safetensors lets its owner alone read, whatever the umask says
    except OSError as error:
        raise cannot_write(path, error) from None
    except SafetensorError as error:
        raise UserError(f"{shorten(path)}: cannot write: {error}; choose another place, where you may write") from None


def verify_can_save(path: str | Path, nbytes: int) -> None:
    """Raise UserError if `save` of so many bytes could not succeed now, or if something else than a model would be gone then."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise UserError(f"{shorten(path)}: is there already and is no folder; name a folder, or a file name.bin for llm.c's format")
    if Path.cwd().is_relative_to(target):
        raise UserError(f"{shorten(path)}: is a folder that you are in, and would be replaced; name another folder")
    if not target.parent.is_dir():
        raise UserError(f"{shorten(path)}: there is no folder {target.parent}; make it first")
    try:
        if others := sorted({each.name for each in target.iterdir()} - {CONFIG, FILE}) if target.is_dir() else []:
            raise UserError(f"{shorten(path)}: is there already and holds {shorten(others[0])}, which would be gone; name another folder")
        with replacing_folder(probe := target.with_name(f".{target.name}.probe")):
            pass
        shutil.rmtree(probe)
        verify_room(path, nbytes)
    except OSError as error:
        raise cannot_write(path, error) from None


def _places(model: Model) -> Iterator[tuple[tuple, tuple[int, ...], str, bool]]:
    """Yield (our parameter, or parameter and layer; its shape; their name; whether theirs is transposed) of each tensor of theirs."""
    shapes = model.parameter_shapes(model.vocabulary)
    for name, theirs in AT_TOP.items():
        layer = (0,) if name.startswith("lnf") else ()  # ours has a dimension for layers, of one
        yield (name, *layer), shapes[name][len(layer) :], theirs, False
    for l in range(model.layers):
        for name, (theirs, is_transposed) in OF_LAYER.items():
            yield (name, l), shapes[name][1:], f"h.{l}.{theirs}", is_transposed


def _as_config(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in ONLY.items()},
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.channels,
        "n_positions": model.max_seq_len,
        "n_ctx": model.max_seq_len,
        "vocab_size": model.vocabulary,
        "bos_token_id": model.vocabulary - 1,  # end of text, the last id, as in GPT-2's and in our byte encoding
        "eos_token_id": model.vocabulary - 1,
        "torch_dtype": "float32",
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _config_file(path: str | Path) -> Path:
    return (Path(path) if Path(path).is_dir() else Path(path).parent) / CONFIG


def _config(path: str | Path) -> dict[str, Any]:
    """Return what config.json says, nothing if there is none. Raises UserError if it says what we do not compute."""
    file = _config_file(path)
    if not file.exists():
        return {}
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{shorten(file)}: wanted an object, got {as_written(config)}")
    for key, possible in ONLY.items():
        if key in config and config[key] not in possible:
            raise UserError(f"{shorten(file)}: {key} = {as_written(config[key])}, wanted {as_written(possible[0])}; {NOT_HERE}")
    return config


class _Weights:
    """The tensors of one or several files, by their names without `transformer.`."""

    def __init__(self, path: str | Path):
        self._path, self._stack = Path(path), ExitStack()
        self._files: dict[str, tuple[Any, str, Path]] = {}  # the open file, the name there, its path

    def __enter__(self) -> "_Weights":
        with ExitStack() as stack:
            for file in self._paths():
                opened = stack.enter_context(self._open(file))
                for name in opened.keys():  # noqa: SIM118 - it is no dictionary
                    self._files[name.removeprefix("transformer.")] = opened, name, file
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _paths(self) -> list[Path]:
        path = self._path
        if path.is_dir():
            if (path / FILE).is_file():
                return [path / FILE]
            path = path / INDEX
            if not path.is_file():
                raise UserError(f"{shorten(self._path)}: wanted a model in Hugging Face's layout, found neither {FILE} nor {INDEX}")
        if path.suffix != ".json":
            return [path]
        index = read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise UserError(f"{shorten(path)}: wanted weight_map, from tensors to files beside it, got {as_written(shards)}")
        return [path.parent / name for name in sorted(set(shards.values()))]

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        with _answered(path):
            file_size(path)
            with open(path, "rb") as file:
                refuse_another_kind(path, file.read(LOOK_BYTES), SAFETENSORS, "give a folder of Hugging Face's, or an llm.c checkpoint")
            opened = safe_open(path, framework="np", backend="pread")  # read, not mapped: a mapped file that becomes shorter kills us
        with opened as tensors:
            yield tensors

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Return a tensor's shape. Raises UserError for one that is missing, or of another number of dimensions."""
        opened, there, path = self._find(name)
        shape = tuple(opened.get_slice(there).get_shape())
        if len(shape) != dimensions or not all(shape):
            raise UserError(f"{shorten(path)}: {there}: wanted {dimensions} dimensions, got the shape {shape}; get the file again")
        return shape

    def layers(self) -> int:
        """Return how many there are."""
        found = {int(m[1]) for name in self._files if (m := re.match(r"h\.(\d{1,4})\.", name))}
        if not found or len(found) != max(found) + 1:
            raise UserError(f"{shorten(self._path)}: wanted the layers h.0 and so on, got {sorted(found)[:5] or 'none'}; this is no GPT-2")
        return len(found)

    def read(self, name: str) -> np.ndarray:
        """Return a tensor as float32, or float16."""
        opened, there, path = self._find(name)
        with _answered(path):
            kind = opened.get_slice(there).get_dtype()
            if kind == "BF16":
                return _bfloat16(path, there)
            if kind not in ("F32", "F16"):
                raise UserError(f"{shorten(path)}: {there}: wanted float32, float16 or bfloat16, got {kind}")
            return opened.get_tensor(there)

    def verify_tied(self, wte: np.ndarray) -> None:
        """Raise UserError for a head of its own."""
        if "lm_head.weight" in self._files and not np.array_equal(self.read("lm_head.weight"), wte):
            raise UserError(f"{shorten(self._path)}: its head, lm_head.weight, is not wte; GPT-2 here has them tied")

    def refuse_others(self, known: set[str]) -> None:
        others = sorted(name for name in self._files if name not in known | {"lm_head.weight"} and not MASKS.fullmatch(name))
        if others:
            raise UserError(f"{shorten(self._path)}: {shorten(others[0])}: GPT-2 has no such tensor; this is another model")

    def _find(self, name: str) -> tuple[Any, str, Path]:
        if name not in self._files:
            raise UserError(f"{shorten(self._path)}: has no tensor {name}; this is no GPT-2, or a part of one")
        return self._files[name]


def _bfloat16(path: Path, name: str) -> np.ndarray:
    """Return a tensor that NumPy has no type for: bfloat16. The file's header is known to be right."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(length))[name]
        begin, end = about["data_offsets"]
        file.seek(8 + length + begin)
        upper = np.frombuffer(file.read(end - begin), "<u2")
    return from_bfloat16(upper).reshape(about["shape"])


@contextmanager
def _answered(path: Path) -> Iterator[None]:
    """Answer what the system, or the library, refuses inside the block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{shorten(path)}: cannot read the model: {error.strerror or error}; name one that you may read") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{shorten(path)}: damaged: {shorten(error)}; get the file again") from None
