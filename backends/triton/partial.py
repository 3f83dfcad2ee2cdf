"""Partial results over disjoint sets of keys, and the dense ones that involve registers.

The kernel covers grid queries and grid keys. A register's pairs have a class of their own (clause L6), so each is a
small dense product in torch, joined with the rest by the highest logit and the sum of weights relative to it. One
number, highest + log(sum), would lose the sum beside a large logit in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from translution.backends.triton.roles import Encoded
from translution.normal_form import Branch
from translution.spec import Lattice


@dataclass(frozen=True, slots=True)
class Partial:
    """out [B, n, H, D], highest and total [B, n, H] over some keys.

    highest is the largest logit m (-inf: no live key), total the sum of exp(logit - m), by which out is divided. Under
    ``ones`` out is a plain sum and the other two mean nothing.
    """

    out: Tensor
    highest: Tensor
    total: Tensor

    def joined(self, other: "Partial", branch: Branch) -> "Partial":
        """Over the keys of both."""
        if branch.kind == "ones":
            return Partial(self.out + other.out, self.highest, self.total)
        highest = torch.maximum(self.highest, other.highest)
        origin = torch.where(highest == -torch.inf, 0.0, highest)
        own, its = (part.total * (part.highest - origin).exp() for part in (self, other))
        total = own + its
        divisor = torch.where(total == 0, 1.0, total)
        out = (own[..., None] * self.out + its[..., None] * other.out) / divisor[..., None]
        return Partial(out, highest, total)


def mask_part(mask: Tensor, queries: slice, keys: slice) -> Tensor:
    """The part of a broadcastable mask [B|1, H|1, Nq|1, Nk|1]."""
    rows = mask if mask.shape[2] == 1 else mask[:, :, queries]
    return rows if mask.shape[3] == 1 else rows[:, :, :, keys]


@dataclass(frozen=True, slots=True)
class Dense:
    """The pairs between registers and everything else, for one branch. ``bias`` is float32 [H, T]."""

    layout: Lattice
    query: Encoded | None
    key: Encoded | None
    value: Encoded
    branch: Branch
    bias: Tensor | None
    mask: Tensor | None

    def pairs(self, row: int, queries: slice, keys: slice) -> Partial:
        """Pairs that share a row of the tables; one query or one key, since a masked value is dropped per query."""
        values = self.value.at(row, keys)
        batch, count, heads, _ = values.shape
        shape = batch, heads, queries.stop - queries.start, count
        live = torch.ones(shape, dtype=torch.bool, device=values.device)
        part = None if self.mask is None else mask_part(self.mask, queries, keys).expand(shape)
        if part is not None:
            live = part != -torch.inf if part.is_floating_point() else part

        # [B, H, q, k, D] is no larger than queries or keys themselves, because one side is a single token. What a pair
        # must not see is 0 before anything meets it, in a backward pass too (clause M4).
        def paired(features: Tensor, axis: int) -> Tensor:
            return torch.where(live[..., None], features.transpose(1, 2).unsqueeze(axis), 0.0)

        logits = values.new_zeros(shape)
        if self.branch.content and self.query is not None and self.key is not None:
            q, k = paired(self.query.at(row, queries), 3), paired(self.key.at(row, keys), 2)
            logits = logits + self.branch.scale * (q * k).sum(-1)
        if self.bias is not None:
            logits = logits + self.bias[:, row, None, None]
        if part is not None and part.is_floating_point():
            logits = logits + part
        logits = torch.where(live, logits, -torch.inf)
        # A constant, as the kernel's own: a change of it changes no weight.
        highest = logits.detach().amax(-1, keepdim=True)
        origin = torch.where(highest == -torch.inf, 0.0, highest)
        ones = self.branch.kind == "ones"
        weights = live.to(logits.dtype) if ones else torch.where(live, (logits - origin).exp(), 0.0)
        shares = weights[..., None] * paired(values, 2)
        total = weights.sum(-1)
        divisor = torch.ones_like(total) if ones else torch.where(total == 0, 1.0, total)
        out = shares.sum(-2) / divisor[..., None]
        return Partial(*(part.transpose(1, 2) for part in (out, highest.squeeze(-1), total)))

    def completed(self, grid: Partial) -> Partial:
        """Every query, registers first, over every key, from the grid's own part."""
        count, layout = self.layout.registers, self.layout
        sites = slice(count, layout.num_queries), slice(count, layout.num_keys)
        labels = layout._register_labels(False)
        first = layout.num_classes - len(labels)
        rows: list[Partial | None] = [None] * count
        for row, label in enumerate(labels, start=first):
            keys = sites[1] if label.partner is None else slice(label.partner, label.partner + 1)
            if label.seen_from is None:
                grid = grid.joined(self.pairs(row, sites[0], keys), self.branch)
                continue
            part = self.pairs(row, slice(label.seen_from, label.seen_from + 1), keys)
            known = rows[label.seen_from]
            rows[label.seen_from] = part if known is None else known.joined(part, self.branch)
        parts = [*(part for part in rows if part is not None), grid]
        columns = zip(*((part.out, part.highest, part.total) for part in parts), strict=True)
        return Partial(*(torch.cat(column, 1) for column in columns))
