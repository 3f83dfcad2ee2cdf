"""Right results with wrong conduct: state, memory, randomness (clauses B3, B4 and D1)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from translution.algorithms import Request
from translution.conformance.mutants.boundary_mutants import only
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Links
from translution.inputs import Inputs
from translution.spec import Layout, Operator

Result = tuple[Tensor, Tensor | None]


def _own_tokens(inputs: Inputs) -> Tensor:
    """x, or y where x is a stand-in (R7); without its graph."""
    tokens: Tensor = inputs.y if 0 in inputs.x.stride() else inputs.x
    return tokens.detach()


@mutant("writes-input", "adds 1 to its tokens after computing", clause="B4", visible=False)
class WritesInput(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        found = super().forward(request, algorithm, params, inputs)
        tokens = _own_tokens(inputs)
        if 0 not in tokens.stride():
            tokens.data.add_(1)
        return found


@mutant("output-reused-buffer", "returns the same memory for every result of one shape", clause="B4", visible=False)
class OutputReusedBuffer(Naive):
    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        out, weights = super().forward(request, algorithm, params, inputs)
        if out.requires_grad:
            return out, weights
        return self.buffers.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out), weights


@mutant("output-aliases-input", "returns its result in the memory of x where it fits", clause="B4", visible=False)
class OutputAliasesInput(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        out, weights = super().forward(request, algorithm, params, inputs)
        tokens = _own_tokens(inputs)
        fits = tokens.shape == out.shape and 0 not in tokens.stride() and not out.requires_grad
        return tokens.copy_(out) if fits else out, weights


@mutant("caches-weights", "keeps the numbers that a parameter had when first seen", clause="B4", visible=False)
class CachesWeights(Naive):
    def __init__(self) -> None:
        self.cache = WeakTensorKeyDictionary()

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        own = {name: value if value.requires_grad else self.remembered(value) for name, value in params.items()}
        return super().forward(request, algorithm, own, inputs)

    def remembered(self, value: Tensor) -> Tensor:
        if value not in self.cache:
            self.cache[value] = value.clone()
        found: Tensor = self.cache[value]
        return found


@mutant("ignores-strides", "reads the memory of x and y as if it were contiguous", clause="D1", visible=False)
class IgnoresStrides(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().compute(operator, params, _contiguous(x), _contiguous(y), mask)


def _contiguous(tokens: Tensor) -> Tensor:
    strides = list(accumulate(reversed(tokens.shape[1:]), mul, initial=1))[::-1]
    stored = tokens.untyped_storage().nbytes() // tokens.element_size()
    if tokens.storage_offset() + tokens.numel() > stored:  # an expanded tensor
        return tokens
    return tokens.as_strided(tokens.shape, strides, tokens.storage_offset())


@mutant("gathers-matrices", "copies one matrix for every link", clause="B3", visible=False)
class GathersMatrices(Naive):
    def products(self, tokens: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        matrices = table[rows]
        if table.dim() == 3:
            return (tokens.unsqueeze(-2) @ matrices).squeeze(-2)
        groups = torch.unflatten(tokens, -1, table.shape[1:3])
        return (groups.unsqueeze(-2) @ matrices).squeeze(-2).flatten(-2)


@mutant("empty-batch-fails", "fails on an empty batch", clause="D1", visible=False)
class EmptyBatchFails(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        if not len(inputs.x):
            raise IndexError("index 0 is out of bounds for dimension 0 with size 0")
        return super().forward(request, algorithm, params, inputs)


@mutant("noise", "adds up in another order at each call, and claims to be deterministic", clause="B2", visible=False)
class Noise(Naive):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return only(found, torch.randperm(len(found.query), generator=self.generator))


@mutant("thread-shared-buffer", "keeps its tokens where another thread's call finds them", clause="B4", visible=False)
class ThreadSharedBuffer(Naive):
    def __init__(self) -> None:
        self.tokens: tuple[Tensor, Tensor] | None = None

    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.tokens = x, y
        time.sleep(1e-4)
        return super().compute(operator, params, *self.tokens, mask)
