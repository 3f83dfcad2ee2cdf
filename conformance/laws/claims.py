"""Whether a backend does what it says it can, by itself, and refuses the rest (clauses B1 and B2)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from translution import execution, registry
from translution.algorithms import ALGORITHMS, Request
from translution.arrays import FLOATS
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Question
from translution.conformance.exam.subject import LiveSubject, told
from translution.conformance.laws.sight import gradients
from translution.conformance.strategies import draw_question
from translution.errors import NotSupported
from translution.registry import BACKENDS, Backend


def _refusal(subject: LiveSubject, question: Question, *, gradient: bool = False) -> list[str] | None:
    """The reasons with which a call of the library is refused; None where it answers."""
    arguments = subject.arguments(question)
    try:
        if gradient:
            execution.vjp(**arguments, cotangent=subject.native(question.cotangent))
        else:
            execution.run(**arguments, return_weights=question.return_weights)
    except NotSupported as error:
        return list(error.reasons)
    return None


def _check_names(trial: Trial, subject: LiveSubject) -> None:
    backend = subject.backend
    trial.require(bool(backend.name), "the backend has no name")
    trial.require(backend.kind in ("numpy", "torch"), f"kind is {backend.kind!r}, expected numpy or torch")
    unknown = sorted(set(backend.algorithms) - set(ALGORITHMS))
    trial.require(bool(backend.algorithms) and not unknown, f"algorithms {backend.algorithms}, unknown: {unknown}")
    strange = sorted(set(backend.dtypes) - {*FLOATS, "complex128"})
    trial.require(bool(backend.dtypes) and not strange, f"dtypes {backend.dtypes}, unknown: {strange}")
    trial.require(subject.claims.gradient_order in (0, 1, 2), f"gradient_order is {subject.claims.gradient_order}")


def _reasons(trial: Trial, subject: LiveSubject, request: Request) -> list[str]:
    """What ``not_supported`` says, after asking twice, and once for an equal request that was built anew."""
    shown = repr(request)
    rebuilt = replace(request, operator=copy.deepcopy(request.operator))
    answers = []
    for asked in (request, request, rebuilt):
        try:
            answers.append(subject.backend.not_supported(asked, subject.algorithm))
        except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
            trial.require(False, f"not_supported raised {told(error)}")
    first = answers[0]
    proper = isinstance(first, list) and all(isinstance(reason, str) and reason.strip() for reason in first)
    trial.require(proper, f"not_supported gave {first!r}, expected a list of reasons")
    trial.require(answers[1] == first, f"asked again, not_supported gave {answers[1]} in place of {first}")
    trial.require(answers[2] == first, f"for an equal request not_supported gave {answers[2]} in place of {first}")
    trial.require(repr(request) == shown, "not_supported changed the request")
    return first


@law(
    "CLAIMS",
    clauses=("B1", "B2"),
    kills=("claims-too-much", "refuses-late", "not-supported-raises", "claims-inconsistent"),
    quick=16,
    full=60,
    live=True,
)
def claims(trial: Trial) -> None:
    """What a backend does not refuse runs; what it refuses raises NotSupported with its reasons before anything is
    computed. It gives the same answer to equal requests, and refuses dtypes, algorithms and gradients that it does not
    claim, and gradients of complex numbers; a NumPy backend refuses tensors that record a gradient.
    """
    draws, subject = trial.draws, trial.live()
    question = draw_question(draws, trial.dtype, cotangent=True, return_weights=draws.walk((False, True, False)))
    trial.asked.append(question)
    _check_names(trial, subject)
    for gradient in (False, True):
        _reasons(trial, subject, subject.request(question, gradient=gradient))
    if reasons := subject.reasons(question):
        trial.require(_refusal(subject, question) == reasons, f"refused for {reasons}, but a call says otherwise")
    else:
        subject.run(question)
    if subject.claims.gradient_order < 1:
        reply = _refusal(subject, question.but(return_weights=False), gradient=True)
        trial.require(reply is not None, "gradient_order is 0, but vjp answers")
    elif not subject.reasons(question.but(return_weights=False), gradient=True):
        subject.vjp(question.but(return_weights=False))
    for other in sorted(set(ALGORITHMS) - set(subject.backend.algorithms)):
        stranger = LiveSubject(subject.backend, other, subject.dtype, subject.device)
        trial.require(bool(_refusal(stranger, question)), f"has no algorithm {other}, but does not refuse it")
    own, alike = subject.backend, subject.request(question)
    if own.kind == "numpy":
        reply = _reasons(trial, subject, replace(alike, gradient=True))
        trial.require(bool(reply), "NumPy arrays record no gradient, but tensors that need one are not refused")
    if "complex128" in own.dtypes:
        stranger = LiveSubject(own, subject.algorithm, "complex128", subject.device)
        reply = _refusal(stranger, question.but(return_weights=False, mask=None), gradient=True)
        trial.require(reply is not None, "there is no real gradient of complex numbers, but vjp answers in complex128")
    held = FLOATS if subject.backend.kind == "torch" else FLOATS[:3]
    for other in sorted(set(held) - set(subject.backend.dtypes)):
        stranger = LiveSubject(subject.backend, subject.algorithm, other, subject.device)
        trial.require(bool(_refusal(stranger, question)), f"does not claim {other}, but does not refuse it")


class _Wire(RuntimeError):
    """Another backend was called."""


@contextmanager
def _trip_wires(own: Backend, tripped: list[str]) -> Iterator[None]:
    """Every other backend of the library that is loaded raises and leaves its name when it is asked to compute, and so
    does asking for one.
    """
    undo: list[tuple[Any, str, Any]] = []

    def wired(name: str) -> Any:
        def raising(*_arguments: Any, **_more: Any) -> Any:
            tripped.append(name)
            raise _Wire(f"{name} was asked to compute")

        return raising

    def asked(name: str | Backend) -> Backend:
        if name is own:
            return own
        tripped.append(str(getattr(name, "name", name)))
        raise _Wire(f"{tripped[-1]} was asked for")

    try:
        for name, home in BACKENDS.items():
            other = getattr(sys.modules.get(home), "backend", None)
            if other is None or other is own or isinstance(own, type(other)):
                continue
            for method in ("forward", "vjp"):
                undo.append((type(other), method, getattr(type(other), method)))
                setattr(type(other), method, wired(name))
        for module in (registry, execution):
            undo.append((module, "get_backend", module.get_backend))
            setattr(module, "get_backend", asked)  # noqa: B010 - mypy takes functions for constants
        yield
    finally:
        for home, name, value in reversed(undo):
            setattr(home, name, value)


@law("NO-FALLBACK", clauses=("B1",), kills=("falls-back",), quick=16, full=48, live=True)
def no_fallback(trial: Trial) -> None:
    """While a backend computes, no other backend of the library is asked for or computes anything."""
    subject = trial.live()
    question = draw_question(trial.draws, trial.dtype, cotangent=True)
    tripped: list[str] = []
    try:
        with _trip_wires(subject.backend, tripped):
            trial.run(question)
            gradients(trial, question)
    finally:
        if tripped:
            trial.require(False, f"{subject.backend.name} had {', '.join(dict.fromkeys(tripped))} compute for it")
