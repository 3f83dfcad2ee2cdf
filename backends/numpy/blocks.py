"""The links of a layout cut into blocks of one class, and sums over links that share a token."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from translution.geometry import Geometry, IntArray

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Groups:
    """The links of each token: ``rows`` indexes the tokens of all links; equal tokens lie together in ``order``."""

    rows: IntArray | slice
    order: IntArray | None
    starts: IntArray
    present: IntArray

    @classmethod
    def of(cls, index: IntArray) -> "Groups":
        """Groups of a token index [P]."""
        ascending = bool((index[1:] >= index[:-1]).all())
        order = None if ascending else np.argsort(index, kind="stable")
        ordered = index if order is None else index[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(index) else index[:0]
        rows: IntArray | slice = index
        if len(starts) == len(index):
            order = None
            if len(index) and ascending and index[-1] - index[0] == len(index) - 1:
                rows = slice(int(index[0]), int(index[-1]) + 1)
        return cls(rows, order, starts, ordered[starts])

    @property
    def unique(self) -> bool:
        """Whether every link has a token of its own."""
        return isinstance(self.rows, slice) or len(self.starts) == len(self.rows)

    def add_to(self, total: Array, values: Array) -> None:
        """``total[token] += values[link]`` for every link, values [P, ..]."""
        if self.unique:
            total[self.rows] += values
        else:
            total[self.present] += np.add.reduceat(self._ordered(values), self.starts, axis=0)

    def raise_to(self, total: Array, values: Array) -> None:
        """``total[token] = max(total[token], values[link])`` for every link."""
        if self.unique:
            total[self.rows] = np.maximum(total[self.rows], values)
        else:
            found = np.maximum.reduceat(self._ordered(values), self.starts, axis=0)
            total[self.present] = np.maximum(total[self.present], found)

    def _ordered(self, values: Array) -> Array:
        return values if self.order is None else values[self.order]


@dataclass(frozen=True, eq=False)
class Block:
    """Links ``links`` of the geometry, which share both classes; never more of them than tokens on one side."""

    value_class: int
    key_class: int
    links: slice
    query: Groups
    key: Groups


@lru_cache(maxsize=64)
def blocks_of(geometry: Geometry) -> tuple[Block, ...]:
    """The steps of ``geometry`` as blocks: a long step (far classes, pair tables) is cut, which bounds memory."""
    most = max(geometry.num_queries, geometry.num_keys)

    def cut() -> Iterator[Block]:
        first = 0
        for step in geometry.steps:
            for start in range(0, len(step.query_index), most):
                query, key = step.query_index[start : start + most], step.key_index[start : start + most]
                links = slice(first, first + len(query))
                yield Block(step.value_class, step.key_class, links, Groups.of(query), Groups.of(key))
                first = links.stop

    return tuple(cut())


@lru_cache(maxsize=64)
def query_groups(geometry: Geometry) -> Groups:
    """All links by query."""
    return Groups.of(geometry.query_index)


@lru_cache(maxsize=64)
def key_groups(geometry: Geometry) -> Groups:
    """All links by key."""
    return Groups.of(geometry.key_index)
