"""Mistakes about logits, their normalisation and the weights that are returned (clauses R1 to R7 and B5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from translution.conformance.mutants.boundary_mutants import repeated
from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.spec import Bias, BiasTable, Lattice, Mixture, Operator, SlopeBias, Softmax

# Scale


@mutant("scale-missing", "leaves the scale of the inner product out", clause="R6")
class ScaleMissing(Naive):
    def scale(self, call: Call, relevance: Softmax) -> float:
        return 1.0


@mutant("scale-by-value-width", "scales by the width of a value head", clause="R6")
class ScaleByValueWidth(Naive):
    def scale(self, call: Call, relevance: Softmax) -> float:
        own = super().scale(call, relevance)
        return float(call.operator.value_head_dim) ** -0.5 if relevance.scale is None else own


@mutant("scale-by-dim", "scales by the width of all heads together", clause="R6")
class ScaleByDim(Naive):
    def scale(self, call: Call, relevance: Softmax) -> float:
        own = super().scale(call, relevance)
        return own * float(call.heads) ** -0.5 if relevance.scale is None else own


@mutant("scale-ignored", "takes the default scale whatever scale is given", clause="R6")
class ScaleIgnored(Naive):
    def scale(self, call: Call, relevance: Softmax) -> float:
        return super().scale(call, replace(relevance, scale=None))


@mutant("scale-off-one-percent", "scales by 1 % too much", clause="R6")
class ScaleOffOnePercent(Naive):
    def scale(self, call: Call, relevance: Softmax) -> float:
        return 1.01 * super().scale(call, relevance)


@mutant("bias-scaled", "scales the bias too", clause="R5")
class BiasScaled(Naive):
    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        own = super().logits(call, prefix, relevance, content)
        if relevance.bias is None or not relevance.content:
            return own
        return own + (self.scale(call, relevance) - 1) * self.bias(call, prefix, relevance.bias)


# Bias


@mutant("content-with-bias-dropped", "drops the inner product where there is a bias", clause="R5")
class ContentWithBiasDropped(Naive):
    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        alone = Softmax(content=False, bias=relevance.bias) if relevance.bias is not None else relevance
        return super().logits(call, prefix, alone, content)


@mutant("bias-sign", "subtracts the bias", clause="R5")
class BiasSign(Naive):
    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        return -super().bias(call, prefix, bias)


@mutant("bias-first-head", "gives all heads the first head's bias", clause="R5")
class BiasFirstHead(Naive):
    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        own = super().bias(call, prefix, bias)
        return own[:1].expand_as(own)


@mutant("bias-of-first-branch", "reads the bias table of the first part of a mixture for both", clause="R4")
class BiasOfFirstBranch(Naive):
    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        there = isinstance(bias, BiasTable) and "relevance.first.bias" in call.params
        return super().bias(call, "first." if there else prefix, bias)


@mutant("slopes-squared", "squares the slopes", clause="R5")
class SlopesSquared(Naive):
    def slopes(self, call: Call, bias: SlopeBias) -> Tensor:
        return super().slopes(call, bias).square()


@mutant("slope-distance-euclidean", "takes the Euclidean distance for slopes", clause="R5")
class SlopeDistanceEuclidean(Naive):
    def bias(self, call: Call, prefix: str, bias: Bias) -> Tensor:
        if not isinstance(bias, SlopeBias):
            return super().bias(call, prefix, bias)
        distance = call.links.delta.square().sum(1).sqrt().to(call.added.dtype)
        return self.slopes(call, bias).unsqueeze(-1) * -distance


@mutant("quadratic-sign", "takes delta for -delta in a quadratic bias", clause="R5")
class QuadraticSign(Naive):
    def features(self, call: Call) -> Tensor:
        own = super().features(call)
        return torch.cat([-own[:-1], own[-1:]])


# Mixtures


@mutant("gate-swapped", "gives the gate's share to the first part of a mixture", clause="R4")
class GateSwapped(Naive):
    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        return super().mixture(call, second, first)


@mutant("gate-raw", "takes the gate itself for its sigmoid", clause="R4")
class GateRaw(Naive):
    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        gate = call.params["relevance.gate"].unsqueeze(-1)
        return (1 - gate) * first + gate * second


@mutant("gate-first-head", "gives all heads the first head's gate", clause="R4")
class GateFirstHead(Naive):
    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        gate = call.params["relevance.gate"]
        return super().mixture(call.but_params({"relevance.gate": gate[:1].expand_as(gate)}), first, second)


@mutant("mixture-of-logits", "mixes the logits of two softmaxes, not their weights", clause="R4")
class MixtureOfLogits(Naive):
    def weights(self, call: Call, content: Tensor | None) -> Tensor:
        mixed = call.operator.relevance
        if not (isinstance(mixed, Mixture) and isinstance(mixed.first, Softmax) and isinstance(mixed.second, Softmax)):
            return super().weights(call, content)
        first = self.logits(call, "first.", mixed.first, content)
        return self.softmax(call, self.mixture(call, first, self.logits(call, "second.", mixed.second, content)))


# Normalisation


@mutant("mean-over-window", "divides a mean by the size of the window, keys or no keys", clause="R3")
class MeanOverWindow(Naive):
    def mean(self, call: Call) -> Tensor:
        layout = call.operator.layout
        if not isinstance(layout, Lattice) or layout.kernel_size is None:
            return super().mean(call)
        return self.ones(call) / prod(layout.window)


@mutant("mean-without-zero-tokens", "does not count zero tokens in a mean", clause="R3")
class MeanWithoutZeroTokens(Naive):
    def mean(self, call: Call) -> Tensor:
        tokens = call.live & (call.links.key < call.links.num_keys)
        return self.ones(call) / self.per_query(call, tokens.to(call.added.dtype)).clamp(min=1)[..., call.links.query]


@mutant("ones-normalised", "takes the mean where the weights are ones", clause="R2")
class OnesNormalised(Naive):
    def ones(self, call: Call) -> Tensor:
        return self.mean(call)


@mutant("softmax-over-queries", "normalises over the queries of a key", clause="R1")
class SoftmaxOverQueries(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        turned = replace(call.links, query=call.links.key, num_queries=call.links.num_keys + 1)
        return super().softmax(replace(call, links=turned), logits)


@mutant("softmax-unnormalised", "leaves the exponentials as they are", clause="R1")
class SoftmaxUnnormalised(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        return self.exponentials(call, logits - self.largest(call, logits)[..., call.links.query])


@mutant("epsilon-in-denominator", "adds 0.000001 to the sum of the exponentials", clause="R1")
class EpsilonInDenominator(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        grown = self.exponentials(call, logits - self.largest(call, logits)[..., call.links.query])
        return grown / (self.per_query(call, grown) + 1e-6)[..., call.links.query]


@mutant("no-max-subtraction", "takes exponentials without subtracting the largest logit", clause="M5", visible=False)
class NoMaxSubtraction(Naive):
    def largest(self, call: Call, logits: Tensor) -> Tensor:
        return torch.zeros_like(super().largest(call, logits))


# Returned weights


@mutant("weights-not-summed", "returns the weight of the last link where a pair has several", clause="B5")
class WeightsNotSummed(Naive):
    def dense(self, call: Call, weights: Tensor) -> Tensor:
        backwards = replace(call.links, query=call.links.query.flip(0), key=call.links.key.flip(0))
        return super().dense(call, weights.masked_fill(repeated(backwards).flip(0), 0.0))


@mutant("weights-before-mask", "returns the weights that there would be without the mask", clause="B5")
class WeightsBeforeMask(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, _ = super().compute(operator, params, x, y, mask)
        return out, super().compute(operator, params, x, y, None)[1]


@mutant("weights-averaged", "returns the mean of the heads' weights for every head", clause="B5")
class WeightsAveraged(Naive):
    def dense(self, call: Call, weights: Tensor) -> Tensor:
        return super().dense(call, weights.mean(1, keepdim=True).expand_as(weights))


@mutant("weights-of-zero-tokens", "adds the weight of zero tokens to that of the last key", clause="B5")
class WeightsOfZeroTokens(Naive):
    def dense(self, call: Call, weights: Tensor) -> Tensor:
        links = replace(call.links, key=call.links.key.clamp(max=call.links.num_keys - 1))
        return super().dense(replace(call, links=links), weights)
