"""Softmax by lines, forward: the weights of some columns of the queries, and what the values come to under them.

What does not depend on the displacement is multiplied as in ordinary attention, the rest slab by slab; registers are
visited as everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from translution.backends.torch.bands import Adder
from translution.backends.torch.call import Gathered
from translution.backends.torch.line_plan import LinePlan
from translution.backends.torch.lines import LineRole, Lines, Slab, box, product
from translution.backends.torch.steps import RoleSteps, crossed
from translution.backends.torch.visits import Visit


def by_head(tokens: Tensor) -> Tensor:
    """[N, b, H, D] as [H * b, N, D]."""
    return tokens.permute(2, 1, 0, 3).flatten(0, 1).contiguous()


def with_turned_columns(tokens: Tensor, lines: Lines) -> Tensor:
    """Tokens [.., N, D] with the columns of all lines turned; or turned back."""
    registers, grid = tokens[..., : lines.registers, :], tokens[..., lines.registers :, :]
    turned = torch.unflatten(grid, -2, (lines.rows, lines.width)).flip(-2).flatten(-3, -2)
    return torch.cat((registers, turned), -2) if lines.registers else turned


class LinePart:
    """``part`` of the batch, b items: weights are [H, b, O, columns, N] for O positions on the other axes, and those of
    the registers [H, b, G, N].

    Columns of queries are turned everywhere, those of keys nowhere. ``turned`` and ``d_turned`` are the roles' tables
    and their gradients as :class:`LineRole` has them, ``gathered`` has all other gradients. :meth:`attend` appends its
    weights to ``kept``, unless that is None.
    """

    def __init__(
        self,
        plan: LinePlan,
        tensors: Sequence[Tensor],
        turned: Sequence[Tensor | None],
        part: slice,
        kept: list[Tensor] | None,
        gathered: Gathered | None = None,
        d_turned: Sequence[Tensor | None] = (),
    ) -> None:
        query, key, value, *rest = tensors
        self.plan, self.lines = plan, plan.lines
        self.query = with_turned_columns(by_head(query[:, part]), self.lines)
        self.key, self.value = by_head(key[:, part]), by_head(value[:, part])
        self.batch = tensors[0][:, part].shape[1]
        self.columns = plan.columns(self.batch, kept is not None)
        self._kept = kept
        roles = plan.call.with_tensors(rest)
        d_turned = d_turned or [None] * len(roles)
        self.roles = [LineRole(r, self.lines, t, d, part) for r, t, d in zip(roles, turned, d_turned, strict=True)]
        self.steps: list[RoleSteps] = plan.call.steps(rest, gathered, part) if self.lines.border else []
        like, widest = tensors[0], max(c.stop - c.start for c in self.columns)
        width = max(role.heads * role.head_dim for role in roles)
        size = self.lines.width * widest * width * self.lines.rows * self.batch
        self.rooms = [like.new_empty(size) for _ in range(3)]
        self._like = like

    def _empty(self, *shape: int) -> Tensor:
        return self._like.new_empty(shape)

    def border(self) -> Iterator[tuple[Visit, slice]]:
        """The visits of registers, and which links of all those they are."""
        start = 0
        for visit in self.lines.border:
            stop = start + visit.stop - visit.start
            yield visit, slice(start, stop)
            start = stop

    def border_room(self) -> Tensor:
        """Numbers of the registers' links [links, b, H]."""
        return self._empty(self.lines.border_links, self.batch, self.plan.heads)

    @cached_property
    def _border(self) -> Tensor:
        """<q_i, k_ij> of the registers' links, in the relative features."""
        query, key = self.steps[:2]
        rooms = query.workspace()

        def products(visit: Visit) -> Tensor:
            crossed(key.encode(visit), query.encode(visit).parts, rooms[visit.shape].parts)
            return rooms[visit.shape].whole

        return self.border_sums(products)

    def border_sums(self, products: Callable[[Visit], Tensor]) -> Tensor:
        """Sums over the features of every visit's products, for all registers' links."""
        found = self.border_room()
        for visit, own in self.border():
            product = products(visit)
            torch.sum(product, -1, out=found[own].view(product.shape[:-1]))
        return found

    def of_registers(self, by_link: Tensor) -> Tensor:
        """Links from registers as [H, b, G, N]."""
        own = by_link.index_select(0, self.lines.from_registers)
        return torch.unflatten(own, 0, (self.lines.registers, -1)).permute(3, 2, 0, 1)

    def of_columns(self, by_link: Tensor, columns: slice) -> Tensor:
        """Links to registers as [H, b, O, columns, G]."""
        lines = self.lines
        own = torch.unflatten(by_link.index_select(0, lines.to_registers), 0, (lines.rows, lines.width, -1))
        return own[:, columns].permute(4, 3, 0, 1, 2)

    def keep_registers(self, weights: Tensor, by_link: Tensor) -> None:
        """The inverse of :meth:`of_registers`."""
        by_link.index_copy_(0, self.lines.from_registers, weights.permute(2, 3, 1, 0).flatten(0, 1))

    def keep_columns(self, weights: Tensor, columns: slice, by_link: Tensor) -> None:
        """The inverse of :meth:`of_columns`, from weights of all keys."""
        lines, index = self.lines, self.lines.to_registers
        if len(self.columns) > 1:
            index = index.view(lines.rows, lines.width, -1)[:, columns].flatten()
        by_link.index_copy_(0, index, weights[..., : lines.registers].permute(2, 3, 4, 1, 0).flatten(0, 2))

    def pairs(self, weights: Tensor, slab: Slab) -> Tensor:
        """A slab's pairs in weights [H, b, O, columns, N], as [H, b, columns, W, *size] to be read or written."""
        lines, keys = self.lines, weights.shape[-1]
        heads, batch, row, column, _ = weights.stride()
        offset = weights.storage_offset() + lines.registers
        strides: list[int] = []
        step = 1
        for query, key, size in reversed(list(zip(slab.query, slab.key, lines.outer, strict=True))):
            offset += query * step * row + key * step * lines.width
            strides.insert(0, step * (row + lines.width))
            step *= size
        shape = (*weights.shape[:2], weights.shape[3], lines.width, *slab.size)
        assert keys == lines.registers + lines.rows * lines.width
        return weights.as_strided(shape, (heads, batch, column, 1, *strides), offset)

    def read(self, weights: Tensor, slab: Slab) -> Tensor:
        """A slab's pairs as [columns, W, H, 1, n]."""
        own = self.pairs(weights, slab).movedim((0, 1), (2, -1)).contiguous()
        return own.view(*own.shape[:3], 1, math.prod(own.shape[3:]))

    def write(self, products: Tensor, weights: Tensor, slab: Slab, add: bool) -> None:
        """Put or add [columns, W, H, n] to a slab's pairs."""
        own = products.view(*products.shape[:3], *slab.size, self.batch).movedim((2, -1), (0, 1))
        pairs = self.pairs(weights, slab)
        if add:
            pairs.add_(own)
        else:
            pairs.copy_(own)

    def queries(self, by_head: Tensor, columns: slice) -> Tensor:
        """What queries have [H * b, N, D] for some columns, [H * b, O * columns, D]."""
        lines = self.lines
        own = torch.unflatten(by_head[:, lines.registers :], 1, (lines.rows, lines.width))
        return own[:, :, columns].flatten(1, 2)

    def weights_of_registers(self) -> Tensor:
        """Softmax of the logits of registers, [H, b, G, N]."""
        registers, tokens = self.lines.registers, self.lines.links.geometry.num_keys
        logits = self._empty(self.plan.heads, self.batch, registers, tokens)
        if self.plan.has_logits:
            logits.copy_(self.of_registers(self._border))
        return self._softmax(logits, self.query[:, :registers])

    def weights(self, columns: slice) -> Tensor:
        """Softmax of the logits of some columns, [H, b, O, columns, N]."""
        lines = self.lines
        logits = self._empty(
            self.plan.heads, self.batch, lines.rows, columns.stop - columns.start, lines.links.geometry.num_keys
        )
        if self.plan.has_logits:
            if lines.border:
                logits[..., : lines.registers] = self.of_columns(self._border, columns)
            for slab, query, key in self.encoded(columns):
                self.write(product(query, key, self.rooms[2]).sum(3), logits, slab, False)
        return self._softmax(logits, self.queries(self.query, columns))

    def encoded(self, columns: slice) -> Iterator[tuple[Slab, Tensor, Tensor]]:
        """Relative features of queries and keys, slab by slab."""
        query, key = self.roles[:2]
        for slab in self.lines.slabs:
            yield slab, query.encode(slab, columns, self.rooms[0]), key.encode(slab, columns, self.rooms[1])

    def _softmax(self, logits: Tensor, query: Tensor) -> Tensor:
        """Of scale (logits + <q_i, k_j>); where no feature of the logits is relative, ``logits`` is memory alone."""
        scale, flat = self.plan.scale, logits.flatten(2, -2).flatten(0, 1)
        flat.baddbmm_(query, self.key.mT, beta=scale if self.plan.has_logits else 0, alpha=scale)
        return logits.softmax(-1)

    def attend(self, out: Tensor) -> None:
        """The result [N, b, H, D], the relative features last."""
        lines, plain = self.lines, self.value.shape[2]
        by_link = self.border_room()
        relative = self._relative() if self.plan.has_values else None
        if lines.registers:
            weights = self._keep(self.weights_of_registers())
            self._put(weights, out[: lines.registers, ..., :plain].unsqueeze(1))
            self.keep_registers(weights, by_link)
        turned = self._empty(lines.rows, lines.width, *out.shape[1:3], plain)
        for columns in self.columns:
            weights = self._keep(self.weights(columns))
            self._put(weights, turned[:, columns])
            if lines.border:
                self.keep_columns(weights, columns, by_link)
            if relative is not None:
                self._add_values(weights, columns, relative)
        out[lines.registers :, ..., :plain] = turned.flip(1).flatten(0, 1)
        if relative is not None:
            self._finish_values(relative, by_link, out[..., plain:])

    def _keep(self, weights: Tensor) -> Tensor:
        if self._kept is not None:
            self._kept.append(weights)
        return weights

    def _put(self, weights: Tensor, out: Tensor) -> None:
        """Ordinary attention's result, to out [rows, columns, b, H, D]."""
        found = weights.flatten(2, -2).flatten(0, 1) @ self.value
        out.copy_(found.view(*weights.shape[:2], *out.shape[:2], out.shape[4]).permute(2, 3, 1, 0, 4))

    def _relative(self) -> Tensor:
        lines, role = self.lines, self.plan.call.roles[-1]
        return self._like.new_zeros((lines.width, self.plan.heads * role.head_dim, *lines.outer, self.batch))

    def _add_values(self, weights: Tensor, columns: slice, relative: Tensor) -> None:
        value = self.roles[-1]
        for slab in self.lines.slabs:
            features = value.encode(slab, columns, self.rooms[0])
            found = product(features, self.read(weights, slab), self.rooms[2])
            total = box(relative[columns], slab.query, slab)
            total.add_(found.sum(1).view(total.shape))

    def _finish_values(self, relative: Tensor, by_link: Tensor, out: Tensor) -> None:
        lines = self.lines
        total = self._like.new_zeros((len(out), self.batch, relative.shape[1]))
        total[lines.registers :] = relative.flip(0).movedim((0, 1), (-3, -1)).flatten(0, -3)
        adder = Adder(total, (self.plan.heads, self.plan.call.roles[-1].head_dim))
        for visit, own in self.border():
            weights = torch.unflatten(by_link[own], 0, visit.shape).unsqueeze(-1)
            self.steps[-1].add_weighted(visit, weights, adder.rows(visit.query))
        adder.close()
        out.copy_(total.view(out.shape))
