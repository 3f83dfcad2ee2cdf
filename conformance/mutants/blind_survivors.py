"""Why some mutations survive: ``survivors.toml`` beside this file.

::

    [[survivor]]
    module = "translution.backends.numpy.blocks"
    function = "Groups.of"
    line = "order = None if ascending else np.argsort(index, kind=\\"stable\\")"
    change = "... if ascending -> ... if False"
    kind = "speed"
    reason = "sorting what is sorted gives the same order"

``ordinal`` (0 where it is left out) tells equal changes of equal lines apart; ``ordinal = "all"`` stands for each.
Kinds: ``equivalent``, no input tells it apart; ``speed``, it costs other time or memory and gives the same answers;
``refused``, what would show it is refused before it gets there; ``rounding``, it moves results by less than a correct
implementation may; ``gap``, the exam should notice it and does not. A gap counts as a survivor.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from translution.conformance.mutants.blind_points import Mutation

KINDS = ("equivalent", "speed", "refused", "rounding", "gap")
FILE = Path(__file__).with_name("survivors.toml")
_FIELDS = {"module", "function", "line", "change", "kind", "reason", "ordinal"}


class SurvivorError(ValueError):
    """A survivors file that says something it can't."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """One entry; ``ordinal`` None stands for each."""

    module: str
    function: str
    line: str
    change: str
    kind: str
    reason: str
    ordinal: int | None = 0

    def explains(self, mutation: Mutation) -> bool:
        """Whether it speaks of that mutation."""
        own = (self.module, self.function, self.line, self.change)
        found = (mutation.module, mutation.function, mutation.text, mutation.change)
        return own == found and self.ordinal in (None, mutation.ordinal)

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.function}: {self.change}    in: {self.line}"


def read_survivors(path: Path = FILE) -> list[Survivor]:
    """The entries of a file.

    Raises:
        SurvivorError: a field or kind that is unknown, or one that is missing.
    """
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        _survivor(f"{path.name}, entry {number}", entry) for number, entry in enumerate(data.get("survivor", []), 1)
    ]


def _survivor(where: str, entry: dict[str, Any]) -> Survivor:
    if wrong := sorted((entry.keys() ^ _FIELDS) - {"ordinal"}):
        raise SurvivorError(
            f"{where}: {', '.join(wrong)} unknown or missing; the fields are {', '.join(sorted(_FIELDS))}"
        )
    if entry["kind"] not in KINDS:
        raise SurvivorError(f"{where}: kind {entry['kind']!r}; the kinds are {', '.join(KINDS)}")
    ordinal = entry.get("ordinal", 0)
    given: dict[str, Any] = {**entry, "ordinal": None if ordinal == "all" else ordinal}
    return Survivor(**given)


def explanation(survivors: Iterable[Survivor], mutation: Mutation) -> Survivor | None:
    """The first entry for a mutation."""
    return next((entry for entry in survivors if entry.explains(mutation)), None)
