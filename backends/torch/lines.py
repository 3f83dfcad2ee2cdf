"""A lattice as lines along its last axis, for tables of few features: all displacements of a line in one product.

Alpha-Translution's tables are small: to visit one displacement after another costs more than its products. For queries
and keys a fixed step apart on the other axes, a *slab*, columns c of the queries and c' of the keys, and u = W - 1 - c,
the class of a pair is a number of the slab plus c' + u. The matrices of one column are consecutive rows of the table:

    q[u, (c', e), n] = sum_d T[c' + u][d, e] z[u, d, n]        k, v [c', (u, e), n] = sum_d T[c' + u][d, e] z[c', d, n]

with n = positions on the other axes and items of the batch, and e = features of all heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.memory import kept
from translution.backends.torch.visits import Visit
from translution.geometry import IntArray
from translution.spec import Lattice


@dataclass(frozen=True, slots=True)
class Slab:
    """All pairs of lines that are as far apart on the other axes.

    Queries are at ``query`` + n and keys at ``key`` + n with 0 <= n < ``size``; ``row`` is the first row of the tables
    as :class:`LineRole` has them.
    """

    row: int
    query: tuple[int, ...]
    key: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Lines:
    """A layout seen as lines. ``border`` are the visits that lead from or to a register."""

    links: Links
    width: int
    outer: tuple[int, ...]
    registers: int
    slabs: tuple[Slab, ...]
    border: tuple[Visit, ...]
    border_links: int
    # Rows of the links of ``border``, from every position to every register [O * W * G], columns turned, and from every
    # register to every key [G * N].
    to_registers: Tensor
    from_registers: Tensor

    @property
    def rows(self) -> int:
        """Positions on the other axes."""
        return math.prod(self.outer)

    @property
    def classes(self) -> int:
        """Displacements."""
        return math.prod(2 * size - 1 for size in (*self.outer, self.width))


@lru_cache(maxsize=64)
@kept
def lines_of(links: Links) -> Lines | None:
    """The layout as lines; None for any other than a lattice on which every pair has the class of its displacement."""
    layout = links.geometry.layout
    if not isinstance(layout, Lattice):
        return None
    if replace(layout, key_grid=None) != Lattice(layout.grid, registers=layout.registers) or not layout.is_self:
        return None
    *outer, width = layout.grid
    slabs, row = [], 0
    for apart in itertools.product(*(range(1 - size, size) for size in outer)):  # from the query to the key
        query, key = (tuple(max(0, sign * s) for s in apart) for sign in (-1, 1))
        slabs.append(Slab(row, query, key, tuple(size - abs(s) for s, size in zip(apart, outer, strict=True))))
        row += 2 * width - 1
    registers, tokens = layout.registers, layout.num_queries
    border = tuple(v for v in links.visits if min(v.steps[0].query_index.min(), v.steps[0].key_index.min()) < registers)
    to_registers, from_registers = np.empty((tokens, registers), np.int64), np.empty((registers, tokens), np.int64)
    start = 0
    for own_step in (step for visit in border for step in visit.steps):
        number = np.arange(start, start + len(own_step.query_index))
        for index, place in ((own_step.key_index, to_registers), (own_step.query_index, from_registers)):
            own = index < registers
            place[own_step.query_index[own], own_step.key_index[own]] = number[own]
        start += len(number)

    def placed(numbers: IntArray) -> Tensor:
        return torch.from_numpy(numbers.ravel()).to(links.device)

    found = (
        placed(to_registers[registers:].reshape(math.prod(outer), width, registers)[:, ::-1]),
        placed(from_registers),
    )
    return Lines(links, width, tuple(outer), registers, tuple(slabs), border, start, *found)


def by_line(tokens: Tensor, lines: Lines) -> Tensor:
    """Tokens [N, b, F] without registers as [W, F, *outer, b], in memory of its own."""
    grid = torch.unflatten(tokens[lines.registers :], 0, (*lines.outer, lines.width))
    return grid.movedim((-3, -1), (0, 1)).contiguous()


def box(tokens: Tensor, start: Sequence[int], slab: Slab) -> Tensor:
    """Positions of a slab [W, F, *size, b]."""
    for axis, (first, size) in enumerate(zip(start, slab.size, strict=True)):
        tokens = tokens.narrow(2 + axis, first, size)
    return tokens


def product(first: Tensor, second: Tensor, room: Tensor) -> Tensor:
    """The product of two tensors of five axes, broadcast, in ``room``."""
    shape = [max(*pair) if min(*pair) else 0 for pair in zip(first.shape, second.shape, strict=True)]
    return torch.mul(first, second, out=room[: math.prod(shape)].view(shape))


class LineRole:
    """One role's relative features for some items of the batch, and the gradients that it gathers.

    Tokens are by line, a query's columns turned: u = W - 1 - c. Matrices [R, classes, E] are turned as well: those of
    queries and values begin with the last class, whose row in a key's table is the first.
    """

    def __init__(
        self, role: Encoded, lines: Lines, matrices: Tensor | None, d_matrices: Tensor | None, part: slice
    ) -> None:
        self._role, self._lines, self._matrices, self._d_matrices = role, lines, matrices, d_matrices
        self.is_query = role.side == "query"
        own = role.tables[0].z if role.base is None else role.base.flatten(2)
        self._tokens = self._turned(by_line(own[:, part], lines))
        # Every slab is gone through up to three times.
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}

    def _turned(self, tokens: Tensor) -> Tensor:
        return tokens.flip(0) if self.is_query else tokens

    def collect(self) -> None:
        """Begin to gather gradients."""
        self._d_tokens = torch.zeros_like(self._tokens)

    def d_tokens(self) -> Tensor:
        """What has been gathered for tokens without registers, [n, b, F]."""
        return self._turned(self._d_tokens).movedim((0, 1), (-3, -1)).flatten(0, -3)

    def _own(self, slab: Slab, tokens: Tensor, columns: slice) -> Tensor:
        """The columns and positions that have a part in a slab, [columns, F, *size, b]."""
        if self.is_query:
            return box(tokens[columns], slab.query, slab)
        return box(tokens, slab.key, slab)

    def _blocks(self, slab: Slab, table: Tensor, columns: slice) -> Tensor:
        """For each of the own columns the matrices of all others, side by side, [own, R, others * E]."""
        own, others = columns.stop - columns.start, self._lines.width
        if not self.is_query:
            own, others = others, own
        inner, classes, features = table.shape
        offset = table.storage_offset() + (slab.row + columns.start) * features
        return table.as_strided((own, inner, others * features), (features, classes * features, 1), offset)

    def _given(self, slab: Slab, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Tokens [columns, F, n], and the matrices of :meth:`_blocks` where there are any."""
        key = slab.row, columns.start
        if key not in self._views:
            blocks = None if self._matrices is None else self._blocks(slab, self._matrices, columns)
            self._views[key] = self._own(slab, self._tokens, columns).flatten(2), blocks
        return self._views[key]

    def encode(self, slab: Slab, columns: slice, room: Tensor) -> Tensor:
        """Features of a slab's pairs [columns | 1, W | 1, heads, width, n]; 1 where they are the same for all."""
        heads, width = self._role.heads, self._role.head_dim
        own, blocks = self._given(slab, columns)
        if blocks is None:
            found = own.view(own.shape[0], 1, heads, width, own.shape[2])
        else:
            rows = blocks.mT
            out = room[: rows.shape[0] * rows.shape[1] * own.shape[2]].view(*rows.shape[:2], own.shape[2])
            others = rows.shape[1] // (heads * width)
            found = torch.bmm(rows, own, out=out).view(rows.shape[0], others, heads, width, own.shape[2])
        return found if self.is_query else found.transpose(0, 1)

    def push(self, slab: Slab, columns: slice, first: Tensor, second: Tensor, room: Tensor) -> None:
        """Take in the gradient ``first`` times ``second`` of what :meth:`encode` gave."""
        if not self.is_query:
            first, second = first.transpose(0, 1), second.transpose(0, 1)
        gradient = product(first, second, room)
        own, blocks = self._given(slab, columns)
        total = self._own(slab, self._d_tokens, columns)
        if blocks is None:
            total.add_(gradient.sum(1).view(total.shape))
            return
        rows = gradient.view(own.shape[0], blocks.shape[2], own.shape[2])
        total.add_(torch.bmm(blocks, rows).view(total.shape))
        if self._d_matrices is not None:
            found = torch.bmm(own, rows.mT)
            totals = self._blocks(slab, self._d_matrices, columns)  # they overlap
            for d_blocks, matrices in zip(totals.unbind(0), found.unbind(0), strict=True):
                d_blocks.add_(matrices)
