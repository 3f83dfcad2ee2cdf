"""Arrays that carry a bound of their own rounding error: value, magnitude and error, elementwise.

``value`` is the result in float64. ``magnitude`` is the same expression on absolute values: what a sum of products is
made of, so that ``gamma(n) * magnitude`` bounds its rounding in any order of summation and association (Higham,
*Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.1, with gamma(n) = n u / (1 - n u)). ``error``
bounds |computed - value|.

``depth`` counts the roundings that an element may have gone through. A sum may start from any of its terms, a bias say,
and then every later rounding is as large as that term: adding therefore charges each side with the depth of the other.

Where the magnitude is 0 the error is 0: such an element is a structural zero and must come out as exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Index = Any


@dataclass(frozen=True, slots=True)
class Bounded:
    """A float64 array with its magnitude and error bound, all of one shape, and the depth of its sums."""

    value: FloatArray
    magnitude: FloatArray
    error: FloatArray
    depth: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the three arrays."""
        return self.value.shape

    def __getitem__(self, index: Index) -> Bounded:
        return self._each(lambda part: part[index])

    def _each(self, change: Callable[[FloatArray], FloatArray]) -> Bounded:
        return Bounded(change(self.value), change(self.magnitude), change(self.error), self.depth)

    def reshape(self, *shape: int) -> Bounded:
        """All three reshaped."""
        return self._each(lambda part: part.reshape(shape))

    def where(self, kept: npt.NDArray[np.bool_]) -> Bounded:
        """Exactly 0 outside ``kept``, whatever stood there."""
        return self._each(lambda part: np.where(kept, part, 0))

    def __neg__(self) -> Bounded:
        return Bounded(-self.value, self.magnitude, self.error, self.depth)

    def replaced(self, index: Index, new: Bounded) -> Bounded:
        """``new`` at ``index``, this elsewhere."""
        value, magnitude, error = self.value.copy(), self.magnitude.copy(), self.error.copy()
        value[index], magnitude[index], error[index] = new.value, new.magnitude, new.error
        return Bounded(value, magnitude, error, max(self.depth, new.depth))

    def rewritten(self, index: Index, new: Bounded) -> Bounded:
        """As :meth:`replaced`, but in these arrays themselves, which nobody else may hold."""
        self.value[index], self.magnitude[index], self.error[index] = new.value, new.magnitude, new.error
        return Bounded(self.value, self.magnitude, self.error, max(self.depth, new.depth))

    def moved(self, source: int, target: int) -> Bounded:
        """All three with one axis moved."""
        return self._each(lambda part: np.moveaxis(part, source, target))


def exact(value: npt.ArrayLike) -> Bounded:
    """An input: no error."""
    array = np.asarray(value, dtype=np.float64)
    return Bounded(array, np.abs(array), np.zeros_like(array))


def zeros(*shape: int) -> Bounded:
    """Structural zeros."""
    return exact(np.zeros(shape))


def concatenate(parts: list[Bounded], axis: int) -> Bounded:
    """All three concatenated."""
    return Bounded(
        np.concatenate([p.value for p in parts], axis),
        np.concatenate([p.magnitude for p in parts], axis),
        np.concatenate([p.error for p in parts], axis),
        max(p.depth for p in parts),
    )


class Segments:
    """Reductions along axis 1 over the elements that share an entry of ``index`` [L], into ``size`` rows."""

    def __init__(self, index: npt.NDArray[np.int64], size: int) -> None:
        self.index, self.size = index, size
        self._order = np.argsort(index, kind="stable")
        self._rows, self._starts = np.unique(index[self._order], return_index=True)
        self.counts = np.bincount(index, minlength=size).astype(np.float64)

    def reduce(self, values: FloatArray, operation: np.ufunc = np.add, empty: float = 0.0) -> FloatArray:
        """[B, L, ..] to [B, size, ..]; rows without an element are ``empty``."""
        out = np.full((values.shape[0], self.size, *values.shape[2:]), empty)
        if len(self._rows) and values.shape[0]:
            out[:, self._rows] = operation.reduceat(values[:, self._order], self._starts, axis=1)
        return out


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Unit roundoffs of accumulation (``unit``), of stored intermediates and results (``storage``) and of the operands
    of products (``operand``, tf32); ``tiny`` is the absolute error of an underflow where results are stored.

    ``unit`` counts the evaluation of ``value`` in float64 as well.
    """

    unit: float
    storage: float
    operand: float
    tiny: float

    def gamma(self, n: float | FloatArray) -> float | FloatArray:
        """n u / (1 - n u)."""
        return n * self.unit / (1 - n * self.unit)

    def _product(self, value: FloatArray, magnitude: FloatArray, error: FloatArray, terms: int, depth: int) -> Bounded:
        error = error + (self.gamma(terms) + 2 * self.operand) * magnitude + self.tiny * (magnitude > 0)
        return Bounded(value, magnitude, error, depth + terms)

    def stored(self, a: Bounded) -> Bounded:
        """``a`` kept in the storage format, in whole or as the parts it is summed from."""
        if self.storage == 0:
            return a
        error = a.error + self.storage * (np.abs(a.value) + a.error) + self.tiny * (a.magnitude > 0)
        return Bounded(a.value, a.magnitude, error, a.depth)

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        """a + b, broadcast."""
        error = a.error + b.error + self.gamma(b.depth + 1) * a.magnitude + self.gamma(a.depth + 1) * b.magnitude
        return Bounded(a.value + b.value, a.magnitude + b.magnitude, error, a.depth + b.depth + 1)

    def add_at(self, a: Bounded, index: Index, b: Bounded) -> Bounded:
        """``a`` with ``b`` added at ``index``."""
        return a.replaced(index, self.add(a[index], b))

    def multiply(self, a: Bounded, b: Bounded) -> Bounded:
        """a * b, broadcast; up to two roundings (a factor such as a scale is itself rounded)."""
        error = a.error * np.abs(b.value) + (np.abs(a.value) + a.error) * b.error
        return self._product(a.value * b.value, a.magnitude * b.magnitude, error, 2, a.depth + b.depth)

    def scale(self, a: Bounded, factor: float) -> Bounded:
        """a times a constant."""
        return self.multiply(a, exact(factor))

    def contract(self, subscripts: str, a: Bounded, b: Bounded, terms: int) -> Bounded:
        """``einsum`` of two operands whose results are sums of ``terms`` products."""
        value = _einsum(subscripts, a.value, b.value)
        magnitude = _einsum(subscripts, a.magnitude, b.magnitude)
        error = np.zeros_like(value)
        if a.error.any():
            error = error + _einsum(subscripts, a.error, np.abs(b.value))
        if b.error.any():
            error = error + _einsum(subscripts, np.abs(a.value) + a.error, b.error)
        return self._product(value, magnitude, error, terms + 1, a.depth + b.depth)

    def total(self, a: Bounded, axes: tuple[int, ...]) -> Bounded:
        """Sum over axes."""
        terms = math.prod(a.shape[axis] for axis in axes)
        value, magnitude, error = (part.sum(axis=axes) for part in (a.value, a.magnitude, a.error))
        return Bounded(value, magnitude, error + self.gamma(terms) * magnitude, a.depth + terms)

    def gather_sum(self, a: Bounded, segments: Segments) -> Bounded:
        """Sum over the elements of each segment."""
        value, magnitude, error = (segments.reduce(part) for part in (a.value, a.magnitude, a.error))
        counts = segments.counts.reshape(-1, *(1,) * (value.ndim - 2))
        deepest = int(segments.counts.max(initial=0))
        return Bounded(value, magnitude, error + self.gamma(counts) * magnitude, a.depth + deepest)

    def softmax(self, logits: Bounded, live: npt.NDArray[np.bool_], segments: Segments) -> Bounded:
        """Softmax over the live elements of each segment; exactly 0 elsewhere.

        A logit off by D moves its weight by a factor exp(D + log sum_k P_k exp(D_k)) at most. To D come the roundings
        of the shift by the row's maximum and of the exponential's argument (4 u |s - max|, 2 u |s|) and, for a running
        softmax that rescales with every element, a few roundings per element. A weight is never off by more than 1.
        """
        s = np.where(live, logits.value, -np.inf)
        top = segments.reduce(s, np.maximum, -np.inf)[:, segments.index]
        with np.errstate(invalid="ignore"):  # a NaN logit stays NaN, a row without live keys is replaced
            shifted = np.where(live, s - top, -np.inf)
            exponential = np.exp(shifted)
            norm = segments.reduce(exponential)[:, segments.index]
        norm = np.where(live, norm, 1)
        weight = np.where(live, exponential / norm, 0)
        distance = np.where(live, np.abs(shifted), 0)
        moved = np.where(live, logits.error + self.unit * (2 * np.abs(logits.value) + 4 * distance), 0)
        with np.errstate(over="ignore"):
            row = np.log1p(segments.reduce(weight * np.expm1(np.minimum(moved, 700))))[:, segments.index]
        steps = segments.counts[segments.index].reshape(-1, *(1,) * (s.ndim - 2))
        moved = moved + row + self.gamma(6 * steps + 16)
        near = weight * np.expm1(np.minimum(moved, 1))
        far = np.exp(np.minimum(np.where(live, shifted - np.log(norm) + moved, 0), 0))
        error = np.minimum(np.where(moved <= 1, near, far), 1) + self.tiny
        magnitude = np.where(live, np.maximum(weight, np.finfo(np.float64).tiny), 0)
        return self.stored(Bounded(weight, magnitude, np.where(live, error, 0)))


_SMALL = 2**17


def _einsum(subscripts: str, a: FloatArray, b: FloatArray) -> FloatArray:
    # Planning a contraction, and sending it through BLAS, takes longer than a small one itself.
    result: FloatArray = np.einsum(subscripts, a, b, optimize=a.size * b.shape[-1] > _SMALL)
    return result


# float32 accumulation below a half-precision store; a tf32 product may truncate its operands, hence twice 2^-11.
_FLOAT64 = 2.0**-53
ARITHMETIC = {
    "float64": Arithmetic(2 * _FLOAT64, 0.0, 0.0, 2.0**-1022),
    "float32": Arithmetic(2.0**-24 + _FLOAT64, 0.0, 0.0, 2.0**-126),
    "tf32": Arithmetic(2.0**-24 + _FLOAT64, 0.0, 2.0**-10, 2.0**-126),
    "float16": Arithmetic(2.0**-24 + _FLOAT64, 2.0**-11, 0.0, 2.0**-24),
    "bfloat16": Arithmetic(2.0**-24 + _FLOAT64, 2.0**-8, 0.0, 2.0**-126),
}
