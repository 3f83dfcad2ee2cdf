"""Which mistake a backend makes, told from its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("torch")

from translution.conformance.exam.question import Answer, Question
from translution.conformance.exam.subject import LiveSubject, NotClaimed, Subject
from translution.conformance.mutants.diagnosis import candidates, diagnose, drawn, probes
from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.orders import orders
from translution.conformance.threads import one_thread
from translution.registry import get_backend

# What autograd makes of a call is no part of the questions, nor are masks that are so low.
UNSEEN = {
    "second-order-zero", "forward-mode-zero", "autograd-detached", "autograd-halved", "mask-gradient-missing",
    "large-negative-mask-is-absent",
}  # fmt: skip
# Some of every family.
SOME = (
    "value-mirrored", "rows-descending", "registers-last", "log-buckets-rounded", "circular-as-zeros",
    "shift-cut-at-border", "mask-inverted", "nan-to-num", "absent-times-zero", "heads-interleaved",
    "low-rank-transposed", "scale-off-one-percent", "gate-swapped", "rotary-frequencies-of-one-axis",
    "epsilon-in-denominator", "key-gradient-unscaled", "bias-gradient-missing", "absent-gradient-nan",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Told(Subject):
    """Another subject as it is, in its own dtype: not to be asked in another one."""

    def __init__(self, own: LiveSubject) -> None:
        self.own, self.dtype, self.algorithm = own, own.dtype, own.algorithm

    def run(self, question: Question) -> Answer:
        return self.own.run(question)

    def vjp(self, question: Question) -> Answer:
        return self.own.vjp(question)


@pytest.mark.parametrize("name", SOME)
def test_a_mutant_is_named_by_its_own_numbers(name: str) -> None:
    assert diagnose(LiveSubject(candidates()[name].backend, "pairwise", "float64")) == (name,)


def test_every_visible_mutant_is_wrong_on_some_probe() -> None:
    found = probes("float64", "float64")
    unseen = {
        name
        for name, mutant in candidates().items()
        if all(probe.is_right(probe.parts(LiveSubject(mutant.backend, "pairwise", "float64"))) for probe in found)
    }
    assert unseen == UNSEEN


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_correct_backends_get_no_name(dtype: str) -> None:
    for backend in (Naive(), *orders().values()):
        assert diagnose(Told(LiveSubject(backend, "pairwise", dtype))) == ()


@pytest.mark.parametrize(("backend", "algorithm"), [("numpy", "stream"), ("torch", "stream"), ("torch", "conv")])
def test_the_library_gets_no_name(backend: str, algorithm: str) -> None:
    assert diagnose(LiveSubject(get_backend(backend), algorithm, "float32")) == ()


@pytest.mark.parametrize("name", ["value-mirrored", "causal-ignored", "mask-inverted", "output-scale-missing"])
def test_coarse_answers_name_the_mutant_among_others_at_most(name: str) -> None:
    subject = Told(LiveSubject(candidates()[name].backend, "pairwise", "bfloat16"))
    assert name in diagnose(subject)


def test_a_coarse_subject_that_can_be_called_is_asked_in_its_finest_dtype() -> None:
    assert diagnose(LiveSubject(candidates()["slopes-squared"].backend, "pairwise", "float16")) == ("slopes-squared",)


class Twice(Naive):
    """A mistake that no mutant makes."""

    name = "twice"

    def output_scale(self, call: object) -> float:
        return 2.03125


def test_an_unknown_mistake_gets_no_name() -> None:
    assert diagnose(LiveSubject(Twice(), "pairwise", "float64")) == ()


class OutOnly(Told):
    """Claims neither weights nor gradients."""

    def run(self, question: Question) -> Answer:
        if question.return_weights:
            raise NotClaimed(["no weights"])
        return self.own.run(question)

    def vjp(self, question: Question) -> Answer:
        raise NotClaimed(["no gradients"])


def test_results_alone_name_a_mutant() -> None:
    subject = OutOnly(LiveSubject(candidates()["axes-swapped"].backend, "pairwise", "float64"))
    assert diagnose(subject) == ("axes-swapped",)


def test_parts_that_are_not_claimed_are_not_compared() -> None:
    mutant = candidates()["key-gradient-unscaled"]
    assert diagnose(OutOnly(LiveSubject(mutant.backend, "pairwise", "float64"))) == ()


def test_a_probe_tells_right_from_wrong_by_its_bounds() -> None:
    (probe,) = drawn("float64", "float64", (12,))
    right = probe.parts(LiveSubject(Naive(), "pairwise", "float64"))
    assert right is not None
    assert probe.is_right(right)
    at = np.unravel_index(int(probe.bounds["out"].argmax()), probe.bounds["out"].shape)
    moved = {**right, "out": probe.right["out"].copy()}
    moved["out"][at] += 0.9 * probe.bounds["out"][at]
    assert probe.is_right(moved)
    moved["out"][at] += 0.3 * probe.bounds["out"][at]
    assert not probe.is_right(moved)
    assert not probe.is_right(None)
