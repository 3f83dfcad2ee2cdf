"""Encoders: how a token is projected for a pair of class c (clauses E1 to E10).

Row vectors stand on the left: an encoder maps y in R^C to y W[c] + b[c] in R^(num_heads * width). ``features`` counts
the features of all heads together; head h owns the h-th contiguous slice. T is the layout's number of classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from translution.spec.checks import MAX_ENCODERS, as_tuple, flag, is_finite, positive
from translution.spec.errors import SpecError, require

Shape = tuple[int, ...]
Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Context:
    """What an encoder needs to know of the operator that holds it."""

    input_features: int
    num_classes: int
    num_heads: int


def _divides(clause: str, owner: str, divisor: tuple[str, int], number: tuple[str, int]) -> None:
    require(
        number[1] % divisor[1] == 0,
        clause,
        f"{owner}: {number[0]}={number[1]}, {divisor[0]}={divisor[1]}",
        f"{number[0]} must be divisible by {divisor[0]}",
        f"Change {divisor[0]} to a divisor of {number[1]}",
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """y itself (clause E3). Parameters: ``bias`` [C] if asked for."""

    bias: bool = False

    def __post_init__(self) -> None:
        flag("E3", "Identity", "bias", self.bias)

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return context.input_features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        return {"bias": (context.input_features,)} if self.bias else {}


@dataclass(frozen=True, slots=True)
class Shared:
    """One matrix for every displacement, y W + b (clause E4): self-attention's projection.

    Parameters: ``weight`` [C, E], or [groups, C / groups, E / groups] block-diagonal; ``bias`` [E].
    """

    features: int
    bias: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        positive("E4", "Shared", features=self.features, groups=self.groups)
        flag("E4", "Shared", "bias", self.bias)
        _divides("E4", "Shared", ("groups", self.groups), ("features", self.features))

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return self.features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        weight = _grouped("Shared", context.input_features, self.features, self.groups)
        return {"weight": weight} | ({"bias": (self.features,)} if self.bias else {})


@dataclass(frozen=True, slots=True)
class PerDisplacement:
    """One matrix per class, y W[c] + b (clause E5): the encoder of Translution and of convolution.

    Parameters: ``table`` [T, C, E], or [T, groups, C / groups, E / groups] block-diagonal; ``bias`` [E], the same for
    every class (a bias per class is a Sum with Vectors).
    """

    features: int
    bias: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        positive("E5", "PerDisplacement", features=self.features, groups=self.groups)
        flag("E5", "PerDisplacement", "bias", self.bias)
        _divides("E5", "PerDisplacement", ("groups", self.groups), ("features", self.features))

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return self.features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        matrix = _grouped("PerDisplacement", context.input_features, self.features, self.groups)
        return {"table": (context.num_classes, *matrix)} | ({"bias": (self.features,)} if self.bias else {})


@dataclass(frozen=True, slots=True)
class LowRank:
    """y D M[c] U: down to ``inner_features``, a small matrix per class, and up again (clause E6).

    The small matrices mix all heads. With ``features=None`` there is no U and the result has ``inner_features``
    features. Parameters: ``down`` [C, R], ``table`` [T, R, R], ``up`` [R, E].
    """

    inner_features: int
    features: int | None = None

    def __post_init__(self) -> None:
        positive("E6", "LowRank", inner_features=self.inner_features)
        if self.features is not None:
            positive("E6", "LowRank", features=self.features)

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return self.inner_features if self.features is None else self.features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        inner = self.inner_features
        shapes = {"down": (context.input_features, inner), "table": (context.num_classes, inner, inner)}
        return shapes if self.features is None else shapes | {"up": (inner, self.features)}


@dataclass(frozen=True, slots=True)
class Vectors:
    """A vector per class that does not look at the token, r[c] (clause E7): Shaw's relative encodings, or a bias per
    class.

    Parameters: ``vectors`` [T, E], or [T, E / num_heads] where every head takes the same (``shared_heads``).
    """

    features: int
    shared_heads: bool = False

    def __post_init__(self) -> None:
        positive("E7", "Vectors", features=self.features)
        flag("E7", "Vectors", "shared_heads", self.shared_heads)

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return self.features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        width = self.features // context.num_heads if self.shared_heads else self.features
        return {"vectors": (context.num_classes, width)}


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of encoders with the same number of features (clause E8). Parameters: those of part n under ``n.``."""

    parts: tuple[Encoder, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked_parts("E8", "Sum", self.parts))
        for part in self.parts:
            require(
                not isinstance(part, (Rotary, Concat)),
                "E8",
                f"{type(part).__name__} inside Sum",
                "a Sum adds plain encoders",
                "Put Rotary or Concat outside: Rotary(Sum(...)), Concat((Sum(...), ...))",
            )

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        sizes = [part.features_for(context) for part in self.parts]
        require(
            len(set(sizes)) == 1,
            "E8",
            f"Sum of encoders with {sizes} features",
            "the parts of a Sum have the same number of features",
            "Give every part the same features",
        )
        return sizes[0]

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        return dict(_numbered(self.parts, context))


@dataclass(frozen=True, slots=True)
class Concat:
    """Head by head, the features of all parts one after another (clause E9). Parameters: those of part n under ``n.``.

    The inner product of two concatenations is the sum of the inner products of their parts.
    """

    parts: tuple[Encoder, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", _checked_parts("E9", "Concat", self.parts))

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        sizes = [part.features_for(context) for part in self.parts]
        for size in sizes:
            _divides("E9", "Concat", ("num_heads", context.num_heads), ("features of a part", size))
        return sum(sizes)

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        return dict(_numbered(self.parts, context))


@dataclass(frozen=True, slots=True)
class Rotary:
    """The inner encoder's result, rotated by the token's own lattice position (clause E10; Su et al. 2021).

    For a query at p(i) and a key at p(j) with shared matrices, the inner product depends on p(i) - p(j) alone:
    W[delta] = W R(delta). With D = head width and A lattice axes, each axis owns D / (2 A) angles
    ``position * base ** (-2 k A / D)``, k = 0, 1, ...; axis blocks stand one after another. ``half`` pairs feature u
    with u + D / 2 (Llama), ``interleaved`` pairs 2u with 2u + 1. Registers are not rotated. Only for queries and keys.
    """

    inner: Encoder
    base: float = 10000.0
    pairing: Pairing = "half"

    def __post_init__(self) -> None:
        require(
            isinstance(self.inner, ENCODERS) and not any(isinstance(e, Rotary) for e in walk(self.inner)),
            "E10",
            f"Rotary({self.inner!r})",
            "Rotary rotates one encoder, once",
            "Give the encoder to rotate, e.g. Rotary(Shared(64))",
        )
        require(
            is_finite(self.base) and self.base > 0,
            "E10",
            f"Rotary(base={self.base!r})",
            "base is a positive finite number",
            "Give base=10000.0",
        )
        require(
            self.pairing in get_args(Pairing),
            "E10",
            f"Rotary(pairing={self.pairing!r})",
            f"pairing is one of {', '.join(get_args(Pairing))}",
            "Choose one of these",
        )
        object.__setattr__(self, "base", float(self.base))

    def features_for(self, context: Context) -> int:
        """Features of all heads together."""
        return self.inner.features_for(context)

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        return self.inner.parameters(context)


@dataclass(frozen=True, slots=True)
class LowRankOutput:
    """(o + z U) W + b, an output encoder that brings up the low-rank part of the values (clause O4).

    Each head ends with ``inner_features / num_heads`` low-rank features: z holds those of all heads, o the others. U
    mixes heads after the weighting, which no value encoder can do: alpha-Translution (arXiv 2510.10060, section 4).
    Parameters, with C features coming in: ``up`` [R, C - R], ``weight`` [C - R, F], ``bias`` [F].
    """

    inner_features: int
    features: int
    bias: bool = False

    def __post_init__(self) -> None:
        positive("O4", "LowRankOutput", inner_features=self.inner_features, features=self.features)
        flag("O4", "LowRankOutput", "bias", self.bias)

    def features_for(self, context: Context) -> int:
        """Features of the result."""
        return self.features

    def parameters(self, context: Context) -> Mapping[str, Shape]:
        """Names and shapes."""
        full = context.input_features - self.inner_features
        shapes: dict[str, Shape] = {"up": (self.inner_features, full), "weight": (full, self.features)}
        return shapes | ({"bias": (self.features,)} if self.bias else {})


Encoder = Identity | Shared | PerDisplacement | LowRank | Vectors | Sum | Concat | Rotary
OutputEncoder = Shared | Identity | LowRankOutput
ENCODERS = (Identity, Shared, PerDisplacement, LowRank, Vectors, Sum, Concat, Rotary)


def _checked_parts(clause: str, owner: str, parts: object) -> tuple[Encoder, ...]:
    rule, remedy = f"{owner} takes a tuple of at least one encoder", f"Give {owner}((Shared(64), Vectors(64)))"
    given = as_tuple(parts, clause, f"{owner}({parts!r})", rule, remedy)
    found = tuple(part for part in given if isinstance(part, ENCODERS))
    require(0 < len(found) == len(given), clause, f"{owner}({parts!r})", rule, remedy)
    inside = itertools.islice(itertools.chain.from_iterable(walk(part) for part in found), MAX_ENCODERS)
    require(
        sum(1 for _ in inside) < MAX_ENCODERS,
        clause,
        f"{owner} of {len(found)} parts",
        f"an encoder holds fewer than {MAX_ENCODERS} others, at any depth",
        "Merge parts: a sum of Shared is one Shared",
    )
    return found


def _grouped(owner: str, inputs: int, features: int, groups: int) -> Shape:
    if groups == 1:
        return (inputs, features)
    _divides("E5" if owner == "PerDisplacement" else "E4", owner, ("groups", groups), ("input channels", inputs))
    return (groups, inputs // groups, features // groups)


def _numbered(parts: tuple[Encoder, ...], context: Context) -> Iterator[tuple[str, Shape]]:
    for number, part in enumerate(parts):
        for name, shape in part.parameters(context).items():
            yield f"{number}.{name}", shape


def walk(encoder: Encoder | LowRankOutput) -> Iterator[Encoder | LowRankOutput]:
    """The encoder and every encoder inside it, outermost first."""
    yield encoder
    if isinstance(encoder, (Sum, Concat)):
        for part in encoder.parts:
            yield from walk(part)
    elif isinstance(encoder, Rotary):
        yield from walk(encoder.inner)


def check_head_width(role: str, encoder: Encoder | LowRankOutput, context: Context) -> int:
    """Width of one head of ``encoder``, or the reason why there is none."""
    features = encoder.features_for(context)
    _divides("E2", role, ("num_heads", context.num_heads), ("features", features))
    if isinstance(encoder, Concat):
        for part in encoder.parts:
            check_head_width(role, part, context)
    return features // context.num_heads


def rotary_angles(role: str, width: int, rank: int) -> int:
    """Angles per lattice axis of a rotated head of ``width`` features."""
    if width % (2 * rank):
        raise SpecError(
            "E10",
            f"{role}: head width {width} on {rank} lattice axes",
            f"a rotated head needs a width divisible by 2 * {rank}",
            "Change the features, num_heads, or rotate a part of the head with Concat",
        )
    return width // (2 * rank)
