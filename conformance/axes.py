"""Axes of variation: what a question is like, seen from the question itself, and all that it could be like.

The axes follow the spec's own classes, so that a class which nothing draws is found missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import get_args

import numpy as np

from translution.conformance.exam.question import Question
from translution.geometry import geometry
from translution.spec import (
    Bias,
    Boundary,
    Encoder,
    FarClasses,
    Identity,
    Lattice,
    Layout,
    LowRank,
    LowRankOutput,
    Operator,
    PairTable,
    PerDisplacement,
    Relevance,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Vectors,
)
from translution.spec.encoders import OutputEncoder, Pairing, walk
from translution.spec.relevance import Mixture, branches

_NO, _YES = "no", "yes"
_FLAG = frozenset({_NO, _YES})
# Normal values stay below, those of large logits go beyond.
_LARGE = 5.5


def _names(union: object, *more: str) -> frozenset[str]:
    return frozenset({kind.__name__ for kind in get_args(union)} | set(more))


ROLES = ("query", "key", "value")
LAYOUT_AXES: dict[str, frozenset[str]] = {
    "layout": _names(Layout),
    "rank": frozenset({"none", "1", "2", "3", "4"}),
    "sites": frozenset({"one", "more"}),
    "grid": frozenset({"none", "line", "square", "not square"}),
    "prime extent": _FLAG,
    "registers": frozenset({"0", "1", "more"}),
    "causal": frozenset({_NO, "line", "raster", "axes"}),
    "boundary": frozenset({"none", *get_args(Boundary)}),
    "window": frozenset({_NO, "centred", "padded", "padded beyond the kernel", "cut"}),
    "even kernel": _FLAG,
    "dilation": frozenset({"1", "more"}),
    "stride": frozenset({"1", "more"}),
    "key_stride": frozenset({"1", "more"}),
    "offset": frozenset({"0", "positive", "negative"}),
    "far": _names(FarClasses, "none"),
    "key_grid": frozenset({"none", "same", "other"}),
    "key_classes": frozenset({"none", "mirrored", "given"}),
    "queries with links": frozenset({"all", "some", "none"}),
    "pairs linked twice": _FLAG,
    "zero token": _FLAG,
    "classes without links": _FLAG,
}
RELEVANCE_AXES: dict[str, frozenset[str]] = {
    "relevance": _names(Relevance),
    "first": _names(Relevance, "none") - {"Mixture"},
    "second": _names(Relevance, "none") - {"Mixture"},
    "content": frozenset({"none", "some", "all"}),
    "scale": frozenset({"none", "head width", "given"}),
    "slopes": frozenset({"none", "of ALiBi", "given"}),
} | {f"bias {kind.__name__}": _FLAG for kind in get_args(Bias)}
ENCODER_AXES: dict[str, frozenset[str]] = {
    f"{role} {kind.__name__}": frozenset({"absent", "alone", "inside"})
    for role in ROLES
    for kind in get_args(Encoder)
    if not (role == "value" and kind is Rotary)  # clause E10
}
for _role in ROLES:
    ENCODER_AXES |= {f"{_role} {what}": _FLAG for what in ("bias", "groups", "low rank without up", "head vectors")}
    if _role != "value":
        ENCODER_AXES[f"{_role} pairing"] = frozenset({"none", *get_args(Pairing)})
OPERATOR_AXES: dict[str, frozenset[str]] = {
    "num_heads": frozenset({"1", "more"}),
    "head width of values": frozenset({"1", "more"}),
    "key_dim": frozenset({"same", "other"}),
    "output": _names(OutputEncoder, "none"),
    "output bias": _FLAG,
    "output groups": _FLAG,
    "output_scale": frozenset({"1", "positive", "negative"}),
}
QUESTION_AXES: dict[str, frozenset[str]] = {
    "y": frozenset({"x alone", "as many as x", "across"}),
    "mask": frozenset({"none", "bool", "float"}),
    "mask over batch": frozenset({"none", "one", "own"}),
    "mask over heads": frozenset({"none", "one", "own"}),
    "mask over queries": frozenset({"none", "one", "own"}),
    "rows without a live key": frozenset({"none", "some", "all"}),
    "batch dimensions": frozenset({"0", "1", "2"}),
    "batch": frozenset({"empty", "one", "more"}),
    "values": frozenset({"normal", "large", "integers"}),
}
AXES: dict[str, frozenset[str]] = LAYOUT_AXES | OPERATOR_AXES | RELEVANCE_AXES | ENCODER_AXES | QUESTION_AXES


def _flag(value: bool) -> str:
    return _YES if value else _NO


def _many(value: int) -> str:
    return "1" if value == 1 else "more"


def _some(found: int, of: int) -> str:
    return "none" if found == 0 else "all" if found == of else "some"


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _layout(layout: Layout) -> Iterator[tuple[str, str]]:
    links = geometry(layout)
    yield "layout", type(layout).__name__
    yield "sites", "one" if layout.num_queries == layout.num_keys == 1 else "more"
    yield "queries with links", _some(len(np.unique(links.query_index)), links.num_queries)
    pairs = links.query_index * (links.num_keys + 1) + links.key_index
    yield "pairs linked twice", _flag(len(np.unique(pairs)) < len(pairs))
    yield "zero token", _flag(bool((links.key_index == links.num_keys).any()))
    yield "classes without links", _flag(len(np.unique(links.value_class)) < layout.num_classes)
    if isinstance(layout, PairTable):
        yield "key_classes", "mirrored" if layout.key_classes is None else "given"
        none = ("rank", "grid", "boundary", "far", "key_grid")
        yield from ((name, "none") for name in none)
        yield from ((name, _NO) for name in ("prime extent", "causal", "window", "even kernel"))
        yield from ((name, "1") for name in ("dilation", "stride", "key_stride"))
        yield from (("registers", "0"), ("offset", "0"))
        return
    square = "square" if len(set(layout.grid)) == 1 else "not square"
    offsets = layout.offsets
    yield "key_classes", "none"
    yield "rank", str(layout.rank)
    yield "grid", "line" if layout.rank == 1 else square
    yield "prime extent", _flag(any(_is_prime(n) for n in layout.grid))
    yield "registers", {0: "0", 1: "1"}.get(layout.registers, "more")
    flags = "axes" if isinstance(layout.causal, tuple) else "raster" if layout.rank > 1 else "line"
    yield "causal", flags if layout.causal else _NO
    yield "boundary", layout.boundary
    yield "window", _window(layout)
    yield "even kernel", _flag(layout.kernel_size is not None and any(n % 2 == 0 for n in layout.window))
    yield "dilation", _many(max(layout.dilations))
    yield "stride", _many(max(layout.strides))
    yield "key_stride", _many(max(layout.key_strides))
    yield "offset", "positive" if max(offsets) > 0 else "negative" if min(offsets) < 0 else "0"
    yield "far", "none" if layout.far is None else type(layout.far).__name__
    yield "key_grid", "none" if layout.key_grid is None else "same" if layout.keys == layout.grid else "other"


def _window(layout: Lattice) -> str:
    if layout.kernel_size is None:
        return _NO
    if layout.padding is None:
        return "centred"
    reach = zip(layout.paddings, layout.window, layout.dilations, strict=True)
    if any(padding > (size - 1) * step for padding, size, step in reach):
        return "padded beyond the kernel"
    return "cut" if min(layout.paddings) < 0 else "padded"


def _operator(operator: Operator) -> Iterator[tuple[str, str]]:
    output = operator.output
    scale = operator.output_scale
    yield "num_heads", _many(operator.num_heads)
    yield "head width of values", _many(operator.value_head_dim)
    yield "key_dim", "same" if operator.keys_dim == operator.dim else "other"
    yield "output", "none" if output is None else type(output).__name__
    yield "output bias", _flag(output is not None and output.bias)
    yield "output groups", _flag(isinstance(output, Shared) and output.groups > 1)
    yield "output_scale", "1" if scale == 1 else "negative" if scale < 0 else "positive"


def _relevance(relevance: Relevance) -> Iterator[tuple[str, str]]:
    parts = [part for _, part in branches(relevance)]
    mixed = isinstance(relevance, Mixture)
    softmaxes = [part for part in parts if isinstance(part, Softmax)]
    scales = [part.scale for part in softmaxes if part.content]
    slopes = [part.bias.slopes for part in softmaxes if isinstance(part.bias, SlopeBias)]
    yield "relevance", type(relevance).__name__
    yield "first", type(parts[0]).__name__ if mixed else "none"
    yield "second", type(parts[1]).__name__ if mixed else "none"
    yield "content", _some(len(scales), len(parts))
    yield "scale", "none" if not scales else "head width" if None in scales else "given"
    yield "slopes", "none" if not slopes else "of ALiBi" if None in slopes else "given"
    for kind in get_args(Bias):
        yield f"bias {kind.__name__}", _flag(any(isinstance(part.bias, kind) for part in softmaxes))


def _encoder(role: str, encoder: Encoder | None) -> Iterator[tuple[str, str]]:
    every: list[Encoder | LowRankOutput] = [] if encoder is None else list(walk(encoder))
    for kind in get_args(Encoder):
        inside = any(isinstance(e, kind) for e in every[1:])
        place = "inside" if inside else "alone" if isinstance(encoder, kind) else "absent"
        if f"{role} {kind.__name__}" in ENCODER_AXES:
            yield f"{role} {kind.__name__}", place
    biased = (Identity, Shared, PerDisplacement)
    yield f"{role} bias", _flag(any(isinstance(e, biased) and e.bias for e in every))
    yield f"{role} groups", _flag(any(isinstance(e, (Shared, PerDisplacement)) and e.groups > 1 for e in every))
    yield f"{role} low rank without up", _flag(any(isinstance(e, LowRank) and e.features is None for e in every))
    yield f"{role} head vectors", _flag(any(isinstance(e, Vectors) and e.shared_heads for e in every))
    if role != "value":
        yield f"{role} pairing", next((e.pairing for e in every if isinstance(e, Rotary)), "none")


def _mask(question: Question) -> Iterator[tuple[str, str]]:
    mask, full = question.mask, question.weights_shape
    yield "mask", "none" if mask is None else "bool" if mask.dtype == np.bool_ else "float"
    if mask is None:
        yield from ((f"mask over {axis}", "none") for axis in ("batch", "heads", "queries"))
        yield "rows without a live key", "none"
        return
    shape = (1,) * (len(full) - mask.ndim) + mask.shape
    yield "mask over batch", "own" if max(shape[:-3], default=1) > 1 else "one"
    yield "mask over heads", "own" if shape[-3] > 1 else "one"
    yield "mask over queries", "own" if shape[-2] > 1 else "one"
    live = np.asarray(mask if mask.dtype == np.bool_ else mask != -np.inf).any(axis=-1)
    yield "rows without a live key", _some(int((~live).sum()), live.size)


def _values(question: Question) -> str:
    tokens = question.x if question.y is None else np.concatenate([question.x.ravel(), question.y.ravel()])
    every = [tokens, *question.params.values()]
    if tokens.size and all(np.array_equal(value, np.rint(value)) for value in every):
        return "integers"
    return "large" if np.abs(tokens).max(initial=0) > _LARGE else "normal"


def axes_of(question: Question) -> dict[str, str]:
    """The question's value on every axis of :data:`AXES`."""
    operator, batch = question.operator, question.x.shape[:-2]
    layout, items = operator.layout, math.prod(batch)
    found = dict(_layout(layout)) | dict(_operator(operator)) | dict(_relevance(operator.relevance))
    for role, encoder in (("query", operator.query), ("key", operator.key), ("value", operator.value)):
        found |= dict(_encoder(role, encoder))
    found |= dict(_mask(question))
    found["y"] = "x alone" if question.y is None else "as many as x" if layout.is_self else "across"
    found["batch dimensions"] = str(len(batch))
    found["batch"] = "empty" if items == 0 else "one" if items == 1 else "more"
    found["values"] = _values(question)
    return found


def unseen(questions: Iterable[Question]) -> dict[str, set[str]]:
    """The declared values of each axis that no question has; axes without any are left out."""
    missing = {axis: set(values) for axis, values in AXES.items()}
    for question in questions:
        for axis, value in axes_of(question).items():
            missing[axis].discard(value)
    return {axis: values for axis, values in missing.items() if values}
