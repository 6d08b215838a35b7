"""Convert a model from one file format into another: llm.c's and Hugging Face's.

taskgpt convert gpt2_124M.bin gpt2                # llm.c's file to a folder that transformers loads
taskgpt convert gpt2 gpt2_124M.bin                # and back
taskgpt convert gpt2-medium gpt2_355M.bin         # OpenAI's weights, downloaded once, if there is no such folder
taskgpt convert gpt2/model.safetensors model.bin

A name that ends in .bin is a file of llm.c's, version 3, float32; any other a folder with config.json and model.safetensors. What is read
may also be bfloat16, float16, or several files with an index. Pickles, such as nanoGPT's ckpt.pt, are never loaded.
"""

import sys
from collections.abc import Sequence

from taskgpt.errors import run_program, shorten
from taskgpt.gpt2 import checkpoints
from taskgpt.lab.machine import verify_memory
from taskgpt.programs.arguments import MODEL_HELP, Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""

    def run() -> int:
        p = Parser("taskgpt convert", __doc__)
        p.add_argument("source", metavar="FROM", help=MODEL_HELP)
        p.add_argument("target", metavar="TO", help="name.bin for llm.c's format, a folder for Hugging Face's")
        flags = p.parse_args(argv)
        print(convert(flags.source, flags.target))
        return 0

    return run_program("taskgpt convert", run)


def convert(source: str, target: str) -> str:
    """Convert a model; return a line that says what it is. Raises UserError."""
    model = checkpoints.read_shape(source)
    parameters = checkpoints.empty(model)  # which takes no memory before it is filled
    nbytes = sum(array.nbytes for array in parameters.values())
    checkpoints.verify_can_save(target, model, nbytes)
    verify_memory(shorten(source), "converting", 2 * nbytes)  # once as ours, once as what is written
    checkpoints.load(source, model, parameters)
    checkpoints.save(target, model, parameters)
    shape = f"L {model.layers}, NH {model.heads}, C {model.channels}, V {model.vocabulary}, T at most {model.max_seq_len}"
    return f"{shorten(target)}: {model.parameter_count():,} parameters, {shape}"


if __name__ == "__main__":
    sys.exit(main())
