"""The laws, file by file; :func:`all_laws` imports them all."""

from importlib import import_module

from translution.conformance.exam.law import Law, registered

FILES = (
    "oracle",
    "quality",
    "tracers",
    "integers",
    "locality",
    "absence",
    "masks",
    "numerics",
    "conduct",
    "memory",
    "claims",
    "second_order",
    "composition",
    "projection",
    "arrangement",
    "symmetries",
    "invariances",
    "rotation",
    "equivalents",
)


def all_laws() -> dict[str, Law]:
    """Every law by its id, in the order of the files."""
    for name in FILES:
        import_module(f"translution.conformance.laws.{name}")
    return registered()
