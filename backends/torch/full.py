"""What :mod:`general` does, where every role is one full table: the paper's operator, with as little to call as can be.

    q_ij = x_i Wq[c(i, j)]    k_ij = y_j Wk[c(j, i)]    v_ij = y_j Wv[c(i, j)]

With few channels or a small batch, calling the operations takes longer than they do: nothing here is asked twice.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder, Reader
from translution.backends.torch.call import Call, Gathered
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.products import by_onednn, is_for_onednn
from translution.backends.torch.steps import Room, Workspace
from translution.backends.torch.stretches import Stretch
from translution.backends.torch.visits import Place

Shape: TypeAlias = tuple[int, int]
# What the links of each displacement of a visit have, [P, B, heads, head_dim].
Parts: TypeAlias = Sequence[Tensor]


def is_full(call: Call, tensors: Sequence[Tensor]) -> bool:
    """Whether every role is one full table of the tokens' dtype, with as many heads, and nothing is masked."""
    if call.mask is not None or len(call.roles) != 3:
        return False
    roles, dtype = call.with_tensors(tensors), tensors[call.tokens(0)[0]].dtype
    return all(
        role.base is None
        and not role.turns
        and role.heads == roles[0].heads
        and len(role.tables) == 1
        and role.tables[0].width == role.head_dim
        and role.tables[0].matrices.dim() == 3
        and role.tables[0].matrices.dtype == dtype
        for role in roles
    )


class _Role:
    """A role for some of the batch items: a reader of its tokens [N, B, R], and its matrices [T, R, features]."""

    def __init__(self, encoded: Encoded, reader: Reader, links: Links) -> None:
        self.reader, self.matrices = reader, encoded.tables[0].matrices
        _, self.batch, self.dim = reader.shape
        self.sizes = self.matrices.shape[1:]
        self.item, self.like = (self.batch, encoded.heads, encoded.head_dim), encoded.tables[0].z
        # The shapes of visits with so many rows that oneDNN multiplies them.
        self.many = {s for s in links.shapes if is_for_onednn(s[1] * self.batch, self.matrices, self.like.dtype)}
        few = max((math.prod(shape) for shape in links.shapes - self.many), default=0)
        self.rooms = Workspace(self.like, few, self.item)

    def rooms_of(self, stretch: Stretch, workspace: Workspace) -> Sequence[Room | None]:
        """Room for what :meth:`product` gives for each visit, None for those that need none."""
        if all(visit.shape in self.many for visit in stretch.visits):
            return [None] * len(stretch.visits)
        return workspace.rooms(stretch)

    def product(
        self, place: Place, numbers: slice, shape: Shape, room: Room | None = None, *, apart: bool = False
    ) -> Parts:
        """The rows of a place times the matrices of these ``numbers``; ``apart`` has the last rows first.

        Without a ``room`` it holds until the next call.
        """
        rows, matrices = self.reader.rows(place), self.matrices[numbers]
        if shape in self.many:
            pairs = zip(_one_by_one(rows, apart), matrices.unbind(0), strict=True)
            return [by_onednn(own, matrix).view(shape[1], *self.item) for own, matrix in pairs]
        if room is None:
            room = self.rooms[shape]
        if not apart:
            torch.bmm(rows, matrices, out=room.flat)
            return room.parts
        for own, matrix, product in zip(_one_by_one(rows, True), matrices, room.flat, strict=True):
            torch.mm(own, matrix, out=product)
        return room.parts


def _one_by_one(value: Tensor, turned: bool) -> Parts:
    """What the displacements have, ``turned``: of the last one first."""
    parts = value.unbind(0)
    return parts[::-1] if turned else parts


def _cross(q: Parts, k: Parts, out: Parts) -> None:
    """q_ij k_ij, for keys with the last displacement first."""
    torch.mul(q[0], k[-1], out=out[0])
    if len(out) > 1:
        torch.mul(q[1], k[0], out=out[1])


class FullForward:
    """The forward of some of the batch items."""

    def __init__(self, call: Call, tensors: Sequence[Tensor], part: slice, stretches: Sequence[Stretch]) -> None:
        self._query, self._key, self._value = _roles(call, tensors, part)
        longest = max((stretch.count for stretch in stretches), default=0)
        self._products = Workspace(self._query.like, longest, self._query.item)

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        query, key, whole = self._query, self._key, self._products.whole(stretch)
        for visit, own in zip(stretch.visits, stretch.displacement_parts(whole), strict=True):
            q = query.product(visit.query, visit.value_rows, visit.shape)
            _cross(q, key.product(visit.key, visit.key_rows, visit.shape), own)
        return whole

    def add(self, stretch: Stretch, weights: Tensor, totals: Adder, outs: Sequence[Adder]) -> None:
        """Add p_ij [links, B, H] to the first, and p_ij v_ij to the others."""
        value, (out,) = self._value, outs
        for visit, own in zip(stretch.visits, stretch.visit_parts(weights.unsqueeze(-1)), strict=True):
            shape = visit.shape
            v = value.product(visit.value, visit.value_rows, shape, apart=visit.is_apart)
            totals.rows(visit.query).add_(own)
            sums = out.rows(visit.query)
            if shape in value.many:
                for factor, features, total in zip(own.unbind(0), v, sums.unbind(0), strict=True):
                    total.addcmul_(features, factor)
            else:
                sums.addcmul_(value.rooms[shape].whole, own)


class FullBackward:
    """The backward of some of the batch items, stretch by stretch: :meth:`products`, :meth:`values`, :meth:`push`.

    Args:
        cotangents: do_i, one tensor [Nq, B, H * D] in a sequence.
    """

    def __init__(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        gathered: Gathered,
        part: slice,
        stretches: Sequence[Stretch],
        cotangents: Sequence[Tensor],
    ) -> None:
        self._query, self._key, self._value = roles = _roles(call, tensors, part)
        self._adders = [gathered.adder(call.tokens(number)[0], part) for number in range(3)]
        self._totals = [gathered.totals[call.matrices(number)[0]] for number in range(3)]
        (cotangent,), (_, heads, width), self._opens = cotangents, self._value.item, gathered.opens
        self._cotangent = Reader(cotangent, (heads, width))
        longest = max((stretch.count for stretch in stretches), default=0)
        self._q_rooms, self._k_rooms, self._products = (
            Workspace(role.like, longest, role.item) for role in (self._query, self._key, self._query)
        )
        is_alike = self._value.item == self._query.item
        self._value_products = self._products if is_alike else Workspace(self._value.like, longest, self._value.item)
        self._wanted = [a is not None or t is not None for a, t in zip(self._adders, self._totals, strict=True)]
        # Room for what goes to the tokens, and to two matrices that don't lie together, by their sizes.
        self._to_tokens = {r.dim: Workspace(r.like, call.links.widest, (r.batch, 1, r.dim)) for r in roles}
        self._to_table = {r.sizes: r.like.new_empty((2, *r.sizes)) for r in roles}
        self._kept: list[tuple[Parts, Parts]] = []

    def products(self, stretch: Stretch) -> Tensor:
        """q_ij k_ij of all links, [links, B, H, D]."""
        query, key, whole, self._kept = self._query, self._key, self._products.whole(stretch), []
        rooms = zip(query.rooms_of(stretch, self._q_rooms), key.rooms_of(stretch, self._k_rooms), strict=True)
        for visit, (q_room, k_room), own in zip(stretch.visits, rooms, stretch.displacement_parts(whole), strict=True):
            shape = visit.shape
            q = query.product(visit.query, visit.value_rows, shape, q_room)
            k = key.product(visit.key, visit.key_rows, shape, k_room)
            _cross(q, k, own)
            self._kept.append((q, k))
        return whole

    def values(self, stretch: Stretch, weights: Tensor, d_weights: Tensor) -> None:
        """Add <do_i, v_ij> to ``d_weights`` [links, B, H], and gather the gradient a_ij do_i of the values."""
        value, rooms = self._value, self._value_products.rooms(stretch)
        cotangents = [self._cotangent.rows(visit.query) for visit in stretch.visits]
        for visit, g, room in zip(stretch.visits, cotangents, rooms, strict=True):
            shape = visit.shape
            v = value.product(visit.value, visit.value_rows, shape, apart=visit.is_apart)
            if shape in value.many:
                for features, factor, product in zip(v, g.unbind(0), room.parts, strict=True):
                    torch.mul(features, factor, out=product)
            else:
                torch.mul(value.rooms[shape].whole, g, out=room.whole)
        d_weights.add_(self._value_products.whole(stretch).sum(-1))
        factors = stretch.visit_parts(weights.unsqueeze(-1))
        if not self._wanted[2]:
            return
        for visit, g, factor, room in zip(stretch.visits, cotangents, factors, rooms, strict=True):
            torch.mul(g, factor, out=room.whole)
            self._table(2, value, visit.value, visit.value_rows, room, visit.opens_value, visit.is_apart)
            self._tokens(2, value, visit.value, visit.value_rows, room, visit.is_apart)

    def push(self, stretch: Stretch, d_logits: Tensor) -> None:
        """Gather the gradients dl_ij k_ij of the queries and dl_ij q_ij of the keys, for ``d_logits`` [links, B, H]."""
        query, key = self._query, self._key
        steps = zip(stretch.visits, self._kept, self._products.rooms(stretch), strict=True)
        for (visit, (q, k), room), d in zip(steps, stretch.displacement_parts(d_logits.unsqueeze(-1)), strict=True):
            if self._wanted[0]:
                _cross(d, k, room.parts)
                self._table(0, query, visit.query, visit.value_rows, room, visit.opens_value)
                self._tokens(0, query, visit.query, visit.value_rows, room)
            if self._wanted[1]:
                for own, factor, product in zip(q, d, reversed(room.parts), strict=True):
                    torch.mul(own, factor, out=product)
                self._table(1, key, visit.key, visit.key_rows, room, visit.opens_key)
                self._tokens(1, key, visit.key, visit.key_rows, room)

    def _table(
        self, number: int, role: _Role, place: Place, rows: slice, gradient: Room, opens: bool, apart: bool = False
    ) -> None:
        """dW (+)= x^T gradient."""
        table, opens = self._totals[number], opens and self._opens
        if table is None:
            return
        total, is_many = table[rows], gradient.whole.shape[:2] in role.many
        if not is_many and not apart:
            tokens, is_one = role.reader.rows(place).mT, len(total) == 1
            if is_one and not opens:
                total.baddbmm_(tokens, gradient.flat)
                return
            product = torch.bmm(tokens, gradient.flat, out=total if is_one else self._to_table[role.sizes])
            if not opens:
                total.add_(product)
            elif not is_one:
                total.copy_(product)
            return
        turned = role.reader.turned(place) if is_many else role.reader.rows(place).mT
        for tokens, own, sums in zip(_one_by_one(turned, apart), gradient.flat, total, strict=True):
            if is_many:
                product = by_onednn(tokens, own)
                if opens:
                    sums.copy_(product)
                else:
                    sums.add_(product)
            elif opens:
                torch.mm(tokens, own, out=sums)
            else:
                sums.addmm_(tokens, own)

    def _tokens(self, number: int, role: _Role, place: Place, rows: slice, gradient: Room, apart: bool = False) -> None:
        """dx += gradient W^T."""
        adder, (displacements, count) = self._adders[number], gradient.whole.shape[:2]
        if adder is None:
            return
        total, matrices, is_many = adder.rows(place), role.matrices[rows].mT, (displacements, count) in role.many
        if not is_many and not apart:
            if displacements == 1:
                total.baddbmm_(gradient.flat, matrices)
            else:
                room = self._to_tokens[role.dim][displacements, count]
                total.add_(torch.bmm(gradient.flat, matrices, out=room.flat))
            return
        for own, matrix, sums in zip(gradient.flat, matrices, _one_by_one(total, apart), strict=True):
            if is_many:
                sums.add_(by_onednn(own, matrix))
            else:
                sums.addmm_(own, matrix)


def _roles(call: Call, tensors: Sequence[Tensor], part: slice) -> tuple[_Role, _Role, _Role]:
    readers: dict[int, Reader] = {}
    found = []
    for number, encoded in enumerate(call.with_tensors(tensors)):
        (tokens,) = call.tokens(number)
        if tokens not in readers:
            readers[tokens] = Reader(tensors[tokens][:, part].flatten(2))
        found.append(_Role(encoded, readers[tokens], call.links))
    query, key, value = found
    return query, key, value
