"""The definition as plain loops: slow, readable, and the measure for the other backends.

It interprets the spec's encoders directly and does its own index arithmetic; only :mod:`translution.spec` is shared.
float32 and float16 are computed in float64 and rounded once at the end. complex128 serves derivatives by a
complex step: the forward is analytic, so that Im f(x + i h d) / h is the directional derivative for tiny h.
"""

from collections.abc import Mapping

import numpy as np

from translution.algorithms import Request
from translution.arrays import Array, Kind
from translution.backends.reference.definition import forward
from translution.backends.reference.encode import Vector
from translution.backends.reference.gradient import backward
from translution.errors import NotSupported
from translution.inputs import Inputs
from translution.registry import Gradients

__all__ = ["Reference", "backend"]


class Reference:
    """The backend ``reference``."""

    name: str = "reference"
    kind: Kind = "numpy"
    algorithms: tuple[str, ...] = ("definition",)
    dtypes: tuple[str, ...] = ("float64", "float32", "float16", "complex128")

    def unavailable(self) -> list[str]:
        """Reasons why nothing runs on this machine: none."""
        return []

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason why this request can't run with ``algorithm``."""
        if request.gradient:
            return ["reference computes in NumPy and would lose the gradient of a torch tensor; use translution.vjp"]
        return []

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs
    ) -> tuple[Array, Array | None]:
        """out [B, Nq, F], and weights [B, H, Nq, Nk] where the request asks for them."""
        with np.errstate(all="ignore"):
            wide = {name: _wide(value) for name, value in params.items()}
            mask = _full_mask(request, inputs)
            out, weights = forward(request.operator, wide, _wide(inputs.x), _wide(inputs.y), mask)
            dtype = inputs.x.dtype
            return out.astype(dtype), weights.astype(dtype) if request.return_weights else None

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs, cotangent: Array
    ) -> tuple[Array, Gradients]:
        """out, and the gradients of <cotangent, out>."""
        if request.dtype == "complex128":
            raise NotSupported(self.name, algorithm, ["complex128 is for run: gradients are those of real numbers"])
        with np.errstate(all="ignore"):
            wide = {name: _wide(value) for name, value in params.items()}
            mask, x, y = _full_mask(request, inputs), _wide(inputs.x), _wide(inputs.y)
            out, gradients, dx, dy = backward(request.operator, wide, x, y, mask, _wide(cotangent))
            dtype = inputs.x.dtype
            narrow = {name: value.astype(dtype) for name, value in gradients.items()}
            return out.astype(dtype), Gradients(narrow, dx.astype(dtype), dy.astype(dtype))


def _wide(value: Array) -> Vector:
    return np.asarray(value, dtype=np.complex128 if np.iscomplexobj(value) else np.float64)


def _full_mask(request: Request, inputs: Inputs) -> Vector | None:
    if inputs.mask is None:
        return None
    layout = request.operator.layout
    return np.broadcast_to(
        inputs.mask, (len(inputs.x), request.operator.num_heads, layout.num_queries, layout.num_keys)
    )


backend = Reference()
