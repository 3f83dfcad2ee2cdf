"""The two directions of a softmax over links, as functions that go through some of the links from end to end.

    p_ij = exp(scale <q_ij, k_ij> + bias - m_i)        o_i s_i = sum_j p_ij v_ij        s_i = sum_j p_ij

and, with a_ij = p_ij / s_i and dl_ij = a_ij (<do_i, v_ij> - <do_i, o_i>),

    dv_ij = a_ij do_i        dq_ij = scale dl_ij k_ij        dk_ij = scale dl_ij q_ij

which go on to tokens and tables at once: rows of a block of links are all that is ever held.

The links are cut into stretches of about the same work, one for each thread. What two of them add to is a place of its
own for each, as are the tables' gradients for a step that is cut.
"""

from collections.abc import Sequence

from llvmlite import ir

from translution.backends.torch.compiled.block import Block
from translution.backends.torch.compiled.emitter import INTEGER, integer, pieces
from translution.backends.torch.compiled.matrices import Layout
from translution.backends.torch.compiled.processor import Processor
from translution.backends.torch.compiled.sizes import Role, Sizes, padded


class _Forward(Block):
    """``outs`` [Nq, items, H * Dv] and ``totals`` [Nq, items, H] are added to, for each stretch its own.

    Without ``sums`` the largest logits are taken into ``totals`` instead.
    """

    def __init__(self, module: ir.Module, processor: Processor, sizes: Sizes, name: str, sums: bool) -> None:
        super().__init__(module, processor, name, sizes, False)
        query, key, value = sizes.roles
        with self.blocks() as count:
            self.encode(query, count)
            self.encode(key, count)
            if sums:
                self._weigh(count)
                self.encode(value, count)
                self._add(value, count)
            else:
                self._look_for_highest(count)
        self.code.ret_void()

    def _weigh(self, count: ir.Value) -> None:
        with self.emitter.loop(count) as row:
            for head in range(self.sizes.heads):
                self.weigh(row, head)
        self.raise_weights(count)

    def _look_for_highest(self, count: ir.Value) -> None:
        e, code, heads = self.emitter, self.code, self.sizes.heads
        with e.loop(count) as row:
            at = e.times(self.token("query", row, self.of_stretch("strides")), heads)
            for head in range(heads):
                place, found = e.at(self.of_stretch("totals"), e.sum(at, head)), self.logit(row, head)
                before = e.scalar(place)
                code.store(code.select(code.fcmp_unordered(">", found, before), found, before), place)

    def _add(self, role: Role, count: ir.Value) -> None:
        e, code, sizes = self.emitter, self.code, self.sizes
        with e.loop(count) as row:
            own = self.token("query", row, self.of_stretch("strides"))
            total = e.at(self.of_stretch("totals"), e.times(own, sizes.heads))
            out = e.at(self.of_stretch("outs"), e.times(own, sizes.features(role)))
            value = self.of_row(role.name, row, sizes.features(role))
            for head in range(sizes.heads):
                weight, at = e.scalar(self.number("weights", row, head)), e.at(total, head)
                code.store(code.fadd(e.scalar(at), weight), at)
                factor = e.splat(weight)
                for n, size in enumerate(pieces(role.dim, self.lanes)):
                    start = head * role.dim + n * self.lanes
                    to = e.at(out, start)
                    e.store(e.fma(factor, e.load(e.at(value, start), size), e.load(to, size)), to, size)


class _Backward(Block):
    """Gradients of sources are added to, for each stretch its own; those of tables too, unless it ``opens`` them."""

    def __init__(self, module: ir.Module, processor: Processor, sizes: Sizes, name: str) -> None:
        super().__init__(module, processor, name, sizes, True)
        self._d_matrices: dict[int, ir.Value] = {}
        with self.blocks() as count:
            for role in sizes.roles:
                self.encode(role, count)
            self.copy("cotangent", "query", sizes.features(sizes.roles[2]), self.room("cotangent"), count)
            self._weigh(count)
            self._pull(count)
            self._push(count)
        self.code.ret_void()

    def open_step(self) -> None:
        """Turn the tables, and clear their gradients where nothing is in them."""
        code, sizes, offset = self.code, self.sizes, 0
        clears = code.or_(self.is_cut, code.icmp_signed(">", self.argument("opens", INTEGER), integer(0)))
        for number, table in enumerate(sizes.tables):
            if table.wanted:
                own = self.emitter.at(self.of_stretch("own_tables"), offset)
                found = self._d_matrices[number] = code.select(self.is_cut, own, self.matrix(number, "d_"))
                with code.if_then(clears):
                    self.clear(found, sizes.table_sizes[number])
            if sizes.sources[table.source].wanted:
                turned = self.matrices.turned(table.inner, sizes.columns(table), padded(table.inner, self.lanes))
                code.call(turned, [self.matrix(number), self.room(f"turned {number}")])
            offset += sizes.table_sizes[number]

    def _weigh(self, count: ir.Value) -> None:
        """p_ij and <do_i, v_ij>."""
        code, value = self.code, self.sizes.roles[2]
        features = self.sizes.features(value)
        with self.emitter.loop(count) as row:
            for head in range(self.sizes.heads):
                self.weigh(row, head)
                g, v = (self.of_row(name, row, features) for name in ("cotangent", value.name))
                code.store(self.dot(g, v, head, value.dim), self.number("pulls", row, head))
        self.raise_weights(count)

    def _pull(self, count: ir.Value) -> None:
        """Where q, k and v were, dq, dk and dv."""
        e, code, sizes, (query, key, value) = self.emitter, self.code, self.sizes, self.sizes.roles
        scale = e.scalar(self.argument("scale"))
        with e.loop(count) as row:
            q, k = (self.of_row(role.name, row, sizes.features(role)) for role in (query, key))
            g, v = (self.of_row(name, row, sizes.features(value)) for name in ("cotangent", value.name))
            for head in range(sizes.heads):
                weight = code.fmul(e.scalar(self.number("weights", row, head)), self.of_query("inverse", row, head))
                pull = code.fadd(e.scalar(self.number("pulls", row, head)), self.of_query("minus_delta", row, head))
                pull = code.fmul(weight, pull)
                if sizes.bias:
                    at = e.at(self.of_stretch("d_bias"), e.sum(e.times(self.value_class, sizes.heads), head))
                    code.store(code.fadd(e.scalar(at), pull), at)
                factor, share = e.splat(code.fmul(scale, pull)), e.splat(weight)
                for n, size in enumerate(pieces(query.dim, self.lanes)):
                    places = [e.at(own, head * query.dim + n * self.lanes) for own in (q, k)]
                    own_q, own_k = (e.load(place, size) for place in places)
                    e.store(code.fmul(factor, own_k), places[0], size)
                    e.store(code.fmul(factor, own_q), places[1], size)
                for n, size in enumerate(pieces(value.dim, self.lanes)):
                    start = head * value.dim + n * self.lanes
                    e.store(code.fmul(share, e.load(e.at(g, start), size)), e.at(v, start), size)

    def _push(self, count: ir.Value) -> None:
        """From features to sources and tables."""
        begun: set[int] = set()
        for role in self.sizes.roles:
            if role.base is not None and self.sizes.sources[role.base].wanted:
                source, given = self.sizes.sources[role.base], self.room(role.name)
                self.add_to(f"d_source {role.base}", source.side, source.features, given, count)
            for number in role.tables:
                self._push_table(role, number, begun, count)
        for number in sorted(begun):
            source, given = self.sizes.sources[number], self.room(f"gradient {number}")
            self.add_to(f"d_source {number}", source.side, source.features, given, count)

    def _push_table(self, role: Role, number: int, begun: set[int], count: ir.Value) -> None:
        e, code, sizes, table = self.emitter, self.code, self.sizes, self.sizes.tables[number]
        given, columns = self.room(role.name), sizes.columns(table)
        if table.width < role.dim:
            for own, other, size in self.placed(role, table, count):
                e.store(e.load(own, size), other, size)
            given = self.room("narrow")
        inner, wide = padded(table.inner, self.lanes), padded(columns, self.lanes)
        if sizes.sources[table.source].wanted:
            layout = Layout(columns, inner, wide, inner, inner)
            product = self.matrices.product(layout, table.source in begun)
            begun.add(table.source)
            code.call(product, [given, self.room(f"turned {number}"), self.room(f"gradient {table.source}"), count])
        if table.wanted:
            outer = self.matrices.outer(Layout(table.inner, columns, inner, wide, columns))
            code.call(outer, [self.rows(table.source, count), given, self._d_matrices[number], count])


def forward_module(processor: Processor, sizes: Sizes) -> tuple[ir.Module, Sequence[str]]:
    """``sums`` of o_i s_i and s_i, and ``highest``, which takes in the largest logits instead."""
    module = ir.Module(f"forward {sizes}")
    _Forward(module, processor, sizes, "sums", True)
    _Forward(module, processor, sizes, "highest", False)
    return module, ("sums", "highest")


def backward_module(processor: Processor, sizes: Sizes) -> tuple[ir.Module, Sequence[str]]:
    """``gradients``."""
    module = ir.Module(f"backward {sizes}")
    _Backward(module, processor, sizes, "gradients")
    return module, ("gradients",)
