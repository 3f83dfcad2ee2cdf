"""Marking: the laws ask their questions again, and the answers are looked up in files."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from translution.conformance.exam.examine import EDITION, examine
from translution.conformance.exam.law import Law
from translution.conformance.exam.question import Answer, FloatArray, Question, rounded
from translution.conformance.exam.report import Report, Result, Verdict
from translution.conformance.exam.setting import versions
from translution.conformance.exam.subject import BackendFailure, NotClaimed, Subject
from translution.conformance.exam.waivers import NO_WAIVERS, read_waivers
from translution.conformance.exchange.paper import (
    ACCEPTED,
    EXAM,
    MANIFEST,
    SCHEMA,
    SUFFIX,
    VERSION,
    ExchangeError,
    Kind,
    Unreadable,
    answer_shapes,
    identity,
    kind_of,
    read_json,
    read_tensors,
)
from translution.conformance.exchange.writing import paper_laws
from translution.conformance.laws import all_laws
from translution.conformance.rounding import ARITHMETIC
from translution.errors import UnknownName

ALGORITHM = "written"
TOO_FEW = "only "
AGAIN = "export the exam again, answer that, and mark it with the same installation"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` beside the answers says: every field may be left out.

    ``answered`` is how many answers were written when the program was through: it refuses all other questions.
    """

    name: str
    arithmetic: Mapping[str, str]
    deterministic: bool
    answered: int | None

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a folder; :class:`ExchangeError` where it says something it can't."""
        path = folder / MANIFEST
        data = read_json(path) if path.exists() else {}
        kinds = {"name": str, "arithmetic": dict, "deterministic": bool, "answered": int}
        wrong = sorted(data.keys() - kinds.keys()) if isinstance(data, dict) else type(data).__name__
        if wrong:
            raise ExchangeError(f"{path}: {wrong}; the fields are {', '.join(kinds)}")
        for name, value in data.items():
            # JSON's true is no whole number.
            if type(value) is not kinds[name]:
                wanted = "number of files" if name == "answered" else kinds[name].__name__
                raise ExchangeError(f"{path}: {name} is a {type(value).__name__}, expected a {wanted}")
        arithmetic = data.get("arithmetic", {})
        for dtype, used in arithmetic.items():
            if dtype not in ACCEPTED or not isinstance(used, str) or used not in ARITHMETIC:
                raise ExchangeError(
                    f"{path}: arithmetic {dtype}: {used}; it maps {', '.join(ACCEPTED)} to {', '.join(ARITHMETIC)}"
                )
            if dtype == "float64" and used != dtype:
                raise ExchangeError(f"{path}: arithmetic {dtype}: {used}; float64 is float64 (D3)")
        name = data.get("name") or folder.resolve().name
        return cls(name, arithmetic, data.get("deterministic", True), data.get("answered"))


@dataclass(frozen=True, slots=True)
class Paper:
    """An exported exam: the ids of every case by (law, dtype, number), and the file of every question."""

    edition: str
    level: str
    breadth: int
    dtypes: tuple[str, ...]
    laws: dict[str, Law]
    cases: dict[tuple[str, str, int], frozenset[str]]
    files: dict[str, str]
    written_with: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Paper:
        """The exam of a folder.

        Raises:
            ExchangeError: it is none, or one of another version or edition, or of other laws.
        """
        path = folder / EXAM
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ExchangeError(f"{path} is no {SCHEMA}")
        for name, own in (("version", VERSION), ("edition", EDITION)):
            if data.get(name) != own:
                raise ExchangeError(f"{path}: {name} is {data.get(name)!r}, this is {own!r}: {AGAIN}")
        try:
            laws = paper_laws([law["id"] for law in data["laws"]])
            if data["chosen_laws"] is None and laws.keys() != paper_laws(None).keys():
                more = sorted(paper_laws(None).keys() - laws.keys())
                raise ExchangeError(f"{path} was written before there were the laws {', '.join(more)}: {AGAIN}")
            cases = {
                (case["law"], case["dtype"], case["number"]): frozenset(case["questions"]) for case in data["cases"]
            }
            files = {question["id"]: question["file"] for question in data["questions"]}
            return cls(
                data["edition"], data["level"], data["breadth"], tuple(data["dtypes"]), laws, cases, files,
                data["versions"],
            )  # fmt: skip
        except UnknownName as error:
            raise ExchangeError(f"{path}: {error}. {AGAIN.capitalize()}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ExchangeError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class WrittenSubject(Subject):
    """Answers from the files of a folder. :meth:`begin` says which case the next questions belong to."""

    algorithm = ALGORITHM

    def __init__(self, paper: Paper, folder: Path, manifest: Manifest, law: str, dtype: str) -> None:
        self._paper, self._folder, self._law, self.dtype = paper, folder, law, dtype
        self._arithmetic = manifest.arithmetic.get(dtype, dtype)
        self._deterministic = manifest.deterministic
        self._number, self.asked = 0, list[str]()

    @property
    def deterministic(self) -> bool:
        """What the manifest says."""
        return self._deterministic

    @property
    def arithmetic(self) -> str:
        """What the manifest declares for this dtype, else the dtype's own."""
        return self._arithmetic

    def begin(self, number: int) -> None:
        """Case ``number`` begins."""
        self._number, self.asked = number, []

    def run(self, question: Question) -> Answer:
        """As :class:`Subject` says."""
        return self._answer(question, kind_of(question))

    def vjp(self, question: Question) -> Answer:
        """As :class:`Subject` says."""
        return self._answer(question, "vjp")

    def _answer(self, question: Question, kind: Kind) -> Answer:
        name = identity(question, kind, self.dtype)
        if name not in self._paper.cases.get((self._law, self.dtype, self._number), ()):
            raise OtherQuestion(f"{self._law} in {self.dtype}, case {self._number}")
        self.asked.append(name)
        path = self._folder / f"{name}{SUFFIX}"
        if not path.exists():
            raise NotClaimed(["no answer"])
        try:
            tensors = read_tensors(path)
        except Unreadable as error:
            raise BackendFailure(str(error)) from error
        shapes = answer_shapes(question, kind)
        if tensors.keys() != shapes.keys():
            raise BackendFailure(f"{path.name} holds {sorted(tensors)}, asked for is {sorted(shapes)}")
        found = {key: self._checked(f"{path.name}: {key}", *tensors[key], shape) for key, shape in shapes.items()}
        gradients = {key.removeprefix("gradient."): found[key] for key in found if key.startswith("gradient.")}
        return Answer(found["out"], found.get("weights"), gradients)

    def _checked(self, name: str, kind: str, value: Any, shape: tuple[int, ...]) -> FloatArray:
        if kind not in ACCEPTED[self.dtype]:
            raise BackendFailure(f"{name} is {kind}, expected {' or '.join(ACCEPTED[self.dtype])}")
        if value.shape != shape:
            raise BackendFailure(f"{name} has shape {value.shape}, expected {shape}")
        array: FloatArray = np.asarray(value, np.float64)
        if kind == "F32" and self.dtype in ("float16", "bfloat16"):
            near = rounded(array, self.dtype)
            wrong = ~((near == array) | np.isnan(array))
            if wrong.any():
                where = tuple(int(i) for i in np.argwhere(wrong)[0])
                raise BackendFailure(f"{name}{list(where)} is {array[where]!r}, which no {self.dtype} holds")
        return array


class OtherQuestion(BaseException):
    """A law asks what is not on paper. No ``Exception``, so that it is not taken for a failure of the law."""


def mark(folder: str | Path, answers: str | Path, *, waivers: str | Path | None = None) -> Report:
    """Mark the answers to an exported exam.

    A question without an answer is not claimed where the manifest says how many answers there are, and so many there
    are; otherwise nobody knows whether an answer is missing, and the verdict on its law is UNKNOWN. A law with too few
    answered cases that all hold is not claimed. An answer that is broken or of the wrong shape or dtype fails. The
    questions are drawn again here and compared with those on paper, so that nothing in ``folder`` is taken on trust.

    Raises:
        ExchangeError: the exam is of another version, edition or installation, or the answers belong to another.
        WaiverError: the waiver file says something it can't.
    """
    begin, home = time.perf_counter(), Path(answers)
    paper = Paper.read(Path(folder))
    if not home.is_dir():
        raise ExchangeError(f"{home} is no folder")
    manifest = Manifest.read(home)
    answered = {path.stem for path in home.glob(f"*{SUFFIX}")}
    if strange := sorted(answered - paper.files.keys()):
        raise ExchangeError(
            f"{home}: {len(strange)} of {len(answered)} answers belong to no question of {folder}, "
            f"{strange[0]}{SUFFIX} for instance: are they of another exam?"
        )
    excused = NO_WAIVERS if waivers is None else read_waivers(Path(waivers), all_laws())
    results = []
    for law in paper.laws.values():
        for dtype in paper.dtypes:
            if not law.applies_to(dtype):
                continue
            subject = WrittenSubject(paper, home, manifest, law.id, dtype)
            try:
                result = examine(
                    law, subject, paper.level, edition=paper.edition, limit=None, waivers=excused,
                    started=subject.begin, attempts=paper.breadth, patience=1,
                )  # fmt: skip
            except OtherQuestion as error:
                raise ExchangeError(f"{folder} has another question for {error}: {_why(paper)}{AGAIN}") from None
            explained = _explained(result, subject, paper)
            if manifest.answered != len(answered):
                explained = _unfinished(explained, paper, answered, manifest.answered)
            results.append(explained)
    live = sum(law.live for law in all_laws().values())
    notes = (
        f"{len(answered):,} of {len(paper.files):,} questions are answered{_rest(manifest, len(answered), paper)}",
        f"{live} laws look at a backend while it runs and are not part of a written exam",
    )
    return Report(
        manifest.name, paper.edition, paper.level, len(results), tuple(results), versions(),
        time.perf_counter() - begin, notes, waivers=None if waivers is None else str(waivers),
    )  # fmt: skip


def _rest(manifest: Manifest, answered: int, paper: Paper) -> str:
    """What that means for the other questions."""
    others = len(paper.files) - answered
    if not others:
        return ""
    if manifest.answered == answered:
        return f"; {MANIFEST} says that these are all, so that the other {others:,} are refused"
    return f"; {others:,} answers are missing, or refused without saying so"


def _unfinished(result: Result, paper: Paper, answered: Collection[str], said: int | None) -> Result:
    """UNKNOWN for a law that lacks an answer, unless it fails anyway or is unknown for another reason."""
    asked = frozenset[str]().union(
        *(ids for (law, dtype, _), ids in paper.cases.items() if (law, dtype) == (result.law, result.dtype))
    )
    if asked <= {*answered} or result.verdict in (Verdict.FAIL, Verdict.UNKNOWN):
        return result
    own, total = f"{len(asked & {*answered})} of {len(asked)} questions are answered", len(answered)
    counted = f"{MANIFEST} says {said} answers and there are {total}" if said is not None else "the others are missing"
    message = f'{own}, and {counted}: where the program was through and refuses them, "answered": {total} says so'
    return replace(result, verdict=Verdict.UNKNOWN, message=message)


def _why(paper: Paper) -> str:
    """How this installation differs from the one that wrote the exam."""
    here = versions()
    other = [
        f"{name} {version}, here {here.get(name)}"
        for name, version in paper.written_with.items()
        if here.get(name) != version
    ]
    return f"it was written with {'; '.join(other)}. " if other else ""


def _explained(result: Result, subject: WrittenSubject, paper: Paper) -> Result:
    """A failure says which files it is about; with too few answers nothing is claimed, for there is no more paper."""
    if result.verdict is Verdict.FAIL and result.counterexample is not None:
        files = ", ".join(paper.files[name] for name in subject.asked)
        return replace(result, message=f"{result.message}\nQuestions of this case: {files}")
    if result.verdict is Verdict.UNKNOWN and result.message.startswith(TOO_FEW) and result.cases < result.floor:
        few = f"{result.cases} answered cases hold, and a verdict needs {result.floor}: export with a larger breadth"
        return replace(result, verdict=Verdict.NOT_CLAIMED, message="", reasons=(*result.reasons, few))
    return result
