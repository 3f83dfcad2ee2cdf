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
def project(acc, rows, row_mask, table, cols, col_mask, stride: tl.constexpr, INNER: tl.constexpr, BK: tl.constexpr,
            UPCAST: tl.constexpr):  # fmt: skip
    """``acc + tokens @ table`` over INNER channels; ``rows`` point at the tokens, ``table`` at row 0 of the matrix."""
    for c in range(0, INNER, BK):
        channels = c + tl.arange(0, BK)
        if INNER % BK == 0:
            x = tl.load(rows[:, None] + channels[None, :], mask=row_mask[:, None], other=0.0)
            w = tl.load(table + channels[:, None] * stride + cols[None, :], mask=col_mask[None, :], other=0.0)
        else:
            inside = channels < INNER
            x = tl.load(rows[:, None] + channels[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(
                table + channels[:, None] * stride + cols[None, :], mask=inside[:, None] & col_mask[None, :], other=0.0
            )
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
    negative_infinity = float("-inf")

    # The taps that some row of the tile needs, per axis; no negative number is ever divided.
    low_x = (tl.maximum(first_x * stride_x + shift_x - keys_x + 1, 0) + step_x - 1) // step_x
    low_y = (tl.maximum(first_y * stride_y + shift_y - keys_y + 1, 0) + step_y - 1) // step_y
    low_z = (tl.maximum(first_z * stride_z + shift_z - keys_z + 1, 0) + step_z - 1) // step_z
    last_x = (tl.minimum(first_x + TX, grid_x) - 1) * stride_x + shift_x
    last_y = (tl.minimum(first_y + TY, grid_y) - 1) * stride_y + shift_y
    last_z = (tl.minimum(first_z + TZ, grid_z) - 1) * stride_z + shift_z
    count_x = tl.maximum(tl.minimum((tl.maximum(last_x, -step_x) + step_x) // step_x, taps_x) - low_x, 0)
    count_y = tl.maximum(tl.minimum((tl.maximum(last_y, -step_y) + step_y) // step_y, taps_y) - low_y, 0)
    count_z = tl.maximum(tl.minimum((tl.maximum(last_z, -step_z) + step_z) // step_z, taps_z) - low_z, 0)

    # Taps of the box that come before class ``base`` in lexicographic order.
    base_x = base % taps_x
    base_y = (base // taps_x) % taps_y
    base_z = base // (taps_x * taps_y)
    skip_x = tl.minimum(tl.maximum(base_x - low_x, 0), count_x)
    skip_y = tl.minimum(tl.maximum(base_y - low_y, 0), count_y)
    skip_z = tl.minimum(tl.maximum(base_z - low_z, 0), count_z)
    same_y = (base_y >= low_y) & (base_y < low_y + count_y)
    same_z = (base_z >= low_z) & (base_z < low_z + count_z)
    skipped = skip_z * count_y * count_x + tl.where(same_z, skip_y * count_x + tl.where(same_y, skip_x, 0), 0)

    q_tokens_rows = q_tokens + first_item * q_tokens_batch + (item * q_tokens_batch + query * Q_INNER)
    highest = tl.full([ROWS], negative_infinity, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    s_cols = chunk * BS + tl.arange(0, BS)
    v_cols = chunk * BV + tl.arange(0, BV)
    if V_STATIC > 0:
        acc_static = tl.full([ROWS, BS], 0.0, tl.float32)
    if V_WIDTH > 0:
        acc_relative = tl.full([ROWS, BV], 0.0, tl.float32)

    for s in range(skipped, count_z * count_y * count_x):
        tap_x = low_x + s % count_x
        tap_y = low_y + (s // count_x) % count_y
        tap_z = low_z + s // (count_x * count_y)
        key_x = x * stride_x + shift_x - tap_x * step_x
        key_y = y * stride_y + shift_y - tap_y * step_y
        key_z = z * stride_z + shift_z - tap_z * step_z
        live = inside & (key_x >= 0) & (key_x < keys_x) & (key_y >= 0) & (key_y < keys_y)
        live = live & (key_z >= 0) & (key_z < keys_z)
        key = (key_z * keys_y + key_y) * keys_x + key_x
        full_class = (tap_z * taps_y + tap_y) * taps_x + tap_x
        row = (full_class - base).to(tl.int64)
        key_row = (taps_z * taps_y * taps_x - 1 - full_class).to(tl.int64)

        added = 0.0
        if MASK > 0:
            where = (first_item + item) * mask_batch + head.to(tl.int64) * mask_head
            where = where + query.to(tl.int64) * mask_query + key.to(tl.int64) * mask_key
            seen = tl.load(mask + where, mask=live, other=0)
            if MASK == 1:
                live = live & (seen != 0)
            else:
                live = live & (seen != negative_infinity)
                added = seen

        logits = tl.full([ROWS], 0.0, tl.float32)
        if PLAIN > 0:
            q_rows = q_plain + first_item * q_plain_batch + (item * q_plain_batch + (query * HEADS + head) * PLAIN)
            k_rows = k_plain + first_item * k_plain_batch + (item * k_plain_batch + (key * HEADS + head) * PLAIN)
            for d in range(0, PLAIN, BP):
                cols = d + tl.arange(0, BP)
                q = tl.load(q_rows[:, None] + cols[None, :], mask=inside[:, None] & (cols < PLAIN)[None, :], other=0.0)
                k = tl.load(k_rows[:, None] + cols[None, :], mask=live[:, None] & (cols < PLAIN)[None, :], other=0.0)
                logits += tl.sum(q * k, axis=1)
        if WIDTH > 0:
            for d in range(0, WIDTH, BW):
                cols = d + tl.arange(0, BW)
                col_mask = cols < WIDTH
                q = tl.full([ROWS, BW], 0.0, tl.float32)
                k = tl.full([ROWS, BW], 0.0, tl.float32)
                if HAS_Q_STATIC:
                    at = q_static + first_item * q_static_batch
                    at = at + (item * q_static_batch + (query * HEADS + head) * WIDTH)
                    q = tl.load(at[:, None] + cols[None, :], mask=inside[:, None] & col_mask[None, :], other=0.0)
                if HAS_K_STATIC:
                    at = k_static + first_item * k_static_batch
                    at = at + (item * k_static_batch + (key * HEADS + head) * WIDTH)
                    k = tl.load(at[:, None] + cols[None, :], mask=live[:, None] & col_mask[None, :], other=0.0)
                if Q_INNER > 0:
                    table = q_table + row * (Q_INNER * Q_COLUMNS) + head * WIDTH
                    q = project(q, q_tokens_rows, inside, table, cols, col_mask, Q_COLUMNS, Q_INNER, BQ, UPCAST)
                if K_INNER > 0:
                    at = k_tokens + first_item * k_tokens_batch + (item * k_tokens_batch + key * K_INNER)
                    table = k_table + key_row * (K_INNER * K_COLUMNS) + head * WIDTH
                    k = project(k, at, live, table, cols, col_mask, K_COLUMNS, K_INNER, BQ, UPCAST)
                logits += tl.sum(q * k, axis=1)

        if NORMALISE:
            logits = logits * scale + added
            if HAS_BIAS:
                logits += tl.load(bias + head * num_classes + row)
            logits = tl.where(live, logits, negative_infinity)
            higher = tl.maximum(highest, logits)
            # A row that has seen no key yet, or only logits of -inf, must not compute inf - inf.
            origin = tl.where(higher == negative_infinity, 0.0, higher)
            fading = tl.exp(highest - origin)
            weight = tl.where(live, tl.exp(logits - origin), 0.0)
            total = total * fading + weight
            highest = higher
        else:
            weight = tl.where(live, 1.0, 0.0)

        if V_STATIC > 0:
            at = v_static + first_item * v_static_batch + (item * v_static_batch + (key * HEADS + head) * V_STATIC)
            v = tl.load(at[:, None] + s_cols[None, :], mask=live[:, None] & (s_cols < V_STATIC)[None, :], other=0.0)
            if NORMALISE:
                acc_static = acc_static * fading[:, None]
            acc_static += weight[:, None] * v
        if V_WIDTH > 0:
            at = v_tokens + first_item * v_tokens_batch + (item * v_tokens_batch + key * V_INNER)
            table = v_table + row * (V_INNER * V_COLUMNS) + head * V_HEAD
            v = tl.full([ROWS, BV], 0.0, tl.float32)
            v = project(v, at, live, table, v_cols, v_cols < V_WIDTH, V_COLUMNS, V_INNER, BK, UPCAST)
            if NORMALISE:
                acc_relative = acc_relative * fading[:, None]
            acc_relative += weight[:, None] * v

    num_queries = grid_z * grid_y * grid_x
    first_row = first_item * num_queries * HEADS
    at_row = (item * num_queries + query) * HEADS + head
    divisor = tl.full([ROWS], 1.0, tl.float32)
    if NORMALISE:
        divisor = tl.where(total == 0.0, 1.0, total)
        # Chunk 0 alone stores; a scalar condition would have to be of the type of a block.
        stored = inside & (item >= chunk * BB)
        tl.store(out_highest + first_row + at_row, highest, mask=stored)
        tl.store(out_total + first_row + at_row, total, mask=stored)
    if V_STATIC > 0:
        at = out_static + first_row * V_STATIC + at_row * V_STATIC
        kept = inside[:, None] & (s_cols < V_STATIC)[None, :]
        tl.store(at[:, None] + s_cols[None, :], acc_static / divisor[:, None], mask=kept)
    if V_WIDTH > 0:
        at = out_relative + first_row * V_WIDTH + at_row * V_WIDTH
        kept = inside[:, None] & (v_cols < V_WIDTH)[None, :]
        tl.store(at[:, None] + v_cols[None, :], acc_relative / divisor[:, None], mask=kept)
