"""What was computed once and may be asked for again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Found = TypeVar("Found")


class Remembered:
    """The latest ``kept`` results by key."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._found: OrderedDict[Hashable, Any] = OrderedDict()

    def once(self, key: Hashable, compute: Callable[[], Found]) -> Found:
        """The result of that key, computed where it is not remembered."""
        if key not in self._found:
            self._found[key] = compute()
            if len(self._found) > self.kept:
                self._found.popitem(last=False)
        found: Found = self._found[key]
        return found
