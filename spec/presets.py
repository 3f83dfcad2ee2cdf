"""Operators by name. Each is a function that returns an :class:`Operator`; nothing here computes.

``grid`` is the token grid; ``(length,)`` in 1-D, ``(height, width)`` in 2-D. On the command line the same presets are
written ``NAME1d:length=L,...``, ``NAME2d:height=H,width=W,...``, ``NAME3d:depth=D,height=H,width=W,...`` or
``NAME:grid=HxW,...``.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from translution.spec.checks import per_axis, positive
from translution.spec.classes import Clip, FarClasses, LogBuckets
from translution.spec.encoders import (
    Concat,
    Encoder,
    Identity,
    LowRank,
    LowRankOutput,
    Pairing,
    PerDisplacement,
    Rotary,
    Shared,
    Sum,
    Vectors,
)
from translution.spec.errors import require
from translution.spec.layout import Boundary, Lattice
from translution.spec.operator import Operator
from translution.spec.relevance import BiasTable, Mean, Mixture, Ones, QuadraticBias, SlopeBias, Softmax

Axes = int | tuple[int, ...]
Roles = Literal["qkv", "qk", "qv", "kv", "q", "k", "v"]
PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]


def _width(dim: int, num_heads: int, head_dim: int | None = None) -> int:
    """Features of all heads together: num_heads * head_dim, or dim where head_dim is not given."""
    positive("O1", "preset", dim=dim, num_heads=num_heads)
    if head_dim is not None:
        positive("O1", "preset", head_dim=head_dim)
        return num_heads * head_dim
    require(
        dim % num_heads == 0,
        "O1",
        f"dim={dim}, num_heads={num_heads}",
        "dim must be divisible by num_heads where head_dim is not given",
        "Change num_heads to a divisor of dim, or give head_dim",
    )
    return dim


def _check_roles(roles: str) -> None:
    require(
        roles in get_args(Roles),
        "E5",
        f"roles={roles!r}",
        f"roles is one of {', '.join(get_args(Roles))}: the relative ones",
        "Choose one of these",
    )


def _extents(grid: tuple[int, ...]) -> tuple[int, ...]:
    return per_axis("grid", grid, len(grid) if isinstance(grid, (tuple, list)) else 1, 1)


def translution(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    roles: Roles = "qkv",
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    kernel_size: Axes | None = None,
    dilation: Axes = 1,
    boundary: Boundary = "absent",
    far: FarClasses | None = None,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """Translution (arXiv 2510.10060, section 3): a matrix per displacement for each role named in ``roles``.

    Parameters: ``|roles| T C C' + (3 - |roles|) C C' + C' C + C`` with T classes, C = dim, C' = num_heads * head_dim.
    """
    _check_roles(roles)
    width = _width(dim, num_heads, head_dim)

    def encoder(role: str) -> Encoder:
        kind = PerDisplacement if role in roles else Shared
        return kind(width, bias=qkv_bias)

    return Operator(
        layout=Lattice(
            grid,
            registers=registers,
            causal=causal,
            kernel_size=kernel_size,
            dilation=dilation,
            boundary=boundary,
            far=far,
        ),
        dim=dim,
        num_heads=num_heads,
        query=encoder("q"),
        key=encoder("k"),
        value=encoder("v"),
        output=Shared(dim, bias=output_bias),
    )


def alpha_translution(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    rank: int = 8,
    head_dim: int | None = None,
    roles: Roles = "qkv",
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    kernel_size: Axes | None = None,
    dilation: Axes = 1,
    boundary: Boundary = "absent",
    far: FarClasses | None = None,
    rotary: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """Alpha-Translution (arXiv 2510.10060, section 4): attention averaged with a low-rank relative branch.

    ``rank`` is the inner width per head (C1 = num_heads * rank). Queries and keys concatenate a shared and a low-rank
    part, values too, and the output adds the two; scale and output are halved where both parts are present.
    ``rotary`` turns the shared queries and keys, ``qkv_bias`` gives the shared parts biases.
    """
    _check_roles(roles)
    positive("E6", "alpha_translution", rank=rank)
    width = _width(dim, num_heads, head_dim)
    inner = num_heads * rank
    relative_logits = "q" in roles or "k" in roles

    def shared() -> Encoder:
        plain = Shared(width, bias=qkv_bias)
        return Rotary(plain) if rotary else plain

    def logit_encoder(role: str) -> Encoder:
        if not relative_logits:
            return shared()
        return Concat((shared(), LowRank(inner) if role in roles else Shared(inner)))

    scale = float(width // num_heads) ** -0.5
    return Operator(
        layout=Lattice(
            grid,
            registers=registers,
            causal=causal,
            kernel_size=kernel_size,
            dilation=dilation,
            boundary=boundary,
            far=far,
        ),
        dim=dim,
        num_heads=num_heads,
        query=logit_encoder("q"),
        key=logit_encoder("k"),
        value=Concat((Shared(width, bias=qkv_bias), LowRank(inner))) if "v" in roles else Shared(width, bias=qkv_bias),
        relevance=Softmax(scale=scale / 2 if relative_logits else scale),
        output=LowRankOutput(inner, dim, bias=output_bias) if "v" in roles else Shared(dim, bias=output_bias),
        output_scale=0.5 if "v" in roles else 1.0,
    )


def convolution(
    grid: tuple[int, ...],
    in_channels: int,
    out_channels: int,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    padding: Axes = 0,
    dilation: Axes = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: PaddingMode = "zeros",
) -> Operator:
    """Convolution as ``torch.nn.Conv*d`` computes it, on a fixed input ``grid``: a matrix per displacement, relevance
    ones.

    Kernel tap t along an axis stands at displacement ``padding - t * dilation``: table rows run against the taps.
    """
    require(
        padding_mode in get_args(PaddingMode),
        "L5",
        f"padding_mode={padding_mode!r}",
        f"padding_mode is one of {', '.join(get_args(PaddingMode))}",
        "Choose one of these",
    )
    grid = _extents(grid)
    rank = len(grid)
    sizes, steps = per_axis("kernel_size", kernel_size, rank, 1), per_axis("stride", stride, rank, 1)
    pads, gaps = per_axis("padding", padding, rank, 0), per_axis("dilation", dilation, rank, 1)
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(grid, pads, gaps, sizes, steps, strict=True)
    )
    require(
        min(out) >= 1,
        "L2",
        f"grid={grid}, kernel_size={sizes}, padding={pads}, dilation={gaps}",
        "the window must fit into the padded grid at least once",
        "Use a smaller kernel_size or dilation, or more padding",
    )
    return Operator(
        layout=Lattice(
            out, key_grid=grid, kernel_size=sizes, stride=steps, dilation=gaps, padding=pads, boundary=padding_mode
        ),
        dim=in_channels,
        num_heads=1,
        value=PerDisplacement(out_channels, groups=groups),
        relevance=Ones(),
        output=Identity(bias=True) if bias else None,
    )


def transposed_convolution(
    grid: tuple[int, ...],
    in_channels: int,
    out_channels: int,
    kernel_size: Axes,
    *,
    stride: Axes = 1,
    padding: Axes = 0,
    output_padding: Axes = 0,
    dilation: Axes = 1,
    groups: int = 1,
    bias: bool = True,
) -> Operator:
    """Transposed convolution as ``torch.nn.ConvTranspose*d`` computes it: keys stand ``stride`` apart on the output's
    lattice.

    Kernel tap t along an axis stands at displacement ``t * dilation - padding``: table rows run with the taps.
    """
    grid = _extents(grid)
    rank = len(grid)
    sizes, steps = per_axis("kernel_size", kernel_size, rank, 1), per_axis("stride", stride, rank, 1)
    pads, gaps = per_axis("padding", padding, rank, 0), per_axis("dilation", dilation, rank, 1)
    more = per_axis("output_padding", output_padding, rank, 0)
    out = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + o + 1
        for n, s, p, d, k, o in zip(grid, steps, pads, gaps, sizes, more, strict=True)
    )
    require(
        min(out) >= 1,
        "L2",
        f"grid={grid}, kernel_size={sizes}, padding={pads}",
        "the result has at least one position",
        "Use a smaller padding",
    )
    return Operator(
        layout=Lattice(
            out,
            key_grid=grid,
            kernel_size=sizes,
            key_stride=steps,
            dilation=gaps,
            padding=tuple(d * (k - 1) - p for d, k, p in zip(gaps, sizes, pads, strict=True)),
        ),
        dim=in_channels,
        num_heads=1,
        value=PerDisplacement(out_channels, groups=groups),
        relevance=Ones(),
        output=Identity(bias=True) if bias else None,
    )


def average_pooling(
    grid: tuple[int, ...],
    channels: int,
    kernel_size: Axes,
    *,
    stride: Axes | None = None,
    padding: Axes = 0,
    count_include_pad: bool = True,
) -> Operator:
    """Average pooling as ``torch.nn.AvgPool*d`` computes it (ceil_mode=False): identity values, relevance mean."""
    conv = convolution(
        grid,
        channels,
        channels,
        kernel_size,
        stride=kernel_size if stride is None else stride,
        padding=padding,
        groups=channels,
        bias=False,
    ).layout
    assert isinstance(conv, Lattice)
    return Operator(
        layout=Lattice(
            conv.grid,
            key_grid=conv.key_grid,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            boundary="zeros" if count_include_pad else "absent",
        ),
        dim=channels,
        num_heads=1,
        value=Identity(),
        relevance=Mean(),
    )


def self_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    key_grid: tuple[int, ...] | None = None,
    key_dim: int | None = None,
    head_dim: int | None = None,
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    qkv_bias: bool = False,
    output_bias: bool = True,
    out_features: int | None = None,
    scale: float | None = None,
) -> Operator:
    """Multi-head attention (Vaswani et al. 2017): one matrix for every displacement. ``key_grid`` makes it
    cross-attention.
    """
    width = _width(dim, num_heads, head_dim)
    return Operator(
        layout=Lattice(grid, key_grid=key_grid, registers=registers, causal=causal),
        dim=dim,
        key_dim=key_dim,
        num_heads=num_heads,
        query=Shared(width, bias=qkv_bias),
        key=Shared(width, bias=qkv_bias),
        value=Shared(width, bias=qkv_bias),
        relevance=Softmax(scale=scale),
        output=Shared(dim if out_features is None else out_features, bias=output_bias),
    )


def neighborhood_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    kernel_size: Axes,
    dilation: Axes = 1,
    causal: bool | tuple[bool, ...] = False,
    bias: bool = False,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """Neighborhood attention (Hassani et al. 2023): a window that shifts to stay inside the grid; ``bias`` adds a
    BiasTable.
    """
    width = _width(dim, num_heads)
    return Operator(
        layout=Lattice(grid, causal=causal, kernel_size=kernel_size, dilation=dilation, boundary="shift"),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width, bias=qkv_bias),
        key=Shared(width, bias=qkv_bias),
        value=Shared(width, bias=qkv_bias),
        relevance=Softmax(bias=BiasTable() if bias else None),
        output=Shared(dim, bias=output_bias),
    )


def rope_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    base: float = 10000.0,
    pairing: Pairing = "half",
    head_dim: int | None = None,
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """Attention with rotary positions (Su et al. 2021), on a lattice of any rank; registers are not rotated."""
    width = _width(dim, num_heads, head_dim)
    return Operator(
        layout=Lattice(grid, registers=registers, causal=causal),
        dim=dim,
        num_heads=num_heads,
        query=Rotary(Shared(width, bias=qkv_bias), base=base, pairing=pairing),
        key=Rotary(Shared(width, bias=qkv_bias), base=base, pairing=pairing),
        value=Shared(width, bias=qkv_bias),
        output=Shared(dim, bias=output_bias),
    )


def shaw_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    max_distance: int | None = None,
    values: bool = True,
    shared_heads: bool = True,
    head_dim: int | None = None,
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """A vector per displacement added to keys and values (Shaw et al. 2018, equations 3 and 4).

    With ``values=False`` on a 2-D grid: the relative logits of BoTNet and HaloNet (Srinivas et al. 2021, Vaswani et
    al. 2021), whose row and column vectors add up to one vector per displacement.
    """
    width = _width(dim, num_heads, head_dim)
    relative = Sum((Shared(width, bias=qkv_bias), Vectors(width, shared_heads=shared_heads)))
    return Operator(
        layout=Lattice(
            grid, registers=registers, causal=causal, far=None if max_distance is None else Clip(max_distance)
        ),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width, bias=qkv_bias),
        key=relative,
        value=relative if values else Shared(width, bias=qkv_bias),
        output=Shared(dim, bias=output_bias),
    )


def swin_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    qkv_bias: bool = True,
) -> Operator:
    """Attention inside one window with a bias per displacement and head (Liu et al. 2021, equation 4); ``grid`` is
    the window. Pairs with a register have biases of their own.
    """
    width = _width(dim, num_heads, head_dim)
    return Operator(
        layout=Lattice(grid, registers=registers, causal=causal),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width, bias=qkv_bias),
        key=Shared(width, bias=qkv_bias),
        value=Shared(width, bias=qkv_bias),
        relevance=Softmax(bias=BiasTable()),
        output=Shared(dim, bias=True),
    )


def t5_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    num_buckets: int = 32,
    max_distance: int = 128,
    causal: bool = False,
) -> Operator:
    """Attention with log-bucketed biases and no scale (Raffel et al. 2020). ``num_buckets`` counts as T5 does: both
    directions.
    """
    width = _width(dim, num_heads, head_dim)
    positive("L7", "t5_attention", num_buckets=num_buckets)
    return Operator(
        layout=Lattice(grid, causal=causal, far=LogBuckets(num_buckets if causal else num_buckets // 2, max_distance)),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width),
        key=Shared(width),
        value=Shared(width),
        relevance=Softmax(scale=1.0, bias=BiasTable()),
        output=Shared(dim),
    )


def alibi_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    slopes: Sequence[float] | None = None,
    causal: bool = True,
    qkv_bias: bool = False,
    output_bias: bool = True,
) -> Operator:
    """Attention with a linear penalty on distance (Press et al. 2022)."""
    width = _width(dim, num_heads)
    return Operator(
        layout=Lattice(grid, causal=causal),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width, bias=qkv_bias),
        key=Shared(width, bias=qkv_bias),
        value=Shared(width, bias=qkv_bias),
        relevance=Softmax(bias=SlopeBias(None if slopes is None else tuple(slopes))),
        output=Shared(dim, bias=output_bias),
    )


def convit_attention(
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    registers: int = 0,
    causal: bool | tuple[bool, ...] = False,
    output_bias: bool = True,
) -> Operator:
    """Gated positional self-attention (d'Ascoli et al. 2021, equation 7): content and position mixed by a gate per
    head. Pairs with a register have the positional score 0.
    """
    width = _width(dim, num_heads, head_dim)
    return Operator(
        layout=Lattice(grid, registers=registers, causal=causal),
        dim=dim,
        num_heads=num_heads,
        query=Shared(width),
        key=Shared(width),
        value=Shared(width),
        relevance=Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias())),
        output=Shared(dim, bias=output_bias),
    )
