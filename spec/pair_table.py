"""An explicit class for every ordered pair of tokens (clause L8)."""

from collections.abc import Sequence
from dataclasses import dataclass

from translution.spec.checks import MAX_CLASSES, as_tuple, is_whole
from translution.spec.errors import SpecError, require


@dataclass(frozen=True, slots=True)
class PairTable:
    """An explicit class for every ordered pair: graphs, molecules, binned points (clause L8).

    Args:
        classes: ``classes[i][j]`` is c(i, j), from 0 to ``num_classes - 1``, or -1 where j is outside i's support.
        num_classes: rows of every table.
        key_classes: ``key_classes[i][j]`` is c(j, i), the pair seen from the key. None takes ``classes[j][i]``, which
            needs as many keys as queries and a support that is its own mirror image.
    """

    classes: tuple[tuple[int, ...], ...]
    num_classes: int
    key_classes: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", self._checked("classes", self.classes))
        if self.key_classes is not None:
            object.__setattr__(self, "key_classes", self._checked("key_classes", self.key_classes))
        elif self.is_self:
            for i, (row, column) in enumerate(zip(self.classes, zip(*self.classes, strict=True), strict=True)):
                for j, (c, mirrored) in enumerate(zip(row, column, strict=True)):
                    if (c < 0) != (mirrored < 0):
                        raise SpecError(
                            "L8",
                            f"pair ({i}, {j}) has class {c}, its mirror has {mirrored}",
                            "without key_classes the support must be its own mirror image",
                            "Give key_classes, the class of each pair seen from the key",
                        )
        seen = self.reversed_classes()
        require(
            (len(seen), len(seen[0])) == (self.num_queries, self.num_keys)
            and all(
                (a < 0) == (b < 0) for r, s in zip(self.classes, seen, strict=True) for a, b in zip(r, s, strict=True)
            ),
            "L8",
            "key_classes",
            "key_classes has the shape and the support of classes",
            "Mark the same pairs absent (-1) in both",
        )

    def _checked(self, name: str, table: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        rule, remedy = (
            f"{name} is one row per query, one entry per key, all rows equally long",
            "Pad short rows with -1, which means absent; an array is given as array.tolist()",
        )
        told = ("L8", f"{name} is a {type(table).__name__}", rule, remedy)
        rows = tuple(as_tuple(row, *told) for row in as_tuple(table, *told))
        lengths = sorted({len(row) for row in rows})
        require(len(lengths) == 1 and lengths[0] > 0, "L8", f"{name} with row lengths {lengths}", rule, remedy)
        require(
            is_whole(self.num_classes) and 1 <= self.num_classes <= MAX_CLASSES,
            "L8",
            f"num_classes={self.num_classes!r}",
            f"num_classes is a whole number from 1 to {MAX_CLASSES:,}",
            "Give one more than the largest class",
        )
        return tuple(self._checked_row(name, i, row) for i, row in enumerate(rows))

    def _checked_row(self, name: str, i: int, row: tuple[object, ...]) -> tuple[int, ...]:
        whole = tuple(c for c in row if is_whole(c) and -1 <= c < self.num_classes)
        if len(whole) < len(row):
            j, wrong = next((j, c) for j, c in enumerate(row) if not (is_whole(c) and -1 <= c < self.num_classes))
            raise SpecError(
                "L8",
                f"{name}[{i}][{j}]={wrong!r}",
                f"a class is an int, -1 (absent) or 0 to {self.num_classes - 1}",
                "Raise num_classes or correct the entry",
            )
        return whole

    def reversed_classes(self) -> tuple[tuple[int, ...], ...]:
        """c(j, i) for every pair, in the shape of ``classes``."""
        if self.key_classes is not None:
            return self.key_classes
        require(
            self.is_self,
            "L8",
            f"{self.num_queries} queries, {self.num_keys} keys and no key_classes",
            "c(j, i) follows from classes only where queries and keys are the same tokens",
            "Give key_classes",
        )
        return tuple(zip(*self.classes, strict=True))

    @property
    def num_queries(self) -> int:
        """Number of query tokens."""
        return len(self.classes)

    @property
    def num_keys(self) -> int:
        """Number of key tokens."""
        return len(self.classes[0])

    @property
    def is_self(self) -> bool:
        """Whether queries and keys can be one sequence."""
        return self.num_queries == self.num_keys
