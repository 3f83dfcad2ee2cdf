"""The fused forward kernel: one block of queries and one head per program, a loop over displacements, online softmax.

A tile holds TZ x TY x TX lattice sites times BB batch items, batch fastest. At one displacement every row of the tile
has at most one key and all rows share the table row, so that queries, keys and values are products of a tile with one
matrix and live in registers only. Along an axis query a meets key ``a * stride + shift - t * step`` at tap t; the taps
ascend with the displacement. Grid class f (lexicographic) reads row ``f - base`` of the query, value and bias tables
and row ``last - f`` of the key table, which is the class of -delta (clause L3); ``base`` is the first class of a
raster-causal layout (clause L4), else 0.
"""

# triton compiles these functions from their source: only constexpr is an annotation to it, and it knows which branches
# of a constexpr condition go together.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from translution.backends.triton.tiles import columns_of, first_of_tile, inner_products, project, taps_of_axis


@triton.jit
def fused_forward_kernel(
    # Tokens [B, N, R] times tables [T, R, E]; static [B, N, H, D] joins the product, plain [B, N, H, A] is beside it.
    q_tokens, q_table, q_static, q_plain,
    k_tokens, k_table, k_static, k_plain,
    v_tokens, v_table, v_static,
    bias,  # [H, T]
    mask,  # [B, H, N, M] by its strides
    out_static, out_relative, out_highest, out_total,  # [B, N, H, V], [B, N, H, W], twice [B, N, H]
    q_tokens_batch, q_static_batch, q_plain_batch,
    k_tokens_batch, k_static_batch, k_plain_batch,
    v_tokens_batch, v_static_batch,
    mask_batch, mask_head, mask_query, mask_key,
    batch, num_classes, base,
    grid_z, grid_y, grid_x,
    keys_z, keys_y, keys_x,
    taps_z, taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,
    scale,
    HEADS: tl.constexpr,
    Q_INNER: tl.constexpr, K_INNER: tl.constexpr, V_INNER: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr,
    V_HEAD: tl.constexpr,  # columns from one head's matrix to the next; 0 where all heads share it
    PLAIN: tl.constexpr, WIDTH: tl.constexpr, V_STATIC: tl.constexpr, V_WIDTH: tl.constexpr,
    HAS_Q_STATIC: tl.constexpr, HAS_K_STATIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 float
    NORMALISE: tl.constexpr,
    UPCAST: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BB: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
    V_CHUNKS: tl.constexpr,
):  # fmt: skip
    """out_static, out_relative, the highest logit m (-inf: no live key) and the sum of exp(logit - m), all float32.

    Without NORMALISE every weight is 1, the outputs are plain sums and the last two are not written.
    """
    ROWS: tl.constexpr = TZ * TY * TX * BB
    first_z, first_y, first_x, first_b, pid = first_of_tile(
        tl.program_id(0), batch, grid_z, grid_y, grid_x, TZ, TY, TX, BB
    )
    chunk = pid % V_CHUNKS
    head = pid // V_CHUNKS

    rows = tl.arange(0, ROWS)
    item = rows % BB
    site = rows // BB
    x = first_x + site % TX
    y = first_y + (site // TX) % TY
    z = first_z + site // (TX * TY)
    inside = (x < grid_x) & (y < grid_y) & (z < grid_z) & (first_b + item < batch)
    query = (z * grid_y + y) * grid_x + x
    first_item = first_b.to(tl.int64)
    inside_column = inside[:, None]
    negative_infinity = float("-inf")

    low_z, end_z = taps_of_axis(first_z, grid_z, keys_z, taps_z, shift_z, step_z, stride_z, TZ)
    low_y, end_y = taps_of_axis(first_y, grid_y, keys_y, taps_y, shift_y, step_y, stride_y, TY)
    low_x, end_x = taps_of_axis(first_x, grid_x, keys_x, taps_x, shift_x, step_x, stride_x, TX)

    # The key coordinates at tap 0. A row outside the grid is before every key, and later taps are further away.
    origin_x = tl.where(inside, x * stride_x + shift_x, -1)
    origin_y = y * stride_y + shift_y
    origin_z = z * stride_z + shift_z

    # Where a row's numbers begin in each operand; what depends on the key is added at a tap. Pointers to the rows of
    # k_tokens and v_tokens that live through the loops as well would spill.
    query_column = query[:, None]
    item_column = item[:, None]
    head_column = query_column * HEADS + head
    q_tokens += first_item * q_tokens_batch + (item_column * q_tokens_batch + query_column * Q_INNER)
    k_tokens += first_item * k_tokens_batch
    v_tokens += first_item * v_tokens_batch
    k_items = item_column * k_tokens_batch
    v_items = item_column * v_tokens_batch
    q_static += first_item * q_static_batch + (item_column * q_static_batch + head_column * WIDTH)
    k_static += first_item * k_static_batch + (item_column * k_static_batch + head * WIDTH)
    q_plain += first_item * q_plain_batch + (item_column * q_plain_batch + head_column * PLAIN)
    k_plain += first_item * k_plain_batch + (item_column * k_plain_batch + head * PLAIN)
    v_static += first_item * v_static_batch + (item_column * v_static_batch + head * V_STATIC)
    q_table += head * WIDTH
    k_table += head * WIDTH
    v_table += head * V_HEAD
    if MASK > 0:
        mask_rows = mask + (first_item + item) * mask_batch + head.to(tl.int64) * mask_head
        mask_rows += query.to(tl.int64) * mask_query
    bias += head * num_classes

    plain_cols = tl.arange(0, BP)[None, :]
    width_cols = tl.arange(0, BW)[None, :]
    across = tl.arange(0, BQ)[None, :]
    down = tl.arange(0, BQ)[:, None]
    v_across = tl.arange(0, BK)[None, :]
    v_down = tl.arange(0, BK)[:, None]

    # Lower than any logit but -inf, so that a row that has seen none but such never computes inf - inf.
    highest = tl.full([ROWS], -3.4028234663852886e38, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    if V_STATIC > 0:
        acc_static = tl.full([ROWS, BS], 0.0, tl.float32)
        s_cols = (chunk * BS + tl.arange(0, BS))[None, :]
    if V_WIDTH > 0:
        acc_relative = tl.full([ROWS, BV], 0.0, tl.float32)
        v_cols = (chunk * BV + tl.arange(0, BV))[None, :]

    # Lines of taps along x: in a line, classes and keys are one step apart. Three nested loops spill registers.
    count_y = tl.maximum(end_y - low_y, 0)
    for line in range(tl.maximum(end_z - low_z, 0) * count_y):
        tap_y = low_y + line % count_y
        tap_z = low_z + line // count_y
        key_z = origin_z - tap_z * step_z
        key_y = origin_y - tap_y * step_y
        live_y = (key_z >= 0) & (key_z < keys_z) & (key_y >= 0) & (key_y < keys_y)
        key_line = (key_z * keys_y + key_y) * keys_x
        first_class = (tap_z * taps_y + tap_y) * taps_x
        first_row = (first_class - base).to(tl.int64)
        first_key_row = (taps_z * taps_y * taps_x - 1 - first_class).to(tl.int64)
        for tap_x in range(tl.maximum(low_x, base - first_class), end_x):
            key_x = origin_x - tap_x * step_x
            live = live_y & (key_x >= 0) & (key_x < keys_x)
            key = key_line + key_x
            row = first_row + tap_x

            if MASK > 0:
                seen = tl.load(mask_rows + key.to(tl.int64) * mask_key, mask=live, other=0)
                live = live & (seen != 0) if MASK == 1 else live & (seen != negative_infinity)
            live_column = live[:, None]
            key_column = key[:, None]

            if NORMALISE:
                logits = inner_products(
                    q_static, q_tokens, q_table + row * (Q_INNER * Q_COLUMNS), q_plain,
                    k_static + key_column * (HEADS * WIDTH), k_tokens + (k_items + key_column * K_INNER),
                    k_table + (first_key_row - tap_x) * (K_INNER * K_COLUMNS), k_plain + key_column * (HEADS * PLAIN),
                    inside_column, live_column, plain_cols, width_cols, across, down, ROWS, HAS_Q_STATIC, HAS_K_STATIC,
                    Q_COLUMNS, K_COLUMNS, Q_INNER, K_INNER, PLAIN, WIDTH, BQ, BP, BW, UPCAST,
                )  # fmt: skip
                logits = logits * scale
                if MASK == 2:
                    logits += seen
                if HAS_BIAS:
                    logits += tl.load(bias + row)
                logits = tl.where(live, logits, negative_infinity)
                higher = tl.maximum(highest, logits)
                fading = tl.exp(highest - higher)
                weight = tl.exp(logits - higher)
                total = total * fading + weight
                highest = higher
            else:
                weight = tl.where(live, 1.0, 0.0)
            weight_column = weight[:, None]

            if V_STATIC > 0:
                v_static_rows = v_static + key_column * (HEADS * V_STATIC)
                v = columns_of(v_static_rows, live_column, s_cols, V_STATIC, BS)
                if NORMALISE:
                    acc_static = acc_static * fading[:, None]
                acc_static += weight_column * v
            if V_WIDTH > 0:
                v_rows = v_tokens + (v_items + key_column * V_INNER)
                table = v_table + row * (V_INNER * V_COLUMNS)
                v = tl.full([ROWS, BV], 0.0, tl.float32)
                v = project(v, v_rows, live_column, table, v_cols, v_across, v_down, V_COLUMNS, V_INNER, V_WIDTH,
                            BK, BV, UPCAST)  # fmt: skip
                if NORMALISE:
                    acc_relative = acc_relative * fading[:, None]
                acc_relative += weight_column * v

    num_queries = grid_z * grid_y * grid_x
    first_out = first_item * num_queries * HEADS
    at_row = (item * num_queries + query) * HEADS + head
    divisor = tl.full([ROWS], 1.0, tl.float32)
    if NORMALISE:
        divisor = tl.where(total == 0.0, 1.0, total)
        # Chunk 0 alone stores; a scalar condition would have to be of the type of a block.
        stored = inside & (item >= chunk * BB)
        tl.store(out_highest + first_out + at_row, tl.where(total == 0.0, negative_infinity, highest), mask=stored)
        tl.store(out_total + first_out + at_row, total, mask=stored)
    at_column = at_row[:, None]
    divisor_column = divisor[:, None]
    if V_STATIC > 0:
        at = out_static + first_out * V_STATIC + at_column * V_STATIC
        tl.store(at + s_cols, acc_static / divisor_column, mask=inside_column & (s_cols < V_STATIC))
    if V_WIDTH > 0:
        at = out_relative + first_out * V_WIDTH + at_column * V_WIDTH
        tl.store(at + v_cols, acc_relative / divisor_column, mask=inside_column & (v_cols < V_WIDTH))
