"""Which keys a query sees, from the fields of the layout alone: loops over axes, taps and keys (clauses L1 to L8).

Nothing is shared with :mod:`translution.geometry`, which derives the same links as index arrays for the other backends.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

from translution.spec import Clip, FarClasses, Lattice, Layout, PairTable

Displacement = tuple[int, ...]
RegisterPair = tuple[Literal["registers"], int | None, int | None]
Rows = dict[Displacement | RegisterPair, int]


class Link(NamedTuple):
    """One appearance of a key in a query's support.

    ``key`` is None for the zero token. ``value_row`` is the row of c(i, j), ``key_row`` that of c(j, i).
    ``displacement`` is p(i) - p(j), on a circle the short way round; None where a token has no position.
    """

    key: int | None
    value_row: int
    key_row: int
    displacement: Displacement | None


def support(layout: Layout, query: int) -> list[Link]:
    """Every link of query i."""
    if isinstance(layout, PairTable):
        return list(_listed(layout, query))
    return [*_register_links(layout, query), *_grid_links(layout, query)]


def position(layout: Layout, side: str, token: int) -> Displacement | None:
    """Lattice position of a ``query`` or ``key``: p(i) = stride a + offset, p(j) = key_stride b (clause L1)."""
    if isinstance(layout, PairTable) or token < layout.registers:
        return None
    if side == "query":
        site = _site(layout.grid, token - layout.registers)
        return tuple(s * a + o for s, a, o in zip(layout.strides, site, layout.offsets, strict=True))
    site = _site(layout.keys, token - layout.registers)
    return tuple(s * b for s, b in zip(layout.key_strides, site, strict=True))


def _listed(layout: PairTable, query: int) -> Iterator[Link]:
    for key, row in enumerate(layout.classes[query]):
        if row >= 0:
            mirrored = layout.classes[key][query] if layout.key_classes is None else layout.key_classes[query][key]
            yield Link(key, row, mirrored, None)


def _site(extents: tuple[int, ...], number: int) -> Displacement:
    """Axis indices of a grid token; the last axis is fastest."""
    site: list[int] = []
    for extent in reversed(extents):
        site.insert(0, number % extent)
        number //= extent
    return tuple(site)


def _number(extents: tuple[int, ...], site: tuple[int, ...]) -> int:
    number = 0
    for extent, index in zip(extents, site, strict=True):
        number = number * extent + index
    return number


def _is_causal(layout: Lattice, axis: int) -> bool:
    """Whether this axis by itself forbids negative displacements; causal=True on several axes is raster order."""
    return layout.causal[axis] if isinstance(layout.causal, tuple) else layout.causal and len(layout.grid) == 1


def _in_order(layout: Lattice, displacement: Displacement) -> bool:
    """Clause L4. In raster order the key comes first where the first axis that differs says so."""
    if layout.causal is True and len(layout.grid) > 1:
        for d in displacement:
            if d != 0:
                return d > 0
    return all(d >= 0 for axis, d in enumerate(displacement) if _is_causal(layout, axis))


# Rows


def _label(layout: Lattice, displacement: Displacement) -> Displacement:
    """The class of a displacement: itself, or the representative of all that share it (clause L7)."""
    far = layout.far
    return displacement if far is None else tuple(_far_class(far, d) for d in displacement)


def _far_class(far: FarClasses, displacement: int) -> int:
    distance, sign = abs(displacement), 1 if displacement > 0 else -1
    if isinstance(far, Clip):
        return sign * min(distance, far.max_distance)
    exact = far.num_buckets // 2
    if distance < exact:
        return displacement
    # Bucket exact + t begins where (n / exact) ^ (num_buckets - exact) reaches (max_distance / exact) ^ t.
    grown = Fraction(distance, exact) ** (far.num_buckets - exact)
    begun = [t for t in range(1, far.num_buckets - exact) if grown >= Fraction(far.max_distance, exact) ** t]
    return sign * (exact + len(begun))


def _short_way(displacement: int, extent: int) -> int:
    """On a circle of ``extent`` sites, from -(extent // 2) upwards."""
    while displacement < -(extent // 2):
        displacement += extent
    while displacement >= extent - extent // 2:
        displacement -= extent
    return displacement


def _axis_displacements(layout: Lattice, axis: int) -> set[int]:
    """All displacements of one axis that have a row where the order allows it, whether or not some pair uses them."""
    queries, keys = layout.grid[axis], layout.keys[axis]
    if layout.kernel_size is None:
        pairs = itertools.product(range(queries), range(keys))
        found = {_between(layout, axis, query, key) for query, key in pairs}
    elif layout.boundary == "shift":
        reach = layout.window[axis] - 1
        found = {tap * layout.dilations[axis] for tap in range(-reach, reach + 1)}
    else:
        found = set(_window(layout, axis))
    return found


def _between(layout: Lattice, axis: int, query: int, key: int) -> int:
    """p(i) - p(j) along one axis."""
    apart = layout.strides[axis] * query + layout.offsets[axis] - layout.key_strides[axis] * key
    return _short_way(apart, layout.keys[axis]) if layout.boundary == "circular" else apart


def _window(layout: Lattice, axis: int) -> list[int]:
    """Displacement of each tap: padding - t dilation (clause L2)."""
    size, step = layout.window[axis], layout.dilations[axis]
    if layout.padding is None:
        before = size - 1 if _is_causal(layout, axis) else (size - 1) // 2
        first = before * step
    else:
        first = layout.padding if isinstance(layout.padding, int) else layout.padding[axis]
    return [first - tap * step for tap in range(size)]


@lru_cache(maxsize=256)
def _rows(layout: Lattice) -> tuple[Rows, Rows]:
    """Row of every class in the query and value tables, by delta, and in the key table, by -delta (L3, L6)."""
    every = itertools.product(*(_axis_displacements(layout, axis) for axis in range(len(layout.grid))))
    seen = [d for d in every if _in_order(layout, d)]
    every_register = range(layout.registers)
    both = [(a, b) for a in every_register for b in every_register if _register_sees(layout, a, b)]
    one = [(None, b) for b in every_register]
    other = [(a, None) for a in every_register if _register_sees(layout, a, None)]
    pairs: list[RegisterPair] = [("registers", a, b) for a, b in (*both, *one, *other)]
    tables: list[Rows] = []
    for mirrored in (False, True):
        grid = sorted({_label(layout, _negative(layout, d) if mirrored else d) for d in seen})
        labels: list[Displacement | RegisterPair] = [*grid, *pairs]
        tables.append({label: row for row, label in enumerate(labels)})
    return tables[0], tables[1]


def _negative(layout: Lattice, displacement: Displacement) -> Displacement:
    if layout.boundary == "circular" and layout.kernel_size is None:
        return tuple(_short_way(-d, extent) for d, extent in zip(displacement, layout.keys, strict=True))
    return tuple(-d for d in displacement)


# Links


def _register_sees(layout: Lattice, register: int, key_register: int | None) -> bool:
    """Registers come before the grid and in their own order, which matters only to a causal layout."""
    return layout.causal is False or (key_register is not None and key_register <= register)


def _register_links(layout: Lattice, query: int) -> Iterator[Link]:
    """Links in which the query, the key or both are registers (clause L6)."""
    value_rows, key_rows = _rows(layout)
    seen_from = query if query < layout.registers else None
    for key in range(layout.num_keys):
        partner = key if key < layout.registers else None
        if (seen_from is None and partner is None) or (
            seen_from is not None and not _register_sees(layout, seen_from, partner)
        ):
            continue
        pair: RegisterPair = ("registers", seen_from, partner)
        yield Link(key, value_rows[pair], key_rows[pair], None)


def _grid_links(layout: Lattice, query: int) -> Iterator[Link]:
    if query < layout.registers:
        return
    value_rows, key_rows = _rows(layout)
    site = _site(layout.grid, query - layout.registers)
    for taps in itertools.product(*(_axis_taps(layout, axis, index) for axis, index in enumerate(site))):
        delta = tuple(d for d, _ in taps)
        if not _in_order(layout, delta):
            continue
        at = tuple(index for _, index in taps if index is not None)
        key = layout.registers + _number(layout.keys, at) if len(at) == len(taps) else None
        yield Link(key, value_rows[_label(layout, delta)], key_rows[_label(layout, _negative(layout, delta))], delta)


def _axis_taps(layout: Lattice, axis: int, query: int) -> list[tuple[int, int | None]]:
    """Along one axis: every displacement this query looks at, with the key index there or None for the zero token."""
    if layout.kernel_size is None:
        return [(_between(layout, axis, query, key), key) for key in range(layout.keys[axis])]
    if layout.boundary == "shift":
        return [(query - key, key) for key in _neighbourhood(layout, axis, query)]
    here = layout.strides[axis] * query + layout.offsets[axis]
    taps: list[tuple[int, int | None]] = []
    for delta in _window(layout, axis):
        there = here - delta
        exists, key = _beyond(layout, axis, there)
        if exists:
            taps.append((delta, key))
    return taps


def _beyond(layout: Lattice, axis: int, there: int) -> tuple[bool, int | None]:
    """Whether something stands at a lattice position, and which key; None is the zero token (clause L5)."""
    extent, step = layout.keys[axis], layout.key_strides[axis]
    if 0 <= there <= (extent - 1) * step and there % step == 0:
        return True, there // step
    match layout.boundary:
        case "zeros":
            return True, None
        case "circular":
            while there < 0:
                there += extent
            while there >= extent:
                there -= extent
            return True, there
        case "reflect":
            while not 0 <= there < extent:
                there = -there if there < 0 else 2 * (extent - 1) - there
            return True, there
        case "replicate":
            return True, 0 if there < 0 else extent - 1
    return False, None


def _neighbourhood(layout: Lattice, axis: int, query: int) -> list[int]:
    """The window moved to stay inside, among the sites whole dilations away from the query (Hassani et al. 2023)."""
    size, step = layout.window[axis], layout.dilations[axis]
    sites = list(range(query % step, layout.grid[axis], step))
    own = sites.index(query)
    if _is_causal(layout, axis):
        return sites[max(own - size + 1, 0) : own + 1]
    first = own - size // 2
    if first < 0:
        first = 0
    if first + size > len(sites):
        first = len(sites) - size
    return sites[first : first + size]
