"""What moves a result along with it: the grid, the order of tokens, of items and of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question
from translution.conformance.laws.equality import (
    agree,
    ask,
    by_classes,
    chosen,
    compare,
    displacement,
    draw_reader,
    full_mask,
    gathered,
    is_register,
    question_on,
    rows_by,
    several,
    tokens_of,
)
from translution.conformance.laws.positions import Label
from translution.conformance.laws.sight import flat
from translution.conformance.operator_draws import is_convolution
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout
from translution.spec import (
    BiasTable,
    Concat,
    Encoder,
    Lattice,
    Layout,
    LowRank,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Relevance,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.relevance import branches

_GRID_KINDS = (
    "grid", "window", "window-zeros", "registers", "shift", "circular", "window-circular", "cross-grid", "strided",
    "transposed", "window-reflect", "window-replicate", "clip", "line", "window-wide-padding", "dead-rows",
    "causal-axes",
)  # fmt: skip
_EQUAL_KINDS = ("window-circular", "window", "window-zeros", "window-reflect", "window-replicate")
_WINDOW_KINDS = ("window-circular", "window", "window-zeros", "strided", "transposed", "window-replicate")


@law("TRANSLATE", clauses=("L1", "L5", "M1"), kills=("circular-as-zeros", "circular-long-way"))
def translate(trial: Trial) -> None:
    """On a circle nothing is the first place: tokens that are rolled along the grid give the rolled result."""
    draws = trial.draws

    def round_trip(layout: Layout) -> bool:
        own = several(layout) and layout.keys == layout.grid and set(layout.strides) == {1}  # type: ignore[union-attr]
        return own and layout.boundary == "circular" and max(layout.grid) > 1  # type: ignore[union-attr]

    kinds = ("circular", "window-circular")
    question = question_on(trial, by_classes(draw_reader(draws, kinds, round_trip, windows=kinds[1:])))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    steps = [draws.integer(0, n - 1) for n in layout.grid]
    axis = max(range(layout.rank), key=lambda a: layout.grid[a])
    steps[axis] = draws.integer(1, layout.grid[axis] - 1)
    order = tokens_of(layout, "query", lambda grid: np.roll(grid, steps, range(layout.rank)))
    rolled = ask(trial, chosen(question, order, order, layout))
    agree(trial, f"rolled by {steps}", rolled, ask(trial, question).rows(order))


def _flipped(layout: Lattice, axes: set[int]) -> Lattice:
    """The layout seen from the other end of some axes: position p becomes key_stride (m - 1) - p."""
    offset, padding = list(layout.offsets), list(layout.paddings) if layout.kernel_size is not None else []
    for axis in axes:
        last_key = layout.key_strides[axis] * (layout.keys[axis] - 1)
        last_query = layout.strides[axis] * (layout.grid[axis] - 1)
        offset[axis] = last_key - last_query - layout.offsets[axis]
        if padding:
            padding[axis] = layout.dilations[axis] * (layout.window[axis] - 1) - padding[axis]
    return replace(layout, offset=tuple(offset), padding=tuple(padding) if padding else None)


def _negated(bias: Array, axes: set[int]) -> Array:
    """Weights of a quadratic bias for flipped axes."""
    found = bias.copy()
    found[:, sorted(axes)] *= -1
    return found


@law(
    "REFLECT",
    clauses=("L1", "L2", "L3", "L5", "R5"),
    kills=("padding-off-by-one", "row-off-by-one", "window-one-short"),
)
def reflect(trial: Trial) -> None:
    """A grid that is seen from its other end, with flipped tables, gives the flipped result."""
    draws = trial.draws

    def free(layout: Layout) -> bool:
        assert isinstance(layout, Lattice)
        stepping = set(layout.strides) | set(layout.key_strides) != {1} or layout.kernel_size is None
        # The same grid seen from its other end has no offset, as native convolutions want it.
        kept = stepping or layout.keys == layout.grid
        return several(layout) and kept and layout.causal is False and layout.boundary != "shift"

    question = question_on(trial, by_classes(draw_reader(draws, _GRID_KINDS, free, windows=_EQUAL_KINDS)))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    axes = {axis for axis in range(layout.rank) if draws.some()} or {draws.integer(0, layout.rank - 1)}
    other = _flipped(layout, axes)

    def named(label: Label) -> Label:
        if is_register(label):
            return label
        back = tuple(-d if axis in axes else d for axis, d in enumerate(displacement(label)))
        if layout.boundary == "circular" and layout.kernel_size is None:
            back = tuple((d + n // 2) % n - n // 2 for d, n in zip(back, layout.keys, strict=True))
        return back

    params = gathered(question.params, *rows_by(layout, other, named))
    params |= {n: _negated(v, axes) for n, v in params.items() if n.startswith("relevance.") and n.endswith("weight")}
    queries, keys = (tokens_of(layout, side, lambda grid: np.flip(grid, tuple(axes))) for side in ("query", "key"))
    flipped = ask(trial, chosen(question, queries, keys, other).but(params=params))
    agree(trial, f"flipped along {sorted(axes)}", flipped, ask(trial, question).rows(queries))


def transposed(question: Question, order: Sequence[int]) -> tuple[Question, Array]:
    """The question on a grid with its axes in that order, tokens and tables with it, and the order of its rows."""
    layout = question.operator.layout
    assert isinstance(layout, Lattice)

    def turned(value: Any) -> Any:
        return tuple(value[axis] for axis in order) if isinstance(value, tuple) else value

    names = ("grid", "key_grid", "causal", "kernel_size", "stride", "key_stride", "dilation", "padding", "offset")
    other = replace(layout, **{name: turned(getattr(layout, name)) for name in names})
    back = np.argsort(order)
    rows = rows_by(layout, other, lambda label: label if is_register(label) else tuple(label[axis] for axis in back))
    params = gathered(question.params, *rows)
    for name, value in params.items():
        if name.startswith("relevance.") and name.endswith("weight"):
            params[name] = value[:, [*order, layout.rank]]
    queries, keys = (tokens_of(layout, side, lambda grid: grid.transpose(order)) for side in ("query", "key"))
    return chosen(question, queries, keys, other).but(params=params), queries


@law("TRANSPOSE", clauses=("L1", "L2", "L3", "L4", "R5"), kills=("tokens-column-major", "row-off-by-one"))
def transpose(trial: Trial) -> None:
    """A grid with its axes in another order, and tables with rows in that order, gives the result in that order."""
    draws = trial.draws

    def wide(layout: Layout) -> bool:
        return several(layout) and layout.rank > 1 and layout.causal is not True  # type: ignore[union-attr]

    question = question_on(trial, by_classes(draw_reader(draws, _GRID_KINDS, wide, windows=_WINDOW_KINDS)))
    layout = question.operator.layout
    assert isinstance(layout, Lattice)
    turn = draws.integer(1, layout.rank - 1)
    order = [*range(turn, layout.rank), *range(turn)]
    other, queries = transposed(question, order)
    agree(trial, f"axes in order {order}", ask(trial, other), ask(trial, question).rows(queries))


@law("PERMUTE", clauses=("L8", "M1"), kills=("pair-table-half",))
def permute(trial: Trial) -> None:
    """Tokens of a pair table have no order: with its rows and columns in another one, the result is in that order."""
    draws = trial.draws
    question = question_on(trial, draw_reader(draws, ("graph", "cross-graph")))
    layout = question.operator.layout
    assert isinstance(layout, PairTable)
    generator = draws.generator()
    queries, keys = (generator.permutation(n) for n in (layout.num_queries, layout.num_keys))
    if question.y is None:
        keys = queries

    def moved(table: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, np.asarray(table)[np.ix_(queries, keys)].tolist()))

    given = layout.reversed_classes()
    mirrored = layout.key_classes is None and question.y is None
    other = PairTable(moved(layout.classes), layout.num_classes, None if mirrored else moved(given))
    permuted = ask(trial, chosen(question, queries, keys, other))
    agree(trial, "tokens in another order", permuted, ask(trial, question).rows(queries))


@law("RELABEL", clauses=("L8", "L3"), kills=("pair-table-descending",))
def relabel(trial: Trial) -> None:
    """Numbers of classes are names: a pair table with other numbers, and tables with rows in that order, gives the same
    result.
    """
    draws = trial.draws
    question = question_on(trial, draw_reader(draws, ("graph", "cross-graph")))
    layout = question.operator.layout
    assert isinstance(layout, PairTable)
    old = draws.generator().permutation(layout.num_classes)
    new = np.argsort(old)

    def renamed(table: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(-1 if c < 0 else int(new[c]) for c in row) for row in table)

    explicit = draws.some()
    given = layout.reversed_classes() if explicit or layout.key_classes is not None else None
    other = PairTable(renamed(layout.classes), layout.num_classes, None if given is None else renamed(given))
    params = gathered(question.params, old.tolist(), old.tolist())
    renumbered = question.but(operator=replace(question.operator, layout=other), params=params)
    compare(trial, "classes with other numbers", renumbered, question)


def _item(question: Question, index: Any) -> Question:
    """Items of the batch; the mask's own batch dimensions go with them."""
    mask = full_mask(question)
    parts = {"x": question.x, "y": question.y, "mask": mask}
    return question.but(**{name: None if part is None else part[index] for name, part in parts.items()})


@law("BATCH", clauses=("M6", "O1"), kills=("batch-shares-keys", "mask-first-batch"))
def batch(trial: Trial) -> None:
    """Items of a batch know nothing of each other: in another order they give the results in that order, alone each
    gives its own, and two batch dimensions are one of all items.
    """
    draws = trial.draws
    operator = draw_reader(draws, windows=_EQUAL_KINDS)
    question = question_on(trial, operator, masked=False, batch=draws.pick(((3,), (2, 2), (2,), (4,))))
    if not is_convolution(operator) and draws.walk((True, True, False)):
        question = question.but(mask=draws.generator().random(question.weights_shape) < 0.7)
    whole = ask(trial, question)
    order = draws.generator().permutation(len(question.x))
    moved = ask(trial, _item(question, order))
    agree(trial, "items in another order", moved, whole.at(lambda part: part[order]))
    item = draws.integer(0, len(question.x) - 1)
    alone = ask(trial, _item(question, item))
    agree(trial, f"item {item} alone", alone, whole.at(lambda part: part[item]))
    if question.x.ndim > 3:
        mask = full_mask(question)
        y = None if question.y is None else flat(question.y)
        flattened = None if mask is None else mask.reshape(-1, *mask.shape[-3:])
        one = ask(trial, question.but(x=flat(question.x), y=y, mask=flattened))
        agree(trial, "one batch dimension", one, whole.at(flat))


_BY_HEAD: tuple[Encoder, ...] = (
    PerDisplacement(4),
    Shared(4, bias=True),
    Sum((Shared(4), Vectors(4, shared_heads=True))),
    Concat((PerDisplacement(2), Sum((Shared(2), Vectors(2))))),
    LowRank(3, 4),
)
_HEAD_RELEVANCES: tuple[Relevance, ...] = (
    Softmax(bias=BiasTable()),
    Softmax(),
    Mixture(Softmax(), Softmax(content=False, bias=BiasTable())),
    Mean(),
    Softmax(scale=2.0, bias=SlopeBias((0.75, -0.5))),
    Ones(),
    Softmax(bias=QuadraticBias()),
)


def _narrowed(encoder: Encoder) -> Encoder:
    """The encoder of one of two heads."""
    if isinstance(encoder, (Sum, Concat)):
        return replace(encoder, parts=tuple(_narrowed(part) for part in encoder.parts))
    assert isinstance(encoder, (Shared, PerDisplacement, Vectors, LowRank))
    assert encoder.features is not None
    return replace(encoder, features=encoder.features // 2)


def _of_head(one: Operator, params: dict[str, Array], head: int) -> dict[str, Array]:
    """Parameters of one head out of two: its slice of features, or its row."""
    found: dict[str, Array] = {}
    for name, shape in one.parameters.items():
        value = params[name]
        if name.startswith("relevance."):
            found[name] = value[head : head + 1]
        else:
            width = shape[-1]
            found[name] = value if value.shape == shape else value[..., head * width : (head + 1) * width]
    return found


@law(
    "HEADS",
    clauses=("E2", "E7", "E9", "O1", "R4", "R5", "M6"),
    kills=("heads-interleaved", "heads-share-weights", "shared-heads-once", "concat-not-per-head", "bias-first-head"),
)
def heads(trial: Trial) -> None:
    """Heads know nothing of each other: two heads are two operators of one head each, with their slices of features,
    biases, slopes, gates and masks, and their results stand side by side.
    """
    draws = trial.draws
    native = draws.walk((None, None, "attention", None, "convolution"))
    relevance = draws.walk(_HEAD_RELEVANCES)
    kinds, sides = LAYOUT_KINDS, [draws.pick(_BY_HEAD) for _ in range(3)]
    if native == "attention":
        relevance, sides = Softmax(), [_BY_HEAD[1]] * 3
    elif native == "convolution":
        relevance, kinds, sides = Ones(), _WINDOW_KINDS, [_BY_HEAD[0]] * 3
    biases = [branch.bias for _, branch in branches(relevance) if isinstance(branch, Softmax)]
    if any(isinstance(bias, (SlopeBias, QuadraticBias)) for bias in biases):
        kinds = tuple(k for k in kinds if k not in ("graph", "cross-graph", "clip", "log-buckets"))
    layout = draw_layout(draws, kinds=kinds, accepted=several)
    content = any(isinstance(branch, Softmax) and branch.content for _, branch in branches(relevance))
    query, key = sides[:2] if content else (None, None)
    operator = Operator(layout, 3, 2, sides[2], query, key, relevance)
    question = question_on(trial, operator)
    mask = full_mask(question)
    parts = []
    for head in range(2):
        own = relevance
        if isinstance(own, Softmax) and isinstance(own.bias, SlopeBias) and own.bias.slopes is not None:
            own = replace(own, bias=SlopeBias((own.bias.slopes[head],)))
        query, key = (None if side is None else _narrowed(side) for side in (operator.query, operator.key))
        single = Operator(layout, 3, 1, _narrowed(operator.value), query, key, own)
        params = _of_head(single, dict(question.params), head)
        masked = None if mask is None else mask[..., head : head + 1, :, :]
        parts.append(ask(trial, question.but(operator=single, params=params, mask=masked)))
    whole = ask(trial, question)
    for head, part in enumerate(parts):
        features = slice(2 * head, 2 * head + 2)
        agree(trial, f"head {head}", whole.features(features), part)
