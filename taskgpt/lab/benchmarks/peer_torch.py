"""GPT-2 in PyTorch, as PyTorch is fastest on CPUs: fused attention, fused AdamW, gradients set to None, as many threads as we have workers.

Its wheels bring Intel's MKL, which asks who made the processor: on AMD's it leaves AVX-512 alone, unless the set-up answers for it
(`peer_setups.py`). The vocabulary is not padded: padding is no part of the model, and cutting it off the logits again costs a copy.
"""

import ctypes
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from taskgpt.lab.benchmarks.peer_process import Peer, Start, measured

VERSION = torch.__version__
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare(workers: int) -> None:
    torch.set_num_threads(workers)


def remark() -> str:
    """Say which instructions PyTorch's own kernels use, and, after a product, whether MKL took the answer of the set-up's library."""
    kernels = f"kernels for {torch.backends.cpu.get_cpu_capability()}"
    try:
        was_asked = ctypes.c_int.in_dll(ctypes.CDLL(None), "taskgpt_times_asked").value > 0
    except ValueError:  # no such library here
        return f"{kernels}, MKL as installed"
    return f"{kernels}, MKL " + ("told that this is an Intel processor" if was_asked else "did not ask for the processor")


class Block(nn.Module):
    """A layer, its modules under our names. `attention` is the type that attention computes in."""

    def __init__(self, channels: int, heads: int, attention: torch.dtype):
        super().__init__()
        C = channels
        self.heads, self.attention = heads, attention
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        y = attend(*heads_of(self.qkv(self.ln1(x)), self.heads), self.attention)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


def heads_of(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, ...]:
    """Return queries, keys and values (B, heads, T, HS) of the packed (B, T, 3C)."""
    return tuple(part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return fused causal attention, computed in `dtype` whatever autocast wants."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True).to(q.dtype)


class TorchGPT2(nn.Module):
    """The model; the weight of the head is that of the token embedding."""

    def __init__(self, start: Start):
        super().__init__()
        (V, C), max_seq_len, layers = start.parameters["wte"].shape, len(start.parameters["wpe"]), len(start.parameters["ln1w"])
        self.wte = nn.Embedding(V, C)
        self.wpe = nn.Embedding(max_seq_len, C)
        self.blocks = nn.ModuleList(Block(C, start.heads, torch.float32) for _ in range(layers))
        self.lnf = nn.LayerNorm(C)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    @torch.no_grad()
    def load(self, parameters: dict[str, np.ndarray]) -> None:
        """Copy our parameters: the weight of the module NAME is our tensor NAMEw, a layer of it for each block, its bias NAMEb."""
        for name, stacked in parameters.items():
            if name in ("wte", "wpe"):
                getattr(self, name).weight.copy_(torch.from_numpy(stacked))
                continue
            owners = [self] if name.startswith("lnf") else self.blocks
            for owner, array in zip(owners, stacked, strict=True):
                module = getattr(owner, name[:-1])
                (module.weight if name.endswith("w") else module.bias).copy_(torch.from_numpy(array))


def multiply(a: np.ndarray, weight: np.ndarray, precision: str) -> Callable[[], object]:
    """Return what computes a @ weight.T."""
    operands = [torch.from_numpy(array).to(DTYPES[precision]) for array in (a, weight)]
    return lambda: F.linear(*operands)


def peers(start: Start, precisions: list[str]) -> Iterator[Peer]:
    """Yield PyTorch's ways to train; they take turns with one set of parameters."""
    tokens, targets = torch.from_numpy(start.tokens).clone(), torch.from_numpy(start.targets).clone()
    lr, beta1, beta2, eps, weight_decay = start.hyper
    net = TorchGPT2(start)
    optimizer = torch.optim.AdamW(net.parameters(), lr, (beta1, beta2), eps, weight_decay, fused=True)

    def reset() -> None:
        net.load(start.parameters)
        optimizer.state.clear()

    def way(name: str, forward: Callable, precision: str, attention: str) -> Peer:
        def step() -> float:
            for block in net.blocks:
                block.attention = DTYPES[attention]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = forward(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return Peer(name if attention == precision else f"{name}, attention in {attention}", precision, reset, step)

    for precision in precisions:
        attention = fastest_attention(start, precision)
        yield way("torch eager", net, precision, attention)
        yield way("torch.compile", torch.compile(net, dynamic=False), precision, attention)


def fastest_attention(start: Start, precision: str) -> str:
    """Return the type in which attention is fastest, forward and backward: for bfloat16, kernels that convert may be slow."""
    (B, T), C = start.tokens.shape, start.parameters["wte"].shape[1]
    qkv = torch.ones((B, T, 3 * C), dtype=DTYPES[precision], requires_grad=True)
    q, k, v = heads_of(qkv, start.heads)

    def seconds(attention: str) -> float:
        def run() -> None:
            attend(q, k, v, DTYPES[attention]).sum().backward(retain_graph=True)

        run()
        return median(measured(run)["seconds"] for _ in range(5))

    return min(dict.fromkeys((precision, "float32")), key=seconds)
