"""Two questions with one exact answer: how they are derived from one another, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from translution.conformance.comparison import ComparisonError, share
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial
from translution.conformance.exam.question import Array, FloatArray, Question, rounded
from translution.conformance.laws.positions import Label, row_numbers
from translution.conformance.operator_draws import RELEVANCES, is_plain_window
from translution.conformance.strategies import (
    LAYOUT_KINDS,
    draw_layout,
    draw_operator,
    draw_params,
    draw_question,
    draw_values,
)
from translution.spec import (
    Concat,
    Encoder,
    Lattice,
    Layout,
    LowRank,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Rotary,
    Shared,
    Softmax,
    SpecError,
    Sum,
    Vectors,
)
from translution.spec.relevance import branches

Change = Callable[[FloatArray], FloatArray]
_READERS: tuple[Encoder, ...] = (
    PerDisplacement(4),
    PerDisplacement(4, bias=True, groups=2),
    LowRank(2, 4),
    Sum((Shared(4), Vectors(4))),
    Concat((Shared(2), PerDisplacement(2))),
)
# Twice float64's unit roundoff, for each rounding of a law's own sums.
_ROUNDING = 2.0**-52


@dataclass(frozen=True, slots=True)
class Found:
    """An answer, the exact result and the bound of every element."""

    out: FloatArray
    exact: FloatArray
    bound: FloatArray

    def at(self, change: Change) -> Found:
        """All three, with elements chosen or moved."""
        return Found(change(self.out), change(self.exact), change(self.bound))

    def rows(self, index: Sequence[int] | Array) -> Found:
        """The rows of that index."""
        return self.at(lambda part: part[..., np.asarray(index), :])

    def features(self, part: slice) -> Found:
        """Some features of every row."""
        return self.at(lambda value: value[..., part])

    def times(self, matrix: FloatArray, offset: FloatArray | float = 0.0) -> Found:
        """Every row times a matrix, and an offset added."""
        sizes = np.abs(matrix)
        own = _ROUNDING * (len(matrix) + 1) * (np.abs(self.out) @ sizes + np.abs(offset))
        return Found(self.out @ matrix + offset, self.exact @ matrix + offset, self.bound @ sizes + own)

    def plus(self, other: Found) -> Found:
        """The sum of two results."""
        own = _ROUNDING * (np.abs(self.out) + np.abs(other.out))
        return Found(self.out + other.out, self.exact + other.exact, self.bound + other.bound + own)


def ask(trial: Trial, question: Question) -> Found:
    """The subject's result, and what is known of it."""
    # What is not claimed need not be bounded.
    out = trial.run(question).out
    exact = trial.budget(question)
    return Found(out, exact.value, exact.out)


def ask_gradients(trial: Trial, question: Question) -> dict[str, Found]:
    """The subject's gradients by name, and what is known of them."""
    given = trial.vjp(question).gradients
    exact = trial.budget(question)
    return {name: Found(given[name], exact.gradient_values[name], exact.gradients[name]) for name in given}


def agree(trial: Trial, name: str, one: Found, other: Found) -> None:
    """Two results are the same up to the sum of their bounds.

    Raises:
        AssertionError: not even the exact results are, so that the law is wrong.
    """
    allowed = one.bound + other.bound
    try:
        used = share(name, one.exact, other.exact, allowed)
    except ComparisonError as error:
        raise AssertionError(f"the law can't compare its questions: {error}") from error
    if used > 1:
        raise AssertionError(f"{name}: the two questions have different answers")
    trial.within(name, one.out, other.out, allowed)


def compare(trial: Trial, name: str, one: Question, other: Question, change: Change = lambda part: part) -> None:
    """The result of ``one`` is that of ``other``, changed."""
    agree(trial, name, ask(trial, one), ask(trial, other).at(change))


def quarters(generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Multiples of 1/4 from -3/4 to 3/4: sums and products of a few are exact in every dtype."""
    return generator.integers(-3, 4, shape) / 4.0


def in_quarters(draws: Draws, operator: Operator) -> dict[str, FloatArray]:
    """Parameters that are :func:`quarters`."""
    return {n: v / 4 for n, v in draw_params(draws.generator(), operator, "float64", integers=True).items()}


def require_held(trial: Trial, *values: Array) -> None:
    """Reject the case where the dtype can't hold these numbers exactly."""
    for value in values:
        if value.dtype != np.bool_ and not np.array_equal(rounded(value, trial.dtype), value, equal_nan=True):
            trial.draws.reject(f"numbers that {trial.dtype} can't hold")


# Parameters


def is_table(name: str) -> bool:
    """Whether a parameter of that name has one row per class, at axis 0 or, for a bias, at axis 1."""
    return name.rpartition(".")[2] in ("table", "vectors") or is_bias(name)


def is_bias(name: str) -> bool:
    """Whether this is a number per head and class."""
    return name.startswith("relevance.") and name.endswith("bias")


def gathered(
    params: Mapping[str, Array],
    value_rows: Sequence[int],
    key_rows: Sequence[int],
    into: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Tables whose row r is row ``value_rows[r]`` (of the key's tables ``key_rows[r]``) of those given.

    A row of -1 is taken from ``into``, which has the new tables' shapes.
    """
    found = dict(params)
    for name, value in params.items():
        if not is_table(name):
            continue
        rows = np.array(key_rows if name.startswith("key.") else value_rows, int)
        axis = 1 if is_bias(name) else 0
        taken = np.moveaxis(np.take(value, rows, axis), axis, 0)
        if (rows < 0).any():
            assert into is not None
            taken[rows < 0] = np.moveaxis(into[name], axis, 0)[rows < 0]
        found[name] = np.moveaxis(taken, 0, axis)
    return found


def rows_by(
    source: Lattice, target: Lattice, named: Callable[[Label], Label | None] = lambda label: label
) -> tuple[list[int], list[int]]:
    """For :func:`gathered`: the row in ``source`` of each class of ``target``, which is ``named`` differently there;
    -1 where there is none.
    """
    found = []
    for sign in (1, -1):
        rows = row_numbers(source, sign)
        ordered = sorted(row_numbers(target, sign).items(), key=lambda item: item[1])
        names = [named(label) for label, _ in ordered]
        found.append([-1 if name is None else rows.get(name, -1) for name in names])
    return found[0], found[1]


def displacement(label: Label) -> tuple[int, ...]:
    """A label that is no register's, as numbers."""
    return tuple(d for d in label if isinstance(d, int))


def several(layout: Layout) -> bool:
    """Whether there are at least two queries, two keys and two classes."""
    return min(layout.num_queries, layout.num_keys, layout.num_classes) > 1


def is_register(label: Label) -> bool:
    """Whether a class is one of a pair with a register."""
    return label[0] == "register"


def with_features(params: Mapping[str, Array], role: str, change: Callable[[Array], Array]) -> dict[str, Array]:
    """Parameters of a role that end in its features, changed."""
    ends = ("table", "weight", "bias", "vectors", "up")
    found: dict[str, Array] = dict(params)
    low_rank = f"{role}.up" in params
    for name, value in params.items():
        own, last = name.partition(".")[0], name.rpartition(".")[2]
        if own == role and last in (("up",) if low_rank else ends):
            found[name] = change(value)
    return found


# Tokens


def full_mask(question: Question) -> Array | None:
    """The mask at its full shape [.., H, Nq, Nk], or None."""
    return None if question.mask is None else np.broadcast_to(question.mask, question.weights_shape)


def chosen(question: Question, queries: Sequence[int] | Array, keys: Sequence[int] | Array, layout: Layout) -> Question:
    """The same tokens in another order, or some of them, on ``layout``; mask and cotangent go with them."""
    q, k = np.asarray(queries, int), np.asarray(keys, int)
    mask = full_mask(question)
    return question.but(
        operator=replace(question.operator, layout=layout),
        x=question.x[..., q, :],
        y=None if question.y is None else question.y[..., k, :],
        mask=None if mask is None else mask[..., q, :][..., k],
        cotangent=None if question.cotangent is None else question.cotangent[..., q, :],
    )


def tokens_of(layout: Lattice, side: str, arranged: Callable[[Array], Array]) -> Array:
    """Numbers of the tokens, registers first, after the grid of numbers has been ``arranged``."""
    extents = layout.grid if side == "query" else layout.keys
    grid = np.arange(int(np.prod(extents))).reshape(extents)
    return np.concatenate([np.arange(layout.registers), layout.registers + arranged(grid).ravel()])


def embedded(trial: Trial, small: Question, large: Operator, queries: Array, keys: Array) -> Question:
    """``small`` among other tokens of a larger layout, which are masked; its tables among other rows."""
    draws, layout = trial.draws, large.layout
    assert isinstance(layout, Lattice)
    assert isinstance(small.operator.layout, Lattice)
    generator = draws.generator()
    batch = small.x.shape[:-2]
    x = draw_values(generator, (*batch, layout.num_queries, large.dim), trial.dtype)
    x[..., queries, :] = small.x
    y: Array | None = None
    if small.y is not None:
        y = draw_values(generator, (*batch, layout.num_keys, large.keys_dim), trial.dtype)
        y[..., keys, :] = small.y
    mask = full_mask(small)
    inside = np.ones(small.weights_shape, bool) if mask is None else mask
    outside: object = False if inside.dtype == np.bool_ else -np.inf
    shape = (*batch, large.num_heads, layout.num_queries, layout.num_keys)
    full = np.full(shape, outside, inside.dtype)
    full[..., queries[:, None], keys] = inside
    rows = rows_by(small.operator.layout, layout)
    params = gathered(small.params, *rows, into=draw_params(generator, large, trial.dtype))
    return Question(large, params, x, y, full)


# Operators


def unrotated(encoder: Encoder) -> Encoder:
    """The encoder with its rotations taken off."""
    if isinstance(encoder, Rotary):
        return unrotated(encoder.inner)
    if isinstance(encoder, (Sum, Concat)):
        return replace(encoder, parts=tuple(unrotated(part) for part in encoder.parts))
    return encoder


def by_classes(operator: Operator) -> Operator:
    """The operator without what looks at positions themselves: its rotations."""
    query, key = (None if side is None else unrotated(side) for side in (operator.query, operator.key))
    return replace(operator, query=query, key=key)


def draw_reader(
    draws: Draws,
    kinds: Sequence[str] = LAYOUT_KINDS,
    accepted: Callable[[Layout], bool] = several,
    relevances: Sequence[Relevance] = RELEVANCES,
    windows: Sequence[str] = (),
) -> Operator:
    """An operator of two heads on a layout that is ``accepted``. In half of the cases each role reads tables of its
    own; others are any operator or plain attention. With ``windows``, kinds of layouts, one in eight is a convolution.
    """
    kind = draws.walk(("tables", "any", "attention", "tables", "tables", "convolution", "attention", "tables"))
    if kind == "convolution" and windows:
        window = draw_layout(draws, kinds=windows, accepted=lambda found: accepted(found) and is_plain_window(found))
        return Operator(window, 4, 2, PerDisplacement(4), relevance=Ones())
    layout = draw_layout(draws, kinds=kinds, accepted=accepted)
    if kind == "any":
        return draw_operator(draws, layout=layout, relevances=relevances, heads=2)
    if kind == "attention":
        sides: list[Encoder] = [Shared(4, bias=draws.some())] * 3
        relevances = [r for r in relevances if isinstance(r, Softmax) and r.content] or relevances
    else:
        sides = [draws.pick(_READERS) for _ in range(3)]
    start = draws.integer(0, len(relevances) - 1)
    for relevance in (*relevances[start:], *relevances[:start]):
        content = any(isinstance(b, Softmax) and b.content for _, b in branches(relevance))
        query, key = sides[:2] if content else (None, None)
        try:
            return Operator(layout, 4, 2, sides[2], query, key, relevance)
        except SpecError:
            continue
    return draws.reject("no relevance fits the layout")


def question_on(trial: Trial, operator: Operator, **settings: object) -> Question:
    """A question for this operator with a mask in most cases and a batch of two in many."""
    return draw_question(trial.draws, trial.dtype, operator=operator, **settings)  # type: ignore[arg-type]
