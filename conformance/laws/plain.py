"""A plain computation to measure precision against: what half precision may round, this one rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from translution.conformance.mutants.call import Call
from translution.conformance.mutants.naive import Naive


class Plain(Naive):
    """Queries, keys, values and the weights that multiply values are kept in one dtype; logits and every sum are
    computed in float32 at least (clause D2). Gradients pass the same roundings on their way back.
    """

    name: str = "plain"

    def __init__(self, dtype: str) -> None:
        self.dtypes = (dtype,)
        self.storage: torch.dtype = getattr(torch, dtype)

    def kept_in_dtype(self, values: Tensor) -> Tensor:
        """Rounded to the dtype."""
        return values.to(self.storage).to(values.dtype)

    def by_heads(self, call: Call, features: Tensor) -> Tensor:
        """As in a computation that writes its projections down."""
        return self.kept_in_dtype(super().by_heads(call, features))

    def aggregate(self, call: Call, weights: Tensor, values: Tensor) -> Tensor:
        """As in a product of two matrices in the dtype, summed in float32."""
        return super().aggregate(call, self.kept_in_dtype(weights), values)
