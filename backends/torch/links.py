"""The links of a layout on one device: what the algorithms look up, made once and kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from translution.backends.torch.memory import kept
from translution.backends.torch.stretches import Stretch, stretches
from translution.backends.torch.visits import Visit, visits
from translution.geometry import Geometry, IntArray, Step, geometry
from translution.spec import Layout

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Bucket:
    """Queries with about as many links each: ``slots`` [queries * width] lists links, L where a slot is empty."""

    slots: Tensor
    width: int


@dataclass(frozen=True, eq=False)
class Links:
    """All links of a layout [L], visit after visit, on one device."""

    geometry: Geometry
    device: torch.device
    visits: tuple[Visit, ...]
    steps: tuple[Step, ...]
    _stretches: dict[tuple[int, bool], tuple[Stretch, ...]] = field(default_factory=dict, repr=False)
    _cut: dict[tuple[str, tuple[Stretch, ...]], tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """Number of links L."""
        return self.visits[-1].stop if self.visits else 0

    @cached_property
    def shapes(self) -> frozenset[tuple[int, int]]:
        """What :attr:`Visit.shape` a visit has."""
        return frozenset(visit.shape for visit in self.visits)

    @cached_property
    def widest(self) -> int:
        """Links of the largest visit."""
        return max((displacements * links for displacements, links in self.shapes), default=0)

    @cached_property
    @kept
    def apart(self) -> "Links":
        """The same links in another order, for large batches: visits that take two thirds of the memory for rows."""
        return _links(self.geometry, self.device, apart=True)

    def stretches(self, most: int, mixed: bool = False) -> tuple[Stretch, ...]:
        """The visits in stretches of about ``most`` links: of the power of two below it. ``mixed``: of any bands."""
        power = max(most, 1).bit_length()
        if (power, mixed) not in self._stretches:
            self._stretches[power, mixed] = tuple(stretches(self.visits, 1 << power - 1, mixed))
        return self._stretches[power, mixed]

    def _placed(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @cached_property
    def queries(self) -> IntArray:
        """Query of every link [L], as an array."""
        return _joined([s.query_index for s in self.steps])

    @cached_property
    def keys(self) -> IntArray:
        """Key of every link [L], as an array; num_keys for the zero token."""
        return _joined([s.key_index for s in self.steps])

    @cached_property
    @kept
    def query_index(self) -> Tensor:
        """``queries`` on the device."""
        return self._placed(self.queries)

    @cached_property
    @kept
    def key_index(self) -> Tensor:
        """``keys`` on the device."""
        return self._placed(self.keys)

    @cached_property
    @kept
    def value_class(self) -> Tensor:
        """Class c(i, j) of every link [L]."""
        return self._placed(_joined([np.full(len(s.query_index), s.value_class) for s in self.steps]))

    @property
    def _pairs(self) -> IntArray:
        return self.queries * self.geometry.num_keys + self.keys

    @cached_property
    @kept
    def pair_of_link(self) -> Tensor:
        """Query times number of keys plus key of every link [L]."""
        return self._placed(self._pairs)

    @cached_property
    @kept
    def link_of_pair(self) -> Tensor:
        """The link of every pair, where every pair has one: the inverse of ``pair_of_link``."""
        return self._placed(np.argsort(self._pairs))

    def index(self, side: str) -> Tensor:
        """``query_index`` or ``key_index``."""
        return self.query_index if side == "query" else self.key_index

    def cut_index(self, role: str, stretches: tuple[Stretch, ...]) -> tuple[Tensor, ...]:
        """The token of every link for a ``role`` in its order, that is mirrored for ``key``, for each of the stretches.

        Made once: what is looked up in every call would count as the call's own.
        """
        if (role, stretches) not in self._cut:
            self._cut[role, stretches] = self._index_parts(role, stretches)
        return self._cut[role, stretches]

    @kept
    def _index_parts(self, role: str, stretches: tuple[Stretch, ...]) -> tuple[Tensor, ...]:
        index = self.query_index if role == "query" else self.key_index
        if role == "key":
            by_visit = (self.keys[visit.start : visit.stop].reshape(visit.shape) for visit in self.visits)
            index = self._placed(_joined([own[::-1].ravel() for own in by_visit]))
        return tuple(index[stretch.links] for stretch in stretches)

    @cached_property
    def unvisited(self) -> dict[str, list[int]]:
        """Rows of the ``query`` (and value) and ``key`` tables that no link uses."""
        every = set(range(self.geometry.num_classes))
        return {
            "value": sorted(every - {s.value_class for s in self.steps}),
            "key": sorted(every - {s.key_class for s in self.steps}),
        }

    @cached_property
    @kept
    def degree(self) -> Tensor:
        """Number of links of every query [Nq]."""
        return self._placed(np.bincount(self.queries))

    @cached_property
    def all_seen(self) -> bool:
        """Whether every query and every key has a link."""
        queries, keys = np.unique(self.queries), np.unique(self.keys)
        return len(queries) == self.geometry.num_queries and int((keys < self.geometry.num_keys).sum()) == (
            self.geometry.num_keys
        )

    @cached_property
    @kept
    def support(self) -> Tensor | None:
        """Which pairs are linked [Nq, Nk]; None for all of them. Only where no link leads to the zero token."""
        return None if self._linked.all() else torch.from_numpy(self._linked).to(self.device)

    @cached_property
    def _linked(self) -> BoolArray:
        linked = np.zeros((self.geometry.num_queries, self.geometry.num_keys), bool)
        linked[self.queries, self.keys] = True
        return linked

    @cached_property
    def is_lower_triangle(self) -> bool:
        """Whether every query is linked with the keys up to its own number, and some key is not linked."""
        linked = self._linked
        rows, columns = linked.shape
        return rows == columns and not linked.all() and np.array_equal(linked, np.tri(rows, dtype=bool))

    @cached_property
    @kept
    def buckets(self) -> tuple[Bucket, ...]:
        """Queries by the power of two above their number of links: padding at most doubles the links."""
        query = self.queries
        order = np.argsort(query, kind="stable")
        degree = np.bincount(query)
        first = np.cumsum(degree) - degree
        power = np.ceil(np.log2(np.maximum(degree, 1))).astype(np.int64)
        found = []
        for p in np.unique(power[degree > 0]):
            rows = np.flatnonzero((power == p) & (degree > 0))
            slot = np.arange(degree[rows].max())
            filled = slot < degree[rows][:, None]
            at = np.where(filled, first[rows][:, None] + slot, 0)
            slots = np.where(filled, order[at], len(query))
            found.append(Bucket(self._placed(slots.ravel()), len(slot)))
        return tuple(found)

    @cached_property
    @kept
    def slot_of_link(self) -> Tensor:
        """Where each link [L] stands in the buckets, one after another."""
        slots = torch.cat([b.slots for b in self.buckets]) if self.buckets else self.query_index
        found = torch.empty(self.count + 1, dtype=torch.int64, device=self.device)
        return found.scatter_(0, slots, torch.arange(len(slots), device=self.device))[: self.count]


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)


@lru_cache(maxsize=64)
@kept
def links(layout: Layout, device: torch.device) -> Links:
    """The links of ``layout`` on ``device``."""
    return _links(geometry(layout), device, apart=False)


def _links(found: Geometry, device: torch.device, *, apart: bool) -> Links:
    ordered = visits(found, device, apart=apart)
    return Links(found, device, ordered, tuple(step for visit in ordered for step in visit.steps))
