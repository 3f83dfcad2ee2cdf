"""Errors of the specification, and the one way in which a rule is checked."""


class SpecError(ValueError):
    """A spec breaks a rule of the normative text.

    The message names the clause, what was given, the rule, and what to do. ``clause`` is the number
    of the clause in ``docs/specification.md``; the test that breaks the rule carries the same number.
    """

    def __init__(self, clause: str, given: str, rule: str, remedy: str) -> None:
        self.clause = clause
        super().__init__(f"[{clause}] {given}: {rule}. {remedy}.")


def require(holds: bool, clause: str, given: str, rule: str, remedy: str) -> None:
    """Raise :class:`SpecError` unless ``holds``."""
    if not holds:
        raise SpecError(clause, given, rule, remedy)
