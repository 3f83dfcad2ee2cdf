"""A short examination on one operator at its own shape: does this backend compute what is going to be deployed?

The exam asks many small questions about everything; this asks two about one operator, at the batch size that it will
have: ordinary tokens, and large ones, whose softmax is nearly an argmax. The result of the first and the last item is
compared with the exact one, element by element, up to the error bound of the dtype; with gradients, those of every
parameter, of which the other items get a cotangent of 0 and so no part.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from translution.algorithms import Request
from translution.conformance.comparison import ComparisonError, check
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.question import Answer, Array, FloatArray, Question, rounded
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.strategies import draw_mask, draw_question
from translution.execution import physical_memory
from translution.geometry import count_links
from translution.normal_form import normal_form
from translution.registry import Backend

# Tokens that are so much larger than those of the first question.
STEEP = 6.0
# Arrays [links, features] of float64 that the exact result and its bound take at once; measured.
_ARRAYS = 12


class CannotCheck(Exception):
    """The exact result of this operator takes more memory than there is."""


def _memory(request: Request, samples: int) -> int:
    form, operator = normal_form(request.operator), request.operator
    features = sum(role.num_heads * role.head_dim for role in form.roles) + operator.dim + operator.keys_dim
    return 8 * _ARRAYS * samples * count_links(operator.layout) * features * (2 if request.gradient else 1)


class OperatorCheck:
    """The questions on one request and their exact results, to be asked of any number of backends.

    Raises:
        CannotCheck: the exact result would take more than half of this machine's memory.
    """

    def __init__(self, request: Request, *, seed: int = 0) -> None:
        self.request = replace(request, return_weights=False)
        self._items = sorted({0, request.batch - 1})
        if (needed := _memory(request, len(self._items))) > physical_memory() // 2:
            raise CannotCheck(
                f"the exact result of {count_links(request.operator.layout):,} links takes about "
                f"{needed / 2**30:,.1f} GiB, and there are {physical_memory() / 2**30:,.1f} GiB: what is as large as "
                "that can't be checked here. Choose on a smaller grid of the same kind"
            )
        first = self._question(seed)
        self._questions = (first, first.but(x=rounded(STEEP * first.x, request.dtype), label="large tokens"))
        self._budgets: dict[tuple[int, str], Budget] = {}

    def _question(self, seed: int) -> Question:
        request, draws = self.request, SeededDraws(seed, "operator check")
        found = draw_question(
            draws, request.dtype, operator=request.operator, masked=False, batch=(request.batch,),
            cotangent=request.gradient,
        )  # fmt: skip
        if request.mask != "none":
            found = found.but(mask=self._mask(draws))
        if found.cotangent is not None:
            kept = np.zeros((request.batch, 1, 1))
            kept[self._items] = 1.0
            found = found.but(cotangent=found.cotangent * kept)
        return found.but(label="ordinary tokens")

    def _mask(self, draws: SeededDraws) -> Array:
        mask = draw_mask(draws, self.request.operator, (self.request.batch,), self.request.dtype, kind="pairs")
        assert mask is not None
        live = mask if mask.dtype == np.bool_ else mask > -np.inf
        return live if self.request.mask == "bool" else np.where(live, 0.0, -np.inf)

    def _of_items(self, question: Question) -> Question:
        """The question on the items that are compared, alone."""
        shape = {
            name: value[self._items] for name, value in (("x", question.x), ("y", question.y)) if value is not None
        }
        if question.cotangent is not None:
            shape["cotangent"] = question.cotangent[self._items]
        return question.but(**shape)

    def _budget(self, number: int, arithmetic: str) -> Budget:
        if (number, arithmetic) not in self._budgets:
            q = self._of_items(self._questions[number])
            self._budgets[number, arithmetic] = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, arithmetic)
        return self._budgets[number, arithmetic]

    def share(self, backend: Backend, algorithm: str) -> float:
        """The largest error as a share of its bound, over all questions, results and gradients: at most 1.

        Raises:
            ComparisonError: a result is beyond its bound, or is none; the message says which and where.
            NotClaimed: the backend does not claim the request.
        """
        subject = LiveSubject(backend, algorithm, self.request.dtype, self.request.device)
        return max(self._asked(subject, number) for number in range(len(self._questions)))

    def _asked(self, subject: LiveSubject, number: int) -> float:
        question, exact = self._questions[number], self._budget(number, subject.arithmetic)
        try:
            answer = subject.vjp(question) if self.request.gradient else subject.run(question)
            shares = [check("out", answer.out[self._items], exact.value, exact.out)]
            shares += [
                check(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])
                for name, gradient in self._gradients(answer).items()
            ]
        except ComparisonError as error:
            raise ComparisonError(f"{question.label}: {error}") from error
        return max(shares)

    def _gradients(self, answer: Answer) -> dict[str, FloatArray]:
        """Those of the items that are compared; what the others get must be 0."""
        found = dict(answer.gradients)
        others = np.setdiff1d(np.arange(self.request.batch), self._items)
        for name in ("x", "y"):
            if name in found:
                if found[name][others].any():
                    raise ComparisonError(f"gradient of {name}: items without a cotangent have one")
                found[name] = found[name][self._items]
        return found
