"""Operators from torch modules, and drop-in modules that compute the same call through an operator."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from translution.backends.torch.conversion import (
    Attention,
    AveragePooling,
    ConversionError,
    Grid,
    TransposedConvolution,
    describe,
)
from translution.errors import InputError
from translution.execution import run
from translution.spec import Lattice, Operator

__all__ = [
    "ConversionError",
    "TranslutionAttention",
    "TranslutionConv",
    "drop_in",
    "from_module",
    "mask_from_multihead_attention",
]


def from_module(
    module: nn.Module,
    grid: int | Grid,
    *,
    channels: int | None = None,
    key_grid: int | Grid | None = None,
    causal: bool = False,
    separate_values: bool | None = None,
) -> tuple[Operator, dict[str, Tensor]]:
    """The operator a torch module is on inputs of one size, and its weights as that operator's parameters.

    Parameters are differentiable functions of the module's own weights. A convolution's operator takes the input as
    keys, ``y`` [.., Nk, C] in row-major order, and queries ``x`` [.., Nq, C] that it does not look at.

    Args:
        grid: spatial size of the input; for attention the number of queries (or their grid).
        channels: channels of the input, for AvgPool only.
        key_grid: number of keys, for attention only; None for ``grid``.
        causal: for attention only: the causal order as a part of the layout.
        separate_values: for attention only: y holds keys and values side by side (``cat([key, value], -1)``), for calls
            where value is not key; None for exactly where kdim and vdim differ.

    Raises:
        ConversionError: the module is no operator; carries the reason and a remedy.
        SpecError: the module does not fit an input of this size.
    """
    size = (grid,) if isinstance(grid, int) else tuple(grid)
    found = describe(module)
    weights = dict(module.named_parameters(remove_duplicate=False))
    if not isinstance(found, Attention) and (key_grid is not None or causal or separate_values is not None):
        raise ValueError(f"key_grid, causal and separate_values belong to attention, not to {type(module).__name__}")
    if isinstance(found, AveragePooling) != (channels is not None):
        raise ValueError(f"channels={channels} for {type(module).__name__}: only AvgPool takes them, and needs them")
    if isinstance(found, Attention):
        keys = size if key_grid is None else (key_grid,) if isinstance(key_grid, int) else tuple(key_grid)
        apart = found.kdim != found.vdim if separate_values is None else separate_values
        operator = found.operator(size, keys, causal=causal, separate_values=apart)
        return operator, found.parameters(weights, separate_values=apart)
    if isinstance(found, AveragePooling):
        assert channels is not None
        return found.operator(size, channels), {}
    return found.operator(size), found.parameters(weights)


def mask_from_multihead_attention(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None = None, *, num_heads: int
) -> Tensor | None:
    """The mask [B or 1, H or 1, L or 1, S] of ``nn.MultiheadAttention``'s two masks; None where there is none.

    Its bool masks say True = masked; ours say True = may attend (clause M1), so bools are inverted. Two bools stay
    bool; otherwise a bool becomes 0 or -inf and the two are added (clause M2). A query whose keys are all masked gives
    0 here (clause M3); MultiheadAttention gives that with ``need_weights=False``, and NaN with ``need_weights=True``.

    Args:
        attn_mask: [L, S], or [B * H, L, S] ([H, L, S] for unbatched input); bool or float.
        key_padding_mask: [B, S] ([S] for unbatched input); bool or float.
    """
    masks = []
    if attn_mask is not None:
        if attn_mask.dim() == 2:
            masks.append(attn_mask[None, None])
        elif attn_mask.dim() == 3 and attn_mask.shape[0] % num_heads == 0:
            masks.append(attn_mask.reshape(attn_mask.shape[0] // num_heads, num_heads, *attn_mask.shape[1:]))
        else:
            raise InputError(
                "M6",
                f"attn_mask has shape {tuple(attn_mask.shape)}",
                f"it must be [L, S] or [batch * {num_heads} heads, L, S]",
                "Give one [L, S] mask for the whole batch",
            )
    if key_padding_mask is not None:
        if key_padding_mask.dim() not in (1, 2):
            raise InputError(
                "M6",
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}",
                "it must be [B, S], or [S] for unbatched input",
                "Give one row per batch element",
            )
        masks.append(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]))
    for mask in masks:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError("M1", f"a mask is {mask.dtype}", "masks are bool or float", "Convert with mask.bool()")
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        keep = masks[0].logical_not()
        return keep if len(masks) == 1 else keep & masks[1].logical_not()
    dtype = next(mask.dtype for mask in masks if mask.dtype != torch.bool)
    added = [
        torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]


class Lowered(NamedTuple):
    """A call as :func:`translution.run` takes it: tokens [B, N, C], the mask as in clause M1."""

    operator: Operator
    params: dict[str, Tensor]
    x: Tensor
    y: Tensor | None
    mask: Tensor | None


class _DropIn(nn.Module):
    """Holds another module's parameters, submodules and hooks under their own names, and counts its forward calls."""

    forward_calls: Tensor

    def __init__(self, module: nn.Module, algorithm: str | None, backend: str) -> None:
        super().__init__()
        self.algorithm, self.backend = algorithm, backend
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, child in module._modules.items():
            self.add_module(name, child)
        for name, value in vars(module).items():
            if name.endswith("_hooks") or "_hooks_" in name or name == "_is_full_backward_hook":
                object.__setattr__(self, name, value)
        device = next((p.device for p in module.parameters()), None)
        # A tensor and not an int: torch.compile would recompile at every change of an int.
        self.register_buffer("forward_calls", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self.train(module.training)

    @property
    def calls(self) -> int:
        """How often this module's own forward ran."""
        return int(self.forward_calls)

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.named_parameters(remove_duplicate=False))


class TranslutionConv(_DropIn):
    """A Conv*, ConvTranspose* or AvgPool* computed as a Translution operator; called as the module it is made from.

    Args:
        module: the module whose parameters this one takes over (not copies).
        algorithm: ``stream`` and the like; None for the backend's first that applies, native kernels included.
    """

    def __init__(self, module: nn.Module, *, algorithm: str | None = "stream", backend: str = "torch") -> None:
        description = describe(module)
        if isinstance(description, Attention):
            raise ConversionError(type(module).__name__, "it is no convolution", "Use TranslutionAttention")
        super().__init__(module, algorithm, backend)
        self.description = description
        for name in getattr(module, "__constants__", ()):
            if name not in self._parameters:
                setattr(self, name, getattr(module, name))

    def operator(self, grid: Grid, channels: int, output_size: Grid | None = None) -> Operator:
        """The operator for inputs of spatial size ``grid`` (cached)."""
        found = self.description
        if output_size is not None:
            if not isinstance(found, TransposedConvolution):
                raise TypeError("only a transposed convolution takes output_size")
            found = replace(found, output_padding=found.output_padding_for(grid, output_size))
        return found.operator(grid, channels) if isinstance(found, AveragePooling) else found.operator(grid)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:  # noqa: A002 - torch's own name
        """``input`` [N, C, *grid] or [C, *grid] to [N, E, *out] or [E, *out]."""
        self.forward_calls.add_(1)
        rank = self.description.rank
        if input.dim() not in (rank + 1, rank + 2):
            raise InputError(
                "D1",
                f"input has shape {tuple(input.shape)}",
                f"it must be [N, C, *grid] or [C, *grid] with {rank} grid axes",
                "Add or drop an axis",
            )
        batched = input if input.dim() == rank + 2 else input.unsqueeze(0)
        grid = tuple(int(n) for n in batched.shape[2:])
        size = None if output_size is None else tuple(int(n) for n in output_size)
        operator = self.operator(grid, int(batched.shape[1]), size)
        layout, keys = operator.layout, batched.flatten(2).transpose(1, 2)
        assert isinstance(layout, Lattice)
        # The queries of a convolution carry no content: one zero, expanded.
        queries = keys.new_zeros(()).expand(keys.shape[0], layout.num_queries, operator.dim)
        parameters = self.description.parameters(self._weights())
        out = run(operator, parameters, queries, keys, backend=self.backend, algorithm=self.algorithm)
        shaped: Tensor = out.transpose(1, 2).reshape(keys.shape[0], operator.out_features, *layout.grid).contiguous()
        return shaped if input.dim() == rank + 2 else shaped.squeeze(0)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.description}, algorithm={self.algorithm!r}"


class TranslutionAttention(_DropIn):
    """A MultiheadAttention computed as a Translution operator; called as the module it is made from.

    ``nn.TransformerEncoderLayer`` reads ``batch_first``, ``num_heads`` and the weights of its attention, and in eval
    mode without gradients answers from these weights alone unless ``_qkv_same_embed_dim`` is False: it always is here.

    Args:
        module: the module whose parameters this one takes over (not copies).
        algorithm: ``stream`` and the like; None for the backend's first that applies, native kernels included.
    """

    def __init__(
        self, module: nn.MultiheadAttention, *, algorithm: str | None = "stream", backend: str = "torch"
    ) -> None:
        description = describe(module)
        if not isinstance(description, Attention):
            raise ConversionError(type(module).__name__, "it is no attention", "Use TranslutionConv")
        super().__init__(module, algorithm, backend)
        self.description = description
        self.embed_dim, self.num_heads, self.head_dim = module.embed_dim, module.num_heads, module.head_dim
        self.kdim, self.vdim = module.kdim, module.vdim
        self.dropout, self.batch_first = module.dropout, module.batch_first
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; ``is_causal`` is a hint about ``attn_mask``, and the mask is what counts."""
        self.forward_calls.add_(1)
        self._check_call(query, attn_mask, is_causal)
        call = self.lower(query, key, value, key_padding_mask, attn_mask)
        result = run(
            call.operator,
            call.params,
            call.x,
            call.y,
            mask=call.mask,
            backend=self.backend,
            algorithm=self.algorithm,
            return_weights=need_weights,
        )
        out, weights = result if need_weights else (result, None)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1).contiguous(), weights

    def tokens(self, given: Tensor) -> Tensor:
        """[L, E], [L, B, E] or (``batch_first``) [B, L, E] as [B, L, E]."""
        if given.dim() == 2:
            return given.unsqueeze(0)
        return given if self.batch_first else given.transpose(0, 1)

    def lower(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Lowered:
        """The call in the terms of the operator; differentiable in the tokens and in this module's weights."""
        found = self.description
        apart = value is not key or found.kdim != found.vdim
        x = self.tokens(query)
        y = torch.cat([self.tokens(key), self.tokens(value)], dim=-1) if apart else self.tokens(key)
        return Lowered(
            found.operator((x.shape[1],), (y.shape[1],), separate_values=apart),
            found.parameters(self._weights(), separate_values=apart),
            x,
            None if key is query and not apart else y,
            mask_from_multihead_attention(attn_mask, key_padding_mask, num_heads=self.num_heads),
        )

    def _check_call(self, query: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
        name = type(self).__name__
        if query.is_nested:
            raise ConversionError(
                name, "its input is a nested tensor", "Set enable_nested_tensor=False on the TransformerEncoder"
            )
        if self.training and self.dropout > 0:
            raise ConversionError(
                name, f"dropout={self.dropout} acts on its weights in training mode", "Call eval(), or set dropout to 0"
            )
        if is_causal and attn_mask is None:
            raise InputError(
                "L4",
                "is_causal=True without attn_mask",
                "is_causal is a hint about attn_mask",
                "Give the causal attn_mask too",
            )

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.description}, algorithm={self.algorithm!r}"


def drop_in(
    module: nn.Module, *, algorithm: str | None = "stream", backend: str = "torch"
) -> TranslutionConv | TranslutionAttention:
    """The drop-in module for a convertible one; :class:`ConversionError` for any other."""
    if isinstance(module, nn.MultiheadAttention):
        return TranslutionAttention(module, algorithm=algorithm, backend=backend)
    return TranslutionConv(module, algorithm=algorithm, backend=backend)
