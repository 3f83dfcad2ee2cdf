"""Displacement classes dealt out to devices: which rows of the tables one device owns, and which links it computes.

Links that use the same row of a table stay together, so that every row has one owner. They are dealt in rounds, from
those with the most links to those with the fewest: in each round everyone gets one, who has the fewest links so far the
largest. Rows are then even to one group, and links to a few.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from translution.arrays import Array
from translution.errors import NotSupported
from translution.geometry import IntArray, Step, geometry
from translution.normal_form import normal_form
from translution.spec import Layout, Operator, PairTable

Rows = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RowAxis:
    """Where a parameter has one row per class: along ``axis``, by the classes of the ``value`` or ``key`` tables."""

    axis: int
    side: Literal["value", "key"]


@dataclass(frozen=True, eq=False)
class Share:
    """What one of ``world`` devices owns of an operator.

    ``value_rows`` are its rows of the query, value and bias tables, ``key_rows`` its rows of the key table, both
    ascending; ``steps`` its links, with the whole tables' class numbers.
    """

    operator: Operator
    rank: int
    world: int
    value_rows: Rows
    key_rows: Rows
    steps: tuple[Step, ...]

    @property
    def num_links(self) -> int:
        """Number of links that this device computes."""
        return sum(len(step.query_index) for step in self.steps)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and the shape that this device holds: its rows of the tables, all of the others."""
        axes = row_axes(self.operator)
        return {
            name: shape if name not in axes else self._shape(shape, axes[name])
            for name, shape in self.operator.parameters.items()
        }

    @property
    def num_parameters(self) -> int:
        """Numbers that this device holds."""
        return sum(math.prod(shape) for shape in self.parameters.values())

    def _shape(self, shape: tuple[int, ...], rows: RowAxis) -> tuple[int, ...]:
        return (*shape[: rows.axis], len(self._rows(rows)), *shape[rows.axis + 1 :])

    def _rows(self, rows: RowAxis) -> Rows:
        return self.value_rows if rows.side == "value" else self.key_rows

    def take(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """This device's part of a whole operator's parameters, or of their gradients; tables are copied."""
        axes = row_axes(self.operator)
        return {
            name: value
            if name not in axes
            else value[(slice(None),) * axes[name].axis + (list(self._rows(axes[name])),)]
            for name, value in params.items()
        }

    @cached_property
    def layout(self) -> PairTable:
        """This device's links as a layout of its own: its classes are numbered by its rows, from 0."""
        shape = (self.operator.layout.num_queries, self.operator.layout.num_keys)
        classes, key_classes = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        value_number = {row: number for number, row in enumerate(self.value_rows)}
        key_number = {row: number for number, row in enumerate(self.key_rows)}
        for step in self.steps:
            classes[step.query_index, step.key_index] = value_number[step.value_class]
            key_classes[step.query_index, step.key_index] = key_number[step.key_class]
        most = max(len(self.value_rows), len(self.key_rows), 1)
        return PairTable(_nested(classes), most, _nested(key_classes))


def _nested(table: IntArray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


@lru_cache(maxsize=64)
def row_axes(operator: Operator) -> Mapping[str, RowAxis]:
    """The parameters that have one row per class; what is not here, every device holds whole."""
    form = normal_form(operator)
    found: dict[str, RowAxis] = {}
    for role in form.roles:
        rows = RowAxis(0, "key" if role.name == "key" else "value")
        found |= {linear.table: rows for linear in role.linears if linear.table is not None}
        found |= {constant.name: rows for constant in role.constants if constant.per_class}
    for branch in form.branches:
        if branch.bias is not None and branch.bias.kind == "table" and branch.bias.parameter is not None:
            found[branch.bias.parameter] = RowAxis(1, "value")
    return found


@lru_cache(maxsize=64)
def read_by_links(operator: Operator) -> frozenset[str]:
    """The parameters that no class divides and that links read: each device finds a part of their gradient."""
    form = normal_form(operator)
    # What is applied to merged results is the same on every device.
    after = {linear.after for linear in form.value.linears} | {form.gate}
    after |= {name for name in operator.parameters if name.startswith("output.")}
    return frozenset(operator.parameters.keys() - row_axes(operator).keys() - after)


def why_not_split(operator: Operator, world: int = 1) -> list[str]:
    """Reasons why the classes can't be dealt out to ``world`` devices; empty where they can."""
    if not normal_form(operator).relative_roles:
        return ["no role differs between displacements: there are no tables to deal out"]
    found, reasons = geometry(operator.layout), []
    if found.has_zero_token:
        reasons.append("some links lead to padded positions")
    elif found.repeats_pairs:
        reasons.append("some key appears twice in a window")
    if not reasons and world > (groups := num_groups(operator.layout)):
        reasons.append(f"there are {groups:,} groups of classes for {world:,} devices")
    return reasons


@dataclass(frozen=True, slots=True)
class _Group:
    """Links that share rows, directly or through others, with these rows."""

    value_rows: Rows
    key_rows: Rows
    steps: tuple[Step, ...]

    @property
    def num_links(self) -> int:
        return sum(len(step.query_index) for step in self.steps)


@lru_cache(maxsize=64)
def _groups(layout: Layout) -> tuple[_Group, ...]:
    """All links and all rows, those with the most links first; rows that no link uses are groups without links."""
    found = geometry(layout)
    # Rows of the value tables are numbered from 0, those of the key table from num_classes.
    root = list(range(2 * found.num_classes))

    def leader(row: int) -> int:
        while root[row] != row:
            root[row] = row = root[root[row]]
        return row

    for step in found.steps:
        root[leader(found.num_classes + step.key_class)] = leader(step.value_class)
    value_rows: dict[int, list[int]] = {}
    key_rows: dict[int, list[int]] = {}
    steps: dict[int, list[Step]] = {}
    for row in range(found.num_classes):
        value_rows.setdefault(leader(row), []).append(row)
        key_rows.setdefault(leader(found.num_classes + row), []).append(row)
    for step in found.steps:
        steps.setdefault(leader(step.value_class), []).append(step)
    groups = [
        _Group(tuple(value_rows.get(key, ())), tuple(key_rows.get(key, ())), tuple(steps.get(key, ())))
        for key in value_rows | key_rows
    ]
    return tuple(sorted(groups, key=lambda g: (-g.num_links, g.value_rows, g.key_rows)))


def num_groups(layout: Layout) -> int:
    """The most devices that each get links: groups of classes whose links share no row with others."""
    return sum(1 for group in _groups(layout) if group.steps)


@lru_cache(maxsize=64)
def shares(operator: Operator, world: int) -> tuple[Share, ...]:
    """What each of ``world`` devices owns. Every row of every table and every link belongs to exactly one.

    Raises:
        NotSupported: the classes can't be dealt out to so many; carries every reason.
    """
    if world < 1:
        raise ValueError(f"world={world}: classes are dealt out to at least one device")
    if reasons := why_not_split(operator, world):
        raise NotSupported("torch", "split displacements", reasons)
    groups = _groups(operator.layout)
    hands: list[list[_Group]] = [[] for _ in range(world)]
    loads = [0] * world
    for start in range(0, len(groups), world):
        # Stable: who stands first among equals stays first.
        emptiest = sorted(range(world), key=lambda rank: (loads[rank], len(hands[rank])))
        for rank, group in zip(emptiest, groups[start : start + world], strict=False):
            hands[rank].append(group)
            loads[rank] += group.num_links
    return tuple(
        Share(
            operator,
            rank,
            world,
            tuple(sorted(row for group in hand for row in group.value_rows)),
            tuple(sorted(row for group in hand for row in group.key_rows)),
            tuple(step for group in hand for step in group.steps),
        )
        for rank, hand in enumerate(hands)
    )


def share_of(operator: Operator, rank: int, world: int) -> Share:
    """What device ``rank`` of ``world`` owns; every device finds the same division.

    Raises:
        NotSupported: the classes can't be dealt out to so many; carries every reason.
    """
    if not 0 <= rank < max(world, 1):
        raise ValueError(f"rank={rank}, world={world}: ranks go from 0 to world - 1")
    return shares(operator, world)[rank]
