"""Progress, for whatever takes more than a moment: who is told, and bars that show it."""

from collections.abc import Callable
from typing import Any, Self

# Told a label, how many are done, and of how many.
Update = Callable[[str, int, int], None]


def silently(*_: object) -> None:
    """Tell nobody."""


class Progress:
    """Progress bars on standard error, one per label; plain silence where it is not a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._bars = Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._bars.stop()

    def update(self, label: str, done: int, total: int) -> None:
        """``done`` of ``total`` of what ``label`` names."""
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)
