"""What is claimed runs, what is not raises before computing, with its reason (clause B1)."""

import numpy as np
import pytest

import translution
from translution import NotSupported
from translution.algorithms import Request
from translution.registry import get_backend
from translution.spec import (
    Clip,
    Concat,
    Lattice,
    LowRank,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    Rotary,
    Shared,
    Sum,
)
from translution.spec import presets as p

TABLE = PerDisplacement(4)


def operator(layout=Lattice((3,)), value=TABLE, query=Shared(4), key=Shared(4), **more):  # noqa: B008 - frozen
    return Operator(layout, 4, 2, value, query, key, **more)


UNCLAIMED = {
    "PairTable": operator(PairTable(((0, 1), (1, 0)), 2)),
    "far": operator(Lattice((4,), far=Clip(1))),
    "boundary 'zeros'": operator(Lattice((4,), kernel_size=3, boundary="zeros")),
    "boundary 'circular'": operator(Lattice((4,), boundary="circular")),
    "boundary 'shift'": p.neighborhood_attention((4,), 4, 2, kernel_size=3),
    "evenly spaced": operator(Lattice((3,), key_grid=(2,), stride=3)),
    "without a value bias": operator(
        Lattice((4,), kernel_size=3, boundary="zeros"), PerDisplacement(4, bias=True), None, None, relevance=Ones()
    ),
    "key_stride": p.transposed_convolution((3,), 2, 2, 3, stride=2),
    "4": operator(Lattice((1, 2, 1, 2))),
    "in groups": operator(value=PerDisplacement(4, groups=2)),
    "vector per displacement": p.shaw_attention((3,), 4, 2),
    "up-projection": operator(query=LowRank(4, 4)),
    "per-displacement terms": operator(value=Sum((TABLE, TABLE))),
    "rotates": operator(query=Rotary(TABLE)),
    "different slices": operator(query=Concat((TABLE, Shared(4))), key=Concat((Shared(4), TABLE))),
}


@pytest.mark.parametrize("reason", UNCLAIMED)
def test_unclaimed_operator_raises_with_its_reason(reason, draw):
    params, x, y = draw(UNCLAIMED[reason])
    with pytest.raises(NotSupported) as caught:
        translution.run(UNCLAIMED[reason], params, x, y, backend="triton")
    assert any(reason in text for text in caught.value.reasons)


def test_every_reason_is_given(draw):
    both = operator(Lattice((4,), kernel_size=3, boundary="zeros"), value=PerDisplacement(4, groups=2))
    params, x, y = draw(both)
    with pytest.raises(NotSupported) as caught:
        translution.run(both, params, x, y, backend="triton", return_weights=True)
    text = "\n".join(caught.value.reasons)
    assert all(part in text for part in ("zeros", "groups", "weights"))


def test_float64_is_not_claimed(draw):
    params, x, _ = draw(operator())
    with pytest.raises(NotSupported, match="float64"):
        translution.run(
            operator(), {n: a.astype(np.float64) for n, a in params.items()}, x.astype(np.float64), backend="triton"
        )


def test_gradients_of_the_first_order_are_claimed():
    assert get_backend("triton").claims.gradient_order == 1
    assert get_backend("triton").not_supported(Request(operator(), gradient=True), "fused") == []


def test_there_is_no_other_algorithm(draw):
    params, x, _ = draw(operator())
    with pytest.raises(NotSupported, match="no algorithm 'stream'"):
        translution.run(operator(), params, x, backend="triton", algorithm="stream")


def test_operator_without_queries_runs(draw):
    ones = Operator(Lattice((3,), kernel_size=3), 4, 2, TABLE, relevance=Ones())
    params, x, _ = draw(ones)
    assert translution.run(ones, params, x, backend="triton", algorithm="fused").shape == (2, 3, 4)
