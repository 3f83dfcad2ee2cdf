"""Operators as values: rows, normalisation, equality, and every preset's parameters against closed forms."""

import dataclasses
import pickle
import typing

import pytest
import torch

from translution.conformance.strategies import random_operator
from translution.spec import (
    Clip,
    Concat,
    Identity,
    Lattice,
    LogBuckets,
    Mean,
    Operator,
    PairTable,
    RegisterClass,
    Rotary,
    Shared,
    Softmax,
    Sum,
    Vectors,
    presets,
)
from translution.spec.preset_text import preset_functions

ROLES = typing.get_args(presets.Roles)
RANDOM = range(69)

# Classes and rows


def test_L1_displacements_of_strided_sides_are_those_of_all_pairs() -> None:
    for stride in range(1, 6):
        for key_stride in range(1, 6):
            for offset in (-2, 0, 3):
                layout = Lattice((4,), key_grid=(5,), stride=stride, key_stride=key_stride, offset=offset)
                pairs = {offset + stride * a - key_stride * b for a in range(4) for b in range(5)}
                assert layout.axis_displacements(0) == tuple(sorted(pairs))


@pytest.mark.parametrize(
    ("size", "dilation", "causal", "seen"),
    [
        (3, 1, False, (-1, 0, 1)),
        (4, 1, False, (-2, -1, 0, 1)),
        (3, 2, False, (-2, 0, 2)),
        (3, 2, True, (0, 2, 4)),
        (1, 5, True, (0,)),
    ],
)
def test_L2_default_padding_centres_or_ends_the_window(
    size: int, dilation: int, causal: bool, seen: tuple[int, ...]
) -> None:
    assert Lattice((9,), kernel_size=size, dilation=dilation, causal=causal).axis_displacements(0) == seen


def test_L2_taps_run_against_displacements() -> None:
    assert Lattice((9,), kernel_size=3, padding=7, dilation=2).axis_displacements(0) == (3, 5, 7)


def test_L3_rows_ascend_and_key_rows_ascend_in_the_opposite_displacement() -> None:
    layout = Lattice((2, 3))
    every = [(r, c) for r in (-1, 0, 1) for c in (-2, -1, 0, 1, 2)]
    assert layout.labels() == layout.key_labels() == every
    window = Lattice((5,), kernel_size=(3,), padding=2)
    assert window.labels() == [(0,), (1,), (2,)]
    assert window.key_labels() == [(-2,), (-1,), (0,)]


@pytest.mark.parametrize("seed", RANDOM)
def test_L3_number_of_classes_is_the_number_of_labels(seed: int) -> None:
    layout = random_operator(seed).layout
    if isinstance(layout, Lattice):
        assert layout.num_classes == len(layout.labels()) == len(layout.key_labels())


def test_L3_large_layouts_are_counted_without_their_labels() -> None:
    """2047 x 2047 tokens in raster order have (4093^2 + 1) / 2 classes; built one by one they would take minutes."""
    assert Lattice((2047, 2047), causal=True).num_classes == (4093**2 + 1) // 2
    assert Lattice((2**22,), far=LogBuckets(16, 128)).num_classes == 2 * 15 + 1


def test_L4_raster_order_and_axis_order() -> None:
    assert Lattice((2, 2), causal=True).labels() == [(0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    assert Lattice((2, 2), causal=(True, False)).labels() == [(0, -1), (0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    assert Lattice((2, 2), causal=(False, False)) == Lattice((2, 2))


def test_L5_circular_goes_the_short_way_round() -> None:
    assert Lattice((4,), boundary="circular").labels() == [(-2,), (-1,), (0,), (1,)]
    assert Lattice((5,), boundary="circular").label((4,)) == (-1,)


def test_L6_register_rows_follow_the_grid_in_one_order_for_all_roles() -> None:
    layout = Lattice((1,), registers=2)
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (None, 0), (None, 1), (0, None), (1, None)]
    assert layout.labels() == [(0,), *(RegisterClass(a, b) for a, b in pairs)]
    assert layout.key_labels() == [(0,), *(RegisterClass(b, a) for a, b in pairs)]
    causal = [(0, 0), (1, 0), (1, 1), (None, 0), (None, 1)]
    assert Lattice((1,), registers=2, causal=True).labels()[1:] == [RegisterClass(a, b) for a, b in causal]


def test_L7_log_buckets_are_exact_at_every_edge() -> None:
    """Bucket e + t begins at the least n with n^(N - e) e^t >= D^t e^(N - e)."""
    buckets, exact = LogBuckets(16, 128), 8
    for distance in range(1, 200):
        reached = [t for t in range(8) if distance**8 * exact**t >= 128**t * exact**8]
        expected = distance if distance < exact else exact + max(reached)
        assert buckets.label(distance) == expected == -buckets.label(-distance)


def test_L8_the_mirror_of_a_pair_table_is_its_transpose() -> None:
    table = PairTable(((0, 1), (2, 0)), 3)
    assert table.reversed_classes() == ((0, 2), (1, 0))
    assert table.num_classes == 3


# Values


def test_lists_and_ints_become_tuples() -> None:
    given = Lattice([4, 4], key_grid=[3, 3], kernel_size=3, stride=2, causal=[True, False])  # type: ignore[arg-type]
    assert given == Lattice((4, 4), key_grid=(3, 3), kernel_size=(3, 3), stride=(2, 2), causal=(True, False))
    assert hash(given) == hash(dataclasses.replace(given))
    assert PairTable([[0]], 1) == PairTable(((0,),), 1)  # type: ignore[arg-type]
    assert Sum([Shared(4)]) == Sum((Shared(4),))  # type: ignore[arg-type]
    assert Softmax(scale=1).scale == 1.0
    assert isinstance(Softmax(scale=1).scale, float)


@pytest.mark.parametrize("seed", RANDOM)
def test_operators_are_values(seed: int) -> None:
    one, other = random_operator(seed), random_operator(seed)
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert dataclasses.replace(one, output_scale=0.125) != one


def test_operators_are_frozen() -> None:
    operator = presets.self_attention((2,), 4, 1)
    for name in ("dim", "layout", "value"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(operator, name, 3)


# Presets: parameters by closed forms, PAPER.md section 3 with T classes, C = dim, C' = heads * head_dim


@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize(
    ("layout", "classes"),
    [
        ({"grid": (3, 4), "registers": 1}, 5 * 7 + 3),
        ({"grid": (6,), "causal": True}, 6),
        ({"grid": (5, 5), "kernel_size": 3}, 9),
        ({"grid": (9,), "far": Clip(2)}, 5),
    ],
)
def test_E5_translution_has_the_parameters_of_the_paper(
    roles: presets.Roles, layout: dict[str, typing.Any], classes: int
) -> None:
    dim, width = 10, 12
    operator = presets.translution(dim=dim, num_heads=3, head_dim=4, roles=roles, **layout)
    for role, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        name, shape = ("table", (classes, dim, width)) if letter in roles else ("weight", (dim, width))
        assert operator.parameters[f"{role}.{name}"] == shape
    relative = len(roles)
    assert operator.num_parameters == (relative * classes + 3 - relative) * dim * width + width * dim + dim
    assert len(operator.parameters) == 5


@pytest.mark.parametrize("roles", ROLES)
def test_E6_alpha_has_the_parameters_of_the_paper(roles: presets.Roles) -> None:
    dim, width, inner, classes = 10, 12, 6, 5 * 7 + 3
    operator = presets.alpha_translution((3, 4), dim, 3, head_dim=4, rank=2, roles=roles, registers=1)
    logits, values = set(roles) & {"q", "k"}, "v" in roles
    expected = 3 * dim * width + (2 * dim * inner if logits else 0) + (dim * inner + inner * width if values else 0)
    assert operator.num_parameters == expected + len(roles) * classes * inner**2 + width * dim + dim
    assert operator.head_dim == (6 if logits else 4)
    assert operator.output_scale == (0.5 if values else 1.0)
    assert isinstance(operator.relevance, Softmax)
    assert operator.relevance.scale == (0.25 if logits else 0.5)


@pytest.mark.parametrize(
    ("row", "exact", "grid", "channels", "patch", "classes", "layers"),
    [
        ("MNIST, Translution", 116_164_138, (7, 7), 1, 12, 10, 6),
        ("ViT-A/56, Translution", 38_526_184, (4, 4), 3, 56, 1000, 6),
    ],
)
def test_P1_whole_models_have_the_size_in_the_paper(
    row: str, exact: int, grid: tuple[int, int], channels: int, patch: int, classes: int, layers: int
) -> None:
    dim, mlp, inputs = 192, 768, channels * patch**2
    operator = presets.translution(grid, dim, 3, head_dim=64, registers=1)
    block = operator.num_parameters + 2 * dim + 2 * dim + 2 * dim * mlp + mlp + dim
    embedding = 2 * inputs + inputs * dim + dim + 2 * dim
    assert layers * block + embedding + dim + 2 * dim + dim * classes + classes == exact, row


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_P1_convolutions_count_as_torch_does(rank: int, bias: bool, groups: int) -> None:
    grid, size = (8, 9, 7)[:rank], (3, 2, 4)[:rank]
    pairs = {
        presets.convolution: (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
        presets.transposed_convolution: (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
    }
    for preset, modules in pairs.items():
        module = modules[rank - 1](4, 6, size, stride=2, padding=1, dilation=1, groups=groups, bias=bias)
        operator = preset(grid, 4, 6, size, stride=2, padding=1, groups=groups, bias=bias)
        result = module(torch.zeros(1, 4, *grid))
        assert isinstance(operator.layout, Lattice)
        assert operator.layout.grid == tuple(result.shape[2:])
        assert operator.out_features == result.shape[1]
        assert operator.num_parameters == count(module)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("key_dim", [None, 5])
def test_P1_self_attention_counts_as_torch_does(bias: bool, key_dim: int | None) -> None:
    module = torch.nn.MultiheadAttention(12, 3, bias=bias, kdim=key_dim, vdim=key_dim)
    operator = presets.self_attention((4,), 12, 3, key_dim=key_dim, qkv_bias=bias, output_bias=bias)
    assert operator.num_parameters == count(module)


def test_P1_parameters_of_the_other_presets() -> None:
    projections = 4 * 12 * 12 + 12
    shapes = {
        "relevance.bias": presets.swin_attention((7, 7), 12, 3, qkv_bias=False),
        "key.1.vectors": presets.shaw_attention((5,), 12, 3, max_distance=2, values=False),
        "relevance.second.weight": presets.convit_attention((3, 4), 12, 3),
    }
    own = {"relevance.bias": (3, 13 * 13), "key.1.vectors": (5, 4), "relevance.second.weight": (3, 3)}
    extra = {"relevance.second.weight": 3}
    for name, operator in shapes.items():
        size = own[name][0] * own[name][1] + extra.get(name, 0)
        assert operator.parameters[name] == own[name]
        assert operator.num_parameters == projections + size
    assert presets.convit_attention((3, 4), 12, 3).parameters["relevance.gate"] == (3,)
    assert presets.t5_attention((200,), 12, 3).parameters["relevance.bias"] == (3, 31)
    assert presets.t5_attention((200,), 12, 3, causal=True).parameters["relevance.bias"] == (3, 32)
    assert presets.alibi_attention((9,), 12, 3).num_parameters == projections
    assert presets.rope_attention((2, 2), 12, 3).num_parameters == projections
    assert presets.neighborhood_attention((9, 9), 12, 3, kernel_size=3, bias=True).parameters["relevance.bias"] == (
        3,
        25,
    )
    assert presets.average_pooling((4, 4), 5, 2).num_parameters == 0


def test_R6_scale_is_the_head_width_to_the_minus_half() -> None:
    operator = presets.self_attention((2,), 12, 3)
    assert isinstance(operator.relevance, Softmax)
    assert operator.scale_of(operator.relevance) == 0.5
    assert operator.scale_of(Softmax(scale=3)) == 3.0


def test_alpha_is_a_concatenation_of_what_exists() -> None:
    operator = presets.alpha_translution((2, 2), 8, 2, rank=2, roles="qv", rotary=True)
    assert isinstance(operator.query, Concat)
    assert isinstance(operator.query.parts[0], Rotary)
    assert isinstance(operator.key, Concat)
    assert operator.key.parts[1] == Shared(4)


def test_shaw_adds_vectors_to_keys_and_values() -> None:
    operator = presets.shaw_attention((4,), 8, 2, max_distance=1)
    relative = Sum((Shared(8), Vectors(8, shared_heads=True)))
    assert (operator.key, operator.value) == (relative, relative)


def test_pooling_without_counting_the_padding_is_a_mean_over_what_is_there() -> None:
    operator = presets.average_pooling((4,), 3, 2, padding=1, count_include_pad=False)
    assert (operator.relevance, operator.value) == (Mean(), Identity())
    assert isinstance(operator.layout, Lattice)
    assert (operator.layout.boundary, operator.layout.grid) == ("absent", (3,))


def test_every_preset_is_an_operator_and_nothing_else_is_public() -> None:
    assert {typing.get_type_hints(f)["return"] for f in preset_functions().values()} == {Operator}
    assert len(preset_functions()) == 13
