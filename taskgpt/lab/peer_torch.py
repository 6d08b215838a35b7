"""GPT-2 in PyTorch, as PyTorch is fastest on CPUs: fused attention, fused AdamW, gradients set to None, as many threads as we have workers.

Its wheels bring Intel's MKL, which leaves AVX-512 alone on AMD processors: half of the sgemm that OpenBLAS gives us there. The vocabulary
is not padded: padding is no part of the model, and cutting it off the logits again would cost a copy.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from taskgpt.gpt2.model import GPT2, Model
from taskgpt.lab.peers import Peer


class Block(nn.Module):
    """A layer, its modules under our names."""

    def __init__(self, model: Model):
        super().__init__()
        C = model.channels
        self.heads = model.heads
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class TorchGPT2(nn.Module):
    """The model; the weight of the head is that of the token embedding."""

    def __init__(self, model: Model):
        super().__init__()
        self.wte = nn.Embedding(model.vocabulary, model.channels)
        self.wpe = nn.Embedding(model.max_seq_len, model.channels)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.lnf = nn.LayerNorm(model.channels)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.lnf(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    @torch.no_grad()
    def load(self, m: GPT2) -> None:
        """Copy our parameters: the weight of the module NAME is our tensor NAMEw, a layer of it for each block, its bias NAMEb."""
        for name, tensor in m.p.tensors.items():
            if name in ("wte", "wpe"):
                weight = getattr(self, name).weight
                weight.copy_(torch.from_numpy(tensor.array[: weight.shape[0]]))
                continue
            owners = [self] if name.startswith("lnf") else self.blocks
            for owner, array in zip(owners, tensor.array, strict=True):
                module = getattr(owner, name[:-1])
                (module.weight if name.endswith("w") else module.bias).copy_(torch.from_numpy(array))


def multiply(a: np.ndarray, weight: np.ndarray, workers: int) -> Callable[[], object]:
    """Return what computes a @ weight.T."""
    operands = torch.from_numpy(a), torch.from_numpy(weight)

    def run() -> torch.Tensor:
        with threads(workers):
            return F.linear(*operands)

    return run


def peers(m: GPT2, workers: int) -> Iterator[Peer]:
    """Yield PyTorch's ways to train; they take turns with one set of parameters."""
    shape = m.batch.batch_size, m.batch.seq_len
    tokens, targets = (torch.from_numpy(tensor.array.astype("int64")).view(shape) for tensor in (m.s.tokens, m.s.targets))
    with threads(workers):
        net = TorchGPT2(m.model)
    lr, beta1, beta2, eps, weight_decay = m.s.hyper.array[:5].tolist()
    optimizer = torch.optim.AdamW(net.parameters(), lr, (beta1, beta2), eps, weight_decay, fused=True)

    def trained(forward: Callable, bfloat16: bool) -> Callable[[], float]:
        def step() -> float:
            with threads(workers):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    loss = forward(tokens, targets)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss.item()

        return step

    for name, bfloat16 in (("float32", False), ("bfloat16 autocast", True)):
        yield Peer(f"torch eager, {name}", lambda: net.load(m), trained(net, bfloat16), not bfloat16)
        yield Peer(f"torch.compile, {name}", lambda: net.load(m), trained(torch.compile(net), bfloat16), not bfloat16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads, whatever our schedulers have told the BLAS and OpenMP of this process; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
