"""Softmax over links as they are visited, for ``stream``: nothing of size [L, B, H] is ever held.

    p_ij = exp(l_ij - m_i)    s_i = sum_j p_ij    o_i = sum_j p_ij v_ij / s_i        l_ij = scale <q_ij, k_ij> + bias

m_i is 0 as long as no sum comes near the ends of the number range, else the largest logit, found by a pass of its own:
the result is the same. With a_ij = p_ij / s_i, encoded and computed again from m and s alone,

    dv_ij = a_ij do_i    dl_ij = scale a_ij (<do_i, v_ij> - <do_i, o_i>)    dq_ij = dl_ij k_ij    dk_ij = dl_ij q_ij

The batch is gone through in parts, so that the workspaces don't grow with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch import pairwise, plain
from translution.backends.torch.bands import Adder, Reader
from translution.backends.torch.call import Call, Gathered, divided
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask, items, softmax
from translution.backends.torch.steps import RoleSteps, Room, crossed, multiplied, reversed_product
from translution.backends.torch.visits import Visit
from translution.normal_form import NormalForm

# The workspaces of a part of the batch, unless one item alone has more. Parts share the reading of the tables less than
# larger parts would, and each has its own small operations.
WORKSPACE_BYTES = 30 << 20
# A first logit beyond this, or a sum outside these, and the largest logit is looked for.
FAR_LOGIT = 30.0
SUMS = 1e-18, 1e18


@dataclass(frozen=True, slots=True)
class _Attention:
    """What both directions know. ``added`` [L, B|1, H|1] is the mask's share of the logits, ``dead`` what it hides.

    ``scale`` is a tensor of no dimension: a Python number would be made one for every visit.
    """

    call: Call
    scale: Tensor
    added: Tensor | None
    dead: Tensor | None

    def parts(self, batch: int, backward: bool = False) -> list[slice]:
        """The batch in parts of about the same size."""
        links, role = self.call.links, self.call.roles[0]
        # Up to three bands each of tokens and results; backward of tokens, as they are and turned, their gradient and
        # the cotangent. And five results of a visit.
        bands = 12 if backward else 6
        rows = bands * max(links.geometry.num_queries, links.geometry.num_keys) + 5 * links.widest
        item = rows * role.heads * role.head_dim * 4
        return divided(batch, item, WORKSPACE_BYTES)

    def logits(self, products: Tensor, visit: Visit, bias: Tensor | None, part: slice) -> Tensor:
        """l [displacements, P, B, H] from q_ij k_ij [.., D]; -inf where masked."""
        found = products.sum(-1).mul_(self.scale)
        own = slice(visit.start, visit.stop)
        if bias is not None:
            found.add_(bias[visit.value_rows, None, None])
        if self.added is not None:
            found.add_(torch.unflatten(items(self.added, part)[own], 0, visit.shape))
        if self.dead is not None:
            found.masked_fill_(torch.unflatten(items(self.dead, part)[own], 0, visit.shape), -torch.inf)
        return found

    def whole(self, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        """The result in plain autograd."""
        call = self.call
        query, key, *values = call.with_tensors(tensors)
        logits = self.scale * pairwise.inner_products(query, key, call.links, call.mask)
        if bias is not None:
            logits = logits + bias.index_select(0, call.links.value_class).unsqueeze(1)
        if self.added is not None:
            logits = logits + self.added
        weights = softmax(logits, call.links, call.mask)
        return torch.cat([pairwise.aggregate(weights, value, call.links, call.mask) for value in values], -1)


class _Part:
    """A part of the batch, gone through once or twice."""

    def __init__(self, attention: _Attention, bias: Tensor | None, tensors: Sequence[Tensor], part: slice) -> None:
        self._attention, self._bias, self._part, self._links = attention, bias, part, attention.call.links
        self._query, self._key, *self._values = attention.call.steps(tensors, None, part)
        self._products = self._query.workspace()

    def _logits(self, visit: Visit) -> Tensor:
        products = crossed(self._key.encode(visit), self._query.encode(visit).parts, self._products[visit.shape])
        return self._attention.logits(products, visit, self._bias, self._part)

    def sums(self, outs: Sequence[Tensor], total: Tensor, highest: Tensor | None) -> bool:
        """Sum up o_i s_i and s_i, which are 0 yet; whether they can be relied on: with ``highest`` always."""
        adders, totals = [Adder(out) for out in outs], Adder(total)
        shift = None if highest is None else Reader(highest)
        for number, visit in enumerate(self._links.visits):
            weights = self._logits(visit)
            if shift is not None:
                weights.sub_(shift.rows(visit.query).view(weights.shape))
            elif number == 0 and _beyond(weights, -torch.inf, FAR_LOGIT):
                return False
            weights.exp_()
            totals.rows(visit.query).view(weights.shape).add_(weights)
            for value, adder in zip(self._values, adders, strict=True):
                value.add_weighted(visit, weights, adder.rows(visit.query))
        for adder in (totals, *adders):
            adder.close()
        return highest is not None or self._is_safe(outs, total)

    def _is_safe(self, outs: Sequence[Tensor], total: Tensor) -> bool:
        """Whether no sum overflowed or lost what it should hold. A query that sees nothing rightly has 0."""
        if _beyond(total, *SUMS) and _beyond(torch.where(self._sees(total), total, 1.0), *SUMS):
            return False
        return not any(_beyond(out, *(sign * torch.finfo(out.dtype).max for sign in (-1, 1))) for out in outs)

    def _sees(self, like: Tensor) -> Tensor:
        """Whether a query has a live link, [Nq, B|1, H|1]."""
        mask = self._attention.call.mask
        live = like.new_ones((self._links.count, 1, 1)) if mask is None else mask.part(self._part).live.to(like.dtype)
        return like.new_zeros((len(like), *live.shape[1:])).index_add_(0, self._links.query_index, live) > 0

    def highest(self, out: Tensor) -> None:
        """The largest logit of every query, 0 where it sees nothing."""
        index = self._links.query_index
        found = torch.full_like(out, -torch.inf)
        for visit in self._links.visits:
            logits = self._logits(visit).flatten(0, 1)
            own = index[visit.start : visit.stop, None, None].expand(logits.shape)
            found.scatter_reduce_(0, own, logits, "amax")
        out.copy_(found.masked_fill_(found == -torch.inf, 0.0))


def _beyond(value: Tensor, low: float, high: float) -> bool:
    """Whether some number is outside. NaN is not: no other way makes a number of it."""
    found = ((value < low) | (value > high)).any()
    return not found.is_meta and bool(found)


def _attend(
    attention: _Attention, bias: Tensor | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o_i of all value roles side by side [Nq, B, H, widths], s_i and m_i [Nq, B, H]; None where every m_i is 0."""
    call, like = attention.call, tensors[0]
    batch, heads, queries = like.shape[1], call.roles[0].heads, call.links.geometry.num_queries
    outs = [like.new_zeros((queries, batch, heads * role.head_dim)) for role in call.roles[2:]]
    total, highest = like.new_zeros((queries, batch, heads)), None
    for own_items in attention.parts(batch):
        part = _Part(attention, bias, tensors, own_items)
        own, own_total = [out[:, own_items] for out in outs], total[:, own_items]
        if not part.sums(own, own_total, None):
            highest = torch.zeros_like(total) if highest is None else highest
            part.highest(highest[:, own_items])
            for sums in (own_total, *own):
                sums.zero_()
            part.sums(own, own_total, highest[:, own_items])
    total.masked_fill_(total == 0, 1.0)
    by_head = [torch.unflatten(out, -1, (heads, -1)).div_(total.unsqueeze(-1)) for out in outs]
    return by_head[0] if len(by_head) == 1 else torch.cat(by_head, -1), total, highest


class _Softmax(Operation):
    @staticmethod
    def forward(ctx: Any, attention: _Attention, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        out, total, highest = _attend(attention, bias, tensors)
        ctx.attention = attention
        ctx.save_for_backward(out, total, highest, bias, *tensors)
        return out

    @staticmethod
    def compute(attention: _Attention, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        return _attend(attention, bias, tensors)[0]

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        attention: _Attention = ctx.attention
        needs = ctx.needs_input_grad[1:]
        out, total, highest, bias, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def compute(own_bias: Tensor | None, *own: Tensor) -> Tensor:
                return attention.whole(own_bias, own)

            return (None, *gradients_with_graph(compute, (bias, *tensors), needs, cotangent))
        d_bias = None if bias is None or not needs[0] else torch.zeros_like(bias)
        gathered = Gathered(attention.call, tensors, needs[1:])
        for part in attention.parts(out.shape[1], backward=True):
            own_highest = None if highest is None else highest[:, part]
            pull = _Pull(attention, bias, cotangent[:, part], out[:, part], total[:, part], own_highest)
            pull.back(attention.call.steps(tensors, gathered, part), part, d_bias)
            gathered.close()
        return (None, d_bias, *gathered.results())


class _Pull:
    """The backward of a part of the batch. ``out`` and its cotangent are [Nq, b, H, widths], the others [Nq, b, H]."""

    def __init__(
        self,
        attention: _Attention,
        bias: Tensor | None,
        cotangent: Tensor,
        out: Tensor,
        total: Tensor,
        highest: Tensor | None,
    ) -> None:
        self._attention, self._bias, self._links = attention, bias, attention.call.links
        widths = [role.head_dim for role in attention.call.roles[2:]]
        self._cotangents = [Reader(part.flatten(2)) for part in torch.split(cotangent, widths, -1)]
        self._shift = None if highest is None else Reader(highest)
        self._inverse, self._delta = Reader(1.0 / total), Reader((cotangent * out).sum(-1))

    def back(self, roles: Sequence[RoleSteps], part: slice, d_bias: Tensor | None) -> None:
        """Visit by visit."""
        query, key, *values = roles
        products, width = query.workspace(), (query.encoded.heads, query.encoded.head_dim)
        work = [products if (v.encoded.heads, v.encoded.head_dim) == width else v.workspace() for v in values]
        for visit in self._links.visits:
            q, k, own = query.encode(visit), key.encode(visit), products[visit.shape]
            logits = self._attention.logits(crossed(k, q.parts, own), visit, self._bias, part)
            weights = logits if self._shift is None else logits.sub_(self._rows(self._shift, visit, logits))
            weights.exp_().mul_(self._rows(self._inverse, visit, weights))
            d_logits = -self._rows(self._delta, visit, weights)
            for value, reader, room in zip(values, self._cotangents, work, strict=True):
                g = reader.rows(visit.query).view(*weights.shape, value.encoded.head_dim)
                self._value(value, visit, g, weights, d_logits, room[visit.shape])
            d_logits.mul_(weights)
            if d_bias is not None:
                d_bias[visit.value_rows] += d_logits.sum((1, 2))
            d_products = d_logits.mul_(self._attention.scale).unsqueeze(-1).unbind(0)
            if query.wanted:
                query.push(visit, crossed(k, d_products, own))
            if key.wanted:
                key.push(visit, reversed_product(q, d_products, own))

    @staticmethod
    def _rows(reader: Reader, visit: Visit, like: Tensor) -> Tensor:
        return reader.rows(visit.query).view(like.shape)

    @staticmethod
    def _value(value: RoleSteps, visit: Visit, g: Tensor, weights: Tensor, d_weights: Tensor, room: Room) -> None:
        """Add <do_i, v_ij> to ``d_weights``, and push a_ij do_i."""
        if value.encoded.heads == g.shape[3]:
            d_weights.add_(multiplied(value.encode(visit), g, room).sum(-1))
            own = torch.mul(g, weights.unsqueeze(-1), out=room.whole)
        else:
            d_weights.add_((value.seen(visit, g.shape[3]).stacked() * g).sum(-1))
            own = (g * weights.unsqueeze(-1)).sum(3, keepdim=True)
        if value.wanted:
            value.push(visit, own)


def is_one_pass(form: NormalForm, links: Links, mask: LinkMask | None, roles: Sequence[Encoded]) -> bool:
    """Whether :func:`attend` is the way: one softmax over content, and no role with a share that needs no links."""
    (branch, *others) = form.branches
    if others or branch.kind != "softmax" or not branch.content:
        return False
    if mask is not None and mask.added is not None and mask.added.requires_grad:
        return False
    query, key, *values = roles
    alone = [(query, key), *((value,) for value in values)]
    return all(plain.relative_span(links, mask, *own) == (0, own[0].head_dim) for own in alone)


def attend(
    form: NormalForm, links: Links, mask: LinkMask | None, bias: Tensor | None, roles: Sequence[Encoded]
) -> list[Tensor]:
    """o_i of every value role, [Nq, B, H, width], for roles query, key and values. ``bias`` is [T, H]."""
    (branch,) = form.branches
    call, tensors = Call.of(links, mask, *roles)
    dead = None if mask is None else ~mask.live
    scale = torch.full((), branch.scale, dtype=tensors[0].dtype, device=tensors[0].device)
    attention = _Attention(call, scale, None if mask is None else mask.added, dead)
    out = _Softmax.call(attention, bias, *tensors)
    return list(torch.split(out, [role.head_dim for role in roles[2:]], -1))
