"""What the launchers would run on each target, compiled without it: registers, shared memory, tensor cores.

Forward and backward run on meta tensors up to the launches, so that the specialised kernels are those that a GPU would
get. Each gate is a fact about a binary. That it is fast or right on hardware is not proved here.
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

from translution.backends.triton import assembly, gradient_kernels, launch, operation
from translution.backends.triton.gradients import NAMES, Cotangents, gradients
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
    """``scratch`` is what spills to memory, in bytes; ``loads`` the global loads that a thread awaits, if counted, and
    ``exposed`` those of whole tiles that go to shared memory before any product begins, so that nothing hides them.
    """

    chip: str
    registers: int
    scratch: int
    shared: int
    tensor_core: int
    asynchronous: int
    loads: int | None
    exposed: int
    serialised: bool

    def faults(self, *, tensor_core: bool = True, asynchronous: bool = True, waiting: bool = False) -> list[str]:
        """Every gate that this binary does not pass. ``waiting``: loads may wait, if a product hides each tile's."""
        limit = CHIPS[self.chip].shared
        found = [f"{self.scratch} bytes of scratch"] if self.scratch else []
        found += [f"{self.shared} bytes of shared memory, the limit is {limit}"] if self.shared > limit else []
        found += ["no tensor-core instruction"] if tensor_core and not self.tensor_core else []
        found += ["tensor-core instructions wait for one another"] if self.serialised else []
        waits = self.exposed if waiting else self.loads
        if asynchronous and self.loads is not None and (waits or not self.asynchronous):
            found.append(f"{waits} loads wait, {self.asynchronous} do not")
        return found

    def __str__(self) -> str:
        return (
            f"{self.registers} registers, {self.scratch} B scratch, {self.shared} B shared, "
            f"{self.tensor_core} tensor-core, {self.asynchronous} asynchronous and {self.loads} waiting loads, "
            f"{self.exposed} exposed"
        )


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def total(pattern: str, text: str) -> int:
    return sum(map(int, re.findall(pattern, text)))


def exposed(ptx: str) -> int:
    """Loads of more than one number a thread that are stored to shared memory with no product in between."""
    found = pending = 0
    for word in re.findall(r"ld\.global\.v\d|st\.shared|mma\.sync|wgmma\.mma_async", ptx):
        if word.startswith("ld"):
            pending += 1
        else:
            found, pending = found + pending * (word == "st.shared"), 0
    return found


def binary(chip: str, kernel, log: str) -> Binary:
    shared = kernel.metadata.shared
    if CHIPS[chip].target.backend == "hip":
        text = kernel.asm["amdgcn"]
        spilled = total(r"\.private_segment_fixed_size: +(\d+)", text) + total(r"vgpr_spill_count: +(\d+)", text)
        return Binary(
            chip, total(r"\.vgpr_count: +(\d+)", text), spilled, shared, count("v_mfma", text), 0, None, 0, False
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
        exposed(text),
        "serializ" in log.lower(),
    )


BACKWARD = ("weights_kernel", "d_logits_kernel", "owners_kernel", "tables_kernel", "bias_kernel")


def label(kernel: str, options) -> str:
    """A kernel's name, and the operand whose gradient it is."""
    name = kernel.removesuffix("_kernel")
    if name not in ("owners", "tables"):
        return name
    side = "query" if options["OWN_QUERY"] else "key" if options["KEY_TABLE"] else "value"
    return f"{name}, {side}" if options.get("TOKENS", True) else f"{name}, {side} static"


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Compile an operator's launches for a chip: those of the forward, or of the backward."""
    monkeypatch.setattr(knobs.nvidia, "dump_ptxas_log", True)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))  # a cached kernel has no log
    found = {}

    class Warm:
        def __init__(self, module, name, chip):
            self.kernel, self.name, self.chip = genuine[name], name, chip
            monkeypatch.setattr(module, name, self)

        def __getitem__(self, grid):
            def warm(*args, **options):
                log = io.StringIO()
                with contextlib.redirect_stdout(log):
                    kernel = self.kernel.warmup(*args, grid=grid, **options)
                found[label(self.name, options)] = binary(self.chip, kernel, log.getvalue())

            return warm

    genuine = {name: getattr(gradient_kernels, name) for name in BACKWARD}
    genuine["fused_forward_kernel"] = launch.fused_forward_kernel

    def compiled(
        operator, chip, dtype, *, batch=64, masked=False, blocks: Blocks | None = None, only=NAMES, backward=False
    ) -> dict[str, Binary]:
        target = CHIPS[chip].target
        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(chip))
        for name in genuine:
            Warm(launch if name == "fused_forward_kernel" else gradient_kernels, name, chip)
        wanted = Target(target.backend, target.arch if target.backend == "cuda" else 0)

        def fused_forward(*args):
            operands = operation.operands_of(*args)
            results = operation.results_of(operands)
            if backward:
                static, relative, highest, total = results
                needed = frozenset(n for n in only if n != "mask" and getattr(operands, n) is not None)
                gradients(operands, Cotangents(static, relative, highest, total, total), needed, wanted, blocks)
            else:
                launch.launch(operands, *results, wanted, blocks)
            return results

        monkeypatch.setattr(assembly, "fused_forward", fused_forward)
        meta = lambda *shape, kind=dtype: torch.empty(shape, dtype=kind, device="meta")  # noqa: E731
        params = {name: meta(*shape) for name, shape in operator.parameters.items()}
        x = meta(batch, operator.layout.num_queries, operator.dim)
        mask = meta(batch, 1, 1, operator.layout.num_keys, kind=torch.bool) if masked else None
        assembly.forward(normal_form(operator), params, Inputs(x, x, mask, (batch,)))
        return found

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
    "full C=768 bfloat16": (p.translution((14, 14), 768, 12), torch.bfloat16, {}),
    "full C=384 float32": (FULL, torch.float32, {}),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", CASES)
def test_the_launched_kernel_passes_every_gate(name, chip, compiled, record_property):
    operator, dtype, more = CASES[name]
    (found,) = compiled(operator, chip, dtype, **more).values()
    record_property("binary", str(found))
    # Alpha's shared parts are elementwise and a mask is one number per row; products of tables are what must not wait.
    # NVIDIA has no tensor cores for float32 with float32's precision.
    asynchronous = "alpha" not in name and "mask" not in name
    assert found.faults(tensor_core=dtype != torch.float32 or chip == "gfx942", asynchronous=asynchronous) == []


GRADIENTS = {
    f"full C={dim} bfloat16": (p.translution((14, 14), dim, dim // 64), torch.bfloat16) for dim in (192, 384, 768)
}
GRADIENTS |= {
    "swin C=384 float16": (p.swin_attention((7, 7), 384, 6), torch.float16),
    "full C=384 float32": (FULL, torch.float32),
}


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_launched_backward_kernels_pass_every_gate(name, chip, compiled, record_property):
    operator, dtype = GRADIENTS[name]
    full = name.startswith("full")
    found = compiled(operator, chip, dtype, backward=True)
    sides = ("query", "key", "value")
    each = {f"{kernel}, {side}" for kernel in ("owners", "tables") for side in sides}
    assert found.keys() == {"weights", "d_logits"} | (
        each if full else {*(f"owners, {s} static" for s in sides), "bias"}
    )
    for kernel, own in found.items():
        record_property(kernel, str(own))
        # Static features are elementwise work, a sum of a bias too. A matrix that is met once a displacement is asked
        # for ahead of a loop of products whose own loads are asynchronous; only the values' kernels have no such loop.
        halves = dtype != torch.float32
        faults = own.faults(
            tensor_core=full and (halves or chip == "gfx942"),
            asynchronous=full and halves,
            waiting="value" not in kernel,
        )
        assert faults == [], kernel


@pytest.mark.parametrize(
    ("chip", "kernel", "change", "fault"),
    [
        ("sm_90", "forward", {"rows": 128, "warps": 4}, "scratch"),
        ("gfx942", "forward", {"rows": 128, "channels": 128, "warps": 8, "stages": 4}, "shared memory"),
        ("gfx942", "forward", {"warps": 1}, "scratch"),
        ("sm_90", "owners", {"results": 256, "warps": 4}, "scratch"),
        ("sm_80", "tables", {"rows": 128, "channels": 128, "results": 256, "stages": 4}, "shared memory"),
        ("sm_90", "tables", {"turned": True}, "wait for one another"),
    ],
)
def test_a_bad_configuration_is_rejected(chip, kernel, change, fault, compiled):
    target = CHIPS[chip].target
    good = blocks_for(Target(target.backend, target.arch if target.backend == "cuda" else 0), 2, kernel)
    only = {"owners": ("q_tokens",), "tables": ("v_table",)}.get(kernel, ())
    found = compiled(
        FULL, chip, torch.bfloat16, blocks=replace(good, **change), only=only, backward=kernel != "forward"
    )
    (own,) = (one for name, one in found.items() if name.startswith((kernel, "fused")))
    assert any(fault in text for text in own.faults())


def test_exposed_loads_are_told_from_hidden_ones():
    load, store, product = "ld.global.v4.b32 {%r1}", "st.shared.v4.b32 [%r2]", "wgmma.mma_async.sync.aligned"
    assert exposed(f"{load} {load} {product} {store}") == 0
    assert exposed(f"{product} {load} {load} {store} {product}") == 2
    assert exposed(f"ld.global.b32 {{%r2}} {store}") == 0


def test_each_gate_can_fail():
    good = Binary("sm_80", 100, 0, 1000, 4, 4, 0, 0, False)
    assert good.faults() == []
    bad = replace(good, scratch=4, shared=2**18, tensor_core=0, asynchronous=0, loads=3, serialised=True)
    assert len(bad.faults()) == 5
    waiting = replace(good, loads=3)
    assert waiting.faults()
    assert waiting.faults(waiting=True) == []
    assert replace(waiting, exposed=1).faults(waiting=True)
