"""Sizes of real models: what a kernel does with its second tile, its fifth head or its hundredth feature."""

from __future__ import annotations

import math

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.laws.sight import gradients
from translution.conformance.operator_draws import draw_operator
from translution.conformance.strategies import draw_question
from translution.spec import (
    BiasTable,
    Boundary,
    Clip,
    Concat,
    Encoder,
    Lattice,
    Layout,
    LowRank,
    Mean,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
)

# Beside and beyond the tiles of 64 and 128 that kernels are made of.
TOKENS = (65, 129, 64, 200, 63, 128, 257, 127)
HEADS = (4, 8, 5, 16)
HEAD_DIMS = (32, 64, 80, 128, 33)
SMALL = ("grid", "registers", "causal-line", "window", "window-zeros", "clip", "strided")


def _attention(layout: Layout, features: int, heads: int, *, relative: bool = False) -> Operator:
    encoder: Encoder = PerDisplacement(features) if relative else Shared(features)
    relevance = Softmax(bias=BiasTable() if relative else None)
    return Operator(layout, features, heads, encoder, encoder, encoder, relevance)


def _convolution(layout: Layout, channels: int, features: int, heads: int) -> Operator:
    return Operator(layout, channels, heads, PerDisplacement(features), relevance=Ones())


def _many_heads(draws: Draws) -> Operator:
    heads = draws.walk(HEADS)
    plain = _attention(Lattice((2, 3)), 2 * heads, heads)
    return draws.walk((draw_operator(draws, layouts=SMALL, heads=heads), plain))


def _wide_heads(draws: Draws) -> Operator:
    heads, width = draws.pick((1, 2)), draws.walk(HEAD_DIMS)
    layout = draws.pick((Lattice((2, 2)), Lattice((3,), causal=True), Lattice((4,), far=Clip(1))))
    low = LowRank(4, heads * width)
    beside = Concat((Shared(heads), LowRank(4, heads * (width - 1))))
    narrow = Operator(layout, 6, heads, beside, low, low)
    return draws.walk(
        (_attention(layout, heads * width, heads), narrow, _attention(layout, heads * width, heads, relative=True))
    )


def _many_keys(draws: Draws) -> Operator:
    keys = draws.walk(TOKENS)
    layout = draws.walk(
        (Lattice((2,), key_grid=(keys,)), Lattice((2,), key_grid=(keys,), offset=keys - 3, causal=True))
    )
    return draws.walk((_attention(layout, 8, 2), _attention(layout, 4, 2), _attention(layout, 4, 2, relative=True)))


def _many_queries(draws: Draws) -> Operator:
    layout = Lattice((draws.walk(TOKENS),), key_grid=(3,))
    summed = Operator(layout, 4, 2, Shared(6), relevance=Mean())
    return draws.walk((_attention(layout, 4, 2), summed, _attention(layout, 4, 2, relative=True)))


def _many_tokens(draws: Draws) -> Operator:
    tokens = draws.walk((65, 70, 66))
    layout = draws.walk(
        (Lattice((tokens,)), Lattice((tokens,), causal=True), Lattice((8, 9), far=Clip(2), registers=1))
    )
    return draws.walk((_attention(layout, 4, 2), _attention(layout, 4, 2, relative=layout.num_classes < 50)))


def _wide_windows(draws: Draws) -> Operator:
    size, step = draws.walk((7, 5, 9, 6, 5)), draws.pick((1, 1, 3))
    boundaries: tuple[Boundary, ...] = ("zeros", "absent", "circular", "replicate")
    boundary = draws.pick(boundaries)
    layout = draws.walk(
        (
            Lattice((11,), kernel_size=size, padding=size // 2 * step, dilation=step, boundary=boundary),
            Lattice((5, 6), kernel_size=(5, 7), padding=(2, 3), boundary=boundary),
            Lattice((4,), key_grid=(23,), kernel_size=size, stride=draws.pick((4, 5)), padding=1, boundary="zeros"),
            Lattice((12,), kernel_size=5, dilation=draws.pick((3, 4)), padding=8),
        )
    )
    relative = PerDisplacement(4)
    window = Operator(layout, 3, 2, relative, relative, relative, Softmax())
    return draws.walk(
        (_convolution(layout, 3, 4, 2), window, _convolution(layout, 6, 4, 2), _convolution(layout, 3, 4, 1))
    )


def _many_channels(draws: Draws) -> Operator:
    channels = draws.walk((37, 48, 96, 200))
    layout = Lattice((2, 3), kernel_size=3, boundary="zeros")
    grouped = Operator(layout, 48, 2, PerDisplacement(96, groups=4), relevance=Ones())
    mixed = Operator(Lattice((2, 2)), channels, 2, Shared(6), Shared(4), Shared(4), output=Shared(40, bias=True))
    tied = Operator(Lattice((6,), far=Clip(0)), 4, 2, PerDisplacement(4, groups=2), relevance=Mean())
    return draws.walk((_convolution(layout, channels, 6, 2), mixed, tied, grouped))


def _many_axes(draws: Draws) -> Operator:
    layout = draws.walk(
        (Lattice((1, 2, 1, 2, 2)), Lattice((2, 1, 2, 1, 1, 2), far=Clip(0)), Lattice((2,) * 5, kernel_size=1))
    )
    return draws.walk((_attention(layout, 4, 2), _attention(layout, 4, 2, relative=True)))


def _many_registers(draws: Draws) -> Operator:
    layout = Lattice((2, 2), registers=draws.walk((4, 6)), causal=draws.some())
    return draws.walk((_attention(layout, 4, 2), _attention(layout, 4, 2, relative=True)))


def _many_items(draws: Draws) -> Operator:
    small = draws.pick((Lattice((2, 2)), Lattice((3,), causal=True)))
    window = Lattice((4,), kernel_size=3, boundary="zeros")
    return draws.walk((_attention(small, 4, 2), _convolution(window, 2, 4, 2), _attention(small, 4, 2, relative=True)))


_KINDS = (
    _many_keys, _many_heads, _wide_windows, _wide_heads, _many_queries, _many_channels, _many_items, _many_tokens,
    _many_keys, _many_axes, _wide_windows, _many_registers, _many_heads,
)  # fmt: skip
# No divisor in common with the number of kinds: every kind meets every number of items.
_BATCHES = ((2,), (65,), (2, 1, 2), (1,), (40,), (3, 1, 1, 2))
_SCALES = (1.0, 2.0**-8, 1.0, 1.0, 2.0**4)


@law(
    "SIZES",
    clauses=("L1", "E2", "R1", "R2", "M1", "M2", "D2"),
    kills=(
        "keys-after-tile-dropped", "mask-after-tile-ignored", "heads-after-fourth", "head-dim-truncated",
        "wide-windows-cut", "items-after-thirty-second", "channels-after-thirty-second", "small-tokens-flushed",
    ),
    quick=18,
    full=78,
)  # fmt: skip
def sizes(trial: Trial) -> None:
    """Results and gradients are the exact ones, up to the error bound of each element, at sizes of real models: up to
    257 tokens, 16 heads, 128 features a head, 200 channels, windows of 9, 65 items, 6 axes, tokens of 1/256 or 16.
    """
    draws = trial.draws
    operator = draws.walk(_KINDS)(draws)
    items = draws.walk(_BATCHES)
    pairs = operator.layout.num_queries * operator.layout.num_keys
    batch = items if pairs * math.prod(items) < 1200 else (2,) if pairs < 600 else (1,)
    question = draw_question(trial.draws, trial.dtype, operator=operator, batch=batch, cotangent=True)
    scale = draws.walk(_SCALES)
    question = question.but(x=scale * question.x, y=None if question.y is None else scale * question.y)
    out = trial.run(question).out
    exact = trial.budget(question)
    results = (exact.value, *exact.gradient_values.values())
    if trial.dtype == "float16" and max(float(np.abs(part).max(initial=0)) for part in results) > 2.0**15:
        draws.reject("large tokens in long sums, which float16 can't hold")
    trial.within("out", out, exact.value, exact.out)
    found = gradients(trial, question)
    for name, gradient in () if found is None else found.gradients.items():
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])
