"""The laws, file by file; :func:`all_laws` imports them all."""

from importlib import import_module

from translution.conformance.exam.law import Law, registered

FILES = (
    "oracle",
    "quality",
    "tracers",
    "integers",
    "sizes",
    "locality",
    "absence",
    "masks",
    "numerics",
    "conduct",
    "memory",
    "claims",
    "derivatives",
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
    homes = [f"translution.conformance.laws.{name}" for name in FILES]
    for home in homes:
        import_module(home)
    # Whoever imported one of them before changes nothing.
    own = [law for law in registered().values() if law.body.__module__ in homes]
    return {law.id: law for law in sorted(own, key=lambda law: homes.index(law.body.__module__))}
