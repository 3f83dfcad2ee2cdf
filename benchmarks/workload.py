"""One operator in numbers, and everyone who computes it: this library's backends and the baselines, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from baseline import AlphaGather, Gather
from exactness import Array, Exact, table_names
from peers import Conv2d, Flex, Neighbourhood, Sdpa
from products import Products
from torch import Tensor

import translution
from translution.algorithms import Request
from translution.conformance.comparison import ComparisonError
from translution.execution import as_asked, predict, reasons_against, vjp
from translution.geometry import geometry
from translution.registry import get_backend
from translution.spec import Operator, parse_spec
from translution.workload import Workload as Numbers

Call = Callable[[], object]
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward and backward"
BASELINES: dict[str, Callable[[Operator], Callable[[Mapping[str, Tensor], Tensor], Tensor]]] = {
    "authors": Gather,
    "authors' alpha": AlphaGather,
    "SDPA": Sdpa,
    "flex": Flex,
    "neighbourhood": Neighbourhood,
    "conv2d": Conv2d,
}
# Calls that compute nothing of the operator's and say what the machine can do; see products.py.
MACHINE = ("products", "gradient products", "large product", "large product of oneDNN", "tables read", "tables copied")
NO_BACKWARD = {"flex": "FlexAttention has no backward on a CPU (torch raises NotImplementedError)"}


class CannotRun(Exception):
    """A candidate does not compute this here; the message says why."""


@dataclass(frozen=True)
class Case:
    """An operator, a batch size, and whose times are compared.

    ``candidates`` are names of ``BASELINES`` and ``MACHINE``, or ``BACKEND ALGORITHM``. ``value`` is where a growth
    curve stands on its axis.
    """

    spec: str
    batch: int
    candidates: tuple[str, ...] = ("torch stream",)
    passes: tuple[str, ...] = (FORWARD, TRAINING)
    value: float | None = None

    @cached_property
    def operator(self) -> Operator:
        """What ``spec`` says."""
        return parse_spec(self.spec)

    @property
    def name(self) -> str:
        """Names the case within its family."""
        return f"{self.spec}, batch {self.batch}"


@dataclass
class Workload:
    """Numbers for a case, always the same ones."""

    case: Case
    params: dict[str, Array] = field(init=False)
    x: Array = field(init=False)

    def __post_init__(self) -> None:
        numbers = Numbers(Request(self.case.operator, self.case.batch))
        self.params, self.x = numbers.params, numbers.x

    @cached_property
    def exact(self) -> Exact:
        """What everyone is compared with."""
        return Exact(self.case.operator, self.params, self.x)

    @cached_property
    def products(self) -> Products:
        """The bare matrix products of this operator."""
        return Products(self.case.operator, self.case.batch, self.params)

    @cached_property
    def links(self) -> int:
        """Links of one item."""
        return geometry(self.case.operator.layout).num_links

    @cached_property
    def executed(self) -> dict[str, int]:
        """Operations of the matrix products that torch ``stream`` makes in each pass, counted by its dry run."""
        operator, backend = self.case.operator, get_backend("torch")
        forward, both = (
            predict(backend, Request(operator, self.case.batch, gradient=gradient), "stream").flops
            for gradient in (False, True)
        )
        return {FORWARD: forward, BACKWARD: both - forward, TRAINING: both}

    def computation(self, name: str, which: str) -> "Computation":
        """Who ``name`` is.

        Raises:
            CannotRun: with every reason.
        """
        if name in BASELINES:
            if which != FORWARD and name in NO_BACKWARD:
                raise CannotRun(NO_BACKWARD[name])
            return TorchComputation(self, BASELINES[name](self.case.operator))
        backend, _, algorithm = name.partition(" ")
        found = get_backend(backend)
        device = "cuda" if backend == "triton" else "cpu"
        request = Request(self.case.operator, self.case.batch, device=device, gradient=which != FORWARD)
        if reasons := reasons_against(found, as_asked(found, request), algorithm):
            raise CannotRun("; ".join(reasons))
        if found.kind == "numpy":
            if which == BACKWARD:
                raise CannotRun("vjp computes forward and backward together")
            return NumpyComputation(self, backend, algorithm)
        return TorchComputation(self, translution.compile(self.case.operator, backend, algorithm), device)

    def checked(self, name: str, which: str) -> tuple[Call, float]:
        """A call of a pass, ready to be timed, and its largest error as a share of its bound.

        Raises:
            CannotRun: with every reason.
            ComparisonError: it is wrong.
        """
        found = self.computation(name, which)
        try:
            out, gradients = found.results(self.exact.cotangent, with_gradients=which != FORWARD)
            share = self.exact.share(out, gradients)
        except ComparisonError as error:
            raise ComparisonError(f"{self.case.name}, {name}, {which}: {error}") from error
        return found.call(which), share


class TorchComputation:
    """A function of params and x that torch differentiates."""

    def __init__(self, workload: Workload, compute: Callable[..., Any], device: str = "cpu") -> None:
        self.compute, self.device = compute, device
        self.params = {name: self._leaf(value) for name, value in workload.params.items()}
        self.x = self._leaf(workload.x)

    def _leaf(self, value: Array) -> Tensor:
        return torch.from_numpy(value).to(self.device).requires_grad_()

    def results(self, cotangent: Array, *, with_gradients: bool) -> tuple[Array, dict[str, Array] | None]:
        """Out, and the gradients of <cotangent, out> for x and every parameter."""
        if not with_gradients:
            with torch.no_grad():
                return self.compute(self.params, self.x).cpu().numpy(), None
        out = self.compute(self.params, self.x)
        leaves = {"x": self.x, **self.params}
        found = torch.autograd.grad(out, list(leaves.values()), torch.from_numpy(cotangent).to(self.device))
        return out.detach().cpu().numpy(), {
            name: value.cpu().numpy() for name, value in zip(leaves, found, strict=True)
        }

    def call(self, which: str) -> Call:
        """One pass; backward is that of the sum, for x and every parameter."""
        leaves = [self.x, *self.params.values()]
        kept: Any = self.compute(self.params, self.x) if which == BACKWARD else None
        ones = None if kept is None else torch.ones_like(kept)

        def forward() -> None:
            with torch.no_grad():
                self.compute(self.params, self.x)

        def backward() -> None:
            torch.autograd.grad(kept, leaves, ones, retain_graph=True)

        def training() -> None:
            out = self.compute(self.params, self.x)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        found = {FORWARD: forward, BACKWARD: backward, TRAINING: training}[which]
        if self.device == "cpu":
            return found

        def finished() -> None:
            found()
            torch.cuda.synchronize()

        return finished


class NumpyComputation:
    """``run`` and ``vjp`` of a backend on NumPy arrays."""

    def __init__(self, workload: Workload, backend: str, algorithm: str) -> None:
        self.workload, self.operator = workload, workload.case.operator
        self.how: dict[str, Any] = {"backend": backend, "algorithm": algorithm}

    def results(self, cotangent: Array, *, with_gradients: bool) -> tuple[Array, dict[str, Array] | None]:
        """Out, and the gradients of <cotangent, out> for x and every parameter."""
        params, x = self.workload.params, self.workload.x
        if not with_gradients:
            return translution.run(self.operator, params, x, **self.how), None
        out, found = vjp(self.operator, params, x, cotangent=cotangent, **self.how)
        return out, {"x": found.x, **found.params}

    def call(self, which: str) -> Call:
        """One pass; backward is that of the sum, for x and every parameter."""
        shape = (self.workload.case.batch, self.operator.layout.num_queries, self.operator.out_features)
        ones = np.ones(shape, np.float32)
        return lambda: self.results(ones, with_gradients=which != FORWARD)


Computation = TorchComputation | NumpyComputation


def useful_flops(operator: Operator, batch: int) -> int:
    """Operations that a forward pass can't do without: one row times one matrix for each link and table."""
    shapes = dict(operator.parameters)
    per_link = sum(shapes[name][-2] * shapes[name][-1] for name in table_names(operator))
    return 2 * batch * geometry(operator.layout).num_links * per_link
