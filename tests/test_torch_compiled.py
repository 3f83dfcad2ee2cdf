"""Algorithm ``compiled``: results and gradients of every shape that changes a kernel, and what it refuses."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import translution
from translution.backends.torch.compiled import claims, launch, plan
from translution.backends.torch.compiled.emitter import POINTER, Emitter, pieces
from translution.backends.torch.compiled.matrices import Layout, Matrices
from translution.backends.torch.compiled.processor import Compiled, processor
from translution.execution import predict
from translution.geometry import geometry
from translution.registry import get_backend
from translution.spec import (
    BiasTable,
    Clip,
    Lattice,
    LowRank,
    Operator,
    PairTable,
    PerDisplacement,
    Shared,
    Softmax,
    Sum,
    presets,
)

ir = pytest.importorskip("llvmlite.ir")
pytestmark = pytest.mark.skipif(processor() is None, reason="no kernels for this processor")

MATRICES = PerDisplacement(8)
LAYOUTS = {
    "register": Lattice((3, 4), registers=1),
    "causal": Lattice((9,), causal=True, registers=2),
    "window": Lattice((4, 4), kernel_size=(3, 3)),
    "cross": Lattice((4,), key_grid=(7,), kernel_size=(3,), boundary="circular"),
    "far": Lattice((7,), far=Clip(2)),
    "volume": Lattice((2, 3, 2)),
    "pairs": PairTable(((0, 1, 2, 1), (2, 0, 1, 0), (1, 2, 2, 0), (0, 2, 1, -1)), 3),
}


def parameters(operator, scale=0.4):
    generator = torch.Generator().manual_seed(3)
    return {n: scale * torch.randn(s, generator=generator) for n, s in operator.parameters.items()}


def tokens(operator, batch=3):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((batch, operator.layout.num_queries, operator.dim), generator=generator)
    if operator.layout.num_queries == operator.layout.num_keys:
        return [x]
    return [x, torch.randn((batch, operator.layout.num_keys, operator.keys_dim), generator=generator)]


def results(operator, params, x, algorithm="compiled", dtype=torch.float32):
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (*x, *params.values())]
    own = dict(zip(params, leaves[len(x) :], strict=True))
    out = translution.run(operator, own, *leaves[: len(x)], backend="torch", algorithm=algorithm)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def agree(operator, params=None, x=None, tolerance=2e-5):
    params = parameters(operator) if params is None else params
    x = tokens(operator) if x is None else x
    exact = results(operator, params, x, "pairwise", torch.float64)
    for own, other in zip(results(operator, params, x), exact, strict=True):
        assert own.shape == other.shape
        assert (own - other).abs().max() <= tolerance * max(1.0, other.abs().max()) if own.numel() else True


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_layouts_and_cuts(name, threads, monkeypatch):
    """More stretches than steps have rows, too: a step is then cut more than once."""
    monkeypatch.setattr(launch, "threads", lambda: threads)
    monkeypatch.setattr(plan, "BLOCK", 1)
    agree(Operator(LAYOUTS[name], 8, 2, MATRICES, MATRICES, MATRICES, Softmax(bias=BiasTable())))


@pytest.mark.parametrize(
    ("dim", "heads", "features"),
    [(1, 1, (1, 1)), (5, 3, (6, 9)), (16, 1, (16, 32)), (33, 2, (34, 66)), (70, 2, (48, 40)), (24, 5, (85, 15))],
)
def test_sizes(dim, heads, features):
    """Vectors and tiles that are full, that are not, and both."""
    logits, values = features
    query, value = PerDisplacement(logits), PerDisplacement(values)
    agree(Operator(Lattice((3, 3), registers=1), dim, heads, value, query, query, output=Shared(4)))


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 40])
def test_batches(batch):
    operator = presets.translution((3, 4), 24, 3, registers=1)
    agree(operator, x=tokens(operator, batch))


@pytest.mark.parametrize("roles", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("make", [presets.translution, presets.alpha_translution])
def test_roles_with_and_without_tables(make, roles):
    agree(make((3, 4), 24, 3, registers=1, roles=roles))


def test_sums_of_encoders():
    query = Sum((Shared(8, bias=True), PerDisplacement(8), LowRank(3, 8)))
    agree(Operator(Lattice((7,)), 8, 2, MATRICES, query, query, Softmax(bias=BiasTable())))


@pytest.mark.parametrize("most", [1, 28 << 20])
def test_parts_of_the_batch_add_up(most, monkeypatch):
    operator = presets.translution((3, 4), 24, 3, registers=1)
    monkeypatch.setattr(plan, "MOST_BYTES", most)
    monkeypatch.setattr(launch, "threads", lambda: 2)
    monkeypatch.setattr(plan, "BLOCK", 1)
    seen, cut = [], plan.Steps.cut
    monkeypatch.setattr(plan.Steps, "cut", lambda self, batch, *rest: seen.append(batch) or cut(self, batch, *rest))
    agree(operator, x=tokens(operator, 5))
    assert set(seen) == ({1} if most == 1 else {5})


def test_fewer_stretches_where_their_own_memory_would_be_large(monkeypatch):
    monkeypatch.setattr(launch, "threads", lambda: 64)
    monkeypatch.setattr(plan, "BLOCK", 1)
    seen, original = [], plan.Plan.stretches
    monkeypatch.setattr(plan.Plan, "stretches", lambda self, batch: seen.append(original(self, batch)) or seen[-1])
    operator = presets.translution((3, 4), 24, 3, registers=1)
    for most, expected in ((0, {1}), (10 << 20, {64})):
        monkeypatch.setattr(plan, "OWN_BYTES", most)
        seen.clear()
        agree(operator)
        assert set(seen) == expected


@pytest.mark.parametrize(("low", "high"), [(1.0, 800.0), (-900.0, -900.0), (-200.0, 200.0)])
def test_logits_beyond_the_range_of_exp(low, high):
    operator = Operator(Lattice((4,)), 4, 1, *[PerDisplacement(4)] * 3, Softmax(bias=BiasTable()))
    params = parameters(operator)
    params["relevance.bias"] = torch.linspace(low, high, 7).view_as(params["relevance.bias"])
    agree(operator, params, tolerance=2e-4)


@pytest.mark.parametrize("algorithm", ["compiled", "stream"])
def test_far_logits_of_one_item_leave_every_bit_of_the_others(algorithm):
    operator = presets.translution((3, 3), 8, 2)
    params = parameters(operator, 1.0)
    (x,) = tokens(operator)
    other = x.clone()
    other[1:] *= 30
    outs = [translution.run(operator, params, t, backend="torch", algorithm=algorithm) for t in (x, other)]
    assert torch.equal(outs[0][0], outs[1][0])
    assert outs[1].isfinite().all()


def test_nan_stays_where_it_is():
    operator = Operator(Lattice((5,), kernel_size=3), 8, 2, MATRICES, MATRICES, MATRICES)
    (x,) = tokens(operator)
    x[0, 0, 3] = np.nan
    found = translution.run(operator, parameters(operator), x, backend="torch", algorithm="compiled")
    lost = found.isnan().any(-1)
    assert lost[0].tolist() == [True, True, False, False, False]
    assert not lost[1:].any()


def test_the_same_call_gives_the_same_bits():
    operator = presets.translution((5, 5), 24, 3, registers=1)
    params, x = parameters(operator), tokens(operator, 6)
    first = results(operator, params, x)
    for _ in range(5):
        assert all(map(torch.equal, first, results(operator, params, x)))


def test_second_derivatives_are_those_of_pairs():
    operator = Operator(Lattice((4,)), 4, 2, *[PerDisplacement(4)] * 3)
    params = parameters(operator)

    def penalty(algorithm, dtype):
        own = {n: p.to(dtype).requires_grad_() for n, p in params.items()}
        x = tokens(operator)[0].to(dtype).requires_grad_()
        out = translution.run(operator, own, x, backend="torch", algorithm=algorithm)
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *own.values()], allow_unused=True)

    exact = penalty("pairwise", torch.float64)
    for own, other in zip(penalty("compiled", torch.float32), exact, strict=True):
        assert (own is None) == (other is None)
        if other is not None:
            assert (own - other).abs().max() <= 1e-4 * max(1.0, other.abs().max())


def test_only_gradients_that_are_needed():
    operator = presets.translution((3, 3), 8, 2)
    params, (x,) = parameters(operator), tokens(operator)
    whole = dict(zip(["out", "x", *params], results(operator, params, [x]), strict=True))
    for name in ("key.table", "value.table"):
        own = params | {name: params[name].clone().requires_grad_()}
        out = translution.run(operator, own, x, backend="torch", algorithm="compiled")
        (found,) = torch.autograd.grad(out.square().sum(), own[name])
        assert torch.allclose(found, whole[name], rtol=1e-5, atol=1e-6)


def test_memory_is_what_the_dry_run_says():
    operator = presets.translution((7, 7), 96, 3, registers=1)
    request = translution.Request(operator, 4, gradient=True)
    count = 4 * geometry(operator.layout).num_links * 3 * 96 * 96
    forward = predict(get_backend("torch"), translution.Request(operator, 4), "compiled")
    both = predict(get_backend("torch"), request, "compiled")
    assert forward.flops >= 2 * count
    # The rest are projections: each link encodes again, and once each for its tokens and its matrices.
    assert both.flops - forward.flops >= 3 * 2 * count
    assert both.working_bytes > forward.working_bytes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "in float32, not in float64"),
        ({"mask": "bool"}, "a mask is given"),
        ({"return_weights": True}, "no kernel holds the weights"),
    ],
)
def test_what_it_does_not_do_it_says(change, reason):
    request = translution.Request(presets.translution((2, 2), 4, 2), 1, **change)
    assert any(reason in found for found in get_backend("torch").not_supported(request, "compiled"))


def test_without_llvmlite_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(claims, "find_spec", lambda _: None)
    operator = presets.translution((2, 2), 4, 2)
    with pytest.raises(translution.NotSupported, match=r"pip install 'translution\[compiled\]'"):
        translution.run(operator, parameters(operator), *tokens(operator), backend="torch", algorithm="compiled")


def test_tensors_without_numbers_are_refused():
    operator = presets.translution((2, 2), 4, 2)
    params, (x,) = parameters(operator), tokens(operator)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(translution.NotSupported, match="a FakeTensor is given"),
    ):
        translution.run(operator, params, x, backend="torch", algorithm="compiled")


def test_transforms_are_refused_by_name():
    operator = presets.translution((2, 2), 4, 2)
    params, (x,) = parameters(operator), tokens(operator)

    def call(own):
        return translution.run(operator, params, own, backend="torch", algorithm="compiled").sum()

    for transformed in (torch.func.grad(call), torch.func.vmap(call)):
        with pytest.raises(translution.NotSupported, match="sdpa and compiled are no part"):
            transformed(x)


def test_in_a_graph_it_is_a_node():
    operator = presets.translution((2, 2), 4, 2)
    params, (x,) = parameters(operator), tokens(operator)

    def call(own):
        return translution.run(operator, own, x, backend="torch", algorithm="compiled").square().sum()

    leaves = [{n: p.clone().requires_grad_() for n, p in params.items()} for _ in range(2)]
    for own, function in zip(leaves, (call, torch.compile(call, fullgraph=True, backend="aot_eager")), strict=True):
        function(own).backward()
    for name in params:
        assert torch.allclose(leaves[0][name].grad, leaves[1][name].grad, rtol=1e-5, atol=1e-6)


def test_other_processors_are_refused(monkeypatch):
    monkeypatch.setattr(claims, "_has_kernels", lambda: False)
    request = translution.Request(presets.translution((2, 2), 4, 2), 1)
    assert any("this processor has none" in found for found in claims.why_not(request))


def _called(write, *argument_types):
    """Machine code of a function that ``write`` fills."""
    own = processor()
    assert own is not None
    module = ir.Module("test")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), argument_types), "written")
    emitter = Emitter(function, own.lanes)
    write(emitter, *function.args)
    emitter.code.ret_void()
    return Compiled(module, ["written"])


def test_exp_is_within_two_units_in_the_last_place():
    import ctypes

    own = processor()
    assert own is not None
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.7228, 88.73, -87.3, -87.4, -104.0, 1e30, -1e30]
    values = np.concatenate([np.linspace(-87, 88.7, 1 << 16), special]).astype(np.float32)
    values = np.resize(values, len(values) // own.lanes * own.lanes + own.lanes)
    found = np.empty_like(values)

    def write(emitter, given, out):
        with emitter.loop(len(values), step=own.lanes) as n:
            emitter.store(emitter.exp(emitter.load(emitter.at(given, n))), emitter.at(out, n))

    code = _called(write, POINTER, POINTER)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(code.addresses["written"])(
        values.ctypes.data, found.ctypes.data
    )
    with np.errstate(over="ignore"):
        exact = np.exp(values.astype(np.float64))
    normal = (exact >= np.finfo(np.float32).tiny) & (exact <= np.finfo(np.float32).max)
    units = np.abs(found[normal] - exact[normal]) / np.spacing(exact[normal].astype(np.float32))
    assert units.max() <= 2
    assert np.isnan(found[np.isnan(values)]).all()
    assert (found[exact > np.finfo(np.float32).max] == np.inf).all()
    assert (found[exact < np.finfo(np.float32).tiny] <= np.finfo(np.float32).tiny).all()


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12, 13, 24, 25])
@pytest.mark.parametrize(("depth", "width"), [(1, 1), (3, 17), (8, 32), (5, 40), (12, 33)])
@pytest.mark.parametrize("adds", [False, True])
def test_products_of_any_number_of_rows(count, depth, width, adds):
    import ctypes

    own = processor()
    assert own is not None
    generator = np.random.default_rng(0)
    rows, matrix = (generator.standard_normal(s).astype(np.float32) for s in ((count + 2, depth), (depth, width)))
    out = np.ones((count + 2, width), np.float32)
    layout = Layout(depth, width, depth, width, width)
    module = ir.Module("product")
    product = Matrices(module, own).product(layout, adds)
    product.linkage = ""
    code = Compiled(module, [product.name])
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    call(code.addresses[product.name])(rows.ctypes.data, matrix.ctypes.data, out.ctypes.data, count)
    np.testing.assert_allclose(out[:count], rows[:count] @ matrix + adds, rtol=2e-5, atol=2e-5)
    assert (out[count + count % 2 :] == 1).all()


def test_pieces():
    assert pieces(35, 16) == [16, 16, 3]
    assert pieces(16, 16) == [16]
