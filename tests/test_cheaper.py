"""What would fit instead: it does fit, the next greater does not, and every kind of change is looked for."""

import pytest

from translution import cheaper as module
from translution.algorithms import Request
from translution.cheaper import KINDS, cheaper, fit
from translution.execution import predict
from translution.registry import get_backend
from translution.spec import Lattice, Operator, PairTable, PerDisplacement, parse_spec, presets

FULL = "translution2d:height=6,width=6,dim=24,num_heads=3,registers=1"
ALPHA = "alpha_translution2d:height=6,width=6,dim=24,num_heads=3,rank=6"
TORCH = ("torch",)


def total(request, algorithm="stream"):
    return predict(get_backend("torch"), request, algorithm).total_bytes


def fits(spec, share, batch=8, gradient=False):
    request = Request(parse_spec(spec), batch, gradient=gradient)
    limit = int(share * total(request))
    return request, limit, {one.change: one for one in cheaper(request, limit, TORCH)}


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("spec", "share"), [(FULL, 0.5), (FULL, 0.8), (ALPHA, 0.9)])
def test_everything_fits_and_is_the_least_change_that_does(spec, share, gradient):
    request, limit, found = fits(spec, share, gradient=gradient)
    assert found
    for one in found.values():
        assert one.cost.total_bytes <= limit
        assert one.cost == predict(get_backend(one.backend), one.request, one.algorithm)
    for kind in KINDS:
        changes = kind(request)
        own = next((n for n, (words, _) in enumerate(changes) if words in found), None)
        if own is None:
            assert all(fit(make(), limit, TORCH) is None for _, make in changes[-1:])
        elif own > 0:
            assert fit(changes[own - 1][1](), limit, TORCH) is None


def test_of_full_matrices_every_kind_but_the_batch_takes_fewer_parameters():
    request, _, found = fits(FULL, 0.5, batch=1)
    kinds = ("alpha-Translution of rank", "one matrix for all", "displacements beyond", "a window")
    for kind in kinds:
        (one,) = (one for words, one in found.items() if words.startswith(kind))
        assert one.request.operator.num_parameters < request.operator.num_parameters
        assert one.request.batch == request.batch


def test_a_smaller_batch_where_the_items_are_what_is_large():
    request = Request(parse_spec("self_attention2d:height=6,width=6,dim=24,num_heads=3"), 64)
    limit = total(request, "sdpa") // 2
    (one,) = (one for one in cheaper(request, limit, TORCH) if one.change.startswith("batch"))
    assert one.request.operator == request.operator
    assert one.change == f"batch {one.request.batch}"
    assert total(one.request, "sdpa") <= limit < total(Request(request.operator, one.request.batch + 1), "sdpa")


def test_the_rank_of_alpha_is_lowered_wherever_it_stands():
    request = Request(parse_spec(ALPHA), 8)
    changes = dict(module._ranks(request))
    assert list(changes) == [f"rank {n} per head" for n in (5, 4, 3, 2, 1)]
    assert changes["rank 2 per head"]().operator == presets.alpha_translution((6, 6), 24, 3, rank=2)


@pytest.mark.parametrize("roles", ["qkv", "qk", "v", "k"])
def test_alpha_in_place_of_full_matrices_keeps_roles_and_layout(roles):
    own = presets.translution((6, 6), 24, 3, roles=roles, registers=1, kernel_size=5)
    changes = dict(module._ranks(Request(own)))
    other = changes["alpha-Translution of rank 2 per head"]().operator
    assert other == presets.alpha_translution((6, 6), 24, 3, rank=2, roles=roles, registers=1, kernel_size=5)


def test_what_has_no_variants_is_offered_none():
    table = PairTable(tuple((0,) * 4 for _ in range(4)), num_classes=1)
    pairs = Operator(table, 4, 1, PerDisplacement(4), PerDisplacement(4), PerDisplacement(4))
    assert [len(kind(Request(pairs))) for kind in KINDS] == [0, 0, 3, 0, 0]
    strided = presets.convolution((6, 6), 4, 4, 3, stride=2)
    assert isinstance(strided.layout, Lattice)
    assert not module._windows(Request(strided))


def test_nothing_fits_into_nothing():
    _, _, found = fits(FULL, 0.0)
    assert not found


def test_loops_over_pairs_are_no_advice():
    request = Request(parse_spec(FULL))
    assert fit(request, 10**12, ("reference",)) is None
    assert fit(request, 10**12).algorithm != "definition"
