"""One role step by step, with the gradients it gathers; out of sight of autograd, with workspaces of one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Band, Links, Place, Visit
from translution.backends.torch.relevance import LinkMask


class Reader:
    """Rows of tokens [N, B, F], band by band, as [P * B, F]."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, (_, self._batch, self._features) = tokens.contiguous().flatten(1), tokens.shape
        self._band: Band | None = None
        self._rows = self._tokens

    def rows(self, place: Place) -> Tensor:
        """The rows of ``place``, not to be written."""
        if place.band is not self._band:
            self._band, self._rows = place.band, place.band.read(self._tokens).view(-1, self._features)
        return self._rows[place.first * self._batch : place.last * self._batch]


class Adder:
    """Sums into tokens [N, B, F], band by band."""

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self._total, (_, self._batch, self._features) = like.new_zeros(shape), shape
        self._tokens = self._total.flatten(1)
        self._band: Band | None = None
        self._sums = self._rows = self._tokens

    def rows(self, place: Place) -> Tensor:
        """The sums of ``place`` [P * B, F], to add to until the next call."""
        if place.band is not self._band:
            self.flush()
            self._band, self._sums = place.band, place.band.sums(self._tokens)
            self._rows = self._sums.view(-1, self._features)
        return self._rows[place.first * self._batch : place.last * self._batch]

    def flush(self) -> Tensor:
        """All sums [N, B, F]."""
        if self._band is not None:
            self._band.add(self._sums, self._tokens)
            self._band = None
        return self._total


def _blocks(rows: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """rows [P, groups * width] as [groups, P, width], the width of the matrix's ``axis``."""
    return torch.unflatten(rows, -1, (matrix.shape[0], matrix.shape[axis])).transpose(0, 1)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    if matrix.dim() == 2:
        torch.mm(rows, matrix, out=out)
    else:
        _blocks(out, matrix, 2).copy_(torch.bmm(_blocks(rows, matrix, 1), matrix))


def _add_product(rows: Tensor, matrix: Tensor, total: Tensor) -> None:
    if matrix.dim() == 2:
        total.addmm_(rows, matrix)
    else:
        _blocks(total, matrix, 2).add_(torch.bmm(_blocks(rows, matrix, 1), matrix))


def _outer(rows: Tensor, gradient: Tensor, total: Tensor, opens: bool) -> None:
    """total (+)= rows^T gradient."""
    if total.dim() == 2:
        if opens:
            torch.mm(rows.t(), gradient, out=total)
        else:
            total.addmm_(rows.t(), gradient)
    else:
        product = torch.bmm(_blocks(rows, total, 1).transpose(1, 2), _blocks(gradient, total, 2))
        if opens:
            total.copy_(product)
        else:
            total.add_(product)


class RoleSteps:
    """One role of one call.

    Args:
        needs: for each of ``encoded.tensors`` whether its gradient is wanted.
    """

    def __init__(self, encoded: Encoded, links: Links, mask: LinkMask | None, needs: Sequence[bool]) -> None:
        self.encoded, self.wanted = encoded, any(needs)
        self._links, self._mask = links, mask
        like = encoded.tensors[0]
        self.batch, self._features = like.shape[1], encoded.heads * encoded.head_dim
        self._base = None if encoded.base is None else Reader(encoded.base.flatten(2))
        self._z = [Reader(table.z) for table in encoded.tables]
        self._matrices = [table.matrices.unbind(0) for table in encoded.tables]
        workspace = like.new_empty((links.widest * self.batch, self._features))
        by_head = workspace.view(links.widest, self.batch, encoded.heads, encoded.head_dim)
        self._outs = {n: (workspace[: n * self.batch], by_head[:n]) for n in links.sizes}
        full = len(encoded.tables) == 1 and encoded.tables[0].width == encoded.head_dim
        self._is_product = full and encoded.base is None and not encoded.turns
        self._dead = None
        if mask is not None:
            self._dead = ~(mask.rows.unsqueeze(-1) if encoded.heads == 1 else mask.live).unsqueeze(-1)
        self._open_gradients(list(needs))

    def _open_gradients(self, needs: list[bool]) -> None:
        role = self.encoded
        self._d_base = None
        if role.base is not None and needs.pop(0):
            self._d_base = Adder((*role.base.shape[:2], self._features), role.base)
        self._d_z = [
            Adder(table.z.shape, table.z) if need else None for table, need in zip(role.tables, needs[::2], strict=True)
        ]
        # Sums over visits need the accumulation dtype; what is visited once is written once.
        self._d_matrices = [
            table.matrices.new_empty(table.matrices.shape, dtype=table.z.dtype) if need else None
            for table, need in zip(role.tables, needs[1::2], strict=True)
        ]

    def _row(self, visit: Visit) -> tuple[int, bool]:
        """The row of this role's tables, and whether this is its first visit."""
        if self.encoded.name == "key":
            return visit.key_class, visit.opens_key
        return visit.value_class, visit.opens_value

    def _place(self, visit: Visit) -> Place:
        return visit.query if self.encoded.side == "query" else visit.key

    def _matrix(self, number: int, row: int) -> Tensor:
        """A table's matrix for the role's row, in the accumulation dtype."""
        return self._matrices[number][row].to(self.encoded.tables[number].z.dtype)

    def encode(self, visit: Visit) -> Tensor:
        """The role's result for a step's links, [P, B, heads, head_dim], in a workspace; 0 where masked (clause M4)."""
        role, place, (row, _) = self.encoded, self._place(visit), self._row(visit)
        flat, out = self._outs[visit.stop - visit.start]
        if self._is_product:
            _multiply(self._z[0].rows(place), self._matrix(0, row), flat)
        else:
            if self._base is None:
                flat.zero_()
            else:
                flat.copy_(self._base.rows(place))
            for n, table in enumerate(role.tables):
                product = flat.new_empty((len(flat), role.heads * table.width))
                _multiply(self._z[n].rows(place), self._matrix(n, row), product)
                out[..., table.start : table.start + table.width] += product.view(*out.shape[:3], table.width)
            self._turn(out, visit, 1)
        if self._dead is not None:
            out.masked_fill_(self._dead[visit.start : visit.stop], 0.0)
        return out

    def add_encoded(self, visit: Visit, total: Tensor) -> None:
        """Add the result of a step to ``total`` [P * B, features]."""
        if self._is_product and self._dead is None:
            _add_product(self._z[0].rows(visit.key), self._matrix(0, self._row(visit)[0]), total)
        else:
            total.add_(self.encode(visit).view(total.shape))

    def _turn(self, features: Tensor, visit: Visit, direction: int) -> None:
        for turn in self.encoded.turns:
            index = self._links.index(self.encoded.side)[visit.start : visit.stop]
            cos, sin = turn.cos[index][:, None, None], direction * turn.sin[index][:, None, None]
            own = features[..., turn.start : turn.start + turn.width]
            own.copy_(turn.apply(own, cos, sin))

    def push(self, visit: Visit, gradient: Tensor) -> None:
        """Take in the gradient [P, B, heads, head_dim] of what :meth:`encode` gave."""
        role, place = self.encoded, self._place(visit)
        if role.turns:
            gradient = gradient.clone()
            self._turn(gradient, visit, -1)
        if self._d_base is not None:
            self._d_base.rows(place).add_(gradient.flatten(0, 1).flatten(1))
        row, opens = self._row(visit)
        for n, table in enumerate(role.tables):
            own = gradient[..., table.start : table.start + table.width].flatten(2).flatten(0, 1)
            d_z, d_matrices = self._d_z[n], self._d_matrices[n]
            if d_matrices is not None:
                _outer(self._live_rows(self._z[n].rows(place), visit), own, d_matrices[row], opens)
            if d_z is not None:
                _add_product(own, self._matrix(n, row).mT, d_z.rows(place))

    def _live_rows(self, rows: Tensor, visit: Visit) -> Tensor:
        """The rows with those that no head sees zeroed: 0 times their NaN would reach the table's gradient."""
        if self._mask is None:
            return rows
        live = self._mask.rows[visit.start : visit.stop].unsqueeze(-1)
        return torch.where(live, rows.view(len(live), self.batch, rows.shape[-1]), 0.0).view(rows.shape)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of ``encoded.tensors``, None for those that are not wanted."""
        role = self.encoded
        found: list[Tensor | None] = []
        if role.base is not None:
            found.append(None if self._d_base is None else self._d_base.flush().view(role.base.shape))
        unused = self._links.unvisited["key" if role.name == "key" else "value"]
        for table, d_z, d_matrices in zip(role.tables, self._d_z, self._d_matrices, strict=True):
            if d_matrices is not None:
                for row in unused:
                    d_matrices[row].zero_()
                d_matrices = d_matrices.to(table.matrices.dtype)
            found += [None if d_z is None else d_z.flush(), d_matrices]
        return found
