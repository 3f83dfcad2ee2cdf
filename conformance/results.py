"""What a check found: one row per subject, backend and algorithm."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a verification.

    ``worst_share`` is the largest error as a share of its bound: above 1 is a failure, 0 where nothing differed.
    """

    section: str
    subject: str
    backend: str
    algorithm: str
    cases: int
    worst_error: float
    worst_share: float
    passed: bool
    detail: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)
