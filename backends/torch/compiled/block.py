"""What both directions do with the rows of a block: one displacement, some of its links, all items of each."""

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from translution.backends.torch.compiled.emitter import INTEGER, POINTER, Emitter, integer, pieces
from translution.backends.torch.compiled.matrices import Layout, Matrices
from translution.backends.torch.compiled.processor import Processor
from translution.backends.torch.compiled.sizes import Role, Sizes, Table, padded
from translution.backends.torch.compiled.work import BLOCK, Work, arguments, of_each


class Block:
    """A kernel as it is written: a function of one pointer, to its arguments (work.py)."""

    def __init__(self, module: ir.Module, processor: Processor, name: str, sizes: Sizes, backward: bool) -> None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        function.attributes.add("nounwind")
        self.emitter = Emitter(function, processor.lanes)
        self.code, self.lanes, self.sizes = self.emitter.code, processor.lanes, sizes
        self.matrices = Matrices(module, processor)
        self._given, self._names = function.args[0], arguments(sizes, backward)
        self._places, self._each = Work(sizes, processor.lanes, backward), of_each(sizes, backward)
        self._arguments: dict[str, ir.Value] = {}
        self._of_stretch: dict[str, ir.Value] = {}
        self._gathered: set[int] = set()

    def argument(self, name: str, kind: ir.Type = POINTER) -> ir.Value:
        """As it was given; looked up once, since LLVM can't tell that nothing writes it."""
        if name not in self._arguments:
            with self.code.goto_entry_block():
                place = self.emitter.at(self._given, self._names.index(name), INTEGER)
                self._arguments[name] = self.emitter.scalar(place, kind)
        return self._arguments[name]

    def of_stretch(self, name: str) -> ir.Value:
        """The stretch's own of an argument that has one for each."""
        return self._of_stretch[name]

    def room(self, name: str) -> ir.Value:
        """Memory of the stretch."""
        return self.emitter.at(self._own, self._places.places[name])

    def _entry(self, name: str, index: ir.Value) -> ir.Value:
        return self.emitter.scalar(self.emitter.at(self.argument(name), index, INTEGER), INTEGER)

    @contextmanager
    def blocks(self) -> Iterator[ir.Value]:
        """For every stretch that no other thread has taken, every step and every block: the number of its rows."""
        e, code = self.emitter, self.code
        count = self.argument("stretches", INTEGER)
        with e.loop(count):
            taken = e.at(self._given, self._names.index("next"), INTEGER)
            stretch = code.atomic_rmw("add", taken, integer(1), "monotonic")
            with code.if_then(code.icmp_signed("<", stretch, count)):
                self._own = e.at(self.argument("work"), e.times(stretch, self._places.size))
                for name in self._each:
                    place = e.at(self.argument(name), stretch, INTEGER)
                    self._of_stretch[name] = e.scalar(place, INTEGER if name == "strides" else POINTER)
                with self._steps(stretch) as (first, last):
                    rows = code.sub(last, first)
                    number = code.sdiv(e.sum(rows, BLOCK - 1), integer(BLOCK))
                    each = code.sdiv(e.sum(rows, number, -1), number)
                    with e.loop(last, first, each) as row:
                        left = code.sub(last, row)
                        self._gathered.clear()
                        count_here = code.select(code.icmp_signed("<", left, each), left, each)
                        self._look_up(row, count_here)
                        yield count_here

    @contextmanager
    def _steps(self, stretch: ir.Value) -> Iterator[tuple[ir.Value, ir.Value]]:
        """For every step of a stretch that has rows in it, the first of them and one past the last."""
        e, code = self.emitter, self.code
        cuts = e.times(stretch, 2)
        first, first_row, last, last_row = (self._entry("cuts", e.sum(cuts, n)) for n in range(4))
        is_cut = code.zext(code.icmp_signed(">", last_row, integer(0)), INTEGER)
        with e.loop(e.sum(last, is_cut), first) as step:
            self._start = self._entry("starts", step)
            links = code.sub(self._entry("starts", e.sum(step, 1)), self._start)
            low = code.select(code.icmp_signed("==", step, first), first_row, integer(0))
            whole = e.times(links, self.argument("batch", INTEGER))
            high = code.select(code.icmp_signed("==", step, last), last_row, whole)
            self.value_class, self._key_class = self._entry("value_class", step), self._entry("key_class", step)
            self.is_cut = code.icmp_signed(">", low, integer(0))
            with code.if_then(code.icmp_signed(">", high, low)):
                self.open_step()
                yield low, high

    def open_step(self) -> None:
        """Before the rows of a step."""

    def matrix(self, number: int, prefix: str = "") -> ir.Value:
        """The step's matrix of a table."""
        table = self.sizes.tables[number]
        own = self._key_class if table.name == "key" else self.value_class
        pointer = self.argument(f"{prefix}table {number}")
        return self.emitter.at(pointer, self.emitter.times(own, self.sizes.table_sizes[number]))

    def _look_up(self, first: ir.Value, count: ir.Value) -> None:
        """Query, key and item of every row."""
        e, code, batch = self.emitter, self.code, self.argument("batch", INTEGER)
        link = e.variable(e.sum(self._start, code.sdiv(first, batch)))
        item = e.variable(code.srem(first, batch))
        with e.loop(count) as row:
            at, own = e.get(link), e.get(item)
            found = {"query": self._entry("query_index", at), "key": self._entry("key_index", at), "item": own}
            for name, value in found.items():
                code.store(value, e.at(self.room(f"{name} of row"), row, INTEGER))
            ends = code.icmp_signed("==", e.sum(own, 1), batch)
            e.set(item, code.select(ends, integer(0), e.sum(own, 1)))
            e.set(link, e.sum(at, code.zext(ends, INTEGER)))

    def token(self, side: str, row: ir.Value, stride: ir.Value) -> ir.Value:
        """Where a row's token is among [N, stride]."""
        e = self.emitter
        token, item = (e.scalar(e.at(self.room(f"{name} of row"), row, INTEGER), INTEGER) for name in (side, "item"))
        return e.sum(e.times(token, stride), item)

    def copy(self, tensor: str, side: str, features: int, out: ir.Value, count: ir.Value) -> None:
        """What the rows' tokens have."""
        e, stride = self.emitter, self.argument("token_batch", INTEGER)
        with e.loop(count) as row:
            own = e.at(self.argument(tensor), e.times(self.token(side, row, stride), features))
            to = e.at(out, e.times(row, padded(features, self.lanes)))
            for n, size in enumerate(pieces(features, self.lanes)):
                e.store(e.load(e.at(own, n * self.lanes), size), e.at(to, n * self.lanes))

    def add_to(self, tensor: str, side: str, features: int, given: ir.Value, count: ir.Value) -> None:
        """Add rows to what the stretch has for their tokens."""
        e, stride = self.emitter, self.of_stretch("strides")
        with e.loop(count) as row:
            own = e.at(self.of_stretch(tensor), e.times(self.token(side, row, stride), features))
            from_row = e.at(given, e.times(row, padded(features, self.lanes)))
            for n, size in enumerate(pieces(features, self.lanes)):
                at = e.at(own, n * self.lanes)
                e.store(self.code.fadd(e.load(at, size), e.load(e.at(from_row, n * self.lanes), size)), at, size)

    def rows(self, number: int, count: ir.Value) -> ir.Value:
        """What the rows' tokens have of a source."""
        source, out = self.sizes.sources[number], self.room(f"rows {number}")
        if number not in self._gathered:
            self._gathered.add(number)
            self.copy(f"source {number}", source.side, source.features, out, count)
        return out

    def encode(self, role: Role, count: ir.Value) -> ir.Value:
        """The features of a role, all heads side by side."""
        e, sizes, out, is_begun = self.emitter, self.sizes, self.room(role.name), role.base is not None
        if role.base is not None:
            self.copy(f"source {role.base}", sizes.sources[role.base].side, sizes.features(role), out, count)
        for number in role.tables:
            table = sizes.tables[number]
            is_full = table.width == role.dim
            rows, to = self.rows(table.source, count), out if is_full else self.room("narrow")
            layout = Layout(
                table.inner, columns := sizes.columns(table), padded(table.inner, self.lanes), columns,
                padded(columns, self.lanes),
            )  # fmt: skip
            adds = is_full and is_begun
            self.code.call(self.matrices.product(layout, adds), [rows, self.matrix(number), to, count])
            if not is_full:
                if not is_begun:
                    with e.loop(count) as row:
                        own = e.at(out, e.times(row, padded(sizes.features(role), self.lanes)))
                        self.clear(own, sizes.features(role))
                for own, other, size in self.placed(role, table, count):
                    e.store(self.code.fadd(e.load(own, size), e.load(other, size)), own, size)
            is_begun = True
        return out

    def placed(self, role: Role, table: Table, count: ir.Value) -> Iterator[tuple[ir.Value, ir.Value, int]]:
        """For every row: a piece of the role's features that belong to a table, its place in ``narrow``, size."""
        e, sizes = self.emitter, self.sizes
        with e.loop(count) as row:
            own = e.at(self.room(role.name), e.times(row, padded(sizes.features(role), self.lanes)))
            other = e.at(self.room("narrow"), e.times(row, padded(sizes.columns(table), self.lanes)))
            for head in range(sizes.heads):
                for n, size in enumerate(pieces(table.width, self.lanes)):
                    at = n * self.lanes
                    yield e.at(own, head * role.dim + table.start + at), e.at(other, head * table.width + at), size

    def dot(self, first: ir.Value, second: ir.Value, head: int, dim: int) -> ir.Value:
        """<first, second> of one head."""
        e, total = self.emitter, None
        for n, size in enumerate(pieces(dim, self.lanes)):
            own, other = (e.load(e.at(rows, head * dim + n * self.lanes), size) for rows in (first, second))
            total = self.code.fmul(own, other) if total is None else e.fma(own, other, total)
        assert total is not None
        return e.total(total)

    def of_row(self, name: str, row: ir.Value, features: int) -> ir.Value:
        """Where a row's features are."""
        return self.emitter.at(self.room(name), self.emitter.times(row, padded(features, self.lanes)))

    def logit(self, row: ir.Value, head: int) -> ir.Value:
        """scale <q, k> + bias."""
        e, sizes, (query, key, _) = self.emitter, self.sizes, self.sizes.roles
        q, k = (self.of_row(role.name, row, sizes.features(role)) for role in (query, key))
        scale = e.scalar(self.argument("scale"))
        bias = e.scalar(e.at(self.argument("bias"), e.sum(e.times(self.value_class, sizes.heads), head)))
        return e.fma(self.dot(q, k, head, query.dim), scale, bias)

    def of_query(self, name: str, row: ir.Value, head: int) -> ir.Value:
        """A number of the row's query, of [Nq, items, H]."""
        e = self.emitter
        at = e.times(self.token("query", row, self.argument("token_batch", INTEGER)), self.sizes.heads)
        return e.scalar(e.at(self.argument(name), e.sum(at, head)))

    def number(self, name: str, row: ir.Value, head: int) -> ir.Value:
        """Where a number of a row and head is."""
        return self.emitter.at(self.room(name), self.emitter.sum(self.emitter.times(row, self.sizes.heads), head))

    def weigh(self, row: ir.Value, head: int) -> None:
        """The logit less m_i, which :meth:`raise_weights` makes p_ij of."""
        found = self.code.fsub(self.logit(row, head), self.of_query("highest", row, head))
        self.code.store(found, self.number("weights", row, head))

    def raise_weights(self, count: ir.Value) -> None:
        """e to their power."""
        e, weights = self.emitter, self.room("weights")
        with e.loop(e.times(count, self.sizes.heads), step=self.lanes) as n:
            e.store(e.exp(e.load(e.at(weights, n))), e.at(weights, n))

    def clear(self, pointer: ir.Value, count: int) -> None:
        """So many numbers to 0."""
        e, whole = self.emitter, count // self.lanes * self.lanes
        with e.loop(whole, step=self.lanes) as n:
            e.store(e.zero(), e.at(pointer, n))
        if count > whole:
            e.store(e.zero(), e.at(pointer, whole), count - whole)
