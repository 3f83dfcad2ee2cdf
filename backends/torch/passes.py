"""The visits of a softmax over links, in either direction: products before it, and what is added up after it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder, Reader
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.steps import Features, RoleSteps, crossed, multiplied, reversed_product
from translution.backends.torch.stretches import Stretch, longest


class Forward:
    """The forward of some of the batch items."""

    def __init__(self, call: Call, tensors: Sequence[Tensor], part: slice, stretches: tuple[Stretch, ...]) -> None:
        self._query, self._key, *self._values = call.steps(tensors, None, part)
        self._products = self._query.workspace(longest(stretches))

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        whole = self._products.whole(stretch)
        for visit, own in zip(stretch.visits, stretch.displacement_parts(whole), strict=True):
            crossed(self._key.encode(visit), self._query.encode(visit).parts, own)
        return whole

    def open(self, outs: Sequence[Tensor], total: Tensor) -> None:
        """Say what to add to: o_i s_i of every value role [Nq, B, H * D] and s_i [Nq, B, H]."""
        heads = total.shape[2]
        self._outs = [Adder(out, (heads, out.shape[2] // heads)) for out in outs]
        self._total = Adder(total, (heads, 1))

    def add(self, stretch: Stretch, weights: Tensor) -> None:
        """Add p_ij [links, B, H], and p_ij v_ij of every value role."""
        for visit, own in zip(stretch.visits, stretch.visit_parts(weights.unsqueeze(-1)), strict=True):
            self._total.rows(visit.query).add_(own)
            for value, out in zip(self._values, self._outs, strict=True):
                value.add_weighted(visit, own, out.rows(visit.query))

    def close(self) -> None:
        """Let the sums have what was added."""
        for adder in (self._total, *self._outs):
            adder.close()


class Backward:
    """The backward of some of the batch items, for every stretch: ``products``, then ``values``, then ``push``.

    ``cotangents`` are do_i of every value role, [Nq, B, H * D].
    """

    def __init__(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        gathered: Gathered,
        part: slice,
        stretches: tuple[Stretch, ...],
        cotangents: Sequence[Tensor],
    ) -> None:
        self._query, self._key, *self._values = call.steps(tensors, gathered, part)
        heads, most = self._query.encoded.heads, longest(stretches)
        self._cotangents = [
            Reader(own, (heads, value.encoded.head_dim)) for own, value in zip(cotangents, self._values, strict=True)
        ]
        self._q_rooms, self._k_rooms, self._products = (
            role.workspace(most) for role in (self._query, self._key, self._query)
        )
        item = heads, self._query.encoded.head_dim
        self._work = [
            self._products if (v.encoded.heads, v.encoded.head_dim) == item else v.workspace(most) for v in self._values
        ]
        self._kept: list[tuple[Features, Features]] = []

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        whole, self._kept = self._products.whole(stretch), []
        query, key = self._query, self._key
        rooms = zip(query.rooms(stretch, self._q_rooms), key.rooms(stretch, self._k_rooms), strict=True)
        for visit, (q_room, k_room), own in zip(stretch.visits, rooms, stretch.displacement_parts(whole), strict=True):
            q, k = query.encode(visit, q_room), key.encode(visit, k_room)
            crossed(k, q.parts, own)
            self._kept.append((q, k))
        return whole

    def values(self, stretch: Stretch, weights: Tensor, d_weights: Tensor) -> None:
        """Add <do_i, v_ij> to ``d_weights`` [links, B, H], and gather the gradients a_ij do_i of the values."""
        for value, reader, work in zip(self._values, self._cotangents, self._work, strict=True):
            cotangents = [reader.rows(visit.query) for visit in stretch.visits]
            if value.encoded.heads < weights.shape[2]:
                self._shared_value(value, stretch, cotangents, weights, d_weights)
                continue
            rooms = work.rooms(stretch)
            for visit, g, room in zip(stretch.visits, cotangents, rooms, strict=True):
                multiplied(value.encode(visit), g, room)
            d_weights.add_(work.whole(stretch).sum(-1))
            if value.wanted:
                factors = stretch.visit_parts(weights.unsqueeze(-1))
                for visit, g, factor, room in zip(stretch.visits, cotangents, factors, rooms, strict=True):
                    value.push(visit, torch.mul(g, factor, out=room.whole))

    @staticmethod
    def _shared_value(
        value: RoleSteps, stretch: Stretch, cotangents: Sequence[Tensor], weights: Tensor, d_weights: Tensor
    ) -> None:
        """The same, where one head of values serves all."""
        found, factors = stretch.visit_parts(d_weights), stretch.visit_parts(weights.unsqueeze(-1))
        for visit, g, factor, own in zip(stretch.visits, cotangents, factors, found, strict=True):
            own.add_((value.seen(visit, weights.shape[2]).stacked() * g).sum(-1))
            if value.wanted:
                value.push(visit, (g * factor).sum(3, keepdim=True))

    def push(self, stretch: Stretch, d_logits: Tensor) -> None:
        """Gather the gradients dl_ij k_ij of the queries and dl_ij q_ij of the keys, for ``d_logits`` [links, B, H]."""
        steps = zip(stretch.visits, self._kept, self._products.rooms(stretch), strict=True)
        for (visit, (q, k), room), d in zip(steps, stretch.displacement_parts(d_logits.unsqueeze(-1)), strict=True):
            if self._query.wanted:
                crossed(k, d, room.parts)
                self._query.push(visit, room.whole)
            if self._key.wanted:
                reversed_product(q, d, room.parts)
                self._key.push(visit, room.whole)
