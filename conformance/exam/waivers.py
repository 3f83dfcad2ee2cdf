"""Known failures that are put up with for a while: a law, where it fails, why, and until when.

A TOML file::

    [[waiver]]
    law = "ORACLE"
    reason = "circular windows are one off on even sizes"
    expires = 2027-01-31
    issue = "https://example.org/issues/12"
    when = { "layout.boundary" = "circular", dtype = "float16" }

Keys of ``when`` are ``algorithm``, ``dtype``, or a path in the operator's JSON (clause P2); all must match. Values are
compared with the JSON as a whole: what is given for each axis is a list, ``"layout.kernel_size" = [3, 3]``.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from translution.algorithms import ALGORITHMS, ITEM_BYTES
from translution.conformance.exam.question import Question
from translution.spec.serialization import WORDS, operator_schema, operator_to_data

# complex128 is for derivatives by a complex step, not for tokens.
DTYPES = tuple(dtype for dtype in ITEM_BYTES if dtype != "complex128")
# Answers to an exported exam are marked as those of an algorithm "written".
NAMES: dict[str, tuple[str, ...]] = {"algorithm": (*ALGORITHMS, "written"), "dtype": DTYPES}
TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,), "number": (int, float), "boolean": (bool,), "string": (str,), "array": (list,), "object": (dict,)
}  # fmt: skip


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
        if name not in data:
            raise WaiverError(f"{where}: {name} is missing; a waiver says which law, why and until when")
    for name, value in data.items():
        if not isinstance(value, kinds[name]) or isinstance(value, dt.datetime):
            raise WaiverError(f"{where}: {name} is a {type(value).__name__}, expected a {kinds[name].__name__}")
    if not data["reason"].strip():
        raise WaiverError(f"{where}: the reason is blank; say what fails, and why that is put up with")
    if data["law"] not in laws:
        raise WaiverError(f"{where}: there is no law {data['law']!r}{_meant(data['law'], laws)}")
    if data["expires"] < today:
        raise WaiverError(
            f"{where}: the waiver of {data['law']} expired on {data['expires']}: mend the backend, or extend it"
        )
    for path, value in data.get("when", {}).items():
        if wrong := _never(path, value):
            raise WaiverError(f"{where}: when {path} = {json.dumps(value, default=str)} can never be: {wrong}")
    return Waiver(**data)


def _never(path: str, value: Any) -> str:
    """Why nothing that is examined has this value at this path; "" where something may."""
    if path in NAMES:
        return "" if value in NAMES[path] else f"it is {_one_of(NAMES[path], value)}"
    nodes, before = [operator_schema()], ""
    for part in path.split("."):
        inside: dict[str, list[Any]] = {}
        for node in nodes:
            for name, fields in _fields(node).items():
                inside.setdefault(name, []).extend(fields)
        if part not in inside:
            known = [f"{before}{name}" for name in inside] + ([] if before else list(NAMES))
            if not known:
                return f"{before.rstrip('.')} has nothing inside that could be named"
            return f"there is no {before + part!r}; known are {', '.join(known)}{_meant(before + part, known)}"
        nodes, before = inside[part], f"{before}{part}."
    if isinstance(value, dict):
        first = next(iter(value), "...")
        return f'a path is written in quotes, with its dots: "{path}.{first}" = ...'
    return "" if any(_fits(node, value) for node in nodes) else f"it is {_wanted(nodes, before, value)}"


def _fields(node: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What an object may hold, whatever its kind: the schemas of every field."""
    found = {name: [field] for name, field in node.get("properties", {}).items()}
    for branch in node.get("allOf", ()):
        target = operator_schema()["$defs"][branch["then"]["$ref"].rpartition("/")[2]]
        for name, fields in _fields(target).items():
            found.setdefault(name, []).extend(fields)
    return found


def _types(node: Mapping[str, Any]) -> list[str]:
    """The types that a value has when it is written out: one number for all axes becomes a list; TOML has no null."""
    given = node.get("type", [])
    types = [given] if isinstance(given, str) else list(given)
    return [one for one in types if one != "null" and not (one == "integer" and "array" in types)]


def _fits(node: Mapping[str, Any], value: Any) -> bool:
    if "const" in node or "enum" in node:
        return value in node.get("enum", [node.get("const")])
    for name in _types(node):
        if name == "object" or not isinstance(value, TYPES[name]) or isinstance(value, bool) != (name == "boolean"):
            continue
        if isinstance(value, list):
            return value != [] and all(_fits(node["items"], one) for one in value)
        return not (isinstance(value, float) and math.isnan(value))
    return False


def _wanted(nodes: Sequence[Mapping[str, Any]], path: str, value: object) -> str:
    """What a value must be, in words."""
    if values := [one for node in nodes for one in node.get("enum", [node["const"]] if "const" in node else [])]:
        return _one_of(dict.fromkeys(values), value)
    types = {name: node for node in nodes for name in _types(node)}
    if "object" in types:
        return f"an object; name a field of it, such as {path}kind"
    return " or ".join(_list(types[name]["items"]) if name == "array" else WORDS[name] for name in types)


def _list(items: Mapping[str, Any]) -> str:
    shown = {"integer": ", such as [3, 3]", "number": ", such as [0.5, 0.25]", "boolean": ", such as [true, false]"}
    return "a list" + shown.get(items.get("type", ""), "")


def _one_of(known: Iterable[str], given: object) -> str:
    names = list(known)
    return f"one of {', '.join(names)}{_meant(given, names)}"


def _meant(given: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f". Did you mean {close[0]!r}?" if close else ""
