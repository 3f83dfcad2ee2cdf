"""Files that are there whole or not at all, and a log that grows line by line."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from translution.paper.training.settings import TrainingError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``; when that is on the disk it takes the place of ``path``.

    Raises:
        TrainingError: it could not be written; what was there before still is.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(beside)
        _to_disk(beside)
        beside.replace(path)
        _to_disk(path.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        # safetensors has an exception of its own for what the system refuses.
        if isinstance(error, OSError) or type(error).__module__.startswith("safetensors"):
            raise _not_written(path, error) from error
        raise


def _not_written(path: Path, error: BaseException) -> TrainingError:
    return TrainingError(
        f"{path} could not be written ({error})",
        "what was saved before is still there and whole",
        "Make room, or give a folder that can be written, and start the same command again",
    )


def write_json(path: Path, data: Any) -> None:
    """``data`` as JSON, whole or not at all."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote.

    Raises:
        TrainingError: there is no such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TrainingError(
            f"{path} can't be read ({error})", "a file of this library's own is expected", "Remove it, or its folder"
        ) from error


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Log:
    """JSON lines, each with a ``step``. Whoever goes on from a step forgets the lines beyond it."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_log(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def add(self, **line: Any) -> None:
        """Append a line."""
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _not_written(self._path, error) from error

    def to_disk(self) -> None:
        """Wait until every line is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(self._path, error) from error

    def close(self) -> None:
        """Nothing can be added any more."""
        # What could not be written is not tried again.
        with contextlib.suppress(OSError):
            self._file.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines; a last one that a kill cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
