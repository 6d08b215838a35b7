"""Tables about GPT-2 that are made from the code when the documentation is built, so that they cannot say anything else.

    {gpt2-tensors} p           the tensors of an arena: shape, meaning, grid
    {gpt2-kernels}             every kernel with its declaration and formula
    {gpt2-tasks} forward 0     the tasks of a phase and layer: for each kernel how many, what one costs, the first one as it is recorded

A tensor without a line in MEANING fails the build. Numbers are those of the graph gpt2-124m.
"""

import dataclasses
import inspect
from functools import cache

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from taskgpt.config import load_graph
from taskgpt.gpt2.gradients import WINDOW
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import loss_graph, training_graph
from taskgpt.gpt2.shape import Batch, MicroBatch, Model
from taskgpt.tasks import Graph, Kernel

# A shape whose sizes are all different, so that a number tells which size it is.
L, NH, C, V, B, T, MAX_T = 5, 3, 33, 300, 13, 17, 19
SIZES = {
    1: "1",
    2: "2",
    7: "7",
    WINDOW: str(WINDOW),
    L: "L",
    NH: "NH",
    C: "C",
    3 * C: "3C",
    4 * C: "4C",
    384: "Vp",
    B * T: "R",
    MAX_T: "max T",
}

MEANING = {
    "wte": "embedding of each token; also the weight of the classifier (they are one tensor)",
    "wpe": "embedding of each position",
    "ln1w": "LayerNorm before attention: weight",
    "ln1b": "LayerNorm before attention: bias",
    "qkvw": "linear layer that makes queries, keys and values: weight",
    "qkvb": "the same layer: bias",
    "attprojw": "linear layer after attention: weight",
    "attprojb": "the same layer: bias",
    "ln2w": "LayerNorm before the MLP: weight",
    "ln2b": "LayerNorm before the MLP: bias",
    "fcw": "first linear layer of the MLP: weight",
    "fcb": "the same layer: bias",
    "fcprojw": "second linear layer of the MLP: weight",
    "fcprojb": "the same layer: bias",
    "lnfw": "LayerNorm after the last layer: weight",
    "lnfb": "LayerNorm after the last layer: bias",
    "encoded": "token embedding plus position embedding: the residual stream as it enters layer 0",
    "ln1": "normalized input of attention",
    "ln1_mean": "mean of each row that the first LayerNorm met",
    "ln1_rstd": "1 / standard deviation of each of these rows",
    "qkv": "queries, keys and values, side by side",
    "atty": "output of attention, all heads side by side",
    "att_max": "largest attention score of each row and head",
    "att_rsum": "1 / sum of exp(score - largest) of each row and head",
    "attproj": 'output of the linear layer after attention; only with `kernels = "separate"`',
    "residual2": "the residual stream after attention",
    "ln2": "normalized input of the MLP",
    "ln2_mean": "mean of each row that the second LayerNorm met",
    "ln2_rstd": "1 / standard deviation of each of these rows",
    "fch": "output of the MLP's first layer, before GELU",
    "fch_gelu": "GELU of it",
    "fcproj": 'output of the MLP\'s second layer; only with `kernels = "separate"`',
    "residual3": "the residual stream after the MLP: what leaves the layer",
    "lnf": "normalized output of the last layer",
    "lnf_mean": "mean of each row that the last LayerNorm met",
    "lnf_rstd": "1 / standard deviation of each of these rows",
    "logits": "one number for each row and vocabulary entry; later their gradient, in the same place",
    "logits_max": "largest logit of each row",
    "logits_rsum": "1 / sum of exp(logit - largest) of each row",
    "losses": "cross-entropy of each row",
    "dlnf": "gradient of `lnf`",
    "dresidual3": "gradient of the residual stream as it leaves a layer",
    "dfch": "gradient of `fch`",
    "dln2": "gradient of `ln2`",
    "dresidual2": "gradient of the residual stream after attention",
    "datty": "gradient of `atty`",
    "dqkv": "gradient of `qkv`",
    "dln1": "gradient of `ln1`",
    "tokens": "the ids of the input tokens (int32)",
    "targets": "the ids of the tokens that come next (int32)",
    "hyper": "learning rate, beta1, beta2, eps, weight decay, 1 - beta1^t, 1 - beta2^t",
    "loss": "the mean of `losses`; of a step in micro-batches, that of theirs",
    "squares": "the sum of squares of each part of the gradient that one task has (float64)",
    "norm": "the norm of the gradient of all parameters",
    "scale": "only if updates wait for `norm`: what they multiply the gradient by; 0: nothing is updated",
    "verdict": "only then. 0: updated; 1, 2: not, as the loss, the norm is an outlier; 3: not, as one of them is no finite number (int32)",
    "z": "only if outliers are looked for: z-scores of loss and norm (float64)",
    "loss_window": "the last losses (float64)",
    "norm_window": "the last norms of the gradient (float64)",
    "seen": "how many values each window has been given (int64)",
    "loss_sum": "only of a step in micro-batches: the sum of the losses of the micro-batches so far (float64)",
}


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("gpt2-tensors", Tensors)
    app.add_directive("gpt2-kernels", Kernels)
    app.add_directive("gpt2-tasks", Tasks)
    return {"parallel_read_safe": True}


@cache
def model(kernels: str = "fused", update: str = "fused", has_all: bool = False, is_symbolic: bool = False) -> GPT2:
    """Return GPT-2 124M, of whose memory nothing is touched; or one whose sizes tell their names. has_all: whatever needs tensors is on."""
    config = load_graph("gpt2-124m")
    options = dataclasses.replace(config.options, kernels=kernels, update=update)
    if has_all:
        options = dataclasses.replace(options, clip_norm=1.0, skip_loss_z=6.0)
    accumulate = 2 if has_all else 1
    if is_symbolic:
        return GPT2(Model(L, NH, C, V, MAX_T), Batch(B, T, accumulate), config.tiles, options)
    return GPT2(config.model, dataclasses.replace(config.batch, accumulate=accumulate), config.tiles, options)


@cache
def graph(kernels: str = "fused", update: str = "fused") -> Graph:
    return training_graph(model(kernels, update))


def table(head: str, rows: list[list[str]]) -> str:
    lines = [head, "|".join(["", *[":--"] * len(rows[0]), ""]), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


class Made(SphinxDirective):
    """A directive whose content is Markdown that `made` returns."""

    optional_arguments = 2

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.made())

    def made(self) -> str:
        raise NotImplementedError


class Tensors(Made):
    def made(self) -> str:
        [arena] = self.arguments
        ways = ("separate", "separate") if arena == "a" else ("fused", "fused")
        models = [model(*ways, arena in ("a", "s", "w"), is_symbolic) for is_symbolic in (False, True)]
        here, named = (getattr(each, arena).tensors for each in models)
        sizes = SIZES | {models[1].grid.square_places[""]: "parts"}
        rows = []
        for name, tensor in here.items():
            shape = ", ".join(sizes[n] for n in named[name].array.shape)
            grid = " x ".join(map(str, tensor.grid))
            rows.append([f"`{name}`", f"({shape})", " x ".join(map(str, tensor.array.shape)), grid, MEANING[name]])
        return table("| tensor | shape | gpt2-124m | cells | what it holds |", rows)


class Kernels(Made):
    def made(self) -> str:
        graphs = [graph(), graph("separate", "separate"), loss_graph(model()), training_graph(in_blocks())]
        graphs += [training_graph(clipped()), training_graph(model(has_all=True), 0, MicroBatch(is_first=False))]
        kernels = dict.fromkeys(kernel for each in graphs for kernel in each.kernels)
        rows = [[f"`{k.name}`", declaration(k), inspect.getdoc(k.body).partition("\n\n")[0]] for k in kernels]
        return table("| kernel | declares | computes |", [[escaped(word) for word in row] for row in rows])


class Tasks(Made):
    def made(self) -> str:
        phase, layer = self.arguments
        tasks = [task for task in graph().tasks if task.section == (phase, int(layer))]
        groups: dict[tuple[str, str], list] = {}
        for task in tasks:
            written = next(tile for name, tile in task.calls[0].tiles() if task.calls[0].kernel.accesses[name].is_written)
            groups.setdefault((task.name, written.tensor.name), []).append(task)
        rows = [[str(len(of)), f"{of[0].flops / 1e6:,.4g}", f"{of[0].bytes / 1e6:,.3g}", f"`{of[0].calls[0]}`"] for of in groups.values()]
        return table("| tasks | MFLOP each | MB each | the first of them |", rows)


def clipped() -> GPT2:
    """Return the model whose gradient is clipped."""
    config = load_graph("gpt2-124m", {"options.clip_norm": 1.0})
    return GPT2(config.model, config.batch, config.tiles, config.options)


def in_blocks() -> GPT2:
    """Return the model with logits in blocks of rows, which takes two kernels more."""
    config = load_graph("gpt2-124m", {"tiles.logits_rows": 64})
    return GPT2(config.model, config.batch, config.tiles, config.options)


def declaration(kernel: Kernel) -> str:
    words = {name: f"{a.kind} {name}[{', '.join(map(str, a.dims))}]" for name, a in (kernel.accesses | kernel.scratch).items()}
    return ", ".join(f"`{word}`" for word in words.values())


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
