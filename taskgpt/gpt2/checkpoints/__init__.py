"""A model's parameters in files, of whichever kind: llm.c's (llmc.py), Hugging Face's (huggingface.py), or a run's own (resumable.py).

    model = checkpoints.read_shape(path)         # from the header alone, once the file is known to be whole
    checkpoints.load(path, model, parameters)    # parameters: name and array of each, as `GPT2.parameters` has them
    checkpoints.save(path, model, parameters)    # name.bin: llm.c's; a folder: Hugging Face's

What a path names is told by what is there, or, where a file is to be made, by its name. The names of OpenAI's models, where nothing here
has them, are downloads (hub.py). A run's own checkpoints hold more than parameters, and a run alone makes them.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.gpt2.checkpoints import hub, huggingface, llmc, resumable
from taskgpt.gpt2.shape import Model

Parameters = Mapping[str, np.ndarray]


def read_shape(path: str | Path) -> Model:
    """Return the shape of a checkpoint's model, downloading it first if it is one of OpenAI's, by name, that is not here.

    Raises UserError for what is no checkpoint, truncated, or of another model than GPT-2, or cannot be downloaded.
    """
    path = hub.located(path)
    return _kind(path).read_shape(path)


def empty(model: Model) -> dict[str, np.ndarray]:
    """Return room for the parameters, to be filled."""
    return {name: np.empty(shape, np.float32) for name, shape in model.parameter_shapes().items()}


def load(path: str | Path, model: Model, parameters: Parameters) -> None:
    """Fill the parameters from a checkpoint of the model's shape. Raises UserError as `read_shape` does."""
    path = hub.located(path)
    _kind(path).load(path, model, parameters)


def save(path: str | Path, model: Model, parameters: Parameters) -> None:
    """Write the parameters; they appear whole or not at all. Raises UserError if they cannot be written."""
    _kind_by_name(path).save(path, model, parameters)


def verify_can_save(path: str | Path, model: Model, nbytes: int) -> None:
    """Raise UserError if `save` of so many bytes could not succeed now: better before the work than after it."""
    if model.norm != "layernorm":
        raise UserError(f"{shorten(path)}: checkpoints hold GPT-2's LayerNorm alone, and this model has {model.norm}")
    _kind_by_name(path).verify_can_save(path, nbytes)


def is_finite(parameters: Parameters) -> bool:
    """Return False if a parameter is infinite or not a number."""
    return all(np.isfinite([array.min(), array.max()]).all() for array in parameters.values())


def _kind(path: str | Path) -> ModuleType:
    if str(path) != "" and resumable.is_one(path):
        return resumable
    is_folder = str(path) != "" and Path(path).is_dir()  # an empty name is no name of the folder that one is in
    return huggingface if is_folder or Path(path).suffix in (".safetensors", ".json") else llmc


def _kind_by_name(path: str | Path) -> ModuleType:
    return llmc if Path(path).suffix == ".bin" or str(path) == "" else huggingface
