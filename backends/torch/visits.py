"""The order in which ``stream`` visits the links of a layout, as row ranges of token tensors.

Tokens are position-major, [N, B, F]. The queries (or keys) of one displacement on a lattice are a box of rows. A *band*
is a copy of the rows that many boxes share, so that a box is a contiguous range of it: on an H x W grid the columns
that a column offset leaves, for every row offset. Visits that share bands follow one another; a band is copied once.

Displacements d and -d are visited together where the queries of one are the keys of the other: two products of the same
size keep two cores busy where one product of a few rows does not.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from translution.geometry import Geometry, IntArray, Step

# What has more links than this, and than three quarters of the tokens, is visited in pieces.
ENOUGH_LINKS = 128


@dataclass(frozen=True, slots=True)
class Band:
    """Rows ``base + sum_k n_k strides_k`` with 0 <= n_k < sizes_k, last axis fastest; or the rows ``index`` lists.

    A list has a ``number`` of its own, and its rows may repeat; ``base`` tells the pieces of one apart.
    """

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    number: int = -1
    index: Tensor | None = field(default=None, compare=False)

    @property
    def length(self) -> int:
        """Number of rows."""
        return math.prod(self.sizes) if self.index is None else len(self.index)

    def _view(self, tokens: Tensor) -> Tensor:
        width, row = tokens.shape[1], tokens.stride(0)
        start = tokens.storage_offset() + self.base * row
        return tokens.as_strided((*self.sizes, width), (*(s * row for s in self.strides), 1), start)

    def lies_in(self, tokens: Tensor) -> Tensor | None:
        """These rows of ``tokens`` [N, F] as a view, where they lie together."""
        if self.index is not None or not (view := self._view(tokens)).is_contiguous():
            return None
        return view.view(self.length, tokens.shape[1])

    def read(self, tokens: Tensor, out: Tensor) -> None:
        """Copy these rows of ``tokens`` [N, F] to ``out``."""
        if self.index is not None:
            torch.index_select(tokens, 0, self.index, out=out)
        else:
            view = self._view(tokens)
            out.view(view.shape).copy_(view)

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """Add ``rows`` to these rows of ``tokens`` [N, F]."""
        if self.index is not None:
            tokens.index_add_(0, self.index, rows)
        else:
            view = self._view(tokens)
            view.add_(rows.view(view.shape))


@dataclass(frozen=True, slots=True)
class Place:
    """``count`` rows of the ``bands``, one band after another, from row ``first``; and again ``stride`` further on.

    ``stride`` is 0 where there is one displacement. Equal ``bands`` of a layout are one object. The bands of both
    ``lane`` are open at a time: those of queries, and those of keys that are not mirrored.
    """

    bands: tuple[Band, ...]
    first: int
    count: int
    stride: int = 0
    lane: int = 0

    @property
    def displacements(self) -> int:
        """1 or 2."""
        return 2 if self.stride else 1

    @property
    def length(self) -> int:
        """Rows of all bands."""
        return sum(band.length for band in self.bands)

    def part(self, start: int, stop: int) -> "Place":
        """Some of the rows, of each displacement; those of a list are a list of their own."""
        (band, *others), count = self.bands, stop - start
        if others or band.index is None:
            return replace(self, first=self.first + start, count=count)
        own = replace(band, base=start, index=band.index[start:stop])
        return replace(self, bands=(own,), count=count)


@dataclass(frozen=True)
class Visit:
    """A step, a piece of one, or two steps that are each other's mirror: their ranges of links, tokens and tables.

    ``query``, ``key`` and ``value`` are the rows of the role of that name; the rows of its table are ``value_rows``,
    for keys ``key_rows``. All go through the steps in their order, but the role ``key``, which comes last step first:
    rows of a table are taken in ascending order, and c(j, i) descends where c(i, j) ascends.

    ``opens_value`` and ``opens_key``: whether it is the first visit to its rows of the tables. ``is_apart``: whether
    ``value`` has the last displacement first, so that its products are one by one.
    """

    steps: tuple[Step, ...]
    start: int
    query: Place
    key: Place
    value: Place
    value_rows: slice
    key_rows: slice
    opens_value: bool = True
    opens_key: bool = True
    is_apart: bool = False

    @property
    def stop(self) -> int:
        """One past its last link."""
        return self.start + len(self.steps) * self.query.count

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Number of displacements, and links of each."""
        return len(self.steps), self.query.count

    def table_rows(self, role: str) -> slice:
        """The rows of the table of a role."""
        return self.key_rows if role == "key" else self.value_rows

    def opens(self, role: str) -> bool:
        """Whether no visit before has been to those rows."""
        return self.opens_key if role == "key" else self.opens_value


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
        return Place((Band(0, (), (), number, torch.from_numpy(index).to(device)),), 0, len(index))
    sizes, strides = box
    turn, base = divmod(int(index[0]), strides[0])
    inner = sum((n - 1) * s for n, s in zip(sizes[1:], strides[1:], strict=True))
    turns = (tokens - base - inner - 1) // strides[0] + 1
    block = math.prod(sizes[1:])
    return Place((Band(base, (turns, *sizes[1:]), tuple(strides)),), turn * block, sizes[0] * block)


def _piece(step: Step, start: int, stop: int) -> Step:
    return replace(step, query_index=step.query_index[start:stop], key_index=step.key_index[start:stop])


def _pieces(step: Step, most: int) -> Iterator[Step]:
    """The step in pieces of at most ``most`` links: shared classes can have a step with nearly all of them."""
    for start in range(0, len(step.query_index), most):
        yield _piece(step, start, start + most)


def _visit_pieces(visit: Visit, most: int) -> Iterator[Visit]:
    """The visit in pieces of about the same size, of at most ``most`` links: workspaces are as large as the largest."""
    displacements, count = visit.shape
    number = math.ceil(displacements * count / most)
    for n in range(number):
        start, stop = n * count // number, (n + 1) * count // number
        yield replace(
            visit,
            steps=tuple(_piece(step, start, stop) for step in visit.steps),
            query=visit.query.part(start, stop),
            key=visit.key.part(start, stop),
            value=visit.value.part(start, stop),
        )


def _mirrored(query: Place, key: Place) -> tuple[Place, Place]:
    """Rows of a step's queries and then its keys, and of its keys and then its queries, of the same bands.

    No tensor can step backwards: one of the bands stands there a second time.
    """
    (one,), (other,) = sorted((query.bands, key.bands), key=_order)
    bands = (one, other) if one == other else (one, other, one)

    def after_another(first: Place, second: Place) -> Place:
        skipped = 0 if first.bands[0] == one else one.length
        start = skipped + first.first
        return Place(bands, start, first.count, skipped + first.bands[0].length + second.first - start)

    return after_another(query, key), after_another(key, query)


def _side_by_side(query: Place, key: Place) -> Place:
    """Rows of a step's queries and then its keys, of a band each."""
    (one,), (other,) = query.bands, key.bands
    return Place((one, other), query.first, query.count, one.length + key.first - query.first)


def _order(bands: Sequence[Band]) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    return [(band.number, band.base, band.sizes, band.strides) for band in bands]


def _rank(visit: Visit) -> tuple[int, int, list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]]:
    return -visit.query.length, -visit.value.length, _order(visit.query.bands) + _order(visit.value.bands)


def _unordered(found: Geometry, device: torch.device, apart: bool) -> Iterator[Visit]:
    queries, keys = found.num_queries, found.num_keys + found.has_zero_token
    pieces = [piece for step in found.steps for piece in _pieces(step, max(queries, keys))]
    query_places = [_place(piece.query_index, queries, 2 * n, device) for n, piece in enumerate(pieces)]
    key_places = [_place(piece.key_index, keys, 2 * n + 1, device) for n, piece in enumerate(pieces)]
    values, table_keys = Counter(p.value_class for p in pieces), Counter(p.key_class for p in pieces)
    alone = {
        (step.value_class, step.key_class): number
        for number, step in enumerate(pieces)
        if values[step.value_class] == table_keys[step.key_class] == 1 and step.value_class != step.key_class
    }
    for step, query, key in zip(pieces, query_places, key_places, strict=True):
        low, high = step.value_class, step.key_class
        mirror = alone.get((high, low)) if (low, high) in alone else None
        if mirror is None or (query, key) != (key_places[mirror], query_places[mirror]):
            key = replace(key, lane=1)
            yield Visit((step,), 0, query, key, key, slice(low, low + 1), slice(high, high + 1))
        elif low < high:
            rows, value_rows = (_side_by_side(query, key),) * 2 if apart else _mirrored(query, key)
            classes = slice(low, high + 1, high - low)
            yield Visit((step, pieces[mirror]), 0, rows, rows, value_rows, classes, classes, is_apart=apart)


def visits(found: Geometry, device: torch.device, *, apart: bool = False) -> tuple[Visit, ...]:
    """All links, those that share bands side by side; the longest come first, so that their room need not grow.

    ``apart`` takes two bands for displacements that are visited together, instead of three.
    """
    same: dict[tuple[Band, ...], tuple[Band, ...]] = {}
    values: set[int] = set()
    keys: set[int] = set()
    most = max(math.ceil(3 * max(found.num_queries, found.num_keys) / 4), ENOUGH_LINKS)
    result, start = [], 0
    ordered = sorted(_unordered(found, device, apart), key=_rank)
    for visit in (piece for whole in ordered for piece in _visit_pieces(whole, most)):
        query, key, value = (
            replace(place, bands=same.setdefault(place.bands, place.bands))
            for place in (visit.query, visit.key, visit.value)
        )
        if key == query:  # one object, whose rows are looked up once
            key = query
        new_value, new_key = visit.value_rows.start not in values, visit.key_rows.start not in keys
        result.append(
            replace(
                visit, start=start, query=query, key=key, value=value, opens_value=new_value, opens_key=new_key
            )
        )  # fmt: skip
        values.add(visit.value_rows.start)
        keys.add(visit.key_rows.start)
        start = result[-1].stop
    return tuple(result)
