"""Products by oneDNN, where they pay: the results and gradients of ``stream`` are the same."""

import pytest
import torch

import translution
from translution.backends.torch import products
from translution.spec import (
    BiasTable,
    Concat,
    Lattice,
    LowRank,
    Mean,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
    Sum,
    presets,
)

LAYOUTS = {
    "grid": Lattice((3, 4), registers=1),
    "causal": Lattice((6,), causal=True),
    "window": Lattice((4, 5), kernel_size=(3, 3)),
    "zeros": Lattice((4, 5), kernel_size=(3, 3), boundary="zeros"),
    "strided": Lattice((5,), kernel_size=(3,), stride=(2,), key_grid=(9,)),
}
MATRICES = PerDisplacement(8)
OPERATORS = {
    **{name: Operator(layout, 8, 2, *3 * [MATRICES]) for name, layout in LAYOUTS.items()},
    "bias": Operator(LAYOUTS["grid"], 8, 2, *3 * [PerDisplacement(8, bias=True)], Softmax(bias=BiasTable())),
    "one head of values": Operator(LAYOUTS["grid"], 8, 2, LowRank(4, 8), MATRICES, MATRICES),
    "sum": Operator(LAYOUTS["grid"], 8, 2, Sum((MATRICES, Shared(8))), MATRICES, Shared(8)),
    "beside one another": Operator(LAYOUTS["grid"], 8, 2, Concat((Shared(4), PerDisplacement(4))), MATRICES, MATRICES),
    "ones": Operator(LAYOUTS["window"], 8, 2, MATRICES, relevance=Ones()),
    "mean": Operator(LAYOUTS["grid"], 8, 2, MATRICES, relevance=Mean()),
    "full": presets.translution((3, 4), 8, 2, registers=1),
}


@pytest.fixture
def calls(monkeypatch):
    """Every product by oneDNN, and how many rows each has."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    found = []

    def linear(rows, weight, *rest):
        found.append(len(rows))
        return torch.ops.mkldnn._linear_pointwise(rows, weight, *rest)

    monkeypatch.setattr(products, "_linear", lambda: linear)
    monkeypatch.setattr(products, "ENOUGH", 0)
    # Lines are the way of tables as small as these.
    monkeypatch.setattr("translution.backends.torch.line_attention.FEW", 0)
    return found


def given(operator, dtype, batch=3):
    generator = torch.Generator().manual_seed(3)
    layout = operator.layout

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    params = {name: random(*shape) for name, shape in operator.parameters.items()}
    x = random(batch, layout.num_queries, operator.dim)
    return params, x, None if layout.is_self else random(batch, layout.num_keys, operator.dim)


def results(operator, dtype, algorithm, mask=None):
    params, x, y = given(operator, dtype)
    out = translution.run(operator, params, x, y, mask=mask, backend="torch", algorithm=algorithm)
    leaves = [x, *([] if y is None else [y]), *params.values()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)]


def assert_close(found, expected):
    for own, other in zip(found, expected, strict=True):
        if other is not None:
            assert (own - other).abs().max() <= 1e-5 * max(1.0, other.abs().max())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.usefixtures("way")
def test_results_and_gradients_are_those_of_pairs(name, calls):
    operator = OPERATORS[name]
    found = results(operator, torch.float32, "stream")
    assert calls
    assert_close(found, results(operator, torch.float64, "pairwise"))


@pytest.mark.parametrize("name", ["grid", "zeros", "bias", "full"])
def test_in_several_parts_too(name, calls, monkeypatch):
    """Where every role is one full table, mirrored displacements then have two bands, and values of their own."""
    operator = OPERATORS[name]
    for limit, least in (("WORKSPACE_BYTES", 1), ("FEW_BYTES", 0)):
        monkeypatch.setattr(f"translution.backends.torch.attention.{limit}", least)
    found = results(operator, torch.float32, "stream")
    assert calls
    assert_close(found, results(operator, torch.float64, "pairwise"))


@pytest.mark.parametrize("name", ["grid", "one head of values", "sum", "mean"])
@pytest.mark.parametrize("heads", [1, 2])
def test_under_a_mask_too(name, heads, calls):
    operator = OPERATORS[name]
    tokens = operator.layout.num_queries
    mask = torch.rand((3, heads, tokens, tokens), generator=torch.Generator().manual_seed(1)) < 0.7
    found = results(operator, torch.float32, "stream", mask)
    assert calls
    assert_close(found, results(operator, torch.float64, "pairwise", mask))


def test_not_a_number_that_is_masked_reaches_nothing(calls):
    operator = OPERATORS["grid"]
    params, x, _ = given(operator, torch.float32)
    mask = torch.ones((1, 1, 13, 13), dtype=torch.bool)
    mask[..., 5], mask[..., 5, :] = False, False
    poisoned = x.detach().clone()
    poisoned[:, 5] = torch.nan
    poisoned.requires_grad_()
    out = translution.run(operator, params, poisoned, mask=mask, backend="torch", algorithm="stream")
    found = torch.autograd.grad(out.sum(), [poisoned, *params.values()])
    assert calls
    assert all(t.isfinite().all() for t in (out, *found))


def test_float64_and_few_rows_are_left_to_torch(calls, monkeypatch):
    operator = OPERATORS["grid"]
    results(operator, torch.float64, "stream")
    assert not calls
    monkeypatch.setattr(products, "ENOUGH", 20 * 8 * 8)
    results(operator, torch.float32, "stream")
    # Three items of at least 7 links; gradients of tables have as many rows as there are features.
    assert min(calls) == 8
    assert min(rows for rows in calls if rows != 8) == 24


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_vp2intersect": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx_vnni": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx_vnni": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_f": False, "avx_vnni": True}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True, "avx_vnni": True}, False),
        ({}, False),
    ],
)
def test_only_where_mkl_is_slow(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    products._linear.cache_clear()
    try:
        assert (products._linear() is not None) == (expected and torch.backends.mkldnn.is_available())
    finally:
        products._linear.cache_clear()
