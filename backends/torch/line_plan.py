"""What a softmax by lines knows of a call: its tensors, how it is divided, and the same result in plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from translution.backends.torch import memory, pairwise, plain
from translution.backends.torch.call import Call, divided
from translution.backends.torch.lines import Lines
from translution.backends.torch.memory import Memory
from translution.backends.torch.relevance import softmax

# The workspaces of a part of the batch, unless one column of one item has more.
WORKSPACE_BYTES = 24 << 20
# Weights of the whole batch that are kept for the backward; more than that are computed again.
KEPT_BYTES = 6 << 20


@dataclass(frozen=True, slots=True)
class LinePlan:
    """What both directions know. ``features`` are those of all heads, whether or not they are relative.

    Tensors are queries, keys and values in the features of a head that are not relative, [N, B, H, D]; then those of
    ``call``, which has the others: query and key where the logits have relative features, value where the values have.
    """

    lines: Lines
    call: Call
    scale: float
    features: int

    @property
    def heads(self) -> int:
        """Of every role."""
        return self.call.roles[0].heads

    @property
    def has_logits(self) -> bool:
        """Whether queries and keys have relative features."""
        return len(self.call.roles) > 1

    @property
    def has_values(self) -> bool:
        """Whether values have relative features."""
        return len(self.call.roles) != 2

    def keeps_weights(self, batch: int) -> bool:
        """Whether a call that is recorded keeps the weights of all its items."""
        geometry = self.lines.links.geometry
        return 4 * batch * self.heads * geometry.num_queries * geometry.num_keys <= KEPT_BYTES

    def _bytes(self, kept: bool) -> tuple[int, int]:
        """What one item takes: with all its columns, and whatever the columns."""
        lines, width = self.lines, max(role.heads * role.head_dim for role in self.call.roles)
        tokens = lines.links.geometry.num_keys
        # Features of two roles and their product; logits or their gradient, and weights.
        pairs = lines.rows * lines.width * (3 * lines.width * width + (2 - kept) * self.heads * tokens)
        # Queries, keys and values by head, their gradients, the cotangent and copies on the way.
        return 4 * pairs, 4 * 9 * tokens * self.features

    def parts(self, batch: int, kept: bool) -> list[slice]:
        """The batch in parts of about the same size."""
        return divided(batch, sum(self._bytes(kept)), WORKSPACE_BYTES)

    def columns(self, batch: int, kept: bool) -> list[slice]:
        """The columns u of the queries in parts, for ``batch`` items."""
        pairs, others = (batch * size for size in self._bytes(kept))
        return divided(self.lines.width, pairs // self.lines.width, max(WORKSPACE_BYTES - others, 1))

    def take(self, tensors: Sequence[Tensor], kept: bool, backward: bool = False) -> Memory:
        """What all parts of one direction work in; the weights are ``kept`` for the backward, or computed again."""
        outside = tuple(t.shape for t in tensors[:3])
        kind = "lines", "backward" if backward else "forward", kept, *outside, *self.call.kind(tensors[3:])
        return memory.take(kind, tensors[0])

    def turned(self, tensors: Sequence[Tensor], own: Memory) -> list[Tensor | None]:
        """The roles' matrices as :class:`LineRole` has them."""
        found = self.tables("turned", tensors, own)
        for role, table in zip(self.call.with_tensors(tensors), found, strict=True):
            if table is not None:
                matrices = role.tables[0].matrices[: self.lines.classes]
                table.copy_((matrices if role.name == "key" else matrices.flip(0)).transpose(0, 1))
        return found

    def tables(self, name: str, tensors: Sequence[Tensor], own: Memory) -> list[Tensor | None]:
        """Room of this ``name`` for every role's matrices [R, classes, E], None for a role without."""

        def empty(number: int) -> Tensor:
            z, matrices = tensors[self.call.tokens(number)[0]], tensors[self.call.matrices(number)[0]]
            return own.store.empty(z, matrices.shape[1], self.lines.classes, matrices.shape[2])

        numbers = range(len(self.call.roles))
        return own.once(name, lambda: [empty(n) if self.call.roles[n].tables else None for n in numbers])

    def whole(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result in plain autograd."""
        query, key, value, *rest = tensors
        links, roles = self.lines.links, self.call.with_tensors(rest)
        logits = plain.of_links(query, key, links)
        if self.has_logits:
            logits = logits + pairwise.inner_products(roles[0], roles[1], links, None)
        weights = softmax(self.scale * logits, links, None)
        found = plain.weighted(weights, value, links)
        if not self.has_values:
            return found
        return torch.cat((found, pairwise.aggregate(weights, roles[-1], links, None)), -1)
