"""Products of few rows with one matrix after another, as functions of a module.

A tile of the result stays in registers while its sums are made. Of the matrix a panel of two vectors' width is read
from end to end, which the first-level cache holds for the rows that follow; meanwhile the next panel is fetched.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from translution.backends.torch.compiled.emitter import INTEGER, POINTER, Emitter, integer, pieces
from translution.backends.torch.compiled.processor import Processor

# Vectors side by side in a tile.
WIDE = 2
# Steps of a sum that are written one after another.
UNROLLED = 4


def tile_rows(processor: Processor) -> int:
    """Rows of a tile: beside vectors of the matrix and a number of the rows in each lane, as many as registers hold."""
    return (processor.registers - WIDE - 2) // WIDE & ~1 if processor.registers < 32 else 12


@dataclass(frozen=True, slots=True)
class Layout:
    """``depth`` numbers of each row times a matrix [depth, width]; strides are from one row to the next."""

    depth: int
    width: int
    rows_stride: int
    matrix_stride: int
    out_stride: int

    @property
    def name(self) -> str:
        """Tells it from all others."""
        return "_".join(str(getattr(self, name)) for name in self.__slots__)


class Matrices:
    """The products of a module, each made when it is first asked for."""

    def __init__(self, module: ir.Module, processor: Processor) -> None:
        self.module, self._processor, self._tall = module, processor, tile_rows(processor)

    def _function(self, name: str, *arguments: ir.Type) -> tuple[ir.Function, Emitter | None]:
        found = self.module.globals.get(name)
        if found is not None:
            return found, None
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), name)
        function.linkage = "internal"
        function.attributes.add("nounwind")
        for argument in function.args:
            if argument.type == POINTER:
                argument.add_attribute("noalias")
        return function, Emitter(function, self._processor.lanes)

    def _tile(
        self,
        emitter: Emitter,
        layout: Layout,
        rows: int,
        counts: Sequence[int],
        pointers: Sequence[ir.Value],
        adds: bool,
    ) -> None:
        """out (+)= rows matrix, for as many rows and vectors of ``counts`` numbers."""
        given, matrix, out = pointers
        lanes = emitter.lanes
        sums = [[emitter.variable(emitter.zero()) for _ in counts] for _ in range(rows)]

        def step(k: ir.Value | int) -> None:
            at = emitter.at(matrix, emitter.times(integer(k) if isinstance(k, int) else k, layout.matrix_stride))
            vectors = [emitter.load(emitter.at(at, n * lanes), count) for n, count in enumerate(counts)]
            for n in range(len(counts)):
                emitter.fetch(emitter.at(at, (WIDE + n) * lanes))
            for row, own in enumerate(sums):
                factor = emitter.splat(emitter.scalar(emitter.at(given, emitter.sum(k, row * layout.rows_stride))))
                for place, vector in zip(own, vectors, strict=True):
                    emitter.set(place, emitter.fma(factor, vector, emitter.get(place)))

        whole = layout.depth // UNROLLED * UNROLLED
        with emitter.loop(whole, step=UNROLLED) as k:
            for n in range(UNROLLED):
                step(emitter.sum(k, n))
        for k in range(whole, layout.depth):
            step(k)
        for row, own in enumerate(sums):
            for n, (place, count) in enumerate(zip(own, counts, strict=True)):
                at = emitter.at(out, row * layout.out_stride + n * lanes)
                found = emitter.get(place)
                if adds:
                    found = emitter.code.fadd(found, emitter.load(at, count))
                emitter.store(found, at, count)

    def _tile_function(self, layout: Layout, rows: int, counts: Sequence[int], adds: bool) -> ir.Function:
        name = f"tile_{rows}_{'_'.join(map(str, counts))}_of_{layout.name}_{'adds' if adds else 'sets'}"
        function, emitter = self._function(name, POINTER, POINTER, POINTER)
        if emitter is not None:
            self._tile(emitter, layout, rows, counts, function.args, adds)
            emitter.code.ret_void()
        return function

    def product(self, layout: Layout, adds: bool = False) -> ir.Function:
        """(rows, matrix, out, count): out (+)= rows matrix. An odd number of rows is taken as one more."""
        name = f"product_{layout.name}_{'adds' if adds else 'sets'}"
        function, emitter = self._function(name, POINTER, POINTER, POINTER, INTEGER)
        if emitter is None:
            return function
        given, matrix, out, count = function.args
        code, lanes = emitter.code, emitter.lanes
        tiles = code.udiv(emitter.sum(count, self._tall - 1), integer(self._tall))
        for first, last, counts in _panels(layout.width, lanes):
            with emitter.loop(last, first) as panel:
                start = emitter.times(panel, WIDE * lanes)
                row = emitter.variable(integer(0))
                with emitter.loop(tiles) as tile:
                    at = emitter.get(row)
                    left, to_go = code.sub(count, at), code.sub(tiles, tile)
                    each = code.sdiv(emitter.sum(left, to_go, -1), to_go)
                    pairs = code.ashr(emitter.sum(each, 1), integer(1))
                    pointers = (
                        emitter.at(given, emitter.times(at, layout.rows_stride)),
                        emitter.at(matrix, start),
                        emitter.at(out, emitter.sum(emitter.times(at, layout.out_stride), start)),
                    )
                    after = code.append_basic_block("after")
                    choice = code.switch(pairs, after)
                    for rows in range(2, self._tall + 1, 2):
                        block = code.append_basic_block(f"rows{rows}")
                        choice.add_case(integer(rows // 2), block)
                        code.position_at_end(block)
                        code.call(self._tile_function(layout, rows, counts, adds), pointers)
                        code.branch(after)
                    code.position_at_end(after)
                    emitter.set(row, emitter.sum(at, emitter.times(pairs, 2)))
        code.ret_void()
        return function

    def outer(self, layout: Layout) -> ir.Function:
        """(rows, other, out, count): out [depth, width] += rows^T other, over ``count`` rows of both.

        ``matrix_stride`` is that of ``other``.
        """
        function, emitter = self._function(f"outer_{layout.name}", POINTER, POINTER, POINTER, INTEGER)
        if emitter is None:
            return function
        given, other, out, count = function.args
        lanes = emitter.lanes
        heights = pieces(layout.depth, self._tall)
        full = layout.depth // self._tall
        tiles = [(0, full, self._tall)] * (full > 0) + [(full, full + 1, heights[-1])] * (len(heights) > full)
        for first, last, counts in _panels(layout.width, lanes):
            with emitter.loop(last, first) as panel:
                start = emitter.times(panel, WIDE * lanes)
                for first_tile, last_tile, height in tiles:
                    with emitter.loop(last_tile, first_tile) as tile:
                        k = emitter.times(tile, self._tall)
                        to = emitter.at(out, emitter.sum(emitter.times(k, layout.out_stride), start))
                        own_pointers = emitter.at(given, k), emitter.at(other, start), to
                        _outer_tile(emitter, layout, height, counts, own_pointers, count)
        emitter.code.ret_void()
        return function

    def turned(self, rows: int, columns: int, out_stride: int) -> ir.Function:
        """(matrix, out): out [columns, rows] is the matrix [rows, columns] turned, its rows ``out_stride`` apart."""
        function, emitter = self._function(f"turned_{rows}_{columns}_{out_stride}", POINTER, POINTER)
        if emitter is None:
            return function
        matrix, out = function.args
        lanes, code = emitter.lanes, emitter.code
        full_rows, full_columns = rows // lanes * lanes, columns // lanes * lanes
        if full_rows and full_columns:
            with emitter.loop(full_rows, step=lanes) as r, emitter.loop(full_columns, step=lanes) as c:
                vectors = [
                    emitter.load(emitter.at(matrix, emitter.sum(emitter.times(emitter.sum(r, n), columns), c)))
                    for n in range(lanes)
                ]
                for n, vector in enumerate(_turned(emitter, vectors)):
                    emitter.store(vector, emitter.at(out, emitter.sum(emitter.times(emitter.sum(c, n), out_stride), r)))
        for first_row, last_row, first_column in ((0, full_rows, full_columns), (full_rows, rows, 0)):
            with emitter.loop(last_row, first_row) as r, emitter.loop(columns, first_column) as c:
                found = emitter.scalar(emitter.at(matrix, emitter.sum(emitter.times(r, columns), c)))
                code.store(found, emitter.at(out, emitter.sum(emitter.times(c, out_stride), r)))
        code.ret_void()
        return function


def _panels(width: int, lanes: int) -> list[tuple[int, int, list[int]]]:
    """Number of the first panel and of the one after the last that the same code serves, and their vectors."""
    every = pieces(width, lanes)
    panels = [every[n : n + WIDE] for n in range(0, len(every), WIDE)]
    equal = width // (WIDE * lanes)
    return [(0, equal, panels[0])] * (equal > 0) + [(n, n + 1, panels[n]) for n in range(equal, len(panels))]


def _outer_tile(
    emitter: Emitter,
    layout: Layout,
    height: int,
    counts: Sequence[int],
    pointers: tuple[ir.Value, ir.Value, ir.Value],
    count: ir.Value,
) -> None:
    """out += given^T other, for ``height`` rows of the result."""
    (given, other, out), lanes = pointers, emitter.lanes
    places = [
        [emitter.at(out, row * layout.out_stride + n * lanes) for n in range(len(counts))] for row in range(height)
    ]
    sums = [
        [emitter.variable(emitter.load(place, size)) for place, size in zip(row, counts, strict=True)] for row in places
    ]
    with emitter.loop(count) as r:
        at = emitter.at(other, emitter.times(r, layout.matrix_stride))
        vectors = [emitter.load(emitter.at(at, n * lanes), size) for n, size in enumerate(counts)]
        own = emitter.at(given, emitter.times(r, layout.rows_stride))
        for row in range(height):
            factor = emitter.splat(emitter.scalar(emitter.at(own, row)))
            for place, vector in zip(sums[row], vectors, strict=True):
                emitter.set(place, emitter.fma(factor, vector, emitter.get(place)))
    for row in range(height):
        for place, total, size in zip(places[row], sums[row], counts, strict=True):
            emitter.store(emitter.get(total), place, size)


def _turned(emitter: Emitter, vectors: Sequence[ir.Value]) -> list[ir.Value]:
    """As many vectors as they have lanes, rows as columns: halves of blocks change places, block size by block size."""
    lanes, found = emitter.lanes, list(vectors)
    block = lanes // 2
    while block:
        low = [n if n // block % 2 == 0 else lanes + n - block for n in range(lanes)]
        high = [n + block if n // block % 2 == 0 else lanes + n for n in range(lanes)]
        for n in range(lanes):
            if n // block % 2 == 0:
                first, second = found[n], found[n + block]
                found[n] = emitter.shuffle(first, second, low)
                found[n + block] = emitter.shuffle(first, second, high)
        block //= 2
    return found
