"""The backward kernels. Every number of a result is written by one program, in one order: nothing is added atomically.

    P_ij = exp(l_ij - m_i) / total_i                        dl_ij = P_ij (<dO_i, v_ij> - delta_i)
    dq_ij = scale dl_ij k_ij       dk_ij = scale dl_ij q_ij        dv_ij = P_ij dO_i
    dx_i = sum_j dq_ij W[c]^T      dW[c] = sum_ij x_i^T dq_ij      and so for keys and values

:func:`weights_kernel` and :func:`d_logits_kernel` keep P and dl, one number each per pair and head; q, k and v of a
pair are computed again where they are used. :func:`owners_kernel` sums over the partners of a token,
:func:`tables_kernel` and :func:`bias_kernel` over the pairs of a displacement. P and dl lie [H, Nq, S, B]; the slot S
is the key, or the row of the bias table.

A key meets its queries at mirrored taps: with u = taps - 1 - t its query is ``(b + (taps - 1) step - shift - u step) /
stride``, so that one kernel serves both sides.
"""

# triton compiles these functions from their source: only constexpr is an annotation to it, and it knows which branches
# of a constexpr condition go together.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from translution.backends.triton.tiles import columns_of, encoded, first_of_tile, inner_products, project, taps_of_axis


@triton.jit
def weights_kernel(
    q_tokens, q_table, q_static, q_plain,
    k_tokens, k_table, k_static, k_plain,
    bias, mask,
    highest, total,  # [B, N, H]
    weights,  # [H, N, S, B]
    q_tokens_batch, q_static_batch, q_plain_batch,
    k_tokens_batch, k_static_batch, k_plain_batch,
    mask_batch, mask_head, mask_query, mask_key,
    batch, num_classes, base, slots,
    grid_z, grid_y, grid_x,
    keys_z, keys_y, keys_x,
    taps_z, taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,
    scale,
    HEADS: tl.constexpr,
    Q_INNER: tl.constexpr, K_INNER: tl.constexpr,
    Q_COLUMNS: tl.constexpr, K_COLUMNS: tl.constexpr,
    PLAIN: tl.constexpr, WIDTH: tl.constexpr,
    HAS_Q_STATIC: tl.constexpr, HAS_K_STATIC: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr,
    SLOT_IS_KEY: tl.constexpr,
    UPCAST: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BB: tl.constexpr,
    BQ: tl.constexpr, BP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """P of the pairs of a tile of queries and a head. A masked pair gets 0."""
    ROWS: tl.constexpr = TZ * TY * TX * BB
    first_z, first_y, first_x, first_b, head = first_of_tile(
        tl.program_id(0), batch, grid_z, grid_y, grid_x, TZ, TY, TX, BB
    )
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
    # A row outside the grid is before every key.
    origin_x = tl.where(inside, x * stride_x + shift_x, -1)
    origin_y = y * stride_y + shift_y
    origin_z = z * stride_z + shift_z

    query_column = query[:, None]
    item_column = item[:, None]
    head_column = query_column * HEADS + head
    q_tokens += first_item * q_tokens_batch + (item_column * q_tokens_batch + query_column * Q_INNER)
    k_tokens += first_item * k_tokens_batch
    k_items = item_column * k_tokens_batch
    q_static += first_item * q_static_batch + (item_column * q_static_batch + head_column * WIDTH)
    k_static += first_item * k_static_batch + (item_column * k_static_batch + head * WIDTH)
    q_plain += first_item * q_plain_batch + (item_column * q_plain_batch + head_column * PLAIN)
    k_plain += first_item * k_plain_batch + (item_column * k_plain_batch + head * PLAIN)
    q_table += head * WIDTH
    k_table += head * WIDTH
    if MASK > 0:
        mask_rows = mask + (first_item + item) * mask_batch + head.to(tl.int64) * mask_head
        mask_rows += query.to(tl.int64) * mask_query
    bias += head * num_classes

    num_queries = grid_z * grid_y * grid_x
    at_row = (item * num_queries + query) * HEADS + head
    first_out = first_item * num_queries * HEADS
    # A row that sees nothing has a highest logit of -inf and a total of 0.
    row_highest = tl.load(highest + first_out + at_row, mask=inside, other=0.0)
    row_highest = tl.where(row_highest == negative_infinity, 0.0, row_highest)
    row_total = tl.load(total + first_out + at_row, mask=inside, other=1.0)
    row_total = tl.where(row_total == 0.0, 1.0, row_total)
    first_pair = (head.to(tl.int64) * num_queries + query) * slots * batch + (first_item + item)

    plain_cols = tl.arange(0, BP)[None, :]
    width_cols = tl.arange(0, BW)[None, :]
    across = tl.arange(0, BQ)[None, :]
    down = tl.arange(0, BQ)[:, None]

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
            linked = live_y & (key_x >= 0) & (key_x < keys_x)
            key = key_line + key_x
            row = first_row + tap_x
            live = linked
            if MASK > 0:
                seen = tl.load(mask_rows + key.to(tl.int64) * mask_key, mask=linked, other=0)
                live = linked & (seen != 0) if MASK == 1 else linked & (seen != negative_infinity)
            live_column = live[:, None]
            key_column = key[:, None]

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
            weight = tl.exp(tl.where(live, logits, negative_infinity) - row_highest) / row_total
            pair = first_pair + (key.to(tl.int64) if SLOT_IS_KEY else row) * batch
            tl.store(weights + pair, weight, mask=linked)


@triton.jit
def d_logits_kernel(
    v_tokens, v_table, v_static,
    mask,
    d_static, d_relative,  # cotangents of the results [B, N, H, V] and [B, N, H, W]
    delta,  # [B, N, H]
    weights, d_logits,  # [H, N, S, B]
    v_tokens_batch, v_static_batch,
    mask_batch, mask_head, mask_query, mask_key,
    batch, base, slots,
    grid_z, grid_y, grid_x,
    keys_z, keys_y, keys_x,
    taps_z, taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,
    HEADS: tl.constexpr,
    V_INNER: tl.constexpr, V_COLUMNS: tl.constexpr,
    V_HEAD: tl.constexpr, V_STATIC: tl.constexpr, V_WIDTH: tl.constexpr,
    MASK: tl.constexpr,
    SLOT_IS_KEY: tl.constexpr,
    UPCAST: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dl of the pairs of a tile of queries and a head. A masked pair gets 0."""
    ROWS: tl.constexpr = TZ * TY * TX * BB
    first_z, first_y, first_x, first_b, head = first_of_tile(
        tl.program_id(0), batch, grid_z, grid_y, grid_x, TZ, TY, TX, BB
    )
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
    origin_x = tl.where(inside, x * stride_x + shift_x, -1)
    origin_y = y * stride_y + shift_y
    origin_z = z * stride_z + shift_z

    item_column = item[:, None]
    v_tokens += first_item * v_tokens_batch
    v_items = item_column * v_tokens_batch
    v_static += first_item * v_static_batch + (item_column * v_static_batch + head * V_STATIC)
    v_table += head * V_HEAD
    if MASK > 0:
        mask_rows = mask + (first_item + item) * mask_batch + head.to(tl.int64) * mask_head
        mask_rows += query.to(tl.int64) * mask_query
    num_queries = grid_z * grid_y * grid_x
    at_row = (item * num_queries + query) * HEADS + head
    at_column = at_row[:, None]
    first_out = first_item * num_queries * HEADS
    d_static += first_out * V_STATIC + at_column * V_STATIC
    d_relative += first_out * V_WIDTH + at_column * V_WIDTH
    row_delta = tl.load(delta + first_out + at_row, mask=inside, other=0.0)
    first_pair = (head.to(tl.int64) * num_queries + query) * slots * batch + (first_item + item)
    across = tl.arange(0, BK)[None, :]
    down = tl.arange(0, BK)[:, None]

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
        for tap_x in range(tl.maximum(low_x, base - first_class), end_x):
            key_x = origin_x - tap_x * step_x
            linked = live_y & (key_x >= 0) & (key_x < keys_x)
            key = key_line + key_x
            row = first_row + tap_x
            live = linked
            if MASK > 0:
                seen = tl.load(mask_rows + key.to(tl.int64) * mask_key, mask=linked, other=0)
                live = linked & (seen != 0) if MASK == 1 else linked & (seen != negative_infinity)
            live_column = live[:, None]
            key_column = key[:, None]
            pair = first_pair + (key.to(tl.int64) if SLOT_IS_KEY else row) * batch
            weight = tl.load(weights + pair, mask=live, other=0.0)
            agreement = tl.full([ROWS], 0.0, tl.float32)
            if V_STATIC > 0:
                v_static_rows = v_static + key_column * (HEADS * V_STATIC)
                for first in range(0, V_STATIC, BS):
                    cols = first + tl.arange(0, BS)[None, :]
                    v = columns_of(v_static_rows, live_column, cols, V_STATIC, BS)
                    agreement += tl.sum(v * columns_of(d_static, inside_column, cols, V_STATIC, BS), axis=1)
            if V_WIDTH > 0:
                v_rows = v_tokens + (v_items + key_column * V_INNER)
                table = v_table + row * (V_INNER * V_COLUMNS)
                for first in range(0, V_WIDTH, BV):
                    cols = first + tl.arange(0, BV)[None, :]
                    d = columns_of(d_relative, inside_column, cols, V_WIDTH, BV)
                    v = tl.full([ROWS, BV], 0.0, tl.float32)
                    v = project(v, v_rows, live_column, table, cols, across, down, V_COLUMNS, V_INNER, V_WIDTH, BK, BV,
                                UPCAST)  # fmt: skip
                    agreement += tl.sum(v * d, axis=1)
            tl.store(d_logits + pair, tl.where(live, weight * (agreement - row_delta), 0.0), mask=linked)


@triton.jit
def owners_kernel(
    own_table,  # [T, R, E] with TOKENS
    tokens, table, static,  # of the partners, from which their features are made
    pairs,  # P or dl; without WEIGHTED every live pair has 1
    mask,
    out,  # [H, B, N, R] with TOKENS, else [B, N, H, F]
    tokens_batch, static_batch,
    mask_batch, mask_head, mask_own, mask_partner,
    batch, base, slots,
    grid_z, grid_y, grid_x,
    partners_z, partners_y, partners_x,
    taps_z, taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,  # of the owners
    apart_z, apart_y, apart_x,  # stride of the partners
    scale,
    HEADS: tl.constexpr,
    OWN_QUERY: tl.constexpr,  # whether owners are queries
    KEY_TABLE: tl.constexpr,  # whether own_table is the keys' and table the queries', or the reverse
    TOKENS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOT_IS_KEY: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    MASK: tl.constexpr,
    INNER: tl.constexpr, COLUMNS: tl.constexpr,
    OWN_INNER: tl.constexpr, OWN_COLUMNS: tl.constexpr, OWN_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    APART: tl.constexpr,  # whether any apart_ is above 1
    UPCAST: tl.constexpr,
    TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, BB: tl.constexpr,
    BK: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """For every token the sum over its partners of ``coefficient * features``, with TOKENS times own_table[c]^T."""
    ROWS: tl.constexpr = TZ * TY * TX * BB
    first_z, first_y, first_x, first_b, pid = first_of_tile(
        tl.program_id(0), batch, grid_z, grid_y, grid_x, TZ, TY, TX, BB
    )
    chunk = pid % CHUNKS
    head = pid // CHUNKS
    rows = tl.arange(0, ROWS)
    item = rows % BB
    site = rows // BB
    x = first_x + site % TX
    y = first_y + (site // TX) % TY
    z = first_z + site // (TX * TY)
    inside = (x < grid_x) & (y < grid_y) & (z < grid_z) & (first_b + item < batch)
    own = (z * grid_y + y) * grid_x + x
    first_item = first_b.to(tl.int64)
    negative_infinity = float("-inf")
    span_z = (partners_z - 1) * apart_z + 1
    span_y = (partners_y - 1) * apart_y + 1
    span_x = (partners_x - 1) * apart_x + 1
    low_z, end_z = taps_of_axis(first_z, grid_z, span_z, taps_z, shift_z, step_z, stride_z, TZ)
    low_y, end_y = taps_of_axis(first_y, grid_y, span_y, taps_y, shift_y, step_y, stride_y, TY)
    low_x, end_x = taps_of_axis(first_x, grid_x, span_x, taps_x, shift_x, step_x, stride_x, TX)
    origin_x = tl.where(inside, x * stride_x + shift_x, -1)
    origin_y = y * stride_y + shift_y
    origin_z = z * stride_z + shift_z

    item_column = item[:, None]
    tokens += first_item * tokens_batch
    items = item_column * tokens_batch
    static += first_item * static_batch + (item_column * static_batch + head * WIDTH)
    if INNER > 0:
        table += head * WIDTH
    if TOKENS:
        own_table += head * OWN_HEAD
    if MASK > 0:
        mask_rows = mask + (first_item + item) * mask_batch + head.to(tl.int64) * mask_head
        mask_rows += own.to(tl.int64) * mask_own
    num_own = grid_z * grid_y * grid_x
    num_partners = partners_z * partners_y * partners_x
    item_long = first_item + item
    if OWN_QUERY:
        first_pair = (head.to(tl.int64) * num_own + own) * slots * batch + item_long
    elif SLOT_IS_KEY:
        first_pair = head.to(tl.int64) * num_partners * slots * batch + own.to(tl.int64) * batch + item_long
    else:
        first_pair = head.to(tl.int64) * num_partners * slots * batch + item_long

    across = tl.arange(0, BK)[None, :]
    down = tl.arange(0, BK)[:, None]
    if TOKENS:
        channels = chunk * BC + tl.arange(0, BC)
        acc = tl.full([ROWS, BC], 0.0, tl.float32)
        first_col = 0
    else:
        acc = tl.full([ROWS, BW], 0.0, tl.float32)
        first_col = chunk * BW
    last_class = taps_z * taps_y * taps_x - 1

    count_y = tl.maximum(end_y - low_y, 0)
    for line in range(tl.maximum(end_z - low_z, 0) * count_y):
        tap_y = low_y + line % count_y
        tap_z = low_z + line // count_y
        partner_z = origin_z - tap_z * step_z
        partner_y = origin_y - tap_y * step_y
        live_y = (partner_z >= 0) & (partner_z < span_z) & (partner_y >= 0) & (partner_y < span_y)
        if APART:
            live_y = live_y & (partner_z % apart_z == 0) & (partner_y % apart_y == 0)
            partner_z = partner_z // apart_z
            partner_y = partner_y // apart_y
        partner_line = (partner_z * partners_y + partner_y) * partners_x
        first_class = (tap_z * taps_y + tap_y) * taps_x
        if OWN_QUERY:
            start_x = tl.maximum(low_x, base - first_class)
            stop_x = end_x
        else:
            start_x = low_x
            stop_x = tl.minimum(end_x, last_class - base - first_class + 1)
        for tap_x in range(start_x, stop_x):
            partner_x = origin_x - tap_x * step_x
            live = live_y & (partner_x >= 0) & (partner_x < span_x)
            if APART:
                live = live & (partner_x % apart_x == 0)
                partner_x = partner_x // apart_x
            partner = partner_line + partner_x
            if OWN_QUERY:
                row = (first_class - base).to(tl.int64) + tap_x
                key_row = (last_class - first_class).to(tl.int64) - tap_x
            else:
                row = (last_class - base - first_class).to(tl.int64) - tap_x
                key_row = first_class.to(tl.int64) + tap_x
            if MASK > 0:
                seen = tl.load(mask_rows + partner.to(tl.int64) * mask_partner, mask=live, other=0)
                live = live & (seen != 0) if MASK == 1 else live & (seen != negative_infinity)
            live_column = live[:, None]
            partner_column = partner[:, None]
            if WEIGHTED:
                if SLOT_IS_KEY and OWN_QUERY:
                    pair = first_pair + partner.to(tl.int64) * batch
                elif OWN_QUERY:
                    pair = first_pair + row * batch
                elif SLOT_IS_KEY:
                    pair = first_pair + partner.to(tl.int64) * slots * batch
                else:
                    pair = first_pair + (partner.to(tl.int64) * slots + row) * batch
                coefficient = tl.load(pairs + pair, mask=live, other=0.0) * scale
            else:
                coefficient = tl.where(live, 1.0, 0.0)
            coefficient_column = coefficient[:, None]
            features_static = static + partner_column * (HEADS * WIDTH)
            features_rows = tokens + (items + partner_column * INNER)
            features_table = table + (row if KEY_TABLE else key_row) * (INNER * COLUMNS)
            if TOKENS:
                matrix = own_table + (key_row if KEY_TABLE else row) * (OWN_INNER * OWN_COLUMNS)
                for first in range(0, WIDTH, BW):
                    cols = first + tl.arange(0, BW)[None, :]
                    # Asked for before the products that make the features, so that it is there when they are.
                    at = matrix + (channels[:, None] * OWN_COLUMNS + cols)
                    if OWN_INNER % BC == 0 and WIDTH % BW == 0:
                        w = tl.load(at)
                    else:
                        w = tl.load(at, mask=(channels[:, None] < OWN_INNER) & (cols < WIDTH), other=0.0)
                    features = encoded(features_static, features_rows, features_table, live_column, cols, across, down,
                                       ROWS, HAS_STATIC, COLUMNS, INNER, WIDTH, BK, BW, UPCAST)  # fmt: skip
                    product = coefficient_column * features
                    if UPCAST:
                        w = w.to(tl.float32)
                    else:
                        product = product.to(w.dtype)
                    acc = tl.dot(product, tl.trans(w), acc, input_precision="ieee")
            else:
                cols = first_col + tl.arange(0, BW)[None, :]
                features = encoded(features_static, features_rows, features_table, live_column, cols, across, down,
                                   ROWS, HAS_STATIC, COLUMNS, INNER, WIDTH, BK, BW, UPCAST)  # fmt: skip
                acc += coefficient_column * features

    if TOKENS:
        first_out = (head.to(tl.int64) * batch + first_b) * num_own * OWN_INNER
        at = out + first_out + ((item * num_own + own)[:, None] * OWN_INNER + channels[None, :])
        tl.store(at, acc, mask=inside[:, None] & (channels[None, :] < OWN_INNER))
    else:
        cols = first_col + tl.arange(0, BW)[None, :]
        first_out = first_item * num_own * HEADS * WIDTH
        at = out + first_out + (((item * num_own + own) * HEADS + head)[:, None] * WIDTH + cols)
        tl.store(at, acc, mask=inside[:, None] & (cols < WIDTH))


@triton.jit
def queries_of_axis(tap, grid, keys, shift, step, stride):
    """The first query of an axis that has a key at this tap, and how many have one; no negative number is divided."""
    low = (tl.maximum(tap * step - shift, 0) + stride - 1) // stride
    last = keys - 1 + tap * step - shift
    end = tl.minimum((tl.maximum(last, -stride) + stride) // stride, grid)
    return low, tl.maximum(end - low, 0)


@triton.jit
def taps_of_class(number, taps_y, taps_x):
    """The taps of a class, in lexicographic order."""
    return number // (taps_y * taps_x), (number // taps_x) % taps_y, number % taps_x


@triton.jit
def pair_at(number, batch, low_z, low_y, low_x, count_y, count_x, tap_z, tap_y, tap_x, grid_y, grid_x, keys_y, keys_x,
            shift_z, shift_y, shift_x, step_z, step_y, step_x, stride_z, stride_y, stride_x,
            AXES: tl.constexpr):  # fmt: skip
    """Batch item, query and key of a displacement's pairs by their number, batch fastest; the first axes but AXES have
    one site.
    """
    item = number % batch
    site = number // batch
    query = low_x + (site % count_x if AXES > 1 else site)
    key = query * stride_x + (shift_x - tap_x * step_x)
    if AXES > 1:
        site = site // count_x
        y = low_y + (site % count_y if AXES > 2 else site)
        query += y * grid_x
        key += (y * stride_y + (shift_y - tap_y * step_y)) * keys_x
    if AXES > 2:
        z = low_z + site // count_y
        query += z * grid_y * grid_x
        key += (z * stride_z + (shift_z - tap_z * step_z)) * keys_y * keys_x
    return item, query, key


@triton.jit
def tables_kernel(
    own_tokens,  # [B, N, R], on the side whose table this is
    tokens, table, static,  # of the partners
    pairs, mask,
    out,  # [T, R, E]
    own_tokens_batch, tokens_batch, static_batch,
    mask_batch, mask_head, mask_query, mask_key,
    batch, base, slots,
    grid_z, grid_y, grid_x,
    keys_z, keys_y, keys_x,
    taps_z, taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,
    scale,
    HEADS: tl.constexpr,
    OWN_QUERY: tl.constexpr,
    KEY_TABLE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SLOT_IS_KEY: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    MASK: tl.constexpr,
    INNER: tl.constexpr, COLUMNS: tl.constexpr,
    OWN_INNER: tl.constexpr, OWN_COLUMNS: tl.constexpr, OWN_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_HELD: tl.constexpr,  # heads whose matrix is the same one, and added up
    AXES: tl.constexpr,  # of the lattice
    TURNED: tl.constexpr,  # whether the result is computed transposed
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    CHUNKS: tl.constexpr, WIDTH_CHUNKS: tl.constexpr,
):  # fmt: skip
    """out[c, :, head] = sum over the pairs of class c of x_own^T (coefficient * features of the partner)."""
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    pid = pid // CHUNKS
    width_chunk = pid % WIDTH_CHUNKS
    pid = pid // WIDTH_CHUNKS
    first_head = pid % (HEADS // HEADS_HELD) * HEADS_HELD
    number = pid // (HEADS // HEADS_HELD) + base
    tap_z, tap_y, tap_x = taps_of_class(number, taps_y, taps_x)
    low_z, count_z, low_y, count_y = 0, 1, 0, 1
    if AXES > 2:
        low_z, count_z = queries_of_axis(tap_z, grid_z, keys_z, shift_z, step_z, stride_z)
    if AXES > 1:
        low_y, count_y = queries_of_axis(tap_y, grid_y, keys_y, shift_y, step_y, stride_y)
    low_x, count_x = queries_of_axis(tap_x, grid_x, keys_x, shift_x, step_x, stride_x)
    count = count_z * count_y * count_x * batch
    row = (number - base).to(tl.int64)
    key_row = (taps_z * taps_y * taps_x - 1 - number).to(tl.int64)
    num_queries = grid_z * grid_y * grid_x
    negative_infinity = float("-inf")

    cols = width_chunk * BW + tl.arange(0, BW)[None, :]
    channels = chunk * BC + tl.arange(0, BC)
    channel_row = channels[None, :]
    across = tl.arange(0, BK)[None, :]
    down = tl.arange(0, BK)[:, None]
    acc = tl.full([BW, BC] if TURNED else [BC, BW], 0.0, tl.float32)
    table += (row if KEY_TABLE else key_row) * (INNER * COLUMNS)
    for held in range(HEADS_HELD):
        head = first_head + held
        head_long = head.to(tl.int64)
        for start in range(0, count, ROWS):
            numbers = start + tl.arange(0, ROWS)
            item, query, key = pair_at(
                numbers, batch, low_z, low_y, low_x, count_y, count_x, tap_z, tap_y, tap_x, grid_y, grid_x, keys_y,
                keys_x, shift_z, shift_y, shift_x, step_z, step_y, step_x, stride_z, stride_y, stride_x, AXES,
            )  # fmt: skip
            live = numbers < count
            item = item.to(tl.int64)
            if MASK > 0:
                at = item * mask_batch + query.to(tl.int64) * mask_query + key.to(tl.int64) * mask_key
                seen = tl.load(mask + head_long * mask_head + at, mask=live, other=0)
                live = live & (seen != 0) if MASK == 1 else live & (seen != negative_infinity)
            if WEIGHTED:
                slot = key if SLOT_IS_KEY else row
                pair = (head_long * num_queries + query) * slots + slot
                coefficient = tl.load(pairs + pair * batch + item, mask=live, other=0.0) * scale
            else:
                coefficient = tl.where(live, 1.0, 0.0)
            own = query if OWN_QUERY else key
            partner = key if OWN_QUERY else query
            live_column = live[:, None]
            item_column = item[:, None]
            partner_column = partner[:, None]
            # Asked for before the products that make the features, so that they are there when those are.
            own_rows = own_tokens + (item_column * own_tokens_batch + own[:, None] * OWN_INNER)
            x = columns_of(own_rows, live_column, channel_row, OWN_INNER, BC)
            features = encoded(
                static + (item_column * static_batch + (partner_column * HEADS + head) * WIDTH),
                tokens + (item_column * tokens_batch + partner_column * INNER),
                table + head * WIDTH, live_column, cols, across, down,
                ROWS, HAS_STATIC, COLUMNS, INNER, WIDTH, BK, BW, UPCAST,
            )  # fmt: skip
            product = coefficient[:, None] * features
            if UPCAST:
                x = x.to(tl.float32)
            else:
                product = product.to(x.dtype)
            if TURNED:
                acc = tl.dot(tl.trans(product), x, acc, input_precision="ieee")
            else:
                acc = tl.dot(tl.trans(x), product, acc, input_precision="ieee")
    out += (key_row if KEY_TABLE else row) * (OWN_INNER * OWN_COLUMNS) + first_head * OWN_HEAD
    at = out + (channels[:, None] * OWN_COLUMNS + cols)
    found = tl.trans(acc) if TURNED else acc
    tl.store(at, found.to(out.dtype.element_ty), mask=(channels[:, None] < OWN_INNER) & (cols < WIDTH))


@triton.jit
def bias_kernel(
    d_logits,
    out,  # [H, T]
    batch, base, slots, num_classes,
    grid_z, grid_y, grid_x,
    keys_z, keys_y, keys_x,
    taps_y, taps_x,
    shift_z, shift_y, shift_x,
    step_z, step_y, step_x,
    stride_z, stride_y, stride_x,
    HEADS: tl.constexpr,
    SLOT_IS_KEY: tl.constexpr,
    AXES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out[head, c] = the sum of dl over the pairs of class c."""
    pid = tl.program_id(0)
    head = pid % HEADS
    number = pid // HEADS + base
    tap_z, tap_y, tap_x = taps_of_class(number, taps_y, taps_x)
    low_z, count_z, low_y, count_y = 0, 1, 0, 1
    if AXES > 2:
        low_z, count_z = queries_of_axis(tap_z, grid_z, keys_z, shift_z, step_z, stride_z)
    if AXES > 1:
        low_y, count_y = queries_of_axis(tap_y, grid_y, keys_y, shift_y, step_y, stride_y)
    low_x, count_x = queries_of_axis(tap_x, grid_x, keys_x, shift_x, step_x, stride_x)
    count = count_z * count_y * count_x * batch
    first_query = head.to(tl.int64) * (grid_z * grid_y * grid_x)
    acc = tl.full([ROWS], 0.0, tl.float32)
    for start in range(0, count, ROWS):
        numbers = start + tl.arange(0, ROWS)
        item, query, key = pair_at(
            numbers, batch, low_z, low_y, low_x, count_y, count_x, tap_z, tap_y, tap_x, grid_y, grid_x, keys_y, keys_x,
            shift_z, shift_y, shift_x, step_z, step_y, step_x, stride_z, stride_y, stride_x, AXES,
        )  # fmt: skip
        slot = key if SLOT_IS_KEY else number - base
        acc += tl.load(
            d_logits + ((first_query + query) * slots + slot) * batch + item, mask=numbers < count, other=0.0
        )
    tl.store(out + head * num_classes + (number - base), tl.sum(acc, axis=0))
