"""Random tokens and parameters for a request, and the calls on them that are timed or whose memory is measured."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from translution.algorithms import Request
from translution.arrays import Array, to_kind
from translution.execution import run, vjp
from translution.registry import Backend, get_backend


class Workload:
    """One request in numbers: normal values, matrices scaled so that what they give is as large as what they get.

    A mask hides a quarter of the keys. The same seed gives the same numbers.
    ``params`` and ``x`` [B, N, C] are float32.
    """

    def __init__(self, request: Request, seed: int = 0) -> None:
        self.request, operator = request, request.operator
        generator = np.random.default_rng(seed)

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
            return scale * generator.standard_normal(shape, np.float32)

        self.params = {
            name: normal(*shape, scale=shape[-2] ** -0.5 if len(shape) > 1 else 1.0)
            for name, shape in operator.parameters.items()
        }
        layout, batch = operator.layout, request.batch
        # Without content x holds the keys alone.
        self.x = normal(batch, layout.num_queries if operator.uses_content else layout.num_keys, operator.dim)
        self._y = (
            None if layout.is_self or not operator.uses_content else normal(batch, layout.num_keys, operator.keys_dim)
        )
        live = generator.random((batch, 1, 1, layout.num_keys)) < 0.75
        self._mask = {"none": None, "bool": live, "float": np.where(live, np.float32(0), -np.inf)}[request.mask]

    @property
    def _out_shape(self) -> tuple[int, int, int]:
        operator = self.request.operator
        return self.request.batch, operator.layout.num_queries, operator.out_features

    def _native(self, backend: Backend, value: np.ndarray[Any, Any] | None) -> Array | None:
        if value is None:
            return None
        if backend.kind == "numpy":
            return value if value.dtype == np.bool_ else value.astype(self.request.dtype)
        import torch

        found = to_kind("a random array", value, "torch", torch.device(self.request.device))
        return found if value.dtype == np.bool_ else found.to(getattr(torch, self.request.dtype))

    def call(self, backend: str | Backend, algorithm: str | None) -> Callable[[], object]:
        """A call of :func:`translution.run` without a graph; or, with gradients, of it and all gradients of its sum."""
        found, operator = get_backend(backend), self.request.operator
        params: Any = {name: self._native(found, value) for name, value in self.params.items()}
        x: Any = self._native(found, self.x)
        more: dict[str, Any] = {
            "y": self._native(found, self._y), "mask": self._native(found, self._mask),
            "backend": found, "algorithm": algorithm,
        }  # fmt: skip
        if found.kind == "numpy":
            if not self.request.gradient:
                return lambda: run(operator, params, x, **more)
            ones = np.ones(self._out_shape, self.request.dtype)
            return lambda: vjp(operator, params, x, cotangent=ones, **more)
        return self._recorded(params, x, more)

    def _recorded(self, params: dict[str, Any], x: Any, more: dict[str, Any]) -> Callable[[], object]:
        import torch

        operator, device = self.request.operator, self.request.device
        wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if device != "cpu" else lambda: None

        def forward() -> None:
            with torch.no_grad():
                run(operator, params, x, **more)
            wait()

        def forward_backward() -> None:
            out = run(operator, params, x, **more)
            torch.autograd.grad(out, leaves, ones, allow_unused=True)
            wait()

        if not self.request.gradient:
            return forward
        ones = torch.ones(self._out_shape, dtype=getattr(torch, self.request.dtype), device=device)
        leaves = [value.requires_grad_() for value in (x, more["y"], *params.values()) if value is not None]
        return forward_backward
