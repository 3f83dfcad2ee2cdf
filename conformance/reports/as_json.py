"""Reports as JSON; ``schema/conformance-1.schema.json`` describes them."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from translution.conformance.exam.report import REPORT_VERSION, Report

SCHEMA = "translution/conformance"
SCHEMA_FILE = f"conformance-{REPORT_VERSION}.schema.json"
_DERIVED = ("holds", "complete", "cases", "counts")


class ReportError(ValueError):
    """A report that can't be written, or a file that is no report; names the place."""


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    file = importlib.resources.files("translution.conformance.reports") / "schema" / SCHEMA_FILE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write_json(report: Report, path: Path) -> None:
    """Write a report; the file is there as a whole or not at all.

    Raises:
        ReportError: a number in it is NaN or infinite, which JSON can't say.
        OSError: the file can't be written.
    """
    data = report.as_json()
    for place, number in _not_finite(data, "$"):
        raise ReportError(f"{place} is {number}; JSON has no such number")
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_json(path: Path) -> Report:
    """The report in a file.

    Raises:
        ReportError: it is not JSON, no report, of a newer version, or contradicts itself.
        OSError: the file can't be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: no JSON: {error}. Was the file cut short?") from None
    _check_kind(path, data)
    _check_schema(path, data)
    report = Report.from_json(data)
    found = report.as_json()
    for name in _DERIVED:
        if data[name] != found[name]:
            raise ReportError(f"{path}: $.{name} is {data[name]!r}, but the results say {found[name]!r}")
    keys = [result.key for result in report.results]
    if len(set(keys)) < len(keys):
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise ReportError(f"{path}: $.results has {', '.join(twice)} twice")
    return report


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        if not math.isfinite(value):
            yield place, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{n}]")


def _check_kind(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ReportError(f'{path}: not a conformance report: there is no "schema": "{SCHEMA}" at the top')
    version = data.get("version")
    if type(version) is int and version > REPORT_VERSION:
        raise ReportError(
            f"{path}: the report is of version {version}; this translution reads version {REPORT_VERSION}. "
            "Read it with the translution that wrote it, or a newer one"
        )


def _check_schema(path: Path, data: Any) -> None:
    import jsonschema

    errors = jsonschema.Draft202012Validator(report_schema()).iter_errors(data)
    found = next(iter(sorted(errors, key=lambda error: error.json_path)), None)
    if found is not None:
        message = found.message if len(found.message) <= 300 else f"{found.message[:300]} ..."
        raise ReportError(f"{path}: {found.json_path}: {message}")
