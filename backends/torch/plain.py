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
    if mask is not None or not links.is_complete:
        return 0, roles[0].head_dim
    marks = [(part.start, part.start + part.width) for role in roles for part in (*role.tables, *role.turns)]
    return min((start for start, _ in marks), default=0), max((stop for _, stop in marks), default=0)


def within(role: Encoded, span: Span) -> Encoded:
    """The role in these features alone."""
    start, stop = span
    held = max(start, role.base_start) < min(stop, role.base_stop)
    base = role.base[..., start:stop] if held and role.base is not None else None
    tables = tuple(replace(table, start=table.start - start) for table in role.tables)
    turns = tuple(replace(turn, start=turn.start - start) for turn in role.turns)
    first, last = max(role.base_start - start, 0), min(role.base_stop, stop) - start
    return replace(
        role, base=base, tables=tables, turns=turns, head_dim=stop - start, base_start=first, base_stop=max(last, first)
    )


def _outside(role: Encoded, span: Span) -> Tensor | None:
    """The role in the other features, [B, heads, N, features]; None where there is nothing."""
    if role.base is None:
        return None
    start, stop = span
    return torch.cat((role.base[..., :start], role.base[..., stop:]), -1).permute(1, 2, 0, 3)


def inner_products(query: Encoded, key: Encoded, span: Span, links: Links) -> Tensor | None:
    """The inner products outside the span for every link, [L, B, H]; None for zeros."""
    q, k = _outside(query, span), _outside(key, span)
    if q is None or k is None:
        return None
    return (q @ k.mT).flatten(2).permute(2, 0, 1).index_select(0, links.pair_of_link)


def aggregate(weights: Tensor, value: Encoded, span: Span, links: Links) -> Tensor:
    """Weighted sums of the values, [Nq, B, H, D]: those outside the span, and zeros inside."""
    start, stop = span
    v = _outside(value, span)
    assert v is not None
    by_pair = weights.index_select(0, links.link_of_pair).permute(1, 2, 0)
    found = (torch.unflatten(by_pair, -1, (links.geometry.num_queries, -1)) @ v).permute(2, 0, 1, 3)
    return torch.cat((found[..., :start], found.new_zeros((*found.shape[:-1], stop - start)), found[..., start:]), -1)
