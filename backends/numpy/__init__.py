"""Vectorised NumPy: results and vector-Jacobian products in float64, float32, and float16 computed in float32.

``stream`` works displacement by displacement and keeps nothing larger than the logits; ``pairwise`` keeps queries, keys
and values of every link. Both follow the normal form and the links of :mod:`translution.geometry`.
"""

from collections.abc import Mapping

import numpy as np

from translution.algorithms import Request
from translution.arrays import Array, Kind
from translution.backends.numpy.pairwise import Pairwise
from translution.backends.numpy.passes import Call
from translution.backends.numpy.stream import Stream
from translution.inputs import Inputs
from translution.registry import Gradients

__all__ = ["backend"]

_ALGORITHMS: dict[str, type[Stream] | type[Pairwise]] = {"stream": Stream, "pairwise": Pairwise}


class NumpyBackend:
    """See :class:`translution.registry.Backend`. Calls share only cached index arrays: threads may run them at once."""

    name: str = "numpy"
    kind: Kind = "numpy"
    algorithms: tuple[str, ...] = tuple(_ALGORITHMS)
    dtypes: tuple[str, ...] = ("float64", "float32", "float16")

    def unavailable(self) -> list[str]:
        """Nothing: NumPy is always there."""
        return []

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Both algorithms run every operator, on the CPU, without recording gradients."""
        reasons = []
        if request.device != "cpu":
            reasons.append(f"numpy computes on the CPU, the tokens are on {request.device}")
        if request.gradient:
            reasons.append("numpy records no gradient: use translution.vjp, or backend='torch'")
        return reasons

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs
    ) -> tuple[Array, Array | None]:
        """out [B, Nq, F], and weights [B, H, Nq, Nk] where the request asks for them."""
        # NaN and Inf in live tokens reach what the definition says; a warning would depend on the order of evaluation.
        with np.errstate(all="ignore"):
            call = Call(request, _ALGORITHMS[algorithm], params, inputs)
            out, weights = call.forward()
            return call.returned(out), call.dense_weights(weights) if request.return_weights else None

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs, cotangent: Array
    ) -> tuple[Array, Gradients]:
        """out, and the gradients of <cotangent, out>."""
        with np.errstate(all="ignore"):
            return Call(request, _ALGORITHMS[algorithm], params, inputs).vjp(cotangent)


backend = NumpyBackend()
