"""verify_modules: a user's model is compared module by module, and planted wrong conversions are caught."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from translution.backends.torch import modules
from translution.backends.torch.conversion import Attention, Convolution, TransposedConvolution
from translution.conformance.error_model import budget
from translution.conformance.module_bounds import attention_bounds, evaluate, window_bounds
from translution.conformance.results import CannotVerify
from translution.conformance.verify_modules import capture, compare, verify_modules
from translution.errors import UnknownName


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, output_padding=1)
        self.pool = nn.AvgPool2d(2, padding=1)
        self.even = nn.Conv2d(4, 8, 4, padding_mode="circular", padding=1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.attention = nn.MultiheadAttention(8, 4, dropout=0.1)
        self.alias = self.attention
        self.zero = nn.MultiheadAttention(8, 4, add_zero_attn=True)
        self.unused = nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.down(x))
        x = self.even(self.pool(self.up(x))).flatten(2).mT
        x = self.encoder(x).transpose(0, 1)
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        y, _ = self.attention(x, x, x, attn_mask=later)
        y, _ = self.alias(y, x, y, need_weights=False)
        out: Tensor = self.zero(y, y, y)[0]
        return out


def test_every_module_has_its_row() -> None:
    told: list[tuple[str, int, int]] = []
    rows = verify_modules(Everything, (2, 3, 5, 6), progress=lambda *step: told.append(step))
    assert [(row.subject, row.cases, row.passed) for row in rows] == [
        ("down (Conv2d)", 1, True),
        ("up (ConvTranspose2d)", 1, True),
        ("pool (AvgPool2d)", 1, True),
        ("even (Conv2d)", 1, True),
        ("encoder.layers.0.self_attn (MultiheadAttention)", 1, True),
        ("attention = alias (MultiheadAttention)", 2, True),
        ("zero (MultiheadAttention)", 0, True),
        ("unused (Conv1d)", 0, False),
    ]
    assert all(0 < row.worst_share <= 1 for row in rows if row.cases)  # 0 would mean that nothing was computed twice
    assert "add_zero_attn" in rows[6].detail
    assert "never ran" in rows[7].detail
    assert "d/d in_proj_weight" in rows[4].detail
    assert "float64 and float32" in rows[0].detail
    assert [step[1:] for step in told] == [(n, 8) for n in range(9)]


def test_nothing_to_convert_does_not_pass() -> None:
    (row,) = verify_modules(lambda: nn.Linear(2, 2), (1, 2))
    assert not row.passed
    with pytest.raises(CannotVerify, match="not a torch"):
        verify_modules(lambda: None, (1,))  # type: ignore[arg-type, return-value]


def test_captured_activations_are_those_of_the_call() -> None:
    """Also where the model overwrites them afterwards, and through the encoder that would skip its attention."""
    model = Everything().eval()
    x = torch.randn(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    calls = capture(model, x.clone())
    assert torch.equal(calls[model.down][0]["input"], x)
    activation = torch.relu(model.down(x))
    assert torch.equal(calls[model.up][0]["input"], activation)
    with torch.no_grad():
        assert len(capture(model, x)[model.encoder.layers[0].self_attn]) == 1
    first, second = calls[model.attention]
    assert first["query"] is first["key"] is first["value"]
    assert second["value"] is second["query"] is not second["key"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def conv_parameters(change: Callable[[Tensor], Tensor]) -> Callable[..., dict[str, Tensor]]:
    right = Convolution.parameters

    def wrong(self: Convolution, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = right(self, weights)
        return found | {"value.table": change(found["value.table"])}

    return wrong


PLANTED = {
    "flipped kernel": lambda table: table.flip(0),
    "one-tap shift": lambda table: table.roll(1, 0),
    "dropped tap": lambda table: torch.cat([torch.zeros_like(table[:1]), table[1:]]),
    "swapped channels": lambda table: table.flip(-2),
    "scaled": lambda table: table * (1 + 2**-20),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_wrong_kernels_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Convolution, "parameters", conv_parameters(PLANTED[mistake]))
    (row,) = verify_modules(lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 4, 5))
    assert not row.passed
    assert row.worst_share > 1


def test_wrong_bias_gradient_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TransposedConvolution.parameters

    def wrong(self: TransposedConvolution, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return right(self, weights) | {"output.bias": weights["bias"].detach()}

    monkeypatch.setattr(TransposedConvolution, "parameters", wrong)
    (row,) = verify_modules(lambda: nn.ConvTranspose1d(2, 3, 3), (1, 2, 4))
    assert not row.passed


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        last = torch.zeros(len(x), x.shape[1], dtype=torch.bool)
        last[:, -1] = True
        out: Tensor = self.attention(x, x, x, key_padding_mask=last)[0]
        return out


def test_wrong_mask_polarity_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = modules.mask_from_multihead_attention

    def wrong(attn_mask: Tensor | None, key_padding_mask: Tensor | None = None, *, num_heads: int) -> Tensor | None:
        mask = right(attn_mask, key_padding_mask, num_heads=num_heads)
        return None if mask is None else ~mask

    (row,) = verify_modules(Masked, (2, 3, 4))
    assert row.passed
    monkeypatch.setattr(modules, "mask_from_multihead_attention", wrong)
    (row,) = verify_modules(Masked, (2, 3, 4))
    assert not row.passed


def test_swapped_projections_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Attention.parameters

    def wrong(self: Attention, weights: dict[str, Tensor], *, separate_values: bool = False) -> dict[str, Tensor]:
        found = right(self, weights, separate_values=separate_values)
        return found | {"key.weight": found["query.weight"], "query.weight": found["key.weight"]}

    monkeypatch.setattr(Attention, "parameters", wrong)
    (row,) = verify_modules(Masked, (2, 3, 4))
    assert not row.passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_half_and_double_modules(dtype: torch.dtype) -> None:
    rows = verify_modules(lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 2, 2)).to(dtype), (2, 4, 7))
    assert [row.passed for row in rows] == [True, True], [row.detail for row in rows]
    assert str(dtype).removeprefix("torch.") in rows[0].detail


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_dense_attention_bounds_are_those_of_the_general_model(dtype: str, masked: bool) -> None:
    """The same values, and bounds that differ only by the counts of terms in their constants."""
    x = np.random.default_rng(0)
    module = nn.MultiheadAttention(6, 2)
    operator, params = modules.from_module(module, 4, key_grid=3)
    own = {name: x.standard_normal(value.shape) for name, value in params.items()}
    tokens, others, cotangent = (x.standard_normal(shape) for shape in ((2, 4, 6), (2, 3, 6), (2, 4, 6)))
    mask = x.random((2, 1, 4, 3)) < 0.7 if masked else None
    dense = attention_bounds(operator, own, tokens, others, mask, cotangent, dtype)
    general = budget(operator, own, tokens, others, mask, cotangent, dtype)
    pairs = [(dense.value, general.value, dense.out, general.out)]
    pairs += [(dense.weights, general.weights, dense.weights_bound, general.weights_bound)]
    pairs += [
        (dense.gradient_values[name], general.gradient_values[name], dense.gradients[name], general.gradients[name])
        for name in general.gradients
    ]
    for mine, theirs, my_bound, their_bound in pairs:
        assert (np.abs(mine - theirs) <= my_bound).all()
        assert (my_bound <= 4 * their_bound + 1e-300).all()
        assert (their_bound <= 4 * my_bound + 1e-300).all()


def test_window_bounds_are_those_of_the_general_model() -> None:
    x = torch.Generator().manual_seed(0)
    module = nn.Conv2d(4, 6, (3, 2), padding=1, groups=2, dtype=torch.float64)
    image = torch.randn(2, 4, 4, 3, generator=x, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(module(image).shape, generator=x, dtype=torch.float64)
    out, gradients = window_bounds(module, {"input": image}, cotangent, "float32")
    operator, params = modules.from_module(module, (4, 3))
    queries = np.zeros((2, operator.layout.num_queries, 4))
    own = {name: value.detach().numpy() for name, value in params.items()}
    keys = image.detach().flatten(2).mT.numpy()
    general = budget(operator, own, queries, keys, None, cotangent.flatten(2).mT.numpy(), "float32")
    for mine, theirs in (
        (out.flatten(2).mT, general.out),
        (gradients["input"].flatten(2).mT, general.gradients["y"]),
        (gradients["bias"], general.gradients["output.bias"]),
    ):
        ratio = mine.numpy() / theirs
        assert 0.25 <= ratio.min() <= ratio.max() <= 4


def test_evaluate_counts_a_tensor_once() -> None:
    module, x = nn.MultiheadAttention(4, 2), torch.randn(3, 4, requires_grad=True)
    _, weights, gradients = evaluate(module, {"query": x, "key": x, "value": x}, torch.ones(3, 4))
    assert weights is not None
    assert list(gradients) == ["query", *(name for name, _ in module.named_parameters())]


def test_operator_of_another_size_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Convolution.operator
    monkeypatch.setattr(Convolution, "operator", lambda self, grid: right(self, (grid[0] + 1,)))
    (row,) = verify_modules(lambda: nn.Conv1d(1, 1, 3), (1, 1, 5))
    assert not row.passed
    assert "call 1:" in row.detail


def test_compare_takes_any_algorithm_by_name() -> None:
    call, x = {"input": torch.ones(1, 1, 6)}, torch.Generator().manual_seed(0)
    assert compare(nn.Conv1d(1, 1, 3), call, x, "pairwise")[1] <= 1
    with pytest.raises(UnknownName):
        compare(nn.Conv1d(1, 1, 3), call, x, "streem")
