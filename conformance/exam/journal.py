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


class Journal:
    """A file whose first line says which exam it is of. A last line that was cut off is dropped.

    Raises:
        JournalError: with ``resume``, the file is of another exam; without, or then too, it can't be written.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.results = path, dict[Key, Result]()
        own = json.loads(json.dumps(heading))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.exists():
                self._read(own)
            # Written anew, so that a line that was cut off is gone.
            fresh = path.with_suffix(".new")
            lines = [own, *(result.as_json() for result in self.results.values())]
            fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            fresh.replace(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise JournalError(f"the journal {path} can't be written: {error.strerror or error}") from error

    def _read(self, own: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [data for line in lines if (data := _parsed(line)) is not None]
        if not found or found[0] != own:
            written = found[0] if found else {}
            other = [
                f"{name}: {written.get(name)!r}, now {own[name]!r}" for name in own if written.get(name) != own[name]
            ]
            raise JournalError(f"{self.path} is of another exam ({'; '.join(other)}): start without resuming")
        for data in found[1:]:
            result = Result.from_json(data)
            self.results[result.key] = result

    def add(self, result: Result) -> None:
        """Write a result down; it survives whatever comes next."""
        self.results[result.key] = result
        self._file.write(json.dumps(result.as_json()) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more results."""
        self._file.close()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except json.JSONDecodeError:
        return None
    return data if isinstance(data, dict) else None
