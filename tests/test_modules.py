"""Reductions E3, E4, E5 with R1, R2, R3 against torch's own modules: random settings, values and gradients, stream."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import translution
from translution.backends.torch.modules import (
    ConversionError,
    TranslutionAttention,
    TranslutionConv,
    drop_in,
    from_module,
    mask_from_multihead_attention,
)
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.conformance.module_bounds import evaluate
from translution.conformance.verify_modules import compare
from translution.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),
]

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
POOL = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def examples(count: int) -> Any:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(module: nn.Module, x: torch.Generator, integers: bool = False) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(numbers(parameter.shape, x, integers))
    return module


def numbers(shape: Any, x: torch.Generator, integers: bool = False) -> Tensor:
    if integers:
        return torch.randint(-3, 4, tuple(shape), generator=x).double()
    return torch.randn(tuple(shape), generator=x, dtype=torch.float64)


def assert_integers_equal(module: nn.Module, shape: Any, x: torch.Generator, **more: Any) -> None:
    """Sums of small integers are exact in any order: equality, no bound."""
    module = fill(copy.deepcopy(module), x, integers=True)
    arguments = {"input": numbers(shape, x, integers=True).requires_grad_(), **more}
    cotangent = numbers(module(**arguments).shape, x, integers=True)
    want, got = evaluate(module, arguments, cotangent), evaluate(drop_in(module), arguments, cotangent)
    assert torch.equal(got[0], want[0])
    assert got[2].keys() == want[2].keys()
    for name, gradient in want[2].items():
        assert torch.equal(got[2][name], gradient), name


@st.composite
def axes(draw: Any, rank: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


@st.composite
def convolutions(draw: Any, rank: int) -> tuple[nn.Module, tuple[int, ...]]:
    kernel = draw(axes(rank, 1, (4, 3, 2)[rank - 1]))
    dilation = draw(axes(rank, 1, 2 if rank < 3 else 1 + draw(st.booleans())))
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers", "numbers"]))
    if padding == "numbers":
        padding = draw(axes(rank, 0, 3))
    stride = (1,) * rank if padding == "same" else draw(axes(rank, 1, 3))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    pads = [0 if padding == "valid" else p for p in (padding if isinstance(padding, tuple) else (0,) * rank)]
    if padding == "same":
        pads = [d * (k - 1) - d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    needed = {"zeros": 0, "circular": 0, "reflect": 1, "replicate": 0}[mode]
    grid = tuple(
        max(
            1, p + needed if mode in ("reflect", "circular") else 1, 0 if padding == "same" else d * (k - 1) + 1 - 2 * p
        )
        + draw(st.integers(0, 2))
        for p, d, k in zip(pads, dilation, kernel, strict=True)
    )
    module = CONV[rank - 1](
        *channels,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    event(f"{type(module).__name__} {mode} {padding if isinstance(padding, str) else 'numbers'}")
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return module, (*batch, channels[0], *grid)


@pytest.mark.parametrize("rank", [1, 2, 3])
@examples(200)
@given(st.data(), st.integers(0, 2**20))
def test_E5_R2_convolution(rank: int, data: st.DataObject, seed: int) -> None:
    module, shape = data.draw(convolutions(rank))
    x = generator(seed)
    fill(module, x)
    _, used, compared = compare(module, {"input": numbers(shape, x)}, x)
    assert used <= 1
    assert "d/d weight" in compared
    assert "d/d input" in compared
    assert_integers_equal(module, shape, x)


@st.composite
def transposed(draw: Any) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    rank = draw(st.integers(1, 3))
    kernel, stride = draw(axes(rank, 1, 3)), draw(axes(rank, 1, 3))
    dilation, padding = draw(axes(rank, 1, 2)), draw(axes(rank, 0, 2))
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    grid = tuple(
        next(n for n in range(1, 9) if (n - 1) * s - 2 * p + d * (k - 1) + o + 1 >= 1) + draw(st.integers(0, 1))
        for s, p, d, k, o in zip(stride, padding, dilation, kernel, extra, strict=True)
    )
    module = TRANSPOSED[rank - 1](
        *channels,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
        dtype=torch.float64,
    )
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    return module, (*batch, channels[0], *grid), stride


@examples(110)
@given(transposed(), st.integers(0, 2**20), st.booleans())
def test_E5_R2_transposed_convolution(case: tuple[Any, ...], seed: int, sized: bool) -> None:
    module, shape, stride = case
    x = generator(seed)
    fill(module, x)
    more = {}
    if sized:  # the largest output_size that the module allows
        least = module(numbers(shape, x)).shape[-len(stride) :]
        sizes = zip(least, module.output_padding, stride, strict=True)
        more["output_size"] = [n - extra + s - 1 for n, extra, s in sizes]
    _, used, compared = compare(module, {"input": numbers(shape, x), **more}, x)
    assert used <= 1
    assert "d/d weight" in compared
    assert_integers_equal(module, shape, x, **more)


@st.composite
def poolings(draw: Any) -> tuple[nn.Module, tuple[int, ...]]:
    rank = draw(st.integers(1, 3))
    kernel = draw(axes(rank, 1, 3))
    stride = draw(st.none() | axes(rank, 1, 3))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    grid = tuple(max(1, k - 2 * p) + draw(st.integers(0, 3)) for k, p in zip(kernel, padding, strict=True))
    module = POOL[rank - 1](kernel, stride=stride, padding=padding, count_include_pad=draw(st.booleans()))
    return module, (*draw(st.sampled_from([(), (2,)])), draw(st.integers(1, 3)), *grid)


@examples(70)
@given(poolings(), st.integers(0, 2**20))
def test_E3_R3_average_pooling(case: tuple[nn.Module, tuple[int, ...]], seed: int) -> None:
    module, shape = case
    x = generator(seed)
    _, used, compared = compare(module, {"input": numbers(shape, x)}, x)
    assert used <= 1
    assert "d/d input" in compared


@st.composite
def attentions(draw: Any) -> tuple[nn.MultiheadAttention, dict[str, Any]]:
    heads, width, batched = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    dim = heads * width
    who = draw(st.sampled_from(["self", "cross", "value apart", "kdim and vdim", "all one kdim"]))
    kdim, vdim = {
        "kdim and vdim": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "all one kdim": (dim + 1, dim + 1),
    }.get(who, (None, None))
    first = draw(st.booleans())
    module = nn.MultiheadAttention(
        dim, heads, bias=draw(st.booleans()), kdim=kdim, vdim=vdim, batch_first=first, dtype=torch.float64
    )
    x = generator(draw(st.integers(0, 2**20)))
    fill(module, x)
    queries, batch = draw(st.integers(1, 4)), draw(st.integers(1, 2)) if batched else 1
    keys = queries if who == "self" else draw(st.integers(1, 4))

    def tokens(count: int, channels: int) -> Tensor:
        if not batched:
            return numbers((count, channels), x)
        return numbers((batch, count, channels) if first else (count, batch, channels), x)

    query = tokens(queries, dim)
    key = query if who == "self" else tokens(keys, module.kdim)
    value = key if who in ("self", "cross", "all one kdim") else tokens(keys, module.vdim)
    call: dict[str, Any] = {"query": query, "key": key, "value": value}
    call["need_weights"] = draw(st.booleans())
    call["average_attn_weights"] = draw(st.booleans())

    def mask(kind: str, shape: tuple[int, ...]) -> Tensor:
        removed = torch.rand(shape, generator=x) < 0.4
        if call["need_weights"]:  # a query without keys is NaN there: see test_M3
            removed[..., 0] = False
        if kind == "bool":
            return removed
        return numbers(shape, x).masked_fill(removed, -math.inf)

    attention_mask = draw(st.sampled_from(["none", "bool", "float", "bool 3D", "float 3D", "causal"]))
    if attention_mask == "causal":
        call["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        call["is_causal"] = draw(st.booleans())
    elif attention_mask != "none":
        deep = (batch * heads,) if "3D" in attention_mask else ()
        call["attn_mask"] = mask(attention_mask.split()[0], (*deep, queries, keys))
    padding_mask = draw(st.sampled_from(["none", "bool", "float"]))
    if padding_mask != "none":
        call["key_padding_mask"] = mask(padding_mask, (batch, keys) if batched else (keys,))
    event(f"{who}, attn_mask {attention_mask}, key_padding_mask {padding_mask}")
    return module, call


@examples(250)
@given(attentions(), st.integers(0, 2**20))
def test_E4_R1_multihead_attention(case: tuple[nn.MultiheadAttention, dict[str, Any]], seed: int) -> None:
    module, call = case
    _, used, compared = compare(module, call, generator(seed))
    assert used <= 1
    assert ("attention weights" in compared) == call["need_weights"]
    assert all(f"d/d {name}" in compared for name, _ in module.named_parameters())


@pytest.mark.parametrize("algorithm", ["stream", "pairwise", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_algorithm_gives_the_module(algorithm: str | None, dtype: torch.dtype) -> None:
    x = generator(3)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2).to(dtype)
    attention = nn.MultiheadAttention(6, 2, batch_first=True).to(dtype)
    query = numbers((2, 5, 6), x).to(dtype)
    assert compare(conv, {"input": numbers((2, 4, 5, 6), x).to(dtype)}, x, algorithm)[1] <= 1
    call = {"query": query, "key": query, "value": query, "need_weights": algorithm is not None}
    assert compare(attention, call, x, algorithm)[1] <= 1


@pytest.mark.parametrize("backend", ["reference", "numpy"])
def test_parameters_serve_every_backend(backend: str) -> None:
    x = generator(4)
    conv = fill(nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=(1, 2), groups=2, dtype=torch.float64), x, integers=True)
    operator, params = from_module(conv, (5, 4))
    image = numbers((2, 4, 5, 4), x, integers=True)
    queries = torch.zeros(2, operator.layout.num_queries, 4, dtype=torch.float64)
    own = {name: value.detach() for name, value in params.items()}
    out = translution.run(operator, own, queries, image.flatten(2).mT, backend=backend)
    assert torch.equal(out.mT.unflatten(2, operator.layout.grid), conv(image).detach())


def test_L4_causal_layout_is_the_causal_mask() -> None:
    x = generator(5)
    module = fill(nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64), x)
    query = numbers((1, 5, 4), x)
    operator, params = from_module(module, 5, causal=True)
    own = {name: value.detach() for name, value in params.items()}
    masked = module(query, query, query, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    out, weights = translution.run(operator, own, query, algorithm="stream", return_weights=True)
    numpy_params = {name: value.numpy() for name, value in own.items()}
    check("out", out, masked[0], budget(operator, numpy_params, query.numpy(), dtype="float64").out)
    assert torch.equal(weights.triu(1), torch.zeros(1, 2, 5, 5, dtype=torch.float64))


def test_parameters_are_the_weights_relaid() -> None:
    """Every weight stands in its operator exactly once, unscaled: the gradient of the sum of all parameters is 1."""
    for module, options in (
        (nn.Conv2d(4, 6, (3, 2), groups=2), {"grid": (5, 6)}),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), {"grid": 5}),
        (nn.MultiheadAttention(6, 2), {"grid": 4}),
        (nn.MultiheadAttention(6, 2, kdim=3, vdim=5), {"grid": 4, "key_grid": 3}),
        (nn.MultiheadAttention(6, 2, bias=False), {"grid": 4, "separate_values": True}),
    ):
        operator, params = from_module(module, **options)
        assert {name: tuple(value.shape) for name, value in params.items()} == operator.parameters
        weights = list(module.parameters())
        counts = torch.autograd.grad(sum(value.sum() for value in params.values()), weights)
        assert all(torch.equal(count, torch.ones_like(count)) for count in counts)
        total = sum(value.detach().double().abs().sum() for value in params.values())
        assert total.item() == pytest.approx(sum(w.detach().double().abs().sum().item() for w in weights), rel=1e-12)


def test_M3_row_without_keys() -> None:
    """0 before the output projection: as torch has it with need_weights=False, where need_weights=True gives NaN."""
    module = fill(nn.MultiheadAttention(4, 2, dtype=torch.float64), generator(6))
    query = numbers((3, 4), generator(7)).requires_grad_()
    mask = torch.tensor([[False, True, False], [True, True, True], [False, False, False]])
    replaced = TranslutionAttention(module)
    out, weights = replaced(query, query, query, attn_mask=mask)
    assert torch.equal(out[1], module.out_proj.bias)
    assert torch.equal(weights[1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(module(query, query, query, attn_mask=mask, need_weights=False)[0][1], module.out_proj.bias)
    (gradient,) = torch.autograd.grad(out[1].sum(), query)
    assert torch.equal(gradient, torch.zeros_like(query))


def test_M1_M2_mask_conversion() -> None:
    removed = torch.tensor([[False, True, True], [True, False, True]])
    kept = mask_from_multihead_attention(removed, num_heads=2)
    assert kept is not None
    assert kept.shape == (1, 1, 2, 3)
    assert torch.equal(kept[0, 0], ~removed)
    padding = torch.tensor([[True, False, False], [False, False, True]])
    both = mask_from_multihead_attention(removed, padding, num_heads=2)
    assert both is not None
    assert torch.equal(both[:, 0], ~removed[None] & ~padding[:, None])
    deep = torch.rand(6, 2, 3) < 0.5
    split = mask_from_multihead_attention(deep, num_heads=2)
    assert split is not None
    assert split.shape == (3, 2, 2, 3)
    assert torch.equal(split[1, 1], ~deep[3])  # batch 1, head 1
    added = mask_from_multihead_attention(torch.full((2, 3), 0.5), padding, num_heads=2)
    assert added is not None
    assert torch.equal(added[0, 0, 0], torch.tensor([-math.inf, 0.5, 0.5]))
    assert mask_from_multihead_attention(None, None, num_heads=2) is None
    with pytest.raises(InputError, match="M6"):
        mask_from_multihead_attention(torch.zeros(3, 2, 3), num_heads=2)
    with pytest.raises(InputError, match="M6"):
        mask_from_multihead_attention(None, torch.zeros(1, 2, 3), num_heads=2)
    with pytest.raises(InputError, match="M1"):
        mask_from_multihead_attention(torch.zeros(2, 3, dtype=torch.int64), num_heads=2)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input - input.mean())


REFUSED = [
    (nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv"),
    (nn.MultiheadAttention(4, 2, add_zero_attn=True), "add_zero_attn"),
    (nn.MultiheadAttention(4, 2, dropout=0.1), "dropout=0.1 acts on its weights in training mode"),
    (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode"),
    (nn.AvgPool2d(2, divisor_override=3), "divisor_override"),
    (nn.Linear(2, 2), "it is none of"),
    (Standardised(1, 1, 1), "overrides forward"),
    (nn.Conv2d(1, 1, 1, dtype=torch.complex64), "complex64"),
    (torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 1, 1)), "its parameters are"),
]


@pytest.mark.parametrize(("module", "reason"), REFUSED, ids=[reason.split()[0] for _, reason in REFUSED])
def test_refusals_name_reason_and_remedy(module: nn.Module, reason: str) -> None:
    with pytest.raises(ConversionError, match="can't be converted because") as caught:
        drop_in(module)
    assert reason in caught.value.reason
    assert caught.value.remedy in str(caught.value)


def test_refusal_of_lazy_modules() -> None:
    lazy = nn.LazyConv2d(2, 3)
    with pytest.raises(ConversionError, match="no shape yet"):
        drop_in(lazy)
    lazy(torch.zeros(1, 3, 4, 4))
    assert drop_in(lazy)(torch.zeros(1, 3, 4, 4)).shape == (1, 2, 2, 2)


def test_dropout_is_refused_in_training_and_harmless_in_eval() -> None:
    module = nn.MultiheadAttention(4, 2, dropout=0.5).eval()
    replaced = TranslutionAttention(module)
    x = torch.randn(3, 4, generator=generator(8))
    assert replaced(x, x, x)[0].shape == (3, 4)
    with pytest.raises(ConversionError, match="dropout"):
        replaced.train()(x, x, x)


def test_drop_in_keeps_names_parameters_layout_and_counts() -> None:
    conv = nn.Conv2d(3, 4, 3)
    replaced = TranslutionConv(conv)
    assert replaced.weight is conv.weight
    assert list(replaced.state_dict()) == list(conv.state_dict())
    assert (replaced.in_channels, replaced.stride, replaced.padding_mode) == (3, (1, 1), "zeros")
    assert replaced(torch.zeros(2, 3, 5, 6)).is_contiguous()
    assert replaced(torch.zeros(3, 5, 6)).shape == (4, 3, 4)  # another input size, unbatched
    assert replaced.calls == 2
    assert copy.deepcopy(replaced).calls == 2
    attention = nn.MultiheadAttention(4, 2)
    state = {name: torch.ones_like(value) for name, value in attention.state_dict().items()}
    other = TranslutionAttention(attention)
    other.load_state_dict(state)
    assert torch.equal(attention.in_proj_weight, torch.ones(12, 4))


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(InputError, match="D1"):
        TranslutionConv(nn.Conv2d(3, 4, 3))(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="output_size"):
        TranslutionConv(nn.Conv2d(3, 4, 3))(torch.zeros(1, 3, 4, 4), output_size=(2, 2))
    with pytest.raises(ValueError, match="output_size"):
        TranslutionConv(nn.ConvTranspose1d(3, 4, 3, stride=2))(torch.zeros(1, 3, 4), output_size=(20,))
    with pytest.raises(InputError, match="L4"):
        TranslutionAttention(nn.MultiheadAttention(4, 2))(*[torch.zeros(3, 4)] * 3, is_causal=True)
    with pytest.raises(ConversionError, match="no convolution"):
        TranslutionConv(nn.MultiheadAttention(4, 2))
    with pytest.raises(ConversionError, match="no attention"):
        TranslutionAttention(nn.Conv1d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="belong to attention"):
        from_module(nn.Conv1d(1, 1, 1), 3, causal=True)
    with pytest.raises(ValueError, match="channels"):
        from_module(nn.AvgPool1d(2), 3)
    with pytest.raises(ValueError, match="spatial axes"):
        from_module(nn.Conv2d(1, 1, 1), 3)
