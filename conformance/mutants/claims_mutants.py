"""Backends that do not keep to what they say of themselves (clauses B1 and B2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from translution.algorithms import Request
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.errors import NotSupported
from translution.execution import run
from translution.inputs import Inputs
from translution.spec import Lattice

Result = tuple[Tensor, Tensor | None]


@mutant("claims-too-much", "claims layouts with registers and refuses them when called", clause="B2", visible=False)
class ClaimsTooMuch(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        layout = request.operator.layout
        if isinstance(layout, Lattice) and layout.registers:
            raise NotSupported(self.name, algorithm, ["layouts with registers are not implemented"])
        return super().forward(request, algorithm, params, inputs)


@mutant("refuses-late", "computes first and then refuses to return weights", clause="B1", visible=False)
class RefusesLate(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        found = super().forward(request, algorithm, params, inputs)
        if request.return_weights:
            raise NotSupported(self.name, algorithm, ["weights are not returned"])
        return found


@mutant("falls-back", "hands circular borders to another backend", clause="B1", visible=False)
class FallsBack(Naive):
    def forward(self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs) -> Result:
        layout = request.operator.layout
        recorded = any(value.requires_grad for value in (inputs.x, inputs.y, *params.values()))
        other = isinstance(layout, Lattice) and layout.boundary == "circular" and not recorded
        if not other or request.dtype == "bfloat16":
            return super().forward(request, algorithm, params, inputs)
        weights, tokens = request.return_weights, (inputs.x, inputs.y)
        found = run(request.operator, params, *tokens, mask=inputs.mask, backend="numpy", return_weights=weights)
        return found if weights else (found, None)


@mutant("not-supported-raises", "raises where it is asked whether it supports float masks", clause="B2", visible=False)
class NotSupportedRaises(Naive):
    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        if request.mask == "float":
            raise NotSupported(self.name, algorithm, ["float masks are not implemented"])
        return super().not_supported(request, algorithm)


@mutant("claims-inconsistent", "answers every second time that it can't run a request", clause="B2", visible=False)
class ClaimsInconsistent(Naive):
    def __init__(self) -> None:
        self.asked: Counter[Request] = Counter()

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        self.asked[request] += 1
        again = ["not a second time"] if self.asked[request] % 2 == 0 else []
        return super().not_supported(request, algorithm) + again
