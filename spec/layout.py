"""Where tokens sit, which pairs exist, and which displacement class each pair has (clauses L1 to L7).

Symbols: query i at p(i), key j at p(j), displacement delta = p(i) - p(j): *query minus key*, the sign of the paper
(arXiv 2510.10060, section 3). A layout lists the displacements that can occur; a class is one displacement or several
that share a label. Row r of a table stands for the r-th class of its role in ascending lexicographic order.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from translution.spec.checks import MAX_AXES, MAX_CLASSES, MAX_TOKENS, as_tuple, is_whole, per_axis
from translution.spec.classes import Clip, FarClasses, LogBuckets
from translution.spec.errors import SpecError, require
from translution.spec.pair_table import PairTable

Boundary = Literal["absent", "zeros", "circular", "reflect", "replicate", "shift"]
Displacement = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RegisterClass:
    """The class of a pair with a register: ``seen_from`` and ``partner`` are a register's number, or None for a grid
    token.
    """

    seen_from: int | None
    partner: int | None


Label = Displacement | RegisterClass


def _each(value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


@dataclass(frozen=True, slots=True)
class Lattice:
    """Tokens on a lattice of any rank, after ``registers`` tokens without a position.

    Token order: registers first, then the grid, last axis fastest. Query i of axis index a stands at lattice position
    ``stride * a + offset``, key j of axis index b at ``key_stride * b`` (clause L1).

    Args:
        grid: extents of the query grid, e.g. ``(7, 7)``.
        key_grid: extents of the key grid; None for the query grid.
        registers: tokens before the grid, on both sides, such as CLS (clause L6).
        causal: False; True for keys at or before the query in raster order (registers first); or one flag per axis.
        kernel_size: window extents; None for every displacement that occurs (clause L2).
        stride: lattice steps per query step (a strided convolution).
        key_stride: lattice steps per key step (a transposed convolution).
        dilation: lattice steps between two window taps.
        padding: the window's first tap stands ``padding`` steps before the query: displacements are
            ``padding - t * dilation`` for tap t. None centres the window (or ends it at the query on a causal axis).
        offset: lattice position of the first query (a decoding chunk).
        boundary: what stands beyond the key grid (clause L5): nothing (``absent``), tokens with zero content
            (``zeros``), the grid continued (``circular``, ``reflect``, ``replicate``), or the window shifted to stay
            inside (``shift``).
        far: ``Clip`` or ``LogBuckets`` for displacements that share a class (clause L7).
    """

    grid: tuple[int, ...]
    key_grid: tuple[int, ...] | None = None
    registers: int = 0
    causal: bool | tuple[bool, ...] = False
    kernel_size: tuple[int, ...] | int | None = None
    stride: tuple[int, ...] | int = 1
    key_stride: tuple[int, ...] | int = 1
    dilation: tuple[int, ...] | int = 1
    padding: tuple[int, ...] | int | None = None
    offset: tuple[int, ...] | int = 0
    boundary: Boundary = "absent"
    far: FarClasses | None = None

    def __post_init__(self) -> None:
        rank = len(self.grid) if isinstance(self.grid, (tuple, list)) else 1
        require(
            1 <= rank <= MAX_AXES,
            "L1",
            f"grid={self.grid!r}",
            f"a lattice has 1 to {MAX_AXES} axes",
            "Give grid=(length,), (height, width) or (depth, height, width)",
        )

        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("grid", per_axis("grid", self.grid, rank, 1))
        if self.key_grid is not None:
            put("key_grid", per_axis("key_grid", self.key_grid, rank, 1))
        for name in ("stride", "key_stride", "dilation"):
            put(name, per_axis(name, getattr(self, name), rank, 1))
        put("offset", per_axis("offset", self.offset, rank))
        if self.kernel_size is not None:
            put("kernel_size", per_axis("kernel_size", self.kernel_size, rank, 1))
        if self.padding is not None:
            put("padding", per_axis("padding", self.padding, rank))
        if not isinstance(self.causal, bool):
            rule = f"causal is one flag, or one for each of the {rank} axes"
            told = ("L4", f"causal={self.causal!r}", rule, f"Give a bool or a tuple of {rank} bools")
            flags = as_tuple(self.causal, *told)
            require(len(flags) == rank and all(isinstance(f, bool) for f in flags), *told)
            put("causal", flags if any(flags) else False)
        require(
            is_whole(self.registers) and 0 <= self.registers <= MAX_TOKENS,
            "L6",
            f"registers={self.registers!r}",
            f"registers is a whole number of tokens from 0 to {MAX_TOKENS:,}",
            "Give registers=1 for one CLS token",
        )
        require(
            max(self.num_queries, self.num_keys) <= MAX_TOKENS,
            "L1",
            f"grid={self.grid}, key_grid={self.key_grid}",
            f"a layout has at most {MAX_TOKENS:,} tokens a side",
            "Give a smaller grid, or run the operator on windows of it",
        )
        self._check_combination()
        require(
            math.prod(self._count_displacements(axis) for axis in range(rank)) <= MAX_CLASSES,
            "L3",
            f"grid={self.grid}, key_grid={self.key_grid}, kernel_size={self.kernel_size}",
            f"a layout has at most {MAX_CLASSES:,} displacements",
            "Give a window (kernel_size) or a smaller grid",
        )
        require(
            all(self._displacement_range(axis) for axis in range(rank)),
            "L3",
            f"grid={self.grid}, padding={self.padding}, offset={self.offset}, causal={self.causal}",
            "some displacement must be left on every axis",
            "Use causal=False, or a padding or offset that lets a query see a key",
        )
        require(
            self.registers * (self.registers + 2) <= MAX_CLASSES,
            "L6",
            f"registers={self.registers}",
            f"every pair of registers has a class of its own, and a layout has at most {MAX_CLASSES:,}",
            "Use fewer registers",
        )

    def _check_combination(self) -> None:
        require(
            self.boundary in get_args(Boundary),
            "L5",
            f"boundary={self.boundary!r}",
            f"boundary is one of {', '.join(get_args(Boundary))}",
            "Choose one of these",
        )
        require(
            self.far is None or isinstance(self.far, (Clip, LogBuckets)),
            "L7",
            f"far={self.far!r}",
            "far is None, Clip or LogBuckets",
            "Give far=Clip(max_distance)",
        )
        if self.kernel_size is None:
            for name, plain in (("dilation", (1,) * self.rank), ("padding", None)):
                require(
                    getattr(self, name) == plain,
                    "L2",
                    f"{name}={getattr(self, name)} without kernel_size",
                    f"{name} describes a window",
                    f"Give kernel_size too, or drop {name}",
                )
            require(
                self.boundary in ("absent", "circular"),
                "L5",
                f"boundary={self.boundary!r} without kernel_size",
                "without a window only boundary 'absent' or 'circular' has a meaning",
                "Give kernel_size, or boundary='absent'",
            )
        if self.boundary != "absent":
            require(
                set(self.key_strides) == {1},
                "L5",
                f"boundary={self.boundary!r} with key_stride={self.key_stride}",
                "a boundary other than 'absent' needs keys on every lattice site",
                "Use key_stride=1, or boundary='absent' (a transposed convolution)",
            )
        if self.boundary in ("circular", "shift") and (self.kernel_size is None or self.boundary == "shift"):
            require(
                self.keys == self.grid and set(self.strides) == {1} and set(self.offsets) == {0},
                "L5",
                f"boundary={self.boundary!r} with grid={self.grid}, key_grid={self.key_grid}, stride={self.stride}",
                "this boundary needs the same grid on both sides, stride 1 and offset 0",
                "Use boundary='absent', or equal grids",
            )
        if self.boundary == "circular" and self.causal is not False:
            raise SpecError(
                "L4",
                f"causal={self.causal} with boundary='circular'",
                "on a circle no key comes before another",
                "Use boundary='absent', or causal=False",
            )
        if self.boundary == "reflect" or (self.boundary == "replicate" and self.raster_causal):
            require(
                self.causal is False,
                "L4",
                f"causal={self.causal} with boundary={self.boundary!r}",
                "a key continued beyond the border can stand for a later key",
                "Use boundary='absent' or 'zeros', or causal=False",
            )
        if self.boundary == "reflect":
            for axis in range(self.rank):
                lowest, highest = self._padded_reach(axis)
                require(
                    lowest > -self.keys[axis] and highest < 2 * self.keys[axis] - 1,
                    "L5",
                    f"boundary='reflect' reaching positions {lowest} to {highest} on an axis of {self.keys[axis]} keys",
                    "reflection needs the padding to be smaller than the key grid",
                    "Use a smaller padding, or boundary='replicate'",
                )
        if self.boundary == "shift":
            self._check_shift()

    def _check_shift(self) -> None:
        require(
            self.padding is None and not (self.causal is True and self.rank > 1),
            "L5",
            f"boundary='shift' with padding={self.padding}, causal={self.causal}",
            "a shifted window places itself: it takes no padding, and causal needs one flag per axis",
            "Drop padding; give causal as a tuple of flags",
        )
        for axis, (size, extent, step) in enumerate(zip(self.window, self.grid, self.dilations, strict=True)):
            require(
                size * step <= extent,
                "L5",
                f"kernel_size * dilation = {size} * {step} on axis {axis} of extent {extent}",
                "a shifted window must fit in the grid",
                "Use a smaller kernel_size or dilation, or boundary='absent'",
            )

    # Normalised views: the fields accept an int for every axis, these are always one per axis.
    @property
    def rank(self) -> int:
        """Number of lattice axes."""
        return len(self.grid)

    @property
    def keys(self) -> tuple[int, ...]:
        """Extents of the key grid."""
        return self.grid if self.key_grid is None else self.key_grid

    @property
    def strides(self) -> tuple[int, ...]:
        """``stride``, one per axis."""
        return _each(self.stride, self.rank)

    @property
    def key_strides(self) -> tuple[int, ...]:
        """``key_stride``, one per axis."""
        return _each(self.key_stride, self.rank)

    @property
    def dilations(self) -> tuple[int, ...]:
        """``dilation``, one per axis."""
        return _each(self.dilation, self.rank)

    @property
    def offsets(self) -> tuple[int, ...]:
        """``offset``, one per axis."""
        return _each(self.offset, self.rank)

    @property
    def window(self) -> tuple[int, ...]:
        """``kernel_size``, one per axis; only where there is a window."""
        if self.kernel_size is None:
            raise SpecError(
                "L2", "kernel_size=None", "this layout has no window", "Ask only where kernel_size is given"
            )
        return _each(self.kernel_size, self.rank)

    @property
    def raster_causal(self) -> bool:
        """Whether the causal order is the raster order of all axes together."""
        return self.causal is True and self.rank > 1

    @property
    def axis_causal(self) -> tuple[bool, ...]:
        """Which axes see only non-negative displacements."""
        if isinstance(self.causal, tuple):
            return self.causal
        return (self.causal and self.rank == 1,) * self.rank

    @property
    def paddings(self) -> tuple[int, ...]:
        """Steps from the query back to its window's first tap, one per axis."""
        if self.padding is not None:
            return _each(self.padding, self.rank)
        return tuple(
            d * (k - 1) if causal else d * ((k - 1) // 2)
            for k, d, causal in zip(self.window, self.dilations, self.axis_causal, strict=True)
        )

    @property
    def num_queries(self) -> int:
        """Number of query tokens, registers included."""
        return self.registers + math.prod(self.grid)

    @property
    def num_keys(self) -> int:
        """Number of key tokens, registers included."""
        return self.registers + math.prod(self.keys)

    @property
    def is_self(self) -> bool:
        """Whether queries and keys can be one sequence."""
        return self.keys == self.grid

    def _padded_reach(self, axis: int) -> tuple[int, int]:
        first, size, step = self.paddings[axis], self.window[axis], self.dilations[axis]
        last = self.strides[axis] * (self.grid[axis] - 1)
        return self.offsets[axis] - first, self.offsets[axis] + last - first + (size - 1) * step

    def _displacement_range(self, axis: int) -> range:
        """Multiples between the extreme displacements of an axis; without a window and strided, some may not occur."""
        if self.kernel_size is None:
            queries, keys = self.grid[axis], self.keys[axis]
            if self.boundary == "circular":
                return range(-(keys // 2), keys - keys // 2)
            step, key_step, start = self.strides[axis], self.key_strides[axis], self.offsets[axis]
            found = range(start - key_step * (keys - 1), start + step * (queries - 1) + 1, math.gcd(step, key_step))
        elif self.boundary == "shift":
            reach, step = self.window[axis] - 1, self.dilations[axis]
            found = range(-reach * step, reach * step + 1, step)
        else:
            first, step = self.paddings[axis], self.dilations[axis]
            found = range(first - (self.window[axis] - 1) * step, first + 1, step)
        return found[bisect.bisect_left(found, 0) :] if self.axis_causal[axis] else found

    def _displacements(self, axis: int) -> Sequence[int]:
        """Displacements that occur along one axis, ascending; a range where that says it all."""
        found = self._displacement_range(axis)
        step, key_step, start = self.strides[axis], self.key_strides[axis], self.offsets[axis]
        if self.kernel_size is not None or self.boundary == "circular" or step == key_step == 1:
            return found
        least = 0 if self.axis_causal[axis] else None
        seen = (start + step * a - key_step * b for a in range(self.grid[axis]) for b in range(self._partners(axis, a)))
        return sorted(d for d in seen if least is None or d >= least)

    def _partners(self, axis: int, query: int) -> int:
        """Keys, from the first, that have a displacement from this query which no earlier query has from any key."""
        common = math.gcd(self.strides[axis], self.key_strides[axis])
        if query < self.key_strides[axis] // common:
            return self.keys[axis]
        return min(self.keys[axis], self.strides[axis] // common)

    def _count_displacements(self, axis: int) -> int:
        """An upper bound that builds nothing."""
        bound = len(self._displacement_range(axis))
        if self.kernel_size is not None or self.boundary == "circular":
            return bound
        late = self._partners(axis, self.grid[axis] - 1)
        early = min(self.grid[axis], self.key_strides[axis])
        return min(bound, early * self.keys[axis] + (self.grid[axis] - early) * late)

    def axis_displacements(self, axis: int) -> tuple[int, ...]:
        """Displacements along one axis, ascending, before classes are shared (clause L2)."""
        return tuple(self._displacements(axis))

    def label(self, displacement: Displacement) -> Displacement:
        """The class label of a displacement: itself (on a circle the short way round), or its representative under
        ``far``.
        """
        if self.boundary == "circular" and self.kernel_size is None:
            displacement = tuple((d + n // 2) % n - n // 2 for d, n in zip(displacement, self.keys, strict=True))
        if self.far is None:
            return displacement
        return tuple(self.far.label(d) for d in displacement)

    def _grid_labels(self, sign: int) -> list[Displacement]:
        axes = [self.axis_displacements(axis) for axis in range(self.rank)]
        every = itertools.product(*axes)
        kept = (d for d in every if d >= (0,) * self.rank) if self.raster_causal else every
        return sorted({self.label(tuple(sign * v for v in d)) for d in kept})

    def _register_labels(self, mirrored: bool) -> list[RegisterClass]:
        count, causal = self.registers, self.causal is not False
        pairs: list[tuple[int | None, int | None]] = []
        pairs += [(a, b) for a in range(count) for b in range(count) if b <= a or not causal]
        pairs += [(None, b) for b in range(count)]
        pairs += [(a, None) for a in range(count) if not causal]
        return [RegisterClass(b, a) if mirrored else RegisterClass(a, b) for a, b in pairs]

    def labels(self) -> list[Label]:
        """Class labels of the query and value tables in row order: c(i, j), seen from the query (clause L3)."""
        return [*self._grid_labels(1), *self._register_labels(False)]

    def key_labels(self) -> list[Label]:
        """Class labels of the key table in row order: c(j, i), the pair seen from the key (clause L3).

        Grid rows ascend in -delta; register rows follow the same order of pairs as :meth:`labels`.
        """
        return [*self._grid_labels(-1), *self._register_labels(True)]

    @property
    def num_classes(self) -> int:
        """Number of rows of every table."""
        return _count_classes(self)


@functools.lru_cache(maxsize=1024)
def _count_classes(layout: Lattice) -> int:
    """``len(layout.labels())`` without building the labels: far classes act on each axis by itself."""
    counts = [_axis_labels(layout, layout._displacements(axis)) for axis in range(layout.rank)]
    grid = math.prod(len(labels) for labels in counts)
    if layout.raster_causal:
        grid, rest = 1, 1
        for axis in reversed(range(layout.rank)):
            seen = layout._displacements(axis)
            later = _axis_labels(layout, seen[bisect.bisect_right(seen, 0) :])
            # A first difference of 0 leaves the order to the axes after it; if 0 is also the label of later rows,
            # those hold all.
            here = grid if 0 in seen and 0 not in later else 0
            grid, rest = len(later) * rest + here, rest * len(counts[axis])
    registers = layout.registers
    if layout.causal is False:
        return grid + registers * (registers + 2)
    return grid + registers * (registers + 1) // 2 + registers


def _axis_labels(layout: Lattice, displacements: Sequence[int]) -> Sequence[int]:
    """Distinct labels of ascending displacements of one axis; labels ascend with them."""
    if layout.far is None:
        return displacements
    far, labels, start = layout.far, list[int](), 0
    while start < len(displacements):
        labels.append(far.label(displacements[start]))
        start = bisect.bisect_right(displacements, labels[-1], lo=start, key=far.label)
    return labels


Layout = Lattice | PairTable
