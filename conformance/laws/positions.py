"""Who is linked with whom, and by which rows, asked of every pair by itself: clauses L1 to L8 as predicates.

A derivation of its own, apart from :mod:`translution.geometry` and the ``reference`` backend: for each query, window
position and key it asks whether that key stands at that position of the continued grid. Plain Python, slow, small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from translution.spec import Clip, Lattice, Layout, LogBuckets, PairTable

Label = tuple[object, ...]
Sites = tuple[tuple[int, ...], ...]


class Seen(NamedTuple):
    """One link: query i, key j (None: the zero token), rows of c(i,j) and c(j,i), and p(i) - p(j) where both are."""

    query: int
    key: int | None
    value_row: int
    key_row: int
    delta: tuple[int, ...] | None


@lru_cache(maxsize=512)
def links(layout: Layout) -> tuple[Seen, ...]:
    """Every link of a layout, query after query."""
    if isinstance(layout, PairTable):
        mirrored = layout.key_classes or tuple(zip(*layout.classes, strict=True))
        return tuple(
            Seen(i, j, row, mirrored[i][j], None)
            for i, classes in enumerate(layout.classes)
            for j, row in enumerate(classes)
            if row >= 0
        )
    rows, key_rows = row_numbers(layout, 1), row_numbers(layout, -1)
    return tuple(
        Seen(i, j, rows[named], key_rows[mirror], None if isinstance(named[0], str) else delta)
        for i in range(layout.num_queries)
        for j, delta, named, mirror in _seen_from(layout, i)
    )


def _seen_from(layout: Lattice, i: int) -> Iterable[tuple[int | None, tuple[int, ...], Label, Label]]:
    registers = layout.registers
    for j in range(layout.num_keys):
        a, b = (i if i < registers else None), (j if j < registers else None)
        if (a is not None or b is not None) and _register_pair(layout, a, b):
            yield j, (), ("register", a, b), ("register", a, b)
    if i < registers:
        return
    site = _sites(layout.grid)[i - registers]
    keys = {at: registers + n for n, at in enumerate(_sites(_keys(layout)))}
    axes = [_axis_links(layout, axis, a) for axis, a in enumerate(site)]
    for taps in itertools.product(*axes):
        delta, at = tuple(d for d, _ in taps), tuple(b for _, b in taps)
        if _ordered(layout, delta):
            # The zero token stands wherever one axis is beyond the grid.
            key = None if None in at else keys[tuple(b for b in at if b is not None)]
            yield key, delta, _label(layout, delta), _label(layout, tuple(-d for d in delta))


def _register_pair(layout: Lattice, a: int | None, b: int | None) -> bool:
    """Clause L6: without a causal order everyone sees everyone; in one, a register sees no later token."""
    return layout.causal is False or a is None or (b is not None and b <= a)


def row_numbers(layout: Lattice, sign: int) -> dict[Label, int]:
    """Row of each class in the tables of queries and values (``sign`` 1) or of keys (-1, labels of -delta)."""
    every = itertools.product(*(_axis_displacements(layout, axis) for axis in range(len(layout.grid))))
    grid = {_label(layout, tuple(sign * d for d in delta)) for delta in every if _ordered(layout, delta)}
    tokens = [*range(layout.registers), None]
    pairs = [
        (a, b) for a in tokens for b in tokens if (a is not None or b is not None) and _register_pair(layout, a, b)
    ]
    # Both registers, then (grid, register), then (register, grid).
    pairs.sort(key=lambda p: ((p[0] is None) + 2 * (p[1] is None), *(n for n in p if n is not None)))
    named: list[Label] = [*sorted(grid), *(("register", a, b) for a, b in pairs)]
    return {label: row for row, label in enumerate(named)}


def _sites(extents: tuple[int, ...]) -> Sites:
    return tuple(itertools.product(*(range(n) for n in extents)))


def _keys(layout: Lattice) -> tuple[int, ...]:
    return layout.grid if layout.key_grid is None else layout.key_grid


def _along(value: tuple[int, ...] | int, axis: int) -> int:
    return value[axis] if isinstance(value, tuple) else value


def _ordered(layout: Lattice, delta: tuple[int, ...]) -> bool:
    """Clause L4."""
    if layout.causal is True:
        return delta >= (0,) * len(delta)
    return layout.causal is False or all(d >= 0 for d, flag in zip(delta, layout.causal, strict=True) if flag)


def _flagged(layout: Lattice, axis: int) -> bool:
    """Whether the axis by itself is causal; in raster order no axis is."""
    return layout.causal[axis] if isinstance(layout.causal, tuple) else layout.causal and len(layout.grid) == 1


def _label(layout: Lattice, delta: tuple[int, ...]) -> Label:
    """Clauses L5 (a circle without a window) and L7."""
    if layout.boundary == "circular" and layout.kernel_size is None:
        delta = tuple((d + n // 2) % n - n // 2 for d, n in zip(delta, layout.grid, strict=True))
    return tuple(far(layout.far, d) for d in delta)


def far(classes: Clip | LogBuckets | None, d: int) -> int:
    """Clause L7, in whole numbers: floor((n - e) log(|d| / e) / log(D / e)) >= t iff |d|^(n-e) e^t >= D^t e^(n-e)."""
    if classes is None:
        return d
    if isinstance(classes, Clip):
        return max(-classes.max_distance, min(classes.max_distance, d))
    n, distance, exact = classes.num_buckets, classes.max_distance, classes.num_buckets // 2
    if abs(d) < exact:
        return d
    steps = range(n - exact)
    reached = max(t for t in steps if abs(d) ** (n - exact) * exact**t >= distance**t * exact ** (n - exact))
    return (1 if d > 0 else -1) * (exact + reached)


def _axis_displacements(layout: Lattice, axis: int) -> set[int]:
    """Displacements of an axis that have rows (clauses L2, L3)."""
    size = None if layout.kernel_size is None else _along(layout.kernel_size, axis)
    if size is None:
        extents = range(layout.grid[axis]), range(_keys(layout)[axis])
        found = {_apart(layout, axis, a, b) for a, b in itertools.product(*extents)}
    elif layout.boundary == "shift":
        found = {t * _along(layout.dilation, axis) for t in range(1 - size, size)}
    else:
        found = set(_taps(layout, axis))
    return {d for d in found if d >= 0} if _flagged(layout, axis) else found


def _apart(layout: Lattice, axis: int, a: int, b: int) -> int:
    """p(i) - p(j) on one axis (clause L1); on a circle from -(n // 2) upwards."""
    d = _along(layout.stride, axis) * a + _along(layout.offset, axis) - _along(layout.key_stride, axis) * b
    n = _keys(layout)[axis]
    return (d + n // 2) % n - n // 2 if layout.boundary == "circular" else d


def _taps(layout: Lattice, axis: int) -> list[int]:
    """padding - t dilation (clause L2)."""
    assert layout.kernel_size is not None
    size, step = _along(layout.kernel_size, axis), _along(layout.dilation, axis)
    before = step * ((size - 1) if _flagged(layout, axis) else (size - 1) // 2)
    first = before if layout.padding is None else _along(layout.padding, axis)
    return [first - t * step for t in range(size)]


def _axis_links(layout: Lattice, axis: int, a: int) -> list[tuple[int, int | None]]:
    """(displacement, key index or None for the zero token) of one axis for query index a."""
    keys = range(_keys(layout)[axis])
    if layout.kernel_size is None:
        return [(_apart(layout, axis, a, b), b) for b in keys]
    if layout.boundary == "shift":
        return [(a - b, b) for b in _shifted(layout, axis, a)]
    here = _along(layout.stride, axis) * a + _along(layout.offset, axis)
    found: list[tuple[int, int | None]] = []
    for d in _taps(layout, axis):
        standing = [b for b in keys if _stands(layout, axis, here - d, b)]
        found += [(d, b) for b in standing]
        if not standing and layout.boundary == "zeros":
            found.append((d, None))
    return found


def _stands(layout: Lattice, axis: int, position: int, b: int) -> bool:
    """Whether key index b stands at a position of the grid, continued as the boundary says (clause L5)."""
    n = _keys(layout)[axis]
    match layout.boundary:
        case "circular":
            return (position - b) % n == 0
        case "reflect":
            period = max(2 * (n - 1), 1)
            return (position - b) % period == 0 or (position + b) % period == 0
        case "replicate":
            return b == (0 if position < 0 else n - 1 if position >= n else position)
        case _:
            return position == _along(layout.key_stride, axis) * b


def _shifted(layout: Lattice, axis: int, a: int) -> list[int]:
    """Keys of the window that moves to stay inside, among the sites of the query's own residue."""
    assert layout.kernel_size is not None
    size, step = _along(layout.kernel_size, axis), _along(layout.dilation, axis)
    own = [b for b in range(layout.grid[axis]) if (a - b) % step == 0]
    if _flagged(layout, axis):
        return [b for b in own if b <= a][-size:]
    first = min(max(a // step - size // 2, 0), len(own) - size)
    return own[first : first + size]
