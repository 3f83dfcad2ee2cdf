"""These tests interpret the kernel on the CPU; triton decides at import, so they need a process of their own."""

import numpy as np
import pytest

from translution.spec import Operator


@pytest.fixture(autouse=True)
def interpreted() -> None:
    from translution.backends.triton.targets import INTERPRETED

    if not INTERPRETED:
        pytest.skip("run TRITON_INTERPRET=1 pytest tests/triton_interpreter")


@pytest.fixture
def draw():
    """Parameters, x and y (None in the self case) of an operator in float32, from a seed."""

    def draw(operator: Operator, batch: int = 2, seed: int = 0, size: float = 1.0):
        rng = np.random.default_rng(seed)
        normal = lambda *shape: (rng.standard_normal(shape) * size).astype(np.float32)  # noqa: E731
        params = {name: normal(*shape) for name, shape in operator.parameters.items()}
        x = normal(batch, operator.layout.num_queries, operator.dim)
        own = operator.layout.is_self and operator.keys_dim == operator.dim
        return params, x, None if own else normal(batch, operator.layout.num_keys, operator.keys_dim)

    return draw
