"""Algorithm ``stream``: one matrix product per displacement and role, nothing larger than [L, B, H] beside its inputs.

Two operations that torch differentiates as wholes, with the relevance between them in plain autograd:

    inner products   l_ij = <q_ij, k_ij>_h           dq_ij = dl_ij k_ij         dk_ij = dl_ij q_ij
    aggregation      o_i = sum_j a_ij v_ij           da_ij = <do_i, v_ij>_h     dv_ij = a_ij do_i

Their backward encodes each step again, so neither keeps q, k or v. Where a graph of the gradient itself is wanted, it
comes from the functions of ``pairwise``, which torch can differentiate again.
"""

from typing import Any

import torch
from torch import Tensor

from translution.backends.torch import pairwise, plain
from translution.backends.torch.bands import Adder, Reader
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask
from translution.backends.torch.steps import crossed, reversed_product


class _InnerProducts(Operation):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return _InnerProducts.compute(call, *tensors)

    @staticmethod
    def compute(call: Call, *tensors: Tensor) -> Tensor:
        query, key = call.steps(tensors)
        out = tensors[0].new_empty((call.links.count, query.batch, query.encoded.heads))
        products = query.workspace()
        for visit in call.links.visits:
            room = products[visit.shape]
            crossed(key.encode(visit), query.encode(visit).parts, room.parts)
            torch.sum(room.whole, -1, out=out[visit.start : visit.stop].view(room.whole.shape[:-1]))
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
        gathered = Gathered(call, tensors, needs)
        query, key = call.steps(tensors, gathered)
        products = query.workspace()
        for visit in call.links.visits:
            q, k, room = query.encode(visit), key.encode(visit), products[visit.shape]
            g = torch.unflatten(cotangent[visit.start : visit.stop], 0, visit.shape).unsqueeze(-1).unbind(0)
            if query.wanted:
                crossed(k, g, room.parts)
                query.push(visit, room.whole)
            if key.wanted:
                reversed_product(q, g, room.parts)
                key.push(visit, room.whole)
        gathered.close()
        return (None, *gathered.results())


class _Aggregation(Operation):
    @staticmethod
    def forward(ctx: Any, call: Call, weights: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(weights, *tensors)
        return _Aggregation.compute(call, weights, *tensors)

    @staticmethod
    def compute(call: Call, weights: Tensor | None, *tensors: Tensor) -> Tensor:
        (value,) = call.steps(tensors)
        role = value.encoded
        heads = role.heads if weights is None else weights.shape[2]
        total = tensors[0].new_zeros((call.links.geometry.num_queries, value.batch, heads * role.head_dim))
        adder = Adder(total, None if weights is None else (heads, role.head_dim))
        for visit in call.links.visits:
            sums = adder.rows(visit.query)
            if weights is None:
                value.add_encoded(visit, sums)
            else:
                own = torch.unflatten(weights[visit.start : visit.stop], 0, visit.shape).unsqueeze(-1)
                value.add_weighted(visit, own, sums)
        adder.close()
        return torch.unflatten(total, -1, (heads, role.head_dim))

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
        gathered = Gathered(call, tensors, needs[1:])
        (value,) = call.steps(tensors, gathered)
        rows = Reader(cotangent.flatten(2), (cotangent.shape[2], cotangent.shape[3]))
        d_weights = cotangent.new_empty(weights.shape) if needs[0] else None
        for visit in call.links.visits:
            g = rows.rows(visit.query)
            if d_weights is not None:
                own = value.encode(visit).stacked() * g
                torch.sum(own, -1, out=d_weights[visit.start : visit.stop].view(own.shape[:-1]))
            if value.wanted:
                dv = g
                if weights is not None:
                    dv = g * torch.unflatten(weights[visit.start : visit.stop], 0, visit.shape).unsqueeze(-1)
                value.push(visit, dv.sum(3, keepdim=True) if dv.shape[3] > value.encoded.heads else dv)
        gathered.close()
        return (None, d_weights, *gathered.results())


def _multiplied(links: Links, mask: LinkMask | None, query: Encoded, key: Encoded) -> Tensor:
    call, tensors = Call.of(links, mask, query, key)
    return _InnerProducts.call(call, *tensors)


def _aggregated(weights: Tensor | None, links: Links, mask: LinkMask | None, value: Encoded) -> Tensor:
    call, tensors = Call.of(links, mask, value)
    return _Aggregation.call(call, weights, *tensors)


def inner_products(query: Encoded, key: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """<q_ij, k_ij>_h for every link, [L, B, H]."""
    span = plain.relative_span(links, mask, query, key)
    if span == (0, query.head_dim):
        return _multiplied(links, mask, query, key)
    outside = plain.inner_products(query, key, span, links)
    if span[0] == span[1]:
        return outside
    query, key = plain.within(query, span), plain.within(key, span)
    return outside + _multiplied(links, mask, query, key)


def aggregate(weights: Tensor | None, value: Encoded, links: Links, mask: LinkMask | None) -> Tensor:
    """sum_j a_ij^h v_ij^h, [Nq, B, H, D], for weights [L, B, H] or None for ones. One value head may serve all H."""
    span = plain.relative_span(links, mask, value)
    if weights is None or span == (0, value.head_dim):
        return _aggregated(weights, links, mask, value)
    outside = plain.aggregate(weights, value, span, links)
    if span[0] == span[1]:
        return outside
    value = plain.within(value, span)
    return plain.joined(outside, _aggregated(weights, links, mask, value), span[0])
