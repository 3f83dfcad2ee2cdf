"""The launch of the forward kernel."""

from typing import Any

from torch import Tensor

from translution.backends.triton import targets
from translution.backends.triton.kernel import fused_forward_kernel
from translution.backends.triton.operands import Operands
from translution.backends.triton.targets import (
    INTERPRETED,
    Blocks,
    Target,
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
    sides = o.block_sides(chosen)
    chunks = max(-(-o.static_width // sides["BS"]), -(-o.value_width // sides["BV"]))
    anything = out_static if o.static_width else out_relative
    kernel: Any = fused_forward_kernel
    with launching():
        kernel[(programs_for(tile, o.batch, box.grid) * chunks * o.num_heads,)](
            *o.arguments(anything),
            out_static, out_relative, highest, total,
            *o.strides(),
            o.batch, 0 if o.bias is None else o.bias.shape[1], box.base,
            *box.axes(),
            o.scale,
            **o.constants(),
            NORMALISE=o.normalise,
            TZ=tile[0], TY=tile[1], TX=tile[2], BB=tile[3],
            **sides, V_CHUNKS=chunks,
            num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True,
        )  # fmt: skip
