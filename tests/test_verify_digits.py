"""verify_digits and the network bounds it stands on. The full run is ``translution verify``."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from translution.backends.torch.conversion import Attention, Convolution
from translution.conformance import network_bounds
from translution.conformance.network_bounds import MeanOverTokens, output_bounds
from translution.conformance.verify_digits import Digits, Transformer, compare, convolutional, load_digits, train

UNIT = 2.0**-24


def noise(count: int = 6) -> Digits:
    x = torch.Generator().manual_seed(0)
    images, labels = torch.rand(count, 1, 28, 28, generator=x), torch.zeros(count, dtype=torch.int64)
    return Digits(images, labels, images, labels)


def seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().eval()


@pytest.mark.parametrize("factory", [convolutional, Transformer])
def test_replaced_models_stay_within_their_bound(factory: Callable[[], nn.Module]) -> None:
    rows = compare("model", seeded(factory), noise(), "stream", "torch")
    assert [row.subject for row in rows] == ["model, float64", "model, float32"]
    assert all(row.passed and 0 < row.worst_share <= 1 for row in rows)
    assert rows[0].worst_error < 1e-6 * rows[1].worst_error  # float64 really is float64
    assert "3 modules replaced, 3 calls seen" in rows[0].detail
    assert "6 of 6 labels the same" in rows[0].detail


def test_trained_on_real_digits() -> None:
    digits = load_digits()
    assert (len(digits.train), len(digits.held_out)) == (4000, 1000)
    assert digits.train.dtype == torch.float32
    assert (float(digits.train.min()), float(digits.train.max())) == (0, 1)
    seen = {image.numpy().tobytes() for image in digits.train}
    assert not any(image.numpy().tobytes() in seen for image in digits.held_out)
    model = seeded(convolutional)
    told: list[str] = []
    train(model, digits, 1, lambda label, done, total: told.append(f"{label} {done} {total}"), "cnn")
    assert told == ["training cnn 0 1"]
    few = Digits(digits.train, digits.train_labels, digits.held_out[:300], digits.held_out_labels[:300])
    rows = compare("cnn", model, few, "stream", "torch")
    assert all(row.passed for row in rows)
    assert "6 calls seen" in rows[0].detail  # two batches
    accuracy = float(rows[0].detail.split("accuracy ")[1].split(" %")[0])
    assert accuracy > 50  # chance is 10


def test_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Convolution.parameters

    def wrong(self: Convolution, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = right(self, weights)
        return found | {"value.table": found["value.table"] * (1 + 2**-30)}

    monkeypatch.setattr(Convolution, "parameters", wrong)
    rows = compare("cnn", seeded(convolutional), noise(), "stream", "torch")
    assert not rows[0].passed  # one part in 10^9 shows in float64


def test_wrong_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Attention.parameters

    def wrong(self: Attention, weights: dict[str, Tensor], *, separate_values: bool = False) -> dict[str, Tensor]:
        found = right(self, weights, separate_values=separate_values)
        return found | {"key.weight": found["query.weight"]}

    model = seeded(Transformer)
    monkeypatch.setattr(Attention, "parameters", wrong)
    monkeypatch.setitem(network_bounds.RULES, nn.MultiheadAttention, network_bounds._exact)
    assert not compare("transformer", model, noise(), "stream", "torch")[0].passed


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 1, 1), nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(images.flatten(1))
        return out


def test_modules_that_never_ran_do_not_pass() -> None:
    row, _ = compare("unused", seeded(Unused), noise(), "stream", "torch")
    assert not row.passed
    assert "never called conv" in row.detail


def test_modules_that_could_not_be_replaced_do_not_pass() -> None:
    class Odd(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input)

    network_bounds.RULES[Odd] = network_bounds._window
    try:
        model = nn.Sequential(nn.Conv2d(1, 1, 1), Odd(1, 1, 1), nn.Flatten(), nn.Linear(784, 10)).eval()
        row, _ = compare("odd", model, noise(), "stream", "torch")
    finally:
        del network_bounds.RULES[Odd]
    assert not row.passed
    assert "overrides forward" in row.detail


def test_first_order_bound_of_two_linear_layers() -> None:
    """Two layers of one number: the bound is |w2| (gamma_3 |w1 x|) + u |w2 w1 x| + gamma_3 |w2 w1 x|, for x exact."""
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    model = nn.Sequential(first, second).double().eval()
    with torch.no_grad():
        first.weight.fill_(3.0)
        second.weight.fill_(-5.0)
    unit = UNIT + 2.0**-53
    gamma = 3 * unit / (1 - 3 * unit)
    outputs, bounds = output_bounds(model, torch.tensor([[2.0]], dtype=torch.float64), "float32")
    assert outputs.item() == -30
    assert bounds.item() == pytest.approx(30 * (2 * gamma + unit), rel=1e-12)


def test_no_rule_is_an_error() -> None:
    with pytest.raises(TypeError, match="no rounding rule for Tanh"):
        output_bounds(nn.Sequential(nn.Linear(1, 1), nn.Tanh()).double(), torch.zeros(1, 1).double(), "float32")


def test_gelu_rule_holds_for_every_kind_of_argument() -> None:
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.logspace(-30, 1, 1000), -torch.logspace(-30, 1, 1000)])
    error = (nn.GELU()(x).double() - nn.GELU()(x.double())).abs()
    bound = network_bounds._gelu(nn.GELU(), x.double(), "float32")
    assert (error <= bound).all()
    wide = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    exact = torch.tensor([math.erf(v) for v in wide.tolist()], dtype=torch.float64)
    assert (torch.erf(wide) - exact).abs().max() <= network_bounds.ERF_ERROR * 2.0**-53


@pytest.mark.parametrize("shift", [0.0, 1.0, 1000.0])
def test_layer_norm_and_mean_rules_hold(shift: float) -> None:
    x = torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(1)) + shift
    norm = nn.LayerNorm(32)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-2, 2)
        found = norm(x).double()
        wide = norm.double()
        assert ((found - wide(x.double())).abs() <= network_bounds._layer_norm(wide, x.double(), "float32")).all()
    mean = MeanOverTokens()
    error = (mean(x).double() - mean(x.double())).abs()
    assert (error <= network_bounds._mean(mean, x.double(), "float32")).all()
