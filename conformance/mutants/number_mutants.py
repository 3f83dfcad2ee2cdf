"""Mistakes about dtypes and precision (clauses D1 to D3 and M5). In exact arithmetic all are right."""

from __future__ import annotations

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.spec import Softmax


@mutant("float64-in-float32", "computes float64 in float32", clause="D3", visible=False)
class Float64InFloat32(Naive):
    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32


@mutant("returns-float32", "returns float32 whatever the dtype of x", clause="D1", visible=False)
class ReturnsFloat32(Naive):
    def stored(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        return result.float()


@mutant("accumulates-in-half", "adds up float16 and bfloat16 in themselves", clause="D2", visible=False)
class AccumulatesInHalf(Naive):
    def accumulator(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


@mutant("output-summed-in-half", "adds up weighted values in float16 and bfloat16", clause="D2", visible=False)
class OutputSummedInHalf(Naive):
    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        weighted = (weights.unsqueeze(-1) * values).to(call.dtype)
        return self.per_query(call, weighted).to(values.dtype)


@mutant(
    "softmax-sum-in-half", "adds up the exponentials of a softmax in float16 and bfloat16", clause="D2", visible=False
)
class SoftmaxSumInHalf(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        highest = self.largest(call, logits)
        grown = self.exponentials(call, logits - highest[..., call.links.query])
        narrow = torch.zeros_like(highest, dtype=call.dtype)
        for link, query in enumerate(call.links.query.tolist()):
            narrow[..., query] += grown[..., link].to(call.dtype)
        total = narrow.to(grown.dtype)
        return grown / torch.where(total == 0, 1.0, total)[..., call.links.query]


@mutant("logits-in-half", "keeps logits in float16 unless the dtype is float64", clause="D2", visible=False)
class LogitsInHalf(Naive):
    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        own = super().logits(call, prefix, relevance, content)
        return own if call.dtype == torch.float64 else own.half().to(own.dtype)


@mutant(
    "overflow-in-half", "keeps inner products in float16 and bfloat16 before scaling them", clause="D2", visible=False
)
class OverflowInHalf(Naive):
    def inner(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().inner(call, query, key).to(call.dtype).to(query.dtype)
