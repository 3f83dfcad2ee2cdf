"""Results on disk, one JSON line each as soon as it is known, so that an interrupted exam can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from translution.conformance.exam.report import Result

Key = tuple[str, str, str]


class JournalError(ValueError):
    """A journal that belongs to another exam, or can't be written."""


class JsonLines:
    """A file of records under a heading that says what they are about. A last line that was cut off is dropped.

    Raises:
        JournalError: with ``resume``, the file has another heading; without, or then too, it can't be written.
    """

    other = "another exam"

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.records = path, list[dict[str, Any]]()
        own = json.loads(json.dumps(heading))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._read(own)
            # Written anew, so that a line that was cut off is gone.
            fresh = path.with_suffix(".new")
            fresh.write_text("".join(json.dumps(line) + "\n" for line in (own, *self.records)), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise JournalError(f"the journal {path} can't be written: {error.strerror or error}") from error

    def _read(self, own: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [data for line in lines if (data := _parsed(line)) is not None]
        if not found or found[0] != own:
            written = found[0] if found else {}
            differ = [name for name in own if written.get(name) != own[name]]
            told = [f"{name}: {written.get(name)!r}, now {own[name]!r}" for name in differ]
            raise JournalError(f"{self.path} is of {self.other} ({'; '.join(told)}): start without resuming")
        self.records = found[1:]

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record down; it survives whatever comes next."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Journal(JsonLines):
    """The results of an exam."""

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        super().__init__(path, heading, resume=resume)
        found = (Result.from_json(record) for record in self.records)
        self.results: dict[Key, Result] = {result.key: result for result in found}

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results[result.key] = result
        self.write(result.as_json())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except json.JSONDecodeError:
        return None
    return data if isinstance(data, dict) else None
