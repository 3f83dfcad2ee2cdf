"""Laws that compare two questions: the dtype holds their numbers, and an unequal pair is the law's mistake."""

from importlib import import_module

import numpy as np
import pytest

from translution.conformance.error_model import budget
from translution.conformance.exam.draws import Rejected, SeededDraws
from translution.conformance.exam.examine import draws_for, run_case
from translution.conformance.exam.law import Law, Trial, registered
from translution.conformance.exam.question import Answer, Question, rounded
from translution.conformance.exam.subject import Subject
from translution.conformance.laws.equality import Found, agree, gathered, rows_by
from translution.spec import Lattice, Ones, Operator, PerDisplacement

FILES = ("composition", "projection", "arrangement", "symmetries", "invariances", "rotation", "equivalents")


def laws() -> list[Law]:
    """Those of the files under test."""
    own = {import_module(f"translution.conformance.laws.{name}").__name__ for name in FILES}
    return [law for law in registered().values() if law.body.__module__ in own]


class Ideal(Subject):
    """Answers with the exact result."""

    algorithm = "ideal"

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def run(self, question: Question) -> Answer:
        """The exact result and weights."""
        q = question
        found = budget(q.operator, q.params, q.x, q.y, q.mask)
        return Answer(found.value, found.weights)

    def vjp(self, question: Question) -> Answer:
        """The exact result and gradients."""
        q = question
        found = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent)
        return Answer(found.value, None, found.gradient_values)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("law", laws(), ids=lambda law: law.id)
def test_an_ideal_subject_passes_on_numbers_that_the_dtype_holds(law: Law, dtype: str) -> None:
    """A question in numbers that the dtype rounds would ask something else of a backend than of the bound."""
    ran = 0
    for number in range(40):
        try:
            trial, _ = run_case(law, Ideal(dtype), draws_for(law, number))
        except Rejected:
            continue
        for question in trial.asked:
            for value in (*question.params.values(), question.x, question.y, question.mask, question.cotangent):
                if value is not None and value.dtype != np.bool_:
                    np.testing.assert_array_equal(rounded(value, dtype), value)
        ran += 1
        if ran == 3:
            break
    assert ran == 3


def test_questions_with_different_answers_are_the_mistake_of_the_law() -> None:
    """Then nothing is said about the subject, however its own numbers stand."""
    trial = Trial(Ideal("float64"), SeededDraws(0))
    one, same = np.ones((1, 2)), np.ones((1, 2))
    bound = np.full((1, 2), 1e-12)
    with pytest.raises(AssertionError, match="the two questions have different answers"):
        agree(trial, "out", Found(one, one, bound), Found(same, same + 1e-6, bound))


def test_rows_of_a_larger_layout_are_found_by_displacement() -> None:
    """Rows are -1 where the smaller layout has none; key rows ascend in -delta."""
    small, large = Lattice((2,), causal=True), Lattice((3,), causal=True)
    assert rows_by(small, large) == ([0, 1, -1], [-1, 0, 1])
    assert rows_by(large, small) == ([0, 1], [1, 2])


def test_rows_that_are_new_come_from_elsewhere() -> None:
    """A table on three rows, of which one is kept."""
    operator = Operator(Lattice((2,)), 1, 1, PerDisplacement(1), relevance=Ones())
    (name,) = operator.parameters
    own, other = np.array([[[1.0]], [[2.0]], [[3.0]]]), np.array([[[7.0]], [[8.0]], [[9.0]]])
    found = gathered({name: own}, [-1, 0, -1], [], into={name: other})[name]
    np.testing.assert_array_equal(found.ravel(), [7.0, 1.0, 9.0])
