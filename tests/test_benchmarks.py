"""The benchmarks: baselines are right, what is wrong is caught before it is timed, and what was measured is kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from translution.conformance.comparison import ComparisonError
from translution.spec import parse_spec

ROOT = Path(__file__).resolve().parents[1]
FULL = "translution2d:height=3,width=4,dim=12,num_heads=3,registers=1"
ALPHA = "alpha_translution2d:height=3,width=4,dim=12,num_heads=3,registers=1,rank=2"
NEIGHBOURHOOD = "neighborhood_attention2d:height=5,width=6,dim=8,num_heads=2,kernel_size=3"
CONVOLUTION = "convolution2d:height=5,width=6,in_channels=3,out_channels=4,kernel_size=3,padding=1"


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The benchmarks import one another as a program started in their folder does."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("spec", "baseline"),
    [
        (FULL, "authors"),
        (ALPHA, "authors' alpha"),
        ("self_attention2d:height=3,width=4,dim=12,num_heads=3,registers=1", "SDPA"),
        ("self_attention1d:length=9,dim=12,num_heads=3,causal=true", "SDPA"),
        (NEIGHBOURHOOD, "SDPA"),
        (NEIGHBOURHOOD, "neighbourhood"),
        (CONVOLUTION, "conv2d"),
    ],
)
def test_baselines_compute_the_operator_and_its_gradients(spec, baseline):
    from workload import TRAINING, Case, Workload

    call, share = Workload(Case(spec, 3)).checked(baseline, TRAINING)
    assert 0 < share < 1
    call()


@pytest.mark.parametrize("name", ["torch stream", "numpy stream"])
@pytest.mark.parametrize("spec", [FULL, ALPHA, CONVOLUTION])
def test_backends_are_checked_in_the_same_way(name, spec):
    from workload import TRAINING, Case, Workload

    call, share = Workload(Case(spec, 2)).checked(name, TRAINING)
    assert 0 < share < 1
    call()


@pytest.mark.parametrize("spec", ["self_attention1d:length=9,dim=12,num_heads=3,causal=true", NEIGHBOURHOOD])
def test_flex_sees_what_the_layout_links(spec):
    """Its mask alone: compiling takes a minute."""
    from peers import _visible

    from translution.geometry import geometry

    layout = parse_spec(spec).layout
    expected = np.zeros((layout.num_queries, layout.num_keys), bool)
    expected[geometry(layout).query_index, geometry(layout).key_index] = True
    rows, columns = torch.arange(layout.num_queries)[:, None], torch.arange(layout.num_keys)[None, :]
    found = torch.as_tensor(_visible(layout)(0, 0, rows, columns))
    assert np.array_equal(found.numpy(), expected)


def test_flex_says_why_it_has_no_backward():
    from workload import TRAINING, CannotRun, Case, Workload

    with pytest.raises(CannotRun, match="no backward on a CPU"):
        Workload(Case(NEIGHBOURHOOD, 1)).checked("flex", TRAINING)


def test_the_authors_algorithm_refuses_windows():
    from baseline import Gather

    with pytest.raises(ValueError, match="links every pair"):
        Gather(parse_spec("translution2d:height=3,width=4,dim=12,num_heads=3,kernel_size=3"))


@pytest.mark.parametrize("whole", [True, False], ids=["all queries", "one query"])
@pytest.mark.parametrize("spec", [FULL, ALPHA, "translution1d:length=9,dim=12,num_heads=3,causal=true"])
def test_the_check_fails_for_what_is_slightly_wrong(spec, whole, monkeypatch):
    """One gradient, one result, one row that no cotangent reaches."""
    import exactness
    from workload import Case, TorchComputation, Workload

    import translution

    if not whole:
        monkeypatch.setattr(exactness, "MOST_BYTES", 1)
    workload = Workload(Case(spec, 2))
    exact = workload.exact
    assert len(exact.queries) == (workload.case.operator.layout.num_queries if whole else 1)
    compute = TorchComputation(workload, translution.compile(workload.case.operator, "torch", "stream"))
    out, gradients = compute.results(exact.cotangent, with_gradients=True)
    assert 0 < exact.share(out, gradients) < 1
    for name, value in gradients.items():
        wrong = value.copy()
        where = np.unravel_index(np.abs(value).argmax(), value.shape)
        wrong[where] *= 1.5
        with pytest.raises(ComparisonError, match=f"gradient of {name}"):
            exact.share(out, gradients | {name: wrong})
    wrong = out.copy()
    wrong[1, exact.queries[-1]] *= -1
    with pytest.raises(ComparisonError, match="out"):
        exact.share(wrong, None)
    with pytest.raises(ComparisonError, match="expected"):
        exact.share(out, {"x": gradients["x"]})
    if not whole and "causal" not in spec:  # the middle of a causal order and its mirror meet every row
        table = next(name for name in gradients if name.endswith("table"))
        unseen = np.setdiff1d(np.arange(len(gradients[table])), exact.view.classes)
        wrong = gradients[table].copy()
        wrong[unseen[0], 0, 0] = 1e-30
        with pytest.raises(ComparisonError, match="rows that no cotangent reaches"):
            exact.share(out, gradients | {table: wrong})


def test_a_group_is_measured_only_behind_the_check(monkeypatch):
    import peers
    from families import Group
    from measuring import measure_group
    from workload import FORWARD, Case

    case = Case("self_attention1d:length=9,dim=12,num_heads=3", 2, ("SDPA", "triton fused"), (FORWARD,))
    found = measure_group(Group("small", (case,)), 2)
    (row,) = found["cases"]
    assert len(row["passes"][FORWARD]["seconds"]["SDPA"]) == 2
    assert "GPU" in row["passes"][FORWARD]["skipped"]["triton fused"]
    monkeypatch.setattr(peers.functional, "scaled_dot_product_attention", lambda q, *_, **__: q)
    with pytest.raises(ComparisonError, match="SDPA, forward"):
        measure_group(Group("small", (case,)), 2)


def test_the_machines_own_rates_are_measured_beside_it():
    from families import Group
    from measuring import measure_group
    from reading import shares, table_share
    from workload import BACKWARD, FORWARD, MACHINE, TRAINING, Case

    case = Case(FULL, 2, ("torch stream", *MACHINE), (FORWARD, BACKWARD, TRAINING))
    (row,) = measure_group(Group("small", (case,)), 2)["cases"]
    assert set(row["machine"]["seconds"]) == set(MACHINE)
    assert row["useful_flops"] == row["machine"]["products_flops"] == 2 * 2 * 13 * 13 * 3 * 12 * 12
    assert row["machine"]["table_bytes"] == 4 * (5 * 7 + 3) * 3 * 12 * 12
    executed = {which: found["executed_flops"] for which, found in row["passes"].items()}
    assert executed[TRAINING] == executed[FORWARD] + executed[BACKWARD] >= 3 * row["useful_flops"]
    assert all(one.middle > 0 for which in row["passes"] for one in shares(row, which))
    assert table_share(row).middle > 0


def test_families_merge_into_one_file(tmp_path):
    from families import NAMES
    from measuring import merge

    path = tmp_path / "performance.json"
    merge(path, "growth", {"a": 1})
    merge(path, "translution", {"b": 2})
    merge(path, "growth", {"c": 3})
    assert json.loads(path.read_text()) == {"translution": {"b": 2}, "growth": {"c": 3}}
    assert list(json.loads(path.read_text())) == [name for name in NAMES if name in ("translution", "growth")]


def test_peak_memory_of_a_baseline_is_measured_in_a_process_of_its_own():
    from families import Peak
    from measuring import weigh_family
    from workload import FORWARD

    spec = "translution2d:height=4,width=4,dim=96,num_heads=3"
    found = weigh_family((Peak(spec, 2, "authors", FORWARD), Peak(spec, 2, "torch stream", FORWARD)), 1)
    theirs, own = (row["peak_bytes"] for row in found["peaks"])
    # One role's matrices of every pair.
    assert theirs > 16 * 16 * 96 * 96 * 4 > own
