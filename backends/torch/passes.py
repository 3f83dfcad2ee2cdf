"""The visits of a softmax over links, in either direction: products before it, and what is added up after it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder, Reader
from translution.backends.torch.by_link import ByLink
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.memory import Memory
from translution.backends.torch.steps import Features, RoleSteps, crossed, multiplied, reversed_product
from translution.backends.torch.stretches import Stretch, longest


class Forward:
    """The forward of some of the batch items."""

    def __init__(
        self, call: Call, tensors: Sequence[Tensor], part: slice, stretches: tuple[Stretch, ...], memory: Memory
    ) -> None:
        self._query, self._key, *self._values = call.steps(tensors, None, part, memory)
        self._products = self._query.workspace("products", longest(stretches))
        self._memory = memory

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        for visit, room in zip(stretch.visits, self._products.rooms(stretch), strict=True):
            crossed(self._key.encode(visit), self._query.encode(visit).parts, room.parts)
        return self._products.whole(stretch)

    def open(self, outs: Sequence[Tensor], total: Tensor) -> None:
        """Say what to add to: o_i s_i of every value role [Nq, B, H * D] and s_i [Nq, B, H]."""
        heads = total.shape[2]
        self._outs = [
            Adder(out, (heads, out.shape[2] // heads), self._memory, ("out", n)) for n, out in enumerate(outs)
        ]
        self._total = Adder(total, (heads, 1), self._memory, "total")

    def add(self, stretch: Stretch, weights: ByLink) -> None:
        """Add p_ij [links, B, H], and p_ij v_ij of every value role."""
        for visit, own in zip(stretch.visits, weights.visits, strict=True):
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
        memory: Memory,
    ) -> None:
        self._query, self._key, *self._values = call.steps(tensors, gathered, part, memory)
        heads, most = self._query.encoded.heads, longest(stretches)
        self._cotangents = [
            Reader(own, (heads, value.encoded.head_dim), memory, ("cotangents", n))
            for n, (own, value) in enumerate(zip(cotangents, self._values, strict=True))
        ]
        self._q_rooms, self._k_rooms = (role.workspace("kept", most) for role in (self._query, self._key))
        self._products = self._query.workspace("products", most)
        item = heads, self._query.encoded.head_dim
        self._work = [
            self._products if (v.encoded.heads, v.encoded.head_dim) == item else v.workspace("products", most)
            for v in self._values
        ]
        self._kept: list[tuple[Features, Features]] = []

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        self._kept, query, key = [], self._query, self._key
        rooms = zip(query.rooms(stretch, self._q_rooms), key.rooms(stretch, self._k_rooms), strict=True)
        for visit, (q_room, k_room), room in zip(stretch.visits, rooms, self._products.rooms(stretch), strict=True):
            q, k = query.encode(visit, q_room), key.encode(visit, k_room)
            crossed(k, q.parts, room.parts)
            self._kept.append((q, k))
        return self._products.whole(stretch)

    def values(self, stretch: Stretch, weights: ByLink, d_weights: ByLink) -> None:
        """Add <do_i, v_ij> to ``d_weights`` [links, B, H], and gather the gradients a_ij do_i of the values."""
        for value, reader, work in zip(self._values, self._cotangents, self._work, strict=True):
            cotangents = [reader.rows(visit.query) for visit in stretch.visits]
            if value.encoded.heads < weights.whole.shape[2]:
                self._shared_value(value, stretch, cotangents, weights, d_weights)
                continue
            rooms = work.rooms(stretch)
            for visit, g, room in zip(stretch.visits, cotangents, rooms, strict=True):
                multiplied(value.encode(visit), g, room)
            d_weights.whole.add_(work.whole(stretch).sum(-1))
            if value.wanted:
                for visit, g, factor, room in zip(stretch.visits, cotangents, weights.visits, rooms, strict=True):
                    value.push(visit, torch.mul(g, factor, out=room.whole))

    @staticmethod
    def _shared_value(
        value: RoleSteps, stretch: Stretch, cotangents: Sequence[Tensor], weights: ByLink, d_weights: ByLink
    ) -> None:
        """The same, where one head of values serves all."""
        for visit, g, factor, own in zip(stretch.visits, cotangents, weights.visits, d_weights.visits, strict=True):
            own.add_((value.seen(visit, weights.whole.shape[2]).stacked() * g).sum(-1, keepdim=True))
            if value.wanted:
                value.push(visit, (g * factor).sum(3, keepdim=True))

    def push(self, stretch: Stretch, d_logits: ByLink) -> None:
        """Gather the gradients dl_ij k_ij of the queries and dl_ij q_ij of the keys, for ``d_logits`` [links, B, H]."""
        steps = zip(stretch.visits, self._kept, self._products.rooms(stretch), strict=True)
        for (visit, (q, k), room), d in zip(steps, d_logits.displacements, strict=True):
            if self._query.wanted:
                crossed(k, d, room.parts)
                self._query.push(visit, room.whole)
            if self._key.wanted:
                reversed_product(q, d, room.parts)
                self._key.push(visit, room.whole)
