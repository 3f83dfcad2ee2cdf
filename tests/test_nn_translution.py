"""Translution and alpha-Translution by name: timm's arguments, each honoured exactly or refused."""

import copy
import inspect
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

import translution
from translution import nn as layers
from translution.errors import InputError
from translution.nn import (
    AlphaTranslution1d,
    AlphaTranslution2d,
    Translution1d,
    Translution2d,
    Translution3d,
    attention_class,
)
from translution.spec import Clip, SpecError, presets

ROLES = ("qkv", "qk", "qv", "kv", "q", "k", "v")
GRIDS = {1: (5,), 2: (2, 3), 3: (2, 1, 2)}
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch._dynamo.reset()
    torch.manual_seed(0)


def tokens(layer, *batch):
    return torch.randn(*batch, layer.operator.layout.num_queries, layer.operator.dim, dtype=DOUBLE)


def reference(layer, x, mask=None):
    params = {n: p.detach() for n, p in layer.operator_parameters().items()}
    return translution.run(layer.operator, params, x, mask=mask, backend="reference")


@pytest.mark.parametrize("kind", layers.__all__[:3] + layers.__all__[6:9])
@pytest.mark.parametrize("roles", ROLES)
def test_a_layer_is_the_preset_of_its_name(kind, roles):
    make = getattr(layers, kind)
    layer = make(8, 2, grid=GRIDS[make.axes], roles=roles, registers=1, dtype=DOUBLE)
    preset = presets.alpha_translution if kind.startswith("Alpha") else presets.translution
    assert layer.operator == preset(GRIDS[make.axes], 8, 2, roles=roles, registers=1)
    x = tokens(layer, 2)
    assert torch.allclose(layer(x), reference(layer, x), rtol=0, atol=1e-12)


def test_arguments_have_the_names_and_the_order_of_timm():
    signature = inspect.signature(Translution2d)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [
        "dim", "num_heads", "qkv_bias", "qk_norm", "attn_drop", "proj_drop", "device", "dtype",
    ]  # fmt: skip
    assert [p.default for p in positional[1:]] == [8, False, False, 0.0, 0.0, None, None]
    layer = AlphaTranslution2d(
        8, 2, True, False, 0.0, 0.1, "cpu", DOUBLE,
        grid=(3, 4), rank=2, registers=2, kernel_size=3, dilation=1, far=1, head_dim=5, proj_bias=False,
        boundary="zeros",
    )  # fmt: skip
    assert layer.operator == presets.alpha_translution(
        (3, 4), 8, 2, rank=2, registers=2, kernel_size=3, far=Clip(1), head_dim=5, boundary="zeros", qkv_bias=True,
        output_bias=False,
    )  # fmt: skip
    assert {"query.0.bias", "key.0.bias", "value.0.bias"} < layer.state_dict().keys()
    assert layer.proj_drop.p == 0.1
    assert Translution3d(8, 2, grid=2).operator.layout.grid == (2, 2, 2)
    assert Translution1d(8, 2, grid=4, causal=True).operator.layout.causal is True


def test_a_mask_means_what_it_means_in_timm():
    """True = may attend, or a float that is added; the batch and heads broadcast."""
    layer = Translution2d(8, 2, grid=(2, 2), dtype=DOUBLE)
    x, seen = tokens(layer, 2), torch.tensor([True, True, False, True])
    assert torch.equal(
        layer(x, seen), layer(x.index_fill(1, torch.tensor([2]), torch.nan), seen).where(seen[:, None], layer(x, seen))
    )
    added = torch.zeros(4, dtype=DOUBLE).masked_fill(~seen, -math.inf)
    assert torch.allclose(layer(x, attn_mask=added), layer(x, attn_mask=seen), rtol=0, atol=1e-13)


def test_is_causal_belongs_to_causal_layers():
    causal, other = (Translution1d(8, 2, grid=4, causal=c, dtype=DOUBLE) for c in (True, False))
    x = tokens(causal, 1)
    assert torch.equal(causal(x, is_causal=True), causal(x))
    with pytest.raises(InputError, match="Build the layer with causal=True"):
        other(x, is_causal=True)


def weights_and_values(layer, x, mask=None):
    """Weights [B, H, N, N] and values [B, N, N, H, D] by the definition, through the reference backend alone."""
    operator, params = layer.operator, {n: p.detach() for n, p in layer.operator_parameters().items()}
    _, weights = translution.run(operator, params, x, mask=mask, backend="reference", return_weights=True)
    bare = type(operator)(
        **{f: getattr(operator, f) for f in operator.__dataclass_fields__} | {"output": None, "output_scale": 1.0}
    )
    count, columns = operator.layout.num_queries, []
    for j in range(count):
        # With one key alone every query that sees it has its value.
        only = torch.zeros(count, dtype=torch.bool)
        only[j] = True
        own = {n: params[n] for n in bare.parameters}
        columns.append(translution.run(bare, own, x, mask=only, backend="reference"))
    return weights, torch.stack(columns, 2).unflatten(-1, (operator.num_heads, -1))


def by_definition(layer, weights, values):
    """Heads added up and projected as the authors write it."""
    heads = torch.einsum("bhij,bijhd->bihd", weights, values) * layer.operator.output_scale
    params = layer.operator_parameters()
    if "output.up" in params:
        low = params["output.up"].shape[0] // layer.operator.num_heads
        heads, codes = heads[..., :-low].flatten(-2), heads[..., -low:].flatten(-2)
        heads = heads + codes @ params["output.up"]
    else:
        heads = heads.flatten(-2)
    return heads @ params["output.weight"] + params["output.bias"]


@pytest.mark.parametrize("make", [Translution2d, AlphaTranslution2d])
@pytest.mark.parametrize("roles", ["qkv", "qk", "v"])
def test_attention_dropout_drops_weights(make, roles):
    layer = make(8, 2, attn_drop=0.4, grid=(2, 3), registers=1, roles=roles, dtype=DOUBLE)
    x = tokens(layer, 2).requires_grad_()
    mask = torch.rand(7, 7) < 0.8
    mask[3] = False  # sees nothing
    weights, values = weights_and_values(layer, x.detach(), mask)
    assert torch.allclose(by_definition(layer, weights, values), layer.eval()(x, mask), rtol=0, atol=1e-12)
    layer.train()
    torch.manual_seed(5)
    out = layer(x, mask)
    torch.manual_seed(5)
    factor = functional.dropout(torch.ones_like(weights), 0.4)
    assert set(factor.unique().tolist()) == {0.0, 1 / 0.6}
    assert torch.allclose(out, by_definition(layer, weights * factor, values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("roles", ["qkv", "v"])
def test_gradients_through_attention_dropout(roles):
    layer = AlphaTranslution1d(2, 1, attn_drop=0.5, grid=3, rank=1, roles=roles, dtype=DOUBLE)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = tokens(layer, 1).requires_grad_()

    def out(x, *given):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(out, (x, *values))
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out(x, *values).square().sum(), [x, *values]))


def test_dropped_weights_that_are_zero_leave_gradients_finite():
    layer = Translution1d(4, 1, attn_drop=0.5, grid=5)
    x = (1e4 * torch.randn(2, 5, 4)).requires_grad_()
    layer(x).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *layer.parameters()))


def test_dropout_in_half_precision_and_on_smaller_grids():
    layer = Translution2d(8, 2, attn_drop=0.3, grid=(3, 3))
    for x in (torch.randn(1, 4, 8), torch.randn(1, 4, 8, dtype=torch.bfloat16)):
        assert layer.to(x.dtype)(x, grid=(2, 2)).dtype == x.dtype
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 9, 8)).dtype == torch.bfloat16


def test_projection_dropout_is_torchs():
    layer = Translution2d(8, 2, proj_drop=0.5, grid=(2, 2), dtype=DOUBLE)
    x = tokens(layer, 3)
    plain = layer.eval()(x)
    torch.manual_seed(1)
    out = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(out, functional.dropout(plain, 0.5))
    assert (out == 0).any()


@pytest.mark.parametrize("make", [Translution1d, AlphaTranslution1d])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_layer", [None, nn.RMSNorm])
def test_queries_and_keys_are_normalised_where_they_are_tokens_own(make, causal, norm_layer):
    layer = make(8, 2, True, True, grid=5, roles="v", causal=causal, norm_layer=norm_layer, registers=1, dtype=DOUBLE)
    assert {"q_norm.weight", "k_norm.weight"} < layer.state_dict().keys()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = tokens(layer, 2)
    _, values = weights_and_values(layer, x)
    params = layer.operator_parameters()
    q, k = (
        norm((x @ params[f"{role}.weight"] + params[f"{role}.bias"]).unflatten(-1, (2, 4))).transpose(1, 2)
        for role, norm in (("query", layer.q_norm), ("key", layer.k_norm))
    )
    mask = torch.rand(6, 6) < 0.7
    seen = mask & torch.ones(6, 6, dtype=torch.bool).tril() if causal else mask
    logits = (4**-0.5 * q @ k.mT).masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)
    values = values.where(seen[None, :, :, None, None], 0.0)
    assert torch.allclose(layer(x, mask), by_definition(layer, weights, values), rtol=0, atol=1e-12)
    added = torch.randn(6, 6, dtype=DOUBLE)
    seen = torch.ones(6, 6, dtype=torch.bool).tril() if causal else torch.ones(6, 6, dtype=torch.bool)
    weights = (4**-0.5 * q @ k.mT + added).masked_fill(~seen, -torch.inf).softmax(-1)
    _, values = weights_and_values(layer, x)
    assert torch.allclose(layer(x, added), by_definition(layer, weights, values), rtol=0, atol=1e-12)


def test_what_can_not_be_is_refused():
    for roles in ROLES[:-1]:
        with pytest.raises(SpecError, match='use roles="v"'):
            Translution2d(8, 2, qk_norm=True, grid=(2, 2), roles=roles)
        with pytest.raises(SpecError, match='use roles="v"'):
            AlphaTranslution2d(8, 2, qk_norm=True, grid=(2, 2), roles=roles)
    with pytest.raises(SpecError, match="Leave scale_norm out"):
        Translution2d(8, 2, grid=(2, 2), scale_norm=True)
    with pytest.raises(SpecError, match="use AlphaTranslution2d"):
        Translution2d(8, 2, grid=(2, 2), rank=4)
    with pytest.raises(SpecError, match="one for each of the 2 axes"):
        Translution2d(8, 2, grid=(2, 2, 2))
    with pytest.raises(SpecError, match="divisor of dim"):
        Translution2d(9, 2, grid=(2, 2))
    with pytest.raises(ValueError, match="dropout probability"):
        Translution2d(8, 2, grid=(2, 2), attn_drop=1.5)
    with pytest.raises(TypeError, match="grid"):
        Translution2d(8, 2)


def test_a_graph_holds_the_layer_in_evaluation():
    layer = AlphaTranslution2d(8, 2, attn_drop=0.5, proj_drop=0.5, grid=(3, 3)).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 8)
    assert torch.equal(compiled(x, grid=(2, 2)), layer(x, grid=(2, 2)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, after a break
def test_dropping_weights_breaks_a_graph_and_is_not_lost_in_it():
    layer = Translution2d(8, 2, attn_drop=0.5, grid=(2, 2))
    x = torch.randn(1, 4, 8)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    torch.manual_seed(1)
    out = torch.compile(layer, backend="aot_eager")(x)
    torch.manual_seed(1)
    assert torch.equal(out, layer(x))


def test_on_the_meta_device_and_copied():
    layer = Translution2d(8, 2, qk_norm=True, grid=(2, 2), roles="v", device="meta", dtype=DOUBLE)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    x = tokens(layer, 1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert torch.isfinite(layer(x)).all()


def test_a_class_for_models_that_know_no_grid():
    """As timm makes it: dim by place, the rest by name, the class looked at with issubclass."""
    made = attention_class(Translution2d, grid=(2, 2), registers=1)
    assert issubclass(made, nn.Module)
    layer = made(
        8, num_heads=2, qkv_bias=True, qk_norm=False, scale_norm=False, proj_bias=True, attn_drop=0.0, proj_drop=0.1,
        norm_layer=nn.LayerNorm, device=None, dtype=DOUBLE,
    )  # fmt: skip
    assert type(layer) is Translution2d
    assert layer.operator == presets.translution((2, 2), 8, 2, registers=1, qkv_bias=True)
    assert list(pickle.loads(pickle.dumps(layer)).state_dict()) == list(layer.state_dict())
    assert layer(tokens(layer, 1), attn_mask=None, is_causal=False).shape == (1, 5, 8)


def test_a_smaller_input_size_is_a_crop():
    for make in (Translution2d, AlphaTranslution2d):
        layer = make(8, 2, grid=(3, 4), registers=1, dtype=DOUBLE)
        whole, x = copy.deepcopy(layer), torch.randn(2, 7, 8, dtype=DOUBLE)
        layer.set_input_size((2, 3))
        assert torch.equal(layer(x), whole(x, grid=(2, 3)))
        assert torch.equal(layer(x[:, :5], grid=2), whole(x[:, :5], grid=(2, 2)))
        assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == dict(layer.operator.parameters)
        assert "grid=(2, 3)" in repr(layer)
        assert all(p.requires_grad for p in layer.parameters())
        with pytest.raises(InputError, match="interpolate=True"):
            layer.set_input_size((2, 4))


def test_a_larger_input_size_interpolates_between_displacements():
    layer = Translution2d(2, 1, grid=(2, 3), registers=1, dtype=DOUBLE)
    # A function of the displacement that is linear on each axis is met exactly; keys see -delta.
    labels = layer.operator.layout.labels()[:-3]
    with torch.no_grad():
        for name, sign in (("query", 1), ("key", -1), ("value", 1)):
            own = layer.get_parameter(f"{name}.table")
            for row, (dr, dc) in enumerate(labels):
                own[row] = 1 + sign * (5 * dr + 7 * dc) + dr * dc
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    layer.set_input_size((3, 5), interpolate=True)
    assert layer(tokens(layer, 1)).shape == (1, 16, 2)
    for name, sign in (("query", 1), ("key", -1), ("value", 1)):
        table = layer.get_parameter(f"{name}.table")
        for row, (r, c) in enumerate(itertools.product(range(-2, 3), range(-4, 5))):
            # The key's row r stands for the pair that the key sees at that displacement: -delta.
            dr, dc = r / 2, c / 2
            expected = 1 + sign * (5 * dr + 7 * dc) + dr * dc
            assert torch.allclose(table[row], torch.full((2, 2), expected, dtype=DOUBLE), rtol=0, atol=1e-12)
        assert torch.equal(table[-3:], before[f"{name}.table"][-3:])
    assert torch.equal(layer.get_parameter("output.weight"), before["output.weight"])


def test_one_axis_may_shrink_while_another_grows():
    layer = Translution2d(2, 1, grid=(3, 2), causal=(False, True), dtype=DOUBLE)
    # A causal axis has displacements 0 and 1, which keys see as -1 and 0.
    old = {
        name: dict(zip(itertools.product(range(-2, 3), seen), layer.get_parameter(f"{name}.table"), strict=True))
        for name, seen in (("value", (0, 1)), ("key", (-1, 0)))
    }
    layer.set_input_size((2, 3), interpolate=True)
    for name, seen in (("value", (0, 1, 2)), ("key", (-2, -1, 0))):
        table, own = layer.get_parameter(f"{name}.table"), old[name]
        assert len(table) == 9
        for row, (r, c) in enumerate(itertools.product((-1, 0, 1), seen)):
            below, above = own[r, c // 2], own[r, -(-c // 2)]
            assert torch.allclose(table[row], (below + above) / 2, rtol=0, atol=1e-15)


def test_a_causal_axis_that_shrinks_keeps_what_is_near():
    """Queries and values have it first, keys, which see it from the other side, last."""
    layer = Translution2d(2, 1, grid=(2, 3), causal=(False, True), dtype=DOUBLE)
    old = {
        name: dict(zip(itertools.product((-1, 0, 1), seen), layer.get_parameter(f"{name}.table"), strict=True))
        for name, seen in (("query", (0, 1, 2)), ("key", (-2, -1, 0)))
    }
    layer.set_input_size((3, 2), interpolate=True)
    for name, seen in (("query", (0, 1)), ("key", (-1, 0))):
        table, own = layer.get_parameter(f"{name}.table"), old[name]
        for row, (r, c) in enumerate(itertools.product(range(-2, 3), seen)):
            assert torch.allclose(table[row], (own[r // 2, c] + own[-(-r // 2), c]) / 2, rtol=0, atol=1e-15)


def test_windows_and_shared_classes_change_no_parameter():
    for more in ({"kernel_size": 3}, {"far": 1}):
        layer = Translution2d(4, 1, grid=(2, 2), registers=1, dtype=DOUBLE, **more)
        before = dict(layer.named_parameters())
        layer.set_input_size((4, 3))
        assert all(layer.get_parameter(n) is p for n, p in before.items())
        x = tokens(layer, 1)
        assert torch.allclose(layer(x), reference(layer, x), rtol=0, atol=1e-12)


def test_raster_order_interpolates_from_what_there_is():
    layer = Translution2d(4, 1, grid=(2, 2), causal=True, registers=1, dtype=DOUBLE)
    layer.set_input_size((3, 3), interpolate=True)
    x = tokens(layer, 1)
    assert torch.isfinite(layer(x)).all()
    later = x.clone()
    later[:, -1] += 1
    assert torch.equal(layer(later)[:, :-1], layer(x)[:, :-1])
