"""The reference's gradients against complex steps of its forward: Im f(z + i h d) / h with h = 1e-40."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import translution
from translution.spec import (
    BiasTable,
    Clip,
    Concat,
    Encoder,
    Identity,
    Lattice,
    Layout,
    LogBuckets,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Relevance,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)
from translution.spec.encoders import Context

Array = npt.NDArray[Any]

STEP = 1e-40
# Two ways to sum the same float64 products: the share of the sum of absolute values that rounding may take, 2^-53 for
# each of at most 4000 roundings in a row.
ROUNDING = 4000 * 2.0**-53

ENCODERS: dict[str, Encoder] = {
    "identity": Identity(),
    "identity-bias": Identity(bias=True),
    "shared": Shared(4, bias=True),
    "shared-groups": Shared(8, bias=True, groups=2),
    "per-displacement": PerDisplacement(4, bias=True),
    "per-displacement-groups": PerDisplacement(8, groups=4),
    "low-rank": LowRank(6),
    "low-rank-up": LowRank(3, 4),
    "vectors": Vectors(4),
    "vectors-shared": Vectors(4, shared_heads=True),
    "sum": Sum((Shared(4), LowRank(2, 4), Vectors(4, shared_heads=True))),
    "concat": Concat((PerDisplacement(2), Sum((Identity(bias=True), Vectors(4))), LowRank(2))),
    "nested-concat": Concat((Concat((Shared(2), Vectors(2))), Shared(4, groups=2))),
}
ROTARIES: dict[str, Encoder] = {
    "half": Rotary(Shared(8, bias=True), base=7.0),
    "interleaved": Rotary(Sum((PerDisplacement(8), Vectors(8))), base=3.0, pairing="interleaved"),
    "part": Concat((Rotary(Shared(8)), LowRank(2))),
}
LAYOUTS: dict[str, Layout] = {
    "grid-registers": Lattice((2, 2), registers=2),
    "causal-registers": Lattice((4,), registers=1, causal=True),
    "raster": Lattice((2, 3), causal=True),
    "cross": Lattice((3,), key_grid=(5,), stride=2, offset=1, far=Clip(2)),
    "zeros": Lattice((3, 2), registers=1, kernel_size=3, boundary="zeros", padding=2),
    "circular": Lattice((3,), kernel_size=4, dilation=2, boundary="circular"),
    "circle": Lattice((4,), boundary="circular", far=LogBuckets(2, 3)),
    "reflect": Lattice((3,), key_grid=(4,), kernel_size=5, boundary="reflect"),
    "replicate": Lattice((2, 2), kernel_size=3, boundary="replicate"),
    "shift": Lattice((3, 4), kernel_size=(3, 2), dilation=(1, 2), boundary="shift"),
    "transposed": Lattice((5,), key_grid=(2,), key_stride=2, kernel_size=3, padding=1),
    "cube": Lattice((2, 1, 2), registers=1),
    "pairs": PairTable(((0, 1, -1), (2, 0, 1)), 4, ((3, 0, -1), (1, 1, 2))),
}
RELEVANCES: dict[str, Relevance] = {
    "softmax": Softmax(),
    "table": Softmax(scale=0.7, bias=BiasTable()),
    "slopes": Softmax(bias=SlopeBias()),
    "quadratic": Softmax(content=False, bias=QuadraticBias()),
    "ones": Ones(),
    "mean": Mean(),
    "mixture": Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias())),
    "mixture-tables": Mixture(Softmax(bias=BiasTable()), Softmax(scale=-0.3, bias=BiasTable())),
    "mixture-window": Mixture(Mean(), Softmax(bias=BiasTable())),
    "mixture-plain": Mixture(Ones(), Mean()),
}


def assert_gradients(operator: Operator, mask: str = "none", seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    layout, dim, heads = operator.layout, operator.dim, operator.num_heads
    params = {name: rng.normal(size=shape) for name, shape in operator.parameters.items()}
    x, y = rng.normal(size=(2, layout.num_queries, dim)), rng.normal(size=(2, layout.num_keys, operator.keys_dim))
    masks: dict[str, Array | None] = {"none": None}
    masks["bool"] = rng.random((2, heads, layout.num_queries, layout.num_keys)) < 0.6
    masks["bool"][:, :, 0] = False
    masks["float"] = np.where(masks["bool"], rng.normal(size=masks["bool"].shape), -np.inf)
    cotangent = rng.normal(size=(2, layout.num_queries, operator.out_features))

    settings: dict[str, Any] = {"mask": masks[mask], "backend": "reference"}
    out, found = translution.vjp(operator, params, x, y, cotangent=cotangent, **settings)
    assert found.y is not None
    gradients = {"x": found.x, "y": found.y, **found.params}
    values = {"x": x, "y": y, **params}
    assert gradients.keys() == values.keys()
    # One step in all of them at once: a wrong gradient of any shows.
    directions = {name: rng.normal(size=value.shape) for name, value in values.items()}
    stepped = {name: value + 1j * STEP * directions[name] for name, value in values.items()}
    result = translution.run(operator, {name: stepped[name] for name in params}, stepped["x"], stepped["y"], **settings)
    assert np.abs(result.real - out).max() <= ROUNDING * max(1.0, np.abs(out).max())
    terms = np.concatenate([(gradients[name] * directions[name]).ravel() for name in values])
    slopes = cotangent * (result.imag / STEP)
    assert abs(terms.sum() - slopes.sum()) <= ROUNDING * (np.abs(terms).sum() + np.abs(slopes).sum())


def operator_of(layout: Layout, encoder: Encoder, role: str, **options: Any) -> Operator:
    """Two heads, four channels on both sides; queries and keys get the same width, the other encoders are plain."""
    width = 4 if role == "value" else encoder.features_for(Context(4, layout.num_classes, 2))
    encoders: dict[str, Encoder] = {"query": Shared(width), "key": Shared(width), "value": Shared(2)}
    return Operator(layout, 4, 2, **(encoders | {role: encoder}), **options)


@pytest.mark.parametrize("role", ["query", "key", "value"])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_in_every_role(name: str, role: str) -> None:
    for layout in ("grid-registers", "zeros", "pairs"):
        assert_gradients(operator_of(LAYOUTS[layout], ENCODERS[name], role))


@pytest.mark.parametrize("role", ["query", "key"])
@pytest.mark.parametrize("name", ROTARIES)
def test_every_rotary(name: str, role: str) -> None:
    for layout in ("grid-registers", "zeros", "cross"):
        assert_gradients(operator_of(LAYOUTS[layout], ROTARIES[name], role))


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name: str, mask: str) -> None:
    per_displacement = {role: PerDisplacement(4) for role in ("query", "key", "value")}
    operator = Operator(
        LAYOUTS[name], 3, 2, **per_displacement, key_dim=2, output=Shared(3, bias=True), output_scale=-0.5
    )
    assert_gradients(operator, mask)


@pytest.mark.parametrize("mask", ["none", "bool"])
@pytest.mark.parametrize("name", RELEVANCES)
def test_every_relevance(name: str, mask: str) -> None:
    relevance = RELEVANCES[name]
    for layout in (LAYOUTS["grid-registers"], LAYOUTS["shift"], Lattice((2,), kernel_size=3, boundary="zeros")):
        looks = any(isinstance(b, Softmax) and b.content for b in (relevance, *parts_of(relevance)))
        content = {"query": PerDisplacement(4), "key": PerDisplacement(4)} if looks else {}
        assert_gradients(Operator(layout, 4, 2, PerDisplacement(4), relevance=relevance, **content), mask)


def parts_of(relevance: Relevance) -> tuple[Relevance, ...]:
    return (relevance.first, relevance.second) if isinstance(relevance, Mixture) else ()


@pytest.mark.parametrize(
    "output",
    [Identity(), Identity(bias=True), Shared(6, bias=True), Shared(3, groups=3), LowRankOutput(4, 5, bias=True)],
    ids=["identity", "identity-bias", "shared", "shared-groups", "low-rank"],
)
def test_every_output(output: Any) -> None:
    value = Concat((Shared(2), LowRank(4)))
    assert_gradients(operator_of(LAYOUTS["grid-registers"], value, "value", output=output, output_scale=1.5))


def test_self_case_adds_both_sides() -> None:
    operator = Operator(Lattice((2, 2)), 4, 2, *(PerDisplacement(4) for _ in range(3)))
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape) for name, shape in operator.parameters.items()}
    x, cotangent = rng.normal(size=(2, 4, 4)), rng.normal(size=(2, 4, 4))
    _, alone = translution.vjp(operator, params, x, cotangent=cotangent, backend="reference")
    _, apart = translution.vjp(operator, params, x, x, cotangent=cotangent, backend="reference")
    assert alone.y is None
    assert np.array_equal(alone.x, apart.x + apart.y)
