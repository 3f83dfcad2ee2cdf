"""One role visit by visit, with the gradients it gathers; out of sight of autograd, with workspaces of one call."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder, Reader, Scratch
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.memory import Memory, Store
from translution.backends.torch.products import by_onednn, is_for_onednn, multiply, outer
from translution.backends.torch.relevance import LinkMask
from translution.backends.torch.stretches import Stretch
from translution.backends.torch.visits import Place, Visit

# A product of as many rows keeps all cores busy on its own.
MANY_ROWS = 512
# In a visit of as few a view counts for something beside the rest, and is kept.
FEW_BYTES = 256 << 10


class Features:
    """What every link of a visit has: ``whole`` [displacements, P, B, heads, head_dim], None where the ``parts``, one
    for each displacement, don't lie together."""

    def __init__(self, whole: Tensor | None, parts: Sequence[Tensor]) -> None:
        self._whole, self._parts = whole, parts

    @classmethod
    def of(cls, whole: Tensor) -> "Features":
        """The same tensor both ways."""
        return Features(whole, whole.unbind(0))

    @property
    def whole(self) -> Tensor | None:
        """All parts in one tensor, or None."""
        return self._whole

    @property
    def parts(self) -> Sequence[Tensor]:
        """For each displacement [P, B, heads, head_dim]."""
        return self._parts

    def stacked(self) -> Tensor:
        """All parts together."""
        return torch.stack(list(self.parts)) if self.whole is None else self.whole


class Room(Features):
    """Memory for the features of a visit, ``own`` [displacements * P, B, heads, head_dim].

    Other views of it are made once where ``keeps``, else when they are asked for.
    """

    def __init__(self, own: Tensor, displacements: int, keeps: bool) -> None:
        self._own = own.view(displacements, len(own) // displacements, *own.shape[1:])
        super().__init__(None, self._own.unbind(0) if keeps else ())
        self._flat = self._flattened() if keeps else None

    def _flattened(self) -> Tensor:
        displacements, count, batch, heads, width = self._own.shape
        return self._own.view(displacements, count * batch, heads * width)

    @property
    def whole(self) -> Tensor:
        """[displacements, P, B, heads, head_dim]."""
        return self._own

    @property
    def parts(self) -> Sequence[Tensor]:
        """For each displacement [P, B, heads, head_dim]."""
        return self._parts or self._own.unbind(0)

    @property
    def flat(self) -> Tensor:
        """With links and items in one axis, [displacements, P * B, heads * head_dim]."""
        return self._flattened() if self._flat is None else self._flat


class Workspace(dict[tuple[int, int], Room]):
    """Room for the features of one visit by its :attr:`Visit.shape`, or of all visits of one stretch.

    It is taken when it is first asked for.

    Args:
        store: where from.
        like: of the features' dtype and device.
        links: most links of a visit, and of a stretch that is asked for.
        item: what a link has, (B, heads, head_dim).
    """

    def __init__(self, store: Store, like: Tensor, links: int, item: tuple[int, ...]) -> None:
        self._store, self._like, self._links, self._item = store, like.new_empty(0), links, item
        self._by_stretch: dict[Stretch, list[Room]] = {}

    @cached_property
    def _all(self) -> Tensor:
        return self._store.empty(self._like, self._links, *self._item)

    def __missing__(self, shape: tuple[int, int]) -> Room:
        found = self[shape] = Room(self._all[: math.prod(shape)], shape[0], True)
        return found

    def whole(self, stretch: Stretch) -> Tensor:
        """The room of a stretch, [links, B, heads, head_dim]."""
        return self._all[: stretch.count]

    def rooms(self, stretch: Stretch) -> list[Room]:
        """The room of a stretch, visit by visit."""
        found = self._by_stretch.get(stretch)
        if found is None:
            parts = zip(stretch.split(self.whole(stretch)), stretch.visits, strict=True)
            rooms = [Room(own, visit.shape[0], own.nbytes <= FEW_BYTES) for own, visit in parts]
            found = self._by_stretch[stretch] = rooms
        return found


def multiplied(features: Features, other: Tensor, room: Room) -> Tensor:
    """Their product, in the same order."""
    if features.whole is not None:
        return torch.mul(features.whole, other, out=room.whole)
    for own, factor, product in zip(features.parts, other.unbind(0), room.parts, strict=True):
        torch.mul(own, factor, out=product)
    return room.whole


def crossed(by_last: Features, by_first: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """What a key role gives, last displacement first, times another's; ``out`` is in the other's order."""
    for own, other, product in zip(reversed(by_last.parts), by_first, out, strict=True):
        torch.mul(own, other, out=product)


def reversed_product(first: Features, second: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Their product, ``out`` in the order of a key role, last displacement first."""
    for own, other, product in zip(first.parts, second, reversed(out), strict=True):
        torch.mul(own, other, out=product)


class RoleSteps:
    """One role of one call, for some of its batch items.

    Args:
        readers: of ``encoded.base`` where there is one, and of the tables' tokens.
        adders: for their gradients, None for what is not wanted.
        d_matrices: where the tables' gradients go, None for what is not wanted.
        opens: whether nothing is in ``d_matrices`` yet.
        scratch: shared by the roles of a call.
        memory: what they work in.
    """

    def __init__(
        self,
        encoded: Encoded,
        links: Links,
        mask: LinkMask | None,
        readers: Sequence[Reader],
        adders: Sequence[Adder | None],
        d_matrices: Sequence[Tensor | None],
        opens: bool,
        scratch: Scratch,
        memory: Memory,
    ) -> None:
        self.encoded, self._scratch, self._memory = encoded, scratch, memory
        self.wanted = any(a is not None for a in adders) or any(d is not None for d in d_matrices)
        self._links, self._mask, self._opens = links, mask, opens
        with_base = encoded.base is not None
        self._base, self._z = (readers[0] if with_base else None), readers[with_base:]
        self._d_base, self._d_z = (adders[0] if with_base else None), adders[with_base:]
        self._d_matrices = d_matrices
        _, self.batch, _ = readers[0].shape
        self._dtype = encoded.tensors[0].dtype
        self._place: Callable[[Visit], Place] = attrgetter("query" if encoded.side == "query" else encoded.name)
        self._is_base = with_base and not encoded.tables and not encoded.turns and mask is None
        full = len(encoded.tables) == 1 and encoded.tables[0].width == encoded.head_dim
        self._is_product = full and encoded.base is None and not encoded.turns
        self._is_value = encoded.name == "value"
        # For each table, the shapes of visits with so many rows that oneDNN multiplies them.
        self._many = [
            {shape for shape in links.shapes if is_for_onednn(shape[1] * self.batch, table.matrices, self._dtype)}
            for table in encoded.tables
        ]
        self._rooms = self._workspace("own", links.shapes - self._many[0] if self._is_product else links.shapes)
        self._views: dict[tuple[int, int], Tensor] = {}
        self._dead = None
        if mask is not None:
            self._dead = ~(mask.rows.unsqueeze(-1) if encoded.heads == 1 else mask.live).unsqueeze(-1)

    def workspace(self, name: str = "", longest: int = 0) -> Workspace:
        """Room for what :meth:`encode` gives for a visit, or for all visits of a stretch of the ``longest``.

        It is the one that was asked for by this ``name`` before.
        """
        return self._workspace(name, self._links.shapes, longest)

    def _workspace(self, name: str, shapes: Collection[tuple[int, int]], links: int = 0) -> Workspace:
        role, most = self.encoded, max((*(math.prod(shape) for shape in shapes), links), default=0)
        item = self.batch, role.heads, role.head_dim
        return self._memory.once(
            (role.name, name, most, item), lambda: Workspace(self._memory.store, role.tensors[0], most, item)
        )

    def rooms(self, stretch: Stretch, workspace: Workspace) -> Sequence[Room | None]:
        """Room for what :meth:`encode` gives for each visit of a stretch; None where it takes memory of its own."""
        if self._is_product and all(visit.shape in self._many[0] for visit in stretch.visits):
            return [None] * len(stretch.visits)
        return workspace.rooms(stretch)

    def in_order(self, by_link: Tensor, visit: Visit) -> Tensor:
        """What every link has [L, ..] for the links of a visit, [displacements, P, ..], in the order of the role."""
        own = torch.unflatten(by_link[visit.start : visit.stop], 0, visit.shape)
        return own.flip(0) if self.encoded.name == "key" and len(visit.steps) > 1 else own

    def _matrix(self, number: int, visit: Visit) -> Tensor:
        """A table's matrices for a visit, in the accumulation dtype."""
        found = self._views.get((number, visit.start))
        if found is None:
            found = self.encoded.tables[number].matrices[visit.table_rows(self.encoded.name)]
            if found.dtype != self._dtype:
                return found.to(self._dtype)
            self._views[number, visit.start] = found
        return found

    def encode(self, visit: Visit, room: Room | None = None) -> Features:
        """The role's result for a visit's links, [displacements, P, B, heads, head_dim]; 0 where masked (clause M4).

        Not to be written; it holds until the next call, or with ``room`` until that is used again or other bands are
        opened. The role ``key`` has the last displacement first.
        """
        role, place = self.encoded, self._place(visit)
        if self._is_product and visit.shape in self._many[0]:
            return self._products(visit, place)
        if self._base is not None and self._is_base:
            whole = self._base.rows(place).view(*visit.shape, self.batch, role.heads, role.head_dim)
            return Features.of(whole)
        room = self._rooms[visit.shape] if room is None else room
        if self._is_product:
            rows, matrix = self._z[0].rows(place), self._matrix(0, visit)
            if self._is_apart(visit):
                for own, own_matrix, product in zip(self._one_by_one(rows, visit), matrix, room.flat, strict=True):
                    torch.mm(own, own_matrix, out=product)
            else:
                multiply(rows, matrix, room.flat)
        else:
            if self._base is None:
                room.flat.zero_()
            else:
                room.flat.copy_(self._base.rows(place))
            for n, table in enumerate(role.tables):
                own = room.whole[..., table.start : table.start + table.width]
                product = self._scratch(*room.flat.shape[:2], role.heads * table.width)
                multiply(self._z[n].rows(place), self._matrix(n, visit), product)
                own += product.view(own.shape)
            self._turn(room.whole, visit, 1)
        if self._dead is not None:
            room.whole.masked_fill_(self.in_order(self._dead, visit), 0.0)
        return room

    def _is_apart(self, visit: Visit) -> bool:
        """Whether the role's rows have the last displacement first, though its matrices have not."""
        return visit.is_apart and self._is_value

    def _one_by_one(self, rows: Tensor, visit: Visit) -> Sequence[Tensor]:
        """The rows of each displacement, in the order of the matrices."""
        parts = rows.unbind(0)
        return parts[::-1] if self._is_apart(visit) else parts

    def _products(self, visit: Visit, place: Place) -> Features:
        """What :meth:`encode` gives, where it is one product of many rows for each displacement."""
        role, rows = self.encoded, self._one_by_one(self._z[0].rows(place), visit)
        shape = (visit.shape[1], self.batch, role.heads, role.head_dim)
        pairs = zip(rows, self._matrix(0, visit).unbind(0), strict=True)
        found = [by_onednn(own, matrix).view(shape) for own, matrix in pairs]
        if self._dead is not None:
            for own, dead in zip(found, self.in_order(self._dead, visit), strict=True):
                own.masked_fill_(dead, 0.0)
        return Features(None, found)

    def add_encoded(self, visit: Visit, total: Tensor) -> None:
        """Add the result of a visit to ``total`` [displacements, P * B, features]."""
        is_one_call = self._is_product and self._dead is None and visit.shape not in self._many[0]
        if is_one_call and self.encoded.tables[0].matrices.dim() == 3 and total.is_contiguous():
            total.baddbmm_(self._z[0].rows(self._place(visit)), self._matrix(0, visit))
            return
        for own, features in zip(total.unbind(0), self.encode(visit).parts, strict=True):
            own.add_(features.view(own.shape))

    def add_weighted(self, visit: Visit, weights: Tensor, total: Tensor) -> None:
        """Add the result times ``weights`` [displacements, P, B, H, 1] to ``total`` [.., H, head_dim]."""
        features = self.seen(visit, weights.shape[3])
        if features.whole is not None:
            total.addcmul_(features.whole, weights)
            return
        for own, factor, sums in zip(features.parts, weights.unbind(0), total.unbind(0), strict=True):
            sums.addcmul_(own, factor)

    def seen(self, visit: Visit, heads: int) -> Features:
        """What :meth:`encode` gives, by head where NaN that one head sees is absent to another that shares it (M4)."""
        features = self.encode(visit)
        if self._mask is None or self.encoded.heads == heads:
            return features
        live = self.in_order(self._mask.live, visit).unsqueeze(-1)
        return Features.of(torch.where(live, features.stacked(), 0.0))

    def _turn(self, features: Tensor, visit: Visit, direction: int) -> None:
        for turn in self.encoded.turns:
            index = self.in_order(self._links.index(self.encoded.side), visit)
            cos, sin = turn.cos[index][:, :, None, None], direction * turn.sin[index][:, :, None, None]
            own = features[..., turn.start : turn.start + turn.width]
            own.copy_(turn.apply(own, cos, sin))

    def push(self, visit: Visit, gradient: Tensor) -> None:
        """Take in the gradient [displacements, P, B, heads, head_dim] of what :meth:`encode` gave."""
        role, place = self.encoded, self._place(visit)
        if role.turns:
            gradient = gradient.clone()
            self._turn(gradient, visit, -1)
        flat = gradient.reshape(len(visit.steps), visit.shape[1] * self.batch, role.heads * role.head_dim)
        if self._d_base is not None:
            self._d_base.rows(place).add_(flat)
        opens = self._opens and visit.opens(role.name)
        for n, table in enumerate(role.tables):
            own = flat
            if table.width != role.head_dim:
                own = gradient[..., table.start : table.start + table.width].flatten(3).flatten(1, 2)
            d_z, d_matrices = self._d_z[n], self._d_matrices[n]
            if d_matrices is not None:
                self._push_table(n, visit, own, d_matrices[visit.table_rows(self.encoded.name)], opens)
            if d_z is not None:
                self._push_tokens(n, visit, own, d_z.rows(place))

    def _push_table(self, number: int, visit: Visit, gradient: Tensor, total: Tensor, opens: bool) -> None:
        reader, place = self._z[number], self._place(visit)
        rows = self._live_rows(reader.rows(place), visit)
        is_many = visit.shape in self._many[number]
        if not is_many and not self._is_apart(visit):
            outer(rows, gradient, total, opens, self._scratch)
            return
        turned = reader.turned(place) if is_many and self._mask is None else rows.mT
        parts = zip(self._one_by_one(turned, visit), gradient.unbind(0), total.unbind(0), strict=True)
        for own, own_gradient, sums in parts:
            if is_many and opens:
                sums.copy_(by_onednn(own, own_gradient))
            elif is_many:
                sums.add_(by_onednn(own, own_gradient))
            elif opens:
                torch.mm(own, own_gradient, out=sums)
            else:
                sums.addmm_(own, own_gradient)

    def _push_tokens(self, number: int, visit: Visit, rows: Tensor, total: Tensor) -> None:
        matrix, is_many = self._matrix(number, visit).mT, visit.shape in self._many[number]
        is_apart = self._is_apart(visit)
        if not is_many and not is_apart and matrix.dim() == 3 and total.is_contiguous():
            total.baddbmm_(rows, matrix)
        elif is_many or is_apart or (matrix.dim() == 3 and total.shape[1] >= MANY_ROWS):
            parts = zip(self._one_by_one(total, visit), rows.unbind(0), matrix.unbind(0), strict=True)
            for own, own_rows, own_matrix in parts:
                if is_many:
                    own.add_(by_onednn(own_rows, own_matrix))
                else:
                    own.addmm_(own_rows, own_matrix)
        else:
            total.add_(multiply(rows, matrix, self._scratch(*total.shape)))

    def _live_rows(self, rows: Tensor, visit: Visit) -> Tensor:
        """The rows with those that no head sees zeroed: 0 times their NaN would reach the table's gradient."""
        if self._mask is None:
            return rows
        live = self.in_order(self._mask.rows, visit).unsqueeze(-1)
        return torch.where(live, rows.view(*visit.shape, self.batch, rows.shape[-1]), 0.0).view(rows.shape)
