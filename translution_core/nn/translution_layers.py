"""Translution and alpha-Translution by name, in place of ``timm.layers.Attention``: its arguments in its order.

What of timm's arguments an operator does not hold is computed beside it, exactly, or refused:

- ``attn_drop`` drops weights. In training the weights are computed first and dropped; a second operator, whose logits
  are the logarithms of those that are left, adds up the values, and each head takes the sum of its weights as a factor.
- ``qk_norm`` normalises queries and keys: possible where they belong to a token, not to a pair (``roles="v"``).
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from translution.errors import InputError
from translution.nn.cropping import Grid
from translution.nn.grid_operator import GridOperator
from translution.nn.operator_layer import OperatorModule
from translution.spec import Boundary, Clip, FarClasses, Identity, Operator, Softmax, presets
from translution.spec.checks import per_axis
from translution.spec.errors import require
from translution.spec.presets import Axes, Roles


class RelativeAttention(OperatorModule):
    """What the six layers have in common; use one of those.

    Args:
        dim: channels of tokens, in and out.
        num_heads, qkv_bias, qk_norm, attn_drop, proj_drop, device, dtype: as in ``timm.layers.Attention``.
        grid: extents of the token grid, one number or one per axis.
        roles: which of queries, keys and values have a matrix per displacement; the others have one.
        registers: tokens before the grid, such as CLS (timm's prefix tokens).
        causal: each token sees those before it in raster order, or one flag per axis.
        kernel_size, dilation, boundary: a window (:class:`translution.spec.Lattice`).
        far: displacements farther than this along an axis share the matrix at this distance.
        rank: of alpha-Translution, the inner width per head; 8 where it is not given.
        head_dim: features of one head; dim / num_heads where it is not given.
        proj_bias, scale_norm, norm_layer: as in timm; ``norm_layer`` makes the norms of ``qk_norm``.
        backend, algorithm: as in :func:`translution.run`.

    Raises:
        SpecError: the operator can't be had, or ``qk_norm`` or ``scale_norm`` not within it.
    """

    axes: ClassVar[int]
    is_alpha: ClassVar[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        grid: int | Grid,
        roles: Roles = "qkv",
        registers: int = 0,
        causal: bool | tuple[bool, ...] = False,
        kernel_size: Axes | None = None,
        dilation: Axes = 1,
        boundary: Boundary = "absent",
        far: int | FarClasses | None = None,
        rank: int | None = None,
        head_dim: int | None = None,
        proj_bias: bool = True,
        scale_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        backend: str = "torch",
        algorithm: str | None = None,
    ) -> None:
        require(
            not scale_norm,
            "O2",
            "scale_norm=True",
            "an operator projects its heads itself, with nothing in between",
            "Leave scale_norm out",
        )
        require(
            rank is None or self.is_alpha,
            "E6",
            f"rank={rank}",
            "a matrix per displacement has full rank here",
            f"Leave rank out, or use Alpha{type(self).__name__}",
        )
        more: dict[str, Any] = {"rank": 8 if rank is None else rank} if self.is_alpha else {}
        preset = presets.alpha_translution if self.is_alpha else presets.translution
        operator = preset(
            per_axis("grid", grid, self.axes, 1),
            dim,
            num_heads,
            head_dim=head_dim,
            roles=roles,
            registers=registers,
            causal=causal,
            kernel_size=kernel_size,
            dilation=dilation,
            boundary=boundary,
            far=Clip(far) if isinstance(far, int) else far,
            qkv_bias=qkv_bias,
            output_bias=proj_bias,
            **more,
        )
        relative = [role for role in ("query", "key") if f"{role}.weight" not in operator.parameters]
        require(
            not (qk_norm and relative),
            "E1",
            f"qk_norm=True with roles={roles!r}",
            "a norm acts on the query or key of a token, and here they are of a pair, one per displacement",
            'Leave qk_norm out, or use roles="v", which has queries and keys as attention has them',
        )
        super().__init__(operator, backend=backend, algorithm=algorithm, device=device, dtype=dtype)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        make: Any = nn.LayerNorm if norm_layer is None else norm_layer
        self.q_norm: nn.Module | None = make(operator.head_dim, device=device, dtype=dtype) if qk_norm else None
        self.k_norm: nn.Module | None = make(operator.head_dim, device=device, dtype=dtype) if qk_norm else None

    def _put(self, operator: Operator) -> None:
        super()._put(operator)

        def part(**changes: Any) -> GridOperator:
            return GridOperator(replace(operator, **changes), self.backend, self.algorithm)

        # The logits come with the mask: as many values as the operator has, and no queries and keys.
        given = {"query": None, "key": None, "relevance": Softmax(content=False)}
        self._given_logits = part(**given)
        self._given_weights = part(**given, output=None, output_scale=1.0)
        # For the weights alone the values may be anything; tokens are cheapest.
        cheap = {"value": Identity()} if operator.dim % operator.num_heads == 0 else {}
        self._weights = part(**cheap, output=None, output_scale=1.0)

    def reset_parameters(self) -> None:
        """As :meth:`OperatorModule.reset_parameters`; the norms of ``qk_norm`` too."""
        super().reset_parameters()
        for norm in (getattr(self, "q_norm", None), getattr(self, "k_norm", None)):
            if norm is not None and hasattr(norm, "reset_parameters"):
                norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grid: int | Grid | None = None,
    ) -> Tensor:
        """out [.., N, dim] of x [.., N, dim], registers first.

        Args:
            attn_mask: bool with True = may attend, or a float added to the logits; broadcastable to [.., H, N, N].
            is_causal: allowed on layers that are causal; those are so without it.
            grid: the tokens' grid where it is not the layer's own (:meth:`OperatorLayer.forward`).

        Raises:
            InputError: an array or the grid does not fit, or ``is_causal`` on a layer that is not.
            NotSupported: backend and algorithm can't run this.

        With ``attn_drop`` in training, ``torch.compile`` breaks its graph here, and refuses with ``fullgraph=True``.
        """
        if is_causal and getattr(self.operator.layout, "causal", False) is not True:
            raise InputError(
                "L4",
                "is_causal=True on a layer that is not causal",
                "its tables hold displacements to later tokens too",
                "Build the layer with causal=True, or give a lower triangular attn_mask",
            )
        part, mask = self._whole, attn_mask
        if self.q_norm is not None:
            part, mask = self._given_logits, self._masked_logits(x, attn_mask)
        if self.training and self.attn_drop.p > 0:
            out = self._projected(_beside_graphs(self, x, mask, grid))
        else:
            out = self._compute(part, x, mask=mask, grid=grid)
        dropped: Tensor = self.proj_drop(out)
        return dropped

    def _masked_logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled inner products of the normalised queries and keys, [.., H, N, N], with the mask."""
        params, heads = self.operator_parameters(), self.operator.num_heads
        found = []
        for role in ("query", "key"):
            encoded = nn.functional.linear(x, params[f"{role}.weight"].mT, params.get(f"{role}.bias"))
            found.append(self._encoded(role, torch.unflatten(encoded, -1, (heads, -1))).transpose(-2, -3))
        relevance = self.operator.relevance
        assert isinstance(relevance, Softmax)
        logits = self.operator.scale_of(relevance) * found[0] @ found[1].mT
        if mask is None:
            return logits
        return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask

    def _encoded(self, role: str, features: Tensor) -> Tensor:
        norm = {"query": self.q_norm, "key": self.k_norm}.get(role)
        return features if norm is None else norm(features)

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """:meth:`OperatorModule.step`, with ``proj_drop``; weights are not dropped, which ``eval()`` says."""
        if self.training and self.attn_drop.p > 0:
            raise InputError(
                "R1",
                f"step() in training with attn_drop={self.attn_drop.p}",
                "tokens one by one are for evaluation",
                "Call eval() first",
            )
        out, after = super().step(x, state)
        return (out if state is None else self.proj_drop(out)), after


def _with_dropped_weights(layer: RelativeAttention, x: Tensor, mask: Tensor | None, grid: int | Grid | None) -> Tensor:
    """Values added up with dropped weights, [.., N, H * D].

    The logarithms of what is left are taken as logits; the sum of what is left, by which their softmax divides, as a
    factor.
    """
    weights_of = layer._weights if layer.q_norm is None else layer._given_weights
    _, weights = layer._compute(weights_of, x, mask=mask, grid=grid, return_weights=True)
    kept = weights * layer.attn_drop(weights.new_ones(weights.shape))
    live, wide = kept > 0, kept if kept.dtype == torch.float64 else kept.float()
    logits = torch.where(live, torch.where(live, wide, 1.0).log(), -torch.inf)
    heads = layer._compute(layer._given_weights, x, mask=logits, grid=grid)
    factor = wide.sum(-1).transpose(-1, -2).unsqueeze(-1).to(heads.dtype)
    found: Tensor = (torch.unflatten(heads, -1, (layer.operator.num_heads, -1)) * factor).flatten(-2)
    return found


# A graph returns no weights.
_beside_graphs: Any = torch.compiler.disable(_with_dropped_weights)  # type: ignore[no-untyped-call]


class Translution1d(RelativeAttention):
    """Translution on a sequence (arXiv 2510.10060, section 3). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 1, False


class Translution2d(RelativeAttention):
    """Translution on an image (arXiv 2510.10060, section 3). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 2, False


class Translution3d(RelativeAttention):
    """Translution on a volume (arXiv 2510.10060, section 3). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 3, False


class AlphaTranslution1d(RelativeAttention):
    """Alpha-Translution on a sequence (arXiv 2510.10060, section 4). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 1, True


class AlphaTranslution2d(RelativeAttention):
    """Alpha-Translution on an image (arXiv 2510.10060, section 4). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 2, True


class AlphaTranslution3d(RelativeAttention):
    """Alpha-Translution on a volume (arXiv 2510.10060, section 4). Arguments as in :class:`RelativeAttention`."""

    axes, is_alpha = 3, True


def attention_class(layer: type[RelativeAttention], **settings: Any) -> type[RelativeAttention]:
    """A class that makes ``layer`` with these settings, for models that know of no grid: in timm
    ``attn_layer=attention_class(Translution2d, grid=(14, 14), registers=1)``.

    What it makes are plain instances of ``layer``: they are copied and pickled as such.
    """

    def make(cls: type[Any], *given: Any, **named: Any) -> RelativeAttention:  # noqa: ARG001 - the class, which is not made
        return layer(*given, **{**named, **settings})

    return type(layer.__name__, (layer,), {"__new__": make, "__doc__": layer.__doc__, "__module__": layer.__module__})
