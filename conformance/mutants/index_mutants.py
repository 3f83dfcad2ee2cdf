"""Mistakes about displacements, rows and the order of tokens (clauses L1 to L3 and L6 to L8)."""

from __future__ import annotations

from dataclasses import replace

import torch

from translution.conformance.mutants.lenient import Lenient
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Links, Walk
from translution.spec import Clip, Lattice, Layout, LogBuckets, PairTable, RegisterClass
from translution.spec.layout import Displacement, Label

# Which side of the pair a table is read from


@mutant("value-mirrored", "reads the value table at c(j,i), the key's side of the pair", clause="L3")
class ValueMirrored(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return replace(found, value_row=found.key_row)


@mutant("query-mirrored", "reads the query table at c(j,i), the key's side of the pair", clause="L3")
class QueryMirrored(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return replace(found, query_row=found.key_row)


@mutant("key-mirrored", "reads the key table at c(i,j), the query's side of the pair", clause="L3")
class KeyMirrored(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return replace(found, key_row=found.value_row)


@mutant("bias-mirrored", "reads the bias table at c(j,i), the key's side of the pair", clause="L3")
class BiasMirrored(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return replace(found, bias_row=found.key_row)


@mutant("pair-table-transposed", "reads a pair table as [key, query]", clause="L8")
class PairTableTransposed(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        if not isinstance(layout, PairTable):
            return found
        own, other = found.value_row, found.key_row
        return replace(found, query_row=other, value_row=other, bias_row=other, key_row=own)


@mutant("pair-table-descending", "reads the rows of a pair table's classes from the last to the first", clause="L8")
class PairTableDescending(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        if not isinstance(layout, PairTable):
            return found
        names = ("query_row", "key_row", "value_row", "bias_row")
        return replace(found, **{name: layout.num_classes - 1 - getattr(found, name) for name in names})


@mutant(
    "pair-table-half",
    "takes the class of a pair from the lower half of the table, as if it were symmetric",
    clause="L8",
)
class PairTableHalf(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        if not isinstance(layout, PairTable):
            return found
        pairs = list(zip(found.query.tolist(), found.key.tolist(), strict=True))
        place = {pair: link for link, pair in enumerate(pairs)}
        taken = torch.tensor(
            [place.get((max(pair), min(pair)), link) for link, pair in enumerate(pairs)], dtype=torch.long
        )
        names = ("query_row", "key_row", "value_row", "bias_row")
        return replace(found, **{name: getattr(found, name)[taken] for name in names})


@mutant("query-centre-only", "reads the query table at displacement 0 for every grid pair", clause="L3")
class QueryCentreOnly(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        if not isinstance(layout, Lattice):
            return found
        grid = [label for label in layout.labels() if isinstance(label, tuple)]
        zero = (0,) * layout.rank
        centre = grid.index(zero) if zero in grid else len(grid) // 2
        return replace(found, query_row=torch.where(found.query_row < len(grid), centre, found.query_row))


# Order of rows


@mutant("axes-swapped", "orders the rows with the first axis fastest", clause="L3")
class AxesSwapped(Walk):
    def grid_labels(self, mirrored: bool) -> list[Displacement]:
        return sorted(super().grid_labels(mirrored), key=lambda label: label[::-1])


@mutant("rows-descending", "orders the rows of displacements from the largest to the smallest", clause="L3")
class RowsDescending(Walk):
    def grid_labels(self, mirrored: bool) -> list[Displacement]:
        return super().grid_labels(mirrored)[::-1]


@mutant("row-wraps", "uses displacements as row indices, so that negative ones count from the end", clause="L3")
class RowWraps(Walk):
    def grid_labels(self, mirrored: bool) -> list[Displacement]:
        return sorted(super().grid_labels(mirrored), key=lambda label: [(d < 0, d) for d in label])


@mutant("row-off-by-one", "reads the row after the right one", clause="L3")
class RowOffByOne(Walk):
    def row(self, label: Label, mirrored: bool) -> int:
        return min(super().row(label, mirrored) + 1, len(self.rows) - 1)


@mutant("registers-first", "places the rows of register pairs before those of the grid", clause="L6")
class RegistersFirst(Walk):
    def labels(self, mirrored: bool) -> list[Label]:
        return [*self.register_labels(mirrored), *self.grid_labels(mirrored)]


@mutant(
    "register-blocks-swapped", "exchanges the rows of (grid, register) pairs and (register, grid) pairs", clause="L6"
)
class RegisterBlocksSwapped(Walk):
    def register_labels(self, mirrored: bool) -> list[RegisterClass]:
        own = super().register_labels(mirrored)
        count, pairs = self.layout.registers, len(own) - 2 * self.layout.registers
        return own if self.layout.causal else [*own[:pairs], *own[pairs + count :], *own[pairs : pairs + count]]


@mutant("register-pairs-transposed", "reads the rows of two registers as (key, query)", clause="L6")
class RegisterPairsTransposed(Lenient):
    def row(self, label: Label, mirrored: bool) -> int:
        if isinstance(label, RegisterClass) and None not in (label.seen_from, label.partner):
            label = RegisterClass(label.partner, label.seen_from)
        return super().row(label, mirrored)


# Order of tokens


@mutant("registers-last", "takes the registers to stand after the grid", clause="L6")
class RegistersLast(Walk):
    def register_token(self, register: int, extents: tuple[int, ...]) -> int:
        return super().grid_token(tuple(n - 1 for n in extents), extents) - self.layout.registers + 1 + register

    def grid_token(self, site: tuple[int, ...], extents: tuple[int, ...]) -> int:
        return super().grid_token(site, extents) - self.layout.registers


@mutant("tokens-column-major", "numbers the grid's tokens with the first axis fastest", clause="L1")
class TokensColumnMajor(Walk):
    def grid_token(self, site: tuple[int, ...], extents: tuple[int, ...]) -> int:
        return super().grid_token(site[::-1], extents[::-1])


# Positions and windows


@mutant("dilation-ignored", "looks at neighbouring sites where the window is dilated", clause="L2")
class DilationIgnored(Walk):
    def window(self, axis: int) -> list[tuple[int, int]]:
        layout, own = self.layout, super().window(axis)
        first = layout.paddings[axis] if layout.padding is not None else layout.paddings[axis] // layout.dilations[axis]
        return [(label, first - tap) for tap, (label, _) in enumerate(own)]


@mutant("stride-phase", "starts strided queries at the last site of the first stride", clause="L1")
class StridePhase(Lenient):
    def here(self, axis: int, index: int) -> int:
        return super().here(axis, index) + self.layout.strides[axis] - 1


@mutant("stride-ignored", "places queries side by side where they are strided", clause="L1")
class StrideIgnored(Lenient):
    def here(self, axis: int, index: int) -> int:
        return self.layout.offsets[axis] + index


@mutant("key-stride-ignored", "places keys side by side where they are strided", clause="L1")
class KeyStrideIgnored(Lenient):
    def key_step(self, axis: int) -> int:
        return 1


@mutant("offset-ignored", "places the first query at position 0 whatever the offset", clause="L1")
class OffsetIgnored(Lenient):
    def here(self, axis: int, index: int) -> int:
        return self.layout.strides[axis] * index


@mutant("padding-off-by-one", "places the window one site too early", clause="L2")
class PaddingOffByOne(Walk):
    def window(self, axis: int) -> list[tuple[int, int]]:
        return [(label, reach + 1) for label, reach in super().window(axis)]


@mutant("padding-ignored", "centres every window, whatever the padding", clause="L2")
class PaddingIgnored(Walk):
    def window(self, axis: int) -> list[tuple[int, int]]:
        layout, own = self.layout, super().window(axis)
        before = len(own) - 1 if layout.axis_causal[axis] else (len(own) - 1) // 2
        return [(label, (before - tap) * layout.dilations[axis]) for tap, (label, _) in enumerate(own)]


@mutant("window-one-short", "leaves the last tap of the window out", clause="L2")
class WindowOneShort(Walk):
    def window(self, axis: int) -> list[tuple[int, int]]:
        own = super().window(axis)
        return own[:-1] if len(own) > 1 else own


# Far displacements


@mutant("far-dropped", "leaves far pairs out where they should share a class", clause="L7")
class FarDropped(Walk):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        far = self.layout.far
        return super().in_order(delta, query, key) and (far is None or all(abs(d) <= far.max_distance for d in delta))


@mutant("far-clipped-early", "clips displacements one step too near", clause="L7")
class FarClippedEarly(Lenient):
    def label(self, delta: Displacement) -> Displacement:
        far = self.layout.far
        own = super().label(delta)
        if not isinstance(far, Clip):
            return own
        return tuple(max(min(d, far.max_distance - 1), 1 - far.max_distance) for d in own)


@mutant("log-buckets-rounded", "rounds the logarithm of a far displacement to the nearest bucket", clause="L7")
class LogBucketsRounded(Lenient):
    def label(self, delta: Displacement) -> Displacement:
        far = self.layout.far
        return tuple(_rounded(far, d) for d in delta) if isinstance(far, LogBuckets) else super().label(delta)


def _rounded(far: LogBuckets, displacement: int) -> int:
    exact, distance = far.num_buckets // 2, abs(displacement)
    if distance < exact:
        return displacement
    ratio = torch.tensor([distance / exact, far.max_distance / exact], dtype=torch.float64).log()
    bucket = min(exact + round(float((far.num_buckets - exact) * ratio[0] / ratio[1])), far.num_buckets - 1)
    return bucket if displacement > 0 else -bucket
