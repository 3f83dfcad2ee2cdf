"""Hypothesis at work on a law: new cases with a memory, and failures made small. The host's profile is not touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, reject, seed, settings, strategies
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import Flaky, Unsatisfiable

from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.draws import HypothesisDraws, Rejected
from translution.conformance.exam.examine import LIMIT, Overtime, Started, counterexample, run_case, trial_of
from translution.conformance.exam.law import Law
from translution.conformance.exam.report import Counterexample, Result, Verdict
from translution.conformance.exam.subject import NotClaimed, Subject, told
from translution.progress import silently

EXPLORED = -1  # the number of a case that is not of the edition


class _OutOfTime(BaseException):
    """Passes through Hypothesis, which lets only exceptions that are no ``Exception`` out."""


@dataclass(slots=True)
class _Smallest:
    """The smallest failing case so far: its message and its question."""

    size: float = float("inf")
    message: str = ""
    shown: Counterexample | None = None

    def see(self, error: BaseException, message: str) -> None:
        asked = trial_of(error).asked
        arrays = [a for q in asked for a in (q.x, q.y, q.mask, *q.params.values()) if a is not None]
        size = sum(array.size for array in arrays) if asked else 0.0
        if size < self.size:
            shown = counterexample(asked[-1], EXPLORED, len(asked), shrunk=True) if asked else None
            self.size, self.message, self.shown = size, message, shown


class _Search:
    """One run of Hypothesis over the cases of a law."""

    def __init__(self, law: Law, subject: Subject, limit: float | None, until: float, started: Started) -> None:
        self.law, self.subject, self.limit, self.until, self.started = law, subject, limit, until, started
        self.smallest = _Smallest()
        self.cases = self.tried = self.exact = 0
        self.shares: list[float] = []
        self.reasons: dict[str, None] = {}

    def attempt(self, data: Any) -> None:
        if time.monotonic() > self.until:
            raise _OutOfTime
        self.tried += 1
        self.started(EXPLORED)
        try:
            trial, _ = run_case(self.law, self.subject, HypothesisDraws(data), self.limit)
        except NotClaimed as error:
            self.reasons.update(dict.fromkeys(error.reasons))
            reject()
        except Rejected:
            reject()
        except ComparisonError as error:
            self.smallest.see(error, str(error))
            raise
        except Overtime as error:
            self.smallest.see(error, f"no answer within {self.limit:g} s")
            raise
        self.cases += 1
        self.exact += trial.exact
        if trial.shares:
            self.shares.append(max(trial.shares))

    def go(self, examples: int, *, number: int | None, database: Path | None) -> None:
        """Search; what fails is in ``smallest`` afterwards. A ``number`` makes the search the same every time."""
        run: Callable[[], None] = given(strategies.data())(lambda data: self.attempt(data))
        chosen = settings(
            max_examples=examples,
            database=None if database is None else DirectoryBasedExampleDatabase(database),
            deadline=None,
            suppress_health_check=tuple(HealthCheck),  # pyright: ignore[reportArgumentType] - its metaclass iterates members
            report_multiple_bugs=False,
            print_blob=False,
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
        )
        run = chosen(run)
        if number is not None:
            run = seed(number)(run)
        try:
            run()
        except (ComparisonError, Overtime, Flaky, Unsatisfiable, _OutOfTime):
            return


def smaller(
    law: Law,
    subject: Subject,
    seconds: float,
    *,
    limit: float | None = LIMIT,
    started: Started = silently,
) -> tuple[str, Counterexample] | None:
    """A small case that breaks ``law`` and its message, found within ``seconds``; None if none turned up."""
    search = _Search(law, subject, limit, time.monotonic() + seconds, started)
    try:
        search.go(200, number=0, database=None)
    except Exception:  # noqa: BLE001 - the verdict stands; only its example stays as large as it was
        return None
    found = search.smallest
    return None if found.shown is None else (found.message, found.shown)


def explore(
    law: Law,
    subject: Subject,
    examples: int,
    *,
    database: Path | None = None,
    limit: float | None = LIMIT,
    started: Started = silently,
) -> Result:
    """Random cases beyond the edition, at most ``examples``; ``database`` remembers failures, which come first."""
    begin = time.perf_counter()
    search = _Search(law, subject, limit, float("inf"), started)
    own = None if database is None else database / law.id / f"{subject.algorithm}-{subject.dtype}"
    message, verdict = "", Verdict.PASS
    try:
        search.go(examples, number=None, database=own)
    except Exception as error:  # noqa: BLE001 - the law itself broke
        message, verdict = f"the law itself failed: {told(error)}", Verdict.UNKNOWN
    if search.smallest.message:
        message, verdict = search.smallest.message, Verdict.FAIL
    elif not search.cases and verdict is Verdict.PASS:
        verdict = Verdict.NOT_CLAIMED
    return Result(
        law.id, subject.algorithm, subject.dtype, verdict, search.cases, search.tried, 0, search.exact,
        max(search.shares, default=0.0), tuple(search.shares), message, tuple(search.reasons), "",
        time.perf_counter() - begin, search.smallest.shown,
    )  # fmt: skip
