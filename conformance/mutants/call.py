"""What the steps of one call of the plain backend share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from translution.conformance.mutants.walk import Links
from translution.spec import Operator


@dataclass(frozen=True, slots=True)
class Call:
    """What every step of one call may look at.

    ``params`` are in the accumulation dtype, ``dtype`` is that of x. Of every link: whether it is ``live`` [B, H, L],
    and what the mask adds to its logit [B, H, L], 0 where it is dead.
    """

    operator: Operator
    params: Mapping[str, Tensor]
    links: Links
    live: Tensor
    added: Tensor
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.operator.num_heads

    def row(self, role: str) -> Tensor:
        """Row of every link [L] in the tables of a role."""
        return {"query": self.links.query_row, "key": self.links.key_row, "value": self.links.value_row}[role]

    @property
    def rank(self) -> int:
        """Axes of the lattice, 0 in pair tables."""
        return self.links.delta.shape[1]

    def but_params(self, changed: Mapping[str, Tensor]) -> Call:
        """The same call with some parameters replaced."""
        return replace(self, params={**self.params, **changed})
