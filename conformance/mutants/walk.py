"""The links of a layout by plain loops, in steps small enough that each can be got wrong (clauses L1 to L8)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from translution.spec import Lattice, Layout, PairTable, RegisterClass
from translution.spec.layout import Displacement, Label


@dataclass(frozen=True, slots=True)
class Links:
    """All links of a layout, query after query.

    ``query`` and ``key`` are tokens [L], key ``num_keys`` is the zero token. The rows [L] are those of each table.
    ``delta`` and the two positions are float64 [L, axes], 0 where a token has none.
    """

    num_queries: int
    num_keys: int
    query: Tensor
    key: Tensor
    query_row: Tensor
    key_row: Tensor
    value_row: Tensor
    bias_row: Tensor
    delta: Tensor
    query_position: Tensor
    key_position: Tensor


class Link(NamedTuple):
    """One link; ``delta`` None and positions None for registers and in pair tables."""

    query: int
    key: int
    row: int
    key_row: int
    delta: Displacement | None = None
    query_position: Displacement | None = None
    key_position: Displacement | None = None


class Tap(NamedTuple):
    """What stands at one displacement along an axis: a key index, or None for the zero token."""

    delta: int
    key: int | None
    position: int


class Walk:
    """Goes from query to query and writes down what each one sees."""

    def __init__(self, layout: Lattice) -> None:
        self.layout = layout
        self.rows = {label: row for row, label in enumerate(self.labels(mirrored=False))}
        self.key_rows = {label: row for row, label in enumerate(self.labels(mirrored=True))}

    # Rows (L3, L6, L7)

    def labels(self, mirrored: bool) -> list[Label]:
        """Labels in row order; ``mirrored`` for the key table."""
        return [*self.grid_labels(mirrored), *self.register_labels(mirrored)]

    def grid_labels(self, mirrored: bool) -> list[Displacement]:
        """Those of displacements, ascending."""
        every = self.layout.key_labels() if mirrored else self.layout.labels()
        return [label for label in every if isinstance(label, tuple)]

    def register_labels(self, mirrored: bool) -> list[RegisterClass]:
        """Those of pairs with a register."""
        every = self.layout.key_labels() if mirrored else self.layout.labels()
        return [label for label in every if isinstance(label, RegisterClass)]

    def label(self, delta: Displacement) -> Displacement:
        """The class of a displacement."""
        return self.layout.label(delta)

    def row(self, label: Label, mirrored: bool) -> int:
        """Row of a label in the key table or in the others."""
        return (self.key_rows if mirrored else self.rows)[label]

    # Tokens (L1, L6)

    def register_token(self, register: int, extents: tuple[int, ...]) -> int:
        """Number of a register among the tokens."""
        return register

    def grid_token(self, site: tuple[int, ...], extents: tuple[int, ...]) -> int:
        """Number of a grid site among the tokens."""
        number = 0
        for index, extent in zip(site, extents, strict=True):
            number = number * extent + index
        return self.layout.registers + number

    def here(self, axis: int, index: int) -> int:
        """Lattice position of a query."""
        return self.layout.strides[axis] * index + self.layout.offsets[axis]

    def there(self, axis: int, index: int) -> int:
        """Lattice position of a key."""
        return self.key_step(axis) * index

    def key_step(self, axis: int) -> int:
        """Lattice steps between keys."""
        return self.layout.key_strides[axis]

    # Support (L2, L4, L5)

    def window(self, axis: int) -> list[tuple[int, int]]:
        """Each displacement of the window, by its label and by where it looks: at the query's position minus that."""
        first, step = self.layout.paddings[axis], self.layout.dilations[axis]
        return [(first - tap * step, first - tap * step) for tap in range(self.layout.window[axis])]

    def taps(self, axis: int, index: int) -> list[Tap]:
        """What a query sees along one axis."""
        layout = self.layout
        here = self.here(axis, index)
        if layout.kernel_size is None:
            return [Tap(here - self.there(axis, key), key, self.there(axis, key)) for key in range(layout.keys[axis])]
        if layout.boundary == "shift":
            return [Tap(index - key, key, key) for key in self.neighbours(axis, index)]
        found = [(label, here - reach, self.beyond(axis, here - reach)) for label, reach in self.window(axis)]
        return [Tap(label, key, position) for label, position, (exists, key) in found if exists]

    def neighbours(self, axis: int, index: int) -> list[int]:
        """The window that is moved to stay inside, among the sites of the query's residue."""
        step, size = self.layout.dilations[axis], self.layout.window[axis]
        sites = range(index % step, self.layout.grid[axis], step)
        own = index // step
        if self.layout.axis_causal[axis]:
            return list(sites[max(own - size + 1, 0) : own + 1])
        first = min(max(own - size // 2, 0), len(sites) - size)
        return list(sites[first : first + size])

    def beyond(self, axis: int, position: int) -> tuple[bool, int | None]:
        """Whether something stands at a lattice position, and which key; None for the zero token."""
        extent, step = self.layout.keys[axis], self.key_step(axis)
        if position % step == 0 and 0 <= position // step < extent:
            return True, position // step
        match self.layout.boundary:
            case "zeros":
                return True, None
            case "circular":
                return True, position % extent
            case "reflect":
                return True, self.reflected(position, extent)
            case "replicate":
                return True, min(max(position, 0), extent - 1)
        return False, None

    def reflected(self, position: int, extent: int) -> int:
        """The key that the grid mirrored at its border sites has at a position."""
        while extent > 1 and not 0 <= position < extent:
            position = -position if position < 0 else 2 * (extent - 1) - position
        return position if extent > 1 else 0

    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        """Whether a causal layout keeps the pair of these grid indices."""
        if self.layout.raster_causal:
            return delta >= (0,) * len(delta)
        return all(d >= 0 for d, causal in zip(delta, self.layout.axis_causal, strict=True) if causal)

    def register_sees(self, register: int, partner: int | None) -> bool:
        """Whether a register as query keeps its link to a register or, with None, to the grid."""
        return self.layout.causal is False or (partner is not None and partner <= register)

    # Links

    def register_links(self) -> Iterator[Link]:
        """Every pair with a register."""
        layout, registers = self.layout, range(self.layout.registers)
        for a, b in itertools.product([*registers, None], [*registers, None]):
            if (a is None and b is None) or (a is not None and not self.register_sees(a, b)):
                continue
            rows = self.row(RegisterClass(a, b), False), self.row(RegisterClass(b, a), True)
            queries = self.tokens(a, layout.grid, self.here)
            for (query, own), (key, other) in itertools.product(queries, self.tokens(b, layout.keys, self.there)):
                yield Link(query, key, *rows, None, own, other)

    def tokens(
        self, register: int | None, extents: tuple[int, ...], position: Callable[[int, int], int]
    ) -> list[tuple[int, Displacement | None]]:
        """The register, or every grid token, with its lattice position."""
        if register is not None:
            return [(self.register_token(register, extents), None)]
        return [
            (self.grid_token(site, extents), tuple(position(axis, index) for axis, index in enumerate(site)))
            for site in _sites(extents)
        ]

    def grid_links(self) -> Iterator[Link]:
        """Every pair on the lattice."""
        layout = self.layout
        axes = [[self.taps(axis, index) for index in range(layout.grid[axis])] for axis in range(layout.rank)]
        for site in _sites(layout.grid):
            token = self.grid_token(site, layout.grid)
            own = tuple(self.here(axis, index) for axis, index in enumerate(site))
            for taps in itertools.product(*(axes[axis][index] for axis, index in enumerate(site))):
                delta, keys = tuple(tap.delta for tap in taps), tuple(tap.key for tap in taps)
                if self.in_order(delta, site, keys):
                    yield self.grid_link(token, own, delta, taps)

    def grid_link(self, query: int, own: Displacement, delta: Displacement, taps: tuple[Tap, ...]) -> Link:
        """One link; a position beyond the grid is the zero token's, which is not rotated."""
        found = tuple(tap.key for tap in taps if tap.key is not None)
        inside = len(found) == len(taps)
        key = self.grid_token(found, self.layout.keys) if inside else self.layout.num_keys
        label, mirrored = self.label(delta), self.label(tuple(-d for d in delta))
        at = tuple(self.there(axis, index) for axis, index in enumerate(found)) if inside else None
        return Link(query, key, self.row(label, False), self.row(mirrored, True), label, own, at)

    def links(self) -> Iterator[Link]:
        """Every link."""
        return itertools.chain(self.register_links(), self.grid_links())


def _sites(extents: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(extent) for extent in extents))


def _table_links(layout: PairTable) -> Iterator[Link]:
    mirrored = layout.reversed_classes()
    for query, row in enumerate(layout.classes):
        for key, found in enumerate(row):
            if found >= 0:
                yield Link(query, key, found, mirrored[query][key])


@lru_cache(maxsize=2048)
def links_of(layout: Layout, walk: Callable[[Lattice], Walk] = Walk) -> Links:
    """The links as index tensors; shared between calls, so never written to."""
    rank = 0 if isinstance(layout, PairTable) else layout.rank
    every = _table_links(layout) if isinstance(layout, PairTable) else walk(layout).links()
    found = sorted(every, key=lambda link: link.query)
    none = (0,) * rank

    def whole(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def places(values: list[Displacement | None]) -> Tensor:
        return torch.tensor([v or none for v in values], dtype=torch.float64).reshape(len(values), rank)

    row = whole([link.row for link in found])
    return Links(
        layout.num_queries,
        layout.num_keys,
        whole([link.query for link in found]),
        whole([link.key for link in found]),
        row,
        whole([link.key_row for link in found]),
        row,
        row,
        places([link.delta for link in found]),
        places([link.query_position for link in found]),
        places([link.key_position for link in found]),
    )
