"""Random cases reach every value of every axis of variation, and the axes leave no part of the spec out."""

import dataclasses
import statistics
import subprocess
import sys
import time
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, find, settings

import translution.spec
from translution.algorithms import Request, why_not
from translution.conformance.axes import AXES, axes_of, unseen
from translution.conformance.exam.draws import Rejected, SeededDraws
from translution.conformance.exam.question import Question, rounded
from translution.conformance.strategies import (
    LAYOUT_KINDS,
    MASK_KINDS,
    cases,
    draw_layout,
    draw_mask,
    draw_operator,
    draw_question,
    random_case,
    random_operator,
)
from translution.geometry import count_links
from translution.spec import Bias, Boundary, Encoder, FarClasses, Lattice, Layout, Mean, Ones, Relevance, Softmax
from translution.spec.encoders import OutputEncoder, Pairing

FIRST = [random_case(seed) for seed in range(400)]

# The axis that shows each field of the spec's classes; sizes vary everywhere and have none of their own.
FIELDS = {
    "Lattice": {
        "grid": "grid", "key_grid": "key_grid", "registers": "registers", "causal": "causal", "kernel_size": "window",
        "stride": "stride", "key_stride": "key_stride", "dilation": "dilation", "padding": "window",
        "offset": "offset", "boundary": "boundary", "far": "far",
    },
    "PairTable": {"classes": "layout", "num_classes": "classes without links", "key_classes": "key_classes"},
    "Clip": {"max_distance": None},
    "LogBuckets": {"num_buckets": None, "max_distance": None},
    "Identity": {"bias": "value bias"},
    "Shared": {"features": None, "bias": "query bias", "groups": "key groups"},
    "PerDisplacement": {"features": None, "bias": "key bias", "groups": "value groups"},
    "LowRank": {"inner_features": None, "features": "value low rank without up"},
    "Vectors": {"features": None, "shared_heads": "query head vectors"},
    "Sum": {"parts": "value Sum"},
    "Concat": {"parts": "value Concat"},
    "Rotary": {"inner": "query Rotary", "base": None, "pairing": "key pairing"},
    "LowRankOutput": {"inner_features": None, "features": None, "bias": "output bias"},
    "BiasTable": {},
    "SlopeBias": {"slopes": "slopes"},
    "QuadraticBias": {},
    "Softmax": {"scale": "scale", "content": "content", "bias": "bias BiasTable"},
    "Ones": {},
    "Mean": {},
    "Mixture": {"first": "first", "second": "second"},
    "Operator": {
        "layout": "layout", "dim": None, "num_heads": "num_heads", "value": "value Shared", "query": "query Shared",
        "key": "key Shared", "relevance": "relevance", "output": "output", "key_dim": "key_dim",
        "output_scale": "output_scale",
    },
}  # fmt: skip


def test_the_first_cases_reach_every_value_of_every_axis() -> None:
    assert unseen(FIRST) == {}


def test_every_case_stands_on_declared_values() -> None:
    for case in FIRST:
        found = axes_of(case)
        assert found.keys() == AXES.keys()
        assert {axis: value for axis, value in found.items() if value not in AXES[axis]} == {}, case


def test_no_class_of_the_spec_is_left_out() -> None:
    values = set().union(*AXES.values()) | {name for axis in AXES for name in axis.split()}
    unions = (Encoder, OutputEncoder, Relevance, Bias, FarClasses, Layout)
    assert {kind.__name__ for union in unions for kind in get_args(union)} <= values
    assert {*get_args(Boundary), *get_args(Pairing)} <= values


def test_no_field_of_the_spec_is_left_out() -> None:
    exported = [getattr(translution.spec, name) for name in translution.spec.__all__]
    classes = [c for c in exported if isinstance(c, type) and dataclasses.is_dataclass(c)]
    labels = {"RegisterClass"}  # what Lattice.labels gives, no part of an operator
    fields = {c.__name__: {f.name for f in dataclasses.fields(c)} for c in classes if c.__name__ not in labels}
    assert fields == {name: set(axes) for name, axes in FIELDS.items()}
    assert {axis for axes in FIELDS.values() for axis in axes.values() if axis is not None} <= AXES.keys()


def test_an_axis_value_that_nothing_shows_is_named() -> None:
    without = [case for case in FIRST if axes_of(case)["far"] != "LogBuckets"]
    assert unseen(without) == {"far": {"LogBuckets"}}


def test_native_kernels_are_claimed_often_enough() -> None:
    counts = {"conv": 0, "sdpa": 0}
    for case in FIRST:
        for algorithm in counts:
            counts[algorithm] += not why_not(Request(case.operator, mask=axes_of(case)["mask"]), algorithm)
    assert min(counts.values()) >= len(FIRST) // 12


def test_most_cases_are_not_degenerate() -> None:
    found = [axes_of(case) for case in FIRST]
    for axis, value in (("num_heads", "more"), ("batch", "more"), ("sites", "more"), ("queries with links", "all")):
        assert sum(axes[axis] == value for axes in found) > len(FIRST) / 2, axis


def test_one_seed_gives_one_question_on_every_run() -> None:
    code = (
        "from translution.conformance.strategies import random_case; import hashlib\n"
        "h = hashlib.sha256()\n"
        "for s in range(60):\n"
        "    q = random_case(s)\n"
        "    h.update(repr(q).encode())\n"
        "    for a in (q.x, q.y, q.mask, *q.params.values()):\n"
        "        h.update(b'' if a is None else a.tobytes())\n"
        "print(h.hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, timeout=120
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_the_operator_of_a_case_is_the_random_operator() -> None:
    for seed in range(0, 400, 7):
        assert random_operator(seed) == FIRST[seed].operator


def test_drawing_takes_less_than_a_case() -> None:
    took = []
    for seed in range(2000, 2300):
        begin = time.thread_time()
        random_case(seed)
        took.append(time.thread_time() - begin)
    assert statistics.median(took) < 1.5e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_of_the_dtype(dtype: str) -> None:
    for seed in range(60):
        case = draw_question(SeededDraws(seed, "dtype"), dtype, cotangent=True)
        for value in (case.x, case.y, case.mask, case.cotangent, *case.params.values()):
            if value is not None and value.dtype != np.bool_:
                np.testing.assert_array_equal(value, rounded(value, dtype))
                assert not np.isposinf(value).any()
        assert case.cotangent is not None
        assert case.cotangent.shape == case.out_shape


def test_integers_are_whole() -> None:
    for seed in range(40):
        case = random_case(seed, integers=True)
        for value in (case.x, *case.params.values()):
            assert np.isin(value, range(-3, 4)).all()


def _drawn(number: int, **given: object) -> Question | None:
    try:
        return draw_question(SeededDraws(number, "restricted"), **given)  # type: ignore[arg-type]
    except Rejected:
        return None


def test_restrictions_hold() -> None:
    chosen = (Mean(), Softmax(scale=0.5))
    for number in range(60):
        case = draw_question(SeededDraws(number), self_only=True)
        assert case.y is None
        assert case.operator.layout.is_self
        assert draw_operator(SeededDraws(number), relevances=chosen).relevance in chosen
        assert draw_operator(SeededDraws(number), heads=2).num_heads == 2
        window = draw_operator(SeededDraws(number), layouts=("window", "shift")).layout
        assert isinstance(window, Lattice)
        assert window.kernel_size is not None
        given = Lattice((2, 3), kernel_size=3, boundary="zeros")
        assert draw_operator(SeededDraws(number), layout=given).layout == given
        batched = draw_question(SeededDraws(number), masked=True, batch=(3, 1), return_weights=True)
        assert batched.mask is not None
        assert batched.x.shape[:-2] == (3, 1)
        assert batched.return_weights
        assert draw_question(SeededDraws(number), masked=False).mask is None
    self_pairs = [_drawn(number, self_only=True, layouts=("cross-graph",)) for number in range(60)]
    assert all(case is None or case.operator.layout.is_self for case in self_pairs)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_every_layout_kind_can_be_drawn_alone(kind: str) -> None:
    found = [draw_layout(SeededDraws(number), kinds=[kind]) for number in range(30)]
    assert all(count_links(layout) <= 400 for layout in found)
    assert len(set(found)) > 3


def test_two_restricted_walks_meet_in_all_pairs() -> None:
    kinds, relevances = ("line", "window"), (Ones(), Mean())
    seen = set()
    for number in range(100):
        operator = draw_operator(SeededDraws(number), layouts=kinds, relevances=relevances)
        assert isinstance(operator.layout, Lattice)
        seen.add((operator.layout.kernel_size is None, type(operator.relevance)))
    assert len(seen) == 4


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks_of_every_kind(kind: str) -> None:
    operator = draw_operator(SeededDraws(0), layout=Lattice((2, 3)), relevances=(Softmax(),), heads=2)
    found = [draw_mask(SeededDraws(number), operator, (3,), "float32", kind) for number in range(20)]
    shapes = {None if mask is None else mask.shape for mask in found}
    assert (shapes == {None}) == (kind == "none")
    if kind in ("padding", "heads", "pairs"):
        assert shapes == {{"padding": (3, 1, 1, 6), "heads": (3, 2, 6, 6), "pairs": (6, 6)}[kind]}
    assert kind == "none" or {mask.dtype.name for mask in found if mask is not None} == {"bool", "float64"}


def test_hypothesis_shrinks_to_a_case_that_can_be_read() -> None:
    quick = settings(
        max_examples=4000, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    case = find(cases(), lambda q: q.operator.uses_content and q.operator.num_heads > 1, settings=quick)
    assert case.operator.layout.num_queries <= 2
    assert case.operator.num_heads == 2
    assert case.mask is None
    assert case.x.size <= 4
    masked = find(cases(), lambda q: q.mask is not None and q.mask.dtype != np.bool_, settings=quick)
    assert masked.operator.layout.num_queries <= 3
    assert axes_of(masked)["batch dimensions"] == "0"
