"""Masks (clauses M1 to M6): bool, float, dead rows, and what a masked or a live key may reach."""

import numpy as np
import pytest

import translution
from translution.conformance.comparison import check
from translution.conformance.error_model import budget
from translution.spec import Lattice, Mean, Ones, Operator, PerDisplacement, Shared
from translution.spec import presets as p

OPERATORS = {
    "translution": p.translution((2, 2), 4, 2, registers=1),
    "alpha": p.alpha_translution((3,), 4, 2, rank=2),
    "attention": p.self_attention((2, 2), 4, 2, registers=2),
    "mean": Operator(Lattice((2, 2), kernel_size=2, registers=1), 4, 2, PerDisplacement(4), relevance=Mean()),
    "ones": Operator(Lattice((2, 2), registers=1), 4, 2, PerDisplacement(4), relevance=Ones()),
}
SHAPES = {"keys": (2, 1, 1, None), "heads": (1, 2, None, None), "full": (2, 2, None, None), "queries": (1, 1, None, 1)}


def sized(shape, operator):
    queries, keys = operator.layout.num_queries, operator.layout.num_keys
    return tuple(n or (queries, keys)[axis - 2] for axis, n in enumerate(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_bool_mask_within_the_bound(name, shape, draw):
    operator = OPERATORS[name]
    params, x, _ = draw(operator)
    mask = np.random.default_rng(3).random(sized(SHAPES[shape], operator)) < 0.6
    exact = budget(operator, params, x, mask=mask)
    check(name, translution.run(operator, params, x, mask=mask, backend="triton"), exact.value, exact.out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["translution", "alpha", "attention"])
def test_float_mask_within_the_bound(name, dtype, draw):
    operator, rng = OPERATORS[name], np.random.default_rng(4)
    params, x, _ = draw(operator)
    mask = rng.standard_normal(sized(SHAPES["full"], operator)).astype(np.float32).astype(dtype)
    mask[rng.random(mask.shape) < 0.3] = -np.inf
    exact = budget(operator, params, x, mask=mask)
    check(name, translution.run(operator, params, x, mask=mask, backend="triton"), exact.value, exact.out)


def test_finite_float64_mask_below_float32_is_not_absent(draw):
    """Clause M2: only -inf means absent; a lone key has weight 1 whatever is added to its logit."""
    operator = Operator(Lattice((2,), kernel_size=1), 4, 1, PerDisplacement(4), Shared(4), Shared(4))
    params, x, _ = draw(operator)
    mask = np.full((2, 2), -1e300)
    plain = translution.run(operator, params, x, backend="triton")
    assert np.array_equal(translution.run(operator, params, x, mask=mask, backend="triton"), plain)


@pytest.mark.parametrize("name", OPERATORS)
def test_query_without_a_live_key_gives_the_output_bias(name, draw):
    """Clause M3."""
    operator = OPERATORS[name]
    params, x, _ = draw(operator)
    mask = np.ones(sized(SHAPES["full"], operator), bool)
    mask[0, :, 1:3] = False
    found = translution.run(operator, params, x, mask=mask, backend="triton")
    expected = params.get("output.bias", np.zeros(operator.out_features, np.float32))
    assert np.array_equal(found[0, 1:3], np.broadcast_to(expected, found[0, 1:3].shape))


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "bool") for name in OPERATORS] + [(name, "float") for name in ("translution", "alpha", "attention")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_masked_key_reaches_nothing(name, value, kind, draw):
    """Clause M4: the output of every other query is bitwise the same."""
    operator = OPERATORS[name]
    params, x, _ = draw(operator)
    for dead in (0, operator.layout.num_keys - 1):
        mask = np.ones((operator.layout.num_queries, operator.layout.num_keys), bool)
        mask[:, dead] = False
        if kind == "float":
            mask = np.where(mask, np.float32(0), np.float32(-np.inf))
        spoilt = x.copy()
        spoilt[:, dead] = value
        clean = translution.run(operator, params, x, mask=mask, backend="triton")
        found = translution.run(operator, params, spoilt, mask=mask, backend="triton")
        others = np.arange(operator.layout.num_queries) != dead
        assert np.array_equal(found[:, others], clean[:, others])


@pytest.mark.parametrize("name", ["translution", "attention"])
def test_nan_in_a_live_key_reaches_exactly_its_queries(name, draw):
    """Clause M4."""
    operator = OPERATORS[name]
    params, x, _ = draw(operator)
    mask = np.ones((operator.layout.num_queries, operator.layout.num_keys), bool)
    last = operator.layout.num_keys - 1
    mask[:2, last] = False
    x[0, last] = np.nan
    found = translution.run(operator, params, x, mask=mask, backend="triton")
    assert np.isnan(found[0, 2:]).all()
    assert np.isfinite(found[0, :2]).all()
    assert np.isfinite(found[1]).all()
