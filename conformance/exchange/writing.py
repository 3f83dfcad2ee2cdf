"""Export: the laws are asked for their questions, and these are written down."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from translution.conformance.comparison import ComparisonError
from translution.conformance.error_model import budget
from translution.conformance.exam.draws import Rejected
from translution.conformance.exam.examine import EDITION, draws_for
from translution.conformance.exam.law import FULL, QUICK, Law, Trial
from translution.conformance.exam.question import Answer, FloatArray, Question, rounded
from translution.conformance.exam.setting import EXAMINED, versions
from translution.conformance.exam.subject import NotClaimed, Subject
from translution.conformance.exchange.paper import (
    EXAM,
    QUESTIONS,
    SCHEMA,
    SUFFIX,
    VERSION,
    ExchangeError,
    Kind,
    answer_shapes,
    arrays_of,
    identity,
    kind_of,
    stored,
    write_tensors,
)
from translution.conformance.laws import all_laws
from translution.conformance.laws.definition import defined, defined_gradients
from translution.errors import UnknownName
from translution.spec.serialization import operator_to_data

# Numbers that are written for each case that has to run: room for a backend that claims only part of them.
BREADTH = 2


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What was written: ``questions`` by dtype, ``bytes`` of all files, and the laws that only a running backend can be
    asked (``live``)."""

    folder: Path
    laws: int
    cases: int
    questions: Mapping[str, int]
    bytes: int
    live: tuple[str, ...]


class _NoJudge(Trial):
    """A trial whose law only asks."""

    def within(self, name: str, got: Any, want: Any, bound: Any) -> None:
        """Says nothing."""

    def same(self, name: str, got: Any, want: Any) -> None:
        """Says nothing."""

    def require(self, holds: bool, otherwise: str) -> None:
        """Says nothing."""


@dataclass(slots=True)
class _Exam:
    """The content of exam.json while it grows, and the files beside it."""

    folder: Path
    bytes: int = 0
    operators: list[dict[str, Any]] = field(default_factory=list)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def operator(self, data: dict[str, Any]) -> int:
        """The place of an operator in the list, put there where it is new."""
        text = json.dumps(data)
        if text not in self._places:
            self._places[text] = len(self.operators)
            self.operators.append(data)
        return self._places[text]

    def add(self, question: Question, kind: Kind, dtype: str, right: Answer) -> str:
        """Write a question that is new; its id."""
        name = identity(question, kind, dtype)
        if name not in self.questions:
            file = f"{QUESTIONS}/{name}{SUFFIX}"
            given = {key: stored(value, dtype) for key, value in arrays_of(question, kind).items()}
            self.bytes += write_tensors(self.folder / file, given | _expected(question, kind, dtype, right))
            self.questions[name] = {
                "id": name,
                "kind": kind,
                "dtype": dtype,
                "operator": self.operator(operator_to_data(question.operator)),
                "file": file,
                "answers": {key: list(shape) for key, shape in answer_shapes(question, kind).items()},
            }
        return name


def _named(right: Answer, kind: Kind) -> dict[str, FloatArray]:
    found = {"out": right.out}
    if kind == "weights":
        assert right.weights is not None
        found["weights"] = right.weights
    return found | {f"gradient.{name}": value for name, value in right.gradients.items()}


def _expected(question: Question, kind: Kind, dtype: str, right: Answer) -> dict[str, FloatArray]:
    """``expected.NAME`` and ``bound.NAME`` of every array that is asked for."""
    q = question
    allowed = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent if kind == "vjp" else None, dtype)
    bounds = {"out": allowed.out, "weights": allowed.weights_bound}
    bounds |= {f"gradient.{name}": value for name, value in allowed.gradients.items()}
    found = {}
    for name, value in _named(right, kind).items():
        found[f"expected.{name}"] = np.ascontiguousarray(value)
        found[f"bound.{name}"] = np.where(np.isfinite(value), bounds[name], 0.0)
    return found


class RecordingSubject(Subject):
    """Answers as the definition does and keeps every question; ``asked`` has the ids of the case so far."""

    algorithm = "definition"

    def __init__(self, dtype: str, keep: Callable[[Question, Kind, str, Answer], str]) -> None:
        self.dtype, self._keep, self.asked = dtype, keep, list[str]()

    def run(self, question: Question) -> Answer:
        """As :class:`Subject` says."""
        kind = kind_of(question)
        return self._answered(question, kind, defined(question))

    def vjp(self, question: Question) -> Answer:
        """As :class:`Subject` says."""
        return self._answered(question, "vjp", defined_gradients(question))

    def _answered(self, question: Question, kind: Kind, right: Answer) -> Answer:
        self.asked.append(self._keep(question, kind, self.dtype, right))
        weights = right.weights if kind == "weights" else None
        return Answer(
            rounded(right.out, self.dtype),
            None if weights is None else rounded(weights, self.dtype),
            {name: rounded(value, self.dtype) for name, value in right.gradients.items()},
        )


def paper_laws(laws: Sequence[str] | None) -> dict[str, Law]:
    """The laws that can be sat on paper, all or only those asked for.

    Raises:
        UnknownName: there is no such law.
        ExchangeError: it looks at a running backend, or no law is left.
    """
    every = all_laws()
    for name in laws or ():
        if name not in every:
            raise UnknownName("law", name, list(every))
        if every[name].live:
            raise ExchangeError(f"law {name} looks at a backend while it runs: it can't be sat on paper")
    found = {name: law for name, law in every.items() if not law.live and (laws is None or name in laws)}
    if not found:
        raise ExchangeError("no law is chosen")
    return found


def _asked(law: Law, dtype: str, edition: str, numbers: int, exam: _Exam) -> Iterator[dict[str, Any]]:
    """The cases of a law in one dtype; numbers that lead to no case are left out."""
    for number in range(numbers):
        subject = RecordingSubject(dtype, exam.add)
        # A law that breaks off here breaks off at the same place when it is marked.
        with contextlib.suppress(ComparisonError, NotClaimed, Rejected):
            law.body(_NoJudge(subject, draws_for(law, number, edition)))
        if subject.asked:
            yield {"law": law.id, "dtype": dtype, "number": number, "questions": subject.asked}


def export(
    folder: str | Path,
    *,
    level: str = QUICK,
    dtypes: Sequence[str] = ("float64", "float32"),
    laws: Sequence[str] | None = None,
    edition: str = EDITION,
    breadth: int = BREADTH,
) -> ExportSummary:
    """Write an exam into a new or empty folder; :mod:`translution.conformance.exchange.paper` says in which form.

    ``breadth`` numbers are written for each case that has to run, so that a backend which claims only some of them
    still gets enough.

    Raises:
        UnknownName: no such law, level, dtype or edition.
        ExchangeError: the folder holds something, can't be written, or a law can't be sat on paper.
    """
    for name, known, given in (
        ("level", (QUICK, FULL), [level]),
        ("edition", (EDITION,), [edition]),
        ("dtype", EXAMINED, dtypes),
    ):
        for one in given:
            if one not in known:
                raise UnknownName(name, one, known)
    if not dtypes or breadth < 1:
        raise ExchangeError(f"dtypes={list(dtypes)}, breadth={breadth}: an exam has at least one dtype and one number")
    chosen, home = paper_laws(laws), Path(folder)
    try:
        (home / QUESTIONS).mkdir(parents=True, exist_ok=True)
        if any(path.name != QUESTIONS for path in home.iterdir()) or any((home / QUESTIONS).iterdir()):
            raise ExchangeError(f"{home} is not empty: give a new folder")
        exam = _Exam(home)
        for law in chosen.values():
            for dtype in dict.fromkeys(dtypes):
                if law.applies_to(dtype):
                    exam.cases.extend(_asked(law, dtype, edition, law.count(level, dtype) * breadth, exam))
        content = {
            "schema": SCHEMA,
            "version": VERSION,
            "edition": edition,
            "level": level,
            "dtypes": list(dict.fromkeys(dtypes)),
            "breadth": breadth,
            "chosen_laws": None if laws is None else list(chosen),
            "versions": versions(),
            "laws": [
                {"id": law.id, "statement": law.statement, "clauses": list(law.clauses)} for law in chosen.values()
            ],
            "operators": exam.operators,
            "questions": list(exam.questions.values()),
            "cases": exam.cases,
        }
        text = _lines(content)
        (home / EXAM).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExchangeError(f"{home} can't be written: {error.strerror or error}") from error
    counts = Counter(question["dtype"] for question in exam.questions.values())
    live = tuple(name for name, law in all_laws().items() if law.live)
    return ExportSummary(home, len(chosen), len(exam.cases), dict(counts), exam.bytes + len(text.encode()), live)


def _lines(content: Mapping[str, Any]) -> str:
    """JSON with one line for each field, and for each item of a list of objects."""

    def shown(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {shown(value)}" for name, value in content.items()) + "\n}\n"
