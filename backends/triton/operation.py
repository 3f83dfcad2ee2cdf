"""The kernel as a torch operator, ``torch.ops.translution.fused_forward``: traceable, forward only."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from translution.backends.triton.launch import Box, Operands, launch


@torch.library.custom_op("translution::fused_forward", mutates_args=())
def fused_forward(
    q_tokens: Tensor | None,
    q_table: Tensor | None,
    q_static: Tensor | None,
    q_plain: Tensor | None,
    k_tokens: Tensor | None,
    k_table: Tensor | None,
    k_static: Tensor | None,
    k_plain: Tensor | None,
    v_tokens: Tensor | None,
    v_table: Tensor | None,
    v_static: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    box: list[int],
    num_heads: int,
    width: int,
    value_width: int,
    value_shared: bool,
    scale: float,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_static [B, N, H, V], out_relative [B, N, H, W], highest and total [B, N, H], all float32.

    highest is the largest logit of a query (-inf: no live key), total its sum of exp(logit - highest); without
    ``normalise`` every weight is 1 and both are 0. The arguments are those of :class:`Operands`.
    """
    operands = Operands(
        q_tokens, q_table, q_static, q_plain, k_tokens, k_table, k_static, k_plain, v_tokens, v_table, v_static,
        bias, mask, Box.of(box), num_heads, width, value_width, value_shared, scale, normalise,
    )  # fmt: skip
    results = results_of(operands)
    if not normalise:
        results[2].zero_()
        results[3].zero_()
    if operands.batch:
        # triton launches on the current device, whatever device holds the tensors. Interpreted, it is NumPy that would
        # warn of a NaN or Inf in a token.
        with torch.cuda.device_of(results[0]), np.errstate(all="ignore"):  # type: ignore[no-untyped-call]
            launch(operands, *results)
    return results


@fused_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return results_of(operands_of(*arguments))


def operands_of(*arguments: Any) -> Operands:
    """The arguments of :func:`fused_forward`, in its order."""
    fields: list[Any] = [*arguments[:13], Box.of(arguments[13]), *arguments[14:]]
    return Operands(*fields)


def results_of(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results."""
    like = operands.v_tokens if operands.v_tokens is not None else operands.v_static
    assert like is not None
    rows = (operands.batch, operands.box.num_queries, operands.num_heads)
    return (
        like.new_empty((*rows, operands.static_width), dtype=torch.float32),
        like.new_empty((*rows, operands.value_width), dtype=torch.float32),
        like.new_empty(rows, dtype=torch.float32),
        like.new_empty(rows, dtype=torch.float32),
    )
