"""The family ``operators`` under pytest-benchmark: one benchmark for each operator, pass and candidate.

Nothing is timed before it kept its error bound. Ratios, shares and growth are in report.py, which interleaves rounds.
"""

from functools import lru_cache

import pytest
import torch
from families import TIMED
from pytest_benchmark.fixture import BenchmarkFixture
from workload import CannotRun, Case, Workload

THREADS, ROUNDS = 2, 3
CASES = {case.name: case for group in TIMED["operators"] for case in group.cases}
PARAMETERS = [
    pytest.param(
        case,
        which,
        candidate,
        id=f"{name}, {which}, {candidate}",
        marks=pytest.mark.benchmark(group=f"{name}, {which}"),
    )
    for name, case in CASES.items()
    for which in case.passes
    for candidate in case.candidates
]


@lru_cache(maxsize=1)  # cases follow one another, and exact results are large
def workload(case: Case) -> Workload:
    """One for all candidates and passes of a case."""
    return Workload(case)


@pytest.mark.parametrize(("case", "which", "candidate"), PARAMETERS)
def test_operator(benchmark: BenchmarkFixture, case: Case, which: str, candidate: str) -> None:
    torch.set_num_threads(THREADS)
    try:
        call, share = workload(case).checked(candidate, which)
    except CannotRun as reason:
        pytest.skip(str(reason))
    benchmark.extra_info |= {"batch": case.batch, "error_over_bound": share}
    benchmark.pedantic(call, warmup_rounds=1, rounds=ROUNDS)
