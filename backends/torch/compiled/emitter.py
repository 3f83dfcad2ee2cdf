"""What kernels are written in: LLVM's intermediate code, with loops and vectors of any number of lanes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

INTEGER, NUMBER, POINTER = ir.IntType(64), ir.FloatType(), ir.PointerType()
# Sums of several numbers may be made in any order.
_ANY_ORDER = ("reassoc",)


def integer(value: int) -> ir.Constant:
    """A constant."""
    return ir.Constant(INTEGER, value)


def number(value: float) -> ir.Constant:
    """A constant."""
    return ir.Constant(NUMBER, value)


def pieces(count: int, lanes: int) -> list[int]:
    """``count`` numbers in vectors of ``lanes``, and what is left."""
    return [lanes] * (count // lanes) + [count % lanes] * (count % lanes > 0)


class Emitter:
    """Code of one function.

    Args:
        function: without code yet.
        lanes: of a vector register.
    """

    def __init__(self, function: ir.Function, lanes: int) -> None:
        self.module, self.lanes = function.module, lanes
        self.vector = ir.VectorType(NUMBER, lanes)
        # llvmlite says nothing of its types.
        self.code: Any = ir.IRBuilder(function.append_basic_block("entry"))

    def _intrinsic(self, name: str, result: ir.Type, *arguments: ir.Type) -> ir.Function:
        found = self.module.globals.get(name)
        return ir.Function(self.module, ir.FunctionType(result, arguments), name) if found is None else found

    def variable(self, start: Any) -> ir.Value:
        """A place for values of the type of ``start``."""
        with self.code.goto_entry_block():
            place = self.code.alloca(start.type)
        self.code.store(start, place)
        return place

    def get(self, variable: Any) -> ir.Value:
        """What was last set."""
        return self.code.load(variable, typ=variable.allocated_type)

    def set(self, variable: ir.Value, value: ir.Value) -> None:
        """Set it."""
        self.code.store(value, variable)

    @contextmanager
    def loop(self, stop: ir.Value | int, start: ir.Value | int = 0, step: ir.Value | int = 1) -> Iterator[ir.Value]:
        """For every index from ``start`` to before ``stop``."""
        start, stop, step = (integer(v) if isinstance(v, int) else v for v in (start, stop, step))
        index = self.variable(start)
        code = self.code
        head, body, end = (code.append_basic_block(name) for name in ("head", "body", "end"))
        code.branch(head)
        code.position_at_end(head)
        value = self.get(index)
        code.cbranch(code.icmp_signed("<", value, stop), body, end)
        code.position_at_end(body)
        yield value
        self.set(index, code.add(value, step))
        code.branch(head)
        code.position_at_end(end)

    def at(self, pointer: ir.Value, index: ir.Value | int, kind: ir.Type = NUMBER) -> ir.Value:
        """Pointer to element ``index``."""
        index = integer(index) if isinstance(index, int) else index
        return self.code.gep(pointer, [index], inbounds=True, source_etype=kind)

    def sum(self, *values: ir.Value | int) -> ir.Value:
        """Of integers."""
        total, *rest = (integer(v) if isinstance(v, int) else v for v in values)
        for value in rest:
            total = self.code.add(total, value)
        return total

    def times(self, first: ir.Value, second: ir.Value | int) -> ir.Value:
        """Of integers."""
        return self.code.mul(first, integer(second) if isinstance(second, int) else second)

    def scalar(self, pointer: ir.Value, kind: ir.Type = NUMBER) -> ir.Value:
        """What is there."""
        return self.code.load(pointer, typ=kind)

    def load(self, pointer: ir.Value, count: int | None = None) -> ir.Value:
        """A vector; of fewer numbers than it has lanes, the rest 0."""
        count = self.lanes if count is None else count
        kind = ir.VectorType(NUMBER, count)
        found = self.code.load(pointer, align=4, typ=kind)
        if count == self.lanes:
            return found
        order = [min(count, n) for n in range(self.lanes)]
        return self.code.shuffle_vector(found, ir.Constant(kind, [0.0] * count), _order(order))

    def store(self, value: ir.Value, pointer: ir.Value, count: int | None = None) -> None:
        """Write a vector, or the first ``count`` of it."""
        if count is not None and count < self.lanes:
            value = self.code.shuffle_vector(value, value, _order(range(count)))
        self.code.store(value, pointer, align=4)

    def splat(self, value: ir.Value) -> ir.Value:
        """The number in all lanes."""
        first = self.code.insert_element(ir.Constant(self.vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.code.shuffle_vector(first, first, _order([0] * self.lanes))

    def constant(self, value: float) -> ir.Constant:
        """The number in all lanes."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def zero(self) -> ir.Constant:
        """0 in all lanes."""
        return self.constant(0.0)

    def fma(self, first: Any, second: ir.Value, third: ir.Value) -> ir.Value:
        """first second + third."""
        kind = first.type
        name = f"llvm.fma.v{self.lanes}f32" if kind == self.vector else "llvm.fma.f32"
        return self.code.call(self._intrinsic(name, kind, kind, kind, kind), [first, second, third])

    def total(self, value: ir.Value) -> ir.Value:
        """The sum of all lanes."""
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        reduce = self._intrinsic(name, NUMBER, NUMBER, self.vector)
        return self.code.call(reduce, [number(0.0), value], fastmath=_ANY_ORDER)

    def fetch(self, pointer: ir.Value) -> None:
        """Have what is there brought nearer."""
        flag = ir.IntType(32)
        name = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), POINTER, flag, flag, flag)
        self.code.call(name, [pointer, *(ir.Constant(flag, value) for value in (0, 2, 1))])

    def shuffle(self, first: ir.Value, second: ir.Value, order: Sequence[int]) -> ir.Value:
        """Lanes of both, those of the second counted on."""
        return self.code.shuffle_vector(first, second, _order(order))

    def exp(self, value: ir.Value) -> ir.Value:
        """e to the power of a vector, within two units in the last place; subnormal results are 0.

        x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series up to r^7, whose rest is below 2^-26 of it.
        """
        code, whole = self.code, ir.VectorType(ir.IntType(32), self.lanes)
        n = self._rounded(code.fmul(value, self.constant(1.4426950408889634)))
        r = self.fma(n, self.constant(-0.693359375), value)
        r = self.fma(n, self.constant(2.12194440054690583e-4), r)
        series = self.constant(1 / 5040)
        for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
            series = self.fma(series, r, self.constant(coefficient))
        # Two factors: 2^n itself has no place where the result still has one.
        limited = self._least(self._most(n, self.constant(-254.0)), self.constant(254.0))
        power = code.fptosi(limited, whole)
        half = code.ashr(power, ir.Constant(whole, [1] * self.lanes))
        for part in (half, code.sub(power, half)):
            bits = code.shl(
                code.add(part, ir.Constant(whole, [127] * self.lanes)), ir.Constant(whole, [23] * self.lanes)
            )
            series = code.fmul(series, code.bitcast(bits, self.vector))
        tiny = code.fcmp_ordered("<", value, self.constant(-87.33654))
        found = code.select(tiny, self.zero(), series)
        huge = code.fcmp_ordered(">", value, self.constant(88.72284))
        found = code.select(huge, self.constant(float("inf")), found)
        return code.select(code.fcmp_unordered("uno", value, value), value, found)

    def _rounded(self, value: ir.Value) -> ir.Value:
        return self.code.call(self._intrinsic(f"llvm.rint.v{self.lanes}f32", self.vector, self.vector), [value])

    def _least(self, first: ir.Value, second: ir.Value) -> ir.Value:
        return self.code.select(self.code.fcmp_ordered("<", first, second), first, second)

    def _most(self, first: ir.Value, second: ir.Value) -> ir.Value:
        return self.code.select(self.code.fcmp_ordered(">", first, second), first, second)


def _order(lanes: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
