"""Correct backends that add and multiply in other orders, which no law and no bound may take for a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Links, links_of
from translution.registry import Backend
from translution.spec import Layout, LowRank, LowRankOutput, Softmax

Permute = Callable[[int], Tensor]


def descending(count: int) -> Tensor:
    """count - 1, .., 0."""
    return torch.arange(count - 1, -1, -1)


def shuffled(count: int) -> Tensor:
    """A permutation, always the same for a count."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


@lru_cache(maxsize=1024)
def reordered(layout: Layout, permute: Permute) -> Links:
    """The links of a layout in another order."""
    found = links_of(layout)
    order = permute(len(found.query))
    parts = {f.name: getattr(found, f.name) for f in fields(found)}
    moved: dict[str, Any] = {name: part[order] for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(found, **moved)


class Reordered(Naive):
    """Every sum, over links or features, in the order of ``permute``."""

    permute: Permute

    def links(self, layout: Layout) -> Links:
        """The links, reordered."""
        return reordered(layout, type(self).permute)

    def product(self, tokens: Tensor, matrix: Tensor) -> Tensor:
        """The contracted axis reordered, group by group."""
        order = type(self).permute(matrix.shape[-2])
        if matrix.dim() == 2:
            return tokens[..., order] @ matrix[order]
        groups = torch.unflatten(tokens, -1, (len(matrix), -1))[..., order]
        return torch.einsum("blgc,gce->blge", groups, matrix[:, order]).flatten(-2)

    def inner(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        """The features of a head reordered."""
        order = type(self).permute(query.shape[-1])
        return (query[..., order] * key[..., order]).sum(-1)

    def added_up(self, parts: list[Tensor]) -> Tensor:
        """The parts reordered."""
        return super().added_up([parts[n] for n in type(self).permute(len(parts)).tolist()])


class Backwards(Reordered):
    """Last link, last feature, last head first."""

    name: str = "backwards"
    permute = staticmethod(descending)


class Shuffled(Reordered):
    """In no order."""

    name: str = "shuffled"
    permute = staticmethod(shuffled)


def _halved(terms: Tensor, axis: int) -> Tensor:
    """The sum along an axis as a tree: halves are added until one is left."""
    while (count := terms.shape[axis]) > 1:
        half = count // 2
        first, second, rest = torch.split(terms, [half, half, count - 2 * half], axis)
        terms = torch.cat([first + second, rest], axis)
    return terms.sum(axis)  # of one term, or of none


class Regrouped(Naive):
    """Sums as trees; products of several matrices associated the other way; divisions as products."""

    name: str = "regrouped"

    def per_query(self, call: Call, of_links: Tensor) -> Tensor:
        """Each query's links in a row of their own, added as a tree."""
        links = call.links
        counts = links.query.bincount(minlength=links.num_queries)
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(links.query)) - first[links.query]
        most = int(counts.max()) if len(counts) else 0
        rows = of_links.new_zeros((*of_links.shape[:2], links.num_queries * most, *of_links.shape[3:]))
        rows = rows.index_copy(2, links.query * most + slot, of_links)
        return _halved(rows.reshape(*of_links.shape[:2], links.num_queries, most, *of_links.shape[3:]), 3)

    def inner(self, call: Call, query: Tensor, key: Tensor) -> Tensor:
        """The features of a head as a tree."""
        return _halved(query * key, -1)

    def logits(self, call: Call, prefix: str, relevance: Softmax, content: Tensor | None) -> Tensor:
        """Mask and bias first, the content last."""
        found = call.added
        if relevance.bias is not None:
            found = self.bias(call, prefix, relevance.bias) + found
        return found if content is None or not relevance.content else found + self.scale(call, relevance) * content

    def softmax(self, call: Call, logits: Tensor) -> Tensor:
        """Multiplies by the reciprocal of the sum."""
        grown = self.exponentials(call, logits - self.largest(call, logits)[..., call.links.query])
        total = self.per_query(call, grown)
        weights = grown * torch.where(total == 0, 1.0, total).reciprocal()[..., call.links.query]
        return torch.where(call.live, weights, 0.0)

    def mixture(self, call: Call, first: Tensor, second: Tensor) -> Tensor:
        """first + g (second - first)."""
        gate = call.params["relevance.gate"].sigmoid().unsqueeze(-1)
        return first + gate * (second - first)

    def low_rank(self, call: Call, encoder: LowRank, role: str, name: str, tokens: Tensor) -> Tensor:
        """y (D (M[c] U)): the last two matrices of each class are multiplied first."""
        if encoder.features is None:
            return super().low_rank(call, encoder, role, name, tokens)
        down, table, up = (call.params[f"{name}.{part}"] for part in ("down", "table", "up"))
        return self.products(self.product(tokens, down), table @ up, call.row(role))

    def project(self, call: Call, heads: Tensor) -> Tensor:
        """o W + z (U W)."""
        output = call.operator.output
        if not isinstance(output, LowRankOutput):
            return super().project(call, heads)
        width = output.inner_features // call.heads
        up, weight = call.params["output.up"], call.params["output.weight"]
        found = heads[..., :-width].flatten(2) @ weight + heads[..., -width:].flatten(2) @ (up @ weight)
        return self.plus_bias(call, "output", found) if output.bias else found


@cache
def orders() -> Mapping[str, Backend]:
    """All of them by name."""
    return {backend.name: backend for backend in (Backwards(), Shuffled(), Regrouped())}
