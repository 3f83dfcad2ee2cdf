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
    pid = tl.program_id(0)
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
    first_b = (pid % blocks) * BB
    pid = pid // blocks
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

    # The taps that some row of the tile needs, per axis; no negative number is ever divided.
    low_x = (tl.maximum(first_x * stride_x + shift_x - keys_x + 1, 0) + step_x - 1) // step_x
    low_y = (tl.maximum(first_y * stride_y + shift_y - keys_y + 1, 0) + step_y - 1) // step_y
    low_z = (tl.maximum(first_z * stride_z + shift_z - keys_z + 1, 0) + step_z - 1) // step_z
    last_x = (tl.minimum(first_x + TX, grid_x) - 1) * stride_x + shift_x
    last_y = (tl.minimum(first_y + TY, grid_y) - 1) * stride_y + shift_y
    last_z = (tl.minimum(first_z + TZ, grid_z) - 1) * stride_z + shift_z
    end_x = tl.minimum((tl.maximum(last_x, -step_x) + step_x) // step_x, taps_x)
    end_y = tl.minimum((tl.maximum(last_y, -step_y) + step_y) // step_y, taps_y)
    end_z = tl.minimum((tl.maximum(last_z, -step_z) + step_z) // step_z, taps_z)

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

            logits = tl.full([ROWS], 0.0, tl.float32)
            if PLAIN > 0:
                k_plain_rows = k_plain + key_column * (HEADS * PLAIN)
                cols = plain_cols
                for _ in range(0, PLAIN, BP):
                    q = columns_of(q_plain, inside_column, cols, PLAIN, BP)
                    k = columns_of(k_plain_rows, live_column, cols, PLAIN, BP)
                    logits += tl.sum(q * k, axis=1)
                    if BP < PLAIN:
                        cols += BP
            if WIDTH > 0:
                cols = width_cols
                for _ in range(0, WIDTH, BW):
                    if HAS_Q_STATIC:
                        q = columns_of(q_static, inside_column, cols, WIDTH, BW)
                    else:
                        q = tl.full([ROWS, BW], 0.0, tl.float32)
                    if HAS_K_STATIC:
                        k_static_rows = k_static + key_column * (HEADS * WIDTH)
                        k = columns_of(k_static_rows, live_column, cols, WIDTH, BW)
                    else:
                        k = tl.full([ROWS, BW], 0.0, tl.float32)
                    if Q_INNER > 0:
                        table = q_table + row * (Q_INNER * Q_COLUMNS)
                        q = project(q, q_tokens, inside_column, table, cols, across, down, Q_COLUMNS, Q_INNER, WIDTH,
                                    BQ, BW, UPCAST)  # fmt: skip
                    if K_INNER > 0:
                        k_rows = k_tokens + (k_items + key_column * K_INNER)
                        table = k_table + (first_key_row - tap_x) * (K_INNER * K_COLUMNS)
                        k = project(k, k_rows, live_column, table, cols, across, down, K_COLUMNS, K_INNER, WIDTH,
                                    BQ, BW, UPCAST)  # fmt: skip
                    logits += tl.sum(q * k, axis=1)
                    if BW < WIDTH:
                        cols += BW

            if NORMALISE:
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
