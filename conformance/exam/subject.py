"""Who is examined. A live subject is a backend that is called; other subjects answer from files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np

from translution.algorithms import Request
from translution.conformance.comparison import ComparisonError, as_numpy
from translution.conformance.exam.question import Answer, FloatArray, Question
from translution.execution import reasons_against, run, vjp
from translution.registry import Backend, claims_of


class NotClaimed(Exception):
    """The subject does not claim to answer this question; carries its reasons, and the request where it refused one."""

    def __init__(self, reasons: list[str], request: Request | None = None) -> None:
        super().__init__("; ".join(reasons))
        self.reasons, self.request = reasons, request


class BackendFailure(ComparisonError):
    """The backend raised, or returned something that is no answer."""


def told(error: BaseException) -> str:
    """Type and message, whatever the message does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - its __str__ is the backend's
        return f"{type(error).__name__}, whose message can't be read"


class Subject(ABC):
    """Someone who answers questions in one dtype. ``arithmetic`` names the error model of its answers."""

    dtype: str
    algorithm: str

    def refuses(self, request: Request) -> list[str]:
        """Why it does not claim a request like this one, in its own dtype; empty where that is not known."""
        return []

    @property
    def arithmetic(self) -> str:
        """Key of :data:`translution.conformance.rounding.ARITHMETIC`."""
        return self.dtype

    @property
    def deterministic(self) -> bool:
        """Whether the same question always gets the same bits."""
        return True

    @abstractmethod
    def run(self, question: Question) -> Answer:
        """The result, and the weights where asked for.

        Raises:
            NotClaimed: the subject does not claim this.
            BackendFailure: it claims this and gave no answer of the right kind, shape and dtype.
        """

    @abstractmethod
    def vjp(self, question: Question) -> Answer:
        """The result and all gradients of <cotangent, out>; raises as :meth:`run`."""

    def require_claim(self, question: Question, *, gradient: bool = False) -> None:  # noqa: B027 - see refuses
        """Raise :class:`NotClaimed` where that is known before the question is asked."""


class LiveSubject(Subject):
    """A backend with one of its algorithms in one dtype. Every call gets fresh arrays."""

    def __init__(self, backend: Backend, algorithm: str, dtype: str, device: str = "cpu") -> None:
        self.backend, self.algorithm, self.dtype, self.device = backend, algorithm, dtype, device
        self.claims = claims_of(backend)

    @property
    def arithmetic(self) -> str:
        """What the backend declares for this dtype, tf32 for instance; else the dtype's own."""
        return self.claims.arithmetic.get(self.dtype, self.dtype)

    @property
    def deterministic(self) -> bool:
        """What the backend claims for its device."""
        return self.claims.is_deterministic(self.device.partition(":")[0])

    def native(self, value: Any) -> Any:
        """A fresh array of the backend's kind; numbers in the subject's dtype, bools as they are."""
        own = np.array(value)
        if self.backend.kind == "numpy":
            return own if own.dtype == np.bool_ else own.astype(self.dtype)
        import torch

        found = torch.from_numpy(own).to(self.device)
        return found if own.dtype == np.bool_ else found.to(getattr(torch, self.dtype))

    def arguments(self, question: Question) -> dict[str, Any]:
        """Keyword arguments of :func:`translution.run`, all arrays fresh."""
        return {
            "operator": question.operator,
            "params": {name: self.native(value) for name, value in question.params.items()},
            "x": self.native(question.x),
            "y": None if question.y is None else self.native(question.y),
            "mask": None if question.mask is None else self.native(question.mask),
            "backend": self.backend,
            "algorithm": self.algorithm,
        }

    def request(self, question: Question, *, gradient: bool = False) -> Request:
        """What the backend is asked whether it supports."""
        mask = "none" if question.mask is None else "bool" if question.mask.dtype == np.bool_ else "float"
        batch = int(np.prod(question.x.shape[:-2], dtype=int))
        return Request(
            question.operator, batch, self.dtype, self.device, mask, question.return_weights, gradient=gradient
        )

    def reasons(self, question: Question, *, gradient: bool = False) -> list[str]:
        """Why the backend does not claim this; empty where it does."""
        return self._reasons(self._recording(question, gradient))

    def _recording(self, question: Question, gradient: bool) -> Request:
        """The request, where ``gradient`` with tensors that record one."""
        return self.request(question, gradient=gradient and self.backend.kind == "torch")

    def _reasons(self, request: Request) -> list[str]:
        try:
            return reasons_against(self.backend, request, self.algorithm)
        except (Exception, SystemExit) as error:
            raise BackendFailure(f"not_supported raised {told(error)}") from error

    def refuses(self, request: Request) -> list[str]:
        """As :class:`Subject` says."""
        if request.gradient and self.backend.kind != "torch":
            return []
        try:
            return self._reasons(replace(request, dtype=self.dtype, device=self.device))
        except BackendFailure:  # told when the case is run
            return []

    def require_claim(self, question: Question, *, gradient: bool = False) -> None:
        """As :class:`Subject` says."""
        request = self._recording(question, gradient)
        if reasons := self._reasons(request):
            raise NotClaimed(reasons, request)

    def run(self, question: Question) -> Answer:
        """As :class:`Subject` says."""
        self.require_claim(question)
        try:
            found = run(**self.arguments(question), return_weights=question.return_weights)
        except (Exception, SystemExit) as error:
            raise BackendFailure(f"claimed, but raised {told(error)}") from error
        if not question.return_weights:
            return Answer(self.widened("out", found, question.out_shape))
        if not isinstance(found, tuple) or len(found) != 2:
            raise BackendFailure(f"return_weights gave a {type(found).__name__}, not (out, weights)")
        out, weights = found
        return Answer(
            self.widened("out", out, question.out_shape), self.widened("weights", weights, question.weights_shape)
        )

    def vjp(self, question: Question) -> Answer:
        """As :class:`Subject` says. A backend without gradients claims ``gradient_order`` 0."""
        assert question.cotangent is not None
        if self.claims.gradient_order < 1:
            raise NotClaimed([f"{self.backend.name} claims no gradients (gradient_order 0)"])
        self.require_claim(question, gradient=True)
        try:
            out, found = vjp(**self.arguments(question), cotangent=self.native(question.cotangent))
        except (Exception, SystemExit) as error:
            order = self.claims.gradient_order
            raise BackendFailure(
                f"gradients are claimed (gradient_order {order}), but vjp raised {told(error)}"
            ) from error
        if set(found.params) != set(question.params):
            raise BackendFailure(f"gradients for {sorted(found.params)}, parameters are {sorted(question.params)}")
        shapes = {name: value.shape for name, value in question.params.items()} | {"x": question.x.shape}
        given: dict[str, Any] = {**found.params, "x": found.x}
        if question.y is not None:
            shapes["y"], given["y"] = question.y.shape, found.y
        gradients = {name: self.widened(f"gradient of {name}", given[name], shape) for name, shape in shapes.items()}
        return Answer(self.widened("out", out, question.out_shape), None, gradients)

    def widened(self, name: str, value: Any, shape: tuple[int, ...]) -> FloatArray:
        """``value`` as float64, after checking that it is an array of that shape in the subject's dtype."""
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        if dtype != self.dtype:
            raise BackendFailure(f"{name} is {dtype}, expected an array of {self.dtype}")
        if tuple(value.shape) != shape:
            raise BackendFailure(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        return np.array(as_numpy(value), np.float64)
