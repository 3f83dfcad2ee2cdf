"""Mistakes that only sizes of real models show: a second tile, a fifth head, a long row of features (clause L1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Links
from translution.spec import Lattice, Layout, Operator

TILE = 64


def _links_where(found: Links, kept: Tensor) -> Links:
    """Some of the links."""
    own = {field.name: getattr(found, field.name) for field in fields(found)}
    per_link: dict[str, Any] = {name: value[kept] for name, value in own.items() if isinstance(value, Tensor)}
    return replace(found, **per_link)


@mutant("keys-after-tile-dropped", f"leaves out keys after the first {TILE}", clause="L1", visible=False)
class KeysAfterTileDropped(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return _links_where(found, (found.key < TILE) | (found.key == found.num_keys))


@mutant("mask-after-tile-ignored", f"does not mask keys after the first {TILE}", clause="M1", visible=False)
class MaskAfterTileIgnored(Naive):
    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        return torch.where(links.key < TILE, super().mask_of_links(links, added), 0.0)


@mutant("heads-after-fourth", "gives every head after the fourth the weights of the first", clause="E2", visible=False)
class HeadsAfterFourth(Naive):
    def weights(self, call: Call, content: Tensor | None) -> Tensor:
        found = super().weights(call, content)
        return torch.cat([found[:, :4], found[:, :1].expand_as(found[:, 4:])], 1)


@mutant("head-dim-truncated", "takes inner products over the first 32 features of a head", clause="R1", visible=False)
class HeadDimTruncated(Naive):
    def inner(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        return super().inner(call, query[..., :32], key[..., :32])


@mutant("wide-windows-cut", "cuts windows that are wider than 4 down to their middle", clause="L2", visible=False)
class WideWindowsCut(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        if not isinstance(layout, Lattice) or layout.kernel_size is None or max(layout.window) <= 4:
            return found
        return _links_where(found, (found.delta.abs() <= 2).all(1))


@mutant("items-after-thirty-second", "gives 0 for items after the first 32", clause="L1", visible=False)
class ItemsAfterThirtySecond(Naive):
    def output(self, call: Call, heads: Tensor) -> Tensor:
        found = super().output(call, heads)
        return torch.where(torch.arange(len(found))[:, None, None] < 32, found, 0.0)


@mutant("channels-after-thirty-second", "reads the first 32 channels of a token", clause="E1", visible=False)
class ChannelsAfterThirtySecond(Naive):
    def seen(self, call: Call, tokens: Tensor) -> Tensor:
        return torch.where(torch.arange(tokens.shape[-1]) < 32, super().seen(call, tokens), 0.0)


@mutant("small-tokens-flushed", "takes tokens for 0 where all their numbers are small", clause="D2", visible=False)
class SmallTokensFlushed(Naive):
    def compute(
        self, operator: Operator, params: Mapping[str, Tensor], x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, y = (part * (part.abs().amax() > 1 / 16) if part.numel() else part for part in (x, y))
        return super().compute(operator, params, x, y, mask)
