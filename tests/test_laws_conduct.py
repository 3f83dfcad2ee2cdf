"""Laws of conduct where the mutants, which all compute in torch, can't show that they bite."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from translution import get_backend
from translution.algorithms import Request
from translution.arrays import Array
from translution.backends.numpy import NumpyBackend
from translution.conformance.exam.draws import SeededDraws
from translution.conformance.exam.examine import examine
from translution.conformance.exam.report import Verdict
from translution.conformance.exam.subject import LiveSubject
from translution.conformance.laws import all_laws, conduct, memory
from translution.errors import NotSupported
from translution.geometry import geometry
from translution.inputs import Inputs
from translution.registry import Backend, Claims, Gradients

Result = tuple[Array, Array | None]


def _verdict(law: str, backend: Backend, algorithm: str = "pairwise", level: str = "quick") -> tuple[Verdict, str]:
    found = examine(all_laws()[law], LiveSubject(backend, algorithm, "float32"), level)
    return found.verdict, found.message


class _Changed(NumpyBackend):
    """The NumPy backend with something done around its forward."""

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs) -> Result:
        return self.changed(super().forward(request, algorithm, params, inputs), params, inputs)

    def changed(self, found: Result, params: Mapping[str, Array], inputs: Inputs) -> Result:
        return found


class _Writes(_Changed):
    def changed(self, found: Result, params: Mapping[str, Array], inputs: Inputs) -> Result:
        inputs.y[..., :1] += 1
        return found


class _Restores(_Changed):
    """Leaves every bit, but needs memory that can be written to."""

    def changed(self, found: Result, params: Mapping[str, Array], inputs: Inputs) -> Result:
        inputs.y[...] = inputs.y.copy()
        return found


class _Reuses(_Changed):
    def __init__(self) -> None:
        self.kept: dict[tuple[int, ...], Array] = {}

    def changed(self, found: Result, params: Mapping[str, Array], inputs: Inputs) -> Result:
        kept = self.kept.setdefault(found[0].shape, np.empty_like(found[0]))
        kept[...] = found[0]
        return kept, found[1]


class _Gathers(_Changed):
    """Copies a matrix for every link of every table, for nothing."""

    def changed(self, found: Result, params: Mapping[str, Array], inputs: Inputs) -> Result:
        for name, table in params.items():
            if name.endswith("table"):
                _ = table[np.arange(324) % len(table)]
        return found


class _ReadsMemory(_Changed):
    """Takes the memory that x and y look at to be theirs from start to end."""

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs) -> Result:
        y = inputs.y
        if y.base is not None and y.base.ndim == y.ndim and 0 not in y.strides:
            y = np.ascontiguousarray(y.base).ravel()[: y.size].reshape(y.shape)
        x = y if inputs.x is inputs.y else inputs.x
        return super().forward(request, algorithm, params, Inputs(x, y, inputs.mask, inputs.batch_shape))


class _Stumbles(_Changed):
    """Can't be called while it computes."""

    def __init__(self) -> None:
        self.busy = False

    def forward(self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs) -> Result:
        if self.busy:
            raise RuntimeError("called while it computes")
        self.busy = True
        time.sleep(1e-3)
        self.busy = False
        return super().forward(request, algorithm, params, inputs)


@pytest.mark.parametrize(
    ("law", "backend"),
    [
        ("PURE", _Writes()),
        ("PURE", _Restores()),
        ("OWNED", _Reuses()),
        ("MEMORY", _Gathers()),
        ("STRIDES", _ReadsMemory()),
        ("THREADS", _Stumbles()),
    ],
)
def test_a_numpy_backend_of_bad_conduct_fails(law: str, backend: Backend) -> None:
    assert _verdict(law, NumpyBackend())[0] is Verdict.PASS
    verdict, message = _verdict(law, backend, level="full")
    assert verdict is Verdict.FAIL, message


def test_a_backend_without_gradients_that_gives_some_fails_CLAIMS() -> None:
    class Modest(NumpyBackend):
        claims = Claims(gradient_order=0)

    verdict, message = _verdict("CLAIMS", Modest())
    assert (verdict, message) == (Verdict.FAIL, "gradient_order is 0, but vjp answers")

    class Consistent(Modest):
        def vjp(self, *arguments: Any) -> tuple[Array, Gradients]:
            raise NotSupported("modest", None, ["no gradients"])

    assert _verdict("CLAIMS", Consistent())[0] is Verdict.PASS


@pytest.mark.parametrize("fails", [False, True])
def test_trip_wires_are_gone_after_the_law(fails: bool) -> None:
    from translution import execution, registry
    from translution.backends.torch.backend import TorchBackend

    class Leans(_Changed):
        def forward(self, request: Request, algorithm: str, params: Mapping[str, Array], inputs: Inputs) -> Result:
            if fails:
                get_backend("torch").forward(request, "stream", params, inputs)
            return super().forward(request, algorithm, params, inputs)

    before = TorchBackend.forward, TorchBackend.vjp, registry.get_backend, execution.get_backend
    verdict, message = _verdict("NO-FALLBACK", Leans())
    assert verdict is (Verdict.FAIL if fails else Verdict.PASS)
    assert not fails or "torch" in message
    assert before == (TorchBackend.forward, TorchBackend.vjp, registry.get_backend, execution.get_backend)


def test_views_hold_the_numbers_in_other_memory() -> None:
    """Every kind of view occurs, in both kinds of array, and none is a fresh contiguous array."""
    value = np.arange(24.0).reshape(2, 3, 4)
    for name, kinds in (("numpy", 5), ("torch", 4)):
        live = LiveSubject(get_backend(name), "stream", "float64")
        found = set()
        for number in range(60):
            view = conduct._view(SeededDraws(number), live, value)
            np.testing.assert_array_equal(np.asarray(view), value)
            strides = view.strides if name == "numpy" else (*view.stride(), view.storage_offset())
            own = value.strides if name == "numpy" else (12, 4, 1, 0)
            assert strides != own or view.base is not None
            found.add(strides)
        assert len(found) == kinds


def test_threads_take_turns_again_after_the_law() -> None:
    import sys

    before = sys.getswitchinterval()

    def fail() -> None:
        with conduct._hurried():
            assert sys.getswitchinterval() < before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert sys.getswitchinterval() == before


def test_a_first_order_backend_may_refuse_second_derivatives() -> None:
    """Claimed to order 1, a raise is right and made-up zeros are not."""
    import torch

    from translution.conformance.mutants.naive import Naive

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_ctx: Any, pull: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled():
                raise RuntimeError("no second derivative")
            return pull

    class First(Naive):
        order = 1

        @property
        def claims(self) -> Claims:  # type: ignore[override]
            return Claims(gradient_order=self.order)

        def forward(self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs) -> Any:
            own = replace(inputs, x=Once.apply(inputs.x), y=Once.apply(inputs.y))
            return super().forward(request, algorithm, params, own)

    class Second(First):
        order = 2

    assert _verdict("SECOND-ORDER", First())[0] is Verdict.PASS
    assert _verdict("SECOND-ORDER", Second())[0] is Verdict.FAIL


def test_the_memory_bound_lies_between_features_and_matrices() -> None:
    """The layouts of the law have links enough for a matrix each to stand out in every one of them."""
    for layout in memory._LAYOUTS:
        links = geometry(layout).num_links
        assert links >= 300
        assert geometry(layout).num_classes == 3
