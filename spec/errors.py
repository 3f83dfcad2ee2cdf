"""Errors of the specification, and the one way in which a rule is checked."""

LONGEST = 400


class SpecError(ValueError):
    """A spec breaks a rule of the normative text.

    The message names the clause, what was given, the rule, and what to do. ``clause`` is the number
    of the clause in ``docs/specification.md``; the test that breaks the rule carries the same number.
    """

    def __init__(self, clause: str, given: str, rule: str, remedy: str) -> None:
        self.clause, self.given, self.rule, self.remedy = clause, given, rule, remedy
        shown = given if len(given) <= LONGEST else f"{given[:LONGEST]} ... ({len(given):,} characters)"
        super().__init__(f"[{clause}] {shown}: {rule}. {remedy}.")

    def __reduce__(self) -> tuple[type["SpecError"], tuple[str, str, str, str]]:
        """Pickled by its four parts, so that it travels between processes."""
        return type(self), (self.clause, self.given, self.rule, self.remedy)


def require(holds: bool, clause: str, given: str, rule: str, remedy: str) -> None:
    """Raise :class:`SpecError` unless ``holds``."""
    if not holds:
        raise SpecError(clause, given, rule, remedy)
