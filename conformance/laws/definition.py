"""What the definition says: the ``reference`` backend's answers in float64, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from translution.conformance.comparison import ComparisonError, share
from translution.conformance.exam.question import Answer, Array, FloatArray, Question, digest
from translution.conformance.exam.remembered import Remembered
from translution.execution import run, vjp

Found = TypeVar("Found")

# The step of the derivative; its square is far below the smallest float64, so that nothing is cut off.
STEP = 1e-40
# A float32 bound is about 2^28 times as wide as one for float64; between the two there is room for what a bound caps.
AGREEMENT = 2.0**-16
_ANSWERS = Remembered(2048)


def _once(
    kind: str, question: Question, compute: Callable[[], Found], more: Mapping[str, Array] | None = None
) -> Found:
    arrays = question.arrays | {f"d{name}": array for name, array in (more or {}).items()}
    return _ANSWERS.once((kind, question.operator, digest(arrays)), compute)


def defined(question: Question) -> Answer:
    """The result and the weights."""

    def compute() -> Answer:
        q = question
        out, weights = run(q.operator, q.params, q.x, q.y, mask=q.mask, backend="reference", return_weights=True)
        return Answer(out, weights)

    return _once("run", question, compute)


def defined_gradients(question: Question) -> Answer:
    """The result and all gradients of <cotangent, out>."""

    def compute() -> Answer:
        q = question
        assert q.cotangent is not None
        out, found = vjp(q.operator, q.params, q.x, q.y, cotangent=q.cotangent, mask=q.mask, backend="reference")
        gradients: dict[str, FloatArray] = {**found.params, "x": found.x}
        if found.y is not None:
            gradients["y"] = found.y
        return Answer(out, None, gradients)

    return _once("vjp", question, compute)


def slope(question: Question, direction: Mapping[str, FloatArray]) -> FloatArray:
    """Derivative of the result where parameters, x and y move along ``direction``: Im f(. + i STEP d) / STEP."""

    def compute() -> FloatArray:
        q = question
        moved = {name: q.params[name] + 1j * STEP * direction[name] for name in q.params}
        x = q.x + 1j * STEP * direction["x"]
        y = None if q.y is None else q.y + 1j * STEP * direction["y"]
        found: FloatArray = run(q.operator, moved, x, y, mask=q.mask, backend="reference").imag / STEP
        return found

    return _once("slope", question, compute, direction)


def require_agreement(name: str, budgeted: FloatArray, want: FloatArray, bound: FloatArray) -> None:
    """Definition and error model must say the same: their difference is of float64's size, whatever the bound is for.

    Raises:
        AssertionError: they don't, so that nothing can be said about a backend.
    """
    try:
        used = share(name, budgeted, want, bound)
    except ComparisonError as error:
        raise AssertionError(f"the error model and the definition disagree: {error}") from error
    if used > 1:
        raise AssertionError(f"the error model and the definition disagree on {name}: {used:.3g} of what is allowed")
