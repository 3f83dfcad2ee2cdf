"""Every mutant by name, and each as an attribute: ``translution.conformance.mutants.catalogue:value_mirrored``."""

from __future__ import annotations

from importlib import import_module

from translution.conformance.mutants.mutant import Mutant, registered
from translution.registry import Backend

FAMILIES = ("index", "boundary", "mask", "encoder", "relevance", "number", "size", "gradient", "conduct", "claims")


def catalogue() -> dict[str, Mutant]:
    """All mutants, family by family, always in the same order."""
    for family in FAMILIES:
        import_module(f"translution.conformance.mutants.{family}_mutants")
    order = {family: place for place, family in enumerate(FAMILIES)}
    return dict(sorted(registered().items(), key=lambda item: order[item[1].family]))


def __getattr__(name: str) -> Backend:
    found = catalogue().get(name.replace("_", "-"))
    if found is None:
        raise AttributeError(f"no mutant {name}")
    return found.backend
