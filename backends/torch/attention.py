"""Softmax over links as they are visited, for ``stream``: nothing of size [L, B, H] is ever held.

    p_ij = exp(l_ij - m_i)    s_i = sum_j p_ij    o_i = sum_j p_ij v_ij / s_i        l_ij = scale <q_ij, k_ij> + bias

m_i is 0 where no sum comes near the ends of the number range, else the largest logit, found by a pass of its own:
the result is the same. With a_ij = p_ij / s_i, encoded and computed again from m and s alone,

    dv_ij = a_ij do_i    dl_ij = scale a_ij (<do_i, v_ij> - <do_i, o_i>)    dq_ij = dl_ij k_ij    dk_ij = dl_ij q_ij

The batch is gone through in parts, so that the workspaces don't grow with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch import few_rows, memory, pairwise, passes, plain
from translution.backends.torch.by_link import ByLink, Numbers
from translution.backends.torch.call import Call, Gathered, divided
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.memory import Memory
from translution.backends.torch.products import is_for_onednn, uses_onednn
from translution.backends.torch.relevance import LinkMask, items, softmax
from translution.backends.torch.stretches import Stretch, longest
from translution.normal_form import NormalForm

# The workspaces of a part of the batch, unless one item alone has more. Parts share the reading of the tables less than
# larger parts would, and each has its own small operations.
WORKSPACE_BYTES = 30 << 20
# What a stretch's features take, forward and backward, unless it is one visit.
STRETCH_BYTES = 4 << 20, 2 << 20
# Where every role is a full table, what all links of a displacement have may be as much, and it is few rows: all
# that follows the products is done in stretches of as many bytes, for all the batch.
FEW_BYTES, FEW_STRETCH_BYTES = 96 << 10, 2 << 20
# A sum outside these, and the largest logit is looked for.
SUMS = 1e-18, 1e18


@dataclass(frozen=True, slots=True)
class Attention:
    """What both directions know. ``added`` [L, B|1, H|1] is the mask's share of the logits, ``dead`` what it hides.

    ``scale`` is a tensor of no dimension: a Python number would be made one for every visit.
    """

    call: Call
    scale: Tensor
    added: Tensor | None
    dead: Tensor | None
    is_few: bool = False

    @property
    def _row(self) -> int:
        """Bytes of one item's features of one token or link."""
        role = self.call.roles[0]
        return role.heads * role.head_dim * self.scale.element_size()

    def parts(self, batch: int, backward: bool = False) -> list[slice]:
        """The batch in parts of about the same size."""
        links = self.call.links
        if self.is_few:
            return [slice(0, batch)]
        # Bands of tokens and results; backward of tokens, as they are and turned, their gradient and the cotangent.
        # Features of a visit, and of a stretch, which is at least a visit.
        of_bands, of_visits, of_stretches = (3 + uses_onednn(), 2, 3) if backward else (2, 3, 1)
        bands = of_bands * max((len(visit.query.bands) + visit.key.lane for visit in links.visits), default=0)
        tokens = bands * max(links.geometry.num_queries, links.geometry.num_keys)
        shared = of_stretches * STRETCH_BYTES[backward]
        large = (tokens + (of_visits + of_stretches) * links.widest) * self._row
        small = (tokens + of_visits * links.widest) * self._row
        return divided(batch, 1, min(WORKSPACE_BYTES // max(large, 1), (WORKSPACE_BYTES - shared) // max(small, 1)))

    def with_few_rows(self, tensors: Sequence[Tensor], backward: bool = False) -> "Attention":
        """By :mod:`few_rows`, where that is faster, else as it is."""
        like, links = tensors[0], self.call.links
        if torch.compiler.is_compiling() or like.device.type not in ("cpu", "meta") or not self.call.is_full(tensors):
            return self
        batch, (number,) = like.shape[1], self.call.matrices(0)
        if links.count * batch * self._row > FEW_BYTES * len(links.steps):
            return self
        if backward and any(is_for_onednn(rows * batch, tensors[number], like.dtype) for _, rows in links.shapes):
            return self
        return replace(self, is_few=True)

    def in_large_parts(self, tensors: Sequence[Tensor]) -> "Attention":
        """For the backward: where it takes several parts, with visits that leave room for larger ones.

        Every part reads all tables and adds to all their gradients.
        """
        if torch.compiler.is_compiling() or not self.call.is_full(tensors):
            return self
        if len(self.parts(tensors[0].shape[1], backward=True)) == 1:
            return self
        return replace(self, call=replace(self.call, links=self.call.links.apart))

    def stretches(self, batch: int, backward: bool = False) -> tuple[Stretch, ...]:
        """All visits, for a part of the batch of ``batch`` items."""
        most = FEW_STRETCH_BYTES if self.is_few else STRETCH_BYTES[backward]
        return self.call.links.stretches(most // (max(batch, 1) * self._row), self.is_few)

    def take(self, tensors: Sequence[Tensor], backward: bool = False) -> Memory:
        """What all parts of one direction work in."""
        kind = "backward" if backward else "forward", self.is_few, *self.call.kind(tensors)
        return memory.take(kind, tensors[0])

    def numbers(self, name: str, stretches: tuple[Stretch, ...], batch: int, like: Tensor, own: Memory) -> Numbers:
        """Room for one number of every link and head of a stretch, of ``batch`` items."""
        links, item = longest(stretches), (batch, self.call.roles[0].heads)
        return own.once((name, links, item), lambda: Numbers(own.store, like, links, item))

    def logits(self, products: Tensor, stretch: Stretch, bias: Tensor | None, part: slice, out: Tensor) -> None:
        """l [links, B, H] from q_ij k_ij [.., D]; -inf where masked."""
        found = torch.sum(products, -1, out=out).mul_(self.scale)
        own = stretch.links
        if bias is not None:
            found.add_(bias.index_select(0, self.call.links.value_class[own]).unsqueeze(1))
        if self.added is not None:
            found.add_(items(self.added, part)[own])
        if self.dead is not None:
            found.masked_fill_(items(self.dead, part)[own], -torch.inf)

    def attend(self, bias: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """o_i of all value roles side by side [Nq, B, H, widths], s_i and m_i [Nq, B, H]; None where every m_i is 0."""
        call, like = self.call, tensors[0]
        batch, heads, queries = like.shape[1], call.roles[0].heads, call.links.geometry.num_queries
        attention = self.with_few_rows(tensors)
        outs = [like.new_zeros((queries, batch, heads * role.head_dim)) for role in call.roles[2:]]
        total, highest, work = like.new_zeros((queries, batch, heads)), None, attention.take(tensors)
        for own_items in attention.parts(batch):
            part = _Part(attention, bias, tensors, own_items, work.part(own_items.stop - own_items.start))
            own, own_total = [out[:, own_items] for out in outs], total[:, own_items]
            part.sums(own, own_total, None)
            where = part.far(own, own_total)
            if where is not None:
                highest = torch.zeros_like(total) if highest is None else highest
                part.highest(highest[:, own_items])
                # A query whose sums are right keeps them to the bit, whatever others have.
                highest[:, own_items].masked_fill_(~where, 0.0)
                for sums in (own_total, *own):
                    sums.zero_()
                part.sums(own, own_total, highest[:, own_items])
        memory.give_back(work)
        total.masked_fill_(total == 0, 1.0)
        by_head = [torch.unflatten(out, -1, (heads, -1)).div_(total.unsqueeze(-1)) for out in outs]
        return by_head[0] if len(by_head) == 1 else torch.cat(by_head, -1), total, highest

    def gradients(
        self,
        bias: Tensor | None,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        cotangent: Tensor,
        out: Tensor,
        total: Tensor,
        highest: Tensor | None,
    ) -> list[Tensor | None]:
        """Of the bias and of all tensors, None for what needs none, from what :meth:`attend` says."""
        attention = self.with_few_rows(tensors, backward=True).in_large_parts(tensors)
        d_bias = None if bias is None or not needs[0] else torch.zeros_like(bias)
        work = attention.take(tensors, backward=True)
        gathered = Gathered(attention.call, tensors, needs[1:])
        for part in attention.parts(out.shape[1], backward=True):
            own_highest = None if highest is None else highest[:, part]
            pull = _Pull(attention, bias, cotangent[:, part], out[:, part], total[:, part], own_highest)
            pull.back(tensors, gathered, part, d_bias, work.part(part.stop - part.start))
            gathered.close()
        memory.give_back(work)
        return [d_bias, *gathered.results()]

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

    def __init__(
        self, attention: Attention, bias: Tensor | None, tensors: Sequence[Tensor], part: slice, own: Memory
    ) -> None:
        self._attention, self._bias, self._part, self._links = attention, bias, part, attention.call.links
        call, batch = attention.call, tensors[0][:, part].shape[1]
        self._stretches = attention.stretches(batch)
        forward = few_rows.Forward if attention.is_few else passes.Forward
        self._visited = forward(call, tensors, part, self._stretches, own)
        self._numbers = attention.numbers("weights", self._stretches, batch, tensors[0], own)

    def _logits(self, stretch: Stretch) -> ByLink:
        found = self._numbers[stretch]
        self._attention.logits(self._visited.products(stretch), stretch, self._bias, self._part, found.whole)
        return found

    def sums(self, outs: Sequence[Tensor], total: Tensor, highest: Tensor | None) -> None:
        """Sum up o_i s_i and s_i, which are 0 yet. Without ``highest`` every m_i is 0."""
        self._visited.open(outs, total)
        for stretch in self._stretches:
            weights = self._logits(stretch)
            if highest is not None:
                weights.whole.sub_(highest.index_select(0, self._links.query_index[stretch.links]))
            weights.whole.exp_()
            self._visited.add(stretch, weights)
        self._visited.close()

    def far(self, outs: Sequence[Tensor], total: Tensor) -> Tensor | None:
        """As :func:`far`."""
        mask = self._attention.call.mask
        return far(self._links, None if mask is None else mask.part(self._part), outs, total)

    def highest(self, out: Tensor) -> None:
        """The largest logit of every query, 0 where it sees nothing."""
        index = self._links.query_index
        found = torch.full_like(out, -torch.inf)
        for stretch in self._stretches:
            logits = self._logits(stretch).whole
            own = index[stretch.links, None, None].expand(logits.shape)
            found.scatter_reduce_(0, own, logits, "amax")
        out.copy_(found.masked_fill_(found == -torch.inf, 0.0))


def far(links: Links, mask: LinkMask | None, outs: Sequence[Tensor], total: Tensor) -> Tensor | None:
    """Where a sum overflowed or lost what it should hold, [Nq, B, H]; None if nowhere.

    A query that sees nothing rightly has 0.
    """
    found = _beyond(total, *SUMS)
    for out in outs:
        largest = torch.finfo(out.dtype).max
        found |= torch.unflatten(_beyond(out, -largest, largest), -1, (total.shape[-1], -1)).any(-1)
    some = found.any()
    if some.is_meta or not some:
        return None
    live = total.new_ones((links.count, 1, 1)) if mask is None else mask.live.to(total.dtype)
    sees = total.new_zeros((len(total), *live.shape[1:])).index_add_(0, links.query_index, live) > 0
    found &= sees
    return found if found.any() else None


def _beyond(value: Tensor, low: float, high: float) -> Tensor:
    """Where a number is outside. NaN is not: no other way makes a number of it."""
    return (value < low) | (value > high)


class Softmax(Operation):
    """o_i [Nq, B, H, widths] of an attention, a bias [T, H] and the tensors of its call."""

    @staticmethod
    def forward(ctx: Any, attention: Attention, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        out, total, highest = attention.attend(bias, tensors)
        ctx.attention = attention
        ctx.save_for_backward(out, total, highest, bias, *tensors)
        return out

    @staticmethod
    def compute(attention: Attention, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        return attention.attend(bias, tensors)[0]

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        attention: Attention = ctx.attention
        needs = ctx.needs_input_grad[1:]
        out, total, highest, bias, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():

            def compute(own_bias: Tensor | None, *own: Tensor) -> Tensor:
                return attention.whole(own_bias, own)

            return (None, *gradients_with_graph(compute, (bias, *tensors), needs, cotangent))
        return (None, *attention.gradients(bias, tensors, needs, cotangent, out, total, highest))


class _Pull:
    """The backward of a part of the batch. ``out`` and its cotangent are [Nq, b, H, widths], the others [Nq, b, H]."""

    def __init__(
        self,
        attention: Attention,
        bias: Tensor | None,
        cotangent: Tensor,
        out: Tensor,
        total: Tensor,
        highest: Tensor | None,
    ) -> None:
        self._attention, self._bias, self._links = attention, bias, attention.call.links
        widths = [role.head_dim for role in attention.call.roles[2:]]
        self._cotangents = [own.flatten(2) for own in torch.split(cotangent, widths, -1)]
        self._highest, self._inverse, self._minus_delta = highest, 1.0 / total, (cotangent * out).sum(-1).neg_()

    def back(
        self, tensors: Sequence[Tensor], gathered: Gathered, part: slice, d_bias: Tensor | None, own: Memory
    ) -> None:
        """Stretch by stretch."""
        attention, batch = self._attention, self._minus_delta.shape[1]
        stretches = attention.stretches(batch, backward=True)
        backward = few_rows.Backward if attention.is_few else passes.Backward
        back = backward(attention.call, tensors, gathered, part, stretches, self._cotangents, own)
        rooms = [attention.numbers(name, stretches, batch, tensors[0], own) for name in ("weights", "logits")]
        for stretch in stretches:
            weights, d_logits = (room[stretch] for room in rooms)
            self._write(back.products(stretch), stretch, part, weights.whole, d_logits.whole)
            back.values(stretch, weights, d_logits)
            d_logits.whole.mul_(weights.whole)
            if d_bias is not None:
                d_bias.index_add_(0, self._links.value_class[stretch.links], d_logits.whole.sum(1))
            d_logits.whole.mul_(attention.scale)
            back.push(stretch, d_logits)

    def _write(self, products: Tensor, stretch: Stretch, part: slice, weights: Tensor, d_weights: Tensor) -> None:
        """Write a_ij and -<do_i, o_i> [links, B, H], from q_ij k_ij [links, B, H, D]."""
        query = self._links.query_index[stretch.links]
        self._attention.logits(products, stretch, self._bias, part, weights)
        if self._highest is not None:
            weights.sub_(self._highest.index_select(0, query))
        weights.exp_().mul_(self._inverse.index_select(0, query))
        torch.index_select(self._minus_delta, 0, query, out=d_weights)


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
    attention = Attention(call, scale, None if mask is None else mask.added, dead)
    out = Softmax.call(attention, bias, *tensors)
    return list(torch.split(out, [role.head_dim for role in roles[2:]], -1))
