"""The processor at hand, as far as kernels depend on it, and what LLVM makes of them."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count

import llvmlite.binding as llvm
from llvmlite import ir


@dataclass(frozen=True, slots=True)
class Processor:
    """``lanes``: float32 numbers of a vector register. ``registers``: how many there are."""

    lanes: int
    registers: int


@cache
def processor() -> Processor | None:
    """The processor at hand; None where kernels are not made for its kind."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    has = llvm.get_host_cpu_features()
    if has.get("avx512f"):
        return Processor(16, 32)
    if has.get("avx2") and has.get("fma"):
        return Processor(8, 16)
    if platform.machine() in ("aarch64", "arm64"):
        return Processor(4, 32)
    return None


@cache
def _machine() -> llvm.TargetMachine:
    target = llvm.Target.from_default_triple()
    features = llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)


@cache
def _linker() -> llvm.LLJIT:
    return llvm.create_lljit_compiler(_machine())


# A few passes do what kernels need: variables in registers, an address once. LLVM's choice takes five times as long.
_SIMPLER = "simplify_cfg", "instruction_combine"
_PASSES = ("sroa", *_SIMPLER, "loop_rotate", "new_gvn", *_SIMPLER)


# Two threads may compile the same at a time; names have to differ.
_NUMBERS = count()


class Compiled:
    """The functions of a module in machine code, by name, as addresses. They are there as long as this is."""

    def __init__(self, module: ir.Module, names: Sequence[str]) -> None:
        machine = _machine()
        parsed = llvm.parse_assembly(str(module))
        parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
        passes = llvm.create_new_module_pass_manager()
        for name in _PASSES:
            getattr(passes, f"add_{name}_pass")()
        passes.run(parsed, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
        library = llvm.JITLibraryBuilder().add_ir(parsed)
        for name in names:
            library.export_symbol(name)
        self._linked = library.link(_linker(), f"{module.name} {next(_NUMBERS)}")
        self.addresses = {name: self._linked[name] for name in names}
