"""The normal form: every encoder as a list of linear and constant terms, each in its slice of a head.

Backends implement this and nothing else of the spec. A role's result for a token y and class c, head h, is

    r[h, start:start+width] += (y before table[c] after)[h]      for every Linear
    r[h, start:start+width] += constant[c][h]                    for every Constant
    r[h, start:start+width]  = rotate(r[h, start:start+width])   for every Rotation, last

so that a sum is two terms in one slice and a concatenation two terms in two slices (clauses E3 to E10).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from translution.spec import (
    BiasTable,
    Concat,
    Encoder,
    Identity,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.encoders import Context
from translution.spec.relevance import branches


@dataclass(frozen=True, slots=True)
class Linear:
    """y before table[c] after. A name of None stands for the identity.

    ``before`` is [C, R] or [groups, C / groups, R / groups], ``table`` [T, R, S] or
    [T, groups, R / groups, S / groups], ``after`` [S, E]; the result has num_heads * width features, head after head.
    """

    before: str | None
    table: str | None
    after: str | None
    groups: int
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A vector added without looking at the token: [E], or [T, E] ``per_class``, or [T, width] where heads share it."""

    name: str
    per_class: bool
    shared_heads: bool
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class Rotation:
    """The slice is rotated by the token's own lattice position (clause E10)."""

    start: int
    width: int
    base: float
    pairing: Literal["half", "interleaved"]


@dataclass(frozen=True, slots=True)
class Uplift:
    """Comes before the output (clause O4): the last ``width`` features of every head, all heads together [H * width],
    times the parameter ``name`` [H * width, H * (head_dim - width)], are added to the others of all heads together.
    """

    name: str
    width: int


@dataclass(frozen=True, slots=True)
class Role:
    """One encoder: what it adds up, for every head of ``head_dim`` features."""

    name: str
    input_features: int
    num_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    constants: tuple[Constant, ...]
    rotations: tuple[Rotation, ...]

    @property
    def is_relative(self) -> bool:
        """Whether the result depends on the class at all; otherwise it is computed once per token."""
        return any(t.table for t in self.linears) or any(t.per_class for t in self.constants)


@dataclass(frozen=True, slots=True)
class BiasForm:
    """A bias as a [num_heads, T] table: ``table`` is the parameter itself, ``slopes`` are -slope_h * distance[c],
    ``quadratic`` is weight_h . features[c] with the arrays of :class:`translution.geometry.Geometry`.
    """

    kind: Literal["table", "slopes", "quadratic"]
    parameter: str | None
    slopes: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Branch:
    """One plain relevance."""

    kind: Literal["softmax", "ones", "mean"]
    content: bool = False
    scale: float = 0.0
    bias: BiasForm | None = None


@dataclass(frozen=True, slots=True)
class NormalForm:
    """Everything a backend needs beside the layout's geometry. ``gate`` names the parameter that mixes two branches."""

    operator: Operator
    query: Role | None
    key: Role | None
    value: Role
    output: Role | None
    branches: tuple[Branch, ...]
    gate: str | None
    uplift: Uplift | None = None
    roles: tuple[Role, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = (self.query, self.key, self.value)
        object.__setattr__(self, "roles", tuple(role for role in found if role is not None))

    @property
    def relative_roles(self) -> tuple[str, ...]:
        """Names of the roles that differ between displacements."""
        return tuple(role.name for role in self.roles if role.is_relative)


Term = Linear | Constant | Rotation


def _terms(encoder: Encoder, name: str, context: Context, start: int) -> Iterator[Term]:
    width = encoder.features_for(context) // context.num_heads
    match encoder:
        case Identity(bias):
            yield Linear(None, None, None, 1, start, width)
            if bias:
                yield Constant(f"{name}.bias", False, False, start, width)
        case Shared(_, bias, groups):
            yield Linear(f"{name}.weight", None, None, groups, start, width)
            if bias:
                yield Constant(f"{name}.bias", False, False, start, width)
        case PerDisplacement(_, bias, groups):
            yield Linear(None, f"{name}.table", None, groups, start, width)
            if bias:
                yield Constant(f"{name}.bias", False, False, start, width)
        case LowRank(_, features):
            up = None if features is None else f"{name}.up"
            yield Linear(f"{name}.down", f"{name}.table", up, 1, start, width)
        case Vectors(_, shared_heads):
            yield Constant(f"{name}.vectors", True, shared_heads, start, width)
        case Sum(parts):
            for number, part in enumerate(parts):
                yield from _terms(part, f"{name}.{number}", context, start)
        case Concat(parts):
            for number, part in enumerate(parts):
                yield from _terms(part, f"{name}.{number}", context, start)
                start += part.features_for(context) // context.num_heads
        case Rotary(inner, base, pairing):
            yield from _terms(inner, name, context, start)
            yield Rotation(start, width, base, pairing)


def _role(name: str, encoder: Encoder | None, context: Context) -> Role | None:
    if encoder is None:
        return None
    terms = list(_terms(encoder, name, context, 0))
    return Role(
        name=name,
        input_features=context.input_features,
        num_heads=context.num_heads,
        head_dim=encoder.features_for(context) // context.num_heads,
        linears=tuple(t for t in terms if isinstance(t, Linear)),
        constants=tuple(t for t in terms if isinstance(t, Constant)),
        rotations=tuple(t for t in terms if isinstance(t, Rotation)),
    )


def _branch(operator: Operator, prefix: str, relevance: Softmax | Ones | Mean) -> Branch:
    if isinstance(relevance, Ones):
        return Branch("ones")
    if isinstance(relevance, Mean):
        return Branch("mean")
    bias = None
    if isinstance(relevance.bias, BiasTable):
        bias = BiasForm("table", f"relevance.{prefix}bias")
    elif isinstance(relevance.bias, SlopeBias):
        bias = BiasForm("slopes", None, relevance.bias.slopes_for(operator.num_heads))
    elif relevance.bias is not None:
        bias = BiasForm("quadratic", f"relevance.{prefix}weight")
    scale = operator.scale_of(relevance) if relevance.content else 0.0
    return Branch("softmax", relevance.content, scale, bias)


@lru_cache(maxsize=512)
def normal_form(operator: Operator) -> NormalForm:
    """The normal form of an operator; parameters keep their names."""
    value = _role("value", operator.value, operator.key_context)
    assert value is not None
    output, context, uplift = operator.output, operator.output_context, None
    if isinstance(output, LowRankOutput):
        uplift = Uplift("output.up", output.inner_features // operator.num_heads)
        context = Context(context.input_features - output.inner_features, context.num_classes, context.num_heads)
        output = Shared(output.features, bias=output.bias)
    return NormalForm(
        operator=operator,
        query=_role("query", operator.query, operator.query_context),
        key=_role("key", operator.key, operator.key_context),
        value=value,
        output=_role("output", output, context),
        branches=tuple(_branch(operator, prefix, part) for prefix, part in branches(operator.relevance)),
        gate="relevance.gate" if isinstance(operator.relevance, Mixture) else None,
        uplift=uplift,
    )
