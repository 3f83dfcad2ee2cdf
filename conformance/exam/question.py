"""What an exam asks, and what comes back: float64 NumPy arrays that hold values of the dtype in question."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from translution.spec import Operator

FloatArray = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Question:
    """One call of :func:`translution.run`: parameters and tokens in float64, with values that the dtype can hold.

    x is [.., Nq, Cq], y [.., Nk, Ck] or None, ``mask`` bool or float64 or None. With a ``cotangent``, shaped like the
    result, gradients can be asked for. ``label`` says where the question comes from.
    """

    operator: Operator
    params: Mapping[str, Array]
    x: Array
    y: Array | None = None
    mask: Array | None = None
    cotangent: Array | None = None
    return_weights: bool = False
    label: str = ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result, [.., Nq, F]."""
        return (*self.x.shape[:-2], self.operator.layout.num_queries, self.operator.out_features)

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """Shape of the weights, [.., H, Nq, Nk]."""
        layout = self.operator.layout
        return (*self.x.shape[:-2], self.operator.num_heads, layout.num_queries, layout.num_keys)

    @property
    def arrays(self) -> dict[str, Array | None]:
        """Everything that the answer depends on beside the operator; parameters by their own names."""
        return {**self.params, "(x)": self.x, "(y)": self.y, "(mask)": self.mask, "(cotangent)": self.cotangent}

    def but(self, **changes: Any) -> Question:
        """The same question with some fields replaced."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        mask = None if self.mask is None else (self.mask.dtype.name, self.mask.shape)
        y = None if self.y is None else self.y.shape
        return f"{self.label or 'question'}: {self.operator}, x {self.x.shape}, y {y}, mask {mask}"


@dataclass(frozen=True, eq=False)
class Answer:
    """What a subject computed, widened to float64 without loss.

    ``gradients`` are by parameter name and for ``x`` and, where the question has one, ``y``.
    """

    out: FloatArray
    weights: FloatArray | None = None
    gradients: Mapping[str, FloatArray] = field(default_factory=dict)


def digest(arrays: Mapping[str, Array | None]) -> str:
    """The same for arrays of the same names, dtypes, shapes and numbers."""
    told = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        if array is not None:
            told.update(f"{name}{array.dtype.str}{array.shape}".encode())
            told.update(np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def rounded(value: npt.ArrayLike, dtype: str) -> FloatArray:
    """The nearest values that ``dtype`` (float64, float32, float16, bfloat16) holds, ties to even, as float64."""
    wide = np.asarray(value, np.float64)
    if dtype == "float64":
        return wide
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return wide.astype(dtype).astype(np.float64)
    fraction, exponent = np.frexp(wide)
    with np.errstate(invalid="ignore"):
        found = np.ldexp(np.rint(fraction * 256) / 256, exponent)
    # Below 2^-126 the spacing stays what it is there.
    small = np.abs(wide) < 2.0**-126
    found = np.where(small, np.rint(wide * 2.0**133) * 2.0**-133, found)
    return np.asarray(np.where(np.abs(found) >= 2.0**128, np.copysign(np.inf, found), found))
