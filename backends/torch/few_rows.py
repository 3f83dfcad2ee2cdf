"""The visits of a softmax over links where each has few rows: what is not a product is one call for a whole stretch.

Where products are small, what is called between them takes as long as they do. Here all links of a stretch have a copy
of their query's token and of their key's: the rows of a displacement are a range of the copies, and so are its results.
Only where every role is one full table (:meth:`Call.is_full`).

The key role has the last displacement of a visit first (visits.py): its order here is *mirrored*.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from translution.backends.torch.bands import Scratch
from translution.backends.torch.by_link import ByLink
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.memory import Memory, Store
from translution.backends.torch.products import by_onednn, is_for_onednn, outer
from translution.backends.torch.stretches import Stretch, longest


class _Rows:
    """What all links of a stretch have, ``whole`` [links, B, features], and the views of it that are asked for.

    Args:
        room: enough for it.
        heads: all of whose features are side by side.
        stretch: its links.
    """

    def __init__(self, room: Tensor, heads: int, stretch: Stretch) -> None:
        self.whole, self._heads, self._stretch = room[: stretch.count], heads, stretch

    @cached_property
    def visits(self) -> list[Tensor]:
        """For each visit [displacements, P * B, features]."""
        _, batch, features = self.whole.shape
        parts = zip(self._stretch.split(self.whole), self._stretch.visits, strict=True)
        return [part.view(v.shape[0], v.shape[1] * batch, features) for part, v in parts]

    @cached_property
    def displacements(self) -> list[Sequence[Tensor]]:
        """For each visit, and each of its displacements, [P, B, features]."""
        return self._stretch.displacement_parts(self.whole)

    @cached_property
    def by_head(self) -> Tensor:
        """[links, B, heads, features / heads]."""
        return torch.unflatten(self.whole, -1, (self._heads, -1))

    @cached_property
    def in_order(self) -> list[Tensor]:
        """All displacements."""
        return [part for parts in self.displacements for part in parts]

    @cached_property
    def mirrored(self) -> list[Tensor]:
        """All displacements, those of a visit from the last to the first."""
        return [part for parts in self.displacements for part in reversed(parts)]


class _Rooms:
    """Memory of its own for each name and number of features, taken when it is first asked for."""

    def __init__(self, like: Tensor, heads: int, stretches: Sequence[Stretch], store: Store) -> None:
        self._like, self._batch, self._heads, self._store = like.new_empty(0), like.shape[1], heads, store
        self._longest = longest(stretches)
        self._rooms: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[tuple[str, int, Stretch], _Rows] = {}

    def rows(self, name: str, stretch: Stretch, features: int) -> _Rows:
        """Room for what the links of a stretch have."""
        found = self._rows.get((name, features, stretch))
        if found is None:
            room = self._rooms.get((name, features))
            if room is None:
                room = self._store.empty(self._like, self._longest, self._batch, features)
                self._rooms[name, features] = room
            found = self._rows[name, features, stretch] = _Rows(room, self._heads, stretch)
        return found


class _Role:
    """One full table: features are ``tokens`` [N, B, R] times ``matrices`` [T, R, E].

    Args:
        call: what it is a role of, as the one of this ``number``.
        tensors: those of the call.
        gathered: where gradients go, None in the forward.
        part: the items of the batch.
        stretches: all that will be visited.
        rooms: shared by the roles of the call.
    """

    def __init__(
        self,
        call: Call,
        number: int,
        tensors: Sequence[Tensor],
        gathered: Gathered | None,
        part: slice,
        stretches: tuple[Stretch, ...],
        rooms: _Rooms,
    ) -> None:
        role, (tokens,), (table,) = call.roles[number], call.tokens(number), call.matrices(number)
        self._name, self._rooms = role.name, rooms
        self._tokens, self._matrices = tensors[tokens][:, part].flatten(2), tensors[table]
        self._opens = gathered is not None and gathered.opens
        total = None if gathered is None else gathered.totals[tokens]
        self._d_tokens = None if total is None else total[:, part].flatten(2)
        self._d_matrices = None if gathered is None else gathered.totals[table]
        self.wanted = self._d_tokens is not None or self._d_matrices is not None
        self._index = dict(zip(stretches, call.links.cut_index(role.name, stretches), strict=True))
        batch, dtype = self._tokens.shape[1], self._tokens.dtype
        self._many = {s for s in call.links.shapes if is_for_onednn(s[1] * batch, self._matrices, dtype)}

    def index(self, stretch: Stretch) -> Tensor:
        """The token of each link, mirrored for keys."""
        return self._index[stretch]

    def copied(self, name: str, stretch: Stretch) -> _Rows:
        """The token of each link."""
        found = self._rooms.rows(name, stretch, self._matrices.shape[1])
        torch.index_select(self._tokens, 0, self.index(stretch), out=found.whole)
        return found

    def encoded(self, name: str, copies: _Rows, stretch: Stretch) -> _Rows:
        """The features of each link."""
        found = self._rooms.rows(name, stretch, self._matrices.shape[2])
        for visit, rows, out in zip(stretch.visits, copies.visits, found.visits, strict=True):
            matrices = self._matrices[visit.table_rows(self._name)]
            if visit.shape in self._many:
                for own, matrix, product in zip(rows, matrices, out, strict=True):
                    product.copy_(by_onednn(own, matrix))
            else:
                torch.bmm(rows, matrices, out=out)
        return found

    def push(self, name: str, copies: _Rows, gradient: _Rows, stretch: Stretch, scratch: Scratch) -> None:
        """Take in the gradient of what :meth:`encoded` made of the copies, with room of this ``name``."""
        if self._d_matrices is not None:
            for visit, rows, own in zip(stretch.visits, copies.visits, gradient.visits, strict=True):
                opens = self._opens and visit.opens(self._name)
                outer(rows, own, self._d_matrices[visit.table_rows(self._name)], opens, scratch)
        if self._d_tokens is not None:
            found = self._rooms.rows(name, stretch, self._matrices.shape[1])
            for visit, own, out in zip(stretch.visits, gradient.visits, found.visits, strict=True):
                torch.bmm(own, self._matrices[visit.table_rows(self._name)].mT, out=out)
            self._d_tokens.index_add_(0, self.index(stretch), found.whole)


def _roles(
    call: Call,
    tensors: Sequence[Tensor],
    gathered: Gathered | None,
    part: slice,
    stretches: tuple[Stretch, ...],
    memory: Memory,
) -> tuple[_Rooms, list[_Role]]:
    """Room for features and tokens, and the roles query, key and value."""
    like, heads = tensors[0][:, part], call.roles[0].heads
    rooms = memory.once(("few rows", stretches, like.shape[1]), lambda: _Rooms(like, heads, stretches, memory.store))
    return rooms, [_Role(call, number, tensors, gathered, part, stretches, rooms) for number in range(3)]


class Forward:
    """As :class:`translution.backends.torch.passes.Forward`."""

    def __init__(
        self, call: Call, tensors: Sequence[Tensor], part: slice, stretches: tuple[Stretch, ...], memory: Memory
    ) -> None:
        _, (self._query, self._key, self._value) = _roles(call, tensors, None, part, stretches, memory)

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        q = self._query.encoded("q", self._query.copied("rows", stretch), stretch)
        k = self._key.encoded("k", self._key.copied("rows", stretch), stretch)
        torch.ops.aten._foreach_mul_.List(q.in_order, k.mirrored)
        return q.by_head

    def open(self, outs: Sequence[Tensor], total: Tensor) -> None:
        """Say what to add to: o_i s_i [Nq, B, H * D] and s_i [Nq, B, H]."""
        (self._out,), self._total = outs, total

    def add(self, stretch: Stretch, weights: ByLink) -> None:
        """Add p_ij [links, B, H], and p_ij v_ij."""
        v, index = self._value.encoded("k", self._value.copied("rows", stretch), stretch), self._query.index(stretch)
        v.by_head.mul_(weights.factors)
        self._out.index_add_(0, index, v.whole)
        self._total.index_add_(0, index, weights.whole)

    def close(self) -> None:
        """Nothing is kept back."""


class Backward:
    """As :class:`translution.backends.torch.passes.Backward`, where oneDNN makes no products."""

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
        self._rooms, (self._query, self._key, self._value) = _roles(call, tensors, gathered, part, stretches, memory)
        (self._cotangent,) = cotangents
        self._scratch = memory.once("scratch", lambda: Scratch(tensors[0], memory.store))

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        self._q_rows, self._k_rows = self._query.copied("q rows", stretch), self._key.copied("k rows", stretch)
        self._q = self._query.encoded("q", self._q_rows, stretch)
        self._k = self._key.encoded("k", self._k_rows, stretch)
        self._turned_k = self._rooms.rows("turned k", stretch, self._k.whole.shape[2])
        torch.ops.aten._foreach_copy_.default(self._turned_k.in_order, self._k.mirrored)
        found = self._rooms.rows("free", stretch, self._q.whole.shape[2])
        torch.mul(self._q.whole, self._turned_k.whole, out=found.whole)
        return found.by_head

    def values(self, stretch: Stretch, weights: ByLink, d_weights: ByLink) -> None:
        """Add <do_i, v_ij> to ``d_weights`` [links, B, H], and gather the gradients a_ij do_i of the values."""
        rows = self._value.copied("v rows", stretch)
        v = self._value.encoded("free", rows, stretch)
        cotangent = self._rooms.rows("cotangent", stretch, v.whole.shape[2])
        torch.index_select(self._cotangent, 0, self._query.index(stretch), out=cotangent.whole)
        d_weights.whole.add_(v.by_head.mul_(cotangent.by_head).sum(-1))
        if self._value.wanted:
            cotangent.by_head.mul_(weights.factors)
            self._value.push("free", rows, cotangent, stretch, self._scratch)

    def push(self, stretch: Stretch, d_logits: ByLink) -> None:
        """Gather the gradients dl_ij k_ij of the queries and dl_ij q_ij of the keys, for ``d_logits`` [links, B, H]."""
        if self._query.wanted:
            self._turned_k.by_head.mul_(d_logits.factors)
            self._query.push("free", self._q_rows, self._turned_k, stretch, self._scratch)
        if self._key.wanted:
            self._q.by_head.mul_(d_logits.factors)
            torch.ops.aten._foreach_copy_.default(self._k.in_order, self._q.mirrored)
            self._key.push("free", self._k_rows, self._k, stretch, self._scratch)
