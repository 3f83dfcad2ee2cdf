"""The workloads that are timed, and the proof that what is timed is right.

Sizes are those of the paper's smallest model: 192 channels, 3 heads (arXiv 2510.10060, section 5).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from baseline import Gather
from torch import Tensor

import translution
from translution.conformance.error_model import budget
from translution.geometry import geometry
from translution.spec import Operator, presets

Compute = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Workload:
    """One operator with float32 parameters and x; the computations to compare by name."""

    name: str
    operator: Operator
    batch: int
    params: dict[str, Tensor] = field(init=False)
    x: Tensor = field(init=False)
    computations: dict[str, Compute] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        params = {}
        for name, shape in self.operator.parameters.items():
            fan_in = shape[-2] if len(shape) > 1 else 1
            params[name] = (torch.randn(shape, generator=generator) * fan_in**-0.5).requires_grad_()
        shape = (self.batch, self.operator.layout.num_queries, self.operator.dim)
        stream = translution.compile(self.operator, algorithm="stream")
        computations: dict[str, Compute] = {"stream": lambda p, x: stream(p, x), "gather": Gather(self.operator)}
        for name, value in (
            ("params", params),
            ("x", torch.randn(shape, generator=generator).requires_grad_()),
            ("computations", computations),
        ):
            object.__setattr__(self, name, value)

    def forward(self, name: str) -> Tensor:
        """The result, without a graph."""
        with torch.no_grad():
            return self.computations[name](self.params, self.x)

    def forward_backward(self, name: str) -> list[Tensor]:
        """The result and the gradients of its sum for x and every parameter."""
        leaves = [self.x, *self.params.values()]
        out = self.computations[name](self.params, self.x)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    def products(self) -> Callable[[], None]:
        """The matrix products of one forward pass alone: three roles, one product for each displacement."""
        dim, rows = self.operator.dim, [self.batch * len(s.query_index) for s in geometry(self.operator.layout).steps]
        tokens, out = torch.randn(max(rows), dim), torch.empty(max(rows), self.features)
        tables = [self.params[f"{role}.table"].detach() for role in ("query", "key", "value")]

        def compute() -> None:
            for table in tables:
                for matrix, count in zip(table, rows, strict=True):
                    torch.mm(tokens[:count], matrix, out=out[:count])

        return compute

    @property
    def features(self) -> int:
        """Features of all heads."""
        return self.operator.num_heads * self.operator.head_dim

    @property
    def flops(self) -> int:
        """Floating-point operations of :meth:`products`."""
        return 3 * 2 * self.batch * geometry(self.operator.layout).num_links * self.operator.dim * self.features


def paper_grid(side: int, batch: int) -> Workload:
    """A side x side grid with one register."""
    operator = presets.translution((side, side), 192, 3, registers=1)
    return Workload(f"{side}x{side} + 1, batch {batch}", operator, batch)


def check_equal(workload: Workload) -> float:
    """The largest error of any computation as a share of its bound, over the result and all gradients.

    The bounds are those of ``conformance.error_model`` for float32, on one sample. AssertionError beyond them.
    """
    one = Workload(workload.name, workload.operator, 1)
    params = {name: value.detach().double().numpy() for name, value in one.params.items()}
    x = one.x.detach().double().numpy()
    found = budget(one.operator, params, x, cotangent=np.ones((*x.shape[:2], one.operator.out_features)))
    names = ["x", *params]
    values = [found.value, *(found.gradient_values[name] for name in names)]
    bounds = [found.out, *(found.gradients[name] for name in names)]
    worst = 0.0
    for computation in one.computations:
        for label, value, exact, bound in zip(
            ["out", *names], one.forward_backward(computation), values, bounds, strict=True
        ):
            error = np.abs(value.double().numpy() - exact)
            if not (error <= bound).all():
                raise AssertionError(f"{workload.name}: {computation} is off by {error.max()} in {label}")
            worst = max(worst, float((error / np.maximum(bound, np.finfo(np.float64).tiny)).max()))
    whole = {name: workload.forward(name) for name in workload.computations}
    for name, value in whole.items():
        alone = torch.cat([workload.computations[name](workload.params, x[None]) for x in workload.x.detach()])
        if not torch.allclose(value, alone, rtol=0, atol=2 * float(found.out.max())):
            raise AssertionError(f"{workload.name}: {name} depends on the batch")
    return worst
