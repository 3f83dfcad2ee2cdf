"""These tests compile the kernel for GPUs that need not be there; interpreted, there is nothing to compile."""

import pytest


@pytest.fixture(autouse=True)
def compiled() -> None:
    from translution.backends.triton.targets import INTERPRETED

    if INTERPRETED:
        pytest.skip("run pytest tests/triton_ahead_of_time without TRITON_INTERPRET")
