"""What a kernel is compiled for: shapes, and which gradients are wanted."""

from dataclasses import dataclass
from typing import Literal

Side = Literal["query", "key"]
ROLES = ("query", "key", "value")


@dataclass(frozen=True, slots=True)
class Source:
    """Something that every token of a side has, [N, B, features]; ``wanted`` tells whether it has a gradient."""

    features: int
    side: Side
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Of each displacement a matrix [inner, heads * width], from a ``source`` to the heads' features ``start`` on.

    ``name`` is that of the role, whose class chooses the matrix; ``wanted`` tells whether it has a gradient.
    """

    name: str
    source: int
    inner: int
    start: int
    width: int
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Role:
    """``dim`` features of every head: source number ``base``, unless None, and what the tables numbered here add."""

    name: str
    dim: int
    base: int | None
    tables: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Three roles, query, key and value; ``bias`` tells whether the bias has a gradient."""

    heads: int
    roles: tuple[Role, Role, Role]
    sources: tuple[Source, ...]
    tables: tuple[Table, ...]
    bias: bool = False

    def features(self, role: Role) -> int:
        """All heads together."""
        return self.heads * role.dim

    def columns(self, table: Table) -> int:
        """Of a matrix."""
        return self.heads * table.width

    @property
    def table_sizes(self) -> list[int]:
        """Numbers of a matrix of each table."""
        return [table.inner * self.columns(table) for table in self.tables]

    @property
    def products(self) -> list[int]:
        """How many products with each table a link takes: in the backward it is encoded again."""
        return [1 + self.sources[table.source].wanted + table.wanted for table in self.tables]


def padded(size: int, lanes: int) -> int:
    """The least number of vectors' worth."""
    return -(-size // lanes) * lanes
