"""How good the numbers are, beyond being allowed: errors of many cases against those of a plain computation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import FloatArray, Question, rounded
from translution.conformance.exam.subject import LiveSubject, NotClaimed, Subject
from translution.conformance.strategies import draw_params, draw_question, draw_values
from translution.spec import BiasTable, Identity, Lattice, Mixture, Operator, Shared, Softmax

LEAST = 35
# What half precision leaves to chance is the same for everyone; in float32 another exp or another order of a sum shows:
# torch's own attention kernel stands at 1.4 to 1.5 there.
RATIO = {"float32": 2.0, "float16": 1.3, "bfloat16": 1.3}
# float64 is left out: its exact value would have to be known to more than float64. There a bound says enough (D3).
DTYPES = ("float32", "float16", "bfloat16")
GROUPS = ("few keys", "flat", "steep")
_RELEVANCES = (Softmax(), Softmax(bias=BiasTable()), Softmax(scale=0.3), Mixture(Softmax(), Softmax(bias=BiasTable())))


@dataclass(frozen=True, slots=True)
class Used:
    """Sums over the elements of one case of (error / bound)^2: of the subject, of the plain computation; how many."""

    group: str
    subject: float
    plain: float
    count: int


@lru_cache(maxsize=8)
def _plain(dtype: str) -> LiveSubject:
    try:
        from translution.conformance.laws.plain import Plain
    except ModuleNotFoundError as error:
        raise NotClaimed([f"what errors are compared with needs {error.name}"]) from error
    return LiveSubject(Plain(dtype), "pairwise", dtype)


def plain(subject: Subject) -> LiveSubject:
    """The plain computation in the subject's dtype.

    Raises:
        NotClaimed: the subject does not compute in that dtype itself (tf32), or torch is not there.
    """
    if subject.arithmetic != subject.dtype:
        raise NotClaimed([f"{subject.dtype} is computed as {subject.arithmetic}, with which nothing is compared"])
    return _plain(subject.dtype)


def _question(draws: Draws, dtype: str, *, cotangent: bool) -> tuple[str, Question]:
    """Any softmax over few keys; or attention over many, with weights that are alike, or with few that matter.

    Sums that are kept short of digits show over many keys, logits that are so where they are large, and what is added
    to the sum of exponentials where there is little else in it.
    """
    group = draws.walk(GROUPS)
    if group == "few keys":
        return group, draw_question(draws, dtype, relevances=_RELEVANCES, cotangent=cotangent)
    heads, width, exact = draws.pick((2, 1, 3)), draws.pick((4, 8)), draws.some(0.7)
    features = heads * width
    grid, keys = draws.pick((((2,), (29,)), ((2,), (47,)), ((1, 3), (6, 9)), ((2,), (64,))))
    operator = Operator(
        Lattice(grid, key_grid=keys),
        features,
        heads,
        Identity() if exact and draws.some() else Shared(features),
        # Where tokens are their own queries and keys, nothing is rounded before the logits.
        Identity() if exact else Shared(features, bias=True),
        Identity() if exact else Shared(features),
        Softmax(scale=2.0 if group == "steep" else 0.5),
    )
    generator = draws.generator()
    x = draw_values(generator, (2, operator.layout.num_queries, features), dtype)
    y = draw_values(generator, (2, operator.layout.num_keys, features), dtype)
    question = Question(operator, draw_params(generator, operator, dtype), x, y)
    return group, question.but(cotangent=rounded(generator.standard_normal(question.out_shape), dtype))


def squares(got: FloatArray, want: FloatArray, bound: FloatArray) -> tuple[float, int]:
    """Sum of ((got - want) / bound)^2 and number of elements, where there is a bound."""
    kept = bound > 0
    used = (got[kept] - want[kept]) / bound[kept]
    return float(used @ used), int(kept.sum())


def judge(found: Sequence[Used], dtype: str) -> None:
    """Root mean square over the cases of each group, every case as heavy as the others: at most ``RATIO`` times that of
    the plain computation. With fewer than ``LEAST`` cases nothing is said.

    Raises:
        ComparisonError: it is more; where the plain computation has no error at all, any error is.
    """
    if len(found) < LEAST:
        return
    for group in dict.fromkeys(case.group for case in found):
        told = [case for case in found if case.group == group and case.count]
        subject = math.sqrt(math.fsum(case.subject / case.count for case in told) / max(len(told), 1))
        normal = math.sqrt(math.fsum(case.plain / case.count for case in told) / max(len(told), 1))
        if not subject <= RATIO[dtype] * normal:
            raise ComparisonError(
                f"{group}: over {len(told)} cases errors are {subject:.3g} of their bounds (root mean square), more "
                f"than {RATIO[dtype]:g} times the {normal:.3g} of a plain computation in {dtype}"
            )


_QUALITY_KILLS = (
    "scale-off-one-percent", "bias-scaled", "epsilon-in-denominator", "accumulates-in-half",
    "output-summed-in-half", "logits-in-half", "softmax-sum-in-half",
)  # fmt: skip


@law(
    "QUALITY",
    clauses=("D2", "B2"),
    kills=_QUALITY_KILLS,
    dtypes=DTYPES,
    quick=36,
    full=108,
    least=LEAST,
    conclude=judge,
)
def quality(trial: Trial) -> Used:
    """Over many cases, results are about as exact as those of a plain computation in the same dtype: the root mean
    square of error / bound is at most 1.3 times as large (twice in float32).
    """
    group, question = _question(trial.draws, trial.dtype, cotangent=False)
    got, usual, exact = trial.run(question), plain(trial.subject).run(question), trial.budget(question)
    subject, count = squares(got.out, exact.value, exact.out)
    return Used(group, subject, squares(usual.out, exact.value, exact.out)[0], count)


_QUALITY_GRADIENT_KILLS = (
    "scale-off-one-percent", "bias-scaled", "epsilon-in-denominator", "accumulates-in-half", "logits-in-half",
    "key-gradient-unscaled", "softmax-gradient-diagonal",
)  # fmt: skip


@law(
    "QUALITY-GRADIENT",
    clauses=("D2", "B2"),
    kills=_QUALITY_GRADIENT_KILLS,
    dtypes=DTYPES,
    quick=36,
    full=48,
    least=LEAST,
    conclude=judge,
)
def quality_gradient(trial: Trial) -> Used:
    """Over many cases, gradients are about as exact as those of a plain computation in the same dtype: the root mean
    square of error / bound is at most 1.3 times as large (twice in float32).
    """
    group, question = _question(trial.draws, trial.dtype, cotangent=True)
    got, usual, exact = trial.vjp(question), plain(trial.subject).vjp(question), trial.budget(question)
    want, bounds = exact.gradient_values, exact.gradients
    pairs, others = (
        [squares(answer.gradients[name], want[name], bounds[name]) for name in answer.gradients]
        for answer in (got, usual)
    )
    subject, normal = (math.fsum(value for value, _ in found) for found in (pairs, others))
    return Used(group, subject, normal, sum(count for _, count in pairs))
