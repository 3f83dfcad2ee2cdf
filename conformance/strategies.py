"""Random questions: an operator, parameters, tokens and a mask as a function of :class:`Draws`.

Consecutive numbers of :class:`SeededDraws` walk through every layout kind (number mod 23), relevance (mod 17), value
encoder (mod 13), kind of operator that native kernels claim (mod 8) and mask (mod 7): the moduli share no divisor, so a
run of numbers meets all combinations in turn. Everything else is drawn. First options are the simplest: Hypothesis
shrinks to few tokens, one head, no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from translution.conformance.exam.draws import Draws, HypothesisDraws, SeededDraws
from translution.conformance.exam.question import Array, FloatArray, Question, rounded
from translution.conformance.layout_draws import LAYOUT_KINDS, MAX_CLASSES, MAX_LINKS, draw_layout, in_turn
from translution.conformance.operator_draws import RELEVANCES, draw_operator, is_convolution
from translution.spec import Layout, Operator, Relevance, Softmax
from translution.spec.relevance import branches

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject, DrawFn, SearchStrategy

__all__ = [
    "LAYOUT_KINDS",
    "MASK_KINDS",
    "MAX_CLASSES",
    "MAX_LINKS",
    "RELEVANCES",
    "Array",
    "cases",
    "draw_layout",
    "draw_mask",
    "draw_operator",
    "draw_params",
    "draw_question",
    "draw_values",
    "random_case",
    "random_operator",
]

MASK_KINDS = ("none", "padding", "heads", "pairs", "broadcast")
_MASKS = ("none", "none", "none", *MASK_KINDS[1:])
_BATCHES: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (2,), (3,), (2, 2))
# Logits of tens to hundreds, which float16 holds.
_LARGE_TOKENS, _LARGE_BIASES = 6.0, 30.0


def draw_values(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: str, integers: bool = False, scale: float = 1.0
) -> FloatArray:
    """Normal values times ``scale``, or whole numbers from -3 to 3, that ``dtype`` holds."""
    if integers:
        return generator.integers(-3, 4, shape).astype(np.float64)
    return rounded(scale * generator.standard_normal(shape), dtype)


def draw_params(
    generator: np.random.Generator, operator: Operator, dtype: str, integers: bool = False, biases: float = 1.0
) -> dict[str, FloatArray]:
    """Every parameter; matrices keep the size of what they are applied to, ``biases`` scales those of the logits."""

    def scale(name: str, shape: tuple[int, ...]) -> float:
        last = name.rsplit(".", 1)[-1]
        if name.startswith("relevance"):
            return 0.5 * biases if last == "bias" else 0.5
        return float(shape[-2]) ** -0.5 if last in ("weight", "table", "down", "up") else 0.5

    shapes = operator.parameters.items()
    return {name: draw_values(generator, shape, dtype, integers, scale(name, shape)) for name, shape in shapes}


def draw_mask(
    draws: Draws, operator: Operator, batch: tuple[int, ...], dtype: str, kind: str | None = None
) -> Array | None:
    """A mask of a kind (of :data:`MASK_KINDS`, taken in turn), bool or float with -inf where the relevance has logits.

    padding: one flag per key; heads: one per head and pair; pairs: one per pair; broadcast: any axis may be 1. Some
    rows may be left without a key, or all.
    """
    kind = draws.walk(_MASKS) if kind is None else kind
    if kind == "none":
        return None
    layout, heads = operator.layout, operator.num_heads
    full = (*batch, heads, layout.num_queries, layout.num_keys)
    shape = {
        "padding": (*batch, 1, 1, layout.num_keys),
        "heads": full,
        "pairs": full[-2:],
        "broadcast": tuple(1 if draws.some() else size for size in full) if kind == "broadcast" else (),
    }[kind]
    dead = draws.pick(("none", "query", "query", "item", "all")) if draws.some(0.8) else "none"
    softmax = all(isinstance(branch, Softmax) for _, branch in branches(operator.relevance))
    added = softmax and draws.some(0.6)
    generator = draws.generator()
    live = np.asarray(generator.random(shape) < 0.6)
    if dead == "query" and shape[-2] == layout.num_queries and live.size:
        live[..., generator.integers(shape[-2]), :] = False
    elif dead == "item" and live.size:
        live[:1] = False
    elif dead == "all" and generator.random() < 0.3:
        live[...] = False
    return np.where(live, rounded(generator.standard_normal(shape), dtype), -np.inf) if added else live


def draw_question(
    draws: Draws,
    dtype: str = "float64",
    *,
    operator: Operator | None = None,
    integers: bool = False,
    masked: bool | None = None,
    batch: tuple[int, ...] | None = None,
    cotangent: bool = False,
    return_weights: bool = False,
    layout: Layout | None = None,
    layouts: Sequence[str] | None = None,
    relevances: Sequence[Relevance] | None = None,
    self_only: bool = False,
    heads: int | None = None,
) -> Question:
    """A question with values that ``dtype`` holds; the last five arguments are those of :func:`draw_operator`.

    Args:
        operator: the operator; None draws one.
        integers: all values but a mask's are whole numbers from -3 to 3.
        masked: None for a mask in four cases of seven, True for always, False for never.
        batch: batch dimensions; None draws them, rarely an empty batch.
        cotangent: whether there is one.
        self_only: x alone where the operator allows it.
    """
    if operator is None:
        operator = draw_operator(
            draws, layout=layout, layouts=layouts, relevances=relevances, self_only=self_only, heads=heads
        )
    layout = operator.layout
    if batch is None:
        batch = draws.pick(((0,), (2, 0))) if draws.some(0.04) else draws.pick(_BATCHES)
    alone = layout.is_self and operator.keys_dim == operator.dim and not (not self_only and draws.some(0.2))
    regime = draws.integer(0, 99)
    whole, large = integers or regime >= 94, regime in range(86, 94) and not integers
    kind: str | None = None
    if masked is not None:
        kind = draws.walk(in_turn(MASK_KINDS[1:], len(_MASKS))) if masked else "none"
    elif is_convolution(operator):
        # The native kernel takes no mask.
        kind = draws.walk(("none",) * (len(_MASKS) - 1) + ("pairs",))
    mask = draw_mask(draws, operator, batch, dtype, kind)
    generator = draws.generator()
    scale = _LARGE_TOKENS if large else 1.0
    params = draw_params(generator, operator, dtype, whole, _LARGE_BIASES if large else 1.0)
    x = draw_values(generator, (*batch, layout.num_queries, operator.dim), dtype, whole, scale)
    y = None if alone else draw_values(generator, (*batch, layout.num_keys, operator.keys_dim), dtype, whole, scale)
    pull = (*batch, layout.num_queries, operator.out_features)
    return Question(
        operator, params, x, y, mask, draw_values(generator, pull, dtype, whole) if cotangent else None, return_weights
    )


def random_operator(seed: int) -> Operator:
    """The operator of :func:`random_case`: at most ``MAX_LINKS`` links, the same for the same seed."""
    return draw_operator(SeededDraws(seed, "random_case"))


def random_case(seed: int, *, integers: bool = False) -> Question:
    """A float64 question without cotangent, the same for the same seed."""
    return draw_question(SeededDraws(seed, "random_case"), integers=integers).but(label=f"random_case({seed})")


def cases(*, integers: bool = False) -> SearchStrategy[Question]:
    """Hypothesis strategy: any question, shrunk choice by choice."""
    from hypothesis import strategies

    @strategies.composite
    def build(draw: DrawFn) -> Question:
        # Drawing through DataObject would print every choice.
        source: Any = SimpleNamespace(draw=draw)
        return draw_question(HypothesisDraws(cast("DataObject", source)), integers=integers)

    return build()
