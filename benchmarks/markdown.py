"""Tables of the pages that the benchmarks write."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """The lines of a table; the first ``texts`` columns are text, the others numbers."""
    marks = ["---" if column < texts else "---:" for column in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (head, marks, *rows)]
