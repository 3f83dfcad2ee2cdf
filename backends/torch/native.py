"""Algorithms ``conv`` and ``sdpa``: torch's own kernels for the operators that are a convolution or plain attention.

conv  taps run against the table's rows: tap t stands at displacement padding - t * dilation, rows ascend (L2, L3).
sdpa  a kernel multiplies a masked key's weight 0 with its values, so what isn't finite there is taken out first, and
      the rows that see it become NaN after it (M4). A row without a live key is opened before and zeroed after (M3).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from translution.algorithms import Request
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import bias_table
from translution.normal_form import NormalForm
from translution.spec import Lattice

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


def why_not(request: Request, algorithm: str) -> list[str]:
    """Reasons that lie with torch's kernels, beside those of :func:`translution.algorithms.why_not`."""
    if algorithm != "conv" or request.device != "cuda" or request.dtype == "float64":
        return []
    if not torch.backends.cudnn.allow_tf32:
        return []
    return ["conv: torch.backends.cudnn.allow_tf32 is on, cuDNN would round its inputs to 10 bits (clause D2)"]


def _positions(layout: Lattice, axis: int, before: int, after: int) -> list[int]:
    """Key index of every position from ``-before`` to ``extent + after``, the boundary unfolded (clause L5)."""
    extent = layout.keys[axis]
    position = np.arange(-before, extent + after)
    if layout.boundary == "circular":
        found = position % extent
    elif layout.boundary == "replicate":
        found = np.clip(position, 0, extent - 1)
    else:
        period = max(2 * (extent - 1), 1)
        folded = position % period
        found = np.minimum(folded, period - folded) if extent > 1 else folded * 0
    return [int(p) for p in found]


def _bordered(y: Tensor, borders: list[int]) -> Tensor:
    """``functional.pad``, which cuts before it pads and so can't cut beyond what it was given."""
    if min(borders) < 0:
        y, borders = functional.pad(y, [max(n, 0) for n in borders]), [min(n, 0) for n in borders]
    return functional.pad(y, borders)


def _padded(y: Tensor, layout: Lattice) -> Tensor:
    """y [B, C, *keys] from the first position that a window touches to the last; a negative padding cuts."""
    borders = []
    for axis in range(layout.rank):
        before = layout.paddings[axis]
        reach = layout.strides[axis] * (layout.grid[axis] - 1) + (layout.window[axis] - 1) * layout.dilations[axis]
        borders.append((before, reach - before - (layout.keys[axis] - 1)))
    if layout.boundary in ("absent", "zeros"):
        return _bordered(y, [n for border in reversed(borders) for n in border])
    for axis, border in enumerate(borders):
        y = y.index_select(axis + 2, torch.tensor(_positions(layout, axis, *border), device=y.device))
    return y


def convolution(form: NormalForm, params: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """The heads [Nq, B, H, D] of a convolution over keys y [Nk, B, C]."""
    layout = form.operator.layout
    assert isinstance(layout, Lattice)
    rank, batch = layout.rank, y.shape[1]
    table = params["value.table"].to(y.dtype)
    groups = table.shape[1] if table.dim() == 4 else 1
    width, features = table.shape[-2], table.shape[-1]
    taps = table.reshape(*layout.window, groups, width, features)
    grid = torch.unflatten(y[: layout.num_keys].permute(1, 2, 0), -1, layout.keys)
    axes = tuple(range(rank))
    if max(layout.key_strides) == 1:
        kernel = taps.flip(axes).permute(rank, rank + 2, rank + 1, *axes).flatten(0, 1)
        found = _CONVOLUTIONS[rank - 1](
            _padded(grid, layout), kernel, None, layout.strides, 0, layout.dilations, groups
        )
    else:
        kernel = taps.permute(rank, rank + 1, rank + 2, *axes).flatten(0, 1)
        whole = _TRANSPOSED[rank - 1](grid, kernel, None, layout.key_strides, 0, 0, groups, layout.dilations)
        borders = []
        for axis in reversed(axes):
            before = layout.paddings[axis] - (layout.window[axis] - 1) * layout.dilations[axis]
            borders += [before, layout.grid[axis] - whole.shape[axis + 2] - before]
        found = _bordered(whole, borders)
    heads = (form.value.num_heads, form.value.head_dim)
    return found.reshape(batch, *heads, layout.num_queries).permute(3, 0, 1, 2)


class _Attention(Operation):
    """The kernel, whose own backward can't be differentiated on every device, with a formula for second derivatives."""

    @staticmethod
    def compute(causal: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _kernel(causal, query, key, value, mask)

    @staticmethod
    def forward(ctx: Any, causal: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal = causal
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_(n) for t, n in zip((query, key, value), needs[:3], strict=True))
            added = None if mask is None else mask.detach().requires_grad_(needs[3])
            ctx.own, ctx.out = (q, k, v, added), _kernel(causal, q, k, v, added)
        found: Tensor = ctx.out.detach()
        return found

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needs, formula = ctx.needs_input_grad[1:], partial(_formula, ctx.causal)
        if torch.is_grad_enabled():
            return (None, *gradients_with_graph(formula, ctx.saved_tensors, needs, cotangent))
        wanted = [t for t, need in zip(ctx.own, needs, strict=True) if need]
        # Of an empty batch the kernel leaves the mask out of the graph.
        pulled = torch.autograd.grad(ctx.out, wanted, cotangent, retain_graph=True, materialize_grads=True)
        found = iter(pulled)
        return (None, *(next(found) if need else None for need in needs))


def _kernel(causal: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=1.0)


def _formula(causal: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    logits = query @ key.mT
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = torch.where(mask, logits, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1) @ value


def _both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _added(
    form: NormalForm, params: Mapping[str, Tensor], links: Links, mask: Tensor | None, like: Tensor
) -> Tensor | None:
    """What is added to finite logits, [B|1, H|1, Nq|1, Nk]: the bias by class and a float mask."""
    total = None
    bias = form.branches[0].bias
    if bias is not None:
        table = bias_table(bias, links, params, like.dtype)
        dense = table.new_zeros((links.geometry.num_queries, links.geometry.num_keys, table.shape[1]))
        pair = (links.query_index, links.key_index)
        total = dense.index_put(pair, table.index_select(0, links.value_class)).permute(2, 0, 1).unsqueeze(0)
    if mask is not None and mask.dtype != torch.bool:
        finite = mask.to(like.dtype).clamp(min=torch.finfo(like.dtype).min)
        finite = finite.masked_fill(mask == -torch.inf, 0.0)
        total = finite if total is None else total + finite
    return total


def _scaled(form: NormalForm, query: Encoded, key: Encoded, value: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (role.base.permute(1, 2, 0, 3) for role in (query, key, value) if role.base is not None)
    return form.branches[0].scale * q, k, v


def plain_attention(form: NormalForm, query: Encoded, key: Encoded, value: Encoded) -> Tensor:
    """The heads [Nq, B, H, D] of attention of every query to every key, without mask or bias."""
    return _heads(_Attention.call(False, *_scaled(form, query, key, value), None))


def attention(
    form: NormalForm,
    params: Mapping[str, Tensor],
    query: Encoded,
    key: Encoded,
    value: Encoded,
    links: Links,
    mask: Tensor | None,
) -> Tensor:
    """The heads [Nq, B, H, D] of attention with encoded q, k, v and a mask [B|1, H|1, Nq|1, Nk|1] as given."""
    q, k, v = _scaled(form, query, key, value)
    added = _added(form, params, links, mask, q)
    live = None if mask is None else mask if mask.dtype == torch.bool else mask != -torch.inf
    live = _both(live, links.support)
    if live is None:
        return _heads(_Attention.call(False, q, k, v, added))
    live = live.expand(*live.shape[:-2], q.shape[2], k.shape[2])
    bad = ~(k.isfinite().all(-1, keepdim=True) & v.isfinite().all(-1, keepdim=True))
    sees_bad = live.to(q.dtype) @ bad.to(q.dtype) > 0
    k, v = k.masked_fill(bad, 0.0), v.masked_fill(bad, 0.0)
    if links.is_lower_triangle and mask is None and added is None:
        return _heads(_Attention.call(True, q, k, v, None).masked_fill(sees_bad, torch.nan))
    dead = ~live.any(-1, keepdim=True)
    opened = live | dead
    if added is not None:
        opened = torch.where(opened, added, -torch.inf)
    out = _Attention.call(False, q, k, v, opened)
    return _heads(out.masked_fill(dead, 0.0).masked_fill(sees_bad, torch.nan))


def _heads(out: Tensor) -> Tensor:
    return out.permute(2, 0, 1, 3)
