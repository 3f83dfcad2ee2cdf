"""The comparison itself: it accepts what it should, and it can fail."""

import numpy as np
import pytest
import torch

from translution.conformance.comparison import ComparisonError, check, share, worst_error


def test_the_share_is_the_worst_error_over_its_own_bound() -> None:
    got, want, bound = np.array([1.5, 2.0]), np.array([1.0, 2.25]), np.array([2.0, 0.5])
    assert share("out", got, want, bound) == 0.5
    assert worst_error("out", got, want) == 0.5
    assert check("out", got, want, bound) == 0.5


def test_a_share_of_exactly_one_holds_and_more_does_not() -> None:
    assert check("out", np.array([1.5]), np.array([1.0]), 0.5) == 1.0
    with pytest.raises(ComparisonError, match=r"out\[0\]: 1.5, expected 1.0; off by 0.5, allowed 0.25; 1 of 1"):
        check("out", np.array([1.5]), np.array([1.0]), 0.25)


def test_a_zero_bound_asks_for_equality() -> None:
    assert share("out", np.array([3.0, -0.0]), np.array([3.0, 0.0]), np.zeros(2)) == 0
    assert share("out", np.array([np.nextafter(3, 4)]), np.array([3.0]), 0.0) == np.inf
    with pytest.raises(ComparisonError, match=r"out\[1\]"):
        check("out", np.array([3.0, 1e-300]), np.array([3.0, 0.0]), np.zeros(2))


def test_the_message_names_the_worst_element() -> None:
    want = np.zeros((2, 3))
    got = want.copy()
    got[0, 1], got[1, 2] = 2.0, 3.0
    with pytest.raises(ComparisonError, match=r"out\[1, 2\]: 3.0, expected 0.0.*2 of 6"):
        check("out", got, want, 1.0)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (np.zeros(3), np.zeros((3, 1)), "shape"),
        (np.zeros((1, 3)), np.zeros(3), "shape"),
        (np.array([np.nan]), np.array([0.0]), "nan, expected 0"),
        (np.array([np.inf]), np.array([0.0]), "inf, expected 0"),
        (np.array([0.0]), np.array([np.nan]), "0.0, expected nan"),
    ],
)
def test_what_cannot_be_compared_is_an_error(got: np.ndarray, want: np.ndarray, message: str) -> None:
    for compare in (share, check):
        with pytest.raises(ComparisonError, match=message):
            compare("out", got, want, 1e9)


def test_nan_is_expected_where_the_wanted_value_has_it() -> None:
    got, want = np.array([np.nan, 1.0]), np.array([np.nan, 1.0])
    assert share("out", got, want, np.array([np.nan, 0.0])) == 0


@pytest.mark.parametrize("bound", [np.array([-1.0]), np.array([np.nan]), np.zeros(2)])
def test_a_bound_that_is_none_is_an_error(bound: np.ndarray) -> None:
    with pytest.raises(ComparisonError, match="bound"):
        share("out", np.zeros(1), np.zeros(1), bound)


def test_the_dtype_counts_where_it_is_named() -> None:
    single = np.zeros(1, np.float32)
    assert share("out", single, np.zeros(1), 0.0) == 0
    assert share("out", single, np.zeros(1), 0.0, dtype="float32") == 0
    with pytest.raises(ComparisonError, match="dtype float32, expected float64"):
        share("out", single, np.zeros(1), 0.0, dtype="float64")


def test_torch_tensors_of_every_dtype_compare_with_numpy_arrays() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tensor = torch.tensor([1.5, -2.0], dtype=dtype, requires_grad=True)
        name = str(dtype).removeprefix("torch.")
        assert check("out", tensor, np.array([1.5, -2.0]), 0.0, dtype=name) == 0
        with pytest.raises(ComparisonError):
            check("out", tensor, np.array([1.5, -2.5]), 0.25)


def test_nothing_compares_with_nothing() -> None:
    assert check("out", np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3))) == 0


def test_a_failed_comparison_is_a_failed_assertion() -> None:
    assert issubclass(ComparisonError, AssertionError)
