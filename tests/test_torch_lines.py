"""Alpha-Translution and other tables of few features: ``stream`` goes line by line through the lattice."""

import pytest
import torch

import translution
from translution.algorithms import Request
from translution.backends.torch import line_attention, line_plan
from translution.backends.torch.backend import backend
from translution.backends.torch.lines import lines_of
from translution.backends.torch.links import links
from translution.spec import (
    BiasTable,
    Clip,
    Concat,
    Lattice,
    Mixture,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    Softmax,
    Sum,
    presets,
)

CPU = torch.device("cpu")
GRIDS = [((4, 5), 1), ((7,), 0), ((5,), 2), ((3, 2, 4), 0), ((2, 3, 2), 1), ((1, 4), 1), ((4, 1), 0)]


def parameters(operator, scale=0.4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return {n: scale * torch.randn(s, generator=generator, dtype=dtype) for n, s in operator.parameters.items()}


def tokens(operator, batch=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn((batch, operator.layout.num_queries, operator.dim), generator=generator, dtype=dtype)


@pytest.fixture
def calls(monkeypatch):
    """How often :func:`line_attention.attend` found that lines are the way."""
    found, attend = [], line_attention.attend

    def counted(*arguments):
        out = attend(*arguments)
        found.append(out is not None)
        return out

    monkeypatch.setattr(line_attention, "attend", counted)
    return found


def results(operator, params, x, algorithm):
    leaves = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in params.values())]
    own = dict(zip(params, leaves[1:], strict=True))
    out = translution.run(operator, own, leaves[0], backend="torch", algorithm=algorithm)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def agree(operator, params=None, x=None, tolerance=1e-11):
    params = parameters(operator) if params is None else params
    x = tokens(operator) if x is None else x
    for own, other in zip(
        results(operator, params, x, "stream"), results(operator, params, x, "pairwise"), strict=True
    ):
        assert (own - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("roles", ["qkv", "qk", "qv", "kv", "q", "k", "v"])
@pytest.mark.parametrize(("grid", "registers"), GRIDS)
def test_results_and_gradients_are_those_of_pairs(grid, registers, roles, calls):
    agree(presets.alpha_translution(grid, 12, 3, registers=registers, rank=2, roles=roles))
    assert calls == [True]


@pytest.mark.parametrize("kept", [0, 1_000_000])
@pytest.mark.parametrize("workspace", [12_000, 1])
@pytest.mark.parametrize("roles", ["qkv", "qk", "v"])
@pytest.mark.parametrize(("grid", "registers"), GRIDS)
def test_item_by_item_and_a_column_at_a_time(grid, registers, roles, workspace, kept, monkeypatch):
    monkeypatch.setattr(line_plan, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(line_plan, "KEPT_BYTES", kept)
    agree(presets.alpha_translution(grid, 12, 3, registers=registers, rank=2, roles=roles))


def test_a_small_workspace_has_several_parts_and_columns(monkeypatch):
    """The parameters of the test above do what it says of them."""
    operator = presets.alpha_translution((4, 5), 12, 3, registers=1, rank=2)
    plans = []
    compute = line_attention._Softmax.compute
    monkeypatch.setattr(
        line_attention._Softmax, "compute", lambda plan, *tensors: plans.append(plan) or compute(plan, *tensors)
    )
    translution.run(operator, parameters(operator), tokens(operator), backend="torch", algorithm="stream")
    (plan,) = plans
    assert (len(plan.parts(3, False)), len(plan.columns(3, False))) == (1, 1)
    monkeypatch.setattr(line_plan, "WORKSPACE_BYTES", 12_000)
    assert (len(plan.parts(3, False)), len(plan.columns(1, False))) == (3, 5)
    monkeypatch.setattr(line_plan, "WORKSPACE_BYTES", 1)
    assert [(c.start, c.stop) for c in plan.columns(1, False)] == [(n, n + 1) for n in range(5)]


@pytest.mark.parametrize(
    "operator",
    [
        Operator(Lattice((3, 4)), 8, 2, Concat((PerDisplacement(4), Shared(8))), Shared(6), Shared(6)),
        Operator(
            Lattice((3, 4), registers=1),
            8,
            2,
            Concat((Shared(4), PerDisplacement(4), Shared(4))),
            Concat((Shared(4), PerDisplacement(2), Shared(2))),
            Concat((Shared(4), Shared(2), PerDisplacement(2))),
        ),
    ],
)
def test_other_operators_with_one_small_table_a_role(operator):
    agree(operator)


@pytest.mark.parametrize(
    "operator",
    [
        presets.alpha_translution((6,), 12, 3, rank=2, causal=True),
        presets.alpha_translution((4, 5), 12, 3, rank=2, kernel_size=3),
        presets.alpha_translution((4, 5), 12, 3, rank=2, far=Clip(2)),
        presets.translution((3, 4), 8, 2, registers=1),
        presets.translution((6,), 8, 2, roles="v"),
        presets.alpha_translution((3, 4), 24, 3, rank=24),
        Operator(Lattice((5,), boundary="circular"), 8, 2, *3 * [PerDisplacement(8)]),
        Operator(Lattice((5,), key_grid=(4,)), 8, 2, *3 * [PerDisplacement(8)]),
        Operator(Lattice((5,), stride=2, key_grid=(5,)), 8, 2, *3 * [PerDisplacement(8)]),
        Operator(Lattice((5,)), 8, 2, *3 * [PerDisplacement(8)], Softmax(bias=BiasTable())),
        Operator(Lattice((5,)), 8, 2, PerDisplacement(8), Rotary(PerDisplacement(8)), Shared(8)),
        Operator(Lattice((5,)), 8, 2, Sum((PerDisplacement(8), Shared(8))), Shared(8), Shared(8)),
        Operator(Lattice((4,)), 8, 2, *3 * [PerDisplacement(8)], Mixture(Softmax(), Softmax(bias=BiasTable()))),
        presets.self_attention((4, 5), 12, 3),
    ],
    ids=[
        "causal",
        "window",
        "far",
        "full",
        "values",
        "wide",
        "circular",
        "others",
        "strided",
        "bias",
        "turned",
        "sum",
        "mixture",
        "plain",
    ],
)
def test_what_is_no_such_operator_goes_another_way(operator, calls):
    params = parameters(operator)
    y = None
    if not operator.layout.is_self:
        y = torch.randn((2, operator.layout.num_keys, operator.dim), dtype=torch.float64)
    x = tokens(operator, batch=2)
    got, want = (
        translution.run(operator, params, x, y, backend="torch", algorithm=algorithm)
        for algorithm in ("stream", "pairwise")
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert not any(calls)


@pytest.mark.parametrize("scale", [1e2, 3e4])
def test_logits_of_any_size_are_those_of_the_definition(scale):
    operator = presets.alpha_translution((2, 3), 6, 1, rank=2, registers=1)
    params = parameters(operator)
    params["key.1.table"] = scale * params["query.1.table"]
    x = tokens(operator)
    got = translution.run(operator, params, x, backend="torch", algorithm="stream")
    want = translution.run(operator, params, x, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_a_gradient_that_nobody_asks_for_is_not_gathered():
    operator = presets.alpha_translution((3, 4), 12, 3, rank=2, registers=1)
    params, x = parameters(operator), tokens(operator)
    every = dict(zip(["x", *params], results(operator, params, x, "stream")[1:], strict=True))
    for name in every:
        own = {n: p.clone().requires_grad_(n == name) for n, p in params.items()}
        given = x.clone().requires_grad_(name == "x")
        out = translution.run(operator, own, given, backend="torch", algorithm="stream")
        (found,) = torch.autograd.grad(out.square().sum(), [given if name == "x" else own[name]])
        torch.testing.assert_close(found, every[name], rtol=1e-12, atol=1e-12)


def test_no_items_and_half_precision():
    operator = presets.alpha_translution((3, 4), 12, 3, rank=2, registers=1)
    params, x = parameters(operator), tokens(operator)
    assert [r.shape[:1] for r in results(operator, params, x[:0], "stream")[:2]] == [(0,), (0,)]
    half = {n: p.bfloat16() for n, p in params.items()}
    found, other = (results(operator, half, x.bfloat16(), algorithm) for algorithm in ("stream", "pairwise"))
    for own, expected in zip(found, other, strict=True):
        assert own.dtype == expected.dtype == torch.bfloat16
        assert (own - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_lines_of_a_layout_are_made_once_for_every_mode():
    """What is made in inference mode must serve a call that records."""
    operator = presets.alpha_translution((2, 5), 12, 3, rank=2, registers=1)
    found = links(operator.layout, CPU)
    with torch.inference_mode():
        lines = lines_of(found)
    assert lines is lines_of(found)
    assert not lines.to_registers.is_inference()
    agree(operator)


def test_weights_of_a_small_batch_are_kept_for_the_backward(monkeypatch):
    operator = presets.alpha_translution((7, 7), 48, 3, rank=8, registers=1)

    def saved(batch):
        return backend.dry_run(Request(operator, batch, gradient=True), "stream").saved_bytes

    weights = 4 * 3 * 50 * 50
    most = line_plan.KEPT_BYTES // weights
    small, large = saved(most), saved(most + 1)
    monkeypatch.setattr(line_plan, "KEPT_BYTES", 0)
    assert small - saved(most) == most * weights
    assert large == saved(most + 1)


def test_the_workspace_does_not_grow_with_the_batch():
    """Beyond what grows with it: what lies between the projections and the lines, in as many tensors of all heads."""
    operator = presets.alpha_translution((7, 7), 48, 3, rank=8, registers=1)

    def working(batch, gradient):
        return backend.dry_run(Request(operator, batch, gradient=gradient), "stream").working_bytes

    one = 4 * 50 * operator.num_heads * operator.head_dim
    for gradient, tensors in ((False, 7), (True, 13)):
        assert working(640, gradient) - working(320, gradient) <= 320 * tensors * one
