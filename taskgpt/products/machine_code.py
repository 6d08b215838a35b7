"""The micro-kernels of this machine as functions that compiled code can call: made when something that multiplies is compiled or loaded.

Their names carry a digest of what they were made from, so that compiled kernels, which are kept on disk with these names in them, never
call other code than they were compiled for.
"""

import hashlib
from functools import cache

from llvmlite import binding, ir
from numba import types

from taskgpt.products.instruction_sets import VECTORS, InstructionSet, of_this_machine
from taskgpt.products.micro_kernels import BFLOAT16, FLOAT32, copy_row, copy_rows, micro_kernel, transpose

_kept: list[binding.ExecutionEngine] = []  # as long as the process lives: compiled code calls what is in it


def module_for(instructions: InstructionSet) -> ir.Module:
    """Return all functions for an instruction set, each under the name that `MachineCode.external` takes."""
    module = ir.Module("taskgpt_products")
    for precision in (FLOAT32, BFLOAT16):
        for vectors in range(1, VECTORS + 1):
            micro_kernel(module, f"multiply_{precision}_{vectors}", instructions, vectors, precision)
            copy_rows(module, f"copy_{precision}_{vectors}", instructions, vectors, precision)
        transpose(module, f"transpose_{precision}", instructions, precision)
        copy_row(module, f"copy_row_{precision}", instructions, precision)
    return module


def features_for(processor: str, features: str) -> str:
    """Return what LLVM is to know of a processor's features: vectors of 512 bits are meant, also where it would rather take two of 256."""
    return features + ",-prefer-256-bit" if processor.startswith("x86") else features  # others it would name as unknown, on stderr


class MachineCode:
    """The functions of `module_for`, compiled for this machine, which must have the instructions.

    `symbols`: the name of each function as compiled code knows it.
    """

    def __init__(self, instructions: InstructionSet):
        self.instructions = instructions
        module = module_for(instructions)
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        target = binding.Target.from_default_triple()
        features = features_for(binding.get_process_triple(), binding.get_host_cpu_features().flatten())
        target_machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)
        names = [function.name for function in module.functions if not function.is_declaration]
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        digest = hashlib.sha256(repr((str(module), binding.llvm_version_info)).encode()).hexdigest()[:16]
        engine = binding.create_mcjit_compiler(parsed, target_machine)
        engine.finalize_object()
        _kept.append(engine)
        self.symbols = {name: f"taskgpt_{name}_{digest}" for name in names}
        for name, symbol in self.symbols.items():
            binding.add_symbol(symbol, engine.get_function_address(name))

    def external(self, name: str, arguments: int) -> types.ExternalFunction:
        """Return a function of so many int64 arguments, to be called in compiled code."""
        return types.ExternalFunction(self.symbols[name], types.void(*[types.int64] * arguments))


@cache
def code_of_this_machine() -> MachineCode | None:
    """Return the functions for the best instructions of this machine, None if it has none that products are written for."""
    instructions = of_this_machine()
    return MachineCode(instructions) if instructions else None
