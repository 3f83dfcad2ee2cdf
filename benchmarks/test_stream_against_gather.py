"""``stream`` against the authors' algorithm; nothing is timed before both have kept their error bound."""

import pytest
import torch
from comparison import Workload, check_equal, paper_grid
from pytest_benchmark.fixture import BenchmarkFixture

THREADS = 2


@pytest.fixture(scope="module")
def workload() -> Workload:
    """The 7 x 7 grid, checked."""
    torch.set_num_threads(THREADS)
    checked = paper_grid(7, 8)
    check_equal(checked)
    return checked


@pytest.mark.parametrize("computation", ["stream", "gather"])
@pytest.mark.benchmark(group="forward, 7x7 + 1, batch 8")
def test_forward(benchmark: BenchmarkFixture, workload: Workload, computation: str) -> None:
    benchmark.pedantic(workload.forward, args=(computation,), warmup_rounds=1, rounds=5)


@pytest.mark.parametrize("computation", ["stream", "gather"])
@pytest.mark.benchmark(group="forward and backward, 7x7 + 1, batch 8")
def test_forward_and_backward(benchmark: BenchmarkFixture, workload: Workload, computation: str) -> None:
    benchmark.pedantic(workload.forward_backward, args=(computation,), warmup_rounds=1, rounds=5)
