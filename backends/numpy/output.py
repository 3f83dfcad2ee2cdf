"""From the weighted sums of the values to the result: scale, low-rank uplift, output encoder (clauses O2 to O4)."""

from collections.abc import Mapping

import numpy as np

from translution.backends.numpy.blocks import Array
from translution.backends.numpy.encode import RoleEncoder
from translution.backends.numpy.products import matrix_vjp, product, product_vjp
from translution.geometry import Geometry
from translution.normal_form import NormalForm


class OutputProjection:
    """The output side of one call, from ``heads`` [Nq, B, H, D]; ``result`` is [Nq, B, F]."""

    def __init__(self, form: NormalForm, params: Mapping[str, Array], heads: Array, geometry: Geometry) -> None:
        self._form, self._params, self._shape = form, params, heads.shape
        self._scale = heads.dtype.type(form.operator.output_scale)
        self._full = heads.shape[3] - (form.uplift.width if form.uplift else 0)
        scaled = heads * self._scale
        joined = self._joined(scaled[..., : self._full])
        if form.uplift is not None:
            self._low = self._joined(scaled[..., self._full :])
            joined = joined + product(self._low, params[form.uplift.name])
        self._encoder = None if form.output is None else RoleEncoder(form.output, params, joined, geometry)
        encoded = None if self._encoder is None else self._encoder.base
        self.result = joined if encoded is None else encoded[:, :, 0, :]
        self.gradients: dict[str, Array] = {}

    def _joined(self, heads: Array) -> Array:
        return np.ascontiguousarray(heads).reshape(*heads.shape[:2], heads.shape[2] * heads.shape[3])

    def vjp(self, cotangent: Array) -> Array:
        """Gradient of ``heads`` from the cotangent of ``result``; fills ``gradients``."""
        joined = cotangent
        if self._encoder is not None:
            self._encoder.base_vjp(cotangent[:, :, None, :])
            joined = self._encoder.token_gradient()
            self.gradients = self._encoder.gradients
        result = np.empty(self._shape, cotangent.dtype)
        result[..., : self._full] = joined.reshape(*self._shape[:3], self._full)
        if self._form.uplift is not None:
            up = self._params[self._form.uplift.name]
            self.gradients[self._form.uplift.name] = matrix_vjp(self._low, joined, up.shape)
            low = product_vjp(joined, up)
            result[..., self._full :] = low.reshape(*self._shape[:3], self._form.uplift.width)
        result *= self._scale
        return result
