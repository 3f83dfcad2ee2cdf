"""Features of a head that are the same for every displacement: ordinary attention's products, for ``stream``.

Alpha-Translution's shared half is plain attention, and with roles shared a whole role is: no link needs it on its own.
Only where every query sees every key once and nothing is masked: elsewhere a product of all with all would let what is
absent reach gradients (clause M4).
"""

from dataclasses import replace

import torch
from torch import Tensor

from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask

Span = tuple[int, int]


def relative_span(links: Links, mask: LinkMask | None, *roles: Encoded) -> Span:
    """Features of a head, from the first to the last that any of the roles needs link by link."""
    if mask is not None or not links.geometry.links_every_pair or any(role.base is None for role in roles):
        return 0, roles[0].head_dim
    marks = [(table.start, table.start + table.width) for role in roles for table in role.tables]
    marks += [(turn.start, turn.start + turn.width) for role in roles for turn in role.turns]
    return min((start for start, _ in marks), default=0), max((stop for _, stop in marks), default=0)


def within(role: Encoded, span: Span) -> Encoded:
    """The role in these features alone."""
    start, stop = span
    base = None
    if role.base_start < stop and start < role.base_stop:
        assert role.base is not None
        base = role.base[..., start:stop]
    tables = tuple(replace(table, start=table.start - start) for table in role.tables)
    turns = tuple(replace(turn, start=turn.start - start) for turn in role.turns)
    return replace(role, base=base, tables=tables, turns=turns, head_dim=stop - start)


def outside(role: Encoded, span: Span) -> Tensor:
    """The role in the other features, [N, B, heads, features]; a view where they lie together."""
    start, stop = span
    assert role.base is not None
    parts = [part for part in (role.base[..., :start], role.base[..., stop:]) if part.shape[-1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def of_links(query: Tensor, key: Tensor, links: Links) -> Tensor:
    """The inner products of queries and keys [N, B, H, D] for every link, [L, B, H]."""
    dense = query.permute(1, 2, 0, 3) @ key.permute(1, 2, 3, 0)
    return dense.flatten(2).permute(2, 0, 1).index_select(0, links.pair_of_link)


def weighted(weights: Tensor, value: Tensor, links: Links) -> Tensor:
    """Sums of values [Nk, B, H, D] under weights [L, B, H], [Nq, B, H, D]."""
    by_pair = weights.index_select(0, links.link_of_pair).permute(1, 2, 0)
    dense = torch.unflatten(by_pair, -1, (links.geometry.num_queries, -1))
    return (dense @ value.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)


def inner_products(query: Encoded, key: Encoded, span: Span, links: Links) -> Tensor:
    """The inner products outside the span for every link, [L, B, H]."""
    return of_links(outside(query, span), outside(key, span), links)


def aggregate(weights: Tensor, value: Encoded, span: Span, links: Links) -> Tensor:
    """Weighted sums of the values outside the span, [Nq, B, H, features]."""
    return weighted(weights, outside(value, span), links)


def joined(outside: Tensor, inside: Tensor, start: int) -> Tensor:
    """All features of a head, those of the span from ``start``."""
    return torch.cat((outside[..., :start], inside, outside[..., start:]), -1)
