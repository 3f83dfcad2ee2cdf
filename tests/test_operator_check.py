"""The short check on one operator at its own shape: what is right passes, each mistake at that shape is seen."""

from dataclasses import replace

import pytest
import torch

from translution import Request, get_backend
from translution.conformance import operator_check
from translution.conformance.comparison import ComparisonError
from translution.conformance.exam.subject import NotClaimed
from translution.conformance.operator_check import CannotCheck, OperatorCheck
from translution.spec import Lattice, Operator, Shared, presets

OPERATOR = presets.translution((2, 3), 6, 3, registers=1)
TORCH = get_backend("torch")


class Wrong(type(TORCH)):
    """torch's backend with a change to its result."""

    def __init__(self, change):
        self.change = change

    def forward(self, request, algorithm, params, inputs):
        out, weights = super().forward(request, algorithm, params, inputs)
        return self.change(out, inputs), weights


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("algorithm", ["stream", "pairwise"])
def test_what_is_right_passes(dtype, mask, algorithm):
    check = OperatorCheck(Request(OPERATOR, 3, dtype, mask=mask, gradient=True))
    assert 0 < check.share(TORCH, algorithm) <= 1


@pytest.mark.parametrize(
    "operator",
    [
        presets.convolution((4, 4), 3, 5, 3, padding=1),
        Operator(Lattice((5,), key_grid=(7,)), 8, 2, Shared(8), Shared(8), Shared(8), key_dim=3),
    ],
    ids=["convolution", "cross attention"],
)
def test_one_item_and_other_operators(operator):
    assert OperatorCheck(Request(operator, 1)).share(get_backend("numpy"), "stream") <= 1


def last_item(out, _):
    return torch.cat([out[:-1], out[-1:] * 1.001])


def large_tokens(out, inputs):
    return out * 1.001 if inputs.x.abs().max() > 6 else out


@pytest.mark.parametrize(("change", "words"), [(last_item, "ordinary tokens"), (large_tokens, "large tokens")])
def test_a_mistake_at_this_shape_is_seen(change, words):
    check = OperatorCheck(Request(OPERATOR, 4))
    with pytest.raises(ComparisonError, match=f"{words}: out"):
        check.share(Wrong(change), "stream")


def test_a_wrong_gradient_is_seen():
    doubled = Wrong(lambda out, _: 2 * out - out.detach())
    check = OperatorCheck(Request(OPERATOR, 2, gradient=True))
    with pytest.raises(ComparisonError, match="gradient of"):
        check.share(doubled, "stream")


def test_a_gradient_that_leaks_between_items_is_seen():
    leak = Wrong(lambda out, inputs: out + 0.0 * inputs.x.sum() + (inputs.x.sum() - inputs.x.sum().detach()))
    check = OperatorCheck(Request(replace(OPERATOR, output=None), 4, gradient=True))
    with pytest.raises(ComparisonError, match="items without a cotangent have one"):
        check.share(leak, "stream")


def test_what_is_not_claimed_is_said():
    with pytest.raises(NotClaimed, match="displacements"):
        OperatorCheck(Request(OPERATOR, 1)).share(TORCH, "sdpa")


def test_what_is_too_large_is_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(operator_check, "physical_memory", lambda: 2**20)
    with pytest.raises(CannotCheck, match=r"2,401 links takes about .* GiB"):
        OperatorCheck(Request(presets.translution((7, 7), 64, 1), 8))
