"""Convolution, transposed convolution and average pooling against ``torch.nn``."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from translution.backends.torch.conversion import describe
from translution.conformance.reductions import Draw, Peer, Reduction, ReductionCase, Weights, walk
from translution.spec import Lattice, Ones, Operator, PerDisplacement, Shared

MODES = ("zeros", "circular", "reflect", "replicate")
# Any, because each of them wants a tuple of its own length.
CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOL: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
EXTENTS = {1: (7, 9), 2: (4, 5), 3: (3, 4)}


def _on_grid(module: nn.Module, weights: Weights, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """``module`` on tokens [B, N, C] laid out on ``grid``, channels first, and back to tokens."""
    image = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *grid)
    result: Tensor = torch.func.functional_call(module, dict(weights), (image,))
    return result.flatten(2).transpose(1, 2)


def _module_case(draw: Draw, module: nn.Module, operator: Operator, grid: tuple[int, ...], note: str) -> ReductionCase:
    described = describe(module)

    def forward(weights: Weights, _x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return _on_grid(module, weights, y, grid)

    return draw.case(operator, Peer(draw.weights(module), forward, described.parameters), note=note)


def _convolution(rank: int, depthwise: bool, draw: Draw, seed: int) -> ReductionCase:
    mode, bias, grouping = walk(seed, 4, 2, 3)
    grid = draw.sizes(rank, EXTENTS[rank])
    size, stride = draw.sizes(rank, (1, 2, 3)), draw.sizes(rank, (1, 1, 2, 3))
    # Zeros and replication allow a padding wider than the kernel; circular and reflect only one within the input.
    padding = draw.sizes(rank, (0, 1, 2, 4) if MODES[mode] in ("zeros", "replicate") else (0, 1, 2))
    dilation = draw.sizes(rank, (1, 1, 2))
    dilation = tuple(
        d if d * (k - 1) < n + 2 * p else 1 for d, k, n, p in zip(dilation, size, grid, padding, strict=True)
    )
    channels = draw.pick((2, 4))
    groups = channels if depthwise else (1, 2, 1)[grouping]
    features = channels * draw.pick((1, 2)) if depthwise else draw.pick((2, 4, 6))
    settings: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation,
        "groups": groups, "bias": bool(bias), "padding_mode": MODES[mode],
    }  # fmt: skip
    module = CONV[rank - 1](channels, features, size, dtype=torch.float64, **settings)
    described: Any = describe(module)
    note = f"input {grid}, {channels} to {features} channels, kernel {size}, {settings}"
    return _module_case(draw, module, described.operator(grid), grid, note)


def _transposed(rank: int, draw: Draw, seed: int) -> ReductionCase:
    bias, grouping = walk(seed, 2, 2)
    grid, size = draw.sizes(rank, (2, 3)), draw.sizes(rank, (1, 2, 3))
    stride, dilation = draw.sizes(rank, (1, 2, 3) if rank < 3 else (1, 2)), draw.sizes(rank, (1, 1, 2))
    padding = tuple(
        draw.pick(range(d * (k - 1) + 1)) if n > 1 else 0 for d, k, n in zip(dilation, size, grid, strict=True)
    )
    padding = tuple(
        min(p, ((n - 1) * s + d * (k - 1)) // 2)
        for p, n, s, d, k in zip(padding, grid, stride, dilation, size, strict=True)
    )
    more = tuple(draw.pick(range(max(s, d))) for s, d in zip(stride, dilation, strict=True))
    channels, features = draw.pick((2, 4)), draw.pick((2, 4))
    settings: dict[str, Any] = {
        "stride": stride, "padding": padding, "output_padding": more,
        "dilation": dilation, "groups": 1 + grouping, "bias": bool(bias),
    }  # fmt: skip
    module = TRANSPOSED[rank - 1](channels, features, size, dtype=torch.float64, **settings)
    described: Any = describe(module)
    note = f"input {grid}, {channels} to {features} channels, kernel {size}, {settings}"
    return _module_case(draw, module, described.operator(grid), grid, note)


def _pooling(rank: int, draw: Draw, seed: int) -> ReductionCase:
    (include,) = walk(seed, 2)
    grid, size = draw.sizes(rank, EXTENTS[rank]), draw.sizes(rank, (1, 2, 3))
    stride, padding = draw.sizes(rank, (1, 2, 3)), tuple(draw.pick(range(k // 2 + 1)) for k in size)
    settings: dict[str, Any] = {"stride": stride, "padding": padding, "count_include_pad": bool(include)}
    module = POOL[rank - 1](size, **settings)
    described: Any = describe(module)
    channels = draw.pick((1, 3))
    note = f"input {grid}, {channels} channels, kernel {size}, {settings}"
    return _module_case(draw, module, described.operator(grid, channels), grid, note)


def _whole_image(draw: Draw, seed: int) -> ReductionCase:
    """Values as Translution has them, one matrix per displacement of the whole grid, but all weights 1."""
    rank, heads = (1 + digit for digit in walk(seed, 2, 2))
    grid = draw.sizes(rank, (3, 4, 5) if rank == 1 else (2, 3))
    channels, features, out = draw.pick((2, 3)), 2 * heads, draw.pick((1, 4))
    operator = Operator(
        Lattice(grid), channels, heads, PerDisplacement(features), relevance=Ones(), output=Shared(out, bias=True)
    )
    wide = CONV[rank - 1](
        channels, features, tuple(2 * n - 1 for n in grid), padding=tuple(n - 1 for n in grid), bias=False
    )
    point = CONV[rank - 1](features, out, 1)
    module = nn.Sequential(wide, point).to(torch.float64)
    described: Any = describe(wide)

    def forward(weights: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        return _on_grid(module, weights, x, grid)

    def relay(weights: Weights) -> dict[str, Tensor]:
        table = described.parameters({"weight": weights["0.weight"]})
        return {**table, "output.weight": weights["1.weight"].flatten(1).T, "output.bias": weights["1.bias"]}

    note = f"grid {grid}, {heads} heads, {channels} to {features} to {out} channels"
    return draw.case(operator, Peer(draw.weights(module), forward, relay), alone=True, note=note)


CONVOLUTIONS = (
    *(
        Reduction(
            f"convolution-{rank}d",
            f"convolution {rank}-D",
            f"torch.nn.Conv{rank}d",
            ("L1", "L2", "L5", "E5", "R2"),
            partial(_convolution, rank, False),
            ("conv",),
            exact=True,
        )
        for rank in (1, 2, 3)
    ),
    Reduction(
        "depthwise-convolution",
        "depthwise convolution",
        "torch.nn.Conv2d, groups=channels",
        ("L2", "E5", "R2"),
        partial(_convolution, 2, True),
        ("conv",),
        exact=True,
    ),
    *(
        Reduction(
            f"transposed-convolution-{rank}d",
            f"transposed convolution {rank}-D",
            f"torch.nn.ConvTranspose{rank}d",
            ("L1", "L2", "E5", "R2"),
            partial(_transposed, rank),
            ("conv",),
            exact=True,
        )
        for rank in (1, 2, 3)
    ),
    *(
        Reduction(
            f"average-pooling-{rank}d",
            f"average pooling {rank}-D",
            f"torch.nn.AvgPool{rank}d",
            ("L2", "L5", "E3", "R3"),
            partial(_pooling, rank),
        )
        for rank in (1, 2, 3)
    ),
    Reduction(
        "translution-weights-one",
        "Translution with weights 1 = convolution over the whole grid",
        "torch.nn.Conv1d/2d",
        ("L1", "L3", "E5", "R2", "O1", "O2"),
        _whole_image,
        exact=True,
    ),
)
