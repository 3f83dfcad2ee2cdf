"""The reference against other people's convolutions and attention, against examples by hand, and its corner cases."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import translution
from translution.spec import (
    BiasTable,
    Boundary,
    Identity,
    Lattice,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    presets,
)
from translution.spec.encoders import Pairing

Array = npt.NDArray[Any]
Params = Mapping[str, Array]
UNIT = 2.0**-53


def run(operator: Operator, params: Params, x: Array, y: Array | None = None, **options: Any) -> Any:
    return translution.run(operator, params, x, y, backend="reference", **options)


def small_integers(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-4, 5, shape).astype(np.float64)


def normal_params(operator: Operator, rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.normal(size=shape) for name, shape in operator.parameters.items()}


# Tracers: what comes out names the displacement it came through.


def test_value_row_names_query_minus_key() -> None:
    height, width = 2, 3
    operator = Operator(Lattice((height, width)), 1, 1, PerDisplacement(1), relevance=Ones())
    codes = np.arange(1.0, 1 + operator.layout.num_classes)
    params = {"value.table": codes.reshape(-1, 1, 1)}
    sites = list(itertools.product(range(height), range(width)))
    for j, (row_j, column_j) in enumerate(sites):
        x = np.zeros((6, 1))
        x[j] = 1
        expected = [(r - row_j + height - 1) * (2 * width - 1) + c - column_j + width - 1 + 1 for r, c in sites]
        assert run(operator, params, x)[:, 0].tolist() == expected


@pytest.mark.parametrize("role", ["query", "key"])
def test_saturated_softmax_names_the_winning_displacement(role: str) -> None:
    # The query's table is indexed by delta, the key's by -delta; codes are 1000 apart, so that the largest takes all.
    length = 5
    operator = presets.translution((length,), 1, 1, roles="qkv", output_bias=False)
    codes = np.array([3, 8, 1, 5, 9, 2, 7, 4, 6], dtype=np.float64)
    table = codes.reshape(-1, 1, 1)
    params = {f"{name}.table": np.ones((9, 1, 1)) for name in ("query", "key")} | {f"{role}.table": 1000 * table}
    params |= {"value.table": np.arange(-4.0, 5.0).reshape(-1, 1, 1), "output.weight": np.ones((1, 1))}
    sign = 1 if role == "query" else -1
    expected = [max((i - j for j in range(length)), key=lambda d: codes[sign * d + 4]) for i in range(length)]
    assert run(operator, params, np.ones((length, 1)))[:, 0].tolist() == expected


def test_bias_row_names_query_minus_key() -> None:
    operator = Operator(Lattice((3,)), 1, 1, Identity(), relevance=Softmax(content=False, bias=BiasTable()))
    bias = np.array([[0.0, 0.0, 0.0, 1000.0, 2000.0]])
    # Everybody looks as far back as possible; the first token's own key and those after it are all equal to it.
    out = run(operator, {"relevance.bias": bias}, np.array([[3.0], [6.0], [9.0]]))
    assert out[:, 0].tolist() == [6.0, 3.0, 3.0]


# Other people's operators, on small integers: every product and sum is exact, so the results are equal.

CONVOLUTIONS = [
    {"grid": (7,), "kernel_size": 3, "stride": 2, "padding": 5, "dilation": 2, "groups": 1, "padding_mode": "zeros"},
    {"grid": (6,), "kernel_size": 4, "stride": 1, "padding": 3, "dilation": 1, "groups": 2, "padding_mode": "circular"},
    {"grid": (5, 4), "kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (1, 2), "groups": 4},
    {"grid": (4, 3), "kernel_size": (3, 2), "stride": 1, "padding": (3, 1), "dilation": 2, "padding_mode": "reflect"},
    {"grid": (3, 4), "kernel_size": 3, "stride": 2, "padding": 2, "dilation": 1, "padding_mode": "replicate"},
    {"grid": (3, 2, 4), "kernel_size": (2, 1, 3), "stride": (1, 1, 2), "padding": (1, 0, 2), "dilation": (1, 1, 2)},
]


@pytest.mark.parametrize(
    "case", CONVOLUTIONS, ids=lambda case: f"{len(case['grid'])}d-{case.get('padding_mode', 'zeros')}"
)
def test_convolution_is_torchs(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    options = {"groups": 1, "padding_mode": "zeros"} | case
    grid, rank = options.pop("grid"), len(case["grid"])
    if options["padding_mode"] == "reflect":
        options["padding"] = (3, 1)
    module = getattr(torch.nn, f"Conv{rank}d")(4, 8, **options).double()
    weight, bias = small_integers(rng, *module.weight.shape), small_integers(rng, 8)
    groups, taps = options["groups"], math.prod(module.kernel_size)
    operator = presets.convolution(grid, 4, 8, **options)
    # [out, in / groups, taps] to [rows against the taps, groups, in / groups, out / groups].
    table = weight.reshape(groups, 8 // groups, 4 // groups, taps)[..., ::-1].transpose(3, 0, 2, 1)
    params = {"value.table": table.reshape(operator.parameters["value.table"]), "output.bias": bias}
    x = small_integers(rng, 2, 4, *grid)
    out = run(operator, params, np.ones((2, operator.layout.num_queries, 4)), x.reshape(2, 4, -1).swapaxes(1, 2))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.copy_(torch.from_numpy(bias))
        expected = module(torch.from_numpy(x)).flatten(2).mT.numpy()
    assert np.array_equal(out, expected)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((5,), {"kernel_size": 4, "stride": 3, "padding": 2, "output_padding": 1, "dilation": 2, "groups": 2}),
        ((3, 2), {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1), "output_padding": (1, 0), "groups": 1}),
        ((2, 2, 1), {"kernel_size": 2, "stride": (1, 2, 2), "padding": 0, "groups": 4}),
    ],
    ids=["1d", "2d", "3d"],
)
def test_transposed_convolution_is_torchs(grid: tuple[int, ...], options: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    module = getattr(torch.nn, f"ConvTranspose{len(grid)}d")(4, 8, **options).double()
    weight, bias = small_integers(rng, *module.weight.shape), small_integers(rng, 8)
    groups, taps = options["groups"], math.prod(module.kernel_size)
    operator = presets.transposed_convolution(grid, 4, 8, **options)
    table = weight.reshape(groups, 4 // groups, 8 // groups, taps).transpose(3, 0, 1, 2)
    params = {"value.table": table.reshape(operator.parameters["value.table"]), "output.bias": bias}
    x = small_integers(rng, 2, 4, *grid)
    out = run(operator, params, np.ones((2, operator.layout.num_queries, 4)), x.reshape(2, 4, -1).swapaxes(1, 2))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(weight))
        module.bias.copy_(torch.from_numpy(bias))
        expected = module(torch.from_numpy(x)).flatten(2).mT.numpy()
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("include", [True, False])
def test_average_pooling_is_torchs(include: bool) -> None:
    # Windows of 1, 2 or 4 pixels: the mean of integers is exact.
    operator = presets.average_pooling((4, 6), 3, 2, padding=1, count_include_pad=include)
    x = small_integers(np.random.default_rng(3), 2, 3, 4, 6)
    out = run(operator, {}, np.zeros((2, operator.layout.num_queries, 3)), x.reshape(2, 3, -1).swapaxes(1, 2))
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(x), 2, padding=1, count_include_pad=include)
    assert np.array_equal(out, pooled.flatten(2).mT.numpy())


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal: bool) -> None:
    rng = np.random.default_rng(4)
    tokens, dim, heads = 5, 6, 2
    operator = presets.self_attention((tokens,), dim, heads, causal=causal, qkv_bias=True)
    params = normal_params(operator, rng)
    x = rng.normal(size=(2, tokens, dim))
    module = torch.nn.MultiheadAttention(dim, heads, batch_first=True).double()
    with torch.no_grad():
        projections = np.concatenate([params[f"{role}.weight"].T for role in ("query", "key", "value")])
        module.in_proj_weight.copy_(torch.from_numpy(projections))
        module.in_proj_bias.copy_(
            torch.from_numpy(np.concatenate([params[f"{role}.bias"] for role in ("query", "key", "value")]))
        )
        module.out_proj.weight.copy_(torch.from_numpy(params["output.weight"].T.copy()))
        module.out_proj.bias.copy_(torch.from_numpy(params["output.bias"]))
    # torch counts the other way: True is masked.
    mask = torch.ones(tokens, tokens).triu(1).bool() if causal else None
    tensor = torch.from_numpy(x)
    expected, weights = module(tensor, tensor, tensor, attn_mask=mask, average_attn_weights=False)
    out, found = run(operator, params, x, return_weights=True)

    # Worst case of two computations that sum in any order, from absolute values (Higham 2002, section 3.1).
    sizes = {
        role: abs(x) @ abs(params[f"{role}.weight"]) + abs(params[f"{role}.bias"]) for role in ("query", "key", "value")
    }
    terms = 2 * (dim + 2) + dim // heads + 4
    logit_error = terms * UNIT * (dim // heads) * sizes["query"].max() * sizes["key"].max()
    weight_error = 2 * math.expm1(2 * logit_error + (tokens + 8) * UNIT)
    value_error = tokens * sizes["value"].max() * (weight_error + 2 * (dim + tokens + 4) * UNIT)
    bound = value_error * abs(params["output.weight"]).sum(axis=0).max() + 2 * (dim + 2) * UNIT * abs(out).max()
    assert bound < 1e-9
    assert np.abs(found - weights.detach().numpy()).max() <= weight_error
    assert np.abs(out - expected.detach().numpy()).max() <= bound


# Corners


def attention(registers: int = 0, **options: Any) -> tuple[Operator, dict[str, Array], Array]:
    operator = presets.translution((2, 2), 4, 2, registers=registers, **options)
    rng = np.random.default_rng(5)
    return operator, normal_params(operator, rng), rng.normal(size=(2, operator.layout.num_keys, 4))


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e308])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_key_is_absent(kind: str, garbage: float) -> None:
    operator, params, x = attention(registers=1)
    live = np.ones((5, 5), dtype=bool)
    live[:, 3] = False
    live[3] = False
    mask = live if kind == "bool" else np.where(live, 0.5, -np.inf)
    poisoned = x.copy()
    poisoned[:, 3] = garbage
    cotangent = np.random.default_rng(6).normal(size=x.shape)
    clean = translution.vjp(operator, params, x, cotangent=cotangent, mask=mask, backend="reference")
    found = translution.vjp(operator, params, poisoned, cotangent=cotangent, mask=mask, backend="reference")
    assert np.array_equal(found[0], clean[0])
    assert np.array_equal(found[1].x, clean[1].x)
    assert not found[1].x[:, 3].any()
    for name, gradient in clean[1].params.items():
        assert np.array_equal(found[1].params[name], gradient)


def test_row_without_live_key_is_zero_before_the_output() -> None:
    operator, params, x = attention()
    mask = np.ones((4, 4), dtype=bool)
    mask[2] = False
    out, weights = run(operator, params, x, mask=mask, return_weights=True)
    assert np.array_equal(out[:, 2], np.broadcast_to(params["output.bias"], (2, 4)))
    assert not weights[:, :, 2].any()
    cotangent = np.zeros_like(out)
    cotangent[:, 2] = 1
    _, gradients = translution.vjp(operator, params, x, cotangent=cotangent, mask=mask, backend="reference")
    assert not gradients.x.any()
    assert {name for name, value in gradients.params.items() if value.any()} == {"output.bias"}


def test_nan_reaches_exactly_the_rows_that_see_it() -> None:
    operator = presets.translution((6,), 4, 2, kernel_size=3)
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2, 6, 4))
    x[0, 4] = np.nan
    out = run(operator, normal_params(operator, rng), x)
    assert np.isnan(out).all(axis=2).tolist() == [[False, False, False, True, True, True], [False] * 6]
    assert np.isnan(out).any(axis=2).tolist() == np.isnan(out).all(axis=2).tolist()


def test_float_mask_of_zero_and_minus_infinity_is_the_bool_mask() -> None:
    operator, params, x = attention()
    live = np.random.default_rng(8).random((2, 2, 4, 4)) < 0.5
    by_bool = run(operator, params, x, mask=live, return_weights=True)
    by_float = run(operator, params, x, mask=np.where(live, 0.0, -np.inf), return_weights=True)
    assert all(np.array_equal(a, b) for a, b in zip(by_bool, by_float, strict=True))


def test_heads_are_masked_one_by_one() -> None:
    operator, params, x = attention()
    mask = np.ones((2, 4, 4), dtype=bool)
    mask[1, :, 0] = False
    _, weights = run(operator, params, x, mask=mask, return_weights=True)
    _, free = run(operator, params, x, return_weights=True)
    assert np.array_equal(weights[:, 0], free[:, 0])
    assert not weights[:, 1, :, 0].any()


def test_masking_beats_every_logit_and_large_logits_stay_finite() -> None:
    operator = Operator(Lattice((3,)), 1, 1, Identity(), Identity(), Identity(), Softmax(scale=1.0))
    x = np.array([[-1.0], [300.0], [200.0]])
    out = run(operator, {}, x, mask=np.array([True, False, True]))
    assert out[:, 0].tolist() == [-1.0, 200.0, 200.0]
    assert run(operator, {}, x)[:, 0].tolist() == [-1.0, 300.0, 300.0]


@pytest.mark.parametrize(
    ("boundary", "counts"), [("absent", [[0, 1, 1], [0, 0, 1]]), ("reflect", [[0, 2, 1], [1, 1, 1]])]
)
def test_pair_linked_twice_counts_twice(boundary: Boundary, counts: list[list[int]]) -> None:
    # Query 0 looks at positions 1, 2, 3 of three keys and query 1 at 2, 3, 4; 3 is reflected to 1 and 4 to 0.
    layout = Lattice((2,), key_grid=(3,), offset=1, kernel_size=3, padding=0, boundary=boundary)
    operator = Operator(layout, 1, 1, Identity(), relevance=Ones())
    y = np.array([[1.0], [10.0], [100.0]])
    out, weights = run(operator, {}, np.zeros((2, 1)), y, return_weights=True)
    assert weights[0].tolist() == counts
    assert np.array_equal(out, np.array(counts) @ y)


def test_padding_with_zeros_takes_part_and_is_not_masked() -> None:
    layout = Lattice((1,), kernel_size=3, boundary="zeros")
    operator = Operator(layout, 1, 1, Shared(1, bias=True), Identity(), Identity(), Softmax())
    params = {"value.weight": np.ones((1, 1)), "value.bias": np.array([3.0])}
    x = np.zeros((1, 1))
    out, weights = run(operator, params, x, return_weights=True)
    assert weights.item() == 1 / 3
    assert out.item() == pytest.approx(3.0, abs=3 * 3 * UNIT)
    out, weights = run(operator, params, x, mask=np.zeros((1, 1), dtype=bool), return_weights=True)
    assert (out.item(), weights.item()) == (3.0, 0.0)


def test_mean_counts_the_live_links() -> None:
    operator = Operator(Lattice((4,)), 1, 1, Identity(), relevance=Mean())
    mask = np.array([True, False, False, True])
    assert run(operator, {}, np.array([[1.0], [np.nan], [np.inf], [4.0]]), mask=mask)[:, 0].tolist() == [2.5] * 4


def test_mixture_of_ones_and_mean_by_hand() -> None:
    operator = Operator(Lattice((4,)), 1, 1, Identity(), relevance=Mixture(Ones(), Mean()))
    # sigmoid(0) = 1/2: half of the sum 8 and half of the mean 2.
    out = run(operator, {"relevance.gate": np.zeros(1)}, np.array([[1.0], [1.0], [2.0], [4.0]]))
    assert out[:, 0].tolist() == [5.0] * 4


def test_slopes_by_hand() -> None:
    # One head has slope 2^-8; on a causal pair (1, 0) the logits are 0 and -2^-8.
    operator = Operator(
        Lattice((2,), causal=True), 1, 1, Identity(), relevance=Softmax(content=False, bias=SlopeBias())
    )
    _, weights = run(operator, {}, np.zeros((2, 1)), return_weights=True)
    odds = weights[0, 1, 0] / weights[0, 1, 1]
    assert abs(odds - math.exp(-(2.0**-8))) <= 4 * UNIT


@pytest.mark.parametrize(
    ("pairing", "pairs"), [("half", [(0, 2), (1, 3)]), ("interleaved", [(0, 1), (2, 3)])], ids=["half", "interleaved"]
)
def test_rotation_by_hand(pairing: Pairing, pairs: list[tuple[int, int]]) -> None:
    # The query stands at row 2, column 3 and is turned, the keys are not: (a cos p - b sin p, a sin p + b cos p).
    layout = Lattice((1, 1), key_grid=(1, 2), offset=(2, 3))
    query = Rotary(Identity(), base=1.0, pairing=pairing)
    operator = Operator(layout, 4, 1, Identity(), query, Identity(), Softmax(scale=1.0))
    x = np.array([[0.3, -0.5, 0.7, 0.2]])
    for angle, (a, b) in zip((2, 3), pairs, strict=True):
        for feature, turned in (
            (a, x[0, a] * math.cos(angle) - x[0, b] * math.sin(angle)),
            (b, x[0, a] * math.sin(angle) + x[0, b] * math.cos(angle)),
        ):
            y = np.zeros((2, 4))
            y[0, feature] = 1
            _, weights = run(operator, {}, x, y, return_weights=True)
            assert abs(weights[0, 0, 0] - 1 / (1 + math.exp(-turned))) <= 16 * UNIT


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_narrow_dtypes_are_float64_rounded_once(dtype: str) -> None:
    operator, params, x = attention()
    narrow = {name: value.astype(dtype) for name, value in params.items()}
    wide = {name: value.astype(np.float64) for name, value in narrow.items()}
    x = x.astype(dtype)
    out, weights = run(operator, narrow, x, return_weights=True)
    expected = run(operator, wide, x.astype(np.float64), return_weights=True)
    assert out.dtype == weights.dtype == dtype
    assert np.array_equal(out, expected[0].astype(dtype))
    assert np.array_equal(weights, expected[1].astype(dtype))


def test_empty_batch() -> None:
    operator, params, x = attention()
    out, weights = run(operator, params, x[:0], return_weights=True)
    assert (out.shape, weights.shape) == ((0, 4, 4), (0, 2, 4, 4))


def test_what_is_not_claimed_raises() -> None:
    operator, params, x = attention()
    with pytest.raises(translution.NotSupported, match=r"no algorithm 'stream'"):
        run(operator, params, x, algorithm="stream")
    tensor = torch.from_numpy(x).requires_grad_()
    with pytest.raises(translution.NotSupported, match=r"use translution\.vjp"):
        run(operator, params, tensor)
    wide = {name: value.astype(np.complex128) for name, value in params.items()}
    x = x.astype(np.complex128)
    with pytest.raises(translution.NotSupported, match="complex128 is for run"):
        translution.vjp(operator, wide, x, cotangent=x, backend="reference")
