"""What a mutant is: the plain backend with exactly one mistake, and a sentence that says which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from translution.conformance.mutants.naive import Naive
from translution.conformance.mutants.walk import Walk
from translution.registry import Backend

Mistaken = TypeVar("Mistaken", bound=type[Naive] | type[Walk])


@dataclass(frozen=True)
class Mutant:
    """A backend that is wrong in one way.

    ``mistake`` completes "it ...", ``clause`` is the one that it breaks. A ``visible`` mistake changes results or
    weights on ordinary float64 inputs, so that it can be told by its numbers; ``same_as`` names mutants that are the
    same function of all inputs.
    """

    name: str
    mistake: str
    clause: str
    family: str
    visible: bool
    make: Callable[[], Backend]
    same_as: tuple[str, ...] = ()

    @cached_property
    def backend(self) -> Backend:
        """One such backend, always the same."""
        return self.make()


_FOUND: dict[str, Mutant] = {}


def mutant(
    name: str, mistake: str, *, clause: str, visible: bool = True, same_as: tuple[str, ...] = ()
) -> Callable[[Mistaken], Mistaken]:
    """Register a subclass of :class:`Naive`, or of :class:`Walk` for mistakes about the links, as a mutant."""

    def register(mistaken: Mistaken) -> Mistaken:
        if name in _FOUND:
            raise ValueError(f"mutant {name} exists already")
        family = mistaken.__module__.rpartition(".")[2].removesuffix("_mutants")

        def make() -> Naive:
            plain: Any = mistaken  # narrowing would take it for both
            found = plain() if issubclass(plain, Naive) else Naive()
            if issubclass(plain, Walk):
                found.walk = plain
            found.name = name
            return found

        _FOUND[name] = Mutant(name, mistake, clause, family, visible, make, same_as)
        return mistaken

    return register


def registered() -> dict[str, Mutant]:
    """The mutants whose modules have been imported, in the order of their definition."""
    return dict(_FOUND)
