"""What an encoder is made of: one that is composed of others equals one table written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array
from translution.conformance.laws.equality import (
    agree,
    ask_gradients,
    compare,
    in_quarters,
    quarters,
    question_on,
    require_held,
)
from translution.conformance.operator_draws import is_plain_window
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout
from translution.spec import (
    Concat,
    Encoder,
    Identity,
    Layout,
    LowRank,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Shared,
    Softmax,
    Sum,
    Vectors,
)

Params = Mapping[str, Array]
Relay = Callable[[Params, int], Params]

HEADS = 2
PLAIN_KINDS = ("grid", "registers", "causal-line", "causal-grid", "line")
_WINDOWS = ("window", "window-zeros", "window-circular", "window-reflect", "strided", "transposed", "window-replicate")


def _roles(draws: Draws, kinds: tuple[str, ...]) -> tuple[tuple[str, ...], Layout]:
    """Which roles are looked at, and a layout. One case in six could be a convolution, one plain attention."""
    roles = draws.walk((("value",), ("query", "key", "value"), ("key",), ("value", "key"), ("query",), ("all",)))
    if roles == ("all",):
        return ("query", "key", "value"), draw_layout(draws, kinds=PLAIN_KINDS)
    if roles == ("value",):
        windows = tuple(k for k in _WINDOWS if k in kinds)
        return roles, draw_layout(draws, kinds=windows, accepted=is_plain_window)
    return roles, draw_layout(draws, kinds=kinds)


def _rewritten(
    trial: Trial,
    name: str,
    left: Encoder,
    right: Encoder,
    relay: Relay,
    *,
    channels: int = 4,
    kinds: tuple[str, ...] = LAYOUT_KINDS,
    constant: bool = False,
) -> None:
    """An operator with ``left`` in some roles equals one with ``right`` there, whose parameters ``relay`` gives.

    With ``constant`` the last channel of every token is 1.
    """
    draws = trial.draws
    roles, layout = _roles(draws, kinds)
    features = 4
    rest = Shared(features) if isinstance(left, (Shared, Identity)) else PerDisplacement(features)
    sides: dict[str, Any] = {role: left if role in roles else rest for role in ("query", "key", "value")}
    relevance = Ones() if roles == ("value",) else Softmax()
    if roles == ("value",):
        sides = {"value": left}
    operator = Operator(layout, channels, HEADS, relevance=relevance, **sides)
    question = question_on(trial, operator, masked=False if roles == ("value",) else None)
    if constant:
        for tokens in (question.x, question.y):
            if tokens is not None:
                tokens[..., -1] = 1.0
    own = in_quarters(draws, operator)
    moved = {n: v for n, v in own.items() if n.partition(".")[0] not in roles}
    for role in roles:
        part = {n.partition(".")[2]: v for n, v in own.items() if n.startswith(f"{role}.")}
        moved |= {f"{role}.{n}": np.asarray(v) for n, v in relay(part, layout.num_classes).items()}
    require_held(trial, *moved.values())
    changed: dict[str, Any] = dict.fromkeys(roles, right)
    other = replace(operator, **changed)
    compare(
        trial, f"{name} in {', '.join(roles)}", question.but(params=own), question.but(operator=other, params=moved)
    )


def biased(own: Params, params: Params) -> Params:
    """``params`` with the bias of ``own`` if it has one."""
    return {**params, "bias": own["bias"]} if "bias" in own else params


def repeated(matrix: Array, count: int) -> Array:
    """A table of ``count`` equal rows."""
    return np.repeat(matrix[None], count, axis=0)


@law("SHARED-IS-TABLE", clauses=("E4", "E5"), kills=("shared-bias-twice",))
def shared_is_table(trial: Trial) -> None:
    """A shared matrix does what a table does in which every row is that matrix."""
    bias, groups = trial.draws.some(), trial.draws.pick((1, 2))
    _rewritten(
        trial,
        "one matrix against a table of equal rows",
        Shared(4, bias=bias, groups=groups),
        PerDisplacement(4, bias=bias, groups=groups),
        lambda own, count: biased(own, {"table": repeated(own["weight"], count)}),
    )


@law("SHARED-IS-TABLE-GRADIENT", clauses=("E4", "E5", "B1"), kills=("tied-last-wins",))
def shared_is_table_gradient(trial: Trial) -> None:
    """The gradient of a shared matrix is the sum over the rows of a table's gradient whose rows are that matrix; the
    tokens' gradients are the same.
    """
    draws = trial.draws
    layout = draw_layout(draws)
    content = draws.walk((True, False))
    shared, table = Shared(4), PerDisplacement(4)
    relevance: Relevance = Softmax() if content else Ones()
    sides: dict[str, Any] = dict.fromkeys(("query", "key") if content else (), shared)
    one = Operator(layout, 4, HEADS, shared, relevance=relevance, **sides)
    changed: dict[str, Any] = dict.fromkeys(("value", *sides), table)
    other = replace(one, **changed)
    question = question_on(trial, one, cotangent=True)
    written = {n.replace("weight", "table"): repeated(v, layout.num_classes) for n, v in question.params.items()}
    left, right = ask_gradients(trial, question), ask_gradients(trial, question.but(operator=other, params=written))
    ones = np.ones((1, layout.num_classes))
    for name, found in left.items():
        if name in ("x", "y"):
            agree(trial, f"gradient of {name}", found, right[name])
            continue
        rows = right[name.replace("weight", "table")].at(lambda part: part.reshape(len(part), -1).T)
        total = rows.times(ones.T).at(lambda part, shape=found.out.shape: part.reshape(shape))  # type: ignore[misc]
        agree(trial, f"gradient of {name}", found, total)


@law("LOW-RANK", clauses=("E6",), kills=("low-rank-transposed", "low-rank-first-class"))
def low_rank(trial: Trial) -> None:
    """A low-rank encoder does what the table of its products does, down times small matrix times up."""
    up = trial.draws.walk((True, True, False))

    def composed(own: Params, _count: int) -> Params:
        table = own["down"] @ own["table"]
        return {"table": table @ own["up"] if "up" in own else table}

    left = LowRank(trial.draws.pick((2, 3)), 4) if up else LowRank(4)
    _rewritten(trial, "low rank against its products", left, PerDisplacement(4), composed)


@law("SUM", clauses=("E8",), kills=("sum-first-part-only",))
def summed(trial: Trial) -> None:
    """A sum of encoders does what one does whose matrices and biases are the sums of theirs."""
    bias = trial.draws.some()

    def added(own: Params, count: int) -> Params:
        tables = own["0.table"] + repeated(own["1.weight"], count) + own["2.down"] @ own["2.table"]
        return {"table": tables, "bias": own["0.bias"] + own.get("1.bias", 0)}

    def both(own: Params, _count: int) -> Params:
        return {"table": own["0.table"] + own["1.table"]}

    kinds = Sum((PerDisplacement(4, bias=True), Shared(4, bias=bias), LowRank(4)))
    twice = Sum((PerDisplacement(4), PerDisplacement(4)))
    doubled = twice, PerDisplacement(4), both
    left, right, relay = trial.draws.walk(((kinds, PerDisplacement(4, bias=True), added), doubled, doubled))
    _rewritten(trial, "a sum against added tables", left, right, relay)


@law("CONCAT", clauses=("E2", "E9"), kills=("concat-not-per-head", "concat-parts-reversed"))
def concatenated(trial: Trial) -> None:
    """A concatenation has, head by head, the columns of its parts one after another: one table with its columns in that
    order does the same, also where the other side of the inner product is no concatenation.
    """

    def joined(own: Params, count: int) -> Params:
        parts = [own["0.table"], repeated(own["1.weight"], count)]
        by_head = [part.reshape(*part.shape[:-1], HEADS, -1) for part in parts]
        return {"table": np.concatenate(by_head, axis=-1).reshape(*parts[0].shape[:-1], -1)}

    left = Concat((PerDisplacement(2), Shared(2)))
    _rewritten(trial, "a concatenation against its columns in order", left, PerDisplacement(4), joined)


@law("VECTORS", clauses=("E7",), kills=("shared-heads-once", "vectors-missing"))
def vectors(trial: Trial) -> None:
    """A vector per class does what a table does that reads it from a channel which is 1 in every token; with shared
    heads each head has the same.
    """
    shared_heads = trial.draws.walk((True, False))

    def read(own: Params, count: int) -> Params:
        each = own["1.vectors"]
        table = repeated(own["0.weight"], count)
        table[:, -1] += np.tile(each, HEADS) if shared_heads else each
        return {"table": table}

    # A zero token has a vector and no channel that is 1.
    kinds = tuple(k for k in LAYOUT_KINDS if k not in ("window-zeros", "window-wide-padding", "strided"))
    left = Sum((Shared(4), Vectors(4, shared_heads=shared_heads)))
    _rewritten(trial, "vectors against a constant channel", left, PerDisplacement(4), read, kinds=kinds, constant=True)


@law("GROUPS", clauses=("E4", "E5"), kills=("groups-swapped",))
def groups(trial: Trial) -> None:
    """Matrices in groups do what block-diagonal matrices do: group g takes the g-th slice of channels to the g-th slice
    of features.
    """
    count, channels = trial.draws.pick(((2, 4), (2, 6), (4, 4)))

    def blocks(own: Params, _count: int) -> Params:
        name = "table" if "table" in own else "weight"
        parts = own[name]
        full = np.zeros((*parts.shape[:-3], channels, 4))
        inputs, outputs = channels // count, 4 // count
        for g in range(count):
            full[..., g * inputs : (g + 1) * inputs, g * outputs : (g + 1) * outputs] = parts[..., g, :, :]
        return biased(own, {name: full})

    kind = PerDisplacement if trial.draws.pick((True, True, False)) else Shared
    _rewritten(trial, "groups against blocks", kind(4, groups=count), kind(4), blocks, channels=channels)


@law("IDENTITY", clauses=("E3",), kills=("identity-bias-missing",))
def identity(trial: Trial) -> None:
    """The identity does what the unit matrix does, with the same bias if there is one."""
    bias = trial.draws.walk((True, False))
    _rewritten(
        trial,
        "identity against the unit matrix",
        Identity(bias=bias),
        Shared(4, bias=bias),
        lambda own, _count: biased(own, {"weight": np.eye(4)}),
    )


@law("BIAS-CHANNEL", clauses=("E1", "E4", "E5"), kills=("role-bias-missing",))
def bias_channel(trial: Trial) -> None:
    """An encoder's bias does what one more row of every matrix does, read from a channel that is 1 in every token."""
    kind = PerDisplacement if trial.draws.walk((True, False)) else Shared

    def read(own: Params, _count: int) -> Params:
        name = "table" if "table" in own else "weight"
        matrix = own[name].copy()
        matrix[..., -1, :] += own["bias"]
        return {name: matrix}

    kinds = tuple(k for k in LAYOUT_KINDS if k not in ("window-zeros", "window-wide-padding", "strided"))
    _rewritten(trial, "bias against a channel", kind(4, bias=True), kind(4), read, kinds=kinds, constant=True)


@law("ABSORB", clauses=("E1", "E5", "R6"), kills=("tokens-clipped",))
def absorb(trial: Trial) -> None:
    """Tokens times a matrix, given to an operator, do what the tokens do if each of its matrices has that factor."""
    draws = trial.draws
    encoders: tuple[Encoder, ...] = (PerDisplacement(4), Shared(4))
    encoder = draws.pick(encoders)
    wide, narrow = draws.pick(((3, 2), (2, 4), (5, 3)))
    operator = Operator(draw_layout(draws), wide, HEADS, encoder, encoder, encoder)
    question = question_on(trial, operator)
    inner = replace(operator, dim=narrow)
    generator = draws.generator()
    factor = quarters(generator, (wide, narrow)) * 4
    params = in_quarters(draws, inner)
    whole = {name: factor @ value for name, value in params.items()}
    x, y = (None if t is None else quarters(generator, t.shape) for t in (question.x, question.y))
    assert x is not None
    inside = x @ factor, None if y is None else y @ factor
    require_held(trial, *whole.values(), *(t for t in inside if t is not None))
    outer = question.but(params=whole, x=x, y=y)
    compare(trial, "the factor in the matrices against the factor in the tokens", outer,
            question.but(operator=inner, params=params, x=inside[0], y=inside[1]))  # fmt: skip
