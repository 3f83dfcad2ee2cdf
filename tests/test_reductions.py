"""The reductions hold on every backend, and the check goes red for a backend that is wrong."""

import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from translution import Gradients, Request, get_backend
from translution.conformance.comparison import ComparisonError
from translution.conformance.reductions import Reduction, all_reductions, find_reduction, walk
from translution.conformance.results import Row
from translution.conformance.verify_reductions import SHORTCUTS, Examined, repeat, verify_reductions
from translution.inputs import Inputs
from translution.spec import Lattice

REDUCTIONS = {reduction.id: reduction for reduction in all_reductions()}
EXPECTED = {
    *(f"{kind}-{rank}d" for kind in ("convolution", "transposed-convolution", "average-pooling") for rank in (1, 2, 3)),
    *("depthwise-convolution", "multi-head-attention", "cross-attention", "dot-product-attention"),
    *("translution", "alpha-translution", "translution-weights-one", "translution-equal-tables"),
    *("rope-1d", "rope-2d", "swin", "t5", "alibi", "shaw", "botnet", "convit"),
}


def _verify(identifier: str, *backends: str, cases: int = 4) -> list[Row]:
    return verify_reductions(backends, cases=cases, reductions=[REDUCTIONS[identifier]])


def test_every_promised_reduction_is_there() -> None:
    assert set(REDUCTIONS) == EXPECTED


@pytest.mark.parametrize("identifier", sorted(EXPECTED))
def test_the_reduction_holds(identifier: str) -> None:
    rows = _verify(identifier, "reference", "numpy", "torch", cases=2)
    general = [row for row in rows if row.algorithm not in (*SHORTCUTS, "compiled")]
    assert [(row.backend, row.algorithm, row.detail) for row in rows if not row.passed] == []
    assert {row.backend for row in general} == {"reference", "numpy", "torch"}
    # Two seeds in two dtypes, twice where whole numbers are tried as well; a general algorithm claims them all.
    expected = 8 if REDUCTIONS[identifier].exact else 4
    assert {row.cases for row in general} == {expected}
    assert all(0 < row.worst_share <= 1 for row in general)


def test_a_shortcut_has_rows_of_its_own_and_only_where_it_applies() -> None:
    rows = verify_reductions(["torch"], cases=1)
    shortcuts = {(row.subject, row.algorithm) for row in rows if row.algorithm in SHORTCUTS}
    assert shortcuts == {(r.title, name) for r in REDUCTIONS.values() for name in r.shortcuts}
    for reduction in REDUCTIONS.values():
        assert {"stream", "pairwise"} <= {row.algorithm for row in rows if row.subject == reduction.title}


class Planted:
    """The numpy backend with one thing changed."""

    kind = "numpy"
    algorithms = ("stream",)
    dtypes = ("float64", "float32")

    def __init__(self) -> None:
        self.name = f"planted:{type(self).__name__}"
        self.inner = get_backend("numpy")

    def unavailable(self) -> list[str]:
        return []

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        return self.inner.not_supported(request, algorithm)

    def change(self, params: Mapping[str, Any], inputs: Inputs) -> tuple[Mapping[str, Any], Inputs]:
        return params, inputs

    def forward(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs
    ) -> tuple[Any, Any | None]:
        return self.inner.forward(request, algorithm, *self.change(params, inputs))

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        return self.inner.vjp(request, algorithm, *self.change(params, inputs), cotangent)


class Right(Planted):
    """Nothing changed."""


class Mirrored(Planted):
    def change(self, params: Mapping[str, Any], inputs: Inputs) -> tuple[Mapping[str, Any], Inputs]:
        return {n: v[::-1].copy() if n.endswith((".table", ".vectors")) else v for n, v in params.items()}, inputs


class WithoutBorder(Planted):
    def change(self, params: Mapping[str, Any], inputs: Inputs) -> tuple[Mapping[str, Any], Inputs]:
        inside = np.ones((1, 1, 1, inputs.y.shape[1]), bool)
        inside[..., -1] = False
        mask = inside if inputs.mask is None else np.where(inside, inputs.mask, -np.inf)
        return params, replace(inputs, mask=mask)


class MaskInverted(Planted):
    def change(self, params: Mapping[str, Any], inputs: Inputs) -> tuple[Mapping[str, Any], Inputs]:
        inverted = inputs.mask is not None and inputs.mask.dtype == np.bool_
        return params, replace(inputs, mask=~inputs.mask) if inverted else inputs


class SingleAccumulation(Planted):
    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        out, gradients = super().vjp(request, algorithm, params, inputs, cotangent)
        return out.astype(np.float32).astype(out.dtype), gradients


class QueryDetached(Planted):
    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        out, gradients = super().vjp(request, algorithm, params, inputs, cotangent)
        kept = {name: v * (not name.startswith("query")) for name, v in gradients.params.items()}
        return out, replace(gradients, params=kept)


class LastWriteWins(Planted):
    """The gradient of a table row from the last query alone."""

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        out, gradients = super().vjp(request, algorithm, params, inputs, cotangent)
        last = cotangent.copy()
        last[:, :-1] = 0
        return out, replace(gradients, params=super().vjp(request, algorithm, params, inputs, last)[1].params)


class WrongDtype(Planted):
    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        out, gradients = super().vjp(request, algorithm, params, inputs, cotangent)
        return out.astype(np.float64), gradients


class Crashing(Planted):
    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        raise ZeroDivisionError("lost")


class Modest(Planted):
    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        return ["not today"]


class ValuesOnly(Planted):
    """A torch backend that claims no gradients and computes none."""

    kind = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.inner = get_backend("torch")

    def not_supported(self, request: Request, algorithm: str) -> list[str]:
        return [*self.inner.not_supported(request, algorithm), *(["no backward"] if request.gradient else [])]

    def vjp(
        self, request: Request, algorithm: str, params: Mapping[str, Any], inputs: Inputs, cotangent: Any
    ) -> tuple[Any, Gradients]:
        raise AssertionError("not claimed")


class Absent(Planted):
    def unavailable(self) -> list[str]:
        return ["no such device"]


PLANTED = (
    *(Right, Mirrored, WithoutBorder, MaskInverted, SingleAccumulation, QueryDetached, LastWriteWins, WrongDtype),
    *(Crashing, Modest, ValuesOnly, Absent),
)


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("planted")
    for kind in PLANTED:
        setattr(module, kind.__name__, kind())
    monkeypatch.setitem(sys.modules, "planted", module)


def test_the_wrapped_backend_is_right_when_nothing_is_changed() -> None:
    for identifier in ("convolution-2d", "translution", "multi-head-attention"):
        (row,) = _verify(identifier, "planted:Right")
        assert row.passed, row.detail


@pytest.mark.parametrize(
    ("identifier", "kind"),
    [
        ("convolution-1d", Mirrored),
        ("convolution-3d", Mirrored),
        ("depthwise-convolution", Mirrored),
        ("transposed-convolution-2d", Mirrored),
        ("translution", Mirrored),
        ("translution-weights-one", Mirrored),
        ("shaw", Mirrored),
        ("botnet", Mirrored),
        ("convolution-2d", WithoutBorder),
        ("average-pooling-2d", WithoutBorder),
        ("dot-product-attention", WithoutBorder),
        ("swin", WithoutBorder),
        ("multi-head-attention", MaskInverted),
        ("cross-attention", MaskInverted),
        ("dot-product-attention", MaskInverted),
        ("translution", SingleAccumulation),
        ("average-pooling-1d", SingleAccumulation),
        ("alpha-translution", QueryDetached),
        ("convolution-2d", LastWriteWins),
        ("convolution-1d", WrongDtype),
        ("convit", Crashing),
    ],
)
def test_a_wrong_backend_is_red(identifier: str, kind: type[Planted]) -> None:
    (row,) = _verify(identifier, f"planted:{kind.__name__}", cases=8)
    assert not row.passed
    assert row.worst_share > 1
    # The failed row says how to run the case again, and that fails the same way.
    words = re.search(r"\[repeat\('([^']+)', (\d+), '([^']+)', '([^']+)', '([^']+)'(, integers=True)?\)", row.detail)
    assert words is not None, row.detail
    reduction, seed, backend, algorithm, dtype, integers = words.groups()
    wanted = ZeroDivisionError if kind is Crashing else ComparisonError
    with pytest.raises(wanted) as failure:
        repeat(reduction, int(seed), backend, algorithm, dtype, integers=bool(integers))
    assert str(failure.value) in row.detail


def test_equal_tables_hide_a_mirrored_table_but_not_its_gradient() -> None:
    # All rows are one matrix, so the peer sees the sum of their gradients: no mistake here, and rightly none found.
    (row,) = _verify("translution-equal-tables", "planted:Mirrored")
    assert row.passed


def test_what_is_not_claimed_is_a_row_with_its_reason() -> None:
    (row,) = _verify("convolution-1d", "planted:Modest", cases=2)
    assert (row.cases, row.passed) == (0, True)
    assert "8 not claimed (not today)" in row.detail


def test_gradients_that_are_not_claimed_are_said_to_be_missing() -> None:
    (row,) = _verify("convolution-1d", "planted:ValuesOnly", cases=2)
    assert row.passed, row.detail
    assert row.cases == 8
    assert "8 without gradients (no backward)" in row.detail


def test_a_backend_that_cannot_run_here_is_a_row_with_its_reason() -> None:
    (row,) = _verify("convolution-1d", "planted:Absent")
    assert (row.cases, row.passed, row.detail) == (0, True, "no such device")


def test_a_missing_peer_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (row,) = _verify("alibi", "numpy")
    assert not row.passed
    assert "pip install transformers" in row.detail


def test_progress_counts_reductions() -> None:
    seen: list[tuple[str, int, int]] = []
    verify_reductions(
        ["numpy"],
        cases=1,
        progress=lambda *step: seen.append(step),
        reductions=[REDUCTIONS["shaw"], REDUCTIONS["botnet"]],
    )
    assert seen == [("reductions", 0, 2), ("reductions", 1, 2), ("reductions", 2, 2)]


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(LookupError, match="no reduction 'conv'; known are convolution-1d"):
        find_reduction("conv")


def _cases(reduction: Reduction, count: int = 12) -> Iterator[Examined]:
    for seed in range(count):
        yield Examined(reduction, seed)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_meet_every_setting(rank: int) -> None:
    layouts = [e.case.operator.layout for e in _cases(REDUCTIONS[f"convolution-{rank}d"])]
    operators = [e.case.operator for e in _cases(REDUCTIONS[f"convolution-{rank}d"])]
    assert all(isinstance(layout, Lattice) for layout in layouts)
    lattices = [layout for layout in layouts if isinstance(layout, Lattice)]
    assert {layout.boundary for layout in lattices} == {"zeros", "circular", "reflect", "replicate"}
    assert any(max(layout.strides) > 1 for layout in lattices)
    assert any(max(layout.dilations) > 1 for layout in lattices)
    assert any(p > d * (k - 1) for x in lattices for p, d, k in zip(x.paddings, x.dilations, x.window, strict=True))
    assert {operator.output is None for operator in operators} == {True, False}
    assert any(len(shape) == 4 for operator in operators for shape in operator.parameters.values())


def test_attention_meets_every_mask() -> None:
    seen = set()
    for identifier in ("multi-head-attention", "cross-attention", "dot-product-attention"):
        for examined in _cases(REDUCTIONS[identifier], 16):
            mask = examined.case.mask
            seen.add("none" if mask is None else mask.dtype.name)
            if examined.case.expected.attention is not None:
                seen.add("weights")
            layout = examined.case.operator.layout
            seen.add("causal" if isinstance(layout, Lattice) and layout.causal is True else "all")
    assert seen == {"none", "bool", "float64", "weights", "causal", "all"}


@pytest.mark.parametrize("identifier", sorted(EXPECTED))
def test_weights_are_relaid_linearly_without_negative_coefficients(identifier: str) -> None:
    case = REDUCTIONS[identifier].sample(0, integers=True)
    own = case.peer.weights
    doubled = case.peer.relay({name: 2 * value for name, value in own.items()})
    for name, value in case.peer.relay(own).items():
        assert torch.equal(doubled[name], 2 * value)
    rng = np.random.default_rng(0)
    for _ in range(8):
        one_hot = {name: np.zeros(shape) for name, shape in case.operator.parameters.items()}
        for array in one_hot.values():
            array.flat[rng.integers(array.size)] = 1
        assert all((value >= 0).all() for value in case.to_peer(one_hot).values())


@pytest.mark.parametrize("identifier", sorted(EXPECTED))
def test_cases_are_functions_of_their_seed(identifier: str) -> None:
    first, again, other = (REDUCTIONS[identifier].sample(seed) for seed in (3, 3, 4))
    assert first.operator == again.operator
    np.testing.assert_array_equal(first.x, again.x)
    for name, value in first.params.items():
        np.testing.assert_array_equal(value, again.params[name])
        np.testing.assert_array_equal(value, value.astype(np.float32))
    assert first.x.shape != other.x.shape or not np.array_equal(first.x, other.x)


def test_clauses_are_named_as_the_spec_names_them() -> None:
    assert all(re.fullmatch(r"[LERMO]\d+", clause) for r in REDUCTIONS.values() for clause in r.clauses)
    assert {"L5", "L4", "M1", "M2", "E10", "R4"} <= {c for r in REDUCTIONS.values() for c in r.clauses}


def test_walk_counts_in_mixed_radix() -> None:
    assert [tuple(walk(seed, 2, 3)) for seed in range(6)] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
