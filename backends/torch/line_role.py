"""One role of a softmax by lines: its features slab by slab, and the gradients that it gathers."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from translution.backends.torch.bands import Scratch
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.lines import Lines, Slab, box
from translution.backends.torch.memory import Store

# A slab by the first of its rows, and some columns by their first.
_Where = tuple[int, int]


def _where(slab: Slab, columns: slice) -> _Where:
    return slab.row, columns.start


class _Features(NamedTuple):
    """Room for features [own, others * E, n], and the same as :meth:`LineRole.encode` gives them."""

    product: Tensor
    encoded: Tensor


class _Gradient(NamedTuple):
    """Room for the gradient of the features, [own, others, heads, width, n] and [own, others * E, n]."""

    product: Tensor
    rows: Tensor


class Skewed:
    """Room for blocks of which each begins a class after the one before, to sum them up by class."""

    def __init__(self, store: Store, like: Tensor) -> None:
        self._store, self._like = store, like.new_empty(0)
        self._rooms: dict[tuple[int, ...], Tensor] = {}

    def clear(self) -> None:
        """Set to 0 what lies outside the blocks: calls of other kinds have the same memory."""
        for room in self._rooms.values():
            room.zero_()

    def push(self, blocks: Tensor, total: Tensor) -> None:
        """Add blocks [own, R, others * E] to ``total`` [R, own + others - 1, E]."""
        shape = blocks.shape[0], *total.shape
        room = self._rooms.get(shape)
        if room is None:
            room = self._rooms[shape] = self._store.empty(self._like, *shape).zero_()
        block, row, features, _ = room.stride()
        room.as_strided(blocks.shape, (block + features, row, 1), room.storage_offset()).copy_(blocks)
        total.add_(room.sum(0))


class RoleRoom:
    """What a role works in for parts of the batch of one size, and views of it by slab and columns.

    Args:
        store: where from.
        tokens: those of a part, by line.
        skewed: shared by all roles.
    """

    def __init__(self, store: Store, tokens: Tensor, skewed: Skewed) -> None:
        self._store, self._like, self.skewed = store, tokens.new_empty(0), skewed
        self.tokens = store.empty(self._like, *tokens.shape)
        self.own: dict[_Where, Tensor] = {}
        self.blocks: dict[_Where, Tensor] = {}
        self.totals: dict[_Where, Tensor] = {}
        self.features: dict[_Where, _Features] = {}
        self.gradients: dict[_Where, _Gradient] = {}

    @cached_property
    def d_tokens(self) -> Tensor:
        """Room for the gradient of the tokens."""
        return self._store.empty(self._like, *self.tokens.shape)


class LineRole:
    """One role's relative features for some items of the batch, and the gradients that it gathers.

    Tokens are by line, a query's columns turned: u = W - 1 - c. Matrices [R, classes, E] are turned as well: those of
    queries and values begin with the last class, whose row in a key's table is the first.

    Args:
        role: with its tensors.
        lines: the layout.
        matrices: None where the features are the tokens themselves; kept with the room.
        d_matrices: where the matrices' gradient goes, None where it is not wanted.
        tokens: those of the items, by line.
        room: what to work in, which may be kept from call to call.
    """

    def __init__(
        self,
        role: Encoded,
        lines: Lines,
        matrices: Tensor | None,
        d_matrices: Tensor | None,
        tokens: Tensor,
        room: RoleRoom,
    ) -> None:
        self._role, self._lines, self._matrices, self._d_matrices = role, lines, matrices, d_matrices
        self.is_query = role.side == "query"
        self._room = room
        room.tokens.copy_(self._turned(tokens))
        # What is no view of the room; every slab is gone through up to three times.
        self._copies: dict[_Where, Tensor] = {}

    def _turned(self, tokens: Tensor) -> Tensor:
        return tokens.flip(0) if self.is_query else tokens

    def collect(self) -> None:
        """Begin to gather gradients."""
        self._room.d_tokens.zero_()

    def d_tokens(self) -> Tensor:
        """What has been gathered for tokens without registers, [n, b, F]."""
        return self._turned(self._room.d_tokens).movedim((0, 1), (-3, -1)).flatten(0, -3)

    def _box(self, slab: Slab, tokens: Tensor, columns: slice) -> Tensor:
        """The columns and positions that have a part in a slab, [columns, F, *size, b]."""
        if self.is_query:
            return box(tokens[columns], slab.query, slab)
        return box(tokens, slab.key, slab)

    def _own(self, slab: Slab, columns: slice) -> Tensor:
        """The same of the tokens, [columns, F, n]."""
        where, room = _where(slab, columns), self._room
        found = room.own.get(where)
        if found is None:
            found = self._copies.get(where)
        if found is None:
            found = self._box(slab, room.tokens, columns).flatten(2)
            is_view = slab.size[1:] == self._lines.outer[1:]
            (room.own if is_view else self._copies)[where] = found
        return found

    def _blocks(self, slab: Slab, columns: slice) -> Tensor | None:
        """For each of the own columns the matrices of all others, side by side, [own, R, others * E]."""
        if self._matrices is None:
            return None
        where = _where(slab, columns)
        found = self._room.blocks.get(where)
        if found is None:
            table, (own, others) = self._matrices, self._counts(columns)
            inner, classes, features = table.shape
            offset = table.storage_offset() + (slab.row + columns.start) * features
            strides = features, classes * features, 1
            found = self._room.blocks[where] = table.as_strided((own, inner, others * features), strides, offset)
        return found

    def _counts(self, columns: slice) -> tuple[int, int]:
        """How many columns are its own, and how many the other side's."""
        counts = columns.stop - columns.start, self._lines.width
        return counts if self.is_query else (counts[1], counts[0])

    def encode(self, slab: Slab, columns: slice, scratch: Scratch) -> Tensor:
        """Features of a slab's pairs [columns | 1, W | 1, heads, width, n]; 1 where they are the same for all."""
        heads, width = self._role.heads, self._role.head_dim
        own, blocks = self._own(slab, columns), self._blocks(slab, columns)
        if blocks is None:
            found = own.view(own.shape[0], 1, heads, width, own.shape[2])
            return found if self.is_query else found.transpose(0, 1)
        where, features = _where(slab, columns), self._room.features
        views = features.get(where)
        if views is None:
            count, others = self._counts(columns)
            product = scratch(count, others * heads * width, own.shape[2])
            found = product.view(count, others, heads, width, own.shape[2])
            views = features[where] = _Features(product, found if self.is_query else found.transpose(0, 1))
        torch.bmm(blocks.mT, own, out=views.product)
        return views.encoded

    def push(self, slab: Slab, columns: slice, first: Tensor, second: Tensor, scratch: Scratch, small: Scratch) -> None:
        """Take in the gradient ``first`` times ``second`` of what :meth:`encode` gave."""
        if not self.is_query:
            first, second = first.transpose(0, 1), second.transpose(0, 1)
        where, room, (count, others) = _where(slab, columns), self._room, self._counts(columns)
        own, blocks = self._own(slab, columns), self._blocks(slab, columns)
        views = room.gradients.get(where)
        if views is None:
            product = scratch(count, others, self._role.heads, self._role.head_dim, own.shape[2])
            rows = product.view(count, others * product.shape[2] * product.shape[3], own.shape[2])
            views = room.gradients[where] = _Gradient(product, rows)
        torch.mul(first, second, out=views.product)
        total = room.totals.get(where)
        if total is None:
            total = room.totals[where] = self._box(slab, room.d_tokens, columns)
        if blocks is None:
            total.add_(views.product.sum(1).view(total.shape))
            return
        total.add_(torch.bmm(blocks, views.rows, out=small(*own.shape)).view(total.shape))
        if self._d_matrices is not None:
            found = torch.bmm(own, views.rows.mT, out=small(*blocks.shape))
            first_class = slab.row + columns.start
            room.skewed.push(found, self._d_matrices[:, first_class : first_class + count + others - 1])
