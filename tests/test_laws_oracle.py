"""The laws that know the answer: their own index arithmetic, and the arithmetic of their conclusions."""

from collections import Counter

import numpy as np
import pytest

from translution.backends.reference.support import support
from translution.conformance.comparison import ComparisonError
from translution.conformance.error_model import budget
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.question import Question
from translution.conformance.laws.definition import defined, defined_gradients, require_agreement, slope
from translution.conformance.laws.integers import partial_permutation
from translution.conformance.laws.positions import far, links
from translution.conformance.laws.quality import LEAST, RATIO, Used, judge, squares
from translution.conformance.laws.tracers import winners
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout, draw_question
from translution.spec import Clip, Identity, Lattice, LogBuckets, Ones, Operator, PairTable


def found(layout: Lattice | PairTable, query: int) -> list[tuple[int | None, int, int]]:
    return [(link.key, link.value_row, link.key_row) for link in links(layout) if link.query == query]


def test_L3_rows_of_values_ascend_in_delta_and_those_of_keys_in_minus_delta() -> None:
    assert found(Lattice((3,), kernel_size=2, padding=1), 1) == [(0, 1, 0), (1, 0, 1)]


def test_L4_raster_order_and_positions_decide() -> None:
    assert [key for key, *_ in found(Lattice((2, 2), causal=True), 2)] == [0, 1, 2]
    assert [key for key, *_ in found(Lattice((1,), key_grid=(4,), causal=True, offset=2), 0)] == [0, 1, 2]


def test_L5_what_stands_beyond_the_grid() -> None:
    seen = {
        boundary: [key for key, *_ in found(Lattice((3,), kernel_size=3, boundary=boundary), 0)]
        for boundary in ("absent", "zeros", "circular", "reflect", "replicate", "shift")
    }
    assert seen == {
        "absent": [0, 1],
        "zeros": [None, 0, 1],
        "circular": [2, 0, 1],
        "reflect": [1, 0, 1],
        "replicate": [0, 0, 1],
        "shift": [0, 1, 2],
    }


def test_L6_rows_of_registers_follow_the_grid() -> None:
    assert found(Lattice((2,), registers=1), 0) == [(0, 3, 3), (1, 5, 5), (2, 5, 5)]
    assert found(Lattice((2,), registers=1), 2) == [(0, 4, 4), (1, 2, 0), (2, 1, 1)]


def test_L7_labels() -> None:
    assert [far(LogBuckets(4, 8), d) for d in (0, 1, 2, 3, 4, 100, -100)] == [0, 1, 2, 2, 3, 3, -3]
    assert [far(Clip(2), d) for d in (-5, -2, 0, 1, 9)] == [-2, -2, 0, 1, 2]


def test_L8_tables() -> None:
    ring = PairTable(((0, 1, -1), (2, 0, 1), (-1, 2, 0)), num_classes=3)
    assert found(ring, 0) == [(0, 0, 0), (1, 1, 2)]


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_links_are_those_of_the_reference(kind: str) -> None:
    for number in range(12):
        layout = draw_layout(SeededDraws(number, "links"), kinds=(kind,))
        for query in range(layout.num_queries):
            wanted = Counter((link.key, link.value_row, link.key_row) for link in support(layout, query))
            assert Counter(found(layout, query)) == wanted, layout


def test_winners_average_over_two_and_leave_three_out() -> None:
    layout = Lattice((1,), key_grid=(4,))
    names = np.array([[3.0, 5.0, 8.0, 9.0, 1.0]])
    order = [link.key for link in links(layout)]
    assert order == [0, 1, 2, 3]
    logits = np.array([[0.0, 0.0, 64.0], [64.0, 0.0, 64.0], [0.0, 0.0, 64.0], [64.0, -64.0, -64.0]])
    read = winners(logits, names, layout)[0, 0]
    assert read[0] == 7.0
    assert np.isnan(read[1:]).all()


def test_partial_permutations_have_one_entry_in_each_row_and_column() -> None:
    matrices = np.abs(partial_permutation(np.random.default_rng(0), (3, 2, 4)))
    assert matrices.sum() == 6
    assert matrices.sum(1).max() == matrices.sum(2).max() == 1


def case(group: str, subject: float, count: int = 4) -> Used:
    return Used(group, subject * count, float(count), count)


@pytest.mark.parametrize("dtype", RATIO)
def test_quality_compares_root_mean_squares_group_by_group(dtype: str) -> None:
    good = [case("a", 1.0) for _ in range(LEAST)]
    allowed, worse = RATIO[dtype] ** 2 * 0.999, RATIO[dtype] ** 2 * 1.001
    judge([*good, *(case("b", allowed) for _ in range(6))], dtype)
    with pytest.raises(ComparisonError, match="b: over 6 cases"):
        judge([*good, *(case("b", worse) for _ in range(6))], dtype)


def test_quality_says_nothing_of_few_cases() -> None:
    judge([case("a", 100.0) for _ in range(LEAST - 1)], "float16")
    with pytest.raises(ComparisonError):
        judge([case("a", 100.0) for _ in range(LEAST)], "float16")


def test_quality_where_the_plain_computation_is_exact() -> None:
    judge([Used("a", 0.0, 0.0, 4)] * LEAST, "float16")
    with pytest.raises(ComparisonError):
        judge([Used("a", 1e-30, 0.0, 4), *[Used("a", 0.0, 0.0, 4)] * LEAST], "float16")


def test_squares_leave_out_what_has_no_bound() -> None:
    total, count = squares(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0]), np.array([0.0, 2.0, 1.0]))
    assert (total, count) == (0.25 + 4.0, 2)


def test_agreement_of_error_model_and_definition_is_not_a_verdict() -> None:
    with pytest.raises(AssertionError, match="disagree") as raised:
        require_agreement("out", np.array([1.0]), np.array([1.1]), np.array([0.01]))
    assert not isinstance(raised.value, ComparisonError)


def test_definitions_are_kept_apart_by_everything_that_matters() -> None:
    operator = Operator(Lattice((3,)), 1, 1, Identity(), relevance=Ones())
    x = np.array([[1.0], [2.0], [6.0]])
    question = Question(operator, {}, x)
    assert defined(question) is defined(question.but(x=x.copy()))
    assert defined(question).out.ravel().tolist() == [9.0] * 3
    assert defined(question.but(mask=np.array([True, True, False]))).out.ravel().tolist() == [3.0] * 3
    assert defined(question.but(x=x + 1)).out.ravel().tolist() == [12.0] * 3


def test_slope_is_the_derivative_along_a_direction() -> None:
    question = draw_question(SeededDraws(5, "slope"), cotangent=True)
    assert question.cotangent is not None
    assert question.x.size
    gradients = defined_gradients(question).gradients
    direction = {name: np.ones_like(value) for name, value in gradients.items()}
    products = slope(question, direction) * question.cotangent
    along, total = float(products.sum()), sum(float(value.sum()) for value in gradients.values())
    q = question
    bounds = budget(q.operator, q.params, q.x, q.y, q.mask, q.cotangent, "float64").gradients
    # Beside the gradients' own errors, the sums of this test.
    terms = products.size + sum(value.size for value in gradients.values())
    sizes = np.abs(products).sum() + sum(np.abs(value).sum() for value in gradients.values())
    assert sizes > 0
    assert abs(along - total) <= sum(float(bounds[name].sum()) for name in gradients) + terms * 2.0**-53 * sizes
