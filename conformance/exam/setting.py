"""How an exam is held, in a form that travels to another process."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from translution.algorithms import ITEM_BYTES
from translution.conformance.exam.examine import EDITION, LIMIT, Started, examine
from translution.conformance.exam.law import QUICK, Law
from translution.conformance.exam.report import Result
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.exam.waivers import NO_WAIVERS, Waivers, read_waivers
from translution.conformance.laws import all_laws

PACKAGES = ("translution", "numpy", "torch", "triton", "hypothesis")
# complex128 is for derivatives by a complex step, not for tokens.
EXAMINED = tuple(dtype for dtype in ITEM_BYTES if dtype != "complex128")


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

    def examine(self, law: Law, subject: LiveSubject, waivers: Waivers, started: Started) -> Result:
        """One item, of the edition or explored."""
        if not self.explore:
            return examine(
                law, subject, self.level, edition=self.edition, limit=self.limit, waivers=waivers, started=started
            )
        from translution.conformance.exam.explore import explore

        folder = None if self.database is None else Path(self.database)
        return explore(law, subject, self.explore, database=folder, limit=self.limit, started=started)


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
