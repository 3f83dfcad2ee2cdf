"""Choosing: what is wrong is never chosen, however fast; within what is right, the objective decides."""

import sys

import pytest

import translution
from translution import Request, get_backend, selection
from translution.conformance.operator_check import OperatorCheck
from translution.peak_memory import CannotMeasure, peak_memory
from translution.selection import Entry, candidates, select
from translution.spec import presets
from translution.trials import Timing

OPERATOR = presets.translution((5, 5), 48, 3)
ATTENTION = presets.self_attention((30,), 32, 4)

# Backends that stand beside torch's: faster than it, slower, wrong, or hungry.
BESIDE = """
import time

import torch
from translution.backends.torch.backend import TorchBackend


class Beside(TorchBackend):
    algorithms = ("stream",)

    def __init__(self, name):
        self.name = name

    def forward(self, request, algorithm, params, inputs):
        if self.name == "zeros":
            return torch.zeros((*inputs.x.shape[:2], request.operator.out_features), dtype=inputs.x.dtype), None
        if self.name == "raises":
            raise RuntimeError("no more memory [on this device]")
        if self.name == "slow":
            time.sleep(0.3)
        if self.name == "hungry":
            torch.ones(64 * 2**18)
        return super().forward(request, algorithm, params, inputs)


zeros, raises, slow, hungry = (Beside(name) for name in ("zeros", "raises", "slow", "hungry"))
"""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    (tmp_path / "beside_torch.py").write_text(BESIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: f"beside_torch:{name}"
    sys.modules.pop("beside_torch", None)


@pytest.fixture
def weightless(monkeypatch):
    """Without a process of its own for every candidate."""
    monkeypatch.setattr(selection, "peak_memory", lambda *_: 2**20)


def chosen(request, **options):
    return select(request, OperatorCheck(request).share, **options)


def named(found, name):
    (entry,) = (e for e in found.entries if e.name == name)
    return entry


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [("zeros", "check: ordinary tokens: out"), ("raises", "no more memory"), ("slow", "times as long as")],
)
def test_what_is_wrong_or_hopeless_is_never_chosen(beside, wrong, words):
    found = chosen(Request(OPERATOR, 2), backends=["torch", beside(wrong)])
    assert found.chosen is not None
    assert found.chosen.backend == "torch"
    entry = named(found, f"{beside(wrong)} stream")
    assert words in entry.out
    assert entry.timing is None


def test_every_candidate_is_there_with_its_reason():
    found = chosen(Request(OPERATOR, 2))
    every = {entry.name: entry for entry in found.entries}
    assert set(every) >= {"reference definition", "numpy pairwise", "numpy stream", "torch stream", "torch sdpa"}
    assert "not for deployment" in every["reference definition"].out
    assert "differ between displacements" in every["torch sdpa"].out
    right = [entry for entry in found.entries if not entry.out]
    assert all(0 < entry.share <= 1 and entry.timing.median > 0 and entry.peak > 0 for entry in right)
    assert [e.timing.median for e in right] == sorted(e.timing.median for e in right)
    assert found.plan() == translution.Plan(OPERATOR, found.chosen.backend, found.chosen.algorithm)


@pytest.mark.usefixtures("weightless")
def test_training_is_another_request():
    found = chosen(Request(ATTENTION, 2, gradient=True), backends=["torch", "numpy"])
    assert found.chosen is not None
    assert named(found, "numpy stream").timing is not None
    assert found.data()["request"]["gradient"] is True


@pytest.mark.usefixtures("weightless")
def test_of_what_cannot_be_told_apart_the_simplest_is_chosen(monkeypatch):
    """All times and shares alike: the native kernel is simpler than pairs, those than displacements."""
    monkeypatch.setattr(selection, "measure", lambda calls, *_, **__: {n: Timing((0.1, 0.1, 0.1)) for n in calls})
    found = chosen(Request(ATTENTION, 2), backends=["torch"])
    assert not found.is_clear
    assert [entry.algorithm for entry in found.tied] == ["sdpa", "stream", "compiled", "pairwise"]
    assert found.chosen.algorithm == "sdpa"


def test_memory_as_the_objective_and_as_the_limit(beside):
    request = Request(presets.translution((7, 7), 48, 3), 8)
    found = chosen(request, backends=["torch", beside("hungry")], objective="memory")
    order = [entry.name for entry in found.entries if not entry.out]
    assert order[0] == "torch compiled"
    assert order.index(f"{beside('hungry')} stream") > 0
    assert found.chosen.name == "torch compiled"
    limited = chosen(request, backends=["torch", beside("hungry")], limit=10 * 2**20, objective="memory")
    assert "predicted to take" in named(limited, "torch pairwise").out
    assert f"bytes of {10 * 2**20:,}" in named(limited, f"{beside('hungry')} stream").out
    assert limited.chosen.name == "torch compiled"


def test_nothing_is_left():
    found = chosen(Request(OPERATOR, 2), backends=["reference"])
    assert found.chosen is None
    assert not found.tied
    assert found.data()["chosen"] is None


@pytest.mark.usefixtures("weightless")
def test_throughput_looks_at_smaller_batches():
    found = chosen(Request(ATTENTION, 6), backends=["torch"], objective="throughput")
    assert {entry.batch for entry in found.entries if not entry.out} == {1, 2, 4, 6}
    right = [entry for entry in found.entries if not entry.out]
    assert [e.per_item for e in right] == sorted(e.per_item for e in right)


def test_candidates_of_an_algorithm_of_somebody_elses_have_no_prediction():
    torch = get_backend("torch")
    assert all(entry.predicted > 0 for entry in candidates(Request(OPERATOR, 2), ["torch"]))
    assert Entry("x", "own", 1, 0).name == "x own"
    assert torch.name == "torch"


def test_measured_peak_is_what_is_allocated(beside):
    request, plain = Request(OPERATOR, 2), translution.Plan(OPERATOR, "torch", "stream")
    hungry = translution.Plan(OPERATOR, beside("hungry"), "stream")
    more = peak_memory(hungry, request) - peak_memory(plain, request)
    assert more == pytest.approx(64 * 2**20, rel=0.05)


def test_a_call_that_fails_has_no_peak(beside):
    plan = translution.Plan(OPERATOR, beside("raises"), "stream")
    with pytest.raises(RuntimeError, match="no more memory"):
        peak_memory(plan, Request(OPERATOR, 2))
    with pytest.raises(CannotMeasure, match=r"more than 0\.1 s"):
        peak_memory(plan, Request(OPERATOR, 2), limit=0.1)
