"""What a check found: one row per subject, backend and algorithm."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a verification.

    ``worst_share`` is the largest error as a share of its bound: above 1 is a failure, 0 where nothing differed.
    ``exact_cases`` of the ``cases`` were compared for equality. ``peer`` is what was compared with. Without cases
    nothing was compared: ``passed`` then tells whether that is in order, and ``detail`` why.
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
    peer: str = ""
    exact_cases: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for ``--json``; what is not finite becomes None."""
        found = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}


class CannotVerify(ValueError):
    """What was given can't be checked at all: no such module, or a model that does not run."""


@contextmanager
def blame(doing: str) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of what the user gave, and is told as such."""
    try:
        yield
    except CannotVerify:
        raise
    except (Exception, SystemExit) as error:
        raise CannotVerify(f"{doing} failed with {type(error).__name__}: {error}") from error
