"""Results on disk, one JSON line each as soon as it is known, so that an interrupted exam can go on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from translution.conformance.exam.report import Result

Key = tuple[str, str, str]


class JournalError(ValueError):
    """A journal that belongs to another exam, is damaged, or can't be written."""


class JsonLines:
    """A file of records under a heading that says what they are about. A last line that was cut off is dropped.

    Raises:
        JournalError: with ``resume``, the file has another heading or is damaged; without, or then too, it can't be
            written.
    """

    other = "another exam"

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.records = path, list[dict[str, Any]]()
        self._synced = 0.0
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

    def take(self, record: dict[str, Any]) -> None:
        """Called with every record of a file that is gone on with. Raises ValueError, LookupError, TypeError or
        AttributeError where it is damaged."""

    def _read(self, own: dict[str, Any]) -> None:
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        if not text.strip():
            raise JournalError(f"{self.path} is empty: start without resuming")
        lines = text.split("\n")
        # A line ends with a line feed; without one the writing was cut off.
        cut_off = lines.pop()
        if _parsed(cut_off) is not None:
            lines.append(cut_off)
        written = _parsed(lines[0]) if lines else None
        if written is None:
            raise self._damaged(1, "no heading")
        if written != own:
            raise JournalError(
                f"{self.path} is of {self.other} ({'; '.join(_differences(written, own))}): start without resuming"
            )
        for number, line in enumerate(lines[1:], 2):
            record = _parsed(line)
            if record is None:
                raise self._damaged(number, "no JSON object")
            try:
                self.take(record)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise self._damaged(number, f"{type(error).__name__}: {error}") from error
            self.records.append(record)

    def _damaged(self, number: int, why: str) -> JournalError:
        return JournalError(
            f"{self.path} is damaged in line {number} ({why}): delete the line or start without resuming"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record. It survives the end of this process; a power cut may take it within a second of another."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            # Waiting for the disk at each of thousands of records is a few percent of an exam.
            if time.monotonic() > self._synced + 1:
                os.fsync(file.fileno())
                self._synced = time.monotonic()


class Journal(JsonLines):
    """The results of an exam."""

    def __init__(self, path: Path, heading: Mapping[str, Any], *, resume: bool) -> None:
        self.results: dict[Key, Result] = {}
        super().__init__(path, heading, resume=resume)

    def take(self, record: dict[str, Any]) -> None:
        """Keep a result of an earlier run."""
        result = Result.from_json(record)
        if json.loads(json.dumps(result.as_json())) != record:
            raise ValueError("this is not all of a result, or more than one")
        self.results[result.key] = result

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results[result.key] = result
        self.write(result.as_json())


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _differences(written: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """What differs, entry by entry."""
    for name in dict.fromkeys((*own, *written)):
        old, new = written.get(name), own.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name} of {told}" for told in _differences(old, new))
        elif old != new:
            yield f"{name}: {old!r}, now {new!r}"
