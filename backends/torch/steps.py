"""One role visit by visit, with the gradients it gathers; out of sight of autograd, with workspaces of one call."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import LinkMask
from translution.backends.torch.visits import Band, Place, Visit

# A product of as many rows keeps all cores busy on its own.
MANY_ROWS = 512


class _Lane:
    """The bands that are open: their rows in the tokens themselves, or in a copy."""

    def __init__(self, tokens: Tensor) -> None:
        _, self._batch, self._features = tokens.shape
        self._tokens = tokens.flatten(1)
        self._rows = self._buffer = tokens.new_empty((0, self._features))
        self._bands: tuple[Band, ...] = ()
        self._is_copy = False
        # Roles and both directions ask for the same rows again: a look costs less than to make the view anew.
        self._place: Place | None = None
        self._view = self._rows

    def holds(self, place: Place) -> bool:
        """Whether the bands of ``place`` are open."""
        return place.bands is self._bands

    def open(self, place: Place) -> None:
        """Make room for the rows of all bands, where they don't lie in the tokens together."""
        self._bands, self._place, self._view = place.bands, None, self._tokens
        own = place.bands[0].lies_in(self._tokens) if len(place.bands) == 1 else None
        self._is_copy = own is None
        if own is not None:
            self._rows = own.view(-1, self._features)
            return
        length = place.length * self._batch
        if len(self._buffer) < length:
            self._rows = self._buffer = self._buffer[:0].clone()  # two at a time are one too many
            self._buffer = self._tokens.new_empty((length, self._features))
        self._rows = self._buffer[:length]

    def read(self) -> None:
        """Copy the bands, where rows are a copy."""
        for band, rows in self._copies():
            band.read(self._tokens, rows)

    def clear(self) -> None:
        """Set the copy to zero."""
        if self._is_copy:
            self._rows.zero_()

    def close(self) -> None:
        """Add the copy to the tokens."""
        for band, rows in self._copies():
            band.add(rows, self._tokens)
        self._bands, self._is_copy, self._place = (), False, None

    def _copies(self) -> list[tuple[Band, Tensor]]:
        if not self._is_copy:
            return []
        parts = torch.split(self._rows, [band.length * self._batch for band in self._bands])
        return [(b, p.view(b.length, self._tokens.shape[1])) for b, p in zip(self._bands, parts, strict=True)]

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, whose bands are open."""
        if place is not self._place:
            row = self._batch * self._features
            self._place = place
            self._view = self._rows.as_strided(
                (place.displacements, place.count * self._batch, self._features),
                (max(place.stride, 1) * row, self._features, 1),
                self._rows.storage_offset() + place.first * row,
            )
        return self._view


class Reader:
    """Rows of tokens [N, B, F], band by band."""

    def __init__(self, tokens: Tensor) -> None:
        self.shape = tokens.shape
        if tokens.flatten(1).stride(1) != 1:  # one feature that is expanded to all
            tokens = tokens.contiguous()
        self._lanes = _Lane(tokens), _Lane(tokens)

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place`` [displacements, P * B, F], not to be written."""
        lane = self._lanes[place.lane]
        if not lane.holds(place):
            lane.open(place)
            lane.read()
        return lane.rows(place)


class Adder:
    """Sums into tokens [N, B, F], band by band."""

    def __init__(self, tokens: Tensor) -> None:
        self._lanes = _Lane(tokens), _Lane(tokens)

    def rows(self, place: Place) -> Tensor:
        """The sums of ``place`` [displacements, P * B, F], to add to."""
        lane = self._lanes[place.lane]
        if not lane.holds(place):
            lane.close()
            lane.open(place)
            lane.clear()
        return lane.rows(place)

    def close(self) -> None:
        """Let the tokens have all sums."""
        for lane in self._lanes:
            lane.close()


class Scratch:
    """Room for one product at a time: what is allocated anew for every visit costs more than to compute it."""

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(0)

    def __call__(self, *shape: int) -> Tensor:
        """Room of this shape, until the next call."""
        size = math.prod(shape)
        if len(self._room) < size:
            self._room = self._room.new_empty(size)
        return self._room[:size].view(shape)


def _blocks(rows: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """rows [n, P, groups * width] as [n, groups, P, width], the width of the matrix's ``axis``."""
    return torch.unflatten(rows, -1, (matrix.shape[1], matrix.shape[axis])).transpose(1, 2)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Rows [n, P, R] times matrix [n, R, E] or [n, groups, R / groups, E / groups]."""
    if matrix.dim() == 3:
        return torch.bmm(rows, matrix, out=out)
    _blocks(out, matrix, 3).copy_(_blocks(rows, matrix, 2) @ matrix)
    return out


def _outer(rows: Tensor, gradient: Tensor, total: Tensor, opens: bool, scratch: Scratch) -> None:
    """total (+)= rows^T gradient."""
    if total.dim() == 4:
        product = _blocks(rows, total, 2).mT @ _blocks(gradient, total, 3)
    elif total.is_contiguous():
        if opens:
            torch.bmm(rows.mT, gradient, out=total)
        else:
            total.baddbmm_(rows.mT, gradient)
        return
    else:  # of products that do not lie together each would be computed on its own, by one core
        product = torch.bmm(rows.mT, gradient, out=scratch(*total.shape))
    if opens:
        total.copy_(product)
    else:
        total.add_(product)


def crossed(by_last: Tensor, by_first: Tensor, out: Tensor) -> Tensor:
    """The product of what a key role gives, last displacement first, with another's; in the other's order."""
    for own, other, product in zip(reversed(by_last.unbind(0)), by_first.unbind(0), out.unbind(0), strict=True):
        torch.mul(own, other, out=product)
    return out


def reversed_product(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Their product in the order of a key role, last displacement first."""
    for own, other, product in zip(first.unbind(0), second.unbind(0), reversed(out.unbind(0)), strict=True):
        torch.mul(own, other, out=product)
    return out


class RoleSteps:
    """One role of one call, for some of its batch items.

    Args:
        readers: of ``encoded.base`` where there is one, and of the tables' tokens.
        adders: for their gradients, None for what is not wanted.
        d_matrices: where the tables' gradients go, None for what is not wanted.
        opens: whether nothing is in ``d_matrices`` yet.
        scratch: shared by the roles of a call.
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
    ) -> None:
        self.encoded, self._scratch = encoded, scratch
        self.wanted = any(a is not None for a in adders) or any(d is not None for d in d_matrices)
        self._links, self._mask, self._opens = links, mask, opens
        with_base = encoded.base is not None
        self._base, self._z = (readers[0] if with_base else None), readers[with_base:]
        self._d_base, self._d_z = (adders[0] if with_base else None), adders[with_base:]
        self._d_matrices = d_matrices
        _, self.batch, _ = readers[0].shape
        self._dtype = encoded.tensors[0].dtype
        self._is_base = with_base and not encoded.tables and not encoded.turns and mask is None
        full = len(encoded.tables) == 1 and encoded.tables[0].width == encoded.head_dim
        self._is_product = full and encoded.base is None and not encoded.turns
        self._outs = {} if self._is_base else self.workspace()
        self._dead = None
        if mask is not None:
            self._dead = ~(mask.rows.unsqueeze(-1) if encoded.heads == 1 else mask.live).unsqueeze(-1)

    def workspace(self) -> dict[tuple[int, int], Tensor]:
        """Room for what :meth:`encode` gives, for every shape of a visit."""
        role, width = self.encoded, self.encoded.heads * self.encoded.head_dim
        room = role.tensors[0].new_empty(self._links.widest * self.batch * width)
        shapes = [(*shape, self.batch, role.heads, role.head_dim) for shape in self._links.shapes]
        return {shape[:2]: room[: math.prod(shape)].view(shape) for shape in shapes}

    def _place(self, visit: Visit) -> Place:
        if self.encoded.side == "query":
            return visit.query
        return visit.key if self.encoded.name == "key" else visit.value

    def _rows(self, visit: Visit) -> slice:
        return visit.key_rows if self.encoded.name == "key" else visit.value_rows

    def in_order(self, by_link: Tensor, visit: Visit) -> Tensor:
        """What every link has [L, ..] for the links of a visit, [displacements, P, ..], in the order of the role."""
        own = torch.unflatten(by_link[visit.start : visit.stop], 0, visit.shape)
        return own.flip(0) if self.encoded.name == "key" and len(visit.steps) > 1 else own

    def _matrix(self, number: int, visit: Visit) -> Tensor:
        """A table's matrices for a visit, in the accumulation dtype."""
        return self.encoded.tables[number].matrices[self._rows(visit)].to(self._dtype)

    def encode(self, visit: Visit) -> Tensor:
        """The role's result for a visit's links, [displacements, P, B, heads, head_dim]; 0 where masked (clause M4).

        Not to be written; it holds until the next call. The role ``key`` has the last displacement first.
        """
        role, place = self.encoded, self._place(visit)
        if self._base is not None and self._is_base:
            return self._base.rows(place).view(*visit.shape, self.batch, role.heads, role.head_dim)
        out = self._outs[visit.shape]
        flat = out.view(len(visit.steps), visit.shape[1] * self.batch, role.heads * role.head_dim)
        if self._is_product:
            _multiply(self._z[0].rows(place), self._matrix(0, visit), flat)
        else:
            if self._base is None:
                flat.zero_()
            else:
                flat.copy_(self._base.rows(place))
            for n, table in enumerate(role.tables):
                product = self._scratch(*flat.shape[:2], role.heads * table.width)
                _multiply(self._z[n].rows(place), self._matrix(n, visit), product)
                out[..., table.start : table.start + table.width] += product.view(*out.shape[:4], table.width)
            self._turn(out, visit, 1)
        if self._dead is not None:
            out.masked_fill_(self.in_order(self._dead, visit), 0.0)
        return out

    def add_encoded(self, visit: Visit, total: Tensor) -> None:
        """Add the result of a visit to ``total`` [displacements, P * B, features]."""
        matrix = self._matrix(0, visit) if self._is_product and self._dead is None else None
        if matrix is not None and matrix.dim() == 3 and total.is_contiguous():
            total.baddbmm_(self._z[0].rows(self._place(visit)), matrix)
        else:
            total.add_(self.encode(visit).view(total.shape))

    def add_weighted(self, visit: Visit, weights: Tensor, total: Tensor) -> None:
        """Add the result times ``weights`` [displacements, P, B, H] to ``total`` [displacements, P * B, features]."""
        features = self.encode(visit)
        by_head = total.view(*weights.shape, self.encoded.head_dim)
        seen = self.seen(visit, features, weights.shape[3])
        if seen is features:
            by_head.addcmul_(features, weights.unsqueeze(-1))
        else:
            by_head.add_(seen * weights.unsqueeze(-1))

    def seen(self, visit: Visit, features: Tensor, heads: int) -> Tensor:
        """What :meth:`encode` gave, by head where NaN that one head sees is absent to another that shares it (M4)."""
        if self._mask is None or self.encoded.heads == heads:
            return features
        return torch.where(self.in_order(self._mask.live, visit).unsqueeze(-1), features, 0.0)

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
        opens = self._opens and (visit.opens_key if role.name == "key" else visit.opens_value)
        for n, table in enumerate(role.tables):
            own = flat
            if table.width != role.head_dim:
                own = gradient[..., table.start : table.start + table.width].flatten(3).flatten(1, 2)
            d_z, d_matrices = self._d_z[n], self._d_matrices[n]
            if d_matrices is not None:
                rows = self._live_rows(self._z[n].rows(place), visit)
                _outer(rows, own, d_matrices[self._rows(visit)], opens, self._scratch)
            if d_z is not None:
                self._add_product(own, self._matrix(n, visit).mT, d_z.rows(place))

    def _add_product(self, rows: Tensor, matrix: Tensor, total: Tensor) -> None:
        if matrix.dim() == 3 and total.is_contiguous():
            total.baddbmm_(rows, matrix)
        elif matrix.dim() == 3 and total.shape[1] >= MANY_ROWS:
            for own, own_rows, own_matrix in zip(total.unbind(0), rows.unbind(0), matrix.unbind(0), strict=True):
                own.addmm_(own_rows, own_matrix)
        else:
            total.add_(_multiply(rows, matrix, self._scratch(*total.shape)))

    def _live_rows(self, rows: Tensor, visit: Visit) -> Tensor:
        """The rows with those that no head sees zeroed: 0 times their NaN would reach the table's gradient."""
        if self._mask is None:
            return rows
        live = self.in_order(self._mask.rows, visit).unsqueeze(-1)
        return torch.where(live, rows.view(*visit.shape, self.batch, rows.shape[-1]), 0.0).view(rows.shape)
