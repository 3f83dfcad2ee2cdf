"""torch modules as operators, their weights as parameters: re-laid (flip, permute, reshape, cat), never scaled.

module                 operator                                     clauses
Conv1d/2d/3d           one value matrix per displacement, ones      L2 L5 E5 R2
ConvTranspose1d/2d/3d  the same with keys ``stride`` steps apart    L1 L2 E5 R2
AvgPool1d/2d/3d        identity values, mean                        L2 L5 E3 R3
MultiheadAttention     one matrix for every displacement, softmax   E4 R1 O2

A conversion has two halves: :func:`describe` reads a module's settings once into a hashable value, which then gives the
operator for an input size and the parameters for the module's present weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from translution.spec import Identity, Lattice, Ones, Operator, PerDisplacement
from translution.spec.presets import PaddingMode, average_pooling, self_attention, transposed_convolution

Grid = tuple[int, ...]
Weights = Mapping[str, Tensor]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOLINGS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
CONVERTIBLE = (*CONVOLUTIONS, *TRANSPOSED, *POOLINGS, nn.MultiheadAttention)


class ConversionError(ValueError):
    """A module that is no operator of this library; ``reason`` says why, ``remedy`` what to do."""

    def __init__(self, module: str, reason: str, remedy: str) -> None:
        self.module, self.reason, self.remedy = module, reason, remedy
        super().__init__(f"{module} can't be converted because {reason}. {remedy}.")


@dataclass(frozen=True, slots=True)
class Convolution:
    """The settings of a Conv1d/2d/3d. ``padding`` holds (before, after) for each axis."""

    in_channels: int
    out_channels: int
    kernel_size: Grid
    stride: Grid
    padding: tuple[tuple[int, int], ...]
    dilation: Grid
    groups: int
    bias: bool
    padding_mode: PaddingMode

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    def operator(self, grid: Grid) -> Operator:
        """The operator for inputs of spatial size ``grid``; :class:`SpecError` where the window does not fit."""
        return _convolution(self, grid)

    def parameters(self, weights: Weights) -> dict[str, Tensor]:
        """``weight`` [E, C / groups, *kernel]: table rows run against the taps (clause L2)."""
        weight, groups = weights["weight"], self.groups
        taps = weight.flip(tuple(range(2, weight.dim()))).permute(*range(2, weight.dim()), 1, 0)
        table = taps.reshape(-1, weight.shape[1], weight.shape[0])
        if groups > 1:
            table = table.reshape(*table.shape[:2], groups, -1).permute(0, 2, 1, 3)
        return {"value.table": table} | ({"output.bias": weights["bias"]} if self.bias else {})


@dataclass(frozen=True, slots=True)
class TransposedConvolution:
    """The settings of a ConvTranspose1d/2d/3d."""

    in_channels: int
    out_channels: int
    kernel_size: Grid
    stride: Grid
    padding: Grid
    output_padding: Grid
    dilation: Grid
    groups: int
    bias: bool

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    def operator(self, grid: Grid) -> Operator:
        """The operator for inputs of spatial size ``grid``."""
        return _transposed_convolution(self, grid)

    def output_padding_for(self, grid: Grid, output_size: Grid) -> Grid:
        """The ``output_padding`` that makes the result of an input of size ``grid`` as large as ``output_size``."""
        least = tuple(
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(grid, self.stride, self.padding, self.dilation, self.kernel_size, strict=True)
        )
        sizes = output_size[-self.rank :]
        if len(output_size) not in (self.rank, self.rank + 1, self.rank + 2) or not all(
            low <= size < low + s for low, size, s in zip(least, sizes, self.stride, strict=True)
        ):
            raise ValueError(
                f"output_size={output_size} for an input of size {grid}: each axis must be at least {least} and "
                f"less than stride={self.stride} above it"
            )
        return tuple(size - low for low, size in zip(least, sizes, strict=True))

    def parameters(self, weights: Weights) -> dict[str, Tensor]:
        """``weight`` [C, E / groups, *kernel]: table rows run with the taps."""
        weight, groups = weights["weight"], self.groups
        table = weight.permute(*range(2, weight.dim()), 0, 1).reshape(-1, weight.shape[0], weight.shape[1])
        if groups > 1:
            table = table.reshape(table.shape[0], groups, -1, table.shape[2])
        return {"value.table": table} | ({"output.bias": weights["bias"]} if self.bias else {})


@dataclass(frozen=True, slots=True)
class AveragePooling:
    """The settings of an AvgPool1d/2d/3d."""

    kernel_size: Grid
    stride: Grid
    padding: Grid
    count_include_pad: bool

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    def operator(self, grid: Grid, channels: int) -> Operator:
        """The operator for inputs of spatial size ``grid``."""
        return _average_pooling(self, grid, channels)

    def parameters(self, weights: Weights) -> dict[str, Tensor]:
        """None."""
        return {}


@dataclass(frozen=True, slots=True)
class Attention:
    """The settings of a MultiheadAttention.

    With ``separate_values`` the tokens y are keys and values side by side, [.., Nk, kdim + vdim], and each encoder has
    zero rows where it does not look. (An infinite value is then NaN to its key: rows that see it become NaN.)
    """

    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    bias: bool

    def operator(self, grid: Grid, key_grid: Grid, *, causal: bool = False, separate_values: bool = False) -> Operator:
        """The operator from ``grid`` queries to ``key_grid`` keys."""
        return _attention(self, grid, key_grid, causal, separate_values)

    def parameters(self, weights: Weights, *, separate_values: bool = False) -> dict[str, Tensor]:
        """``in_proj_weight`` [3 E, E] or ``q/k/v_proj_weight`` [E, C], transposed; ``in_proj_bias`` [3 E] in three."""
        if "in_proj_weight" in weights:
            query, key, value = weights["in_proj_weight"].chunk(3)
        else:
            query, key, value = (weights[f"{role}_proj_weight"] for role in "qkv")
        key, value = key.T, value.T
        if separate_values:
            key, value = (
                torch.cat([key, key.new_zeros(self.vdim, self.embed_dim)]),
                torch.cat([value.new_zeros(self.kdim, self.embed_dim), value]),
            )
        found = {"query.weight": query.T, "key.weight": key, "value.weight": value}
        found["output.weight"] = weights["out_proj.weight"].T
        if self.bias:
            names = ("query.bias", "key.bias", "value.bias")
            found |= dict(zip(names, weights["in_proj_bias"].chunk(3), strict=True))
            found["output.bias"] = weights["out_proj.bias"]
        return found


Description = Convolution | TransposedConvolution | AveragePooling | Attention


@lru_cache(maxsize=512)
def _convolution(conv: Convolution, grid: Grid) -> Operator:
    if len(grid) != conv.rank:
        raise ValueError(f"grid={grid} for a convolution with {conv.rank} spatial axes")
    out = tuple(
        (n + before + after - d * (k - 1) - 1) // s + 1
        for n, (before, after), d, k, s in zip(
            grid, conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    return Operator(
        layout=Lattice(
            out,
            key_grid=grid,
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            dilation=conv.dilation,
            padding=tuple(before for before, _ in conv.padding),
            boundary=conv.padding_mode,
        ),
        dim=conv.in_channels,
        num_heads=1,
        value=PerDisplacement(conv.out_channels, groups=conv.groups),
        relevance=Ones(),
        output=Identity(bias=True) if conv.bias else None,
    )


@lru_cache(maxsize=512)
def _transposed_convolution(conv: TransposedConvolution, grid: Grid) -> Operator:
    if len(grid) != conv.rank:
        raise ValueError(f"grid={grid} for a transposed convolution with {conv.rank} spatial axes")
    return transposed_convolution(
        grid,
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        output_padding=conv.output_padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=conv.bias,
    )


@lru_cache(maxsize=512)
def _average_pooling(pool: AveragePooling, grid: Grid, channels: int) -> Operator:
    if len(grid) != pool.rank:
        raise ValueError(f"grid={grid} for a pooling with {pool.rank} spatial axes")
    return average_pooling(
        grid,
        channels,
        pool.kernel_size,
        stride=pool.stride,
        padding=pool.padding,
        count_include_pad=pool.count_include_pad,
    )


@lru_cache(maxsize=512)
def _attention(attention: Attention, grid: Grid, key_grid: Grid, causal: bool, separate_values: bool) -> Operator:
    return self_attention(
        grid,
        attention.embed_dim,
        attention.num_heads,
        key_grid=None if key_grid == grid else key_grid,
        key_dim=attention.kdim + attention.vdim if separate_values else attention.kdim,
        causal=causal,
        qkv_bias=attention.bias,
        output_bias=attention.bias,
    )


def _axes(value: Any, rank: int) -> Grid:
    given = (value,) * rank if isinstance(value, int) else tuple(value)
    return given * rank if len(given) == 1 else given


def _check_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...], expected: set[str]) -> None:
    """Refuse a module that computes something else than its class says, or whose weights are not its own parameters."""
    name = type(module).__name__
    base = next(kind for kind in kinds if isinstance(module, kind))
    for method in ("forward", "_conv_forward"):
        if getattr(type(module), method, None) is not getattr(base, method, None):
            raise ConversionError(
                name,
                f"it overrides {method} of {base.__name__}",
                f"Convert a plain {base.__name__} that computes the same",
            )
    found = {key for key, _ in module.named_parameters(remove_duplicate=False)}
    if found != expected:
        raise ConversionError(
            name,
            f"its parameters are {sorted(found)} and not {sorted(expected)}",
            "Initialise it (a lazy module), or remove its parametrisation, weight norm or pruning",
        )
    for key, parameter in module.named_parameters(remove_duplicate=False):
        if torch.nn.parameter.is_lazy(parameter):
            raise ConversionError(
                name, f"{key} has no shape yet", "Run the model once, so that its lazy modules know it"
            )
        if not parameter.is_floating_point():
            raise ConversionError(name, f"{key} is {parameter.dtype}", "Use a real floating dtype")


def _describe_convolution(module: Any) -> Convolution:
    _check_plain(module, CONVOLUTIONS, {"weight"} | ({"bias"} if module.bias is not None else set()))
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif module.padding == "valid":
        padding = ((0, 0),) * len(module.kernel_size)
    else:
        padding = tuple((p, p) for p in module.padding)
    return Convolution(
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        padding,
        tuple(module.dilation),
        module.groups,
        module.bias is not None,
        module.padding_mode,
    )


def _describe_transposed(module: Any) -> TransposedConvolution:
    _check_plain(module, TRANSPOSED, {"weight"} | ({"bias"} if module.bias is not None else set()))
    return TransposedConvolution(
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        tuple(module.stride),
        tuple(module.padding),
        tuple(module.output_padding),
        tuple(module.dilation),
        module.groups,
        module.bias is not None,
    )


def _describe_pooling(module: Any) -> AveragePooling:
    _check_plain(module, POOLINGS, set())
    name = type(module).__name__
    if module.ceil_mode:
        raise ConversionError(name, "ceil_mode lets windows hang over the padding", "Use ceil_mode=False")
    if getattr(module, "divisor_override", None) is not None:
        raise ConversionError(
            name,
            "divisor_override divides by a number that is not the window's",
            "Use divisor_override=None and multiply the result",
        )
    rank = next(n for n, kind in enumerate(POOLINGS, 1) if isinstance(module, kind))
    kernel_size, stride, padding = (_axes(v, rank) for v in (module.kernel_size, module.stride, module.padding))
    return AveragePooling(kernel_size, stride, padding, module.count_include_pad)


def _describe_attention(module: nn.MultiheadAttention) -> Attention:
    name = type(module).__name__
    if module.bias_k is not None or module.bias_v is not None:
        raise ConversionError(
            name, "add_bias_kv appends a learned key that has no token", "Use add_bias_kv=False, or append a token"
        )
    if module.add_zero_attn:
        raise ConversionError(
            name,
            "add_zero_attn appends a key whose projection, not whose token, is zero",
            "Use add_zero_attn=False",
        )
    packed = module.in_proj_weight is not None
    expected = {"in_proj_weight"} if packed else {f"{role}_proj_weight" for role in "qkv"}
    bias = module.in_proj_bias is not None
    expected |= {"out_proj.weight"} | ({"in_proj_bias", "out_proj.bias"} if bias else set())
    _check_plain(module, (nn.MultiheadAttention,), expected)
    if type(module.out_proj).forward is not nn.Linear.forward:
        raise ConversionError(name, f"its out_proj is a {type(module.out_proj).__name__}", "Use a plain linear layer")
    if module.training and module.dropout > 0:
        raise ConversionError(
            name,
            f"dropout={module.dropout} acts on its weights in training mode",
            "Call eval() first, or set its dropout to 0",
        )
    return Attention(module.embed_dim, module.num_heads, module.kdim, module.vdim, bias)


def describe(module: nn.Module) -> Description:
    """The settings of a convertible module; :class:`ConversionError` for any other."""
    if isinstance(module, CONVOLUTIONS):
        return _describe_convolution(module)
    if isinstance(module, TRANSPOSED):
        return _describe_transposed(module)
    if isinstance(module, POOLINGS):
        return _describe_pooling(module)
    if isinstance(module, nn.MultiheadAttention):
        return _describe_attention(module)
    raise ConversionError(
        type(module).__name__,
        "it is none of Conv1d/2d/3d, ConvTranspose1d/2d/3d, AvgPool1d/2d/3d and MultiheadAttention",
        "Convert the convertible modules inside it, e.g. with translution.backends.torch.replacement.replace",
    )
