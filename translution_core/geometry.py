"""From a layout to index arrays: which links exist, grouped so that each step has one class per role.

A *link* is one appearance of key j in the support of query i. On a padded lattice the same pair can be linked more
than once (a reflected border), and a link may lead to the zero token that stands for a padded position (clause L5).
The ``reference`` backend derives the same links by loops of its own and is compared with these.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from translution.spec import Lattice, Layout, PairTable

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Step:
    """All links of one displacement class.

    Row ``value_class`` of the query, value and bias tables and row ``key_class`` of the key table serve every link of
    the step. ``query_index`` and ``key_index`` are int64 [P]; a key index equal to ``num_keys`` is the zero token.
    """

    value_class: int
    key_class: int
    query_index: IntArray
    key_index: IntArray


@dataclass(frozen=True, eq=False)
class Geometry:
    """The links of a layout, and what depends on positions alone."""

    layout: Layout
    num_queries: int
    num_keys: int
    num_classes: int

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """All links, merged so that every pair of classes has one step, in ascending class order."""
        merged: dict[tuple[int, int], list[tuple[IntArray, IntArray]]] = {}
        layout = self.layout
        for classes, query, key in _lattice_steps(layout) if isinstance(layout, Lattice) else _table_steps(layout):
            if len(query):
                merged.setdefault(classes, []).append((query, key))
        return tuple(
            Step(value_class, key_class, _joined([q for q, _ in parts]), _joined([k for _, k in parts]))
            for (value_class, key_class), parts in sorted(merged.items(), key=lambda item: item[0])
        )

    @property
    def links_every_pair(self) -> bool:
        """Whether the layout by its form links every query with every key, once; known without the links."""
        layout = self.layout
        return isinstance(layout, Lattice) and layout.kernel_size is None and layout.causal is False

    @cached_property
    def num_links(self) -> int:
        """Number of links."""
        return sum(len(step.query_index) for step in self.steps)

    @cached_property
    def has_zero_token(self) -> bool:
        """Whether some link leads to a padded position; backends then append one all-zero token after the keys."""
        return any(bool((step.key_index == self.num_keys).any()) for step in self.steps)

    @cached_property
    def repeats_pairs(self) -> bool:
        """Whether some pair is linked more than once."""
        flat = self.query_index * (self.num_keys + 1) + self.key_index
        return len(np.unique(flat)) < len(flat)

    @cached_property
    def query_index(self) -> IntArray:
        """Query of every link [L], step after step."""
        return _joined([step.query_index for step in self.steps])

    @cached_property
    def key_index(self) -> IntArray:
        """Key of every link [L], step after step."""
        return _joined([step.key_index for step in self.steps])

    @cached_property
    def value_class(self) -> IntArray:
        """Class c(i, j) of every link [L]."""
        return _joined([np.full(len(s.query_index), s.value_class, np.int64) for s in self.steps])

    @cached_property
    def key_class(self) -> IntArray:
        """Key-table row c(j, i) of every link [L]."""
        return _joined([np.full(len(s.query_index), s.key_class, np.int64) for s in self.steps])

    @cached_property
    def slots(self) -> IntArray:
        """Number of earlier links of the same query, for every link [L]: (query, slot) is unique."""
        order = np.argsort(self.query_index, kind="stable")
        rows = self.query_index[order]
        first = np.searchsorted(rows, rows, side="left")
        slots = np.empty_like(rows)
        slots[order] = np.arange(len(rows)) - first
        return slots

    @cached_property
    def distances(self) -> FloatArray:
        """|delta|_1 of every class [T]; 0 for registers and for pair tables (clause R5)."""
        return np.asarray(np.abs(self._class_displacements).sum(axis=1))

    @cached_property
    def quadratic_features(self) -> FloatArray:
        """(-delta, |delta|^2) of every class [T, rank + 1]; 0 for registers (clause R5)."""
        delta = self._class_displacements
        return np.concatenate([-delta, (delta**2).sum(axis=1, keepdims=True)], axis=1)

    @cached_property
    def _class_displacements(self) -> FloatArray:
        if isinstance(self.layout, PairTable):
            return np.zeros((self.num_classes, 0))
        origin = (0,) * self.layout.rank
        rows = [label if isinstance(label, tuple) else origin for label in self.layout.labels()]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), self.layout.rank)

    def rotary_angles(self, side: str, width: int, base: float) -> FloatArray:
        """Angles [tokens, width / 2] of the ``query`` or ``key`` side (clause E10); registers have angle 0."""
        assert isinstance(self.layout, Lattice)
        layout = self.layout
        extents, steps, offsets = (
            (layout.grid, layout.strides, layout.offsets)
            if side == "query"
            else (layout.keys, layout.key_strides, (0,) * layout.rank)
        )
        sites = np.indices(extents).reshape(layout.rank, -1).T * np.asarray(steps) + np.asarray(offsets)
        sites = np.concatenate([np.zeros((layout.registers, layout.rank)), sites])
        count = width // (2 * layout.rank)
        frequency = base ** (-2.0 * np.arange(count) * layout.rank / width)
        angles: FloatArray = (sites[:, :, None] * frequency).reshape(len(sites), width // 2)
        return angles


def _joined(parts: list[IntArray]) -> IntArray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _axis_links(layout: Lattice, axis: int, displacement: int) -> tuple[IntArray, IntArray]:
    """Queries and keys of one axis at one displacement; key -1 is a padded position that counts as a zero token."""
    queries = np.arange(layout.grid[axis])
    extent, key_step = layout.keys[axis], layout.key_strides[axis]
    position = layout.strides[axis] * queries + layout.offsets[axis] - displacement
    inside = (position >= 0) & (position < extent * key_step)
    match layout.boundary:
        case "absent":
            inside &= position % key_step == 0
            return queries[inside], position[inside] // key_step
        case "zeros":
            return queries, np.where(inside, position, -1)
        case "circular":
            return queries, position % extent
        case "reflect":
            period = max(2 * (extent - 1), 1)
            folded = position % period
            return queries, np.minimum(folded, period - folded) if extent > 1 else folded * 0
        case "replicate":
            return queries, np.clip(position, 0, extent - 1)
        case "shift":
            size, step = layout.window[axis], layout.dilations[axis]
            turn, phase = queries // step, queries % step
            sites = -((phase - extent) // step)
            causal = layout.axis_causal[axis]
            first = np.maximum(turn - size + 1, 0) if causal else np.clip(turn - size // 2, 0, sites - size)
            tap = position // step - first
            inside &= (tap >= 0) & (tap < size)
            return queries[inside], position[inside]


def _lattice_steps(layout: Lattice) -> Iterator[tuple[tuple[int, int], IntArray, IntArray]]:
    rows = {label: row for row, label in enumerate(layout.labels())}
    key_rows = {label: row for row, label in enumerate(layout.key_labels())}
    axes = [layout.axis_displacements(axis) for axis in range(layout.rank)]
    links = [{d: _axis_links(layout, axis, d) for d in axes[axis]} for axis in range(layout.rank)]
    first, num_keys = layout.registers, layout.num_keys
    for delta in itertools.product(*axes):
        if layout.raster_causal and delta < (0,) * layout.rank:
            continue
        query, key, zero = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, bool)
        for axis, d in enumerate(delta):
            axis_query, axis_key = links[axis][d]
            query = (query[:, None] * layout.grid[axis] + axis_query).ravel()
            key = (key[:, None] * layout.keys[axis] + axis_key).ravel()
            zero = (zero[:, None] | (axis_key < 0)).ravel()
        classes = rows[layout.label(delta)], key_rows[layout.label(tuple(-d for d in delta))]
        yield classes, query + first, np.where(zero, num_keys, key + first)
    for label, mirrored in zip(layout._register_labels(False), layout._register_labels(True), strict=True):
        every_query, every_key = np.arange(first, layout.num_queries), np.arange(first, num_keys)
        query = every_query if label.seen_from is None else np.array([label.seen_from])
        key = every_key if label.partner is None else np.array([label.partner])
        query, key = np.broadcast_arrays(query, key)
        yield (rows[label], key_rows[mirrored]), query.astype(np.int64), key.astype(np.int64)


def _table_steps(layout: PairTable) -> Iterator[tuple[tuple[int, int], IntArray, IntArray]]:
    classes, key_classes = np.asarray(layout.classes), np.asarray(layout.reversed_classes())
    query, key = np.nonzero(classes >= 0)
    pairs = classes[query, key] * layout.num_classes + key_classes[query, key]
    order = np.argsort(pairs, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(pairs[order])) + 1):
        if len(own):
            value_class, key_class = divmod(int(pairs[own[0]]), layout.num_classes)
            yield (value_class, key_class), query[own], key[own]


@lru_cache(maxsize=64)
def geometry(layout: Layout) -> Geometry:
    """The geometry of ``layout``; its links are built when first asked for."""
    return Geometry(layout, layout.num_queries, layout.num_keys, layout.num_classes)


def count_links(layout: Layout) -> int:
    """Number of links without building them (an upper bound for windows and strides in raster order)."""
    if isinstance(layout, PairTable):
        return sum(c >= 0 for row in layout.classes for c in row)
    total = math.prod(_count_axis_links(layout, axis) for axis in range(layout.rank))
    if layout.raster_causal and layout == Lattice(layout.grid, causal=True, registers=layout.registers):
        total = (total + math.prod(layout.grid)) // 2
    registers = layout.registers
    to_registers = registers * (layout.num_queries - registers)
    if layout.causal is False:
        return total + to_registers + registers * layout.num_keys
    return total + to_registers + registers * (registers + 1) // 2


def _count_axis_links(layout: Lattice, axis: int) -> int:
    queries, keys = layout.grid[axis], layout.keys[axis]
    if layout.kernel_size is not None:
        return sum(len(_axis_links(layout, axis, d)[0]) for d in layout.axis_displacements(axis))
    if not layout.axis_causal[axis]:
        return queries * keys
    position = layout.strides[axis] * np.arange(queries) + layout.offsets[axis]
    return int(np.clip(position // layout.key_strides[axis] + 1, 0, keys).sum())
