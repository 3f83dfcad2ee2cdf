"""Right results with wrong gradients (clauses B1, M3, M4 and L3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from translution.algorithms import Request
from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mask_mutants import dead
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.inputs import Inputs
from translution.registry import Gradients
from translution.spec import Bias, Operator, Vectors


def with_gradient(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same tensor, whose gradient is changed on its way back."""
    if not tensor.requires_grad:
        return tensor
    passed = tensor.view_as(tensor)
    passed.register_hook(change)  # type: ignore[no-untyped-call]
    return passed


# Roles


@mutant("query-detached", "passes no gradient through the queries", clause="B2", visible=False)
class QueryDetached(Naive):
    def query(self, call: Call, tokens: Tensor) -> Tensor:
        return super().query(call, tokens).detach()


@mutant("value-detached", "passes no gradient through the values", clause="B2", visible=False)
class ValueDetached(Naive):
    def value(self, call: Call, tokens: Tensor) -> Tensor:
        return super().value(call, tokens).detach()


@mutant("key-gradient-unscaled", "leaves the scale out of the keys' gradient", clause="R6", visible=False)
class KeyGradientUnscaled(Naive):
    def key(self, call: Call, tokens: Tensor) -> Tensor:
        scale = float(call.operator.head_dim) ** -0.5
        return with_gradient(super().key(call, tokens), lambda gradient: gradient / scale)


@mutant(
    "self-gradient-one-side",
    "leaves the keys' and values' share out of the gradient of x where y is x",
    clause="B2",
    visible=False,
)
class SelfGradientOneSide(Naive):
    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        out, found = super().vjp(request, algorithm, params, inputs, cotangent)
        one = inputs.y is inputs.x
        return out, Gradients(found.params, found.x, torch.zeros_like(inputs.y) if one else found.y)


# Parameters


@mutant("tied-last-wins", "keeps the last link's gradient of a matrix, not the sum", clause="E5", visible=False)
class TiedLastWins(Naive):
    def of_class(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        earlier = self.product(tokens[:, :-1], matrix.detach())
        return torch.cat([earlier, self.product(tokens[:, -1:], matrix)], 1)


@mutant(
    "value-gradient-mirrored", "writes the value table's gradient in reverse order of rows", clause="L3", visible=False
)
class ValueGradientMirrored(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tables = {name: value for name, value in params.items() if name.startswith("value") and name.endswith("table")}
        mirrored = {name: with_gradient(value, lambda gradient: gradient.flip(0)) for name, value in tables.items()}
        return super().compute(operator, {**params, **mirrored}, x, y, mask)


@mutant("vectors-gradient-missing", "passes no gradient to the vectors of the classes", clause="E7", visible=False)
class VectorsGradientMissing(Naive):
    def vectors(self, call: Call, encoder: Vectors, role: str, name: str) -> Tensor:
        return super().vectors(call, encoder, role, name).detach()


@mutant("bias-gradient-missing", "passes no gradient to the bias of the logits", clause="R5", visible=False)
class BiasGradientMissing(Naive):
    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        return super().bias(call, prefix, bias).detach()


@mutant("gate-gradient-missing", "passes no gradient to the gate of a mixture", clause="R4", visible=False)
class GateGradientMissing(Naive):
    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        gate = call.params["relevance.gate"].detach()
        return super().mixture(call.but_params({"relevance.gate": gate}), first, second)


@mutant("output-weight-gradient-missing", "passes no gradient to the output weight", clause="O2", visible=False)
class OutputWeightGradientMissing(Naive):
    def project(self, call: Call, heads: Tensor) -> Tensor:
        weight = {name: value.detach() for name, value in call.params.items() if name == "output.weight"}
        return super().project(call.but_params(weight), heads)


@mutant("gradient-batch-mean", "takes the mean of the parameters' gradients over the batch", clause="B2", visible=False)
class GradientBatchMean(Naive):
    def pulled_back(self, out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
        own = super().pulled_back(out, leaves, cotangent)
        return own[:2] + [None if g is None else g / max(len(out), 1) for g in own[2:]]


@mutant("gradient-first-batch", "takes the parameters' gradients from the first batch item", clause="B2", visible=False)
class GradientFirstBatch(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first, rest = slice(0, 1), slice(1, None)
        fixed = {name: value.detach() for name, value in params.items()}
        parts = [
            super(GradientFirstBatch, self).compute(operator, own, x[items], y[items], _items(mask, items, len(x)))
            for own, items in ((params, first), (fixed, rest))
        ]
        out, weights = zip(*parts, strict=True)
        return torch.cat(out), torch.cat(weights)


def _items(mask: Tensor | None, items: slice, batch: int) -> Tensor | None:
    return mask if mask is None or len(mask) != batch else mask[items]


# The cotangent and the softmax


@mutant("cotangent-ignored", "gives the gradients of the sum of the result", clause="B2", visible=False)
class CotangentIgnored(Naive):
    def pulled_back(self, out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor | None]:
        return super().pulled_back(out, leaves, torch.ones_like(cotangent))


@mutant(
    "softmax-gradient-diagonal",
    "leaves the sum over the other links out of a softmax's gradient",
    clause="R1",
    visible=False,
)
class SoftmaxGradientDiagonal(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        grown = self.exponentials(call, logits - self.largest(call, logits)[..., call.links.query])
        total = self.per_query(call, grown).detach()
        return grown / torch.where(total == 0, 1.0, total)[..., call.links.query]


# Masks


class Instead(torch.autograd.Function):
    """The first tensor, with the gradient of the second."""

    @staticmethod
    def forward(ctx: Any, shown: Tensor, differentiated: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        """The first."""
        return shown.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        """To the second."""
        return None, gradients[0]


@mutant("mask-ignored-backward", "gives the gradients that there would be without the mask", clause="M1", visible=False)
class MaskIgnoredBackward(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, weights = super().compute(operator, params, x, y, mask)
        if mask is None or not out.requires_grad:
            return out, weights
        unmasked = super().compute(operator, params, x, y, None)[0]
        return Instead.apply(out.detach(), unmasked), weights  # type: ignore[no-untyped-call]


@mutant("dead-row-gradient-nan", "gives NaN gradients for a query without live keys", clause="M3", visible=False)
class DeadRowGradientNan(Naive):
    def seen(self, call: Call, tokens: Tensor) -> Tensor:
        none = dead(call).all(1)[:, call.links.query].unsqueeze(-1)
        return super().seen(call, with_gradient(tokens, lambda gradient: gradient.masked_fill(none, torch.nan)))


@mutant("absent-gradient-nan", "lets NaN in a masked key reach the gradients", clause="M4", visible=False)
class AbsentGradientNan(Naive):
    def seen(self, call: Call, tokens: Tensor) -> Tensor:
        return tokens


# Second derivatives


class FirstOrder(torch.autograd.Function):
    """A result whose gradients are right, and are constants to whoever differentiates them again."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """compute(*tensors)."""
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients; the empty sums tie them to the tensors with derivative 0."""
        own = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.compute(*own)
        if not out.requires_grad:
            return (None,) * (1 + len(own))
        found = torch.autograd.grad(out, own, gradients[0].detach(), allow_unused=True)
        tie = sum(tensor.flatten()[:0].sum() for tensor in (*ctx.saved_tensors, *gradients))
        return None, *(None if g is None else g + tie for g in found)


@mutant("second-order-zero", "gives 0 for the derivative of its gradients", clause="B2", visible=False)
class SecondOrderZero(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        own, names = super().compute, list(params)

        def result(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
            return own(operator, dict(zip(names, values, strict=True)), x, y, mask)[0]

        weights = own(operator, params, x, y, mask)[1]
        return FirstOrder.apply(result, x, y, *params.values()), weights  # type: ignore[no-untyped-call]


class Recorded(Naive):
    """Its ``vjp`` is right; what a call records may be not."""

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Tensor], inputs: Inputs, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        return Naive().vjp(request, algorithm, params, inputs, cotangent)


@mutant("autograd-detached", "gives results without a graph, and the right vjp", clause="B1", visible=False)
class AutogradDetached(Recorded):
    def stored(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        return super().stored(result, dtype).detach()


@mutant("autograd-halved", "records half the gradient, and gives the right vjp", clause="B1", visible=False)
class AutogradHalved(Recorded):
    def stored(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        return with_gradient(super().stored(result, dtype), lambda gradient: gradient / 2)


@mutant("mask-gradient-missing", "passes no gradient to a float mask", clause="M2", visible=False)
class MaskGradientMissing(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask.detach(), dtype)


class Untangential(torch.autograd.Function):
    """A tensor as it is, whose derivative along any direction is 0."""

    @staticmethod
    def forward(out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is needed later."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return cotangents[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return torch.zeros_like(tangents[0])


@mutant("forward-mode-zero", "gives 0 for derivatives along a direction", clause="B1", visible=False)
class ForwardModeZero(Naive):
    def stored(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        found: Tensor = Untangential.apply(super().stored(result, dtype))  # type: ignore[no-untyped-call]
        return found
