"""What an exam found, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

REPORT_VERSION = 1
# Characters of a message: what a backend raises may have a whole array in its text.
LONGEST = 20_000


class Verdict(StrEnum):
    """What is said of one law for one algorithm and dtype; later members outweigh earlier ones."""

    PASS = "PASS"
    NOT_CLAIMED = "NOT CLAIMED"
    WAIVED = "WAIVED"
    UNKNOWN = "UNKNOWN"
    FAIL = "FAIL"


# Neither says that the backend is wrong or that nobody knows.
HOLDS = frozenset({Verdict.PASS, Verdict.NOT_CLAIMED, Verdict.WAIVED})


# The law that passes where everything is refused.
REFUSALS = "CLAIMS"


def shortened(text: str) -> str:
    """``text`` if it has at most :data:`LONGEST` characters, else head and tail and how much is left out between."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2 - 50
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


@dataclass(frozen=True, slots=True)
class Counterexample:
    """The case that broke a law.

    ``number`` is that of the case in the edition; ``operator`` its plain data (clause P2), ``shapes`` those of x, y and
    mask; ``note`` the question in words. Where ``shrunk``, another and smaller case that breaks the law is shown;
    ``number`` is still that of the edition's. ``questions`` were asked in all, and the shown one is the last.
    """

    number: int
    note: str
    operator: dict[str, Any]
    shapes: dict[str, list[int]]
    questions: int
    shrunk: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """One law for one algorithm and dtype.

    ``cases`` were run and claimed, out of ``tried``; ``floor`` is how many must run. ``shares`` has the worst use of
    an error bound of each case, ``exact`` counts comparisons for equality. ``message`` says what broke or is unknown,
    ``reasons`` why cases were not claimed, ``printed`` what the backend wrote to its standard streams. ``diagnosis``
    names the mutants whose output the backend's equals. Messages and reasons are :func:`shortened`.
    """

    law: str
    algorithm: str
    dtype: str
    verdict: Verdict
    cases: int = 0
    tried: int = 0
    floor: int = 0
    exact: int = 0
    worst_share: float = 0.0
    shares: tuple[float, ...] = ()
    message: str = ""
    reasons: tuple[str, ...] = ()
    printed: str = ""
    seconds: float = 0.0
    counterexample: Counterexample | None = None
    diagnosis: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", shortened(self.message))
        object.__setattr__(self, "reasons", tuple(map(shortened, self.reasons)))

    @property
    def key(self) -> tuple[str, str, str]:
        """Law, algorithm and dtype."""
        return self.law, self.algorithm, self.dtype

    def as_json(self) -> dict[str, Any]:
        """Plain data; shares are all finite because a case that breaks its bound has none."""
        return asdict(self) | {"verdict": self.verdict.value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of :meth:`as_json`."""
        given = {f.name: data[f.name] for f in fields(cls)}
        given["verdict"] = Verdict(data["verdict"])
        for name in ("shares", "reasons", "diagnosis"):
            given[name] = tuple(data[name])
        if data["counterexample"] is not None:
            given["counterexample"] = Counterexample(**data["counterexample"])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Report:
    """An exam as a whole. ``versions`` are those of translution and of what it ran on; ``expected`` counts the items
    that the exam has, so that fewer ``results`` mean that it was cut short. ``device`` is where a torch backend got its
    tensors, ``limit`` the seconds that a case might take (None where nothing ran), ``waivers`` the file of them."""

    backend: str
    edition: str
    level: str
    expected: int
    results: tuple[Result, ...]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    limit: float | None = None
    waivers: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every item has a result."""
        return len(self.results) == self.expected

    @property
    def cases(self) -> int:
        """Cases that ran."""
        return sum(result.cases for result in self.results)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many results have each verdict."""
        found = Counter(result.verdict for result in self.results)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def answered(self) -> bool:
        """Whether a law passed for which something had to be computed: who refuses everything still refuses well."""
        passed = {result.law for result in self.results if result.verdict is Verdict.PASS}
        return bool(passed - {REFUSALS} if {result.law for result in self.results} != {REFUSALS} else passed)

    @property
    def holds(self) -> bool:
        """Complete, every verdict in order, and something :attr:`answered`."""
        return self.complete and self.answered and all(result.verdict in HOLDS for result in self.results)

    def broken(self) -> list[Result]:
        """The results that make the exam fail."""
        return [result for result in self.results if result.verdict not in HOLDS]

    def as_json(self) -> dict[str, Any]:
        """Plain data, as ``reports/schema/conformance-1.schema.json`` describes it."""
        return {
            "schema": "translution/conformance",
            "version": REPORT_VERSION,
            "backend": self.backend,
            "edition": self.edition,
            "level": self.level,
            "device": self.device,
            "limit": self.limit,
            "waivers": self.waivers,
            "holds": self.holds,
            "complete": self.complete,
            "expected": self.expected,
            "cases": self.cases,
            "counts": {verdict.value: count for verdict, count in self.counts.items()},
            "versions": self.versions,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "results": [result.as_json() for result in self.results],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`as_json`."""
        return cls(
            data["backend"],
            data["edition"],
            data["level"],
            data["expected"],
            tuple(Result.from_json(result) for result in data["results"]),
            data["versions"],
            data["seconds"],
            tuple(data["notes"]),
            data["device"],
            data["limit"],
            data["waivers"],
        )


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """The weightiest verdict; PASS outweighs NOT CLAIMED, so that one claimed part speaks for a law."""
    order = list(Verdict)
    found = [v for v in verdicts if v is not Verdict.NOT_CLAIMED]
    return max(found, key=order.index) if found else Verdict.NOT_CLAIMED
