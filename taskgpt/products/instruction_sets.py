"""What this machine's vector instructions are, and the register tile that fills them."""

from functools import cache
from typing import NamedTuple

from llvmlite import binding


class InstructionSet(NamedTuple):
    """Vector instructions, and the register tile: how many sums of an output matrix they keep at a time, `rows` x `columns`.

    The tile must hide the latency of a fused multiply-add (more sums in flight than it takes cycles, times the units that add), and leave
    registers for VECTORS of B and one of A.
    """

    name: str
    lanes: int  # float32 in a register
    rows: int
    has_bf16: bool = False  # has an instruction for two products of bfloat16 and their sum in float32

    @property
    def columns(self) -> int:
        return VECTORS * self.lanes

    def __str__(self) -> str:
        return f"{self.name}, {self.rows}x{self.columns}"


VECTORS = 3  # registers in a row of the tile
AVX512 = InstructionSet("avx512", 16, 8)  # 24 of 32 registers
AVX512_BF16 = InstructionSet("avx512 with bf16", 16, 8, has_bf16=True)
AVX2 = InstructionSet("avx2", 8, 4)  # 12 of 16 registers
NEON = InstructionSet("neon", 4, 8)  # 24 of 32 registers


def instruction_set_for(features: dict[str, bool], processor: str) -> InstructionSet | None:
    """Return the best set for a processor with these features, in LLVM's names; None if there is none to be had."""
    if processor.startswith(("aarch64", "arm64")):
        return NEON  # part of every 64-bit ARM
    if features.get("avx512f"):
        return AVX512_BF16 if features.get("avx512bf16") and features.get("avx512bw") else AVX512
    return AVX2 if features.get("avx2") and features.get("fma") else None


@cache
def of_this_machine() -> InstructionSet | None:
    """Return the best set of this machine, None if it has none that products are written for."""
    return instruction_set_for(binding.get_host_cpu_features(), binding.get_process_triple())
