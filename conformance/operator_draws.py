"""Operators of every kind: a layout, a relevance and encoders that fit together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from translution.conformance.exam.draws import Draws
from translution.conformance.layout_draws import CROSS_KINDS, LAYOUT_KINDS, draw_layout, in_turn
from translution.spec import (
    BiasTable,
    Concat,
    Encoder,
    Identity,
    Lattice,
    Layout,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    QuadraticBias,
    Relevance,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.encoders import Pairing
from translution.spec.relevance import branches

RELEVANCES: tuple[Relevance, ...] = (
    Ones(),
    Mean(),
    Softmax(),
    Softmax(scale=0.3),
    Softmax(bias=BiasTable()),
    Softmax(bias=SlopeBias()),
    Softmax(scale=-1.0, bias=QuadraticBias()),
    Softmax(scale=2.0, bias=BiasTable()),
    Softmax(content=False, bias=BiasTable()),
    Softmax(content=False, bias=SlopeBias()),
    Softmax(content=False),
    Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias())),
    Mixture(Softmax(scale=0.5, bias=BiasTable()), Softmax(bias=BiasTable())),
    Mixture(Ones(), Softmax()),
    Mixture(Softmax(), Mean()),
    Mixture(Mean(), Ones()),
    Mixture(Mean(), Softmax(bias=SlopeBias())),
)

_KINDS = (
    "identity", "shared", "displacement", "low rank", "inner", "vectors", "head vectors",
    "sum", "concat", "grouped shared", "grouped displacement", "nested", "biased identity",
)  # fmt: skip
_PLAIN = ("identity", "shared", "grouped shared", "biased identity")

# One operator in eight is a convolution, one in eight plain attention: native kernels claim no others.
_SPECIAL = (None, None, None, "convolution", None, None, None, "attention")
_SPECIAL_LAYOUTS = {
    "convolution": (
        "window", "window-zeros", "window-wide-padding", "window-circular", "window-reflect", "window-replicate",
        "strided", "transposed",
    ),
    "attention": ("single", "line", "grid", "registers", "causal-line", "causal-grid"),
}  # fmt: skip


def _groups(draws: Draws, inputs: int, features: int) -> int:
    return draws.pick([g for g in range(1, inputs + 1) if inputs % g == 0 and features % g == 0][-2:])


def _encoder(draws: Draws, kind: str, features: int, inputs: int, heads: int) -> Encoder:
    """An encoder of that kind without rotation; where the kind can't have so many features, a Shared one."""
    match kind:
        case "identity" if inputs == features:
            return Identity()
        case "biased identity" if inputs == features:
            return Identity(bias=True)
        case "displacement":
            return PerDisplacement(features, bias=draws.some())
        case "grouped shared":
            return Shared(features, bias=draws.some(), groups=_groups(draws, inputs, features))
        case "grouped displacement":
            return PerDisplacement(features, bias=draws.some(), groups=_groups(draws, inputs, features))
        case "low rank":
            return LowRank(draws.pick((1, 2, 5)), features)
        case "inner":
            return LowRank(features)
        case "vectors":
            return Vectors(features)
        case "head vectors":
            return Vectors(features, shared_heads=True)
        case "sum":
            count = draws.pick((1, 2, 3))
            return Sum(tuple(_encoder(draws, draws.pick(_KINDS[:7]), features, inputs, heads) for _ in range(count)))
        case "concat" if features > heads:
            first = heads * draws.integer(1, features // heads - 1)
            sizes: tuple[int, ...] = (first, features - first)
            if features - first > heads and draws.some():
                sizes = (first, heads, features - first - heads)
            return Concat(tuple(_encoder(draws, draws.pick(_KINDS[:7]), size, inputs, heads) for size in sizes))
        case "nested" if features > 2 * heads:
            within = _encoder(draws, draws.pick(("concat", "concat", "sum")), features - heads, inputs, heads)
            return Concat((within, _encoder(draws, draws.pick(_KINDS[:8]), heads, inputs, heads)))
        case _:
            return Shared(features, bias=draws.some())


def _rotated(draws: Draws, encoder: Encoder, features: int, inputs: int, heads: int, layout: Layout) -> Encoder:
    """The encoder rotated as a whole, or joined with a rotated part, where positions and widths allow it."""
    if not isinstance(layout, Lattice) or features % (2 * layout.rank * heads):
        return encoder
    base, pairing = draws.pick((10000.0, 3.0)), draws.pick(get_args(Pairing))
    part = 2 * layout.rank * heads
    if features == part or draws.some():
        return Rotary(encoder, base, pairing)
    kinds = ("shared", "displacement", "sum")
    rotated = _encoder(draws, draws.pick(kinds), part, inputs, heads)
    rest = _encoder(draws, draws.pick(kinds), features - part, inputs, heads)
    return Concat((Rotary(rotated, base, pairing), rest))


def is_plain_window(layout: Layout) -> bool:
    """Whether a native convolution has such a window."""
    return (
        isinstance(layout, Lattice)
        and layout.kernel_size is not None
        and not layout.registers
        and layout.far is None
        and layout.boundary != "shift"
        and not any(layout.offsets)
        and (set(layout.strides) == {1} or set(layout.key_strides) == {1})
        and layout.num_classes == math.prod(layout.window)
    )


def is_convolution(operator: Operator) -> bool:
    """One matrix per displacement, without a bias, under Ones on a plain window."""
    value = operator.value
    table = isinstance(value, PerDisplacement) and not value.bias
    return table and isinstance(operator.relevance, Ones) and is_plain_window(operator.layout)


def _is_full(layout: Layout) -> bool:
    return isinstance(layout, Lattice) and layout.kernel_size is None and layout.boundary == "absent"


def _fits(relevance: Relevance, layout: Layout) -> bool:
    """Biases that are functions of the displacement need exact ones (clause R5)."""
    biases = [branch.bias for _, branch in branches(relevance) if isinstance(branch, Softmax)]
    exact = isinstance(layout, Lattice) and layout.far is None
    return exact or not any(isinstance(bias, (SlopeBias, QuadraticBias)) for bias in biases)


def _given_slopes(draws: Draws, relevance: Relevance, heads: int) -> Relevance:
    if isinstance(relevance, Softmax) and isinstance(relevance.bias, SlopeBias) and draws.some():
        return replace(relevance, bias=SlopeBias(tuple(0.75 - head / 2 for head in range(heads))))
    return relevance


def draw_operator(
    draws: Draws,
    *,
    layout: Layout | None = None,
    layouts: Sequence[str] | None = None,
    relevances: Sequence[Relevance] | None = None,
    self_only: bool = False,
    heads: int | None = None,
) -> Operator:
    """An operator whose layout kind, relevance and value encoder are taken in turn.

    ``layout`` or ``layouts`` (names of :data:`LAYOUT_KINDS`), ``relevances`` and ``heads`` restrict it; ``self_only``
    leaves those where queries and keys can be the same tokens.
    """
    special = draws.walk(_SPECIAL)
    offered = RELEVANCES if relevances is None else tuple(relevances)
    if special == "convolution":
        offered_here: tuple[Relevance, ...] = tuple(r for r in offered if isinstance(r, Ones))
    else:
        offered_here = tuple(r for r in offered if isinstance(r, Softmax) and r.content)
    if not offered_here:
        special = None

    def accepted(found: Layout) -> bool:
        return (not self_only or found.is_self) and (special != "convolution" or is_plain_window(found))

    if layout is None:
        kinds = tuple(k for k in layouts or LAYOUT_KINDS if layouts or not (self_only and k in CROSS_KINDS))
        if special is not None:
            native = tuple(k for k in kinds if k in _SPECIAL_LAYOUTS[special])
            # Not in turn: every eighth number would meet the same few kinds for a long time.
            kinds, special = ((draws.pick(native),), special) if native else (kinds, None)
        layout = draw_layout(draws, kinds=kinds, accepted=accepted)
    elif not (_is_full(layout) if special == "attention" else is_plain_window(layout)):
        special = None
    fitting = [r for r in (offered if special is None else offered_here) if _fits(r, layout)]
    if not fitting:
        draws.reject("none of these relevances fits the layout")
    relevance = draws.walk(in_turn(fitting, len(RELEVANCES)))
    heads = draws.pick((1, 2, 2, 3)) if heads is None else heads
    if relevances is None:
        relevance = _given_slopes(draws, relevance, heads)
    return _with_encoders(draws, layout, relevance, special, self_only, heads)


def _with_encoders(
    draws: Draws, layout: Layout, relevance: Relevance, special: str | None, self_only: bool, heads: int
) -> Operator:
    dim = draws.pick((1, 2, 3, 4, 5, 6, 2 * heads))
    own_keys = not self_only and (not layout.is_self or draws.some(0.3))
    key_dim = draws.pick((1, 3, 4, 2 * heads)) if own_keys else None
    inputs = dim if key_dim is None else key_dim
    kind = draws.walk(in_turn(_PLAIN, len(_KINDS)) if special == "attention" else _KINDS)
    widths = (3, 4) if kind == "nested" else (1, 2, 3)
    features = inputs if "identity" in kind and inputs % heads == 0 else heads * draws.pick(widths)
    if special == "convolution":
        value: Encoder = PerDisplacement(features, groups=_groups(draws, inputs, features))
    else:
        value = _encoder(draws, kind, features, inputs, heads)
    settings: dict[str, Any] = {}
    if any(isinstance(branch, Softmax) and branch.content for _, branch in branches(relevance)):
        kinds = _PLAIN if special == "attention" else _KINDS
        sides = [("query", draws.pick(kinds), dim), ("key", draws.pick(kinds), inputs)]
        untouched = [n for _, own, n in sides if "identity" in own and n % heads == 0]
        width = untouched[0] if untouched else heads * draws.pick((1, 2, 3, 4, 6, 8))
        for role, own, channels in sides:
            found = _encoder(draws, own, width, channels, heads)
            turned = draws.some(0.35) and (special is None or isinstance(found, (Identity, Shared)))
            settings[role] = _rotated(draws, found, width, channels, heads, layout) if turned else found
    return Operator(
        layout, dim, heads, value, relevance=relevance, output=_output(draws, features, heads), key_dim=key_dim,
        output_scale=draws.pick((1.0, 1.0, 0.5, -2.0)), **settings,
    )  # fmt: skip


def _output(draws: Draws, features: int, heads: int) -> Identity | Shared | LowRankOutput | None:
    kind = draws.pick(("none", "none", "identity", "biased identity", "shared", "shared", "grouped", "low rank"))
    if kind in ("none", "identity", "biased identity"):
        return None if kind == "none" else Identity(bias=kind != "identity")
    out, bias = draws.pick((1, 3, features)), draws.some()
    if kind == "low rank" and features > heads:
        return LowRankOutput(heads, out, bias=bias)
    return Shared(out, bias=bias, groups=_groups(draws, features, out) if kind == "grouped" else 1)
