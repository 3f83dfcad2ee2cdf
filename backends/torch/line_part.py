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
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.line_plan import LinePlan
from translution.backends.torch.line_role import LineRole, RoleRoom, Skewed
from translution.backends.torch.line_room import LineRoom, Weights
from translution.backends.torch.lines import Lines, Slab, by_line
from translution.backends.torch.memory import Memory
from translution.backends.torch.steps import RoleSteps, crossed
from translution.backends.torch.visits import Visit


def grid(tokens: Tensor, lines: Lines) -> Tensor:
    """Tokens [.., N, D] without registers as [.., O, W, D]."""
    return torch.unflatten(tokens[..., lines.registers :, :], -2, (lines.rows, lines.width))


def with_turned_columns(tokens: Tensor, lines: Lines) -> Tensor:
    """Tokens [.., N, D] with the columns of all lines turned; or turned back."""
    turned = grid(tokens, lines).flip(-2).flatten(-3, -2)
    return torch.cat((tokens[..., : lines.registers, :], turned), -2) if lines.registers else turned


class LinePart:
    """``part`` of the batch, b items: weights are [H, b, O, columns, N] for O positions on the other axes, and those of
    the registers [H, b, G, N].

    Columns of queries are turned everywhere, those of keys nowhere. ``turned`` and ``d_turned`` are the roles' tables
    and their gradients as :class:`LineRole` has them, ``gathered`` has all other gradients. :meth:`attend` appends its
    weights to ``kept``, unless that is None. All work in ``memory``.
    """

    def __init__(
        self,
        plan: LinePlan,
        tensors: Sequence[Tensor],
        turned: Sequence[Tensor | None],
        part: slice,
        kept: list[Tensor] | None,
        memory: Memory,
        gathered: Gathered | None = None,
        d_turned: Sequence[Tensor | None] = (),
    ) -> None:
        query, key, value, *rest = tensors
        self.plan, self.lines, self.memory, self._like = plan, plan.lines, memory, query
        self.batch = query[:, part].shape[1]
        self.columns = plan.columns(self.batch, kept is not None)
        self.room = memory.once("lines", lambda: LineRoom(memory.store, plan, query, self.batch, self.columns))
        self.query = self.by_head("query", query[:, part], turned=True)
        self.key, self.value = self.by_head("key", key[:, part]), self.by_head("value", value[:, part])
        self.skewed = memory.once("skewed", lambda: Skewed(memory.store, query))
        self._kept = kept
        d_turned = d_turned or [None] * len(turned)
        roles = zip(plan.call.with_tensors(rest), turned, d_turned, strict=True)
        self.roles = [self._role(role, table, d_table, part) for role, table, d_table in roles]
        self.steps: list[RoleSteps] = plan.call.steps(rest, gathered, part, memory) if self.lines.border else []

    def _role(self, role: Encoded, table: Tensor | None, d_table: Tensor | None, part: slice) -> LineRole:
        given = role.tables[0].z if role.base is None else role.base.flatten(2)
        tokens, memory = by_line(given[:, part], self.lines), self.memory
        room = memory.once(("line", role.name), lambda: RoleRoom(memory.store, tokens, self.skewed))
        return LineRole(role, self.lines, table, d_table, tokens, room)

    def by_head(self, name: str, tokens: Tensor, turned: bool = False) -> Tensor:
        """Tokens [N, b, H, D] as [H * b, N, D], in memory of this ``name``; with the columns of all lines turned."""
        count, batch, heads, width = tokens.shape
        found, registers = self.room.tensor(name, heads * batch, count, width), self.lines.registers
        own, given = found.view(heads, batch, count, width), tokens.permute(2, 1, 0, 3)
        if turned:
            own[..., :registers, :] = given[..., :registers, :]
            grid(own, self.lines).copy_(grid(given, self.lines).flip(-2))
        else:
            own.copy_(given)
        return found

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

    def read(self, weights: Weights, slab: Slab) -> Tensor:
        """A slab's pairs as [columns, W, H, 1, n], until other weights are read."""
        pairs, factors = weights.pairs(slab, self.lines), self.room.factors
        factors(*pairs.shape).copy_(pairs)
        return factors(*pairs.shape[:3], 1, math.prod(pairs.shape[3:]))

    def write(self, first: Tensor, second: Tensor, weights: Weights, slab: Slab, add: bool) -> None:
        """Put or add the inner products of features [columns | 1, W | 1, H, D, n] to a slab's pairs."""
        pairs, room = weights.pairs(slab, self.lines), self.room
        shape = pairs.shape[:3]
        product = torch.mul(first, second, out=room.product(*shape, *first.shape[3:]))
        torch.sum(product, 3, out=room.small(*shape, first.shape[4]))
        found = room.small(*pairs.shape)
        if add:
            pairs.add_(found)
        else:
            pairs.copy_(found)

    def queries(self, by_head: Tensor, columns: slice) -> Tensor:
        """What queries have [H * b, N, D] for some columns, [H * b, O * columns, D]."""
        return grid(by_head, self.lines)[:, :, columns].flatten(1, 2)

    def weights_of_registers(self) -> Tensor:
        """Softmax of the logits of registers, [H, b, G, N]."""
        registers, tokens = self.lines.registers, self.lines.links.geometry.num_keys
        logits = self._empty(self.plan.heads, self.batch, registers, tokens)
        if self.plan.has_logits:
            logits.copy_(self.of_registers(self._border))
        self._add_plain(logits.flatten(0, 1), self.query[:, :registers])
        return logits.softmax(-1)

    def weights(self, columns: slice) -> Weights:
        """Softmax of the logits of some columns."""
        lines = self.lines
        logits = self.room.weights("logits", columns)
        if self.plan.has_logits:
            if lines.border:
                logits.whole[..., : lines.registers] = self.of_columns(self._border, columns)
            for slab, query, key in self.encoded(columns):
                self.write(query, key, logits, slab, False)
        self._add_plain(logits.rows, self.queries(self.query, columns))
        if self._kept is not None:
            return Weights(logits.whole.softmax(-1))
        weights = self.room.weights("weights", columns)
        torch.softmax(logits.whole, -1, out=weights.whole)
        return weights

    def encoded(self, columns: slice) -> Iterator[tuple[Slab, Tensor, Tensor]]:
        """Relative features of queries and keys, slab by slab."""
        query, key = self.roles[:2]
        for slab in self.lines.slabs:
            yield slab, query.encode(slab, columns, self.room.first), key.encode(slab, columns, self.room.second)

    def _add_plain(self, logits: Tensor, query: Tensor) -> None:
        """scale (logits + <q_i, k_j>); where no feature of the logits is relative, ``logits`` is memory alone."""
        scale = self.plan.scale
        logits.baddbmm_(query, self.key.mT, beta=scale if self.plan.has_logits else 0, alpha=scale)

    def attend(self, out: Tensor) -> None:
        """The result [N, b, H, D], the relative features last."""
        lines, plain = self.lines, self.value.shape[2]
        by_link = self.border_room()
        relative = self._relative() if self.plan.has_values else None
        if lines.registers:
            weights = self._keep(self.weights_of_registers())
            found = self._weighted(weights.flatten(0, 1), weights.shape[:3])
            out[: lines.registers, ..., :plain] = found.permute(2, 1, 0, 3)
            self.keep_registers(weights, by_link)
        natural = torch.unflatten(out[lines.registers :, ..., :plain], 0, (lines.rows, lines.width))
        for columns in self.columns:
            own = self.weights(columns)
            self._keep(own.whole)
            turned = natural[:, lines.width - columns.stop : lines.width - columns.start]
            turned.copy_(self._weighted(own.rows, own.whole.shape[:4]).flip(3).permute(2, 3, 1, 0, 4))
            if lines.border:
                self.keep_columns(own.whole, columns, by_link)
            if relative is not None:
                self._add_values(own, columns)
        if relative is not None:
            self._finish_values(relative, by_link, out[..., plain:])

    def _keep(self, weights: Tensor) -> Tensor:
        if self._kept is not None:
            self._kept.append(weights)
        return weights

    def _weighted(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Ordinary attention's result [*shape, D], for weights [H * b, queries, N]."""
        return (rows @ self.value).view(*shape, self.value.shape[2])

    def _relative(self) -> Tensor:
        lines, role = self.lines, self.plan.call.roles[-1]
        shape = lines.width, self.plan.heads * role.head_dim, *lines.outer, self.batch
        return self.room.tensor("relative", *shape).zero_()

    def _add_values(self, weights: Weights, columns: slice) -> None:
        value, room = self.roles[-1], self.room
        for slab in self.lines.slabs:
            features = value.encode(slab, columns, room.first)
            factors = self.read(weights, slab)
            product = room.product(*factors.shape[:3], *features.shape[3:])
            torch.mul(features, factors, out=product)
            found = room.small(product.shape[0], *product.shape[2:])
            total = room.box("relative", slab, columns)
            total.add_(torch.sum(product, 1, out=found).view(total.shape))

    def _finish_values(self, relative: Tensor, by_link: Tensor, out: Tensor) -> None:
        lines = self.lines
        total = self._like.new_zeros((len(out), self.batch, relative.shape[1]))
        total[lines.registers :] = relative.flip(0).movedim((0, 1), (-3, -1)).flatten(0, -3)
        adder = Adder(total, (self.plan.heads, self.plan.call.roles[-1].head_dim), self.memory, "out")
        for visit, own in self.border():
            weights = torch.unflatten(by_link[own], 0, visit.shape).unsqueeze(-1)
            self.steps[-1].add_weighted(visit, weights, adder.rows(visit.query))
        adder.close()
        out.copy_(total.view(out.shape))
