"""Where a mistaken walk looks for a displacement that has no row, it takes a neighbouring one."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from functools import cached_property

from translution.conformance.mutants.walk import Link, Walk
from translution.spec.layout import Displacement, Label


class Lenient(Walk):
    """A walk whose mistake can lead beyond the tables: correct by itself."""

    @cached_property
    def ascending(self) -> tuple[list[Displacement], list[Displacement]]:
        """The grid labels of both kinds of table."""
        return self.grid_labels(False), self.grid_labels(True)

    def row(self, label: Label, mirrored: bool) -> int:
        """The row of the label, or of the next one that has a row."""
        rows = self.key_rows if mirrored else self.rows
        if label in rows:
            return rows[label]
        if not isinstance(label, tuple):
            return len(rows) - 1
        found = self.ascending[mirrored]
        return min(bisect.bisect_left(found, label), len(found) - 1)

    def grid_links(self) -> Iterator[Link]:
        """None where no displacement has a row."""
        return super().grid_links() if self.ascending[0] else iter(())
