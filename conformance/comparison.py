"""Results against a bound: how much of it an error uses, and where it breaks it."""

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


class ComparisonError(AssertionError):
    """Two results differ by more than they may, or can't be compared at all."""


def as_numpy(value: Any) -> npt.NDArray[Any]:
    """A NumPy array of the same values; half-precision torch tensors widen to float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()
        value = value.numpy()
    return np.asarray(value)


def _compared(
    name: str, got: Any, want: Any, bound: Any, dtype: str | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    found, expected, limit = as_numpy(got), as_numpy(want), as_numpy(bound)
    if found.shape != expected.shape:
        raise ComparisonError(f"{name}: shape {found.shape}, expected {expected.shape}")
    if dtype is not None and str(got.dtype).removeprefix("torch.") != dtype:
        raise ComparisonError(f"{name}: dtype {got.dtype}, expected {dtype}")
    if limit.shape not in ((), expected.shape):
        raise ComparisonError(f"{name}: bound of shape {limit.shape} for a result of shape {expected.shape}")
    finite, kept = np.isfinite(expected), np.isfinite(found)
    if (finite != kept).any():
        where = _first(finite != kept)
        raise ComparisonError(f"{name}{list(where)}: {found[where]}, expected {expected[where]}")
    difference = np.abs(np.where(finite, found, 0).astype(np.float64) - np.where(finite, expected, 0))
    # Where the exact result is not finite, its bound means nothing.
    limit = np.where(finite, np.broadcast_to(limit, expected.shape), 0).astype(np.float64)
    if not (limit >= 0).all():
        where = _first(~(limit >= 0))
        raise ComparisonError(f"{name}{list(where)}: bound {limit[where]} is not a number at least 0")
    shares = np.zeros_like(difference)
    np.divide(difference, limit, out=shares, where=limit > 0)
    shares[(limit == 0) & (difference > 0)] = np.inf
    return difference, limit, shares


def _first(wrong: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(wrong)[0])


def share(name: str, got: Any, want: Any, bound: Any, *, dtype: str | None = None) -> float:
    """max |got - want| / bound; a bound of 0 asks for equality and gives 0 or infinity.

    ``got``, ``want`` and ``bound`` are arrays of either kind, ``bound`` may be a number. NaN or Inf is expected exactly
    where ``want`` has it.

    Raises:
        ComparisonError: another shape, another ``dtype`` (where one is named), or non-finite in other places.
    """
    _, _, shares = _compared(name, got, want, bound, dtype)
    return float(shares.max(initial=0.0))


def worst_error(name: str, got: Any, want: Any) -> float:
    """max |got - want| over the places where ``want`` is finite; the conditions of :func:`share`."""
    difference, _, _ = _compared(name, got, want, 0.0, None)
    return float(difference.max(initial=0.0))


def check(name: str, got: Any, want: Any, bound: Any, *, dtype: str | None = None) -> float:
    """The :func:`share`, or :class:`ComparisonError` where it exceeds 1; the message shows the worst place."""
    difference, limit, shares = _compared(name, got, want, bound, dtype)
    worst = float(shares.max(initial=0.0))
    if worst > 1:
        where = tuple(int(i) for i in np.unravel_index(int(shares.argmax()), shares.shape))
        raise ComparisonError(
            f"{name}{list(where)}: {as_numpy(got)[where]!s}, expected {as_numpy(want)[where]!s}; off by "
            f"{difference[where]:.3g}, allowed {limit[where]:.3g}; {int((shares > 1).sum())} of {shares.size} "
            "elements are beyond their bound"
        )
    return worst
