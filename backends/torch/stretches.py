"""Visits that follow one another on the same bands, so that what is done link by link is done for all at once.

A visit of few links takes longer to call than to compute. Its products are its own, each with its own matrices; what
follows them, from inner products to weights, knows no displacement and takes one call for the whole stretch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from translution.backends.torch.visits import Visit


@dataclass(frozen=True, eq=False)
class Stretch:
    """Visits one after another, of the links ``start`` to ``stop``; their bands are the same unless it is mixed."""

    visits: tuple[Visit, ...]

    @property
    def start(self) -> int:
        """Its first link."""
        return self.visits[0].start

    @property
    def stop(self) -> int:
        """One past its last link."""
        return self.visits[-1].stop

    @property
    def links(self) -> slice:
        """All its links."""
        return slice(self.start, self.stop)

    @property
    def count(self) -> int:
        """Number of links."""
        return self.stop - self.start

    @cached_property
    def _by_visit(self) -> list[int]:
        return [math.prod(visit.shape) for visit in self.visits]

    @cached_property
    def _by_displacement(self) -> list[int]:
        return [links for visit in self.visits for displacements, links in (visit.shape,) for _ in range(displacements)]

    def split(self, by_link: Tensor) -> Sequence[Tensor]:
        """What its links have [links, ..], for each visit."""
        return torch.split(by_link, self._by_visit)

    def visit_parts(self, by_link: Tensor) -> list[Tensor]:
        """What its links have [links, ..], for each visit [displacements, P, ..]."""
        rest = by_link.shape[1:]
        return [part.view(*v.shape, *rest) for part, v in zip(self.split(by_link), self.visits, strict=True)]

    def displacement_parts(self, by_link: Tensor) -> list[Sequence[Tensor]]:
        """What its links have [links, ..], for each visit and each of its displacements [P, ..]."""
        parts = iter(torch.split(by_link, self._by_displacement))
        return [list(islice(parts, visit.shape[0])) for visit in self.visits]


def longest(stretches: Sequence[Stretch]) -> int:
    """Most links of one of them."""
    return max((stretch.count for stretch in stretches), default=0)


def stretches(visits: Sequence[Visit], most: int, mixed: bool = False) -> Iterator[Stretch]:
    """The visits in stretches of at most ``most`` links each, or of a single visit; ``mixed``: of whatever bands."""
    open_visits: list[Visit] = []
    for visit in visits:
        if open_visits:
            first = open_visits[0]
            same = visit.query.bands is first.query.bands and visit.key.bands is first.key.bands
            same = same and visit.value.bands is first.value.bands
            if not (same or mixed) or visit.stop - first.start > most:
                yield Stretch(tuple(open_visits))
                open_visits = []
        open_visits.append(visit)
    if open_visits:
        yield Stretch(tuple(open_visits))
