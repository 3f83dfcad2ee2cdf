"""Laws that know the answer: the definition's value, and how far a correct implementation may be from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import FloatArray, Question
from translution.conformance.laws.definition import (
    AGREEMENT,
    defined,
    defined_gradients,
    require_agreement,
    slope,
)
from translution.conformance.strategies import LAYOUT_KINDS, RELEVANCES, draw_layout, draw_question
from translution.spec import (
    Concat,
    Encoder,
    Lattice,
    Layout,
    Mixture,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    Softmax,
)
from translution.spec.encoders import Pairing

Option = TypeVar("Option")

EVERY_CLAUSE = (
    "L1", "L2", "L3", "L4", "L5", "L6", "L7", "L8", "E1", "E2", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "E10",
    "R1", "R2", "R3", "R4", "R5", "R6", "R7", "M1", "M2", "M3", "M6", "O1", "O2", "O3", "O4", "D1", "D2", "D3", "B2",
)  # fmt: skip


_MIXTURES = tuple(relevance for relevance in RELEVANCES if isinstance(relevance, Mixture))


def spread(draws: Draws, options: tuple[Option, ...]) -> tuple[Option, ...]:
    """The options from another third on in each case: those that are taken in turn come from all over the list."""
    start = draws.walk((0, 1, 2)) * (len(options) // 3)
    return options[start:] + options[:start]


def _drawn(trial: Trial, *, cotangent: bool = False, return_weights: bool = False) -> Question:
    """A question of any kind; few cases are enough to meet mixtures, and layouts from all over the list."""
    draws = trial.draws
    relevances = draws.walk((None, _MIXTURES, RELEVANCES[::-1]))
    return draw_question(
        draws,
        trial.dtype,
        cotangent=cotangent,
        return_weights=return_weights,
        layouts=spread(draws, LAYOUT_KINDS),
        relevances=relevances,
    )


def _factor(trial: Trial) -> float:
    return 1.0 if trial.subject.arithmetic == "float64" else AGREEMENT


_ORACLE_KILLS = (
    "mask-inverted", "bool-mask-added", "float-mask-ignored", "mask-first-batch", "mask-first-query",
    "mask-transposed", "mask-first-link-only", "mask-after-softmax", "mean-ignores-mask", "dead-row-nan",
    "dead-row-mean", "tail-keys-dropped", "tail-rows-dropped", "heads-interleaved", "heads-reversed",
    "heads-share-weights", "batch-shares-keys", "groups-swapped", "shared-heads-once", "vectors-missing",
    "low-rank-first-class", "role-bias-missing", "output-scale-missing", "output-scale-after-bias",
    "output-bias-missing", "uplift-missing", "scale-missing", "scale-by-value-width", "scale-by-dim",
    "scale-ignored", "scale-off-one-percent", "bias-scaled", "content-with-bias-dropped", "bias-sign",
    "bias-first-head", "bias-of-first-branch", "slopes-squared", "gate-swapped", "gate-raw", "gate-first-head",
    "mixture-of-logits", "ones-normalised", "softmax-over-queries", "softmax-unnormalised",
    "epsilon-in-denominator", "float64-in-float32", "returns-float32", "absent-as-zeros",
)  # fmt: skip


@law("ORACLE", clauses=EVERY_CLAUSE, kills=_ORACLE_KILLS, quick=12, full=60)
def oracle(trial: Trial) -> None:
    """The result of a random operator on random input is the definition's, up to the error bound of each element."""
    question = _drawn(trial)
    got, want, allowed = trial.run(question), defined(question), trial.budget(question)
    require_agreement("out", allowed.value, want.out, _factor(trial) * allowed.out)
    trial.within("out", got.out, want.out, allowed.out)


_ORACLE_WEIGHTS_KILLS = (
    "mask-inverted", "bool-mask-added", "float-mask-ignored", "mask-first-head", "mask-first-batch",
    "mask-first-query", "mask-transposed", "mask-after-softmax", "mask-sentinel", "mean-ignores-mask",
    "dead-row-nan", "dead-row-mean", "dead-row-skips-output-bias", "tail-keys-dropped", "tail-rows-dropped",
    "weights-not-summed", "weights-before-mask", "weights-averaged", "weights-of-zero-tokens",
)  # fmt: skip


@law("ORACLE-WEIGHTS", clauses=("B5", "L5", "R1", "R2", "R3", "R4"), kills=_ORACLE_WEIGHTS_KILLS, quick=12, full=48)
def oracle_weights(trial: Trial) -> None:
    """Returned weights are the definition's up to their error bounds: the links of a pair add up, zero tokens are left
    out, masked pairs have 0. The result beside them is what it is without them.
    """
    question = _drawn(trial, return_weights=True)
    got, want, allowed = trial.run(question), defined(question), trial.budget(question)
    assert want.weights is not None
    require_agreement("weights", allowed.weights, want.weights, _factor(trial) * allowed.weights_bound)
    trial.within("weights", got.weights, want.weights, allowed.weights_bound)
    trial.within("out", got.out, want.out, allowed.out)


_ORACLE_GRADIENT_KILLS = (
    "query-detached", "value-detached", "key-gradient-unscaled", "self-gradient-one-side", "tied-last-wins",
    "value-gradient-mirrored", "vectors-gradient-missing", "bias-gradient-missing", "gate-gradient-missing",
    "output-weight-gradient-missing", "gradient-batch-mean", "gradient-first-batch", "cotangent-ignored",
    "softmax-gradient-diagonal", "mask-ignored-backward", "dead-row-gradient-nan", "float-mask-as-bool",
    "mask-scaled", "rotary-key-unrotated", "rotary-key-backwards", "rotary-pairing", "rotary-axes-swapped",
    "uplift-by-head",
)  # fmt: skip


@law(
    "ORACLE-GRADIENT",
    clauses=("D1", "D2", "D3", "M3", "M4", "B1", "B2"),
    kills=_ORACLE_GRADIENT_KILLS,
    quick=12,
    full=48,
)
def oracle_gradient(trial: Trial) -> None:
    """The gradients of <cotangent, result> for tokens and every parameter are the definition's, up to the error bound
    of each element.
    """
    question = _drawn(trial, cotangent=True)
    got, want, allowed = trial.vjp(question), defined_gradients(question), trial.budget(question)
    for name, gradient in want.gradients.items():
        bound = _factor(trial) * allowed.gradients[name]
        require_agreement(f"gradient of {name}", allowed.gradient_values[name], gradient, bound)
        trial.within(f"gradient of {name}", got.gradients[name], gradient, allowed.gradients[name])
    trial.within("out", got.out, want.out, allowed.out)


_ROTARY_KILLS = (
    "rotary-key-unrotated", "rotary-key-backwards", "rotary-pairing", "rotary-base", "rotary-axes-swapped",
    "rotary-frequencies-of-one-axis", "zero-token-rotated", "zero-token-masked",
)  # fmt: skip


@law("ROTARY", clauses=("E10", "L1", "L6"), kills=_ROTARY_KILLS, quick=10, full=30)
def rotary(trial: Trial) -> None:
    """Queries and keys that are rotated by their own positions, with several frequencies for each axis, on lattices of
    one to three axes: results are the definition's, up to the error bound of each element. Registers and zero tokens
    are not rotated.
    """
    draws = trial.draws
    # Plain attention, which native kernels claim, comes up in two cases of five.
    kinds = ("window-zeros", "grid", "registers", "cross-grid", "causal-grid")

    def turned(layout: Layout) -> bool:
        return isinstance(layout, Lattice) and layout.rank < 3 and layout.num_keys > 2

    layout = draw_layout(draws, kinds=kinds, accepted=turned)
    three = Lattice((2, 2, 3)), Lattice((2, 1, 2), key_grid=(2, 2, 2), offset=(1, 0, 3))
    layout = draws.walk((layout, layout, layout, draws.pick(three)))
    assert isinstance(layout, Lattice)
    pairings: tuple[Pairing, ...] = ("half", "interleaved")
    heads, base, pairing = draws.pick((2, 1, 3)), draws.pick((10000.0, 3.0)), draws.pick(pairings)
    width = heads * draws.pick((8, 16) if layout.rank < 3 else (6, 30))
    inner = Shared(width, bias=True) if draws.some(0.7) else PerDisplacement(width, bias=True)
    turn: Encoder = Rotary(inner, base, pairing)
    beside = PerDisplacement(2 * heads)
    turn = draws.walk((turn, turn, Concat((beside, turn)), Concat((turn, beside)), turn))
    operator = Operator(layout, 4, heads, Shared(2 * heads), turn, turn, Softmax())
    question = draw_question(draws, trial.dtype, operator=operator)
    got, want, allowed = trial.run(question), defined(question), trial.budget(question)
    require_agreement("out", allowed.value, want.out, _factor(trial) * allowed.out)
    trial.within("out", got.out, want.out, allowed.out)


def _tokens_and_parameters(question: Question) -> dict[str, FloatArray]:
    found = {**question.params, "x": question.x}
    return found if question.y is None else found | {"y": question.y}


def _dot(a: Mapping[str, FloatArray], b: Mapping[str, FloatArray]) -> float:
    """<a, b>, exact but for one rounding where the products are."""
    return math.fsum(math.fsum((a[name] * b[name]).ravel().tolist()) for name in b)


_COMPLEX_STEP_KILLS = (
    "query-detached", "value-detached", "key-gradient-unscaled", "self-gradient-one-side", "tied-last-wins",
    "value-gradient-mirrored", "vectors-gradient-missing", "bias-gradient-missing", "gate-gradient-missing",
    "output-weight-gradient-missing", "gradient-batch-mean", "gradient-first-batch", "cotangent-ignored",
    "softmax-gradient-diagonal", "mask-ignored-backward", "dead-row-gradient-nan",
)  # fmt: skip


@law(
    "COMPLEX-STEP",
    clauses=("D3", "B1"),
    kills=_COMPLEX_STEP_KILLS,
    dtypes=("float64",),
    quick=8,
    full=32,
)
def complex_step(trial: Trial) -> None:
    """The inner product of all gradients with a direction is the derivative of <cotangent, result> along it, which the
    definition gives to full accuracy as an imaginary part, Im f(. + i h d) / h with h = 1e-40.
    """
    question = _drawn(trial, cotangent=True)
    assert question.cotangent is not None
    generator = trial.draws.generator()
    # Signs and powers of two, so that products with them are exact.
    direction = {
        name: np.ldexp(generator.choice((-1.0, 1.0), value.shape), generator.integers(-2, 1, value.shape))
        for name, value in _tokens_and_parameters(question).items()
    }
    got, allowed = trial.vjp(question), trial.budget(question)
    products = question.cotangent * slope(question, direction)
    want = math.fsum(products.ravel().tolist())
    sides = {name: np.abs(value) for name, value in direction.items()}
    # The roundings of the products on the definition's side, two per term at most, and of its gradient as a whole.
    rounding = 2.0**-52 * math.fsum(np.abs(products).ravel().tolist())
    trial.within(
        "directional derivative", _dot(got.gradients, direction), want, _dot(allowed.gradients, sides) + rounding
    )
