"""step(): token by token the same as all at once."""

import copy
import pickle

import pytest
import torch

from translution.errors import InputError
from translution.nn import AlphaTranslution1d, OperatorLayer, Translution1d, Translution2d
from translution.spec import (
    BiasTable,
    Clip,
    Concat,
    Lattice,
    LogBuckets,
    LowRank,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    QuadraticBias,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
    presets,
)

ROLES = ("qkv", "qk", "qv", "kv", "q", "k", "v")
SETTINGS = [
    {"qkv_bias": True},
    {"registers": 2},
    {"kernel_size": 3},
    {"kernel_size": 2, "dilation": 2, "registers": 1},
    {"far": 1, "registers": 1},
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def step_by_step(layer, x, first):
    out, state = layer.step(x[:, :first])
    found = [out]
    for place in range(first, x.shape[1]):
        out, state = layer.step(x[:, place : place + 1], state)
        found.append(out)
    return torch.cat(found, 1), state


@pytest.mark.parametrize("make", [Translution1d, AlphaTranslution1d])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(s))
def test_steps_are_the_full_forward(make, roles, settings):
    layer = make(8, 2, grid=7, causal=True, roles=roles, dtype=torch.float64, **settings)
    registers = layer.operator.layout.registers
    x = torch.randn(3, registers + 7, 8, dtype=torch.float64)
    for first in (1, 4, 7):
        out, _ = step_by_step(layer, x, registers + first)
        assert torch.allclose(out, layer(x), rtol=0, atol=1e-12)


CAUSAL = Lattice((6,), causal=True, registers=1)
WIDE = {"query": PerDisplacement(8), "key": PerDisplacement(8), "value": PerDisplacement(8)}
OTHERS = {
    "attention": presets.self_attention((6,), 8, 2, causal=True, qkv_bias=True, registers=1),
    "rope": presets.rope_attention((6,), 8, 2, causal=True, registers=1),
    "rope, interleaved": presets.rope_attention((6,), 8, 2, causal=True, pairing="interleaved"),
    "rotated tables": Operator(
        CAUSAL, 8, 2, Shared(8), Rotary(PerDisplacement(8)), Concat((Rotary(Shared(4)), PerDisplacement(4)))
    ),
    "alibi": presets.alibi_attention((6,), 8, 2, slopes=(0.3, 0.7)),
    "alpha, rotary": presets.alpha_translution((6,), 8, 2, rank=2, causal=True, rotary=True),
    "shaw": presets.shaw_attention((6,), 8, 2, causal=True, max_distance=2),
    "vectors": Operator(CAUSAL, 8, 2, Vectors(8), Vectors(8), Sum((Shared(8), Vectors(8)))),
    "low rank": Operator(
        CAUSAL, 8, 2, LowRank(3, 8), Sum((Shared(8, groups=2), LowRank(3, 8))), PerDisplacement(8, groups=2)
    ),
    "bias": Operator(CAUSAL, 8, 2, **WIDE, relevance=Softmax(scale=0.7, bias=BiasTable()), output_scale=0.5),
    "t5": presets.t5_attention((12,), 8, 2, causal=True, num_buckets=4, max_distance=8),
    "mixture": Operator(
        CAUSAL, 8, 2, **WIDE, relevance=Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias()))
    ),
    "slopes": Operator(CAUSAL, 8, 2, Shared(8), relevance=Softmax(content=False, bias=SlopeBias())),
    "ones": Operator(Lattice((6,), causal=True, kernel_size=3), 8, 1, PerDisplacement(6), relevance=Ones()),
    "mean": Operator(CAUSAL, 8, 2, PerDisplacement(6), relevance=Mean(), output=Shared(4)),
    "buckets": Operator(Lattice((9,), causal=True, far=LogBuckets(4, 6)), 8, 2, **WIDE),
    "axis flag": Operator(Lattice((6,), causal=(True,), far=Clip(2)), 8, 2, **WIDE),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_causal_operator_steps(name):
    layer = OperatorLayer(OTHERS[name], dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    layout = layer.operator.layout
    x = torch.randn(2, layout.num_queries, 8, dtype=torch.float64)
    out, _ = step_by_step(layer, x, layout.registers + 1)
    assert torch.allclose(out, layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_batch_dimensions(batch):
    layer = AlphaTranslution1d(8, 2, grid=4, causal=True, rank=1, registers=1, dtype=torch.float64)
    x = torch.randn(*batch, 5, 8, dtype=torch.float64)
    out, state = layer.step(x[..., :3, :])
    for place in (3, 4):
        out, state = layer.step(x[..., place : place + 1, :], state)
        assert torch.allclose(out, layer(x)[..., place : place + 1, :], rtol=0, atol=1e-12)


def test_normalised_queries_and_keys_step():
    layer = Translution1d(8, 2, True, True, grid=6, causal=True, roles="v", registers=1, dtype=torch.float64)
    torch.nn.init.normal_(layer.k_norm.weight)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    out, _ = step_by_step(layer, x, 2)
    assert torch.allclose(out, layer(x), rtol=0, atol=1e-12)


def test_a_state_holds_what_a_later_token_needs():
    """Inputs where matrices differ between displacements, codes where they are brought down, features where shared."""

    def kept(layer):
        _, state = layer.step(torch.randn(2, 5, 8))
        return {name: tuple(value.shape) for name, value in state.kept.items()}

    settings = {"grid": 9, "causal": True}
    assert kept(Translution1d(8, 2, **settings)) == {"inputs": (2, 5, 8)}
    assert kept(Translution1d(8, 2, roles="q", **settings)) == {"key": (2, 5, 8), "value": (2, 5, 8)}
    found = kept(AlphaTranslution1d(8, 2, rank=1, **settings))
    assert found == {"key": (2, 5, 10), "key.1.down": (2, 5, 2), "value": (2, 5, 10), "value.1.down": (2, 5, 2)}
    # A window of 3 never sees farther than 2 tokens back, whatever the length.
    windowed = Translution1d(8, 2, kernel_size=3, registers=1, **settings)
    x, (_, state) = torch.randn(2, 1, 8), windowed.step(torch.randn(2, 4, 8))
    for _ in range(9):
        _, state = windowed.step(x, state)
    assert (state.first, state.length) == (10, 12)
    assert {tuple(v.shape) for v in state.kept.values()} == {(2, 3, 8)}


def test_windows_go_on_without_end():
    for settings in ({"kernel_size": 3}, {"far": 2}):
        layer = Translution1d(8, 2, grid=4, causal=True, registers=1, dtype=torch.float64, **settings)
        x = torch.randn(1, 12, 8, dtype=torch.float64)
        out, _ = step_by_step(layer, x, 2)
        assert torch.allclose(out, layer(x, grid=(11,)), rtol=0, atol=1e-12)


def test_states_are_values():
    layer = Translution1d(8, 2, grid=6, causal=True, dtype=torch.float64)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    _, state = layer.step(x[:, :3])
    first, _ = layer.step(x[:, 3:4], state)
    again, _ = layer.step(x[:, 3:4], state)
    assert torch.equal(first, again)
    order = torch.tensor([2, 0])
    some, _ = layer.step(x[order, 3:4], state.select(lambda kept: kept[order]))
    assert torch.allclose(some, first[order], rtol=0, atol=1e-14)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(other.step(x[:, 3:4], pickle.loads(pickle.dumps(state)))[0], first)


def test_gradients_go_through_steps():
    layer = AlphaTranslution1d(8, 2, grid=4, causal=True, rank=1, registers=1, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64).requires_grad_()
    leaves = [x, *layer.parameters()]
    stepped = torch.autograd.grad(step_by_step(layer, x, 2)[0].square().sum(), leaves)
    for found, own in zip(stepped, torch.autograd.grad(layer(x).square().sum(), leaves), strict=True):
        assert own.abs().max() > 0
        assert torch.allclose(found, own, rtol=0, atol=1e-11)


def test_half_precision_and_autocast():
    layer = AlphaTranslution1d(8, 2, grid=6, causal=True).bfloat16()
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16)
    out, _ = step_by_step(layer, x, 1)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out, layer(x), atol=8 * 2**-8 * out.detach().abs().max().item())
    layer = layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = layer.step(x[:, :3].float())
        assert layer.step(x[:, 3:4].float(), state)[0].dtype == out.dtype == torch.bfloat16


def test_dropout_of_the_projection_and_none_of_weights():
    layer = Translution1d(8, 2, proj_drop=0.5, grid=4, causal=True)
    x = torch.randn(1, 1, 8)
    _, state = layer.step(x)
    torch.manual_seed(0)
    out, _ = layer.step(x, state)
    assert (out == 0).any()
    dropping = Translution1d(8, 2, attn_drop=0.5, grid=4, causal=True)
    with pytest.raises(InputError, match=r"Call eval\(\) first"):
        dropping.step(x)
    assert dropping.eval().step(x)[0].shape == (1, 1, 8)


def test_what_can_not_step_says_so():
    x = torch.randn(1, 1, 8)
    for layer in (
        Translution1d(8, 2, grid=4),
        Translution2d(8, 2, grid=(2, 2), causal=True),
        Translution1d(8, 2, grid=4, causal=True, kernel_size=3, boundary="zeros"),
        OperatorLayer(
            Operator(Lattice((2,), key_grid=(4,), causal=True, offset=2), 8, 2, Shared(8), Shared(8), Shared(8))
        ),
    ):
        with pytest.raises(InputError, match="causal=True on a 1-D grid"):
            layer.step(x)
    layer = Translution1d(8, 2, grid=2, causal=True)
    _, state = layer.step(torch.randn(1, 2, 8))
    with pytest.raises(InputError, match=r"token 2 of the sequence.*displacements up to 1"):
        layer.step(x, state)
    with pytest.raises(InputError, match="2 registers and at least one token"):
        Translution1d(8, 2, grid=2, causal=True, registers=2).step(torch.randn(1, 2, 8))
    with pytest.raises(InputError, match="takes one token"):
        layer.step(torch.randn(1, 2, 8), state)
