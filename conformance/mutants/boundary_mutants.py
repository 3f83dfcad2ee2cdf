"""Mistakes about what stands beyond the grid, and about the causal order (clauses L4 and L5)."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.lenient import Lenient
from translution.conformance.mutants.mutant import mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Link, Links, Tap, Walk
from translution.spec import Layout
from translution.spec.layout import Displacement


class Outside(Walk):
    """A walk that differs only beyond the ends of the key grid."""

    def beyond(self, axis: int, position: int) -> tuple[bool, int | None]:
        """As the walk, or as :meth:`outside` says."""
        if 0 <= position <= (self.layout.keys[axis] - 1) * self.key_step(axis):
            return super().beyond(axis, position)
        return self.outside(axis, position, self.layout.keys[axis])

    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        """What stands there."""
        return super().beyond(axis, position)


@mutant("circular-as-zeros", "takes zero tokens where the border is circular", clause="L5")
class CircularAsZeros(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        return (True, None) if self.layout.boundary == "circular" else super().outside(axis, position, extent)


@mutant("zeros-as-absent", "leaves out what stands beyond a border of zeros", clause="L5")
class ZerosAsAbsent(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        return (False, None) if self.layout.boundary == "zeros" else super().outside(axis, position, extent)


@mutant("absent-as-zeros", "takes zero tokens where nothing stands beyond the border", clause="L5")
class AbsentAsZeros(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        return (True, None) if self.layout.boundary == "absent" else super().outside(axis, position, extent)


@mutant("boundary-clamped", "takes the nearest key where none or a zero token stands", clause="L5")
class BoundaryClamped(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        clamped = self.layout.boundary in ("absent", "zeros")
        return (True, 0 if position < 0 else extent - 1) if clamped else super().outside(axis, position, extent)


@mutant("replicate-as-reflect", "mirrors the grid where its border key should be repeated", clause="L5")
class ReplicateAsReflect(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        if self.layout.boundary != "replicate" or extent == 1:
            return super().outside(axis, position, extent)
        return True, self.reflected(position, extent)


@mutant("boundary-first-axis-only", "continues the grid along the first axis only", clause="L5")
class BoundaryFirstAxisOnly(Outside):
    def outside(self, axis: int, position: int, extent: int) -> tuple[bool, int | None]:
        return (False, None) if axis else super().outside(axis, position, extent)


@mutant("reflect-repeats-edge", "repeats the border key where the grid is mirrored", clause="L5")
class ReflectRepeatsEdge(Walk):
    def reflected(self, position: int, extent: int) -> int:
        return -position - 1 if position < 0 else 2 * extent - 1 - position


@mutant("shift-cut-at-border", "cuts a window at the border where it should be moved inside", clause="L5")
class ShiftCutAtBorder(Walk):
    def neighbours(self, axis: int, index: int) -> list[int]:
        step, reach = self.layout.dilations[axis], self.layout.window[axis] // 2
        return [key for key in super().neighbours(axis, index) if -reach <= (key - index) // step < reach + 1]


@mutant("circular-long-way", "does not take the short way round a circle", clause="L5")
class CircularLongWay(Walk):
    def label(self, delta: Displacement) -> Displacement:
        if self.layout.boundary != "circular" or self.layout.kernel_size is not None:
            return super().label(delta)
        return tuple(min(max(d, -(n // 2)), n - n // 2 - 1) for d, n in zip(delta, self.layout.keys, strict=True))


@mutant("double-links-once", "counts a pair once that is linked more than once", clause="L5")
class DoubleLinksOnce(Naive):
    def links(self, layout: Layout) -> Links:
        found = super().links(layout)
        return only(found, ~repeated(found))


def repeated(links: Links) -> Tensor:
    """Whether an earlier link joins the same query and key, [L]; never for zero tokens."""
    pairs = links.query * (links.num_keys + 1) + links.key
    earlier = (pairs.unsqueeze(1) == pairs).tril(-1).any(1)
    return earlier & (links.key < links.num_keys)


def only(links: Links, kept: Tensor) -> Links:
    """Some of the links: a mask [L] or their numbers."""
    chosen = {f.name: getattr(links, f.name)[kept] for f in fields(links) if not f.name.startswith("num_")}
    return replace(links, **chosen)


# The zero token


@mutant("zero-token-without-bias", "encodes the zero token to 0, without the encoder's biases", clause="L5")
class ZeroTokenWithoutBias(Naive):
    def kept(self, call: Call, features: Tensor) -> Tensor:
        inside = call.links.key < call.links.num_keys
        return torch.where(inside.unsqueeze(-1), super().kept(call, features), 0.0)


@mutant("zero-token-masked", "gives the zero token the mask of the last key", clause="M6")
class ZeroTokenMasked(Naive):
    def mask_of_links(self, links: Links, added: Tensor) -> Tensor:
        return added[:, :, links.query, links.key.clamp(max=links.num_keys - 1)]


@mutant("zero-token-rotated", "rotates the zero token by the position that it stands in for", clause="E10")
class ZeroTokenRotated(Walk):
    def grid_link(self, query: int, own: Displacement, delta: Displacement, taps: tuple[Tap, ...]) -> Link:
        return super().grid_link(query, own, delta, taps)._replace(key_position=tuple(tap.position for tap in taps))


# Causal order


@mutant("causal-strict", "leaves a query's own position out of a causal layout", clause="L4")
class CausalStrict(Walk):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        return super().in_order(delta, query, key) and (self.layout.causal is False or any(delta))


@mutant("causal-ignored", "lets queries see later keys", clause="L4")
class CausalIgnored(Lenient):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        return True


@mutant("causal-reversed", "lets queries see later keys instead of earlier ones", clause="L4")
class CausalReversed(Lenient):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        return super().in_order(tuple(-d for d in delta), query, key)


@mutant("causal-by-index", "orders queries and keys by their indices, not their positions", clause="L4")
class CausalByIndex(Lenient):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        apart = tuple(d if b is None else a - b for d, a, b in zip(delta, query, key, strict=True))
        return super().in_order(apart, query, key)


@mutant("causal-per-axis", "asks for earlier keys on every axis where the raster order decides", clause="L4")
class CausalPerAxis(Walk):
    def in_order(self, delta: Displacement, query: tuple[int, ...], key: tuple[int | None, ...]) -> bool:
        return super().in_order(delta, query, key) and (not self.layout.raster_causal or all(d >= 0 for d in delta))


@mutant("registers-not-causal", "lets registers see every token of a causal layout", clause="L6")
class RegistersNotCausal(Lenient):
    def register_sees(self, register: int, partner: int | None) -> bool:
        return True
