"""One fused Triton kernel on CUDA and ROCm GPUs; on the CPU with TRITON_INTERPRET=1. Forward only."""

from collections.abc import Mapping

import torch

from translution.algorithms import Request
from translution.arrays import Array, Kind
from translution.backends.triton import claims as known
from translution.backends.triton.assembly import forward
from translution.errors import NotSupported
from translution.inputs import Inputs
from translution.registry import Claims, Gradients


class TritonBackend:
    """Query, key and value of a pair are computed where they are used: nothing of size links x features is stored."""

    name = "triton"
    kind: Kind = "torch"
    algorithms = ("fused",)
    dtypes = ("float32", "float16", "bfloat16")
    claims = Claims(gradient_order=0)

    def unavailable(self) -> list[str]:
        """No GPU and no interpreter."""
        return known.unavailable()

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason."""
        return known.not_supported(request, algorithm)

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs
    ) -> tuple[Array, Array | None]:
        """out [B, Nq, F]; there are never weights."""
        with torch.no_grad():
            return forward(request.normal_form, params, inputs), None

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs, cotangent: Array
    ) -> tuple[Array, Gradients]:
        """Always :class:`NotSupported`."""
        raise NotSupported(self.name, algorithm, [known.NO_BACKWARD])


backend = TritonBackend()
