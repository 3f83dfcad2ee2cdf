"""Absent tokens, whatever they hold; live ones that are not a number; rows without a key."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question, rounded
from translution.conformance.laws.definition import defined_gradients
from translution.conformance.laws.sight import (
    BATCHES,
    BoolArray,
    apart,
    flat,
    gradients,
    key_side,
    keys_of,
    link_counts,
    seen,
    some,
    unchanged,
)
from translution.conformance.operator_draws import draw_operator, is_convolution
from translution.conformance.strategies import draw_question
from translution.normal_form import normal_form
from translution.spec import (
    BiasTable,
    Encoder,
    Identity,
    Lattice,
    LowRank,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Shared,
    Softmax,
)
from translution.spec.relevance import branches

# Windows that leave tokens out: keys, as many of them seen as there are queries or fewer, or queries, or both.
_UNLINKED = (
    Lattice((2, 3), key_grid=(4, 5), kernel_size=1, stride=2),
    Lattice((2,), key_grid=(7,), kernel_size=2, stride=4, padding=0),
    Lattice((3,), key_grid=(4,), kernel_size=1, offset=2),
    Lattice((3,), key_grid=(3,), kernel_size=3, stride=3, padding=0),
    Lattice((3,), key_grid=(3,), kernel_size=1, stride=2, boundary="replicate"),
    Lattice((4,), key_grid=(2,), kernel_size=1),
    Lattice((3,), key_grid=(2,), kernel_size=1, padding=2, boundary="zeros"),
)


def _with_absent_keys(draws: Draws, question: Question) -> Question:
    """Some keys of every item masked for all queries, by a mask of its own or beside the one that is there."""
    batch, keys = question.x.shape[:-2], question.operator.layout.num_keys
    generator = draws.generator()
    gone = generator.random((*batch, 1, 1, keys)) < 0.4
    softmax = all(isinstance(branch, Softmax) for _, branch in branches(question.operator.relevance))
    as_numbers = softmax and draws.some()
    if question.mask is None:
        return question.but(mask=np.where(gone, -np.inf, 0.0) if as_numbers else ~gone)
    full = np.broadcast_to(question.mask, question.weights_shape)
    return question.but(mask=full & ~gone if full.dtype == np.bool_ else np.where(gone, -np.inf, full))


def _absent(draws: Draws, dtype: str, cotangent: bool) -> tuple[Question, Question, dict[str, BoolArray]]:
    """A question, the same with NaN, infinities and huge numbers in every token that nothing sees, and where they are.

    Tokens that are queries and keys at once are absent where neither side is live. In every second case no
    mask is needed, since the layout leaves tokens without a link.
    """
    layout = draws.walk((draws.walk(_UNLINKED), None))
    operator = draw_operator(draws, layout=layout)
    if layout is not None and draws.walk((True, True, False)):
        operator = Operator(layout, 3, 2, Shared(4), Shared(4), Shared(4), Softmax())
    masked = None if layout is None else False
    question = draw_question(
        draws, dtype, operator=operator, masked=masked, batch=draws.pick(BATCHES), cotangent=cotangent
    )
    if layout is None and not is_convolution(operator):
        question = _with_absent_keys(draws, question)
    sight = seen(question)
    keys, queries = ~some(sight[..., :-1], (1, 2)), ~some(sight, (1, 3))
    if question.y is None and question.operator.uses_content and not (keys & queries).any():
        question = apart(question)
    if question.y is not None:
        absent = {"x": queries, "y": keys}
    else:
        absent = {"x": keys & queries if question.operator.uses_content else keys}
    if not any(part.any() for part in absent.values()):
        draws.reject("every token is seen")
    generator = draws.generator()
    rough = rounded([np.nan, np.inf, -np.inf, 1e30, 6e4], dtype)
    tokens = {"x": question.x} if question.y is None else {"x": question.x, "y": question.y}

    def filled(name: str, junk: bool) -> Array:
        value, where = tokens[name], absent[name].reshape(*tokens[name].shape[:-1], 1)
        return np.where(where, rough[generator.integers(0, len(rough), value.shape)] if junk else 0.0, value)

    clean = question.but(**{name: filled(name, False) for name in tokens})
    return clean, question.but(**{name: filled(name, True) for name in tokens}), absent


@law("ABSENT", clauses=("M3", "M4"), kills=("absent-times-zero", "dead-row-mean"), quick=8)
def absent_tokens(trial: Trial) -> None:
    """A key that no query may see, and a query without a live key, may hold NaN, infinity or any number: the result is
    the same, bit for bit, as with zeros there.
    """
    clean, rough, _ = _absent(trial.draws, trial.dtype, False)
    want, got = trial.run(clean).out, trial.run(rough).out
    unchanged(trial, "result with NaN and infinities in absent tokens", clean, flat(got), flat(want))


@law("ABSENT-GRADIENT", clauses=("M3", "M4"), kills=("absent-gradient-nan",), quick=14)
def absent_gradient(trial: Trial) -> None:
    """With NaN or infinity in tokens that nothing sees all gradients are finite and those of a clean question, and
    these tokens' own gradients are exactly 0.
    """
    clean, rough, absent = _absent(trial.draws, trial.dtype, True)
    want, got, exact = trial.vjp(clean), trial.vjp(rough), trial.budget(clean)
    for name, gradient in got.gradients.items():
        trial.require(bool(np.isfinite(gradient).all()), f"gradient of {name} is not finite")
        trial.within(f"gradient of {name}", gradient, want.gradients[name], 2 * exact.gradients[name])
    for name, where in absent.items():
        own = flat(got.gradients[name])[where]
        trial.same(f"gradient of absent tokens of {name}", own, 0 * own)


def _by_heads(draws: Draws, dtype: str) -> Question:
    """A question whose heads can be told apart in the result, and all of whose features depend on every key."""
    values: tuple[Encoder, ...] = (PerDisplacement(4), Shared(4, bias=True), LowRank(3, 4), Identity())
    relevances: tuple[Relevance, ...] = (
        Softmax(), Ones(), Mean(), Softmax(scale=0.5), Mixture(Ones(), Softmax()), Mixture(Softmax(), Mean()), Softmax()
    )  # fmt: skip
    encoders: tuple[Encoder, ...] = (PerDisplacement(4), Shared(4), Identity())
    value, relevance = draws.walk(values), draws.walk(relevances)
    # A key that is NaN beside a value that is not.
    sides = Shared(4) if isinstance(value, Identity) else draws.pick(encoders)
    content = any(isinstance(branch, Softmax) for _, branch in branches(relevance))
    layout = draws.walk(
        (
            Lattice((5,), kernel_size=3, boundary="circular"),
            Lattice((4,), causal=True, registers=1),
            Lattice((3, 2), kernel_size=(3, 2)),
            Lattice((2, 3)),
            Lattice((2, 2), kernel_size=3, boundary="zeros"),
        )
    )
    more: dict[str, Any] = {"query": sides, "key": sides} if content else {}
    operator = Operator(layout, 4, 2, value, relevance=relevance, **more)
    return apart(draw_question(draws, dtype, operator=operator, masked=False, batch=(2,)))


@law(
    "ABSENT-PAIR",
    clauses=("E2", "M4"),
    kills=("mask-first-head", "absent-times-zero", "live-nan-spreads", "nan-to-num"),
)
def absent_pair(trial: Trial) -> None:
    """NaN in a key that is masked for some heads and rows only reaches exactly the heads of rows that see it, and
    leaves every bit of the others. Masked pairs have weight 0 in these rows too.
    """
    question = _by_heads(trial.draws, trial.dtype)
    operator, generator = question.operator, trial.draws.generator()
    live = generator.random(question.weights_shape) < 0.6
    softmax = all(isinstance(branch, Softmax) for _, branch in branches(operator.relevance))
    added = np.where(live, rounded(generator.standard_normal(live.shape), trial.dtype), -np.inf)
    item, key = trial.draws.integer(0, 1), trial.draws.integer(0, operator.layout.num_keys - 1)
    clean, broken = keys_of(question).copy(), keys_of(question).copy()
    clean[item, key] = broken[item, key] = 0.0
    # The logits of a head read half of its channels at least, or all; where there are none, a value may read one alone.
    apart_by = 1 if not operator.uses_content else 4 if operator.query == Shared(4) else trial.draws.pick((1, 2))
    broken[item, key, ::apart_by] = np.nan
    question = question.but(mask=added if softmax and trial.draws.some() else live, **{key_side(question): clean})
    question = question.but(return_weights=trial.draws.walk((True, False)))
    visible = seen(question)
    sight = np.zeros((2, operator.layout.num_queries, 2), bool)
    sight[item] = visible[item, :, :, key].T
    want = trial.run(question).out
    answer = trial.run(question.but(**{key_side(question): broken}))
    got = answer.out
    if answer.weights is not None:
        masked = answer.weights[~visible[..., :-1]]
        trial.same("weights of masked pairs, in rows with NaN too", masked, np.zeros_like(masked))
    features = np.repeat(sight, operator.value_head_dim, axis=-1)
    wrong = np.argwhere(np.isnan(got) != features)
    place = tuple(int(n) for n in wrong[0]) if len(wrong) else ()
    trial.require(
        not place,
        f"NaN in key {key} of item {item} {'does not reach' if place and features[place] else 'reaches'} (item, row, "
        f"feature) {place}",
    )
    unchanged(trial, "heads that do not see the key", question, got[~features], want[~features], ~features)


@law("ABSENT-PAIR-GRADIENT", clauses=("M4",), kills=("absent-gradient-nan", "mask-ignored-backward"))
def absent_pair_gradient(trial: Trial) -> None:
    """NaN in a key that all heads of some queries mask reaches, of the gradients, only what the pairs with the others
    reach: of tables the rows of their classes.
    """
    draws, relative = trial.draws, PerDisplacement(4)
    layout = draws.walk((Lattice((5,)), Lattice((2, 3)), Lattice((3, 3), kernel_size=3), Lattice((4,), causal=True)))
    softmax = {"query": relative, "key": relative, "relevance": Softmax(bias=BiasTable())}
    more: dict[str, Any] = draws.walk(({"relevance": Ones()}, softmax, {"relevance": Mean()}))
    values: tuple[Encoder, ...] = (relative, LowRank(4), relative, Shared(4))
    operator = Operator(layout, 3, 2, draws.walk(values), **more)
    question = draw_question(draws, trial.dtype, operator=operator, masked=False, batch=(2,), cotangent=True)
    question = apart(question)
    key = draws.integer(0, layout.num_keys - 1)
    rows = np.argwhere(link_counts(layout)[:, key] > 0)[:, 0]
    live = np.ones((layout.num_queries, layout.num_keys), bool)
    live[rows, key] = draws.generator().permutation(len(rows)) == 0
    tokens = keys_of(question).copy()
    tokens[0, key] = np.nan
    question = question.but(mask=live, **{key_side(question): tokens})
    got, want, exact = trial.vjp(question), defined_gradients(question), trial.budget(question)
    for name, gradient in got.gradients.items():
        reached = np.isnan(want.gradients[name])
        trial.same(f"what NaN reaches in the gradient of {name}", np.isnan(gradient), reached)
        trial.within(
            f"gradient of {name} elsewhere",
            gradient[~reached],
            exact.gradient_values[name][~reached],
            exact.gradients[name][~reached],
        )


@law("NAN", clauses=("M4",), kills=("nan-to-num", "live-nan-spreads"))
def live_nan(trial: Trial) -> None:
    """NaN in a live key makes exactly the rows that see it not a number, and leaves every bit of the others."""
    question = apart(draw_question(trial.draws, trial.dtype, batch=trial.draws.pick(BATCHES)))
    form = normal_form(question.operator)
    if not form.value.linears and (form.key is None or not form.key.linears):
        trial.draws.reject("nothing depends on what a key holds")
    sight = some(seen(question)[..., :-1], 1)
    choices = np.argwhere(some(sight, 1))
    if not len(choices):
        trial.draws.reject("no key is live")
    item, key = (int(n) for n in choices[trial.draws.integer(0, len(choices) - 1)])
    tokens = keys_of(question).copy()
    flat(tokens)[item, key] = np.nan
    broken = question.but(**{key_side(question): tokens})
    want, got = flat(trial.run(question).out), flat(trial.run(broken).out)
    reached = np.zeros(sight.shape[:2], bool)
    reached[item] = sight[item, :, key]
    trial.same(f"rows with NaN from key {key} of item {item}", np.isnan(got).any(axis=-1), reached)
    unchanged(trial, "rows that do not see the NaN", question, got[~reached], want[~reached], ~reached)


@law(
    "DEAD-ROW",
    clauses=("M3", "O2"),
    kills=("dead-row-nan", "dead-row-mean", "dead-row-skips-output-bias", "dead-row-gradient-nan"),
    quick=5,
)
def dead_row(trial: Trial) -> None:
    """A query without a live key gives 0 before the output encoder, so the output bias alone; a head without one gives
    0. Nothing that the row would have read gets a gradient from it, and nothing becomes NaN.
    """
    operator = draw_operator(trial.draws)
    if trial.draws.walk((False, True, True)):
        operator = replace(operator, output=Shared(3, bias=True))
    batch = trial.draws.pick(BATCHES)
    question = draw_question(trial.draws, trial.dtype, operator=operator, masked=True, batch=batch, cotangent=True)
    assert question.mask is not None
    generator = trial.draws.generator()
    gone = generator.random((*question.weights_shape[:-1], 1)) < 0.25
    gone |= generator.random((*question.x.shape[:-2], 1, gone.shape[-2], 1)) < 0.25
    full = np.broadcast_to(question.mask, question.weights_shape)
    mask = full & ~gone if full.dtype == np.bool_ else np.where(gone, -np.inf, full)
    assert question.cotangent is not None
    cotangent = question.cotangent
    question = question.but(mask=mask)
    heads = ~some(seen(question), -1).swapaxes(1, 2)
    rows = ~some(~heads, -1)
    if not rows.any():
        trial.draws.reject("every row is live")
    out = flat(trial.run(question).out)
    bias = question.params.get("output.bias", np.zeros(out.shape[-1]))
    trial.same("dead rows", out[rows], np.broadcast_to(bias, out[rows].shape))
    if question.operator.output is None:
        own = out.reshape(*heads.shape, -1)[heads]
        trial.same("heads without a live key", own, np.zeros_like(own))
    alone = question.but(cotangent=np.where(rows[..., None], flat(cotangent), 0).reshape(cotangent.shape))
    found = gradients(trial, alone)
    if found is None:
        return
    bound = trial.budget(alone)
    for name, gradient in found.gradients.items():
        if name == "output.bias":
            trial.within(f"gradient of {name}", gradient, bound.gradient_values[name], bound.gradients[name])
        else:
            trial.same(f"gradient of {name} from dead rows", gradient, np.zeros_like(gradient))
    exact = trial.budget(question)
    for name, gradient in trial.vjp(question).gradients.items():
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])
