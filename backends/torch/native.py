"""Algorithms ``conv`` and ``sdpa``: torch's own kernels for the operators that are a convolution or plain attention.

conv  taps run against the table's rows: tap t stands at displacement padding - t * dilation, rows ascend (L2, L3).
sdpa  a kernel multiplies a masked key's weight 0 with its values, so what isn't finite there is taken out first, and
      the rows that see it become NaN after it (M4). A row without a live key is opened before and zeroed after (M3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from translution.algorithms import Request
from translution.backends.torch.derivatives import Operation, gradients_with_graph, without_autocast
from translution.backends.torch.encoding import Encoded, added_vector, project_output
from translution.backends.torch.links import Links
from translution.backends.torch.relevance import bias_table
from translution.normal_form import NormalForm, Role
from translution.spec import Lattice

_CONVOLUTIONS = {2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


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


def _borders(layout: Lattice) -> list[tuple[int, int]]:
    """How far windows reach beyond the keys on every axis, before and after; negative where they end short of them."""
    borders = []
    for axis in range(layout.rank):
        before = layout.paddings[axis]
        reach = layout.strides[axis] * (layout.grid[axis] - 1) + (layout.window[axis] - 1) * layout.dilations[axis]
        borders.append((before, reach - before - (layout.keys[axis] - 1)))
    return borders


def _padded(y: Tensor, layout: Lattice) -> Tensor:
    """y [B, C, *keys] from the first position that a window touches to the last; a negative padding cuts."""
    borders = _borders(layout)
    if layout.boundary in ("absent", "zeros"):
        return _bordered(y, [n for border in reversed(borders) for n in border])
    for axis, border in enumerate(borders):
        y = y.index_select(axis + 2, torch.tensor(_positions(layout, axis, *border), device=y.device))
    return y


def _even_padding(layout: Lattice) -> tuple[int, ...] | None:
    """The padding as a convolution takes it, the same before and after; None where it is another."""
    if layout.boundary not in ("absent", "zeros"):
        return None
    for before, (_, after), stride in zip(layout.paddings, _borders(layout), layout.strides, strict=True):
        if before < 0 or not 0 <= before - after < stride:
            return None
    return layout.paddings


def _convolve(
    y: Tensor, kernel: Tensor, bias: Tensor | None, layout: Lattice, padding: tuple[int, ...], groups: int
) -> Tensor:
    if layout.rank == 1:  # a line is an image of height 1, which can have its channels last
        own = (1, *layout.strides), (0, *padding), (1, *layout.dilations)
        return functional.conv2d(y.unsqueeze(2), kernel.unsqueeze(2), bias, *own, groups).squeeze(2)
    own = layout.strides, padding, layout.dilations
    return _CONVOLUTIONS[layout.rank](y, kernel, bias, *own, groups)


def _transposed(y: Tensor, kernel: Tensor, layout: Lattice, groups: int) -> Tensor:
    if layout.rank == 1:
        steps, dilations = (1, *layout.key_strides), (1, *layout.dilations)
        own = y.unsqueeze(2), kernel.unsqueeze(2)
        return functional.conv_transpose2d(*own, None, steps, 0, 0, groups, dilations).squeeze(2)
    return _TRANSPOSED[layout.rank](y, kernel, None, layout.key_strides, 0, 0, groups, layout.dilations)


def _only_adds(output: Role | None) -> bool:
    """Whether the output encoder leaves the heads as they are, but for a bias."""
    return output is None or all(term.before is None for term in output.linears)


def convolution(form: NormalForm, params: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """out [B, Nq, F] of a convolution over keys y [B, Nk, C]; their channels lie last, and stay there."""
    layout = form.operator.layout
    assert isinstance(layout, Lattice)
    table = params["value.table"].to(y.dtype)
    groups = table.shape[1] if table.dim() == 4 else 1
    width, features = table.shape[-2], table.shape[-1]
    grid = torch.unflatten(y, 1, layout.keys).movedim(-1, 1)
    bias = None
    if max(layout.key_strides) == 1:
        # Taps against the rows, channels last, in one copy.
        matrices = [matrix.mT.reshape(features * groups, width) for matrix in reversed(table.unbind(0))]
        kernel = torch.unflatten(torch.stack(matrices, 1), 1, layout.window).movedim(-1, 1)
        if _only_adds(form.output) and form.operator.output_scale == 1:
            bias = added_vector(form.output, params, y.dtype)
        if (padding := _even_padding(layout)) is None:
            grid, padding = _padded(grid, layout), (0,) * layout.rank
        found = _convolve(grid, kernel, bias, layout, padding, groups)
    else:
        taps = table.reshape(*layout.window, groups, width, features)
        kernel = taps.movedim((-3, -2, -1), (0, 1, 2)).flatten(0, 1)
        # torch's backward refuses strides of one channel that could be either order.
        grid, kernel = (t.clone(memory_format=torch.contiguous_format) for t in (grid, kernel))
        whole = _transposed(grid, kernel, layout, groups)
        borders = []
        for axis in reversed(range(layout.rank)):
            before = layout.paddings[axis] - (layout.window[axis] - 1) * layout.dilations[axis]
            borders += [before, layout.grid[axis] - whole.shape[axis + 2] - before]
        found = _bordered(whole, borders)
    rows = found.movedim(1, -1).flatten(1, -2)
    if bias is not None:
        return rows
    return project_output(form, params, torch.unflatten(rows, -1, (form.value.num_heads, form.value.head_dim)))


@dataclass(frozen=True, slots=True)
class _Way:
    causal: bool
    scale: float


class _Attention(Operation):
    """The kernel, whose own backward can't be differentiated on every device, with a formula for second derivatives."""

    @staticmethod
    def compute(way: "_Way", query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return _kernel(way, query, key, value, mask)

    @staticmethod
    def forward(ctx: Any, way: "_Way", query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.way = way
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_(n) for t, n in zip((query, key, value), needs[:3], strict=True))
            added = None if mask is None else mask.detach().requires_grad_(needs[3])
            ctx.own, ctx.out = (q, k, v, added), _kernel(way, q, k, v, added)
        found: Tensor = ctx.out.detach()
        return found

    @staticmethod
    @without_autocast
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        needs, formula = ctx.needs_input_grad[1:], partial(_formula, ctx.way)
        if torch.is_grad_enabled():
            return (None, *gradients_with_graph(formula, ctx.saved_tensors, needs, cotangent))
        wanted = [t for t, need in zip(ctx.own, needs, strict=True) if need]
        # Of an empty batch the kernel leaves the mask out of the graph.
        pulled = torch.autograd.grad(ctx.out, wanted, cotangent, retain_graph=True, materialize_grads=True)
        found = iter(pulled)
        return (None, *(next(found) if need else None for need in needs))


def _kernel(way: _Way, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    own = functional.scaled_dot_product_attention
    return own(query, key, value, mask, is_causal=way.causal, scale=way.scale)


def _formula(way: _Way, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    logits = way.scale * query @ key.mT
    if way.causal:
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


def plain_attention(form: NormalForm, query: Encoded, key: Encoded, value: Encoded) -> Tensor:
    """The heads [B, Nq, H, D] of attention of every query to every key; roles are [B, N, H, D], nothing is masked."""
    q, k, v = (role.base.transpose(1, 2) for role in (query, key, value) if role.base is not None)
    return _Attention.call(_Way(False, form.branches[0].scale), q, k, v, None).transpose(1, 2)


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
    q, k, v = (role.base.permute(1, 2, 0, 3) for role in (query, key, value) if role.base is not None)
    way = _Way(False, form.branches[0].scale)
    added = _added(form, params, links, mask, q)
    live = None if mask is None else mask if mask.dtype == torch.bool else mask != -torch.inf
    live = _both(live, links.support)
    if live is None:
        return _heads(_Attention.call(way, q, k, v, added))
    live = live.expand(*live.shape[:-2], q.shape[2], k.shape[2])
    bad = ~(k.isfinite().all(-1, keepdim=True) & v.isfinite().all(-1, keepdim=True))
    sees_bad = live.to(q.dtype) @ bad.to(q.dtype) > 0
    k, v = k.masked_fill(bad, 0.0), v.masked_fill(bad, 0.0)
    if links.is_lower_triangle and mask is None and added is None:
        return _heads(_Attention.call(replace(way, causal=True), q, k, v, None).masked_fill(sees_bad, torch.nan))
    dead = ~live.any(-1, keepdim=True)
    opened = live | dead
    if added is not None:
        opened = torch.where(opened, added, -torch.inf)
    out = _Attention.call(way, q, k, v, opened)
    return _heads(out.masked_fill(dead, 0.0).masked_fill(sees_bad, torch.nan))


def _heads(out: Tensor) -> Tensor:
    return out.permute(2, 0, 1, 3)
