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
    """Tokens [N, b, F] without registers as [W, F, *outer, b]."""
    return torch.unflatten(tokens[lines.registers :], 0, (*lines.outer, lines.width)).movedim((-3, -1), (0, 1))


def box(tokens: Tensor, start: Sequence[int], slab: Slab) -> Tensor:
    """Positions of a slab [W, F, *size, b]."""
    for axis, (first, size) in enumerate(zip(start, slab.size, strict=True)):
        tokens = tokens.narrow(2 + axis, first, size)
    return tokens
