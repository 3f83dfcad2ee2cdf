"""The launch of the forward kernel."""

from typing import Any

from torch import Tensor

from translution.backends.triton import targets
from translution.backends.triton.kernel import fused_forward_kernel
from translution.backends.triton.operands import Operands, held, rows_of
from translution.backends.triton.targets import (
    INTERPRETED,
    Blocks,
    Target,
    block,
    blocks_for,
    current_target,
    launching,
    programs_for,
    tile_for,
)


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
    o.check_dense()
    chosen = blocks or blocks_for(target or current_target(), o.item_size)
    rows = targets.interpreter_rows(o.batch, box.grid) if blocks is None and INTERPRETED else chosen.rows
    tile = tile_for(rows, o.batch, box.grid, o.item_span)
    inner = [0 if t is None else t.shape[1] for t in o.tables]
    columns = [0 if t is None else t.shape[2] for t in o.tables]
    static_block, value_block = block(chosen.results, o.static_width), block(chosen.results, o.value_width)
    chunks = max(-(-o.static_width // static_block), -(-o.value_width // value_block))
    anything = out_static if o.static_width else out_relative
    kernel: Any = fused_forward_kernel
    with launching():
        kernel[(programs_for(tile, o.batch, box.grid) * chunks * o.num_heads,)](
            held(o.q_tokens, anything), held(o.q_table, anything), held(o.q_static, anything),
            held(o.q_plain, anything), held(o.k_tokens, anything), held(o.k_table, anything),
            held(o.k_static, anything), held(o.k_plain, anything), held(o.v_tokens, anything),
            held(o.v_table, anything), held(o.v_static, anything), held(o.bias, anything), held(o.mask, anything),
            out_static, out_relative, highest, total,
            rows_of(o.q_tokens), rows_of(o.q_static), rows_of(o.q_plain),
            rows_of(o.k_tokens), rows_of(o.k_static), rows_of(o.k_plain),
            rows_of(o.v_tokens), rows_of(o.v_static),
            *o.mask_strides,
            o.batch, 0 if o.bias is None else o.bias.shape[1], box.base,
            *box.axes(),
            o.scale,
            HEADS=o.num_heads,
            Q_INNER=inner[0], K_INNER=inner[1], V_INNER=inner[2],
            Q_COLUMNS=columns[0], K_COLUMNS=columns[1], V_COLUMNS=columns[2],
            V_HEAD=0 if o.value_shared else o.value_width,
            PLAIN=o.plain_width, WIDTH=o.width, V_STATIC=o.static_width, V_WIDTH=o.value_width,
            HAS_Q_STATIC=o.q_static is not None, HAS_K_STATIC=o.k_static is not None, HAS_BIAS=o.bias is not None,
            MASK=o.mask_kind,
            NORMALISE=o.normalise,
            UPCAST=INTERPRETED,
            TZ=tile[0], TY=tile[1], TX=tile[2], BB=tile[3],
            BQ=block(chosen.channels, max(inner[:2])), BK=block(chosen.channels, inner[2]),
            BP=block(chosen.features, o.plain_width), BW=block(chosen.features, o.width),
            BS=static_block, BV=value_block, V_CHUNKS=chunks,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip
