"""What the kernels share: tiles of lattice sites, the taps a tile needs, features of a token at one displacement.

A tile holds TZ x TY x TX sites of the grid that owns the result times BB batch items, batch fastest. Along an axis
owner a meets partner ``a * stride + shift - t * step`` at tap t.
"""

# triton compiles these functions from their source: only constexpr is an annotation to it, and it knows which branches
# of a constexpr condition go together.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl


@triton.jit
def first_of_tile(pid, batch, grid_z, grid_y, grid_x, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
                  BB: tl.constexpr):  # fmt: skip
    """The first site and batch item of a program's tile, and what is left of its number."""
    tiles_x = (grid_x + TX - 1) // TX
    tiles_y = (grid_y + TY - 1) // TY
    tiles_z = (grid_z + TZ - 1) // TZ
    blocks = (batch + BB - 1) // BB
    first_x = (pid % tiles_x) * TX
    pid = pid // tiles_x
    first_y = (pid % tiles_y) * TY
    pid = pid // tiles_y
    first_z = (pid % tiles_z) * TZ
    pid = pid // tiles_z
    return first_z, first_y, first_x, (pid % blocks) * BB, pid // blocks


@triton.jit
def taps_of_axis(first, grid, partners, taps, shift, step, stride, TILE: tl.constexpr):
    """The first tap that some row of the tile needs, and the first one after; no negative number is ever divided."""
    low = (tl.maximum(first * stride + shift - partners + 1, 0) + step - 1) // step
    last = (tl.minimum(first + TILE, grid) - 1) * stride + shift
    return low, tl.minimum((tl.maximum(last, -step) + step) // step, taps)


@triton.jit
def columns_of(rows, present, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers ``cols`` [1, BLOCK] of the rows that ``rows`` [ROWS, 1] point at; 0 where no row or column is."""
    if WIDTH % BLOCK == 0:
        found = tl.load(rows + cols, mask=present, other=0.0)
    else:
        found = tl.load(rows + cols, mask=present & (cols < WIDTH), other=0.0)
    return found


@triton.jit
def project(acc, rows, present, table, cols, across, down, stride: tl.constexpr, INNER: tl.constexpr,
            WIDTH: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """``acc + tokens @ table[:, cols]`` over INNER channels; ``across`` [1, BK] and ``down`` [BK, 1] are the first."""
    for c in range(0, INNER, BK):
        x = columns_of(rows, present, c + across, INNER, BK)
        if INNER % BK == 0 and WIDTH % BLOCK == 0:
            w = tl.load(table + ((c + down) * stride + cols))
        else:
            inside = (c + down < INNER) & (cols < WIDTH)
            w = tl.load(table + ((c + down) * stride + cols), mask=inside, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def encoded(static, tokens, table, present, cols, across, down, ROWS: tl.constexpr, HAS_STATIC: tl.constexpr,
            stride: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """``static[:, cols] + tokens @ table[:, cols]`` [ROWS, BLOCK]; both point at rows, [ROWS, 1]."""
    found = columns_of(static, present, cols, WIDTH, BLOCK) if HAS_STATIC else tl.full([ROWS, BLOCK], 0.0, tl.float32)
    if INNER > 0:
        found = project(found, tokens, present, table, cols, across, down, stride, INNER, WIDTH, BK, BLOCK, UPCAST)
    return found


@triton.jit
def inner_products(
    q_static, q_tokens, q_table, q_plain, k_static, k_tokens, k_table, k_plain, inside, live, plain_cols, width_cols,
    across, down,
    ROWS: tl.constexpr, HAS_Q_STATIC: tl.constexpr, HAS_K_STATIC: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, Q_INNER: tl.constexpr, K_INNER: tl.constexpr,
    PLAIN: tl.constexpr, WIDTH: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """<query, key> [ROWS] of the rows' pairs at one displacement; all but the tables point at rows, [ROWS, 1]."""
    found = tl.full([ROWS], 0.0, tl.float32)
    if PLAIN > 0:
        cols = plain_cols
        for _ in range(0, PLAIN, BP):
            q = columns_of(q_plain, inside, cols, PLAIN, BP)
            k = columns_of(k_plain, live, cols, PLAIN, BP)
            found += tl.sum(q * k, axis=1)
            if BP < PLAIN:
                cols += BP
    if WIDTH > 0:
        cols = width_cols
        for _ in range(0, WIDTH, BW):
            q = encoded(q_static, q_tokens, q_table, inside, cols, across, down, ROWS, HAS_Q_STATIC, Q_COLUMNS, Q_INNER,
                        WIDTH, BQ, BW, UPCAST)  # fmt: skip
            k = encoded(k_static, k_tokens, k_table, live, cols, across, down, ROWS, HAS_K_STATIC, K_COLUMNS, K_INNER,
                        WIDTH, BQ, BW, UPCAST)  # fmt: skip
            found += tl.sum(q * k, axis=1)
            if BW < WIDTH:
                cols += BW
    return found
