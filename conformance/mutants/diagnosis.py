"""Which known mistake a backend's own numbers are those of.

A fixed set of questions is asked of the subject and of every mutant. Named are the mutants that answer as the subject
does wherever it was asked, where that is not what is right. Mistakes that the questions can't tell apart are named
together; a mistake that no mutant makes gets no name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from translution.conformance.comparison import ComparisonError
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import Rejected, SeededDraws
from translution.conformance.exam.question import Answer, FloatArray, Question, rounded
from translution.conformance.exam.subject import LiveSubject, NotClaimed, Subject
from translution.conformance.mutants.catalogue import catalogue
from translution.conformance.mutants.mutant import Mutant
from translution.conformance.rounding import ARITHMETIC, Arithmetic
from translution.conformance.strategies import draw_question
from translution.spec import Clip, Lattice, Operator, PerDisplacement, Rotary, Shared

SALT = "diagnosis"
# Chosen by scripts/choose_probes.py: few questions that show every mutant, most of them several times.
NUMBERS = (
    10, 16, 20, 24, 32, 33, 41, 42, 59, 60, 80, 81, 85, 101, 102, 104, 108, 113, 119, 132, 134, 136, 149, 152, 153, 156,
    165, 169, 181, 197, 198, 216, 218, 220, 226, 231,
)  # fmt: skip
# The bound is that of the right answer. A mistake may make logits or results larger, and errors with them; two answers
# are compared, each with its own error.
SLACK = 4.0

FINEST = ("float64", "float32", "bfloat16", "float16")

Parts = dict[str, FloatArray]


@dataclass(frozen=True, eq=False)
class Probe:
    """A question, what is right, and how far from it right answers may be, part by part: out, weights, gradients."""

    number: int
    question: Question
    right: Parts
    bounds: Parts

    def parts(self, subject: Subject) -> Parts | None:
        """What a subject answers, as far as it claims to; None where it fails to answer what it claims."""
        asked = self.question
        found: Answer | None = None
        try:
            if asked.return_weights:
                found = _if_claimed(subject.run, asked) or _if_claimed(subject.run, asked.but(return_weights=False))
            else:
                found = _if_claimed(subject.vjp, asked) or _if_claimed(subject.run, asked)
        except ComparisonError:
            return None
        if found is None:
            return {}
        weights = {} if found.weights is None else {"weights": found.weights}
        return {"out": found.out, **weights, **found.gradients}

    def is_right(self, answer: Parts | None) -> bool:
        """Whether every part is within its bound of what is right."""
        return answer is not None and all(_close(got, self.right[n], self.bounds[n]) for n, got in answer.items())

    def same(self, answer: Parts | None, other: Parts | None, arithmetic: Arithmetic) -> bool:
        """Whether two answers may come from one function: in the parts that both have, or by both having failed."""
        if answer is None or other is None:
            return answer is other
        shared = [name for name in answer if name in other]
        return all(_close(answer[n], other[n], self._apart(n, other[n], arithmetic)) for n in shared)

    def _apart(self, name: str, value: FloatArray, arithmetic: Arithmetic) -> FloatArray:
        """How far two answers of one mistaken function may be apart: by its element's bound and size; and by the part's
        largest, as far as that is a matter of accumulation, since a mistake moves elements to other places.
        """
        bound = np.nan_to_num(self.bounds[name], nan=0.0, posinf=0.0)
        size = np.abs(np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0))
        own = bound + max(arithmetic.storage, arithmetic.unit) * size
        share = min(1.0, arithmetic.unit / arithmetic.storage) if arithmetic.storage else 1.0
        found: FloatArray = SLACK * (own + share * np.max(own, initial=0.0))
        return found


def _if_claimed(ask: Callable[[Question], Answer], question: Question) -> Answer | None:
    try:
        return ask(question)
    except NotClaimed:
        return None


def _close(got: FloatArray, want: FloatArray, bound: FloatArray | float) -> bool:
    finite = np.isfinite(want)
    if got.shape != want.shape or (np.isfinite(got) != finite).any():
        return False
    return bool((np.abs(got - want, where=finite, out=np.zeros_like(want)) <= np.where(finite, bound, 0.0)).all())


def _with_nan(key: int, live: bool) -> Callable[[str], Question]:
    """A key that holds NaN: it is masked for everyone, or seen by those in whose window it is."""

    def ask(dtype: str) -> Question:
        operator = Operator(Lattice((6,), kernel_size=3), 4, 2, PerDisplacement(4), Shared(4), Shared(4))
        found = draw_question(SeededDraws(key, SALT), dtype, operator=operator, masked=False, batch=(2,))
        y = rounded(np.random.default_rng(key).standard_normal(found.x.shape), dtype)
        y[:, key] = np.nan
        return found.but(y=y, mask=None if live else np.arange(6) != key)

    return ask


def _rotated(dtype: str) -> Question:
    """Rotations with several frequencies on each of two axes."""
    turned = Rotary(Shared(16), base=3.0)
    return draw_question(
        SeededDraws(0, SALT), dtype, operator=Operator(Lattice((3, 4)), 16, 2, Shared(4), turned, turned)
    )


def _clipped(dtype: str) -> Question:
    """Far displacements on both sides of those with a row of their own."""
    operator = Operator(Lattice((6,), far=Clip(2)), 4, 2, PerDisplacement(4), Shared(4), Shared(4))
    return draw_question(SeededDraws(1, SALT), dtype, operator=operator)


# What is drawn too seldom to be chosen, or never: numbers -1, -2 and so on.
RARE: tuple[Callable[[str], Question], ...] = (_rotated, _with_nan(2, live=False), _with_nan(3, live=True), _clipped)


@lru_cache(maxsize=8)
def probes(dtype: str, arithmetic: str) -> tuple[Probe, ...]:
    """The questions in a dtype: odd numbers are about weights, even ones about gradients."""
    return tuple(drawn(dtype, arithmetic, (*NUMBERS, *range(-len(RARE), 0))))


def _asked(number: int, dtype: str) -> Question:
    found = draw_question(SeededDraws(number, SALT), dtype) if number >= 0 else RARE[-1 - number](dtype)
    if number % 2 == 1:
        return found.but(return_weights=True)
    pull = np.random.default_rng(abs(number)).standard_normal(found.out_shape)
    return found.but(cotangent=rounded(pull, dtype))


def drawn(dtype: str, arithmetic: str, numbers: Iterable[int]) -> Iterator[Probe]:
    """The probes of these numbers; a number that leads to no question has none."""
    for number in numbers:
        try:
            asked = _asked(number, dtype)
        except Rejected:
            continue
        q = asked
        found = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, arithmetic)
        yield Probe(number, asked, *_parts_of(found))


def _parts_of(found: Budget) -> tuple[Parts, Parts]:
    right = {"out": found.value, "weights": found.weights, **found.gradient_values}
    return right, {"out": found.out, "weights": found.weights_bound, **found.gradients}


def candidates() -> dict[str, Mutant]:
    """The mutants that can be told by their numbers; the questions hold NaN too, and ask for gradients."""
    return {name: m for name, m in catalogue().items() if m.visible or m.family in ("gradient", "mask")}


_answers: dict[tuple[str, str, int], Parts | None] = {}


def _answer_of(mutant: Mutant, dtype: str, probe: Probe) -> Parts | None:
    """A mutant's answer in that dtype."""
    key = mutant.name, dtype, probe.number
    if key not in _answers:
        backend = mutant.backend
        _answers[key] = probe.parts(LiveSubject(backend, backend.algorithms[0], dtype))
    return _answers[key]


def diagnose(subject: Subject, among: Mapping[str, Mutant] | None = None) -> tuple[str, ...]:
    """Names of the mutants whose answers are the subject's; none where it answers rightly, or like none of them.

    Each name answers every probe as the subject does, up to the bounds of the subject's arithmetic, and both are wrong
    on one at least. A backend that can be called is asked in the finest dtype that it claims first, which tells most.
    """
    chosen = candidates() if among is None else among
    if isinstance(subject, LiveSubject):
        finest = next((d for d in FINEST if d in subject.backend.dtypes), subject.dtype)
        wide = LiveSubject(subject.backend, subject.algorithm, finest, subject.device)
        return _named(wide, chosen) or (() if finest == subject.dtype else _named(subject, chosen))
    return _named(subject, chosen)


def _named(subject: Subject, among: Mapping[str, Mutant]) -> tuple[str, ...]:
    found = probes(subject.dtype, subject.arithmetic)
    answers = {probe.number: probe.parts(subject) for probe in found}
    wrong = {probe.number for probe in found if not probe.is_right(answers[probe.number])}
    if not wrong:
        return ()
    # Mutants that are right where the subject is wrong are done with at once.
    order = sorted(found, key=lambda probe: probe.number not in wrong)
    arithmetic = ARITHMETIC[subject.arithmetic]

    def agrees(mutant: Mutant) -> bool:
        both = False
        for probe in order:
            own = _answer_of(mutant, subject.dtype, probe)
            if not probe.same(answers[probe.number], own, arithmetic):
                return False
            both = both or (probe.number in wrong and not probe.is_right(own))
        return both

    return tuple(name for name, mutant in among.items() if agrees(mutant))
