"""How an exam is held, in a form that travels to another process."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.examine import EDITION, LIMIT, Refused, Started, examine
from translution.conformance.exam.law import QUICK, Law, Trial
from translution.conformance.exam.report import Result, Verdict
from translution.conformance.exam.subject import LiveSubject, Subject
from translution.conformance.exam.waivers import DTYPES, NO_WAIVERS, Waivers, read_waivers
from translution.conformance.laws import all_laws

PACKAGES = ("translution", "numpy", "torch", "triton", "hypothesis")
EXAMINED = DTYPES
# Seconds for a case; a clock can't be set to much more.
LONGEST = 1e6


@dataclass(frozen=True, slots=True)
class Setting:
    """``level`` quick or full; ``limit`` seconds for a case; ``waivers`` a file.

    With ``explore``, so many random cases stand in for those of the edition, and failures are kept in ``database``.
    ``refine`` is how many seconds a process may spend on making failures small and naming the mistake.
    """

    level: str = QUICK
    edition: str = EDITION
    limit: float = LIMIT
    waivers: str | None = None
    device: str = "cpu"
    explore: int = 0
    database: str | None = None
    refine: float = 30.0

    def as_text(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Setting:
        """The inverse of :meth:`as_text`."""
        return cls(**json.loads(text))

    def read_waivers(self) -> Waivers:
        """The waivers of the file."""
        return NO_WAIVERS if self.waivers is None else read_waivers(Path(self.waivers), all_laws())

    def examine(self, law: Law, subject: LiveSubject, waivers: Waivers, started: Started, refused: Refused) -> Result:
        """One item, of the edition or explored; ``refused`` is that of the backend."""
        if not self.explore:
            return examine(
                law, subject, self.level, edition=self.edition, limit=self.limit, waivers=waivers, started=started,
                refused=refused,
            )  # fmt: skip
        from translution.conformance.exam.explore import explore

        folder = None if self.database is None else Path(self.database)
        reasons: dict[str, None] = {}
        asked = excused(law, subject, waivers, reasons)
        result = explore(asked, subject, self.explore, database=folder, limit=self.limit, started=started)
        if reasons and result.verdict is Verdict.PASS:
            return replace(result, verdict=Verdict.WAIVED, message="; ".join(reasons))
        return result


def excused(law: Law, subject: Subject, waivers: Waivers, reasons: dict[str, None]) -> Law:
    """The law, but a case whose failure is waived holds; the reasons of such waivers are added to ``reasons``."""

    def body(trial: Trial) -> Any:
        try:
            return law.body(trial)
        except ComparisonError:
            asked = trial.asked[-1] if trial.asked else None
            waiver = waivers.find(law.id, subject.algorithm, subject.dtype, asked)
            if waiver is None:
                raise
            reasons[waiver.reason] = None
            return None

    return replace(law, body=body)


def check_limit(seconds: float) -> None:
    """``ValueError`` where that is no time for a case."""
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"limit is {seconds:g}: give seconds, more than 0 and at most {LONGEST:,.0f}")


def versions() -> dict[str, str]:
    """What the exam runs on; a library that is not loaded plays no part in it."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        if name in sys.modules or name in ("translution", "hypothesis"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found
