"""Rotated queries and keys (clause E10), without a sine: what shifts, order of features and steps must not change."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.laws.equality import (
    agree,
    ask,
    compare,
    embedded,
    question_on,
    several,
    tokens_of,
    with_features,
)
from translution.conformance.laws.symmetries import transposed
from translution.conformance.strategies import draw_layout
from translution.spec import (
    BiasTable,
    Encoder,
    Lattice,
    Layout,
    LowRank,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.encoders import Pairing

_HEADS = 2
_BASES = (10000.0, 3.0)


def _rotated(draws: Draws, layout: Layout, width: int, base: float, pairing: Pairing) -> Operator:
    """An operator whose queries and keys are rotated; in every second case it is plain attention."""
    features = _HEADS * width
    inner: tuple[Encoder, ...] = (Shared(features, bias=True),)
    if draws.walk((True, False)):
        inner = (
            PerDisplacement(features),
            Shared(features),
            Sum((Shared(features), Vectors(features))),
            LowRank(2, features),
        )
    query, key = (Rotary(draws.pick(inner), base, pairing) for _ in range(2))
    return Operator(layout, 4, _HEADS, Shared(4), query, key, Softmax(bias=draws.pick((None, BiasTable()))))


@law("ROTARY-SHIFT", clauses=("E10", "L1"), kills=("rotary-key-unrotated",))
def rotary_shift(trial: Trial) -> None:
    """Rotated logits depend on displacements alone: the same tokens elsewhere in a larger grid, whose others are
    masked, give the same rows.
    """
    draws = trial.draws

    def plain(layout: Layout) -> bool:
        assert isinstance(layout, Lattice)
        return several(layout) and layout.keys == layout.grid and not layout.registers and layout.rank < 3

    layout = draw_layout(draws, kinds=("line", "grid", "causal-line", "causal-grid", "window"), accepted=plain)
    assert isinstance(layout, Lattice)
    width = 2 * layout.rank * draws.pick((1, 2))
    operator = _rotated(draws, layout, width, draws.pick(_BASES), draws.pick(get_args(Pairing)))
    corner = [draws.integer(1, 2) for _ in layout.grid]
    larger = replace(layout, grid=tuple(n + c for n, c in zip(layout.grid, corner, strict=True)), key_grid=None)
    part = tuple(slice(c, None) for c in corner)
    tokens = tokens_of(larger, "query", lambda grid: grid[part])
    small = question_on(trial, operator)
    large = embedded(trial, small, replace(operator, layout=larger), tokens, tokens)
    agree(trial, f"shifted by {corner}", ask(trial, small), ask(trial, large).rows(tokens))


@law("ROTARY-PAIRING", clauses=("E10", "E2"), kills=("rotary-pairing",))
def rotary_pairing(trial: Trial) -> None:
    """The two pairings differ in the order of features: pair n of a head is (n, n + width / 2) or (2n, 2n + 1)."""
    draws = trial.draws
    layout = draw_layout(draws, kinds=("grid", "line", "registers", "cross-grid", "window"), accepted=several)
    assert isinstance(layout, Lattice)
    width = 4 * layout.rank
    base = draws.pick(_BASES)
    operator = _rotated(draws, layout, width, base, "interleaved")
    question = question_on(trial, operator)
    each = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    order = np.concatenate([each + head * width for head in range(_HEADS)])
    params = question.params
    sides = {}
    for role in ("query", "key"):
        params = with_features(params, role, lambda value: value[..., order])
        sides[role] = replace(getattr(operator, role), pairing="half")
    other = question.but(operator=replace(operator, **sides), params=params)
    compare(trial, "halves against neighbours", other, question)


@law("ROTARY-AXES", clauses=("E10", "L1"), kills=("rotary-axes-swapped",))
def rotary_axes(trial: Trial) -> None:
    """The angles of each axis stand one after another: a transposed grid, with the features of the axes exchanged,
    gives the transposed result, and features of the first axis alone do not see where a token stands on the second.
    """
    draws = trial.draws

    def flat(layout: Layout) -> bool:
        return several(layout) and isinstance(layout, Lattice) and layout.rank == 2 and min(layout.grid) > 1

    layout = draw_layout(draws, kinds=("grid", "registers", "cross-grid", "causal-axes", "window"), accepted=flat)
    assert isinstance(layout, Lattice)
    if layout.causal is True:
        draws.reject("raster order")
    width = draws.pick((4, 8))
    operator = _rotated(draws, layout, width, draws.pick(_BASES), "half")
    question = question_on(trial, operator)
    angles = width // 4
    # Features by half, axis and angle.
    places = np.arange(_HEADS * width).reshape(_HEADS, 2, 2, angles)
    other, queries = transposed(question, (1, 0))
    params = other.params
    for role in ("query", "key"):
        params = with_features(params, role, lambda value: value[..., places[:, :, ::-1].ravel()])
    agree(trial, "axes exchanged", ask(trial, other.but(params=params)), ask(trial, question).rows(queries))
    _one_axis(trial, width)


def _one_axis(trial: Trial, width: int) -> None:
    """On a grid whose queries and keys have features of the first axis only, with one matrix for all displacements, the
    tokens of a row of the grid can be exchanged.
    """
    draws = trial.draws
    layout = Lattice(draws.pick(((2, 3), (3, 2), (3, 3))))
    features = _HEADS * width
    side = Rotary(Shared(features), draws.pick(_BASES), "half")
    question = question_on(trial, Operator(layout, 4, _HEADS, Shared(4), side, side), masked=False, self_only=True)
    first = np.zeros((_HEADS, 2, 2, width // 4))
    first[:, :, 0] = 1.0
    params = question.params
    for role in ("query", "key"):
        params = with_features(params, role, lambda value: value * first.ravel())
    grid = np.arange(layout.num_queries).reshape(layout.grid)
    order = grid[:, ::-1].ravel()
    question = question.but(params=params)
    moved = question.but(x=question.x[..., order, :])
    agree(trial, "features of the first axis", ask(trial, moved), ask(trial, question).rows(order))


@law("ROTARY-BASE", clauses=("E10",), kills=("rotary-base",))
def rotary_base(trial: Trial) -> None:
    """With n angles for each axis and base 2^n, angle k turns at 2^-k per step: alone on a lattice of 2^k steps it does
    what a single angle does on a lattice of one.
    """
    draws = trial.draws
    grid = draws.pick(((4,), (2, 3), (5,)))
    axes, registers = len(grid), draws.pick((0, 1))
    count = draws.pick((2, 3, 4))
    chosen = draws.integer(1, count - 1)
    step = 2**chosen
    pairing = draws.pick(get_args(Pairing))
    near = Lattice(grid, registers=registers, offset=draws.pick((0, 1)), key_grid=grid)
    far = replace(near, stride=step, key_stride=step, offset=tuple(step * o for o in near.offsets))
    narrow, wide = 2 * axes, 2 * axes * count
    one = Rotary(Shared(_HEADS * narrow), 10000.0, pairing)
    many = Rotary(Shared(_HEADS * wide), 2.0**count, pairing)
    operator = Operator(near, 4, _HEADS, Shared(4), one, one, Softmax(scale=0.5))
    question = question_on(trial, operator)
    pairs = np.arange(axes)
    features = np.arange(wide).reshape((2, axes, count) if pairing == "half" else (axes, count, 2))
    places = features[:, pairs, chosen] if pairing == "half" else features[pairs, chosen, :]
    params = dict(question.params)
    for role in ("query", "key"):
        columns = np.zeros((4, _HEADS, wide))
        columns[:, :, places.ravel()] = params[f"{role}.weight"].reshape(4, _HEADS, narrow)
        params[f"{role}.weight"] = columns.reshape(4, -1)
    other = question.but(operator=replace(operator, layout=far, query=many, key=many), params=params)
    compare(trial, f"angle {chosen} of {count}", other, question)
