"""Mistakes about heads, encoders, rotations and the output (clauses E1 to E10 and O1 to O4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.spec import Encoder, Identity, LowRank, LowRankOutput, Operator, Rotary, Shared, Vectors

# Heads


@mutant("heads-interleaved", "gives head h every H-th feature instead of the h-th slice", clause="E2")
class HeadsInterleaved(Naive):
    def by_heads(self, call: Call, features: Tensor) -> Tensor:
        slices = torch.unflatten(features, -1, (-1, call.heads)).transpose(-1, -2).flatten(-2)
        return super().by_heads(call, slices)


@mutant("heads-reversed", "concatenates the heads from the last to the first", clause="O1")
class HeadsReversed(Naive):
    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        return super().aggregate(call, weights, values).flip(1)


@mutant("heads-share-weights", "uses the first head's weights for all heads", clause="E2")
class HeadsShareWeights(Naive):
    def weights(self, call: Call, content: Tensor | None) -> Tensor:
        own = super().weights(call, content)
        return own[:, :1].expand_as(own)


@mutant("batch-shares-keys", "takes keys and values of all batch items from the first", clause="D1")
class BatchSharesKeys(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().compute(operator, params, x, y[:1].expand_as(y), mask)


# Encoders


@mutant("tokens-clipped", "clips tokens to [-3, 3] before it encodes them", clause="E1")
class TokensClipped(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().compute(operator, params, x.clamp(-3, 3), y.clamp(-3, 3), mask)


@mutant("values-clipped", "clips encoded values to [-2, 2]", clause="E1")
class ValuesClipped(Naive):
    def value(self, call: Call, tokens: Tensor) -> Tensor:
        return super().value(call, tokens).clamp(-2, 2)


@mutant("query-rectified", "takes negative features of a query as 0", clause="R1")
class QueryRectified(Naive):
    def query(self, call: Call, tokens: Tensor) -> Tensor:
        return super().query(call, tokens).clamp(min=0)


@mutant("identity-bias-missing", "leaves the bias of the identity out", clause="E3")
class IdentityBiasMissing(Naive):
    def encode(self, call: Call, encoder: Encoder, role: str, name: str, tokens: Tensor) -> Tensor:
        return tokens if isinstance(encoder, Identity) else super().encode(call, encoder, role, name, tokens)


@mutant("shared-bias-twice", "adds the bias of a shared matrix twice", clause="E4")
class SharedBiasTwice(Naive):
    def encode(self, call: Call, encoder: Encoder, role: str, name: str, tokens: Tensor) -> Tensor:
        found = super().encode(call, encoder, role, name, tokens)
        return self.plus_bias(call, name, found) if isinstance(encoder, Shared) and encoder.bias else found


@mutant("groups-swapped", "takes the blocks of a block-diagonal matrix from the last to the first", clause="E4")
class GroupsSwapped(Naive):
    def product(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        return super().product(tokens, matrix if matrix.dim() == 2 else matrix.flip(0))


@mutant("shared-heads-once", "gives vectors that all heads share to the first head only", clause="E7")
class SharedHeadsOnce(Naive):
    def vectors(self, call: Call, encoder: Vectors, role: str, name: str) -> Tensor:
        own = super().vectors(call, encoder, role, name)
        first = torch.arange(own.shape[1]) < own.shape[1] // call.heads
        return torch.where(first, own, 0.0) if encoder.shared_heads else own


@mutant("vectors-missing", "leaves the vectors of the classes out", clause="E7")
class VectorsMissing(Naive):
    def vectors(self, call: Call, encoder: Vectors, role: str, name: str) -> Tensor:
        return torch.zeros_like(super().vectors(call, encoder, role, name))


@mutant("sum-first-part-only", "takes the first part of a sum only", clause="E8")
class SumFirstPartOnly(Naive):
    def added_up(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


@mutant("concat-not-per-head", "concatenates all heads of a part before the next part", clause="E9")
class ConcatNotPerHead(Naive):
    def concatenated(self, call: Call, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, -1)


@mutant("concat-parts-reversed", "concatenates the parts from the last to the first", clause="E9")
class ConcatPartsReversed(Naive):
    def concatenated(self, call: Call, parts: list[Tensor]) -> Tensor:
        return super().concatenated(call, parts[::-1])


@mutant("low-rank-transposed", "multiplies by the transposes of the small matrices", clause="E6")
class LowRankTransposed(Naive):
    def low_rank(self, call: Call, encoder: LowRank, role: str, name: str, tokens: Tensor) -> Tensor:
        table = {f"{name}.table": call.params[f"{name}.table"].transpose(1, 2)}
        return super().low_rank(call.but_params(table), encoder, role, name, tokens)


@mutant("low-rank-first-class", "uses the small matrix of the first class for all classes", clause="E6")
class LowRankFirstClass(Naive):
    def low_rank(self, call: Call, encoder: LowRank, role: str, name: str, tokens: Tensor) -> Tensor:
        table = call.params[f"{name}.table"]
        return super().low_rank(
            call.but_params({f"{name}.table": table[:1].expand_as(table)}), encoder, role, name, tokens
        )


@mutant("role-bias-missing", "leaves out the biases of query, key and value encoders", clause="E4")
class RoleBiasMissing(Naive):
    def plus_bias(self, call: Call, name: str, features: Tensor) -> Tensor:
        return super().plus_bias(call, name, features) if name == "output" else features


# Rotations


@mutant("rotary-key-unrotated", "rotates queries but not keys", clause="E10")
class RotaryKeyUnrotated(Naive):
    def rotated(self, call: Call, encoder: Rotary, role: str, features: Tensor) -> Tensor:
        return features if role == "key" else super().rotated(call, encoder, role, features)


@mutant("rotary-key-backwards", "rotates keys by minus their position", clause="E10")
class RotaryKeyBackwards(Naive):
    def angles(self, call: Call, encoder: Rotary, role: str, width: int) -> Tensor:
        return super().angles(call, encoder, role, width) * (-1.0 if role == "key" else 1.0)


@mutant("rotary-pairing", "exchanges the pairings half and interleaved", clause="E10")
class RotaryPairing(Naive):
    def rotated(self, call: Call, encoder: Rotary, role: str, features: Tensor) -> Tensor:
        other = Rotary(encoder.inner, encoder.base, "interleaved" if encoder.pairing == "half" else "half")
        return super().rotated(call, other, role, features)


@mutant("rotary-base", "rotates with base 10000 whatever base is given", clause="E10")
class RotaryBase(Naive):
    def angles(self, call: Call, encoder: Rotary, role: str, width: int) -> Tensor:
        return super().angles(call, Rotary(encoder.inner), role, width)


@mutant("rotary-axes-swapped", "rotates by the positions of the axes in reverse order", clause="E10")
class RotaryAxesSwapped(Naive):
    def angles(self, call: Call, encoder: Rotary, role: str, width: int) -> Tensor:
        return torch.unflatten(super().angles(call, encoder, role, width), 1, (call.rank, -1)).flip(1).flatten(1)


@mutant("rotary-frequencies-of-one-axis", "spreads the frequencies as if there were one axis", clause="E10")
class RotaryFrequenciesOfOneAxis(Naive):
    def angles(self, call: Call, encoder: Rotary, role: str, width: int) -> Tensor:
        return super().angles(call, Rotary(encoder.inner, encoder.base ** (1 / call.rank)), role, width)


# Output


@mutant("output-scale-missing", "leaves the output scale out", clause="O3")
class OutputScaleMissing(Naive):
    def output_scale(self, call: Call) -> float:
        return 1.0


@mutant("output-scale-after-bias", "applies the output scale after the output encoder", clause="O3")
class OutputScaleAfterBias(Naive):
    def output(self, call: Call, heads: Tensor) -> Tensor:
        return self.output_scale(call) * self.project(call, heads.transpose(1, 2))


@mutant("output-bias-missing", "leaves the output bias out", clause="O2")
class OutputBiasMissing(Naive):
    def plus_bias(self, call: Call, name: str, features: Tensor) -> Tensor:
        return features if name == "output" else super().plus_bias(call, name, features)


@mutant("uplift-missing", "drops the low-rank features instead of bringing them up", clause="O4")
class UpliftMissing(Naive):
    def uplifted(self, call: Call, output: LowRankOutput, heads: Tensor) -> Tensor:
        return heads[..., : -(output.inner_features // call.heads)].flatten(2)


@mutant("uplift-by-head", "brings low-rank features up within their own head only", clause="O4")
class UpliftByHead(Naive):
    def uplifted(self, call: Call, output: LowRankOutput, heads: Tensor) -> Tensor:
        up = call.params["output.up"]
        blocks = up.reshape(call.heads, len(up) // call.heads, call.heads, -1)
        own = torch.eye(call.heads, dtype=up.dtype)[:, None, :, None] * blocks
        return super().uplifted(call.but_params({"output.up": own.reshape(up.shape)}), output, heads)
