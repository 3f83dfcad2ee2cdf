"""The plain backend is right, and each mutant of it is wrong in the way that it says (B2)."""

import itertools
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from translution import run
from translution.conformance.comparison import check
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.question import Answer, Question
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.mutants.catalogue import FAMILIES, catalogue
from translution.conformance.mutants.mutant import Mutant
from translution.conformance.mutants.naive import Naive
from translution.conformance.strategies import draw_question
from translution.registry import Backend, get_backend
from translution.spec import (
    BiasTable,
    Lattice,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    Softmax,
)

MUTANTS = catalogue()
VISIBLE = [m for m in MUTANTS.values() if m.visible]
ORDINARY, MANY = 40, 500
# What these say of themselves does not hold for ordinary questions.
REFUSING = ("claims-too-much", "refuses-late", "not-supported-raises", "claims-inconsistent", "empty-batch-fails")
# These differ from the truth in float64, by less than a float32 bound.
COARSE = ("float64-in-float32",)


def of_family(*families: str) -> list[Mutant]:
    return [m for m in MUTANTS.values() if m.family in families]


def named(mutants: list[Mutant]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutant", mutants, ids=lambda m: m.name)


@cache
def probe(number: int, dtype: str = "float64") -> Question:
    special = [rotated_zero_token(), rotated_with_two_frequencies()]
    if number < len(special):
        return special[number]
    return draw_question(SeededDraws(number, "test_mutants"), dtype, cotangent=True, return_weights=True)


@cache
def truth(number: int, arithmetic: str = "float64", dtype: str = "float64") -> Budget:
    q = probe(number, dtype)
    return budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, arithmetic)


def question(operator: Operator, seed: int = 0, batch: int = 2) -> Question:
    """Normal values, with a cotangent."""
    generator = np.random.default_rng(seed)
    params = {name: generator.standard_normal(shape) for name, shape in operator.parameters.items()}
    x = generator.standard_normal((batch, operator.layout.num_queries, operator.dim))
    y = None if operator.layout.is_self else generator.standard_normal((batch, operator.layout.num_keys, operator.dim))
    found = Question(operator, params, x, y, return_weights=True)
    return found.but(cotangent=generator.standard_normal(found.out_shape))


def rotated_zero_token() -> Question:
    rotated = Rotary(Shared(8, bias=True), 3.0)
    layout = Lattice((3, 2), kernel_size=3, boundary="zeros")
    return question(Operator(layout, 4, 2, Shared(4), rotated, rotated))


def rotated_with_two_frequencies() -> Question:
    rotated = Rotary(Shared(16), 3.0)
    return question(Operator(Lattice((3, 2)), 4, 2, Shared(4), rotated, rotated))


def subject(backend: Backend, dtype: str = "float64") -> LiveSubject:
    return LiveSubject(backend, "pairwise", dtype)


def agrees(answer: Answer, found: Budget) -> bool:
    """Whether result and weights are within the bounds."""
    try:
        check("out", answer.out, found.value, found.out)
        check("weights", answer.weights, found.weights, found.weights_bound)
    except AssertionError:
        return False
    return True


def gradients_agree(backend: Backend, number: int) -> bool:
    found, expected = subject(backend).vjp(probe(number)).gradients, truth(number)
    try:
        for name, value in found.items():
            check(name, value, expected.gradient_values[name], expected.gradients[name])
    except AssertionError:
        return False
    return True


# The plain backend


@pytest.mark.parametrize("dtype", Naive.dtypes)
def test_naive_is_right(dtype: str) -> None:
    """Result, weights and gradients in every dtype."""
    own = subject(Naive(), dtype)
    for number in range(2, 2 + ORDINARY):
        q, expected = probe(number, dtype), truth(number, dtype, dtype)
        answer = own.run(q)
        check(f"{q} out", answer.out, expected.value, expected.out)
        check(f"{q} weights", answer.weights, expected.weights, expected.weights_bound)
        for name, value in own.vjp(q).gradients.items():
            check(f"{q} {name}", value, expected.gradient_values[name], expected.gradients[name])


def test_naive_equals_reference() -> None:
    """On cases of every layout, relevance and encoder."""
    own = subject(Naive())
    for number in range(150):
        q = probe(number)
        expected = run(q.operator, q.params, q.x, q.y, mask=q.mask, backend="reference", return_weights=True)
        check(f"{q} out", own.run(q).out, expected[0], 2 * truth(number).out)
        check(f"{q} weights", own.run(q).weights, expected[1], 2 * truth(number).weights_bound)


def test_naive_second_derivatives() -> None:
    """They agree with differences of first derivatives."""
    op = Operator(Lattice((3,)), 2, 1, PerDisplacement(2), Shared(2), Shared(2), Softmax(bias=BiasTable()))
    q = question(op)
    own = {name: torch.from_numpy(value) for name, value in q.params.items()}
    x = torch.from_numpy(q.x).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: run(op, own, x, backend=Naive()), (x,))


# The catalogue


def test_catalogue() -> None:
    """Names, sentences, clauses and order."""
    text = (Path(__file__).parent.parent / "docs" / "specification.md").read_text()
    clauses = set(re.findall(r"^### ([A-Z]\d+)\.", text, re.MULTILINE))
    assert len(MUTANTS) >= 90
    assert [m.family for m in MUTANTS.values()] == sorted((m.family for m in MUTANTS.values()), key=FAMILIES.index)
    assert list(catalogue()) == list(MUTANTS)
    for name, found in MUTANTS.items():
        assert found.name == name == found.backend.name
        assert found.backend is found.backend
        assert found.clause in clauses, name
        assert found.mistake[0].islower(), name
        assert not found.mistake.endswith("."), name
        assert all(name in MUTANTS[other].same_as for other in found.same_as), name
    assert len({m.mistake for m in MUTANTS.values()}) == len(MUTANTS)


def test_mutant_by_attribute() -> None:
    """A mutant can be named as any backend."""
    found = get_backend("translution.conformance.mutants.catalogue:value_mirrored")
    assert found is MUTANTS["value-mirrored"].backend


@named([m for m in MUTANTS.values() if m.name not in (*REFUSING, "returns-float32")])
def test_mutant_answers(mutant: Mutant) -> None:
    """It runs; if its mistake is not visible, its result and weights are right."""
    own = subject(mutant.backend)
    for number in range(ORDINARY):
        answer = own.run(probe(number))
        if not mutant.visible:
            assert agrees(answer, truth(number, "float32" if mutant.name in COARSE else "float64")), probe(number)


@named(VISIBLE)
def test_visible_mutant_differs(mutant: Mutant) -> None:
    """From the truth, by more than rounding."""
    own = subject(mutant.backend)
    assert any(not agrees(own.run(probe(number)), truth(number)) for number in range(MANY))


def test_visible_mutants_are_different_functions() -> None:
    """No two give the same numbers on all probes, but those that say so. A float32 bound tells mistakes from float64
    rounding.
    """
    groups = [VISIBLE]
    for number in range(MANY):
        expected, parted = truth(number, "float32"), []
        for group in groups:
            answers = [subject(m.backend).run(probe(number)) for m in group]
            kinds: list[tuple[Answer, list[Mutant]]] = []
            for mutant, answer in zip(group, answers, strict=True):
                for first, members in kinds:
                    seen = Budget(first.out, expected.out, np.asarray(first.weights), expected.weights_bound)
                    if agrees(answer, seen):
                        members.append(mutant)
                        break
                else:
                    kinds.append((answer, [mutant]))
            parted += [members for _, members in kinds]
        groups = [group for group in parted if len(group) > 1]
        if all(b.name in a.same_as for group in groups for a, b in itertools.combinations(group, 2)):
            return
    pytest.fail(f"same functions: {[[m.name for m in group] for group in groups]}")


# Gradients


# Their ``vjp`` of ordinary questions is right.
ELSEWHERE = (
    "absent-gradient-nan", "second-order-zero", "forward-mode-zero", "autograd-detached", "autograd-halved",
    "mask-gradient-missing",
)  # fmt: skip


@named([m for m in of_family("gradient") if m.name not in ELSEWHERE])
def test_gradient_mutant_differs(mutant: Mutant) -> None:
    """In some gradient."""
    assert not all(gradients_agree(mutant.backend, number) for number in range(MANY))


HIDDEN = [m for m in of_family("conduct", "mask", "relevance", "size") if not m.visible and m.name not in REFUSING]


@named([*HIDDEN, *(MUTANTS[name] for name in ELSEWHERE)])
def test_gradients_of_hidden_mutant_are_right(mutant: Mutant) -> None:
    """Its mistake lies elsewhere."""
    assert all(gradients_agree(mutant.backend, number) for number in range(ORDINARY))


# Numbers

DIFFERS_IN = {
    "float64-in-float32": ("float64",),
    "accumulates-in-half": ("float16", "bfloat16"),
    "output-summed-in-half": ("float16", "bfloat16"),
    "softmax-sum-in-half": ("float16", "bfloat16"),
    "logits-in-half": ("float32", "float16", "bfloat16"),
    "overflow-in-half": ("float16", "bfloat16"),
}


@pytest.mark.parametrize("dtype", Naive.dtypes)
@pytest.mark.parametrize("name", DIFFERS_IN)
def test_precision_mutant(name: str, dtype: str) -> None:
    """Its bits differ from the plain backend's in some dtypes only."""
    own, plain = subject(MUTANTS[name].backend, dtype), subject(Naive(), dtype)
    answers = [(own.run(q), plain.run(q)) for q in (probe(number, dtype) for number in range(2, 2 + ORDINARY))]
    same = all(np.array_equal(a.out, b.out, equal_nan=True) for a, b in answers)
    assert same == (dtype not in DIFFERS_IN[name])


def test_every_precision_mutant_is_tested() -> None:
    """None is left out above."""
    assert {m.name for m in of_family("number")} == {*DIFFERS_IN, "returns-float32"}
