"""The numpy backend: equal to the definition within a derived bound, exact where arithmetic is, clean behind masks.

Two results that each keep the bound of ``conformance.error_model`` differ by at most twice that bound.
"""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import translution
from translution.algorithms import Request
from translution.conformance.error_model import Budget, budget
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.question import Array, Question
from translution.conformance.strategies import cases, draw_question, random_case
from translution.execution import vjp
from translution.geometry import geometry
from translution.registry import Backend, get_backend
from translution.spec import (
    Clip,
    Encoder,
    Identity,
    Lattice,
    LowRank,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Shared,
    Softmax,
    presets,
)

ALGORITHMS = ("stream", "pairwise")
Results = dict[str, Array]


def _results(
    case: Question, cotangent: Array, backend: str, algorithm: str | None = None, *, dtype: str = "float64"
) -> Results:
    """out, weights and every gradient, by name."""
    operator, mask = case.operator, case.mask
    params = {name: value.astype(dtype) for name, value in case.params.items()}
    x, y = case.x.astype(dtype), None if case.y is None else case.y.astype(dtype)
    out, weights = translution.run(
        operator, params, x, y, mask=mask, backend=backend, algorithm=algorithm, return_weights=True
    )
    pull = cotangent.astype(dtype)
    again, found = vjp(operator, params, x, y, cotangent=pull, mask=mask, backend=backend, algorithm=algorithm)
    np.testing.assert_array_equal(again, out)
    results = {"out": out, "weights": weights, "x": found.x, **found.params}
    return results if y is None else results | {"y": found.y}


def _cotangent(case: Question) -> Array:
    return np.random.default_rng(0).integers(-3, 4, case.out_shape).astype(np.float64)


def _bounds(found: Budget) -> Results:
    return {"out": found.out, "weights": found.weights_bound, **found.gradients}


def _assert_within(case: Question, actual: Results, expected: Results, bounds: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape, f"{name}: {case}"
        difference = np.abs(value.astype(np.float64) - expected[name].astype(np.float64))
        # "not >" and not "<=": NaN fails.
        assert (difference <= bounds[name]).all(), f"{name} is off by {difference.max()}: {case}"


def _check_against_reference(case: Question) -> None:
    cotangent = _cotangent(case)
    expected = _results(case, cotangent, "reference")
    bounds = _bounds(budget(case.operator, case.params, case.x, case.y, case.mask, cotangent, "float64"))
    twice = {name: 2 * bound for name, bound in bounds.items()}
    for algorithm in ALGORITHMS:
        _assert_within(case, _results(case, cotangent, "numpy", algorithm), expected, twice)


# 299 seeds: every layout kind with every kind of value encoder (see conformance.strategies).
@pytest.mark.parametrize("first", range(0, 299, 23))
def test_equals_the_definition_on_every_layout_kind(first: int) -> None:
    for seed in range(first, first + 23):
        _check_against_reference(random_case(seed))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_equals_the_definition(case: Question) -> None:
    _check_against_reference(case)


def test_equals_the_definition_where_no_displacement_can_occur() -> None:
    layout = Lattice((1, 1), key_grid=(4, 3), offset=-1, causal=True)
    assert layout.num_classes == 0
    for seed in range(34):
        _check_against_reference(draw_question(SeededDraws(seed), layout=layout))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_D2_lower_precision_stays_within_its_bound(dtype: str, algorithm: str) -> None:
    for seed in range(300, 300 + 3 * 23):
        case = draw_question(SeededDraws(seed), dtype)
        cotangent = _cotangent(case)
        expected = budget(case.operator, case.params, case.x, case.y, case.mask, cotangent, dtype)
        actual = _results(case, cotangent, "numpy", algorithm, dtype=dtype)
        assert {value.dtype.name for value in actual.values()} == {dtype}
        weights = translution.run(
            case.operator, case.params, case.x, case.y, mask=case.mask, backend="reference", return_weights=True
        )[1]
        values = {"out": expected.value, "weights": weights, **expected.gradient_values}
        _assert_within(case, actual, {name: values[name] for name in actual}, _bounds(expected))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_R2_integers_are_exact(algorithm: str) -> None:
    """Relevance ones on small integers: no rounding occurs, so results equal the definition's bit for bit."""
    seen = 0
    for seed in range(400):
        case = random_case(seed, integers=True)
        if not isinstance(case.operator.relevance, Ones):
            continue
        seen += 1
        cotangent = _cotangent(case)
        expected = _results(case, cotangent, "reference")
        for name, value in _results(case, cotangent, "numpy", algorithm).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{name}: {case}")
    assert seen > 60


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 1, 1, 2), ((1, 2), (2, 0), 2, 4)]
)
def test_convolution_of_integers_is_exact(
    algorithm: str,
    padding_mode: presets.PaddingMode,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int,
    groups: int,
) -> None:
    """Against torch.nn.Conv2d, in float32: every sum is below 2^24."""
    rng = np.random.default_rng(0)
    conv = torch.nn.Conv2d(
        4, 8, (3, 2), stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode
    )
    weight = rng.integers(-4, 5, conv.weight.shape).astype(np.float32)
    bias = rng.integers(-4, 5, 8).astype(np.float32)
    conv.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    image = rng.integers(-4, 5, (2, 4, 6, 7)).astype(np.float32)
    with torch.no_grad():
        expected = conv(torch.from_numpy(image)).numpy()
    operator = presets.convolution(
        (6, 7),
        4,
        8,
        (3, 2),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
    )
    # Taps run against displacements; [E, C/g, kh, kw] becomes [T, g, C/g, E/g].
    taps = weight[:, :, ::-1, ::-1].reshape(groups, 8 // groups, 4 // groups, 6).transpose(3, 0, 2, 1)
    table = np.ascontiguousarray(taps).reshape(operator.parameters["value.table"])
    tokens = image.reshape(2, 4, 42).swapaxes(1, 2)
    params = {"value.table": table, "output.bias": bias}
    queries = np.zeros((2, operator.layout.num_queries, 4), np.float32)
    out = translution.run(operator, params, queries, tokens, backend="numpy", algorithm=algorithm)
    np.testing.assert_array_equal(out.swapaxes(1, 2).reshape(expected.shape), expected)


def _masked_cases(wanted: int) -> list[Question]:
    """Questions with a mask that removes some link and leaves another."""
    found = []
    for seed in range(2000, 5000):
        case = random_case(seed)
        if case.mask is not None and case.x.shape[0] and geometry(case.operator.layout).steps:
            live = _live(case)
            if live.any() and not live.all():
                found.append(case)
        if len(found) == wanted:
            break
    assert len(found) == wanted
    return found


def _live(case: Question) -> Array:
    """Whether the mask leaves a pair in place, [.., H, Nq, Nk]; True off the support too."""
    assert case.mask is not None
    live = case.mask if case.mask.dtype == np.bool_ else np.asarray(case.mask != -np.inf)
    return np.broadcast_to(live, case.weights_shape)


def _linked(case: Question) -> Array:
    """Number of links of every pair, [Nq, Nk]."""
    links = geometry(case.operator.layout)
    count = np.zeros((links.num_queries, links.num_keys + 1), np.int64)
    np.add.at(count, (links.query_index, links.key_index), 1)
    return count[:, :-1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_M4_absent_tokens_reach_no_result_and_no_gradient(algorithm: str, poison: float) -> None:
    """Keys that no query sees and queries that see no key: their content changes not one bit."""
    poisoned = 0
    for case in _masked_cases(60):
        links = geometry(case.operator.layout)
        pairs = _live(case).any(axis=-3) & (_linked(case) > 0)
        zero_token = np.isin(np.arange(links.num_queries), links.query_index[links.key_index == links.num_keys])
        dead_query = np.asarray(~pairs.any(axis=-1) & ~zero_token)
        dead_key = np.asarray(~pairs.any(axis=-2))
        clean = replace(case, y=case.x.copy() if case.y is None else case.y)
        assert clean.y is not None
        bad = replace(
            clean,
            x=np.where(dead_query[..., None], poison, clean.x),
            y=np.where(dead_key[..., None], poison, clean.y),
        )
        poisoned += int(dead_query.sum() + dead_key.sum())
        cotangent = _cotangent(case)
        expected, actual = (_results(each, cotangent, "numpy", algorithm) for each in (clean, bad))
        for name, value in actual.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{name}: {case}")
        np.testing.assert_array_equal(actual["x"][dead_query], 0)
        np.testing.assert_array_equal(actual["y"][dead_key], 0)
    assert poisoned > 60


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_M4_a_live_nan_reaches_exactly_the_rows_that_see_it(algorithm: str) -> None:
    """One NaN key: the rows of out are NaN where the definition's are, and all others keep every bit."""
    reached = 0
    for number, case in enumerate(_masked_cases(60)):
        y = case.x.copy() if case.y is None else case.y.copy()
        key = number % y.shape[-2]
        bad = replace(case, y=y.copy())
        assert bad.y is not None
        bad.y[..., key, :] = np.nan
        expected, _ = translution.run(
            case.operator, case.params, bad.x, bad.y, mask=case.mask, backend="reference", return_weights=True
        )
        out = translution.run(
            case.operator, case.params, bad.x, bad.y, mask=case.mask, backend="numpy", algorithm=algorithm
        )
        clean = translution.run(
            case.operator, case.params, case.x, y, mask=case.mask, backend="numpy", algorithm=algorithm
        )
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected), err_msg=repr(case))
        unseen = ~(_live(case)[..., key] & (_linked(case)[:, key] > 0)).any(axis=-2)
        np.testing.assert_array_equal(out[unseen], clean[unseen], err_msg=repr(case))
        reached += int(np.isnan(out).any(axis=-1).sum())
    assert reached > 30


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", ["shared", "displacement", "low rank"])
def test_M4_a_key_that_one_head_masks_leaves_that_head_alone(algorithm: str, kind: str) -> None:
    encoders: dict[str, Encoder] = {
        "shared": Shared(4),
        "displacement": PerDisplacement(4),
        "low rank": LowRank(3, 4),
    }
    encoder = encoders[kind]
    operator = Operator(Lattice((5,)), dim=3, num_heads=2, value=encoder, query=encoder, key=encoder)
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(shape) for name, shape in operator.parameters.items()}
    x, y = rng.standard_normal((2, 1, 5, 3))
    mask = np.ones((2, 5, 5), bool)
    mask[1, :, 2] = False
    mask[:, 3:, 2] = False
    y[:, 2] = np.nan
    cotangent = np.ones((1, 5, 4))
    out, found = vjp(operator, params, x, y, mask=mask, cotangent=cotangent, backend="numpy", algorithm=algorithm)
    assert np.isnan(out[0, :3, :2]).all()
    assert np.isfinite(out[0, 3:]).all()
    assert np.isfinite(out[0, :, 2:]).all()
    last = {"shared": "weight", "displacement": "table", "low rank": "up"}[kind]
    for role in ("query", "key", "value"):
        assert np.isfinite(found.params[f"{role}.{last}"][..., 2:]).all(), role
    assert np.isfinite(found.x[0, 3:]).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_M4_a_masked_pair_leaves_its_class_alone(algorithm: str) -> None:
    """Key 2 is NaN and seen by query 2 alone: of the table only the row of delta = 0 is NaN."""
    layout = Lattice((5,))
    operator = Operator(layout, 3, 1, PerDisplacement(2), relevance=Ones())
    rng = np.random.default_rng(1)
    params = {"value.table": rng.standard_normal(operator.parameters["value.table"])}
    x, y = rng.standard_normal((2, 1, 5, 3))
    y[:, 2] = np.nan
    mask = np.ones((5, 5), bool)
    mask[:, 2] = [False, False, True, False, False]
    cotangent = np.ones((1, 5, 2))
    _, found = vjp(operator, params, x, y, mask=mask, cotangent=cotangent, backend="numpy", algorithm=algorithm)
    rows = np.isnan(found.params["value.table"]).any(axis=(1, 2))
    assert [label for label, bad in zip(layout.labels(), rows, strict=True) if bad] == [(0,)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_M3_a_dead_row_is_zero_before_the_output_encoder(algorithm: str) -> None:
    operator = Operator(
        Lattice((3,)), 2, 1, PerDisplacement(2, bias=True), relevance=Mixture(Softmax(), Ones()),
        query=Shared(2), key=Shared(2), output=Shared(2, bias=True),
    )  # fmt: skip
    rng = np.random.default_rng(2)
    params = {name: rng.standard_normal(shape) for name, shape in operator.parameters.items()}
    mask = np.array([[True, True, False], [False, False, False], [True, True, True]])
    x = rng.standard_normal((1, 3, 2))
    cotangent = np.zeros((1, 3, 2))
    cotangent[:, 1] = 1
    out, found = vjp(operator, params, x, mask=mask, cotangent=cotangent, backend="numpy", algorithm=algorithm)
    np.testing.assert_array_equal(out[0, 1], params["output.bias"])
    for name, gradient in found.params.items():
        np.testing.assert_array_equal(gradient, 1 if name == "output.bias" else 0, err_msg=name)
    np.testing.assert_array_equal(found.x, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_M5_large_logits_stay_finite_and_masks_beat_them(algorithm: str, dtype: str) -> None:
    """Logits of +-6e4: the weights of a row are those of its largest live logit, exactly."""
    operator = Operator(Lattice((3,)), 1, 1, Identity(), query=Identity(), key=Identity(), relevance=Softmax(1.0))
    x = np.array([[[240.0], [8.0], [-240.0]]], dtype)
    y = np.array([[[250.0], [125.0], [-250.0]]], dtype)
    out, weights = translution.run(operator, {}, x, y, backend="numpy", algorithm=algorithm, return_weights=True)
    np.testing.assert_array_equal(weights[0, 0], [[1, 0, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(out[0, :, 0], [250, 250, -250])
    for mask in (np.array([False, True, True]), np.array([-np.inf, 0, 0], dtype)):
        weights = translution.run(
            operator, {}, x, y, mask=mask[None, :], backend="numpy", algorithm=algorithm, return_weights=True
        )[1]
        np.testing.assert_array_equal(weights[0, 0], [[0, 1, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_M2_a_float_below_the_range_of_float32_is_still_a_number(algorithm: str) -> None:
    """A row whose every key carries -1e300 has live keys: it isn't 0 but a softmax."""
    operator = Operator(Lattice((2,)), 1, 1, Identity(), query=Identity(), key=Identity(), relevance=Softmax(1.0))
    x = np.zeros((1, 2, 1), np.float32)
    mask = np.array([[-1e300, -1e300], [-1e300, -np.inf]])
    weights = translution.run(operator, {}, x, mask=mask, backend="numpy", algorithm=algorithm, return_weights=True)[1]
    np.testing.assert_array_equal(weights[0, 0], [[0.5, 0.5], [1, 0]])


def _peak(operator: Operator, algorithm: str, batch: int, *, gradient: bool) -> int:
    """Largest number of bytes that a second call holds at once, index arrays being built by the first."""
    rng = np.random.default_rng(3)
    params = {name: rng.standard_normal(shape) for name, shape in operator.parameters.items()}
    x = rng.standard_normal((batch, operator.layout.num_queries, operator.dim))

    def call() -> None:
        if gradient:
            vjp(operator, params, x, cotangent=x, backend="numpy", algorithm=algorithm)
        else:
            translution.run(operator, params, x, backend="numpy", algorithm=algorithm)

    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("operator", "gradient"),
    [
        (presets.translution((12, 12), 32, 1), False),
        (presets.translution((12, 12), 64, 2, far=Clip(1)), True),
        (presets.translution((12, 12), 64, 2, far=Clip(0)), False),
        (presets.translution((12, 12), 64, 2, far=Clip(0)), True),
        (presets.alpha_translution((12, 12), 64, 2, rank=4, far=Clip(2)), True),
    ],
)
def test_stream_holds_nothing_of_size_links_times_features(operator: Operator, gradient: bool) -> None:
    """At most 16 arrays of size links x heads, 32 of size tokens x features, and the parameters' gradients twice: in
    all less than one array of size links x features, of which ``pairwise`` holds three.
    """
    batch, tokens = 2, operator.layout.num_queries
    links, features = tokens * tokens, operator.num_heads * max(operator.head_dim, operator.value_head_dim)
    logits, per_token, per_link = (
        8 * batch * count for count in (links * operator.num_heads, tokens * features, links * features)
    )
    bound = 16 * logits + 32 * per_token + (16 * operator.num_parameters if gradient else 0)
    assert bound < per_link
    assert _peak(operator, "stream", batch, gradient=gradient) < bound
    assert _peak(operator, "pairwise", batch, gradient=gradient) > 3 * per_link


def test_calls_are_independent_of_one_another() -> None:
    """Eight threads at once give the bits that one gives."""
    some = [random_case(seed) for seed in range(700, 716)]
    expected = [_results(case, _cotangent(case), "numpy") for case in some]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda case: _results(case, _cotangent(case), "numpy"), some * 2))
    for first, second in zip(expected * 2, actual, strict=True):
        for name, value in first.items():
            np.testing.assert_array_equal(second[name], value)


def test_arguments_are_left_alone() -> None:
    for seed in range(800, 846):
        case = random_case(seed)
        arrays = [*case.params.values(), case.x, *(a for a in (case.y, case.mask) if a is not None)]
        for array in arrays:
            array.setflags(write=False)
        for algorithm in ALGORITHMS:
            _results(case, _cotangent(case), "numpy", algorithm)


def test_B1_claims() -> None:
    backend = get_backend("numpy")
    assert isinstance(backend, Backend)
    assert (backend.name, backend.kind, backend.algorithms) == ("numpy", "numpy", ALGORITHMS)
    operator = presets.self_attention((4,), 4, 2)
    assert backend.not_supported(Request(operator), "stream") == []
    assert len(backend.not_supported(Request(operator, device="cuda", gradient=True), "stream")) == 2
