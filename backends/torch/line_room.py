"""What a softmax by lines works in, which a thread may keep from call to call, and what is looked up in it by slab."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from translution.backends.torch.bands import Scratch
from translution.backends.torch.line_plan import LinePlan
from translution.backends.torch.lines import Lines, Slab, box
from translution.backends.torch.memory import Store


class Weights:
    """Numbers of the pairs of some columns, ``whole`` [H, b, O, columns, N], and the views of it that are asked for."""

    def __init__(self, whole: Tensor) -> None:
        self.whole, self.rows = whole, whole.flatten(2, 3).flatten(0, 1)
        self._pairs: dict[int, Tensor] = {}

    def pairs(self, slab: Slab, lines: Lines) -> Tensor:
        """A slab's pairs [columns, W, H, *size, b], to be read or written."""
        found = self._pairs.get(slab.row)
        if found is not None:
            return found
        whole = self.whole
        heads, batch, row, column, _ = whole.stride()
        offset = whole.storage_offset() + lines.registers
        strides: list[int] = []
        step = 1
        for query, key, size in reversed(list(zip(slab.query, slab.key, lines.outer, strict=True))):
            offset += query * step * row + key * step * lines.width
            strides.insert(0, step * (row + lines.width))
            step *= size
        assert whole.shape[-1] == lines.registers + lines.rows * lines.width
        shape = whole.shape[3], lines.width, whole.shape[0], *slab.size, whole.shape[1]
        found = whole.as_strided(shape, (column, 1, heads, *strides, batch), offset)
        self._pairs[slab.row] = found
        return found


class LineRoom:
    """What parts of the batch of one size work in: features of a slab, tokens by head, and numbers of pairs.

    Args:
        store: where from.
        plan: what all of them know.
        like: of the tokens' dtype and device.
        batch: items of a part.
        columns: those of the queries, in parts.
    """

    def __init__(self, store: Store, plan: LinePlan, like: Tensor, batch: int, columns: Sequence[slice]) -> None:
        self._store, self._like, lines = store, like.new_empty(0), plan.lines
        widest = max(c.stop - c.start for c in columns)
        self._shape = plan.heads, batch, lines.rows, widest, lines.links.geometry.num_keys
        self._tensors: dict[str, Tensor] = {}
        self._weights: dict[tuple[str, int], Weights] = {}
        self._boxes: dict[tuple[str, int, int], Tensor] = {}
        # Features of queries or values, of keys, their products or gradients; numbers of pairs; what is none of these.
        names = "first", "second", "product", "factors", "small"
        self.first, self.second, self.product, self.factors, self.small = (Scratch(like, store, n) for n in names)
        pairs = lines.width * widest * lines.rows * batch
        for scratch in (self.first, self.second, self.product):
            scratch(pairs * max(role.heads * role.head_dim for role in plan.call.roles))
        self.factors(pairs * plan.heads)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Room of this ``name``, of always the same shape."""
        found = self._tensors.get(name)
        if found is None:
            found = self._tensors[name] = self._store.empty(self._like, *shape)
        return found

    def weights(self, name: str, columns: slice) -> Weights:
        """Room of this ``name`` for numbers of some columns' pairs; other columns have the same."""
        found = self._weights.get((name, columns.start))
        if found is None:
            heads, batch, rows, _, tokens = self._shape
            shape = heads, batch, rows, columns.stop - columns.start, tokens
            room = self.tensor(name, math.prod(self._shape))
            found = self._weights[name, columns.start] = Weights(room[: math.prod(shape)].view(shape))
        return found

    def box(self, name: str, slab: Slab, columns: slice) -> Tensor:
        """What the queries of a slab have [columns, F, *size, b] in the room of this ``name``, by line."""
        found = self._boxes.get((name, slab.row, columns.start))
        if found is None:
            found = self._boxes[name, slab.row, columns.start] = box(self._tensors[name][columns], slab.query, slab)
        return found
