"""Initial values: logits and outputs start at the scale of attention made of torch.nn.Linear, whatever the operator.

Means over independent layers are compared with what is expected, in units of their own standard error: a deviation of
more than 4 of them happens to 1 correct layer in 16,000, and the seeds are fixed. That the standard error is small
enough to tell a factor (a sum forgotten, a scale not made up for) from noise is asked too.
"""

import math
import re
import runpy
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch import nn

import translution
from translution.nn import OperatorLayer
from translution.nn.initialisation import Uniform, Values, initial_values
from translution.spec import (
    Concat,
    Identity,
    Lattice,
    LowRank,
    Operator,
    PerDisplacement,
    QuadraticBias,
    Shared,
    Softmax,
    Sum,
    Vectors,
    presets,
)

DIM, HEADS, GRID, LAYERS = 32, 2, (3, 3), 40
ROLES = ("qkv", "qk", "qv", "kv", "q", "k", "v")
WIDE = {"query": Shared(DIM), "key": Shared(DIM), "value": Shared(DIM), "output": Shared(DIM)}
OPERATORS = {
    "attention": presets.self_attention(GRID, DIM, HEADS),
    **{f"full {r}": presets.translution(GRID, DIM, HEADS, roles=r, registers=1) for r in ROLES},
    **{f"alpha {r}": presets.alpha_translution(GRID, DIM, HEADS, roles=r, registers=1) for r in ROLES},
    "alpha 1": presets.alpha_translution(GRID, DIM, HEADS, rank=1),
    "rope": presets.rope_attention((9,), DIM, HEADS),
    "shaw": presets.shaw_attention(GRID, DIM, HEADS),
    "swin": presets.swin_attention(GRID, DIM, HEADS),
    "t5": presets.t5_attention((9,), DIM, HEADS),
    "own scale": presets.self_attention(GRID, DIM, HEADS, scale=3.0),
    "sum of three": Operator(
        Lattice(GRID), DIM, HEADS, **WIDE | {"query": Sum((Shared(DIM), PerDisplacement(DIM), LowRank(8, DIM)))}
    ),
    "sum in the values": Operator(Lattice(GRID), DIM, HEADS, **WIDE | {"value": Sum((Shared(DIM), LowRank(8, DIM)))}),
    "groups": Operator(Lattice(GRID), DIM, HEADS, **WIDE | {"key": PerDisplacement(DIM, groups=4)}),
    "identity": Operator(Lattice(GRID), DIM, HEADS, **WIDE | {"query": Identity()}),
    "vectors alone": Operator(
        Lattice(GRID), DIM, HEADS, **WIDE | {"key": Concat((Vectors(8), Shared(DIM - 8)))}
    ),
    "halved": Operator(Lattice(GRID), DIM, HEADS, **WIDE, output_scale=0.5),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def measured(layer):
    """Variance of logits within rows, and of the result for weights that are what they are."""
    operator = layer.operator
    x = torch.randn(4, operator.layout.num_queries, DIM, dtype=torch.float64)
    x = nn.functional.layer_norm(x, (DIM,))
    params = layer.operator_parameters()
    out, weights = translution.run(operator, params, x, algorithm="pairwise", return_weights=True)
    logits = weights.log()
    spread = (logits - logits.mean(-1, keepdim=True)).square().sum(-1) / (weights.shape[-1] - 1)
    # A weighted mean of independent values has the sum of squared weights as a factor of their variance.
    expected_share = weights.square().sum(-1).mean()
    return spread.mean().item(), (out.square().mean() / expected_share).item()


def linear_attention():
    """Variance of the logits of attention as it is written with torch.nn.Linear."""
    query, key = (nn.Linear(DIM, DIM, bias=False, dtype=torch.float64) for _ in range(2))
    x = nn.functional.layer_norm(torch.randn(4, 9, DIM, dtype=torch.float64), (DIM,))
    q, k = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (query, key))
    logits = (DIM // HEADS) ** -0.5 * q @ k.mT
    return ((logits - logits.mean(-1, keepdim=True)).square().sum(-1) / 8).mean().item()


def is_met(found, expected):
    error = stdev(found) / math.sqrt(len(found))
    assert error < 0.05 * expected
    return abs(fmean(found) - expected) < 4 * error


@torch.no_grad()
def test_the_scale_is_that_of_torch_nn_linear():
    assert is_met([linear_attention() for _ in range(4 * LAYERS)], 1 / 9)
    weight = nn.Linear(48, 5).weight
    assert weight.abs().max() <= 48**-0.5


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATORS)
def test_logits_and_results_start_at_the_scale_of_attention(name):
    found = [measured(OperatorLayer(OPERATORS[name], dtype=torch.float64)) for _ in range(LAYERS)]
    logits, results = zip(*found, strict=True)
    assert is_met(logits, 1 / 9)
    assert is_met(results, 1 / 9)


@torch.no_grad()
def test_another_scale_is_told_apart():
    """Alpha without making up for its halved logits, and a table whose fan-in is in * out."""
    for name, factor in (("alpha qkv", 1 / math.sqrt(1.886)), ("full qkv", DIM**-0.5)):
        found = []
        for _ in range(LAYERS):
            layer = OperatorLayer(OPERATORS[name], dtype=torch.float64)
            for parameter in layer.query.parameters():
                parameter.mul_(factor)
            found.append(measured(layer)[0])
        assert not is_met(found, 1 / 9)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_starts_as_torchs(groups):
    operator = presets.convolution((6, 6), 8, 4, 3, padding=1, groups=groups)
    (start,) = [s for n, s in initial_values(operator).items() if n == "value.table"]
    torchs = nn.Conv2d(8, 4, 3, groups=groups).weight
    assert isinstance(start, Uniform)
    assert math.isclose(math.sqrt(3 * start.variance), (8 // groups * 9) ** -0.5)
    assert torchs.abs().max() <= math.sqrt(3 * start.variance)
    assert torchs.abs().max() > 0.8 * math.sqrt(3 * start.variance)


def test_biases_are_zero_and_positions_small():
    layer = OperatorLayer(presets.shaw_attention((8, 8), 64, 2, qkv_bias=True), dtype=torch.float64)
    for name, parameter in layer.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any()
    for name in ("key.1.vectors", "value.1.vectors"):
        vectors = layer.get_parameter(name)
        assert abs(vectors.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * vectors.numel())
    table = OperatorLayer(presets.swin_attention((16, 16), 64, 4)).get_parameter("relevance.bias")
    assert abs(table.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * table.numel())


def test_convit_starts_with_a_neighbour_for_each_head():
    operator = presets.convit_attention((5, 5), 18, 9)
    layer = OperatorLayer(operator)
    assert torch.equal(layer.get_parameter("relevance.gate"), torch.ones(9))
    position = Operator(Lattice((5, 5)), 18, 9, Shared(18), relevance=Softmax(content=False, bias=QuadraticBias()))
    own = OperatorLayer(position)
    # The same numbers where they stand alone and in the mixture.
    assert torch.equal(own.get_parameter("relevance.weight"), layer.get_parameter("relevance.second.weight"))
    params = {n: p.detach() for n, p in own.named_parameters()}
    _, weights = translution.run(position, params, torch.randn(1, 25, 18), return_weights=True)
    middle = weights[0, :, 12].argmax(-1).tolist()
    assert [divmod(key, 5) for key in middle] == [(2 + r, 2 + c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    beside_content = Operator(Lattice((5, 5)), 18, 9, *[Shared(18)] * 3, relevance=Softmax(bias=QuadraticBias()))
    assert initial_values(beside_content)["relevance.weight"] == Values(0.0)


def test_resetting_draws_anew():
    layer = OperatorLayer(OPERATORS["alpha qkv"])
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    layer.reset_parameters()
    assert [n for n, p in layer.named_parameters() if torch.equal(p, before[n])] == ["output.bias"]
    torch.manual_seed(0)
    layer.reset_parameters()
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())
    assert all(torch.isfinite(p).all() for p in OperatorLayer(OPERATORS["alpha qkv"], dtype=torch.float16).parameters())


def test_the_table_of_the_page_is_what_its_script_measures():
    root = Path(__file__).resolve().parents[1]
    script = runpy.run_path(str(root / "scripts" / "initial_logits.py"))
    page = (root / "docs" / "layers.md").read_text()
    rows = re.findall(r"^\| (attention|Translution|alpha) \| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("attention", "none"), *(("Translution", r) for r in ROLES), *(("alpha", r) for r in ROLES)
    ]  # fmt: skip
    size = {"registers": 1, "grid": script["GRID"], "dim": script["DIM"], "num_heads": script["NUM_HEADS"]}
    for preset, wanted in ((presets.translution, "Translution"), (presets.alpha_translution, "alpha")):
        written = next([float(n) for n in row[2:]] for row in rows if row[:2] == (wanted, "kv"))
        for found, shown in zip(script["measure"](preset(roles="kv", **size)), written, strict=True):
            assert abs(found / shown - 1) < 0.03


def test_every_parameter_of_every_preset_has_its_start():
    for operator in OPERATORS.values():
        assert initial_values(operator).keys() == operator.parameters.keys()
