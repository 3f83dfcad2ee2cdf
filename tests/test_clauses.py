"""The meaning of each clause on small whole numbers, exactly, on every backend that runs here.

The conformance suite compares backends with the definition on random operators; here the expected numbers are written.
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from translution import NotSupported, get_backend, run, vjp
from translution.algorithms import Request
from translution.conformance.strategies import random_case
from translution.execution import reasons_against
from translution.spec import (
    BiasTable,
    Concat,
    Encoder,
    Identity,
    Lattice,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    Sum,
    Vectors,
)

Array = npt.NDArray[Any]
BACKENDS = ("reference", "numpy", "torch")
GENERAL = {"reference": "definition", "numpy": "stream", "torch": "stream"}

backends = pytest.mark.parametrize("backend", BACKENDS)


def filled(operator: Operator, **given: Any) -> dict[str, Array]:
    """Parameters of 0, but for those given; dots in their names are written __."""
    params = {name: np.zeros(shape) for name, shape in operator.parameters.items()}
    for name, value in given.items():
        key = name.replace("__", ".")
        params[key] = np.broadcast_to(np.asarray(value, float), params[key].shape).copy()
    return params


def summed(value: Encoder, layout: Any = None, num_heads: int = 1, dim: int = 1, **more: Any) -> Operator:
    return Operator(layout or Lattice((2,)), dim, num_heads, value, relevance=Ones(), **more)


def averaged(layout: Any, **more: Any) -> Operator:
    return Operator(layout, 1, 1, Identity(), relevance=Softmax(content=False), **more)


def compute(operator: Operator, params: dict[str, Array], x: Any, backend: str, **more: Any) -> list[Any]:
    found = run(operator, params, np.asarray(x, float), backend=backend, algorithm=GENERAL[backend], **more)
    result: list[Any] = found.tolist()
    return result


COLUMN = [[1.0], [10.0]]

# Which key, which row


@backends
def test_L1_L3_value_rows_follow_query_minus_key(backend: str) -> None:
    operator = summed(PerDisplacement(1))
    params = filled(operator, value__table=[[[1]], [[100]], [[10000]]])
    # Rows -1, 0, 1: the first query sees itself at 0 and the second key at -1.
    assert compute(operator, params, COLUMN, backend) == [[100 + 10], [10000 + 1000]]


def hardened(layout: Any, query: Encoder, key: Encoder) -> Operator:
    return Operator(layout, 1, 1, Identity(), query, key, relevance=Softmax(scale=1.0))


@backends
def test_L3_query_rows_follow_delta_and_key_rows_its_opposite(backend: str) -> None:
    """A logit of 200 against 0 leaves the others less than e^-200, which a sum of whole numbers rounds away."""
    operator = hardened(Lattice((3,)), PerDisplacement(1), Shared(1, bias=True))
    params = filled(operator, query__table=[[[0]], [[200]], [[0]], [[0]], [[0]]], key__bias=1)
    assert compute(operator, params, [[1], [1], [1]], backend)[0] == [1]
    # Row 1 is delta = -1, so each query takes the key after it; 2 is the last and weighs all alike.
    params = filled(operator, query__table=[[[0]], [[200]], [[0]], [[0]], [[0]]], key__bias=1)
    assert compute(operator, params, [[1], [2], [4]], backend)[:2] == [[2], [4]]
    operator = hardened(Lattice((3,)), Shared(1, bias=True), PerDisplacement(1))
    params = filled(operator, query__bias=1, key__table=[[[0]], [[200]], [[0]], [[0]], [[0]]])
    # Row 1 of the key table is -delta = -1, delta = 1: each query takes the key before it.
    assert compute(operator, params, [[1], [2], [4]], backend)[1:] == [[1], [2]]


@backends
@pytest.mark.parametrize(
    ("layout", "seen"),
    [
        (Lattice((3,), causal=True), [1, 3, 7]),
        (Lattice((3,), key_grid=(3,), stride=2, kernel_size=2, padding=0), [3, 4, 0]),
        (Lattice((3,), kernel_size=3, dilation=2), [5, 2, 5]),
        (Lattice((2,), key_grid=(3,), causal=True, offset=1), [3, 7]),
        (Lattice((5,), key_grid=(3,), key_stride=2, kernel_size=1), [1, 0, 2, 0, 4]),
        (Lattice((3,), kernel_size=3, boundary="zeros"), [3, 7, 6]),
        (Lattice((3,), kernel_size=3, boundary="circular"), [7, 7, 7]),
        (Lattice((3,), kernel_size=3, boundary="reflect"), [5, 7, 8]),
        (Lattice((3,), kernel_size=3, boundary="replicate"), [4, 7, 10]),
        (Lattice((3,), kernel_size=3, boundary="shift"), [7, 7, 7]),
        (Lattice((3,), kernel_size=2, boundary="shift", causal=True), [1, 3, 6]),
        (Lattice((2,), registers=1), [7, 7, 7]),
        (Lattice((2,), registers=1, causal=True), [1, 3, 7]),
        (PairTable(((0, -1, 0), (-1, 0, -1), (0, -1, 0)), 1), [5, 2, 5]),
    ],
    ids=[
        "L4",
        "L1",
        "L2",
        "L4-offset",
        "L1-key-stride",
        "L5-zeros",
        "L5-circular",
        "L5-reflect",
        "L5-replicate",
        "L5-shift",
        "L5-shift-causal",
        "L6",
        "L6-causal",
        "L8",
    ],
)
def test_L_support(layout: Any, seen: list[int], backend: str) -> None:
    operator = summed(Identity(), layout)
    x = np.zeros((layout.num_queries, 1))
    assert compute(operator, {}, x, backend, y=np.array([[1.0], [2.0], [4.0]])) == [[s] for s in seen]


@backends
def test_L6_register_rows(backend: str) -> None:
    layout = Lattice((1,), registers=1)
    operator = summed(PerDisplacement(1), layout)
    params = filled(operator, value__table=np.array([1, 10, 100, 1000]).reshape(4, 1, 1))
    # Rows: delta 0, (reg, reg), (grid, reg), (reg, grid) as (query, key).
    assert compute(operator, params, [[2], [3]], backend) == [[2 * 10 + 3 * 1000], [2 * 100 + 3]]


@backends
def test_L7_far_displacements_share_a_row(backend: str) -> None:
    from translution.spec import Clip

    operator = summed(PerDisplacement(1), Lattice((3,), far=Clip(1)))
    params = filled(operator, value__table=[[[1]], [[10]], [[100]]])
    assert compute(operator, params, [[1], [2], [4]], backend) == [[10 + 2 + 4], [100 + 20 + 4], [100 + 200 + 40]]


# Encoders: value encoders of one token at one class, so that the output is the encoding itself

ONE = Lattice((1,))
MATRIX = [[1, 2], [3, 4]]


@backends
@pytest.mark.parametrize(
    ("encoder", "given", "encoded"),
    [
        (Identity(bias=True), {"value__bias": [1, 2]}, [6, 9]),
        (Shared(2, bias=True), {"value__weight": MATRIX, "value__bias": [1, 2]}, [5 + 21 + 1, 10 + 28 + 2]),
        (Shared(2, groups=2), {"value__weight": [[[2]], [[3]]]}, [10, 21]),
        (PerDisplacement(2, bias=True), {"value__table": [MATRIX], "value__bias": [1, 2]}, [27, 40]),
        (PerDisplacement(2, groups=2), {"value__table": [[[[2]], [[3]]]]}, [10, 21]),
        (LowRank(1, 2), {"value__down": [[1], [2]], "value__table": [[[10]]], "value__up": [[3, 4]]}, [570, 760]),
        (LowRank(1), {"value__down": [[1], [2]], "value__table": [[[10]]]}, [190]),
        (Vectors(2), {"value__vectors": [[8, 9]]}, [8, 9]),
        (Sum((Shared(2), Vectors(2))), {"value__0__weight": MATRIX, "value__1__vectors": [[1, 2]]}, [27, 40]),
        (Concat((Identity(), Vectors(2))), {"value__1__vectors": [[8, 9]]}, [5, 7, 8, 9]),
    ],
    ids=["E3", "E4", "E4-groups", "E5", "E5-groups", "E6", "E6-down", "E7", "E8", "E9"],
)
def test_E_encoders(encoder: Encoder, given: dict[str, Any], encoded: list[int], backend: str) -> None:
    operator = summed(encoder, ONE, dim=2)
    assert compute(operator, filled(operator, **given), [[5, 7]], backend) == [encoded]


@backends
def test_E2_E9_parts_are_concatenated_head_by_head(backend: str) -> None:
    operator = summed(Concat((Identity(), Vectors(2))), ONE, num_heads=2, dim=2)
    assert compute(operator, filled(operator, value__1__vectors=[[8, 9]]), [[5, 7]], backend) == [[5, 8, 7, 9]]


@backends
def test_E7_shared_heads_take_the_same_vector(backend: str) -> None:
    operator = summed(Vectors(4, shared_heads=True), ONE, num_heads=2, dim=2)
    assert compute(operator, filled(operator, value__vectors=[[8, 9]]), [[5, 7]], backend) == [[8, 9, 8, 9]]


@backends
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_E10_logits_are_those_of_the_turned_vectors(backend: str, pairing: Any) -> None:
    """The ratio of two weights is exp of the difference of two logits of size 30: rounding stays below 1e-12."""
    turned = Rotary(Shared(4), pairing=pairing)
    operator = Operator(Lattice((2,)), 4, 1, Identity(), turned, turned, relevance=Softmax(scale=1.0))
    params = filled(operator, query__weight=np.eye(4), key__weight=np.eye(4))
    x = np.array([[1.0, 2.0, 3.0, 4.0]] * 2)
    _, weights = run(operator, params, x, backend=backend, algorithm=GENERAL[backend], return_weights=True)
    u, v = ((1.0, 3.0), (2.0, 4.0)) if pairing == "half" else ((1.0, 2.0), (3.0, 4.0))
    # A turn by t leaves |z|^2 cos t of <z, z>; the two angles per step are 1 and 10000^(-1/2).
    near = 30.0
    far = (u[0] ** 2 + u[1] ** 2) * np.cos(1.0) + (v[0] ** 2 + v[1] ** 2) * np.cos(0.01)
    assert abs(np.log(weights[0, 0, 0] / weights[0, 0, 1]) - (near - far)) < 1e-12


@backends
def test_E10_the_sense_of_the_turn(backend: str) -> None:
    """(s, t) becomes (s cos - t sin, s sin + t cos): a quarter turn of the key takes (1, 0) to (0, 1)."""
    operator = Operator(
        Lattice((1,), key_grid=(2,)), 2, 1, Identity(), Shared(2), Rotary(Shared(2)), relevance=Softmax(scale=1.0)
    )
    params = filled(operator, query__weight=np.eye(2), key__weight=np.eye(2))
    y = np.array([[1.0, 0.0], [1.0, 0.0]])
    _, weights = run(
        operator, params, np.array([[0.0, 1.0]]), y, backend=backend, algorithm=GENERAL[backend], return_weights=True
    )
    assert abs(np.log(weights[0, 0, 1] / weights[0, 0, 0]) - np.sin(1.0)) < 1e-12


# Relevance


@backends
def test_R1_R6_weights_are_powers_of_two_where_logits_are_logarithms(backend: str) -> None:
    operator = Operator(Lattice((2,)), 1, 1, Identity(), Shared(1), Shared(1), relevance=Softmax(scale=np.log(2.0)))
    params = filled(operator, query__weight=1, key__weight=1)
    found = np.array(compute(operator, params, [[1], [3]], backend))
    # Logits 1 ln 2, 3 ln 2 and 3 ln 2, 9 ln 2: weights 1/5, 4/5 and 1/65, 64/65.
    assert np.abs(found - [[13 / 5], [193 / 65]]).max() < 1e-14


@backends
def test_R2_R3_R4_ones_mean_and_their_mixture(backend: str) -> None:
    window = Lattice((3,), kernel_size=3)
    x = [[6], [12], [18]]
    for relevance, seen in (
        (Ones(), [[18], [36], [30]]),
        (Mean(), [[9], [12], [15]]),
        (Mixture(Ones(), Mean()), [[13.5], [24], [22.5]]),
    ):
        operator = Operator(window, 1, 1, Identity(), relevance=relevance)
        assert compute(operator, filled(operator), x, backend) == seen
    gate = filled(operator, relevance__gate=np.log(3.0))
    found = np.array(compute(operator, gate, x, backend))
    # sigmoid(ln 3) = 3/4 for the second part.
    assert np.abs(found - [[11.25], [18], [18.75]]).max() < 1e-13


@backends
def test_R5_biases(backend: str) -> None:
    """The bias alone decides; with logits of +-ln 2 the weights are 2 : 1."""
    layout, log2 = Lattice((2,)), np.log(2.0)
    table = Operator(layout, 1, 1, Identity(), relevance=Softmax(content=False, bias=BiasTable()))
    slope = Operator(layout, 1, 1, Identity(), relevance=Softmax(content=False, bias=SlopeBias((log2,))))
    square = Operator(layout, 1, 1, Identity(), relevance=Softmax(content=False, bias=QuadraticBias()))
    for operator, params, seen in (
        (table, filled(table, relevance__bias=[[log2, 0, 0]]), [[2], [1.5]]),
        (slope, {}, [[1], [2]]),
        (square, filled(square, relevance__weight=[[0, -log2]]), [[1], [2]]),
        # weight * -delta: the second key gains ln 2 for the first query, and the first loses it for the second.
        (square, filled(square, relevance__weight=[[log2, 0]]), [[2], [2]]),
    ):
        found = compute(operator, params, [[0], [3]], backend)
        assert np.abs(np.array(found) - seen).max() < 1e-14


@backends
def test_R7_without_content_tokens_do_not_move_the_weights(backend: str) -> None:
    assert compute(averaged(Lattice((2,))), {}, [[-1e6], [1e6]], backend) == [[0], [0]]


# Masks

PAIR = Lattice((2,))


@backends
@pytest.mark.parametrize("relevance", [Softmax(content=False), Ones(), Mean()])
def test_M1_M4_a_masked_key_is_absent(relevance: Any, backend: str) -> None:
    operator = Operator(PAIR, 1, 1, Identity(), relevance=relevance)
    for garbage in (10.0, np.nan, np.inf):
        assert compute(operator, {}, [[1], [garbage]], backend, mask=np.array([True, False])) == [[1], [1]]


@backends
def test_M2_float_masks_are_added_and_minus_infinity_is_absence(backend: str) -> None:
    mask = np.array([[0.0, np.log(2.0)], [0.0, -np.inf]])
    found = np.array(compute(averaged(PAIR), {}, [[0], [3]], backend, mask=mask))
    assert abs(found[0, 0] - 2.0) < 1e-14
    assert found[1, 0] == 0.0
    assert compute(averaged(PAIR), {}, [[1], [np.nan]], backend, mask=np.array([0.0, -np.inf])) == [[1], [1]]


@backends
@pytest.mark.parametrize("relevance", [Softmax(content=False), Ones(), Mean(), Mixture(Softmax(content=False), Mean())])
def test_M3_a_dead_row_is_zero_before_the_output_bias(relevance: Any, backend: str) -> None:
    operator = Operator(PAIR, 1, 1, Identity(), relevance=relevance, output=Identity(bias=True))
    params = filled(operator, output__bias=5)
    mask = np.array([[False, False], [True, True]])
    found = compute(operator, params, [[np.nan], [np.inf]], backend, mask=mask)
    assert found[0] == [5]
    _, gradients = vjp(
        operator, params, np.ones((2, 1)), cotangent=np.array([[1.0], [0.0]]), mask=mask, backend=backend
    )
    assert np.asarray(gradients.x).tolist() == [[0], [0]]
    assert np.asarray(gradients.params["output.bias"]).tolist() == [1]


@backends
def test_M4_garbage_in_a_masked_key_reaches_no_gradient(backend: str) -> None:
    operator = Operator(PAIR, 1, 1, PerDisplacement(1), PerDisplacement(1), PerDisplacement(1))
    params = {name: np.ones(shape) for name, shape in operator.parameters.items()}
    mask = np.array([True, False])
    x, y = np.array([[1.0], [2.0]]), np.array([[1.0], [np.nan]])
    _, gradients = vjp(operator, params, x, y, cotangent=np.ones((2, 1)), mask=mask, backend=backend)
    assert gradients.y is not None
    for gradient in (gradients.x, *gradients.params.values(), gradients.y):
        assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradients.y)[1].tolist() == [0]


@backends
def test_M4_nan_in_a_live_key_reaches_exactly_those_who_see_it(backend: str) -> None:
    found = np.array(compute(averaged(Lattice((3,), causal=True)), {}, [[1], [np.nan], [1]], backend))
    assert np.isnan(found).ravel().tolist() == [False, True, True]


@backends
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_M5_masks_beat_logits_and_large_logits_stay_finite(dtype: str, backend: str) -> None:
    operator = Operator(PAIR, 1, 1, Identity(), relevance=Softmax(content=False, bias=BiasTable()))
    params = {"relevance.bias": np.array([[6e4, 0.0, -6e4]], dtype)}
    x = np.array([[1.0], [2.0]], dtype)
    assert run(operator, params, x, backend=backend).tolist() == [[2], [2]]
    assert run(operator, params, x, backend=backend, mask=np.array([True, False])).tolist() == [[1], [1]]


@backends
def test_M6_one_mask_for_all_links_of_a_pair_and_none_for_zero_tokens(backend: str) -> None:
    dead = np.zeros((1, 1), bool)
    twice = summed(Identity(), Lattice((1,), kernel_size=3, boundary="replicate"))
    assert compute(twice, {}, [[1]], backend) == [[3]]
    assert compute(twice, {}, [[1]], backend, mask=dead) == [[0]]
    padded = summed(Identity(bias=True), Lattice((1,), kernel_size=3, boundary="zeros"))
    params = filled(padded, value__bias=10)
    assert compute(padded, params, [[1]], backend) == [[31]]
    assert compute(padded, params, [[1]], backend, mask=dead) == [[20]]


# Output, dtypes, calls


@backends
def test_O1_O2_O3_output(backend: str) -> None:
    operator = summed(Identity(), ONE, num_heads=2, dim=2, output=Shared(2, bias=True), output_scale=0.5)
    params = filled(operator, output__weight=MATRIX, output__bias=[1, 2])
    assert compute(operator, params, [[10, 14]], backend) == [[5 + 21 + 1, 10 + 28 + 2]]
    plain = summed(Identity(), ONE, num_heads=2, dim=2, output_scale=0.5)
    assert compute(plain, {}, [[10, 14]], backend) == [[5, 7]]


@backends
def test_O4_low_rank_features_of_all_heads_are_brought_up_together(backend: str) -> None:
    operator = summed(Identity(), ONE, num_heads=2, dim=4, output=LowRankOutput(2, 2, bias=True), output_scale=0.5)
    params = filled(operator, output__up=MATRIX, output__weight=np.eye(2), output__bias=[100, 200])
    # Heads (2, 4) and (6, 8), halved: o = (1, 3), z = (2, 4), z U = (2 + 12, 4 + 16).
    assert compute(operator, params, [[2, 4, 6, 8]], backend) == [[1 + 14 + 100, 3 + 20 + 200]]


@backends
def test_D1_D3_the_result_has_the_dtype_and_kind_of_x(backend: str) -> None:
    torch = pytest.importorskip("torch")
    operator = summed(Identity())
    for dtype in ("float32", "float64"):
        assert run(operator, {}, np.ones((2, 1), dtype), backend=backend).dtype == dtype
        found = run(operator, {}, torch.ones(2, 1, dtype=getattr(torch, dtype)), backend=backend)
        assert found.dtype == getattr(torch, dtype)
    # 2^40 + 2^-10 has 51 bits: only float64 holds it.
    assert compute(operator, {}, [[2.0**40], [2.0**-10]], backend) == [[2.0**40 + 2.0**-10]] * 2


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_D2_halves_are_summed_in_float32(backend: str) -> None:
    """In float16, where 2048 + 1 = 2048, adding 1 again and again would stay at 2048."""
    operator = summed(Identity(), Lattice((1,), key_grid=(5,)))
    y = np.array([[2048.0], [1.0], [1.0], [1.0], [1.0]], np.float16)
    assert run(operator, {}, np.ones((1, 1), np.float16), y, backend=backend).tolist() == [[2052]]


@backends
def test_B2_what_is_not_claimed_raises_before_computing(backend: str) -> None:
    found = get_backend(backend)
    operator = summed(Identity())
    for dtype in ("float64", "float32", "float16", "complex128"):
        x = np.ones((2, 1), dtype)
        for algorithm in ("definition", "pairwise", "stream", "conv", "sdpa", "fused"):
            if reasons_against(found, Request(operator, dtype=dtype), algorithm):
                with pytest.raises(NotSupported):
                    run(operator, {}, x, backend=backend, algorithm=algorithm)
            else:
                assert run(operator, {}, x, backend=backend, algorithm=algorithm).tolist() == [[2], [2]]


@backends
@pytest.mark.parametrize("seed", range(12))
def test_B4_calls_write_to_nothing_and_threads_do_not_matter(seed: int, backend: str) -> None:
    case = random_case(seed)
    before = [a.copy() for a in (case.x, case.y, case.mask, *case.params.values()) if a is not None]
    alone = run(case.operator, case.params, case.x, case.y, mask=case.mask, backend=backend)
    found: list[Array] = []

    def work() -> None:
        found.append(run(case.operator, case.params, case.x, case.y, mask=case.mask, backend=backend))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for result in found:
        assert np.array_equal(result, alone, equal_nan=True)
        result += 1.0
    after = [a for a in (case.x, case.y, case.mask, *case.params.values()) if a is not None]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(after, before, strict=True))


@backends
def test_B5_weights_add_up_over_the_links_of_a_pair(backend: str) -> None:
    for boundary, weights in (("replicate", [[2, 1], [1, 2]]), ("zeros", [[1, 1], [1, 1]])):
        operator = summed(Identity(), Lattice((2,), kernel_size=3, boundary=boundary))  # type: ignore[arg-type]
        _, found = run(operator, {}, np.ones((2, 1)), backend=backend, return_weights=True)
        assert found.tolist() == [weights]
