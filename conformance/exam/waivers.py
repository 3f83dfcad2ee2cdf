"""Known failures that are put up with for a while: a law, where it fails, why, and until when.

A TOML file::

    [[waiver]]
    law = "ORACLE"
    reason = "circular windows are one off on even sizes"
    expires = 2027-01-31
    issue = "https://example.org/issues/12"
    when = { "layout.boundary" = "circular", dtype = "float16" }

Keys of ``when`` are ``algorithm``, ``dtype``, or a path in the operator's JSON (clause P2); all must match.
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translution.conformance.exam.question import Question
from translution.spec.serialization import operator_to_data


class WaiverError(ValueError):
    """A waiver file that says something it can't."""


@dataclass(frozen=True, slots=True)
class Waiver:
    """One waiver; ``when`` maps a path to the value it must have."""

    law: str
    reason: str
    expires: dt.date
    issue: str = ""
    when: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, law: str, algorithm: str, dtype: str, question: Question | None) -> bool:
        """Whether it covers a failure of that law on that question."""
        return self.covers(law, algorithm, dtype) and all(
            question is not None and _at(operator_to_data(question.operator), path.split(".")) == wanted
            for path, wanted in self.when.items()
            if path not in ("algorithm", "dtype")
        )

    def covers(self, law: str, algorithm: str, dtype: str) -> bool:
        """Whether it speaks of that law, algorithm and dtype at all."""
        own = {"algorithm": algorithm, "dtype": dtype}
        return law == self.law and all(own[name] == self.when[name] for name in own if name in self.when)


def _at(data: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return None
        data = data[part]
    return data


@dataclass(frozen=True, slots=True)
class Waivers:
    """All waivers of an exam."""

    every: tuple[Waiver, ...] = ()

    def find(self, law: str, algorithm: str, dtype: str, question: Question | None) -> Waiver | None:
        """The first that matches."""
        return next((w for w in self.every if w.matches(law, algorithm, dtype, question)), None)

    def covering(self, law: str, algorithm: str, dtype: str) -> list[Waiver]:
        """Those that speak of a law, algorithm and dtype."""
        return [w for w in self.every if w.covers(law, algorithm, dtype)]


NO_WAIVERS = Waivers()


def read_waivers(path: Path, laws: Iterable[str], today: dt.date | None = None) -> Waivers:
    """The waivers of a file.

    Raises:
        WaiverError: it is no such file, names an unknown law or field, or a waiver has expired.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise WaiverError(f"{path}: {error}") from error
    unknown = sorted(data.keys() - {"waiver"})
    if unknown or not isinstance(data.get("waiver", []), list):
        raise WaiverError(f"{path}: found {unknown or 'waiver'}; a file holds [[waiver]] tables and nothing else")
    now, known = today or dt.date.today(), set(laws)  # noqa: DTZ011 - an expiry is a day on the user's calendar
    return Waivers(
        tuple(_waiver(f"{path}, waiver {n}", w, known, now) for n, w in enumerate(data.get("waiver", []), 1))
    )


def _waiver(where: str, data: Any, laws: set[str], today: dt.date) -> Waiver:
    kinds: dict[str, type] = {
        "law": str, "reason": str, "expires": dt.date, "issue": str, "when": dict
    }  # fmt: skip
    if not isinstance(data, dict):
        raise WaiverError(f"{where}: found {data!r}, expected a [[waiver]] table")
    if unknown := sorted(data.keys() - kinds.keys()):
        raise WaiverError(f"{where}: unknown field {unknown}; the fields are {', '.join(kinds)}")
    for name in ("law", "reason", "expires"):
        if not data.get(name):
            raise WaiverError(f"{where}: {name} is missing; a waiver says which law, why and until when")
    for name, value in data.items():
        if not isinstance(value, kinds[name]) or isinstance(value, dt.datetime):
            raise WaiverError(f"{where}: {name} is a {type(value).__name__}, expected a {kinds[name].__name__}")
    if data["law"] not in laws:
        raise WaiverError(f"{where}: there is no law {data['law']!r}")
    if data["expires"] < today:
        raise WaiverError(
            f"{where}: the waiver of {data['law']} expired on {data['expires']}: mend the backend, or extend it"
        )
    return Waiver(**data)
