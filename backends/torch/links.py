"""The links of a layout in the order in which ``stream`` visits them, as row ranges of token tensors.

Tokens are position-major, [N, B, F]. The queries (or keys) of one displacement on a lattice are a box of rows. A *band*
is a copy of the rows that many boxes share, so that a box is a contiguous range of it: on an H x W grid the columns
that a column offset leaves, for every row offset. Steps that share bands follow one another; a band is copied once.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from translution.geometry import Geometry, IntArray, Step, geometry
from translution.spec import Layout

Result = TypeVar("Result")
BoolArray = npt.NDArray[np.bool_]
_own = threading.local()


def _kept(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Tensors that outlive the call must be usable in every mode, whatever holds where the first call is made.

    Inference mode, the transforms of ``torch.func`` and fake tensors belong to a thread: another one has none of them.
    """

    @wraps(compute)
    def computed(*arguments: Any) -> Result:
        if getattr(_own, "thread", False):
            return compute(*arguments)
        with ThreadPoolExecutor(1, initializer=setattr, initargs=(_own, "thread", True)) as another:
            return another.submit(compute, *arguments).result()

    return computed


@dataclass(frozen=True, slots=True)
class Band:
    """Rows ``base + sum_k n_k strides_k`` with 0 <= n_k < sizes_k, last axis fastest; or the rows ``index`` lists.

    A list has a ``number`` of its own, and its rows may repeat.
    """

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    number: int = -1
    index: Tensor | None = field(default=None, compare=False)

    def _view(self, tokens: Tensor) -> Tensor:
        width = tokens.shape[1]
        start = tokens.storage_offset() + self.base * width
        return tokens.as_strided((*self.sizes, width), (*(s * width for s in self.strides), 1), start)

    def read(self, tokens: Tensor) -> Tensor:
        """These rows of contiguous ``tokens`` [N, F]: a view where they lie together, else a copy."""
        if self.index is not None:
            return tokens.index_select(0, self.index)
        return self._view(tokens).reshape(math.prod(self.sizes), tokens.shape[1]).contiguous()

    def sums(self, tokens: Tensor) -> Tensor:
        """Where to add what belongs to these rows of contiguous ``tokens`` [N, F], before :meth:`add`."""
        if self.index is not None:
            return tokens.new_zeros((len(self.index), tokens.shape[1]))
        view = self._view(tokens)
        flat = (math.prod(self.sizes), tokens.shape[1])
        return view.view(flat) if view.is_contiguous() else tokens.new_zeros(flat)

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """Add ``rows``, from :meth:`sums`, to these rows of ``tokens``."""
        if self.index is not None:
            tokens.index_add_(0, self.index, rows)
        elif not (view := self._view(tokens)).is_contiguous():
            view.add_(rows.view(view.shape))


@dataclass(frozen=True, slots=True)
class Place:
    """Rows ``first`` to ``last`` of a band; equal bands of a layout are one object."""

    band: Band
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Visit:
    """One step, or a piece of it: its rows of the tables, its range of links, its queries and its keys.

    ``opens_value`` and ``opens_key``: whether it is the first visit to its row of the value (and query) or key tables.
    """

    value_class: int
    key_class: int
    start: int
    stop: int
    query: Place
    key: Place
    opens_value: bool
    opens_key: bool


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

    @property
    def count(self) -> int:
        """Number of links L."""
        return self.visits[-1].stop if self.visits else 0

    @cached_property
    def sizes(self) -> frozenset[int]:
        """Numbers of links that a visit has."""
        return frozenset(v.stop - v.start for v in self.visits)

    @property
    def widest(self) -> int:
        """Links of the largest visit."""
        return max(self.sizes, default=0)

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
    @_kept
    def query_index(self) -> Tensor:
        """``queries`` on the device."""
        return self._placed(self.queries)

    @cached_property
    @_kept
    def key_index(self) -> Tensor:
        """``keys`` on the device."""
        return self._placed(self.keys)

    @cached_property
    @_kept
    def value_class(self) -> Tensor:
        """Class c(i, j) of every link [L]."""
        return self._placed(_joined([np.full(len(s.query_index), s.value_class) for s in self.steps]))

    @property
    def _pairs(self) -> IntArray:
        return self.queries * self.geometry.num_keys + self.keys

    @cached_property
    @_kept
    def pair_of_link(self) -> Tensor:
        """Query times number of keys plus key of every link [L]."""
        return self._placed(self._pairs)

    @cached_property
    @_kept
    def link_of_pair(self) -> Tensor:
        """The link of every pair, where every pair has one: the inverse of ``pair_of_link``."""
        return self._placed(np.argsort(self._pairs))

    def index(self, side: str) -> Tensor:
        """``query_index`` or ``key_index``."""
        return self.query_index if side == "query" else self.key_index

    @cached_property
    def unvisited(self) -> dict[str, list[int]]:
        """Rows of the ``query`` (and value) and ``key`` tables that no link uses."""
        every = set(range(self.geometry.num_classes))
        return {
            "value": sorted(every - {s.value_class for s in self.steps}),
            "key": sorted(every - {s.key_class for s in self.steps}),
        }

    @cached_property
    @_kept
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
    @_kept
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
    @_kept
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
    @_kept
    def slot_of_link(self) -> Tensor:
        """Where each link [L] stands in the buckets, one after another."""
        slots = torch.cat([b.slots for b in self.buckets]) if self.buckets else self.query_index
        found = torch.empty(self.count + 1, dtype=torch.int64, device=self.device)
        return found.scatter_(0, slots, torch.arange(len(slots), device=self.device))[: self.count]


def _joined(parts: Sequence[IntArray]) -> IntArray:
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)


def _box(index: IntArray) -> tuple[list[int], list[int]] | None:
    """Sizes and strides, outermost first, of an arithmetic box of rows; None where the rows are no box."""
    sizes: list[int] = []
    strides: list[int] = []
    while len(index) > 1:
        jumps = np.diff(index)
        other = np.flatnonzero(jumps != jumps[0])
        size = int(other[0]) + 1 if len(other) else len(index)
        if len(index) % size or jumps[0] <= 0:
            return None
        grid = index.reshape(-1, size)
        if (np.diff(grid, axis=1) != jumps[0]).any():
            return None
        sizes.insert(0, size)
        strides.insert(0, int(jumps[0]))
        index = grid[:, 0]
    return sizes or [1], strides or [1]


def _nests(sizes: list[int], strides: list[int]) -> bool:
    """Whether every axis steps over all that lies inside it, so that no row of the box repeats."""
    reach = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _place(index: IntArray, tokens: int, number: int, device: torch.device) -> Place:
    """The rows of one step as a range of a band; a list of its own where they are no box or repeat."""
    box = _box(index)
    if box is None or not _nests(*box):
        return Place(Band(0, (), (), number, torch.from_numpy(index).to(device)), 0, len(index))
    sizes, strides = box
    turn, base = divmod(int(index[0]), strides[0])
    inner = sum((n - 1) * s for n, s in zip(sizes[1:], strides[1:], strict=True))
    turns = (tokens - base - inner - 1) // strides[0] + 1
    block = math.prod(sizes[1:])
    band = Band(base, (turns, *sizes[1:]), tuple(strides))
    return Place(band, turn * block, (turn + sizes[0]) * block)


def _pieces(step: Step, most: int) -> Iterator[Step]:
    """The step in pieces of at most ``most`` links: shared classes can have a step with nearly all of them."""
    for start in range(0, len(step.query_index), most):
        own = slice(start, start + most)
        yield replace(step, query_index=step.query_index[own], key_index=step.key_index[own])


def _placed_steps(found: Geometry, device: torch.device) -> list[tuple[Step, Place, Place]]:
    """The steps with their places, those that share bands side by side."""
    queries, keys = found.num_queries, found.num_keys + found.has_zero_token
    pieces = [piece for step in found.steps for piece in _pieces(step, max(queries, keys))]
    placed = [
        (
            piece,
            _place(piece.query_index, queries, 2 * number, device),
            _place(piece.key_index, keys, 2 * number + 1, device),
        )
        for number, piece in enumerate(pieces)
    ]
    return sorted(placed, key=lambda item: _order(item[1].band) + _order(item[2].band))


def _order(band: Band) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return band.number, band.base, band.sizes, band.strides


@lru_cache(maxsize=64)
@_kept
def links(layout: Layout, device: torch.device) -> Links:
    """The links of ``layout`` on ``device``."""
    found = geometry(layout)
    visits, steps, start = [], [], 0
    values: set[int] = set()
    bands: dict[Band, Band] = {}
    keys: set[int] = set()
    for step, query, key in _placed_steps(found, device):
        query, key = (replace(p, band=bands.setdefault(p.band, p.band)) for p in (query, key))
        stop = start + len(step.query_index)
        new_value, new_key = step.value_class not in values, step.key_class not in keys
        visits.append(Visit(step.value_class, step.key_class, start, stop, query, key, new_value, new_key))
        steps.append(step)
        values.add(step.value_class)
        keys.add(step.key_class)
        start = stop
    return Links(found, device, tuple(visits), tuple(steps))
