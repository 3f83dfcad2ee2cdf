"""Every reduction on every backend and algorithm that claims it: values and gradients against the peer.

A general algorithm proves the theorem; a native shortcut (``conv``, ``sdpa``) is checked on rows of its own, and never
stands in for a general one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from translution.algorithms import Request
from translution.conformance.comparison import ComparisonError, check, worst_error
from translution.conformance.error_model import Budget, budget
from translution.conformance.reductions import Reduction, ReductionCase, all_reductions, find_reduction
from translution.conformance.results import Row
from translution.conformance.threads import one_thread
from translution.errors import NotSupported
from translution.execution import reasons_against, run, vjp
from translution.progress import Update, silently
from translution.registry import BACKENDS, Backend, get_backend

SECTION = "reductions"
SHORTCUTS = ("conv", "sdpa")


@dataclass(frozen=True, slots=True)
class Runner:
    """One way to compute: a backend by name, with one of its algorithms."""

    name: str
    backend: Backend
    algorithm: str


@dataclass(slots=True)
class _Tally:
    """What one runner did on one reduction."""

    cases: int = 0
    exact: int = 0
    worst_error: float = 0.0
    worst_share: float = 0.0
    failures: list[str] = field(default_factory=list)
    refused: list[list[str]] = field(default_factory=list)
    values_only: list[str] = field(default_factory=list)

    def row(self, reduction: Reduction, runner: Runner) -> Row:
        notes = []
        if self.refused:
            every = dict.fromkeys(reason for reasons in self.refused for reason in reasons)
            notes.append(f"{len(self.refused)} not claimed ({'; '.join(every)})")
        if self.values_only:
            notes.append(f"{len(self.values_only)} without gradients ({self.values_only[0]})")
        if self.failures:
            notes = [f"{len(self.failures)} failures, the first: {self.failures[0]}"]
        return Row(
            SECTION,
            reduction.title,
            runner.name,
            runner.algorithm,
            self.cases,
            self.worst_error,
            self.worst_share,
            not self.failures,
            "; ".join(notes),
            reduction.peer,
            self.exact,
        )


class Examined:
    """One case with everything that does not depend on who computes it."""

    def __init__(self, reduction: Reduction, seed: int, *, integers: bool = False) -> None:
        self.case: ReductionCase = reduction.sample(seed, integers=integers)
        self.integers = integers
        self._budgets: dict[str, Budget] = {}
        self._at_peer: dict[str, dict[str, Any]] = {}

    def _budget(self, dtype: str) -> Budget:
        if dtype not in self._budgets:
            case = self.case
            found = budget(case.operator, case.params, case.x, case.y, case.mask, case.cotangent, dtype)
            self._budgets[dtype] = found
            self._at_peer[dtype] = {
                name: found.gradients[name] for name in case.expected.gradients if name in ("x", "y")
            }
            self._at_peer[dtype] |= case.to_peer(found.gradients)
        return self._budgets[dtype]

    def bounds(self, dtype: str) -> tuple[Any, Any, Mapping[str, Any]]:
        """How far ``dtype`` and the peer's own arithmetic may be apart: out, attention weights, gradients by name.

        All zero on whole numbers, where both are exact.
        """
        if self.integers:
            return 0.0, 0.0, dict.fromkeys(self.case.expected.gradients, 0.0)
        own, theirs = self._budget(dtype), self._budget(self.case.peer.arithmetic)
        first, second = self._at_peer[dtype], self._at_peer[self.case.peer.arithmetic]
        return (
            own.out + theirs.out,
            own.weights_bound + theirs.weights_bound,
            {name: first[name] + second[name] for name in first},
        )


def _arrays(case: ReductionCase, dtype: str, device: str) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if value is None:
            return None
        array = value if value.dtype == np.bool_ else value.astype(dtype)
        return array if device == "cpu" else torch.from_numpy(array).to(device)

    return {
        "params": {name: cast(value) for name, value in case.params.items()},
        "x": cast(case.x),
        "y": cast(case.y),
        "mask": cast(case.mask),
        "cotangent": cast(case.cotangent),
    }


def request_for(
    case: ReductionCase, dtype: str, device: str = "cpu", *, return_weights: bool = False, gradient: bool = False
) -> Request:
    """What a backend is asked for."""
    mask = "none" if case.mask is None else "bool" if case.mask.dtype == np.bool_ else "float"
    return Request(case.operator, len(case.x), dtype, device, mask, return_weights, gradient)


def _reasons(runner: Runner, case: ReductionCase, dtype: str) -> tuple[list[str], str]:
    """Why the runner can't compute this case, and the device where it can."""
    reasons = reasons_against(runner.backend, request_for(case, dtype), runner.algorithm)
    if reasons and runner.backend.kind == "torch" and torch.cuda.is_available():
        return reasons_against(runner.backend, request_for(case, dtype, "cuda"), runner.algorithm), "cuda"
    return reasons, "cpu"


def without_gradients(case: ReductionCase, runner: Runner, dtype: str, device: str = "cpu") -> list[str]:
    """Why a torch backend claims values but no gradients here; others compute gradients on request, by ``vjp``."""
    if runner.backend.kind != "torch":
        return []
    return reasons_against(runner.backend, request_for(case, dtype, device, gradient=True), runner.algorithm)


def compare_case(examined: Examined, runner: Runner, dtype: str, device: str = "cpu") -> tuple[float, float]:
    """Worst error, and worst share of a bound, over out, attention weights and every gradient that is claimed.

    Raises:
        ComparisonError: something is beyond its bound.
    """
    case, (out_bound, attention_bound, gradient_bounds) = examined.case, examined.bounds(dtype)
    expected, given = case.expected, _arrays(case, dtype, device)
    cotangent = given.pop("cotangent")
    named: dict[str, Any] = {"backend": runner.name, "algorithm": runner.algorithm}
    compared: list[tuple[str, Any, Any, Any, str | None]] = []
    if without_gradients(case, runner, dtype, device):
        out = run(case.operator, **given, **named)
    else:
        out, gradients = vjp(case.operator, **given, cotangent=cotangent, **named)
        on_host = {name: torch.as_tensor(value).detach().cpu().numpy() for name, value in gradients.params.items()}
        found = {**case.to_peer(on_host), "x": gradients.x} | ({} if case.y is None else {"y": gradients.y})
        compared += [
            (f"gradient of {name}", found[name], wanted, gradient_bounds[name], None)
            for name, wanted in expected.gradients.items()
        ]
    compared.insert(0, ("out", out, expected.out, out_bound, dtype))
    weighed = request_for(case, dtype, device, return_weights=True)
    if expected.attention is not None and not reasons_against(runner.backend, weighed, runner.algorithm):
        _, weights = run(case.operator, **given, **named, return_weights=True)
        compared.append(("attention weights", weights, expected.attention, attention_bound, dtype))
    worst = worst_share = 0.0
    for name, got, want, bound, wanted_dtype in compared:
        worst_share = max(worst_share, check(name, got, want, bound, dtype=wanted_dtype))
        worst = max(worst, worst_error(name, got, want))
    return worst, worst_share


def repeat(reduction: str, seed: int, backend: str, algorithm: str, dtype: str, *, integers: bool = False) -> float:
    """Run one case again, by the words of a failed row; gives the worst share or raises what went wrong."""
    examined = Examined(find_reduction(reduction), seed, integers=integers)
    runner = Runner(backend, get_backend(backend), algorithm)
    reasons, device = _reasons(runner, examined.case, dtype)
    if reasons:
        raise NotSupported(backend, algorithm, reasons)
    return compare_case(examined, runner, dtype, device)[1]


def _one(tally: _Tally, reduction: Reduction, seed: int, examined: Examined, runner: Runner, dtype: str) -> None:
    reasons, device = _reasons(runner, examined.case, dtype)
    if reasons:
        tally.refused.append(reasons)
        return
    tally.cases += 1
    tally.values_only += without_gradients(examined.case, runner, dtype, device)[:1]
    try:
        error, used = compare_case(examined, runner, dtype, device)
    except Exception as failure:  # noqa: BLE001 - whatever a backend raises is its failure, and the others still run
        words = f"{reduction.id!r}, {seed}, {runner.name!r}, {runner.algorithm!r}, {dtype!r}"
        words += ", integers=True" if examined.integers else ""
        what = f"{failure}" if isinstance(failure, ComparisonError) else f"{type(failure).__name__}: {failure}"
        tally.failures.append(f"{what} [repeat({words}): {examined.case.note}]")
        tally.worst_share = np.inf
        return
    tally.exact += examined.integers
    tally.worst_error, tally.worst_share = max(tally.worst_error, error), max(tally.worst_share, used)


def _runners(backends: Sequence[str]) -> tuple[list[Runner], list[Row]]:
    runners: list[Runner] = []
    rows: list[Row] = []
    for name in backends:
        try:
            backend = get_backend(name)
            reasons = backend.unavailable()
            if not reasons:
                runners += [Runner(name, backend, algorithm) for algorithm in backend.algorithms]
        except NotSupported as error:
            reasons = list(error.reasons)
        if reasons:
            rows.append(Row(SECTION, "every reduction", name, "-", 0, 0.0, 0.0, True, "; ".join(reasons)))
    return runners, rows


def _verify(reduction: Reduction, runners: Sequence[Runner], cases: int, dtypes: Sequence[str]) -> list[Row]:
    wanted = [r for r in runners if r.algorithm not in SHORTCUTS or r.algorithm in reduction.shortcuts]
    tallies = [_Tally() for _ in wanted]
    for seed in range(cases):
        for integers in (False, True) if reduction.exact else (False,):
            try:
                examined = Examined(reduction, seed, integers=integers)
            except ModuleNotFoundError as error:
                detail = (
                    f"the peer {reduction.peer} needs {error.name}, which is not installed: pip install {error.name}"
                )
                return [Row(SECTION, reduction.title, "-", "-", 0, 0.0, 0.0, False, detail)]
            for runner, tally in zip(wanted, tallies, strict=True):
                for dtype in dtypes:
                    _one(tally, reduction, seed, examined, runner, dtype)
    return [tally.row(reduction, runner) for runner, tally in zip(wanted, tallies, strict=True)]


def verify_reductions(
    backends: Sequence[str] = tuple(BACKENDS),
    cases: int = 12,
    dtypes: Sequence[str] = ("float64", "float32"),
    progress: Update = silently,
    reductions: Sequence[Reduction] | None = None,
) -> list[Row]:
    """One row for each reduction, backend and algorithm.

    ``cases`` random cases are tried for each, in every dtype; reductions that are exact on whole numbers are tried on
    as many cases of these, for equality. What a backend does not claim, or can't run here, is a row with its reason.
    """
    chosen = all_reductions() if reductions is None else tuple(reductions)
    runners, rows = _runners(backends)
    with one_thread():
        for number, reduction in enumerate(chosen):
            progress(SECTION, number, len(chosen))
            rows += _verify(reduction, runners, cases, dtypes)
    progress(SECTION, len(chosen), len(chosen))
    return rows
