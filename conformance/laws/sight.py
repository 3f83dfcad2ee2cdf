"""Who sees whom: the links of a question counted pair by pair, and small operators whose results show them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from translution.backends.reference.support import Link, support
from translution.conformance.exam.law import Trial
from translution.conformance.exam.question import Answer, Array, FloatArray, Question, rounded
from translution.conformance.exam.subject import NotClaimed
from translution.spec import (
    BiasTable,
    Identity,
    Lattice,
    Layout,
    Mean,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Shared,
    Softmax,
)

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

BATCHES = ((2,), (3,), (1,), (2, 2))
# A window that never meets a key.
NO_LINKS = Lattice((5,), key_grid=(4,), kernel_size=3, offset=40)
TRACERS = ("ones", "attention", "mean", "relative")


@lru_cache(maxsize=256)
def links_of(layout: Layout) -> tuple[tuple[Link, ...], ...]:
    """The links of every query, from the loops of the definition."""
    return tuple(tuple(support(layout, query)) for query in range(layout.num_queries))


@lru_cache(maxsize=256)
def link_counts(layout: Layout) -> IntArray:
    """How often each pair is linked, [Nq, Nk + 1]; the last column is the zero token's. Read-only."""
    found = np.zeros((layout.num_queries, layout.num_keys + 1), np.int64)
    for query, links in enumerate(links_of(layout)):
        for link in links:
            found[query, layout.num_keys if link.key is None else link.key] += 1
    found.setflags(write=False)
    return found


def full_mask(question: Question) -> BoolArray:
    """Which pairs the mask leaves, [B, H, Nq, Nk]."""
    shape = question.weights_shape
    allowed = np.ones((), bool) if question.mask is None else question.mask
    if allowed.dtype != np.bool_:
        allowed = allowed != -np.inf
    return np.broadcast_to(allowed, shape).reshape(-1, *shape[-3:])


def seen(question: Question) -> BoolArray:
    """Which keys each head of each query sees, [B, H, Nq, Nk + 1]; the zero token last, which no mask takes away."""
    allowed = full_mask(question)
    never = np.ones((*allowed.shape[:-1], 1), bool)
    return np.concatenate([allowed, never], -1) & (link_counts(question.operator.layout) > 0)


def some(flags: BoolArray, axis: int | tuple[int, ...]) -> BoolArray:
    """Whether any flag is set along axes."""
    return np.asarray(np.any(flags, axis=axis), bool)


def flat(value: Array) -> Array:
    """Tokens [.., N, C] as [B, N, C]."""
    return value.reshape(-1, *value.shape[-2:])


def key_side(question: Question) -> str:
    """Name of the tokens that are keys and values."""
    return "x" if question.y is None else "y"


def keys_of(question: Question) -> Array:
    """The tokens that are keys and values, [.., Nk, Ck]."""
    return question.x if question.y is None else question.y


def apart(question: Question) -> Question:
    """The same question with keys given on their own, so that nothing done to a key is done to a query."""
    alone = question.y is None and question.operator.uses_content
    return question.but(y=question.x.copy()) if alone else question


def unchanged(trial: Trial, name: str, question: Question, got: Array, want: Array, index: object = ...) -> None:
    """Two results whose questions differ only in what must not matter: equal bits; bounds where a subject claims no
    determinism. ``index`` is the part of the result that is given.
    """
    if trial.subject.deterministic:
        trial.same(name, got, want)
    else:
        bound = trial.budget(question).out
        trial.within(name, got, want, 2 * bound.reshape(-1, *bound.shape[-2:])[index])  # type: ignore[call-overload]


def gradients(trial: Trial, question: Question) -> Answer | None:
    """What :meth:`Trial.vjp` says; None where the subject claims results without gradients."""
    try:
        return trial.vjp(question)
    except NotClaimed:
        return None


def tracer(
    layout: Layout, kind: str, generator: np.random.Generator, dtype: str, batch: int = 2, heads: int = 2
) -> Question:
    """Keys are one-hot and values the keys themselves, head by head: feature (h, j) of row i shows whether head h of
    query i sees key j. ``ones`` and ``convolution`` give the number of links, ``mean`` and the two softmaxes (logits
    stay small) weights.
    """
    keys, width = layout.num_keys, heads * layout.num_keys
    value = PerDisplacement(width) if kind == "convolution" else Identity()
    if kind in ("ones", "convolution", "mean"):
        relevance: Relevance = Mean() if kind == "mean" else Ones()
        operator = Operator(layout, 2, heads, value, relevance=relevance, key_dim=width)
    else:
        relative = kind == "relative"
        encoder = PerDisplacement(2 * heads) if relative else Shared(2 * heads)
        relevance = Softmax(bias=BiasTable() if relative else None)
        operator = Operator(layout, 2, heads, value, encoder, encoder, relevance, key_dim=width)
    params: dict[str, FloatArray] = {
        name: rounded(0.5 * generator.standard_normal(shape), dtype) for name, shape in operator.parameters.items()
    }
    if kind == "convolution":
        params["value.table"] = np.broadcast_to(np.eye(width), (layout.num_classes, width, width)).copy()
    x = rounded(generator.standard_normal((batch, layout.num_queries, 2)), dtype)
    y = np.broadcast_to(np.tile(np.eye(keys), heads), (batch, keys, width)).copy()
    return Question(operator, params, x, y, label=f"{kind} tracer")


def traced(question: Question, out: Array) -> Array:
    """The result of a :func:`tracer` as [B, H, Nq, Nk]."""
    layout, heads = question.operator.layout, question.operator.num_heads
    return out.reshape(-1, layout.num_queries, heads, layout.num_keys).transpose(0, 2, 1, 3)


def check_traced(trial: Trial, name: str, kind: str, question: Question, out: Array) -> None:
    """That a tracer's result shows the links that :func:`seen` counts: numbers of links exactly, weights by sight."""
    sight = seen(question)[..., :-1]
    counts = np.where(sight, link_counts(question.operator.layout)[:, :-1], 0)
    found = traced(question, out)
    if kind in ("ones", "convolution"):
        trial.same(f"{name}: links", found, counts)
    else:
        trial.same(f"{name}: whether there is a weight", found != 0, sight)
        exact = trial.budget(question)
        trial.within(f"{name}: weights", out, exact.value, exact.out)
