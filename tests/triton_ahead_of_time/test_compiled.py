"""What the launcher would run on each target, compiled without it: registers, shared memory, tensor cores.

The whole forward runs on meta tensors up to the launch, so that the specialised kernel is the one that a GPU would get.
Each gate is a fact about the binary. That it is fast or right on hardware is not proved here.
"""

import contextlib
import io
import re
from dataclasses import dataclass, replace

import pytest
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from translution.backends.triton import assembly, launch, operation
from translution.backends.triton.targets import Blocks, Target, blocks_for
from translution.inputs import Inputs
from translution.normal_form import normal_form
from translution.spec import presets as p


@dataclass(frozen=True)
class Chip:
    """``shared`` is the shared memory (LDS) that one block may use, in bytes."""

    target: GPUTarget
    shared: int


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Driver:
    """A chip that is not there. JITFunction keeps one binary per device number, so each chip has its own."""

    def __init__(self, chip):
        self.chip = chip

    def get_current_target(self):
        return CHIPS[self.chip].target

    def get_current_device(self):
        return list(CHIPS).index(self.chip)

    def get_current_stream(self, device=None):
        return 0


@dataclass(frozen=True)
class Binary:
    """``scratch`` is what spills to memory, in bytes; ``loads`` the global loads that a thread awaits, if counted."""

    chip: str
    registers: int
    scratch: int
    shared: int
    tensor_core: int
    asynchronous: int
    loads: int | None
    serialised: bool

    def faults(self, *, tensor_core: bool = True, asynchronous: bool = True) -> list[str]:
        """Every gate that this binary does not pass."""
        limit = CHIPS[self.chip].shared
        found = [f"{self.scratch} bytes of scratch"] if self.scratch else []
        found += [f"{self.shared} bytes of shared memory, the limit is {limit}"] if self.shared > limit else []
        found += ["no tensor-core instruction"] if tensor_core and not self.tensor_core else []
        found += ["tensor-core instructions wait for one another"] if self.serialised else []
        if asynchronous and self.loads is not None and (self.loads or not self.asynchronous):
            found.append(f"{self.loads} loads wait, {self.asynchronous} do not")
        return found

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.scratch} B scratch, {self.shared} B shared, "
            f"{self.tensor_core} tensor-core, {self.asynchronous} asynchronous and {self.loads} waiting loads"
        )


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def total(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def binary(chip: str, kernel, log: str) -> Binary:
    shared = kernel.metadata.shared
    if CHIPS[chip].target.backend == "hip":
        text = kernel.asm["amdgcn"]
        spilled = total(r"\.private_segment_fixed_size: +(\d+)", text) + total(r"vgpr_spill_count: +(\d+)", text)
        return Binary(
            chip, total(r"\.vgpr_count: +(\d+)", text), spilled, shared, count("v_mfma", text), 0, None, False
        )
    assert "Used" in log, log
    text = kernel.asm["ptx"]
    return Binary(
        chip,
        total(r"Used (\d+) registers", log),
        total(r"(\d+) bytes stack frame", log) + total(r"(\d+) bytes spill stores", log),
        shared,
        count(r"(?<!wg)mma\.sync", text) + count(r"wgmma\.mma_async", text),
        count(r"cp\.async\.c[ag]", text),
        count(r"ld\.global", text),
        "serializ" in log.lower(),
    )


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile an operator's only launch for a chip."""
    monkeypatch.setattr(knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))  # a cached kernel has no log
    kernel, found = launch.fused_forward_kernel, []

    class Warm:
        def __getitem__(self, grid):
            return lambda *args, **options: found.append(kernel.warmup(*args, grid=grid, **options))

    def compiled(operator, chip, dtype, *, batch=64, masked=False, blocks: Blocks | None = None) -> Binary:
        target = CHIPS[chip].target
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(chip))
        monkeypatch.setattr(launch, "fused_forward_kernel", Warm())
        wanted = Target(target.backend, target.arch if target.backend == "cuda" else 0)

        def fused_forward(*args):
            operands = operation.operands_of(*args)
            results = operation.results_of(operands)
            launch.launch(operands, *results, wanted, blocks)
            return results

        monkeypatch.setattr(assembly, "fused_forward", fused_forward)
        meta = lambda *shape, kind=dtype: torch.empty(shape, dtype=kind, device="meta")  # noqa: E731
        params = {name: meta(*shape) for name, shape in operator.parameters.items()}
        x = meta(batch, operator.layout.num_queries, operator.dim)
        mask = meta(batch, 1, 1, operator.layout.num_keys, kind=torch.bool) if masked else None
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            assembly.forward(normal_form(operator), params, Inputs(x, x, mask, (batch,)))
        return binary(chip, found.pop(), log.getvalue())

    return compiled


FULL = p.translution((14, 14), 384, 6, registers=1)
CASES = {
    "full C=192 float16": (p.translution((14, 14), 192, 3), torch.float16, {}),
    "full C=384 bfloat16": (FULL, torch.bfloat16, {}),
    "causal C=384 bfloat16, one item, mask": (
        p.translution((256,), 384, 6, causal=True),
        torch.bfloat16,
        {"batch": 1, "masked": True},
    ),
    "alpha C=384 bfloat16": (p.alpha_translution((14, 14), 384, 6), torch.bfloat16, {}),
    "convolution C=384 float16": (p.convolution((14, 14), 384, 384, 3, padding=1, bias=False), torch.float16, {}),
    "full C=384 float32": (FULL, torch.float32, {}),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", CASES)
def test_the_launched_kernel_passes_every_gate(name, chip, compiled, record_property):
    operator, dtype, more = CASES[name]
    found = compiled(operator, chip, dtype, **more)
    record_property("binary", str(found))
    # Alpha's shared parts are elementwise and a mask is one number per row; products of tables are what must not wait.
    # NVIDIA has no tensor cores for float32 with float32's precision.
    asynchronous = "alpha" not in name and "mask" not in name
    assert found.faults(tensor_core=dtype != torch.float32 or chip == "gfx942", asynchronous=asynchronous) == []


@pytest.mark.parametrize(
    ("chip", "change", "fault"),
    [
        ("sm_90", {"rows": 128, "warps": 4}, "scratch"),
        ("gfx942", {"rows": 128, "channels": 128, "warps": 8, "stages": 4}, "shared memory"),
        ("gfx942", {"warps": 1}, "scratch"),
    ],
)
def test_a_bad_configuration_is_rejected(chip, change, fault, compiled):
    target = CHIPS[chip].target
    good = blocks_for(Target(target.backend, target.arch if target.backend == "cuda" else 0), 2)
    found = compiled(FULL, chip, torch.bfloat16, blocks=replace(good, **change))
    assert any(fault in text for text in found.faults())


def test_each_gate_can_fail():
    good = Binary("sm_80", 100, 0, 1000, 4, 4, 0, False)
    assert good.faults() == []
    bad = replace(good, scratch=4, shared=2**18, tensor_core=0, asynchronous=0, loads=3, serialised=True)
    assert len(bad.faults()) == 5
