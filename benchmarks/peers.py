"""What torch itself offers for the special cases, with the operator's own parameters: ``call(params, x)``, x [B, N, C].

SDPA            scaled_dot_product_attention between the same projections; a window or an order is a mask
flex            FlexAttention, compiled; windows and order skip blocks. On a CPU it has no backward
neighbourhood   windows that shift at the border (Hassani et al. 2023), gathered by unfolding keys and values
conv2d          torch.nn.functional.conv2d on tokens that stay [B, N, C]
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from translution.geometry import geometry
from translution.spec import Lattice, Operator, Softmax

Heads = tuple[Tensor, Tensor, Tensor]


class _Attention:
    """Projections before and after, and what attends between them in :meth:`attend`."""

    def __init__(self, operator: Operator) -> None:
        assert isinstance(operator.relevance, Softmax)
        assert isinstance(operator.layout, Lattice)
        self.heads, self.layout = operator.num_heads, operator.layout
        self.scale = operator.scale_of(operator.relevance)

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Out [B, N, F]."""
        q, k, v = ((x @ params[f"{role}.weight"]).unflatten(-1, (self.heads, -1)) for role in ("query", "key", "value"))
        return self.attend(q, k, v).flatten(2) @ params["output.weight"] + params["output.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] from three of the same shape."""
        raise NotImplementedError


class Sdpa(_Attention):
    """``scaled_dot_product_attention``; without a mask where every pair is linked, ``is_causal`` where it can be."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        found = geometry(operator.layout)
        self.causal = self.layout == Lattice(self.layout.grid, causal=True)
        self.mask: Tensor | None = None
        if not self.causal and not found.links_every_pair:
            self.mask = torch.zeros((found.num_queries, found.num_keys), dtype=torch.bool)
            self.mask[torch.from_numpy(found.query_index), torch.from_numpy(found.key_index)] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] from three of the same shape."""
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.causal, scale=self.scale)
        return out.transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # One kernel for each shape; the first call of a process takes a C++ compiler about 20 seconds.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


class Flex(_Attention):
    """FlexAttention with the block mask of a causal order or of a window on a 2-D grid that shifts at the border."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        from torch.nn.attention.flex_attention import create_block_mask

        visible, tokens = _visible(self.layout), self.layout.num_queries
        self.block_mask = None if visible is None else create_block_mask(visible, None, None, tokens, tokens, "cpu")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] from three of the same shape."""
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, at the first call
            out = _compiled_flex()(q, k, v, block_mask=self.block_mask, scale=self.scale)
        return out.transpose(1, 2)


def _visible(layout: Lattice) -> Callable[[Any, Any, Any, Any], Any] | None:
    """The ``mask_mod`` of a layout, None where every pair is linked."""
    if geometry(layout).links_every_pair:
        return None
    if layout == Lattice(layout.grid, causal=True):
        return lambda _batch, _head, i, j: i >= j
    (height, width), (rows, columns) = _shifted_window(layout)

    def in_window(_batch: Any, _head: Any, i: Any, j: Any) -> Any:
        top = (i // width - rows // 2).clamp(0, height - rows)
        left = (i % width - columns // 2).clamp(0, width - columns)
        row, column = j // width - top, j % width - left
        return (row >= 0) & (row < rows) & (column >= 0) & (column < columns)

    return in_window


def _shifted_window(layout: Lattice) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and window of a 2-D layout that is neighbourhood attention and nothing else."""
    if layout.rank != 2 or layout != Lattice(layout.grid, kernel_size=layout.kernel_size, boundary="shift"):
        raise ValueError(f"{layout} is no plain 2-D neighbourhood: no registers, dilation, stride or causal order")
    height, width = layout.grid
    rows, columns = layout.window
    return (height, width), (rows, columns)


class Neighbourhood(_Attention):
    """Windows of keys and values as strided views, gathered where the border shifts them, one small softmax each."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self.grid, self.window = _shifted_window(self.layout)
        self.top, self.left = (
            (torch.arange(extent) - size // 2).clamp(0, extent - size)
            for extent, size in zip(self.grid, self.window, strict=True)
        )

    def _windows(self, tokens: Tensor) -> Tensor:
        """[B, H, W, heads, D, rows, columns] of tokens [B, N, heads, D]."""
        rows, columns = self.window
        views = tokens.unflatten(1, self.grid).unfold(1, rows, 1).unfold(2, columns, 1)
        return views[:, self.top[:, None], self.left[None, :]]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H, D] from three of the same shape."""
        own, keys, values = q.unflatten(1, self.grid), self._windows(k).flatten(-2), self._windows(v).flatten(-2)
        logits = torch.einsum("bxyhd,bxyhdk->bxyhk", own, keys)
        weights = (self.scale * logits).softmax(-1)
        return torch.einsum("bxyhk,bxyhdk->bxyhd", weights, values).flatten(1, 2)


class Conv2d:
    """``conv2d`` of a square-strided 2-D convolution, in the layout and with the parameters of the operator."""

    def __init__(self, operator: Operator) -> None:
        layout = operator.layout
        assert isinstance(layout, Lattice)
        self.grid, self.window = layout.keys, layout.window
        self.stride, self.padding = layout.strides, layout.paddings

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Out [B, N, F]."""
        # Tables run against the taps.
        weight = params["value.table"].flip(0).unflatten(0, self.window).permute(3, 2, 0, 1)
        image = x.unflatten(1, self.grid).permute(0, 3, 1, 2)
        out = functional.conv2d(image, weight, params["output.bias"], self.stride, self.padding)
        return out.flatten(2).transpose(1, 2)
