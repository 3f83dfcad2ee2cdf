"""How the kernel is launched: block sizes per target from a table, tile shapes from the problem, and the call itself.

There is no autotuning: it makes the first call slow, may choose differently in every run, and needs a device.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from typing import Any

import triton
from torch import Tensor

from translution.backends.triton.kernel import fused_forward_kernel

Axes = tuple[int, int, int]

INTERPRETED = not isinstance(fused_forward_kernel, triton.runtime.JITFunction)
MAX_OFFSET = 2**31 - 1
_INTERPRETER = Lock()


@contextmanager
def _launching() -> Iterator[None]:
    """Interpreted launches, one after another: a running kernel swaps functions of ``triton.language``."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder, swap = interpreter.interpreter_builder, "_patch_lang"
    with _INTERPRETER:
        options, swaps = builder.options, getattr(interpreter, swap)
        # Without debug the interpreter computes a 64-bit shadow of every integer operation and throws it away.
        builder.options = replace(options, sanitize_overflow=options.debug and options.sanitize_overflow)
        # It swaps at every call of a function within the kernel, which took a third of the time: once is enough.
        setattr(interpreter, swap, cache(swaps))
        try:
            yield
        finally:
            builder.options = options
            setattr(interpreter, swap, swaps)


@dataclass(frozen=True, slots=True)
class Target:
    """``interpreter``, ``cuda`` with 80, 90, .. or ``hip``."""

    backend: str
    capability: int = 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """``rows`` of a tile, input channels per step, features of queries and keys and of values held at once."""

    rows: int
    channels: int
    features: int
    value_features: int
    warps: int
    stages: int


INTERPRETER = Blocks(rows=128, channels=128, features=128, value_features=128, warps=1, stages=1)
# (at least this capability, item size) -> blocks, first match; measured in tests/triton_ahead_of_time.
CUDA = (
    (90, 2, Blocks(rows=64, channels=64, features=64, value_features=64, warps=8, stages=3)),
    (90, 4, Blocks(rows=32, channels=32, features=32, value_features=32, warps=4, stages=2)),
    (80, 2, Blocks(rows=64, channels=64, features=64, value_features=64, warps=8, stages=3)),
    (80, 4, Blocks(rows=32, channels=32, features=32, value_features=32, warps=4, stages=2)),
    (0, 2, Blocks(rows=32, channels=32, features=32, value_features=32, warps=4, stages=2)),
    (0, 4, Blocks(rows=32, channels=32, features=32, value_features=32, warps=4, stages=2)),
)
HIP = {
    2: Blocks(rows=64, channels=64, features=64, value_features=64, warps=4, stages=2),
    4: Blocks(rows=32, channels=32, features=32, value_features=32, warps=4, stages=2),
}


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

    def flat(self) -> list[int]:
        """The nineteen numbers, as an operator's schema takes them."""
        return [*self.grid, *self.keys, *self.taps, *self.shift, *self.step, *self.stride, self.base]

    @staticmethod
    def of(flat: list[int]) -> "Box":
        """The inverse of :meth:`flat`."""
        a, b, c, d, e, f = ((flat[n], flat[n + 1], flat[n + 2]) for n in range(0, 18, 3))
        return Box(a, b, c, d, e, f, flat[18])

    @property
    def num_queries(self) -> int:
        """Sites of the query grid."""
        return math.prod(self.grid)


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


def current_target() -> Target:
    """The target that triton would compile for."""
    if INTERPRETED:
        return Target("interpreter")
    found: Any = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch if isinstance(found.arch, int) else 0)


def blocks_for(target: Target, item_size: int) -> Blocks:
    """The launcher table."""
    if target.backend == "interpreter":
        return INTERPRETER
    if target.backend == "hip":
        return HIP[item_size]
    return next(blocks for least, size, blocks in CUDA if target.capability >= least and size == item_size)


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def tile_for(rows: int, batch: int, grid: Axes, item_elements: int) -> tuple[int, int, int, int]:
    """TZ, TY, TX and batch items of a tile of ``rows`` rows: batch first, since its rows share every displacement.

    ``item_elements`` bounds what one batch item spans in any operand, so that offsets within a tile fit in 32 bits.
    """
    items = min(power_of_two(batch), rows)
    while items > 1 and items * item_elements > MAX_OFFSET:
        items //= 2
    extents, sites = [power_of_two(n) for n in grid], [1, 1, 1]
    while items * math.prod(sites) < rows:
        # The shortest side grows, the last axis first: a compact tile needs the fewest displacements.
        open_axes = [axis for axis in (2, 1, 0) if sites[axis] < extents[axis]]
        axis = min(open_axes, key=lambda a: sites[a]) if open_axes else 2
        sites[axis] *= 2
    return sites[0], sites[1], sites[2], items


def interpreter_rows(operands: Operands) -> int:
    """Rows that cover a small problem with one tile, since the interpreter's time is per program and step."""
    covering = power_of_two(operands.batch) * math.prod(power_of_two(n) for n in operands.box.grid)
    return min(max(covering, 16), INTERPRETER.rows)


def rows_of(tokens: Tensor | None) -> int:
    """The stride of the batch axis; the others are dense."""
    return 0 if tokens is None else tokens.stride(0)


def launch(
    operands: Operands,
    out_static: Tensor,
    out_relative: Tensor,
    highest: Tensor,
    total: Tensor,
    target: Target | None = None,
    blocks: Blocks | None = None,
) -> None:
    """Fill out_static [B, N, H, V], out_relative [B, N, H, W] and, with ``normalise``, highest and total [B, N, H].

    All are float32; concurrent interpreted launches run one after another.
    Raises ValueError where a batch item of an operand is not dense.
    """
    o, box = operands, operands.box
    tables = [t for t in (o.q_table, o.k_table, o.v_table) if t is not None]
    item_size = tables[0].element_size() if tables else 4
    chosen = blocks or blocks_for(target or current_target(), item_size)
    rows = interpreter_rows(o) if blocks is None and INTERPRETED else chosen.rows
    for tensor in (*_tokens(o), *tables):
        if len(tensor) and not tensor[0].is_contiguous():  # a layout without links has tables without rows
            raise ValueError(f"an operand of shape {tuple(tensor.shape)} has strides {tensor.stride()}")
    spans = [max(t.stride(0), t.shape[1] * t.stride(1)) for t in _tokens(o)]
    spans += [box.num_queries * o.num_heads * n for n in (o.value_width, o.static_width, 1)]
    tz, ty, tx, items = tile_for(rows, o.batch, box.grid, max(spans))
    plain = 0 if o.q_plain is None else o.q_plain.shape[-1]
    inner = [0 if t is None else t.shape[1] for t in (o.q_table, o.k_table, o.v_table)]
    columns = [0 if t is None else t.shape[2] for t in (o.q_table, o.k_table, o.v_table)]
    least = 1 if INTERPRETED else 16  # what one product of tiles takes
    static_block = min(chosen.value_features, power_of_two(o.static_width, least))
    value_block = min(chosen.value_features, power_of_two(o.value_width, least))
    chunks = max(-(-o.static_width // static_block), -(-o.value_width // value_block))
    anything = out_static if o.static_width else out_relative

    def held(tensor: Tensor | None) -> Tensor:
        return anything if tensor is None else tensor  # what is absent is never read

    mask_strides = (0, 0, 0, 0) if o.mask is None else o.mask.stride()
    programs = math.prod(-(-n // t) for n, t in zip(box.grid, (tz, ty, tx), strict=True))
    programs *= -(-o.batch // items) * chunks * o.num_heads
    kernel: Any = fused_forward_kernel
    with _launching():
        kernel[(programs,)](
            held(o.q_tokens), held(o.q_table), held(o.q_static), held(o.q_plain),
            held(o.k_tokens), held(o.k_table), held(o.k_static), held(o.k_plain),
            held(o.v_tokens), held(o.v_table), held(o.v_static), held(o.bias), held(o.mask),
            out_static, out_relative, highest, total,
            rows_of(o.q_tokens), rows_of(o.q_static), rows_of(o.q_plain),
            rows_of(o.k_tokens), rows_of(o.k_static), rows_of(o.k_plain),
            rows_of(o.v_tokens), rows_of(o.v_static),
            *mask_strides,
            o.batch, 0 if o.bias is None else o.bias.shape[1], box.base,
            *box.grid, *box.keys, *box.taps, *box.shift, *box.step, *box.stride,
            o.scale,
            HEADS=o.num_heads,
            Q_INNER=inner[0], K_INNER=inner[1], V_INNER=inner[2],
            Q_COLUMNS=columns[0], K_COLUMNS=columns[1], V_COLUMNS=columns[2],
            V_HEAD=0 if o.value_shared else o.value_width,
            PLAIN=plain, WIDTH=o.width, V_STATIC=o.static_width, V_WIDTH=o.value_width,
            HAS_Q_STATIC=o.q_static is not None, HAS_K_STATIC=o.k_static is not None, HAS_BIAS=o.bias is not None,
            MASK=0 if o.mask is None else 2 if o.mask.is_floating_point() else 1,
            NORMALISE=o.normalise,
            UPCAST=INTERPRETED,
            TZ=tz, TY=ty, TX=tx, BB=items,
            BQ=min(chosen.channels, power_of_two(max(inner[:2]), least)),
            BK=min(chosen.channels, power_of_two(inner[2], least)),
            BP=min(chosen.features, power_of_two(plain, least)),
            BW=min(chosen.features, power_of_two(o.width, least)),
            BS=static_block, BV=value_block, V_CHUNKS=chunks,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip


def _tokens(o: Operands) -> list[Tensor]:
    every = (o.q_tokens, o.q_static, o.q_plain, o.k_tokens, o.k_static, o.k_plain, o.v_tokens, o.v_static)
    return [t for t in every if t is not None]
