"""OperatorLayer: the operator itself, on its own grid and on others, and all that a torch.nn.Module has to bear."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import translution
from translution.errors import InputError, NotSupported, UnknownName
from translution.nn import OperatorLayer
from translution.spec import Clip, Lattice, PairTable, PerDisplacement, Shared, SpecError, presets
from translution.spec import Operator as Spec

FULL = presets.translution((3, 3), 8, 2, registers=1)
ALPHA = presets.alpha_translution((3, 3), 8, 2, rank=2, registers=1)
OPERATORS = {
    "full": FULL,
    "alpha": ALPHA,
    "alpha v": presets.alpha_translution((2, 3), 8, 2, rank=2, roles="v"),
    "causal": presets.translution((6,), 8, 2, causal=True, registers=1, qkv_bias=True),
    "window": presets.translution((4, 4), 8, 2, kernel_size=3, far=Clip(1)),
    "shaw": presets.shaw_attention((2, 3), 8, 2),
    "swin": presets.swin_attention((2, 3), 8, 2),
    "convit": presets.convit_attention((2, 3), 8, 2),
    "rope": presets.rope_attention((2, 2), 8, 2),
    "conv": presets.convolution((4, 4), 4, 6, 3, padding=1, groups=2),
    "cross": presets.self_attention((2, 2), 8, 2, key_grid=(3, 3), key_dim=6),
    "pairs": Spec(
        PairTable(((0, 1), (1, 0)), 2), 4, 1, PerDisplacement(4), PerDisplacement(4), PerDisplacement(4), output=None
    ),
}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    torch.manual_seed(0)


def double(operator, **others):
    return OperatorLayer(operator, dtype=torch.float64, **others)


def tokens(operator, *batch, dtype=torch.float64):
    count = operator.layout.num_queries if operator.uses_content else operator.layout.num_keys
    return torch.randn(*batch, count, operator.dim, dtype=dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_layer_is_its_operator(name):
    operator = OPERATORS[name]
    layer, x = double(operator), tokens(operator, 2)
    y = torch.randn(2, 9, 6, dtype=torch.float64) if name == "cross" else None
    params = {n: p.detach() for n, p in layer.operator_parameters().items()}
    expected = translution.run(operator, params, x, y, backend="reference")
    assert torch.allclose(layer(x, y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATORS)
def test_state_dict_has_the_names_of_the_spec(name, tmp_path):
    operator = OPERATORS[name]
    layer = double(operator)
    assert {n: tuple(p.shape) for n, p in layer.state_dict().items()} == dict(operator.parameters)
    assert list(layer.buffers()) == []
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = double(operator)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert sum(p.numel() for p in layer.parameters()) == operator.num_parameters


def test_mask_and_gradients_are_those_of_the_operator():
    layer, x = double(FULL), tokens(FULL, 2).requires_grad_()
    mask, pull = torch.rand(2, 1, 10, 10) < 0.7, torch.randn(2, 10, 8, dtype=torch.float64)
    found = torch.autograd.grad((layer(x, mask=mask) * pull).sum(), [x, *layer.parameters()])
    params = {n: p.detach() for n, p in layer.operator_parameters().items()}
    _, expected = translution.vjp(FULL, params, x.detach(), cotangent=pull, mask=mask, backend="reference")
    own = [expected.x, *(expected.params[n] for n, _ in layer.named_parameters())]
    for a, b in zip(found, own, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


def test_half_precision_and_autocast():
    layer, x = OperatorLayer(FULL), tokens(FULL, 2, dtype=torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert out.dtype == compiled.dtype == torch.bfloat16
    assert torch.equal(out, compiled)
    # Parameters and result are rounded to 8 bits; the sums in between are not.
    assert torch.allclose(out.float(), expected, atol=8 * 2**-8 * expected.detach().abs().max().item())
    out.sum().backward()
    assert layer.query.table.grad.dtype == torch.float32
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half(x.bfloat16()), out)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double(FULL)(x.double()).dtype == torch.float64
    with pytest.raises(InputError, match="one dtype"):
        layer(x.double())


def test_built_on_the_meta_device():
    large = presets.translution((56, 56), 1024, 16, registers=1)
    layer = OperatorLayer(large, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == large.num_parameters > 10**10
    layer = OperatorLayer(FULL, device="meta", dtype=torch.float64).to_empty(device="cpu")
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    params = {n: p.detach() for n, p in layer.named_parameters()}
    x = tokens(FULL, 1)
    assert torch.allclose(layer(x), translution.run(FULL, params, x, backend="reference"), rtol=0, atol=1e-12)


def test_copies_are_the_same_and_apart():
    layer, x = double(ALPHA), torch.randn(2, 5, 8, dtype=torch.float64)
    layer(x, grid=(2, 2))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, grid=(2, 2)), layer(x, grid=(2, 2)))
        with torch.no_grad():
            other.output.bias.add_(1)
        assert not torch.equal(other(x, grid=(2, 2)), layer(x, grid=(2, 2)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(use_reentrant):
    layer, x = double(FULL), tokens(FULL, 2).requires_grad_()
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    if use_reentrant:
        checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        found = [leaf.grad for leaf in leaves]
    else:
        found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("operator", [FULL, ALPHA], ids=["full", "alpha"])
@pytest.mark.parametrize("grid", [None, (2, 2)])
def test_a_graph_holds_the_layer_whole(operator, grid):
    layer = OperatorLayer(operator)
    x = torch.randn(2, 10 if grid is None else 5, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, grid=grid), layer(x, grid=grid)
    assert torch.equal(out, expected)
    found, own = (torch.autograd.grad(o.square().sum(), layer.parameters()) for o in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, own, strict=True))


def rows_2d(large, small, registers):
    """Rows of the large grid's tables that stand for the displacements of the small one, then the registers'."""
    (height, width), (h, w) = large, small
    grid = [
        (dr + height - 1) * (2 * width - 1) + dc + width - 1
        for dr, dc in itertools.product(range(1 - h, h), range(1 - w, w))
    ]
    first = (2 * height - 1) * (2 * width - 1)
    return grid + list(range(first, first + registers * (registers + 2)))


@pytest.mark.parametrize(
    "preset",
    [
        lambda grid: presets.translution(grid, 8, 2, registers=2),
        lambda grid: presets.alpha_translution(grid, 8, 2, rank=2, registers=2),
        lambda grid: dataclasses.replace(
            presets.swin_attention(grid, 8, 2), layout=Lattice(grid, registers=2), output=None
        ),
    ],
    ids=["full", "alpha", "swin"],
)
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (4, 1), (3, 5)])
def test_a_smaller_grid_reads_the_rows_of_its_displacements(preset, grid):
    layer, smaller = double(preset((4, 5))), preset(grid)
    rows = rows_2d((4, 5), grid, 2)
    params = {}
    for name, value in layer.state_dict().items():
        axis = {"table": 0, "bias": 1}.get(name.rpartition(".")[2]) if "relevance" in name or "table" in name else None
        params[name] = value if axis is None else value.index_select(axis, torch.tensor(rows))
    x = tokens(smaller, 2)
    expected = translution.run(smaller, params, x, backend="reference")
    for _ in range(2):
        assert torch.allclose(layer(x, grid=grid), expected, rtol=0, atol=1e-12)
    layer(x, grid=list(grid)).sum().backward()
    used = torch.zeros(layer.operator.layout.num_classes, dtype=torch.bool)
    used[rows] = True
    for name, parameter in layer.named_parameters():
        if name.endswith("table"):
            assert torch.equal(parameter.grad.flatten(1).abs().amax(1) > 0, used)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_causal_layer_takes_any_prefix(registers, length):
    layer = double(presets.translution((6,), 8, 2, causal=True, registers=registers))
    x = tokens(layer.operator, 2)
    prefix = x[:, : registers + length]
    assert torch.allclose(layer(prefix), layer(x)[:, : registers + length], rtol=0, atol=1e-12)


def test_windows_and_shared_classes_take_larger_grids():
    """Every displacement of the larger grid has its row, so that the same operator on that grid is what is meant."""
    for make in (
        lambda grid: presets.translution(grid, 8, 2, kernel_size=3),
        lambda grid: presets.translution(grid, 8, 2, far=Clip(1), registers=1),
    ):
        layer, larger = double(make((3, 3))), make((4, 5))
        x = tokens(larger, 1)
        params = {n: p.detach() for n, p in layer.named_parameters()}
        expected = translution.run(larger, params, x, backend="reference")
        assert torch.allclose(layer(x, grid=(4, 5)), expected, rtol=0, atol=1e-12)


def test_grids_of_queries_and_keys():
    layer = double(presets.translution((4,), 8, 2))
    cross = double(Spec(Lattice((2,), key_grid=(4,)), 8, 2, PerDisplacement(8), PerDisplacement(8), PerDisplacement(8)))
    x, y = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    out = cross(x, y, grid=(1,), key_grid=(3,))
    # Displacements of the layer: -3 .. 1; of one query and three keys: -2 .. 0. Keys see them as -1 .. 3 and 0 .. 2.
    params = {n: p.detach()[1:4] for n, p in cross.named_parameters()}
    smaller = dataclasses.replace(cross.operator, layout=Lattice((1,), key_grid=(3,)))
    assert torch.allclose(out, translution.run(smaller, params, x, y, backend="reference"), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="same tokens on both sides"):
        layer(x, grid=(1,), key_grid=(1,))


def test_what_does_not_fit_is_said():
    layer = OperatorLayer(FULL)
    with pytest.raises(InputError, match=r"Say which grid they are: grid=\(\.\.\., \.\.\.\)"):
        layer(torch.randn(1, 5, 8))
    with pytest.raises(InputError, match=r"rows for the displacements of \(3, 3\), and none for \(-3, -2\)"):
        layer(torch.randn(1, 13, 8), grid=(4, 3))
    with pytest.raises(InputError, match="2 axes"):
        layer(torch.randn(1, 5, 8), grid=(4,))
    with pytest.raises(InputError, match="5 tokens"):
        layer(torch.randn(1, 6, 8), grid=(2, 2))
    with pytest.raises(SpecError, match="at least 1"):
        layer(torch.randn(1, 6, 8), grid=(0, 2))
    with pytest.raises(InputError, match="pair table"):
        OperatorLayer(OPERATORS["pairs"])(torch.randn(1, 1, 4), grid=(1,))
    with pytest.raises(NotSupported, match="not on meta"):
        OperatorLayer(FULL, device="meta")(torch.empty(1, 10, 8, device="meta"))
    with pytest.raises(UnknownName):
        OperatorLayer(FULL, algorithm="pairwize")
    with pytest.raises(UnknownName):
        OperatorLayer(FULL, backend="torhc")


def test_a_layer_tells_what_it_is():
    shown = repr(OperatorLayer(presets.translution((6,), 8, 2, causal=True, kernel_size=3), algorithm="pairwise"))
    assert "grid=(6,), dim=8, num_heads=2, causal=True, kernel_size=(3,)" in shown
    assert "relative=query, key, value, displacements=3" in shown
    assert "algorithm='pairwise'" in shown
    assert "(query): ParameterGroup(table=(3, 8, 8))" in shown


def test_what_is_not_to_decay():
    assert OperatorLayer(OPERATORS["causal"]).no_weight_decay() == {
        "query.bias",
        "key.bias",
        "value.bias",
        "output.bias",
    }
    assert OperatorLayer(OPERATORS["shaw"]).no_weight_decay() == {"key.1.vectors", "value.1.vectors", "output.bias"}
    convit = {"relevance.second.weight", "relevance.gate", "output.bias"}
    assert OperatorLayer(OPERATORS["convit"]).no_weight_decay() == convit


def test_parametrizations_are_seen():
    layer, x = double(FULL), tokens(FULL, 1)
    torch.nn.utils.parametrizations.weight_norm(layer.output, "weight", dim=1)
    expected = layer(x)
    with torch.no_grad():
        layer.output.parametrizations.weight.original0.mul_(2)
        assert torch.allclose(layer(x) - layer.output.bias, 2 * (expected - layer.output.bias), rtol=0, atol=1e-12)


def test_shared_is_a_layer_too():
    """A role without rows keeps its matrix on every grid."""
    layer = double(Spec(Lattice((3, 3)), 8, 2, Shared(8), Shared(8), Shared(8)))
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    params = {n: p.detach() for n, p in layer.named_parameters()}
    smaller = dataclasses.replace(layer.operator, layout=Lattice((2, 2)))
    expected = translution.run(smaller, params, x, backend="reference")
    assert torch.allclose(layer(x, grid=(2, 2)), expected, rtol=0, atol=1e-12)
