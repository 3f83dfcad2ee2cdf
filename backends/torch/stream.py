"""Algorithm ``stream``: one matrix product per displacement and role, nothing larger than [L, B, H] beside its inputs.

Two operations that torch differentiates as wholes, with the relevance between them in plain autograd:

    inner products   l_ij = <q_ij, k_ij>_h           dq_ij = dl_ij k_ij         dk_ij = dl_ij q_ij
    aggregation      o_i = sum_j a_ij v_ij           da_ij = <do_i, v_ij>_h     dv_ij = a_ij do_i

Their backward encodes each step again, so neither keeps q, k or v. Where a graph of the gradient itself is wanted, it
comes from the functions of ``pairwise``, which torch can differentiate again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch import pairwise, plain
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask
from translution.backends.torch.steps import Adder, Reader, RoleSteps


@dataclass(frozen=True, slots=True)
class _Call:
    """What both directions need to know; the tensors themselves are saved by torch."""

    links: Links
    mask: LinkMask | None
    roles: tuple[Encoded, ...]

    def with_tensors(self, tensors: Sequence[Tensor]) -> list[Encoded]:
        """The roles with their tensors in place, one after another."""
        found, rest = [], list(tensors)
        for role in self.roles:
            count = len(role.tensors)
            found.append(role.with_tensors(rest[:count]))
            rest = rest[count:]
        return found

    def steps(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[RoleSteps]:
        """The roles ready to be encoded step by step, and to gather the gradients that are needed."""
        found, rest = [], list(needs)
        for role in self.with_tensors(tensors):
            count = len(role.tensors)
            found.append(RoleSteps(role, self.links, self.mask, rest[:count]))
            rest = rest[count:]
        return found


def _call(links: Links, mask: LinkMask | None, *roles: Encoded) -> _Call:
    nothing = torch.empty(0)
    bare = tuple(role.with_tensors([nothing] * len(role.tensors)) for role in roles)
    return _Call(links, None if mask is None else replace(mask, added=None), bare)


class _InnerProducts(Operation):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return _InnerProducts.compute(call, *tensors)

    @staticmethod
    def compute(call: _Call, *tensors: Tensor) -> Tensor:
        query, key = call.steps(tensors, [False] * len(tensors))
        out = tensors[0].new_empty((call.links.count, query.batch, query.encoded.heads))
        for visit in call.links.visits:
            q, k = query.encode(visit), key.encode(visit)
            torch.sum(q.mul_(k), -1, out=out[visit.start : visit.stop])
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, needs = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():

            def compute(*own: Tensor) -> Tensor:
                query, key = call.with_tensors(own)
                return pairwise.inner_products(query, key, call.links, call.mask)

            return (None, *gradients_with_graph(compute, tensors, needs, cotangent))
        query, key = call.steps(tensors, needs)
        for visit in call.links.visits:
            q, k = query.encode(visit), key.encode(visit)
            g = cotangent[visit.start : visit.stop].unsqueeze(-1)
            if query.wanted:
                query.push(visit, k * g)
            if key.wanted:
                key.push(visit, q.mul_(g))
        return (None, *query.gradients(), *key.gradients())


class _Aggregation(Operation):
    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(weights, *tensors)
        return _Aggregation.compute(call, weights, *tensors)

    @staticmethod
    def compute(call: _Call, weights: Tensor | None, *tensors: Tensor) -> Tensor:
        (value,) = call.steps(tensors, [False] * len(tensors))
        role = value.encoded
        heads = role.heads if weights is None else weights.shape[2]
        # NaN that one head sees is absent to another that shares the values (M4).
        shared = call.mask.live.unsqueeze(-1) if call.mask is not None and role.heads < heads else None
        total = Adder((call.links.geometry.num_queries, value.batch, heads * role.head_dim), tensors[0])
        for visit in call.links.visits:
            sums = total.rows(visit.query)
            if weights is None:
                value.add_encoded(visit, sums)
            else:
                by_head = sums.view(visit.stop - visit.start, value.batch, heads, role.head_dim)
                own = weights[visit.start : visit.stop].unsqueeze(-1)
                if shared is None:
                    by_head.addcmul_(value.encode(visit), own)
                else:
                    by_head.add_(torch.where(shared[visit.start : visit.stop], value.encode(visit) * own, 0.0))
        return torch.unflatten(total.flush(), -1, (heads, role.head_dim))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        weights, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def compute(own_weights: Tensor | None, *own: Tensor) -> Tensor:
                (value,) = call.with_tensors(own)
                return pairwise.aggregate(own_weights, value, call.links, call.mask)

            return (None, *gradients_with_graph(compute, ctx.saved_tensors, needs, cotangent))
        (value,) = call.steps(tensors, needs[1:])
        rows = Reader(cotangent.flatten(2))
        d_weights = cotangent.new_empty(weights.shape) if needs[0] else None
        for visit in call.links.visits:
            g = rows.rows(visit.query).view(visit.stop - visit.start, *cotangent.shape[1:])
            if d_weights is not None:
                torch.sum(value.encode(visit) * g, -1, out=d_weights[visit.start : visit.stop])
            if value.wanted:
                dv = g if weights is None else g * weights[visit.start : visit.stop].unsqueeze(-1)
                value.push(visit, dv.sum(2, keepdim=True) if dv.shape[2] > value.encoded.heads else dv)
        return (None, d_weights, *value.gradients())


def inner_products(query: Encoded, key: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """<q_ij, k_ij>_h for every link, [L, B, H]."""
    span = plain.relative_span(links, mask, query, key)
    if span == (0, query.head_dim):
        return _InnerProducts.call(_call(links, mask, query, key), *query.tensors, *key.tensors)
    outside = plain.inner_products(query, key, span, links)
    if span[0] == span[1]:
        return outside
    query, key = plain.within(query, span), plain.within(key, span)
    return outside + _InnerProducts.call(_call(links, mask, query, key), *query.tensors, *key.tensors)


def aggregate(weights: Tensor | None, value: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """sum_j a_ij^h v_ij^h, [Nq, B, H, D], for weights [L, B, H] or None for ones. One value head may serve all H."""
    span = plain.relative_span(links, mask, value)
    if weights is None or span == (0, value.head_dim):
        return _Aggregation.call(_call(links, mask, value), weights, *value.tensors)
    outside = plain.aggregate(weights, value, span, links)
    if span[0] == span[1]:
        return outside
    value = plain.within(value, span)
    return plain.joined(outside, _Aggregation.call(_call(links, mask, value), weights, *value.tensors), span[0])
