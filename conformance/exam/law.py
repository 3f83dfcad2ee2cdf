"""A law is a small function that asks questions and says what must hold of the answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from translution.conformance.comparison import ComparisonError, check
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.question import Answer, Question, digest
from translution.conformance.exam.remembered import Remembered
from translution.conformance.exam.subject import LiveSubject, NotClaimed, Subject

Body = Callable[["Trial"], Any]
Conclusion = Callable[[Sequence[Any], str], None]

QUICK, FULL = "quick", "full"
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Law:
    """A law of the exam.

    ``clauses`` are those of docs/specification.md that it checks, ``kills`` the mutants that it must catch. ``cases``
    are run at level quick and full, see :meth:`count`; fewer than :meth:`floor` say nothing. ``dtypes`` None stands for
    all. A ``live`` law looks at the backend itself and can't be sat on paper. ``conclude`` judges what the body
    returned over all cases, given the dtype.
    """

    id: str
    statement: str
    clauses: tuple[str, ...]
    kills: tuple[str, ...]
    body: Body
    cases: dict[str, int]
    dtypes: tuple[str, ...] | None
    live: bool
    conclude: Conclusion | None
    least: int = 3

    def count(self, level: str, dtype: str) -> int:
        """Cases in that dtype. The 16-bit formats are asked half as many at level quick, save where a law is theirs
        alone or judges all its cases together.
        """
        whole = self.cases[level]
        theirs = self.dtypes is not None and set(self.dtypes) <= set(HALVES)
        halved = level == QUICK and dtype in HALVES and not theirs and self.conclude is None
        return -(-whole // 2) if halved else whole

    def floor(self, level: str, dtype: str) -> int:
        """How many cases a verdict needs: a quarter, and at least ``least`` where there are so many."""
        wanted = self.count(level, dtype)
        return max(wanted // 4, min(self.least, wanted))

    def applies_to(self, dtype: str) -> bool:
        """Whether the law is asked in that dtype."""
        return self.dtypes is None or dtype in self.dtypes


_LAWS: dict[str, Law] = {}


def law(
    name: str,
    *,
    clauses: Sequence[str],
    kills: Sequence[str] = (),
    quick: int = 4,
    full: int = 25,
    dtypes: Sequence[str] | None = None,
    live: bool = False,
    conclude: Conclusion | None = None,
    least: int = 3,
) -> Callable[[Body], Body]:
    """Register a function as the law ``name``; its docstring is the statement."""

    def register(body: Body) -> Body:
        if name in _LAWS:
            raise ValueError(f"law {name} exists already")
        statement = " ".join((inspect.getdoc(body) or "").split())
        if not statement:
            raise ValueError(f"law {name} has no statement")
        chosen = None if dtypes is None else tuple(dtypes)
        counts = {QUICK: quick, FULL: full}
        _LAWS[name] = Law(name, statement, tuple(clauses), tuple(kills), body, counts, chosen, live, conclude, least)
        return body

    return register


def registered() -> dict[str, Law]:
    """The laws that have been imported, by id."""
    return dict(_LAWS)


# Algorithms of one backend are asked the same questions, one after the other.
BUDGETS = Remembered(512)


def _budget(question: Question, arithmetic: str) -> Budget:
    q = question
    key = q.operator, arithmetic, digest(q.arrays)
    return BUDGETS.once(key, lambda: budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, arithmetic))


class Trial:
    """One case of a law: where its choices come from, who answers, and what was found."""

    def __init__(self, subject: Subject, draws: Draws) -> None:
        self.subject, self.draws = subject, draws
        self.asked: list[Question] = []
        self.shares: list[float] = []
        self.exact = 0
        self._budgets: dict[Question, Budget] = {}

    @property
    def dtype(self) -> str:
        """The dtype of the answers."""
        return self.subject.dtype

    def require_claim(self, question: Question, *, gradient: bool = False) -> None:
        """Go on only with what the subject may claim: before a long preparation, or a call of one's own."""
        self.subject.require_claim(question, gradient=gradient)

    def run(self, question: Question) -> Answer:
        """Ask for the result."""
        self.asked.append(question)
        return self.subject.run(question)

    def vjp(self, question: Question) -> Answer:
        """Ask for result and gradients."""
        self.asked.append(question)
        return self.subject.vjp(question)

    def budget(self, question: Question) -> Budget:
        """The exact result and the bound of every element, gradients too where there is a cotangent."""
        if question not in self._budgets:
            self._budgets[question] = _budget(question, self.subject.arithmetic)
        return self._budgets[question]

    def live(self) -> LiveSubject:
        """The backend itself, for laws that look at more than its answers."""
        if not isinstance(self.subject, LiveSubject):
            raise NotClaimed(["this law looks at a backend while it runs"])
        return self.subject

    def within(self, name: str, got: Any, want: Any, bound: Any) -> None:
        """``got`` equals ``want`` up to ``bound``, element by element; NaN and Inf stand in the same places."""
        self.shares.append(check(name, got, want, bound))

    def same(self, name: str, got: Any, want: Any) -> None:
        """Equal bit by bit (0 equals -0, NaN equals NaN)."""
        found, expected = np.asarray(got), np.asarray(want)
        if found.shape != expected.shape:
            raise ComparisonError(f"{name}: shape {found.shape}, expected {expected.shape}")
        unequal = ~((found == expected) | (np.isnan(found) & np.isnan(expected)))
        if unequal.any():
            where = tuple(int(i) for i in np.argwhere(unequal)[0])
            raise ComparisonError(
                f"{name}{list(where)}: {found[where]}, expected exactly {expected[where]}; "
                f"{int(unequal.sum())} of {unequal.size} elements differ"
            )
        self.exact += 1

    def require(self, holds: bool, otherwise: str) -> None:
        """Whether ``holds``; the message says what was found instead."""
        if not holds:
            raise ComparisonError(otherwise)
        self.exact += 1
