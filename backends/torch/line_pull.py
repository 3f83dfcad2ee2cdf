"""Softmax by lines, backward: from the weights to the gradients of all tensors of a call.

dv_ij = a_ij do_i    dl_ij = scale a_ij (<do_i, v_ij> - <do_i, o_i>)    dq_ij = dl_ij k_ij    dk_ij = dl_ij q_ij
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from translution.backends.torch.bands import Reader
from translution.backends.torch.line_part import LinePart, grid, with_turned_columns
from translution.backends.torch.line_room import Weights
from translution.backends.torch.lines import by_line
from translution.backends.torch.steps import crossed, multiplied, reversed_product
from translution.backends.torch.visits import Visit


class LinePull:
    """The backward of a part of the batch: ``cotangent`` and ``out`` are [N, b, H, D], the relative features last.

    ``d_query``, ``d_key`` and ``d_value`` [H * b, N, D] are the gradients in the other features.
    """

    def __init__(self, part: LinePart, cotangent: Tensor, out: Tensor) -> None:
        self._part, self._plan, self._lines = part, part.plan, part.lines
        plain = part.value.shape[2]
        delta = with_turned_columns((cotangent * out).sum(-1).permute(2, 1, 0).unsqueeze(-1), self._lines)
        self._delta_of_registers = delta[..., : self._lines.registers, :]
        self._delta_of_grid = grid(delta, self._lines)
        self._cotangent = part.by_head("cotangent", cotangent[..., :plain], turned=True)
        self.d_query, self.d_key, self.d_value = (
            part.room.tensor(f"d {name}", *own.shape).zero_()
            for name, own in (("query", part.query), ("key", part.key), ("value", part.value))
        )
        self._d_grid = grid(self.d_query, self._lines)
        if self._plan.has_values:
            relative = cotangent[..., plain:].flatten(2)
            turned = by_line(relative, self._lines).flip(0)
            part.room.tensor("turned cotangent", *turned.shape).copy_(turned)
            item = self._plan.heads, self._plan.call.roles[-1].head_dim
            self._reader = Reader(relative, item, part.memory, "cotangent")
            if self._lines.border:
                value = part.steps[-1]
                rooms = value.workspace()
                self._border = part.border_sums(
                    lambda visit: multiplied(value.encode(visit), self._rows(visit), rooms[visit.shape])
                )

    def back(self, kept: Iterator[Tensor] | None) -> None:
        """The registers, and all columns; the weights of each from ``kept``, or computed again."""
        part, lines = self._part, self._lines
        weights_by_link, logits_by_link = part.border_room(), part.border_room()
        part.skewed.clear()
        for role in part.roles:
            role.collect()
        if lines.registers:
            own = part.weights_of_registers() if kept is None else next(kept)
            self._back_registers(own, weights_by_link, logits_by_link)
        for columns in part.columns:
            weights = part.weights(columns) if kept is None else Weights(next(kept))
            cotangent = part.queries(self._cotangent, columns)
            d_logits = part.room.weights("logits", columns)  # whose place the weights' gradient takes
            torch.bmm(cotangent, part.value.mT, out=d_logits.rows)
            if self._plan.has_values:
                self._back_values(weights, d_logits, columns)
            self._to_logits(d_logits.whole, weights.whole, self._delta_of_grid[..., columns, :])
            d_query = self._push(weights.rows, d_logits.rows, part.queries(part.query, columns), cotangent)
            self._d_grid[:, :, columns].copy_(torch.unflatten(d_query, 1, (lines.rows, -1)))
            if self._plan.has_logits:
                (first, second), room = part.roles[:2], part.room
                for slab, q, k in part.encoded(columns):
                    d_products = part.read(d_logits, slab)
                    first.push(slab, columns, d_products, k, room.product, room.small)
                    second.push(slab, columns, d_products, q, room.product, room.small)
            if lines.border:
                part.keep_columns(weights.whole, columns, weights_by_link)
                part.keep_columns(d_logits.whole, columns, logits_by_link)
        self._back_border(weights_by_link, logits_by_link)
        self.d_query = with_turned_columns(self.d_query, lines)

    def _back_registers(self, weights: Tensor, weights_by_link: Tensor, logits_by_link: Tensor) -> None:
        """Weights [H, b, G, N]."""
        part, own = self._part, slice(0, self._lines.registers)
        cotangent = self._cotangent[:, own]
        d_logits = (cotangent @ part.value.mT).view(weights.shape)
        if self._plan.has_values:
            d_logits.add_(part.of_registers(self._border))
        self._to_logits(d_logits, weights, self._delta_of_registers)
        rows = weights.flatten(0, 1), d_logits.flatten(0, 1)
        self.d_query[:, own] = self._push(*rows, part.query[:, own], cotangent)
        part.keep_registers(weights, weights_by_link)
        part.keep_registers(d_logits, logits_by_link)

    def _rows(self, visit: Visit) -> Tensor:
        """The result's gradient at the queries of a visit."""
        return self._reader.rows(visit.query)

    def _to_logits(self, d_weights: Tensor, weights: Tensor, delta: Tensor) -> None:
        """From <do_i, v_ij> to dl_ij."""
        d_weights.sub_(delta).mul_(weights).mul_(self._plan.scale)

    def _push(self, weights: Tensor, d_logits: Tensor, query: Tensor, cotangent: Tensor) -> Tensor:
        """Gather the gradients of keys and values in the features that are not relative; that of the queries."""
        self.d_value.baddbmm_(weights.mT, cotangent)
        self.d_key.baddbmm_(d_logits.mT, query)
        return d_logits @ self._part.key

    def _back_values(self, weights: Weights, d_weights: Weights, columns: slice) -> None:
        """Add <do_i, v_ij> to ``d_weights``, and gather the values' gradients."""
        part, value, room = self._part, self._part.roles[-1], self._part.room
        if self._lines.border:
            d_weights.whole[..., : self._lines.registers] += part.of_columns(self._border, columns)
        width = self._plan.call.roles[-1].head_dim
        for slab in self._lines.slabs:
            features = value.encode(slab, columns, room.first)
            cotangent = room.box("turned cotangent", slab, columns).flatten(2)
            own = torch.unflatten(cotangent, 1, (1, self._plan.heads, width))
            part.write(features, own, d_weights, slab, True)
            value.push(slab, columns, part.read(weights, slab), own, room.product, room.small)

    def _back_border(self, weights: Tensor, d_logits: Tensor) -> None:
        steps = self._part.steps
        if not steps:
            return
        if self._plan.has_logits:
            query, key = steps[:2]
            rooms = query.workspace()
            for visit, own in self._part.border():
                d_products = torch.unflatten(d_logits[own], 0, visit.shape).unsqueeze(-1).unbind(0)
                q, k, room = query.encode(visit), key.encode(visit), rooms[visit.shape]
                if query.wanted:
                    crossed(k, d_products, room.parts)
                    query.push(visit, room.whole)
                if key.wanted:
                    reversed_product(q, d_products, room.parts)
                    key.push(visit, room.whole)
        if self._plan.has_values and steps[-1].wanted:
            for visit, own in self._part.border():
                steps[-1].push(visit, self._rows(visit) * torch.unflatten(weights[own], 0, visit.shape).unsqueeze(-1))
