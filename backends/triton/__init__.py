"""Fused Triton kernels on CUDA and ROCm GPUs, forward and backward; on the CPU with TRITON_INTERPRET=1."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from translution.algorithms import Request
from translution.arrays import Array, Kind
from translution.backends.triton import claims as known
from translution.backends.triton.assembly import forward
from translution.inputs import Inputs
from translution.recorded import recorded_vjp
from translution.registry import Claims, Gradients


class TritonBackend:
    """Query, key and value of a pair are computed where they are used: nothing of size links x features is stored."""

    name = "triton"
    kind: Kind = "torch"
    algorithms = ("fused",)
    dtypes = ("float32", "float16", "bfloat16")
    claims = Claims(gradient_order=1)

    def unavailable(self) -> list[str]:
        """No GPU and no interpreter."""
        return known.unavailable()

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        """Every reason."""
        return known.not_supported(request, algorithm)

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs
    ) -> tuple[Array, Array | None]:
        """out [B, Nq, F], recorded where a gradient is asked for; there are never weights."""
        with no_autocast(inputs.x):
            return forward(request.normal_form, params, inputs, request.gradient), None

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs, cotangent: Array
    ) -> tuple[Array, Gradients]:
        """out, and the gradients of <cotangent, out>; x and y are leaves of their own."""
        recorded = replace(request, gradient=True)
        return recorded_vjp(
            lambda own, given: self.forward(recorded, algorithm, own, given)[0], params, inputs, cotangent
        )


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A region in which dtypes stay as they are (clause D1)."""
    if like.is_meta:  # for which torch has no autocast
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


backend = TritonBackend()
