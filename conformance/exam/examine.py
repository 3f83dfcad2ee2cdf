"""One law, one subject: run its cases and give a verdict, whatever the backend does."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from translution.algorithms import Request
from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.draws import Draws, Rejected, SeededDraws
from translution.conformance.exam.law import Law, Trial
from translution.conformance.exam.question import Question
from translution.conformance.exam.report import Counterexample, Result, Verdict
from translution.conformance.exam.subject import NotClaimed, Subject
from translution.conformance.exam.waivers import NO_WAIVERS, Waivers
from translution.progress import silently
from translution.spec.serialization import operator_to_data

EDITION = "2026.1"
# For each case that has to run, so many numbers are tried until one is claimed.
ATTEMPTS = 12
# After so many numbers without a claim there is none; where there are claims but too few, some more are tried.
FRUITLESS = 24
PATIENCE = 3
LIMIT = 60.0
NO_ANSWER = "no answer within"
Started = Callable[[int], None]
# What a case of a law asks first, where it was refused.
Refused = dict[tuple[str, int], Request]


class Overtime(Exception):
    """A case took longer than its limit."""


class _Rung(BaseException):
    """The clock rang. No ``Exception``, so that a backend's or a subject's ``except`` does not swallow it."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise :class:`_Rung` inside after so many seconds; only Python code in the main thread can be interrupted."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: object) -> None:
        raise _Rung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(slots=True)
class _Tally:
    cases: int = 0
    tried: int = 0
    exact: int = 0
    shares: list[float] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    waived: list[str] = field(default_factory=list)

    def take(self, trial: Trial, returned: Any) -> None:
        self.cases += 1
        self.exact += trial.exact
        if trial.shares:
            self.shares.append(max(trial.shares))
        self.returned.append(returned)


def draws_for(law: Law, number: int, edition: str = EDITION) -> Draws:
    """The choices of case ``number`` of a law: the same for every backend, algorithm and dtype."""
    return SeededDraws(number, f"{edition}/{law.id}")


@contextmanager
def _usual_state() -> Iterator[None]:
    """NumPy's and torch's global settings as they are at first: a backend may change them when it is imported."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
            stack.enter_context(torch.enable_grad())
        yield


def run_case(law: Law, subject: Subject, draws: Draws, limit: float | None = LIMIT) -> tuple[Trial, Any]:
    """One case; what it raises carries the trial, see :func:`trial_of`."""
    trial = Trial(subject, draws)
    try:
        with _usual_state(), limited(limit):
            return trial, law.body(trial)
    except _Rung:
        overtime = Overtime()
        overtime.__dict__["trial"] = trial
        raise overtime from None
    except BaseException as error:
        error.__dict__["trial"] = trial
        raise


def trial_of(error: BaseException) -> Trial:
    """The trial in which :func:`run_case` raised ``error``."""
    found: Trial = error.__dict__["trial"]
    return found


def counterexample(question: Question, number: int, questions: int, *, shrunk: bool = False) -> Counterexample:
    """A question as plain data."""
    arrays = {"x": question.x, "y": question.y, "mask": question.mask}
    shapes = {name: list(value.shape) for name, value in arrays.items() if value is not None}
    return Counterexample(number, repr(question), operator_to_data(question.operator), shapes, questions, shrunk)


def examine(
    law: Law,
    subject: Subject,
    level: str,
    *,
    edition: str = EDITION,
    limit: float | None = LIMIT,
    waivers: Waivers = NO_WAIVERS,
    started: Started = silently,
    attempts: int = ATTEMPTS,
    patience: int = PATIENCE,
    refused: Refused | None = None,
) -> Result:
    """Run ``law`` on ``subject``. Cases that are not claimed make room for later numbers, ``attempts`` for each.

    ``started`` is told the number of each case before it runs. Algorithms and dtypes of one backend are asked for the
    same operators: with ``refused``, which is kept between their exams, a case whose first request is refused again is
    not drawn again.
    """
    refused = {} if refused is None else refused
    tally, begin = _Tally(), time.perf_counter()
    wanted, floor = law.count(level, subject.dtype), law.floor(level, subject.dtype)

    def result(verdict: Verdict, message: str = "", shown: Counterexample | None = None) -> Result:
        return Result(
            law.id, subject.algorithm, subject.dtype, verdict, tally.cases, tally.tried, floor, tally.exact,
            max(tally.shares, default=0.0), tuple(tally.shares), message, tuple(tally.reasons), "",
            time.perf_counter() - begin, shown,
        )  # fmt: skip

    for number in range(patience * wanted * attempts):
        if tally.cases == wanted or (number >= wanted * attempts and tally.cases >= floor):
            break
        if not tally.cases and number >= max(FRUITLESS, 2 * wanted):
            break
        tally.tried += 1
        first = refused.get((law.id, number))
        if first is not None and (reasons := subject.refuses(first)):
            tally.reasons.update(dict.fromkeys(reasons))
            continue
        started(number)
        try:
            trial, returned = run_case(law, subject, draws_for(law, number, edition), limit)
        except NotClaimed as error:
            tally.reasons.update(dict.fromkeys(error.reasons))
            if error.request is not None and len(trial_of(error).asked) <= 1:
                refused[law.id, number] = error.request
        except Rejected:
            tally.tried -= 1
        except (ComparisonError, Overtime) as error:
            message = f"{NO_ANSWER} {limit:g} s" if isinstance(error, Overtime) else str(error)
            asked = trial_of(error).asked
            shown = counterexample(asked[-1], number, len(asked)) if asked else None
            waiver = waivers.find(law.id, subject.algorithm, subject.dtype, asked[-1] if asked else None)
            if waiver is None:
                return result(Verdict.FAIL, message, shown)
            tally.cases += 1
            tally.waived.append(waiver.reason)
        except Exception:  # noqa: BLE001 - the law broke, which says nothing of the backend
            return result(Verdict.UNKNOWN, f"the law itself failed: {traceback.format_exc(limit=-4)}")
        else:
            tally.take(trial, returned)
    return _concluded(law, subject, tally, floor, waivers, result)


def _concluded(
    law: Law,
    subject: Subject,
    tally: _Tally,
    floor: int,
    waivers: Waivers,
    result: Callable[..., Result],
) -> Result:
    if not tally.cases:
        return result(Verdict.NOT_CLAIMED)
    if law.conclude is not None and tally.cases >= floor:
        try:
            law.conclude(tally.returned, subject.dtype)
        except ComparisonError as error:
            waiver = waivers.find(law.id, subject.algorithm, subject.dtype, None)
            if waiver is None:
                return result(Verdict.FAIL, str(error))
            tally.waived.append(waiver.reason)
    if tally.waived:
        return result(Verdict.WAIVED, "; ".join(dict.fromkeys(tally.waived)))
    if tally.cases < floor:
        few = f"only {tally.cases} cases ran, of at least {floor}: {tally.tried} were tried, the others are not claimed"
        return result(Verdict.UNKNOWN, few)
    return result(Verdict.PASS)
