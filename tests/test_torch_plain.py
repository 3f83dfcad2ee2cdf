"""The features that are the same for every displacement: ``stream`` leaves them to ordinary products where it may."""

import numpy as np
import pytest
import torch

import translution
from translution.algorithms import Request
from translution.backends.torch import plain
from translution.backends.torch.backend import backend
from translution.backends.torch.encoding import encode_role
from translution.backends.torch.links import links
from translution.backends.torch.relevance import link_mask
from translution.geometry import geometry
from translution.normal_form import normal_form
from translution.spec import (
    Concat,
    Identity,
    Lattice,
    LowRank,
    Mean,
    Ones,
    Operator,
    PerDisplacement,
    Rotary,
    Shared,
    presets,
)

ALPHA = presets.alpha_translution((4, 4), 24, 3, rank=2, registers=1)


def parameters(operator, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return {n: 0.4 * torch.randn(s, generator=generator, dtype=dtype) for n, s in operator.parameters.items()}


def spans(operator, mask=None):
    """What is left to ``stream`` of queries and keys."""
    form, found = normal_form(operator), links(operator.layout, torch.device("cpu"))
    x, params = torch.ones((operator.layout.num_queries, 1, operator.dim), dtype=torch.float64), parameters(operator)
    query, key = (
        encode_role(role, params, x, geometry(operator.layout), side)
        for role, side in ((form.query, "query"), (form.key, "key"))
    )
    own = None if mask is None else link_mask(mask, found, x.dtype)
    return plain.relative_span(found, own, query, key)


def test_of_alpha_the_low_rank_half_is_left():
    assert ALPHA.head_dim == 10
    assert spans(ALPHA) == (8, 10)


def test_of_full_matrices_everything_and_of_shared_ones_nothing():
    assert spans(presets.translution((4, 4), 24, 3)) == (0, 8)
    assert spans(presets.translution((4, 4), 24, 3, roles="v")) == (0, 0)


@pytest.mark.parametrize(
    "operator",
    [
        presets.alpha_translution((4, 4), 24, 3, rank=2, kernel_size=3),
        presets.alpha_translution((6,), 24, 3, rank=2, causal=True),
    ],
)
def test_where_not_every_pair_is_linked_all_is_left(operator):
    assert spans(operator) == (0, 10)


def test_under_a_mask_all_is_left():
    assert spans(ALPHA, torch.ones((1, 1, 17, 17), dtype=torch.bool)) == (0, 10)


@pytest.mark.parametrize("roles", ["qkv", "qk", "qv", "kv", "q", "k", "v"])
@pytest.mark.parametrize("preset", [presets.alpha_translution, presets.translution])
def test_results_and_gradients_are_those_of_pairs(preset, roles):
    operator = preset((3, 4), 12, 3, roles=roles, registers=2)
    params = {name: value.numpy() for name, value in parameters(operator).items()}
    generator = np.random.default_rng(5)
    x, pull = generator.normal(size=(2, 14, 12)), generator.normal(size=(2, 14, 12))
    got, want = (
        translution.vjp(operator, params, x, cotangent=pull, backend="torch", algorithm=algorithm)
        for algorithm in ("stream", "pairwise")
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[1].x, want[1].x, rtol=1e-11, atol=1e-11)
    for name, gradient in want[1].params.items():
        np.testing.assert_allclose(got[1].params[name], gradient, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("gradient", [False, True])
def test_wider_heads_of_the_shared_half_cost_no_more_per_link(gradient):
    batch, more = 4, 24

    def traffic(head_dim):
        operator = presets.alpha_translution((7, 7), 24, 3, rank=2, head_dim=head_dim)
        return backend.dry_run(Request(operator, batch, gradient=gradient), "stream").traffic_bytes

    # Link by link each of three roles would be written and read: six times this, and 24 times with the backward.
    by_link = 4 * batch * 49 * 49 * 3 * more
    assert traffic(8 + more) - traffic(8) < (4 if gradient else 1) * by_link


def test_second_derivatives_go_through_both_halves():
    operator = presets.alpha_translution((2, 2), 4, 2, rank=1)
    params = parameters(operator)
    x = torch.randn((1, 4, 4), dtype=torch.float64, requires_grad=True)

    def call(given):
        return translution.run(operator, params, given, backend="torch", algorithm="stream")

    assert torch.autograd.gradgradcheck(call, (x,))


def agree(operator):
    params = parameters(operator)
    x = torch.randn((2, operator.layout.num_queries, operator.dim), dtype=torch.float64)
    got, want = (
        translution.run(operator, params, x, backend="torch", algorithm=algorithm)
        for algorithm in ("stream", "pairwise")
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


LAYOUT = Lattice((2, 3), registers=1)


@pytest.mark.parametrize("turned", [0, 1, 2, 3])
def test_what_stands_on_either_side_of_the_span(turned):
    """Parts that are relative first, last, in the middle or on both sides; their biases; turns that reach further."""
    parts = [
        (PerDisplacement(8, bias=True), Shared(16, bias=True)),
        (Shared(16, bias=True), PerDisplacement(8, bias=True)),
        (Shared(8), PerDisplacement(8), Shared(8, bias=True)),
        (PerDisplacement(4), Shared(16), LowRank(4)),
    ][turned]
    mixed, shared = Concat(parts), Shared(24, bias=True)
    agree(Operator(LAYOUT, 6, 2, value=mixed, query=mixed, key=mixed))
    agree(Operator(LAYOUT, 6, 2, value=shared, query=Rotary(mixed), key=Rotary(mixed)))
    # Relative on one side, plain on the other: each needs what the other has.
    agree(Operator(LAYOUT, 6, 2, value=shared, query=mixed, key=shared))
    agree(Operator(LAYOUT, 6, 2, value=mixed, query=shared, key=Rotary(mixed)))


def test_values_of_which_a_part_is_summed_elsewhere():
    """A low-rank part with a matrix after it is summed up by itself, and leaves its features without anything."""
    value = Concat((LowRank(8), LowRank(4, 16)))
    agree(Operator(LAYOUT, 6, 2, value=value, query=Shared(8), key=Shared(8)))
    agree(Operator(LAYOUT, 6, 2, value=value, relevance=Mean()))


def test_a_turn_inside_the_span_stays_with_its_features():
    turned, shared = Concat((Shared(16), Rotary(PerDisplacement(8)))), Shared(24)
    agree(Operator(LAYOUT, 6, 2, value=shared, query=turned, key=turned))
    agree(Operator(LAYOUT, 6, 2, value=shared, query=turned, key=Concat((Shared(16), Rotary(Shared(8))))))


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.5, 0.0])
def test_a_scaled_convolution_is_scaled_before_its_bias(scale):
    layout = Lattice((4, 5), kernel_size=3, boundary="zeros")
    operator = Operator(
        layout, 3, 1, PerDisplacement(2), relevance=Ones(), output=Identity(bias=True), output_scale=scale
    )
    params = parameters(operator)
    y = torch.randn((2, 20, 3), dtype=torch.float64)
    got, want = (
        translution.run(operator, params, y, backend="torch", algorithm=algorithm) for algorithm in ("conv", "stream")
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
