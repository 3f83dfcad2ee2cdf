"""The interpreted kernels, forward and backward, against exact results, within their running error bounds."""

import numpy as np
import pytest
import torch

import translution
from translution.algorithms import Request
from translution.conformance.comparison import as_numpy, check
from translution.conformance.error_model import budget
from translution.conformance.exam.question import Question
from translution.conformance.strategies import random_case
from translution.registry import get_backend
from translution.spec import (
    BiasTable,
    Concat,
    Identity,
    Lattice,
    LowRank,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
    Sum,
)
from translution.spec import presets as p


def window(grid, features, relevance, **layout):
    return Operator(Lattice(grid, **layout), 5, 1, PerDisplacement(features), relevance=relevance)


CASES = {
    f"translution-{roles}": p.translution((2, 2), 6, 2, roles=roles)
    for roles in ("qkv", "qk", "qv", "kv", "q", "k", "v")
}
CASES |= {
    f"alpha-{roles}": p.alpha_translution((2, 2), 6, 2, rank=3, roles=roles) for roles in ("qkv", "qv", "kv", "k", "v")
}
CASES |= {
    f"registers-{count}-{'causal' if causal else 'full'}-{rank}d": p.translution(
        (3,) if rank == 1 else (2, 2), 4, 2, registers=count, causal=causal, qkv_bias=True
    )
    for count in (1, 2)
    for causal in (False, True)
    for rank in (1, 2)
}
CASES |= {
    "one-token": p.translution((1,), 4, 2),
    "causal": p.translution((7,), 5, 1, head_dim=3, causal=True),
    "raster-causal": p.translution((3, 3), 5, 1, causal=True),
    "raster-causal-window": p.translution((3, 3), 5, 1, causal=True, kernel_size=3),
    "raster-causal-across": Operator(
        Lattice((2, 3), key_grid=(3, 2), offset=(1, 2), causal=True), 4, 1, PerDisplacement(3), Shared(3), Shared(3)
    ),
    "causal-one-axis": p.translution((3, 3), 5, 1, causal=(False, True)),
    "raster-causal-3d": p.translution((2, 2, 2), 3, 1, causal=True),
    "3d": p.translution((2, 2, 3), 3, 1),
    "window": p.translution((3, 3), 5, 1, kernel_size=3),
    "even-window": p.translution((3, 2), 5, 1, kernel_size=(2, 4)),
    "dilated": p.translution((7,), 5, 1, kernel_size=3, dilation=2),
    "causal-window": p.translution((6,), 5, 1, kernel_size=3, causal=True),
    "odd-sizes": p.translution((2, 3), 17, 3, head_dim=5),
    "wide-head": p.translution((2,), 20, 1, head_dim=40),
    "biases": p.translution((2, 2), 4, 2, qkv_bias=True),
    "alpha-registers": p.alpha_translution((2, 2), 6, 2, rank=2, registers=1),
    "alpha-causal-rotary": p.alpha_translution((5,), 8, 2, rank=2, causal=True, rotary=True),
    "attention": p.self_attention((2, 3), 6, 2, registers=1, qkv_bias=True),
    "attention-across": p.self_attention((2,), 6, 2, key_grid=(5,), key_dim=3),
    "rope": p.rope_attention((2, 3), 8, 1, registers=1),
    "rope-interleaved": p.rope_attention((5,), 8, 2, pairing="interleaved", causal=True),
    "swin": p.swin_attention((2, 3), 4, 2),
    "alibi": p.alibi_attention((5,), 4, 2),
    "convit": p.convit_attention((2, 2), 4, 2),
    "convolution": p.convolution((7, 5), 2, 3, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)),
    "convolution-wider-padding": p.convolution((3,), 2, 3, 2, padding=4, stride=3),
    "pooling-strided": p.average_pooling((5, 4), 2, 2, padding=1, count_include_pad=False),
    "strided": Operator(
        Lattice((2, 2), key_grid=(4, 3), stride=2, offset=-1), 4, 2, PerDisplacement(4), PerDisplacement(4), Shared(4)
    ),
    "convolution-window": window((3, 3), 7, Ones(), kernel_size=3),
    "convolution-wide": window((3,), 37, Ones(), kernel_size=(3,), padding=(5,)),
    "ones-registers": window((3,), 2, Ones(), registers=2),
    "mean": window((3, 3), 7, Mean(), kernel_size=(3, 2)),
    "mean-registers": window((3,), 2, Mean(), registers=2),
    "pooling": Operator(Lattice((3, 3), kernel_size=2), 4, 2, Identity(), relevance=Mean()),
    "offset": window((3,), 2, Mean(), key_grid=(5,), offset=2),
    "no-key-in-reach": window((4,), 3, Mean(), key_grid=(2,), kernel_size=(2,), offset=1),
    "nothing-in-reach": window((2,), 3, Mean(), kernel_size=(2,), offset=40),
    "position-only": window((3,), 2, Softmax(content=False, bias=BiasTable()), registers=1),
    "value-sum": Operator(
        Lattice((2, 2)), 5, 2, Sum((Shared(6, bias=True), PerDisplacement(6))), Shared(4), PerDisplacement(4)
    ),
    "value-slices": Operator(
        Lattice((3,)), 5, 2, Concat((Shared(4), LowRank(6, 8))), Shared(4), Shared(4)
    ),
    "logit-sum-in-slice": Operator(
        Lattice((3,)),
        5,
        2,
        value=Shared(4),
        query=Concat((Sum((Shared(4), PerDisplacement(4))), Shared(2))),
        key=Concat((Shared(4), Shared(2))),
    ),
    "grouped-shared": Operator(
        Lattice((3,)), 4, 2, Shared(4, groups=2), Shared(6, groups=2, bias=True), PerDisplacement(6)
    ),
    "mixture": Operator(
        Lattice((3,), registers=1), 4, 2, PerDisplacement(4), PerDisplacement(4), Shared(4), Mixture(Softmax(), Ones())
    ),
}  # fmt: skip


def shares(name, operator, params, x, y=None, mask=None, *, cotangent, dtype="float32"):
    """How much of its bound the result and every gradient use; ComparisonError beyond."""

    def native(a):
        return a if a is None or dtype == "float32" else torch.from_numpy(a).to(getattr(torch, dtype))

    def wide(a):
        return None if a is None else as_numpy(native(a)).astype(np.float64)

    out, found = translution.vjp(
        operator, {n: native(a) for n, a in params.items()}, native(x), native(y), mask=mask,
        cotangent=native(cotangent), backend="triton",
    )  # fmt: skip
    exact = budget(operator, {n: wide(a) for n, a in params.items()}, wide(x), wide(y), mask, wide(cotangent), dtype)
    used = [check(name, out, exact.value, exact.out, dtype=dtype)]
    gradients = {**found.params, "x": found.x} | ({} if y is None else {"y": found.y})
    assert gradients.keys() == {*operator.parameters, "x"} | ({"y"} if y is not None else set())
    for of, gradient in gradients.items():
        label = f"{name}, gradient of {of}"
        used.append(check(label, gradient, exact.gradient_values[of], exact.gradients[of], dtype=dtype))
    return used


def pull(operator, batch, seed=1):
    shape = (batch, operator.layout.num_queries, operator.out_features)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_within_their_bounds(name, draw, record_property):
    operator, batch = CASES[name], 3 if len(name) % 2 else 1
    params, x, y = draw(operator, batch=batch)
    used = shares(name, operator, params, x, y, cotangent=pull(operator, batch))
    record_property("share", f"{used[0]:.3f}, gradients {max(used[1:]):.3f}")


def claimed(case: Question) -> bool:
    mask = "none" if case.mask is None else "bool" if case.mask.dtype == np.bool_ else "float"
    return not get_backend("triton").not_supported(Request(case.operator, mask=mask), "fused")


@pytest.mark.parametrize("block", range(4))
def test_random_operators_are_within_their_bounds(block):
    cases = [case for case in map(random_case, range(30 * block, 30 * (block + 1))) if claimed(case)]
    for case in cases:
        single = lambda a: a if a is None or a.dtype == np.bool_ else a.astype(np.float32)  # noqa: E731
        params, x, y, mask = (
            {n: single(a) for n, a in case.params.items()},
            single(case.x),
            single(case.y),
            single(case.mask),
        )
        cotangent = np.random.default_rng(0).standard_normal(case.out_shape).astype(np.float32)
        shares(case.label, case.operator, params, x, y, mask, cotangent=cotangent)
    assert len(cases) >= 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["translution-qkv", "alpha-qkv", "attention", "convolution", "registers-2-full-1d"])
def test_half_precision_is_within_its_bounds(name, dtype, draw):
    operator = CASES[name]
    params, x, y = draw(operator)
    shares(name, operator, params, x, y, cotangent=pull(operator, 2), dtype=dtype)


@pytest.mark.parametrize("name", ["convolution-window", "convolution-wide", "ones-registers"])
def test_sums_of_small_integers_are_exact(name):
    operator, rng = CASES[name], np.random.default_rng(1)
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)  # noqa: E731
    params = {n: whole(*shape) for n, shape in operator.parameters.items()}
    x = whole(2, operator.layout.num_queries, operator.dim)
    exact = translution.run(operator, params, x, backend="reference")
    assert np.array_equal(translution.run(operator, params, x, backend="triton"), exact)


@pytest.mark.parametrize("level", [-6e4, 6e4])
def test_logits_of_any_size_stay_within_the_bound(level, draw):
    layout = Lattice((2, 2), registers=1)
    operator = Operator(layout, 4, 2, PerDisplacement(4), PerDisplacement(4), Shared(4), Softmax(bias=BiasTable()))
    params, x, _ = draw(operator)
    params["relevance.bias"] = params["relevance.bias"] + np.float32(level)
    exact = budget(operator, params, x)
    check("level", translution.run(operator, params, x, backend="triton"), exact.value, exact.out)


def test_keys_beyond_the_grid_never_set_the_maximum(draw):
    """With every real logit below -100, one that counts as 0 leaves nothing of the others in float32."""
    operator = Operator(Lattice((2, 2)), 4, 2, PerDisplacement(4), PerDisplacement(4), PerDisplacement(4))
    params, x, _ = draw(operator)
    x = np.abs(x) + 1
    params["query.table"] = np.abs(params["query.table"]) + 4
    params["key.table"] = -np.abs(params["key.table"]) - 4
    exact = budget(operator, params, x)
    check("negative", translution.run(operator, params, x, backend="triton"), exact.value, exact.out)


def test_saturated_softmax_stays_finite(draw):
    operator = CASES["translution-qkv"]
    params, x, _ = draw(operator, size=30.0)
    found = translution.run(operator, params, x, backend="triton")
    exact = budget(operator, params, x)
    assert np.isfinite(found).all()
    check("saturated", found, exact.value, exact.out)


def test_a_layout_without_links_gives_zeros() -> None:
    layout = Lattice((3, 3), key_grid=(4, 3), kernel_size=(2, 1), dilation=(1, 2), padding=(-1, 1), causal=True)
    operator = Operator(layout, 3, 2, PerDisplacement(4, bias=True), relevance=Ones())
    assert layout.num_classes == 0
    params = {name: torch.ones(shape) for name, shape in operator.parameters.items()}
    out = translution.run(operator, params, torch.ones(2, 9, 3), torch.ones(2, 12, 3), backend="triton")
    assert out.shape == (2, 9, 4)
    assert not out.any()
