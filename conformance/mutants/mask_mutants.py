"""Mistakes about masks, absent keys and rows without keys (clauses M1 to M6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from translution.conformance.mutants.boundary_mutants import repeated
from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Links
from translution.spec import Mean, Ones, Operator, Softmax

# What a mask means


@mutant("mask-inverted", "takes True in a bool mask to mean masked", clause="M1")
class MaskInverted(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(~mask if mask.dtype == torch.bool else mask, dtype)


@mutant("bool-mask-added", "adds a bool mask to the logits as the numbers 0 and 1", clause="M1")
class BoolMaskAdded(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return mask.to(dtype)


@mutant("float-mask-as-bool", "takes a float mask to say only which keys are masked", clause="M2")
class FloatMaskAsBool(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask if mask.dtype == torch.bool else mask > -torch.inf, dtype)


@mutant("large-negative-mask-is-absent", "takes mask values below -9999 for -inf", clause="M2", visible=False)
class LargeNegativeMaskIsAbsent(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        found = super().mask_added(mask, dtype)
        return torch.where(found < -9999, -torch.inf, found)


@mutant("float-mask-ignored", "ignores float masks", clause="M2")
class FloatMaskIgnored(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask if mask.dtype == torch.bool else torch.zeros_like(mask), dtype)


@mutant("mask-scaled", "adds a float mask before the logits are scaled", clause="M2")
class MaskScaled(Naive):
    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        scale = self.scale(call, relevance) if relevance.content else 1.0
        return super().logits(replace(call, added=scale * call.added), prefix, relevance, content)


# Which pair a mask speaks of


@mutant("mask-first-head", "applies the first head's mask to all heads", clause="M6")
class MaskFirstHead(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask[:, :1], dtype)


@mutant("mask-first-batch", "applies the first batch item's mask to all items", clause="M6")
class MaskFirstBatch(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask[:1], dtype)


@mutant("mask-first-query", "applies the first query's mask to all queries", clause="M6")
class MaskFirstQuery(Naive):
    def mask_added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return super().mask_added(mask[:, :, :1], dtype)


@mutant("mask-transposed", "reads a mask as [keys, queries] where there are as many of both", clause="M6")
class MaskTransposed(Naive):
    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        square = links.num_queries == links.num_keys
        return super().mask_of_links(links, added.transpose(2, 3) if square else added)


@mutant("mask-first-link-only", "applies a mask to the first of a pair's links only", clause="M6")
class MaskFirstLinkOnly(Naive):
    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        return super().mask_of_links(links, added).masked_fill(repeated(links), 0.0)


# How a masked key is left out


@mutant("mask-after-softmax", "masks after normalising, so that the rows of a mask do not sum to 1", clause="M1")
class MaskAfterSoftmax(Naive):
    def masked(
        self, links: Links, mask: Tensor | None, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        live, added = super().masked(links, mask, size, dtype)
        return torch.ones_like(live), added.masked_fill(~live, -torch.inf)

    def branch(self, call: Call, prefix: str, relevance: Softmax | Ones | Mean, content: Tensor | None) -> Tensor:
        live = call.added > -torch.inf
        call = replace(call, added=torch.where(live, call.added, 0.0))
        return torch.where(live, super().branch(call, prefix, relevance, content), 0.0)


@mutant("mask-sentinel", "adds -10000 to masked logits instead of leaving the keys out", clause="M5")
class MaskSentinel(Naive):
    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        logits = torch.where(call.live, logits, logits - 1e4)
        return super().softmax(replace(call, live=torch.ones_like(call.live)), logits)


@mutant("mean-ignores-mask", "counts masked keys in a mean", clause="R3")
class MeanIgnoresMask(Naive):
    def mean(self, call: Call) -> Tensor:
        return self.ones(call) * super().mean(replace(call, live=torch.ones_like(call.live)))


@mutant("ones-ignores-mask", "ignores the mask where the weights are ones", clause="M1")
class OnesIgnoresMask(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().compute(operator, params, x, y, None if isinstance(operator.relevance, Ones) else mask)


@mutant("absent-times-zero", "multiplies masked keys by 0, which keeps NaN and infinity", clause="M4", visible=False)
class AbsentTimesZero(Naive):
    def seen(self, call: Call, tokens: Tensor) -> Tensor:
        return tokens

    def kept(self, call: Call, features: Tensor) -> Tensor:
        return features * call.live.unsqueeze(-1)


@mutant("nan-to-num", "replaces NaN and infinity in its inputs by numbers", clause="M4", visible=False)
class NanToNum(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return super().compute(operator, params, x.nan_to_num(), y.nan_to_num(), mask)


@mutant("live-nan-spreads", "lets NaN in a key reach queries that do not see it", clause="M4", visible=False)
class LiveNanSpreads(Naive):
    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        return super().aggregate(call, weights, values) + 0.0 * values.sum(2, keepdim=True)


# Rows without a live key


def dead(call: Call) -> Tensor:
    """Queries without a live link, [B, H, Nq]."""
    seen = torch.zeros((*call.live.shape[:2], call.links.num_queries), dtype=torch.int64)
    return seen.index_add(2, call.links.query, call.live.long()) == 0


@mutant("dead-row-nan", "gives NaN for a query without live keys", clause="M3")
class DeadRowNan(Naive):
    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        return super().aggregate(call, weights, values).masked_fill(dead(call).unsqueeze(-1), torch.nan)


@mutant("dead-row-mean", "gives the mean of the masked values for a query without live keys", clause="M3")
class DeadRowMean(Naive):
    def masked(
        self, links: Links, mask: Tensor | None, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        live, added = super().masked(links, mask, size, dtype)
        found = torch.zeros((*size, links.num_queries), dtype=torch.int64).index_add(2, links.query, live.long())
        none = (found == 0)[..., links.query]
        return live | none, added.masked_fill(none, -1e30)  # beside which a logit vanishes


@mutant("dead-row-skips-output-bias", "leaves the output bias out for a query without live keys", clause="M3")
class DeadRowSkipsOutputBias(Naive):
    def output(self, call: Call, heads: Tensor) -> Tensor:
        return super().output(call, heads).masked_fill(dead(call).all(1).unsqueeze(-1), 0.0)


TILE = 8


@mutant("tail-keys-dropped", "drops the keys after the last full tile of 8", clause="B2")
class TailKeysDropped(Naive):
    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        full = links.num_keys // TILE * TILE or links.num_keys
        tail = (links.key >= full) & (links.key < links.num_keys)
        return super().mask_of_links(links, added).masked_fill(tail, -torch.inf)


@mutant("tail-rows-dropped", "leaves the rows after the last full tile of 8 at 0", clause="B2")
class TailRowsDropped(Naive):
    def output(self, call: Call, heads: Tensor) -> Tensor:
        full = call.links.num_queries // TILE * TILE or call.links.num_queries
        rows = torch.arange(call.links.num_queries).unsqueeze(-1)
        return super().output(call, heads).masked_fill(rows >= full, 0.0)
