"""The kernels as torch operators, ``torch.ops.translution.fused_forward`` and ``fused_backward``, traceable and with
first derivatives. Everything else that torch could differentiate in raises, and never gives zeros.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from translution.backends.triton.gradients import NAMES, Cotangents, gradients
from translution.backends.triton.launch import launch
from translution.backends.triton.operands import Box, Operands
from translution.errors import NotSupported

NO_SECOND_DERIVATIVE = (
    "fused: the backward kernels have no derivative of their own; for second ones use backend 'torch'"
)
NO_FORWARD_MODE = "fused: there is no forward-mode derivative; use backend 'torch' with algorithm='pairwise'"
NO_TRANSFORMS = "fused: the kernels are no part of torch.func transforms; backend 'torch', algorithm='pairwise', is"


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
    ``normalise`` every weight is 1 and both are 0. The arguments are those of :class:`Operands`. highest counts as a
    constant: log-sum-exp is highest + log(total), and its derivative is that of log(total) at a fixed highest.
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


_OPERANDS = "".join(f"Tensor? {name}, " for name in NAMES) + (
    "SymInt[] box, SymInt num_heads, SymInt width, SymInt value_width, bool value_shared, float scale, bool normalise"
)
_COTANGENTS = "Tensor d_static, Tensor d_relative, Tensor highest, Tensor total, Tensor delta"


@torch.library.custom_op(
    "translution::fused_backward", mutates_args=(), schema=f"({_OPERANDS}, {_COTANGENTS}, bool[] needed) -> Tensor[]"
)
def fused_backward(*arguments: Any) -> list[Tensor]:
    """The gradients of those of the first thirteen arguments of :func:`fused_forward` that are ``needed``, in order.

    After its arguments come those of :class:`Cotangents`, and ``needed``.
    """
    operands, given, needed = operands_of(*arguments), Cotangents(*arguments[20:25]), arguments[25]
    named = [name for name, need in zip(NAMES, needed, strict=True) if need]
    if not operands.batch or not named:
        return [gradient.zero_() for gradient in _like(operands, needed)]
    with torch.cuda.device_of(given.total), np.errstate(all="ignore"):  # type: ignore[no-untyped-call]
        found = gradients(operands, given, frozenset(named))
    return [found[name] for name in named]


@fused_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return _like(operands_of(*arguments), arguments[-1])


def _like(operands: Operands, needed: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients."""
    tensors = [getattr(operands, name) for name, need in zip(NAMES, needed, strict=True) if need]
    return [t.new_empty(t.shape) for t in tensors]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:13], *output)
    ctx.rest = inputs[13:]
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, d_static: Tensor, d_relative: Tensor, _: Tensor | None, d_total: Tensor) -> tuple[Any, ...]:
    operands, (static, relative, highest, total) = ctx.saved_tensors[:13], ctx.saved_tensors[13:]
    needed = list(ctx.needs_input_grad[:13])
    d_static, d_relative = d_static.contiguous(), d_relative.contiguous()
    delta = (d_static * static).sum(-1) + (d_relative * relative).sum(-1) - d_total * total
    found = iter(
        torch.ops.translution.fused_backward(*operands, *ctx.rest, d_static, d_relative, highest, total, delta, needed)
    )
    return *(next(found) if need else None for need in needed), *(None,) * len(ctx.rest)


def _refuse(ctx: Any, *_: Any) -> NoReturn:  # noqa: ARG001 - torch's signature
    raise NotSupported("triton", "fused", [NO_SECOND_DERIVATIVE])


fused_forward.register_autograd(_gradients, setup_context=_keep)
fused_backward.register_autograd(_refuse)


def check_transforms(tensors: Sequence[Tensor | None]) -> None:
    """NotSupported where torch would differentiate in a way that passes over these operators in silence."""
    if torch.compiler.is_compiling():
        return
    reasons = [NO_TRANSFORMS] if maybe_current_level() is not None else list(_forward_mode(tensors))
    if reasons:
        raise NotSupported("triton", "fused", reasons)


def _forward_mode(tensors: Sequence[Tensor | None]) -> Iterator[str]:
    duals = (forward_ad.unpack_dual(t) for t in tensors if t is not None)  # type: ignore[no-untyped-call]
    if any(dual.tangent is not None for dual in duals):
        yield NO_FORWARD_MODE


def operands_of(*arguments: Any) -> Operands:
    """The arguments of :func:`fused_forward`, in its order."""
    fields: list[Any] = [*arguments[:13], Box.of(arguments[13]), *arguments[14:20]]
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
