"""What the kernels read: operands and the lattice on three axes, and how both are passed."""

import math
from dataclasses import dataclass

from torch import Tensor

from translution.backends.triton.targets import Axes


@dataclass(frozen=True, slots=True)
class Box:
    """The lattice on three axes: at tap t < ``taps`` query a meets key ``a * stride + shift - t * step``."""

    grid: Axes
    keys: Axes
    taps: Axes
    shift: Axes
    step: Axes
    stride: Axes
    base: int

    def axes(self) -> list[int]:
        """Grid, keys, taps, shift, step and stride, as the kernels take them."""
        return [*self.grid, *self.keys, *self.taps, *self.shift, *self.step, *self.stride]

    def mirrored(self) -> list[int]:
        """:meth:`axes` as keys see them, at taps counted from the last: ``b + shift' - u * step`` is the stride times
        the query; the strides come last.
        """
        shift = [(taps - 1) * step - shift for taps, step, shift in zip(self.taps, self.step, self.shift, strict=True)]
        return [*self.keys, *self.grid, *self.taps, *shift, *self.step, 1, 1, 1, *self.stride]

    def flat(self) -> list[int]:
        """The nineteen numbers, as an operator's schema takes them."""
        return [*self.axes(), self.base]

    @staticmethod
    def of(flat: list[int]) -> "Box":
        """The inverse of :meth:`flat`."""
        a, b, c, d, e, f = ((flat[n], flat[n + 1], flat[n + 2]) for n in range(0, 18, 3))
        return Box(a, b, c, d, e, f, flat[18])

    @property
    def num_queries(self) -> int:
        """Sites of the query grid."""
        return math.prod(self.grid)

    @property
    def num_keys(self) -> int:
        """Sites of the key grid."""
        return math.prod(self.keys)

    @property
    def num_axes(self) -> int:
        """Axes from the first on where a query may miss its key, or there are several."""

        def trivial(axis: int) -> bool:
            return (self.grid[axis], self.keys[axis], self.taps[axis], self.shift[axis]) == (1, 1, 1, 0)

        return next((3 - axis for axis in range(2) if not trivial(axis)), 1)

    @property
    def num_classes(self) -> int:
        """Rows of a table that are displacements."""
        return max(math.prod(self.taps) - self.base, 0)


@dataclass(frozen=True, slots=True)
class Operands:
    """What the kernel reads: tokens [B, N, R], their tables [T, R, E]; static and plain parts [B, N, H, D] in float32.

    ``width`` features of a head are those of q_tokens q_table + q_static, likewise for k; the plain ones beside them
    come from no table. ``value_width`` columns of the value table belong to a head, the same ones to every head where
    ``value_shared``. bias is float32 [H, T]; mask is bool or float32 [B, H, N, M], with any strides.
    """

    q_tokens: Tensor | None
    q_table: Tensor | None
    q_static: Tensor | None
    q_plain: Tensor | None
    k_tokens: Tensor | None
    k_table: Tensor | None
    k_static: Tensor | None
    k_plain: Tensor | None
    v_tokens: Tensor | None
    v_table: Tensor | None
    v_static: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    box: Box
    num_heads: int
    width: int
    value_width: int
    value_shared: bool
    scale: float
    normalise: bool

    @property
    def batch(self) -> int:
        """Batch items."""
        found = self.v_tokens if self.v_tokens is not None else self.v_static
        assert found is not None
        return found.shape[0]

    @property
    def static_width(self) -> int:
        """Features of a head's static values."""
        return 0 if self.v_static is None else self.v_static.shape[-1]

    @property
    def plain_width(self) -> int:
        """Features of a head's plain queries and keys."""
        return 0 if self.q_plain is None else self.q_plain.shape[-1]

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of queries, keys and values."""
        return self.q_table, self.k_table, self.v_table

    @property
    def item_size(self) -> int:
        """Bytes of a number of the tables; float32 where there is none."""
        return next((t.element_size() for t in self.tables if t is not None), 4)

    @property
    def tokens(self) -> list[Tensor]:
        """Every operand with a batch axis but the mask."""
        every = (self.q_tokens, self.q_static, self.q_plain, self.k_tokens, self.k_static, self.k_plain, self.v_tokens,
                 self.v_static)  # fmt: skip
        return [t for t in every if t is not None]

    @property
    def item_span(self) -> int:
        """Elements that one batch item spans at most, in any operand or result of queries."""
        rows = self.box.num_queries * self.num_heads * max(self.value_width, self.static_width, 1)
        return max(rows, *(span_of(t) for t in self.tokens))

    @property
    def mask_strides(self) -> tuple[int, int, int, int]:
        """Zeros where there is none."""
        if self.mask is None:
            return 0, 0, 0, 0
        a, b, c, d = self.mask.stride()
        return a, b, c, d

    @property
    def mask_kind(self) -> int:
        """0 none, 1 bool, 2 float."""
        return 0 if self.mask is None else 2 if self.mask.is_floating_point() else 1

    def check_dense(self) -> None:
        """ValueError where a batch item or a table is not dense."""
        for tensor in (*self.tokens, *(t for t in self.tables if t is not None)):
            if len(tensor) and not tensor[0].is_contiguous():  # a layout without links has tables without rows
                raise ValueError(f"an operand of shape {tuple(tensor.shape)} has strides {tensor.stride()}")


def held(tensor: Tensor | None, absent: Tensor) -> Tensor:
    """What is absent is never read."""
    return absent if tensor is None else tensor


def rows_of(tokens: Tensor | None) -> int:
    """The stride of the batch axis; the others are dense."""
    return 0 if tokens is None else tokens.stride(0)


def span_of(tokens: Tensor) -> int:
    """Elements that a batch item spans."""
    return max(tokens.stride(0), tokens.shape[1] * tokens.stride(1))
