"""Errors of running an operator.

ValueError
  SpecError          a spec breaks a rule (translution.spec)
  InputError         parameters, tokens or masks do not fit the operator
  CostError          the operator would need more memory than there is
  PlanError          a file is no plan, or one that does not hold here
LookupError
  UnknownName        no backend, algorithm or preset of that name
NotImplementedError
  NotSupported       the named backend or algorithm can't run this request; carries every reason
"""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """An array given to an operator has the wrong name, shape, dtype or kind. ``clause`` as in :class:`SpecError`."""

    def __init__(self, clause: str, given: str, rule: str, remedy: str) -> None:
        self.clause = clause
        super().__init__(f"[{clause}] {given}: {rule}. {remedy}.")


class CostError(ValueError):
    """The operator would need more memory than the machine has; says how much and what would fit."""


class PlanError(ValueError):
    """A file holds no plan, or one that was made for another machine or version; says what differs and what to do."""


class UnknownName(LookupError):
    """No such backend, algorithm, preset or field."""

    def __init__(self, what: str, name: object, known: Iterable[str], remedy: str = "") -> None:
        self.name = name = str(name)
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(
            f"unknown {what} {name!r}: known are {', '.join(names)}.{hint}{' ' + remedy if remedy else ''}"
        )


class NotSupported(NotImplementedError):
    """What was asked for by name can't run here. ``reasons`` holds every reason; nothing else is tried (clause B1)."""

    def __init__(self, backend: str, algorithm: str | None, reasons: Sequence[str]) -> None:
        self.backend, self.algorithm, self.reasons = backend, algorithm, tuple(reasons)
        asked = f"backend {backend!r}" + (f", algorithm {algorithm!r}" if algorithm else "")
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        remedy = "Ask for another backend or algorithm; translution.explain lists which can."
        super().__init__(f"{asked} can't run this (clause B1):{lines}\n{remedy}")
