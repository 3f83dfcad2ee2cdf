"""How the links of one call are shared out: stretches of about the same work, one for each thread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from translution.backends.torch.call import Call, divided
from translution.backends.torch.compiled import launch
from translution.backends.torch.compiled.sizes import Role, Side, Sizes, Source, Table
from translution.backends.torch.compiled.work import BLOCK, Work
from translution.backends.torch.memory import Store
from translution.geometry import Geometry, IntArray

# What stretches have of their own whatever the batch, so that on many cores fewer take part where it would be more; and
# with what they have for each item, of which a part of the batch has as many as that allows.
OWN_BYTES, MOST_BYTES = 20 << 20, 28 << 20
# What a displacement takes beside its rows, in rows: its tables are read, in the backward also turned and added to.
OVERHEAD = 8


@dataclass(frozen=True, eq=False)
class Steps:
    """The links of a layout as kernels read them, step after step."""

    starts: IntArray
    value_class: IntArray
    key_class: IntArray
    query_index: IntArray
    key_index: IntArray

    def arguments(self) -> dict[str, int]:
        """Where they are."""
        return {name: getattr(self, name).ctypes.data for name in self.__dataclass_fields__}

    @property
    def share_tables(self) -> bool:
        """Whether some matrix serves several steps, which can't add to its gradient at the same time."""
        return any(len(set(own.tolist())) < len(own) for own in (self.value_class, self.key_class))

    def cut(self, batch: int, stretches: int) -> tuple[tuple[int, int], ...]:
        """Step, and row of the step, at which each stretch begins and the last one ends; a link has ``batch`` rows."""
        rows = np.diff(self.starts) * batch
        ends = np.cumsum(rows + OVERHEAD)
        found = [(0, 0)]
        for number in range(1, stretches):
            wanted = int(ends[-1]) * number // stretches
            step = int(np.searchsorted(ends, wanted, side="right"))
            # Within the overhead of a step it begins with the next one.
            row = wanted - int(ends[step] - rows[step] - OVERHEAD)
            found.append((step, row) if row < rows[step] else (step + 1, 0))
        return (*found, (len(rows), 0))


@lru_cache(maxsize=64)
def steps(geometry: Geometry) -> Steps:
    """Those of a layout."""
    starts = np.cumsum([0, *(len(step.query_index) for step in geometry.steps)]).astype(np.int64)
    value_class, key_class = (
        np.array([getattr(step, name) for step in geometry.steps], np.int64) for name in ("value_class", "key_class")
    )
    return Steps(starts, value_class, key_class, geometry.query_index, geometry.key_index)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Which of a call's tensors are the sources and the tables of its kernels."""

    sources: tuple[int, ...]
    tables: tuple[int, ...]


def sizes_of(call: Call, tensors: Sequence[Tensor], needs: Sequence[bool] | None = None) -> tuple[Sizes, Numbers]:
    """What kernels are compiled for. ``needs`` tells whether the bias and each tensor have a gradient."""
    bias, *others = [False] * (1 + len(tensors)) if needs is None else needs
    numbers: dict[tuple[int, Side], int] = {}
    sources: list[Source] = []
    tables: list[Table] = []
    roles: list[Role] = []
    table_numbers: list[int] = []

    def source(number: int, side: Side) -> int:
        if (number, side) not in numbers:
            numbers[number, side] = len(sources)
            sources.append(Source(math.prod(tensors[number].shape[2:]), side, others[number]))
        return numbers[number, side]

    for n, role in enumerate(call.roles):
        tokens, own = call.tokens(n), []
        base = source(tokens.pop(0), role.side) if role.base is not None else None
        for at, number, table in zip(tokens, call.matrices(n), role.tables, strict=True):
            own.append(len(tables))
            inner = tensors[number].shape[1]
            tables.append(Table(role.name, source(at, role.side), inner, table.start, table.width, others[number]))
            table_numbers.append(number)
        roles.append(Role(role.name, role.head_dim, base, tuple(own)))
    query, key, value = roles
    found = Sizes(call.roles[0].heads, (query, key, value), tuple(sources), tuple(tables), bias)
    return found, Numbers(tuple(number for number, _ in numbers), tuple(table_numbers))


@dataclass(frozen=True, slots=True)
class Plan:
    """One direction of one call.

    Args:
        steps: its links.
        sizes: of the kernel.
        added: shapes [N, batch, ..] of what is added to, without the batch: (N, features).
        backward: which direction.
    """

    steps: Steps
    sizes: Sizes
    added: tuple[tuple[int, int], ...]
    backward: bool

    @property
    def _work(self) -> int:
        return Work(self.sizes, launch.lanes(), self.backward).size

    @property
    def _tables(self) -> int:
        return sum(self.sizes.table_sizes) if self.backward else 0

    def stretches(self, batch: int) -> int:
        """How many."""
        if self.backward and self.steps.share_tables:
            return 1
        own, links = 4 * (self._work + self._tables), int(self.steps.starts[-1])
        return max(1, min(launch.threads(), OWN_BYTES // own, links * batch // BLOCK))

    def parts(self, batch: int) -> list[slice]:
        """The batch in parts of about the same size."""
        stretches = self.stretches(batch)
        item = 4 * (stretches - 1) * sum(tokens * features for tokens, features in self.added)
        return divided(batch, item, MOST_BYTES - 4 * stretches * (self._work + self._tables))

    def room(self, size: int, like: Tensor, store: Store) -> "Room":
        """Memory for a part of ``size`` items."""
        number = self.stretches(size)
        own = [store.empty(like, number - 1, tokens, size, features) for tokens, features in self.added]
        tables = store.empty(like, number - 1, self._tables)
        return Room(number, size, store.empty(like, number, self._work), own, tables)


class Room:
    """What stretches work in and add to, for one part of the batch.

    Args:
        number: of stretches.
        size: items of the part.
        work: memory of every stretch.
        own: what every stretch but the first adds to, [stretches - 1, N, size, ..] each.
        tables: gradients of matrices of a step that is cut, for every stretch but the first.
    """

    def __init__(self, number: int, size: int, work: Tensor, own: Sequence[Tensor], tables: Tensor) -> None:
        self.number, self._size, self._work, self._own, self.tables = number, size, work, own, tables

    def opened(
        self, totals: Sequence[Tensor], batch: int, cuts: Sequence[tuple[int, int]], values: Sequence[float]
    ) -> dict[str, Any]:
        """Arguments of a kernel, and an array ``each`` for all of the ``totals``, [N, size, ..] of [N, batch, ..].

        The first stretch adds to these; for the others all numbers begin with one of the ``values``.
        """
        for own, value in zip(self._own, values, strict=True):
            own.fill_(value)
        return {
            "stretches": self.number,
            "cuts": launch.integers([number for cut in cuts for number in cut]),
            "work": self._work,
            "strides": launch.integers([batch, *[self._size] * (self.number - 1)]),
            "each": [launch.pointers([first, *own]) for first, own in zip(totals, self._own, strict=True)],
        }

    def close(self, totals: Sequence[Tensor]) -> None:
        """Add what the other stretches have."""
        for total, own in zip(totals, self._own, strict=True):
            for one in own:
                total += one.view(total.shape)

    def raise_to(self, total: Tensor) -> None:
        """As :meth:`close`, for the largest of all instead of sums; of the last that is added to."""
        for one in self._own[-1]:
            torch.maximum(total, one, out=total)


def common(numbers: Numbers, own: Steps, tensors: Sequence[Tensor], part: slice) -> dict[str, Any]:
    """Arguments of both directions that come from links and roles."""
    return {
        **own.arguments(),
        "next": 0,
        "batch": part.stop - part.start,
        "token_batch": tensors[numbers.sources[0]].shape[1],
        **{f"source {n}": tensors[number][:, part] for n, number in enumerate(numbers.sources)},
        **{f"table {n}": tensors[number] for n, number in enumerate(numbers.tables)},
    }
