"""Classes dealt out to devices: every row and every link has one owner, and nobody has much more than others."""

import numpy as np
import pytest

from translution.conformance.strategies import random_operator
from translution.errors import NotSupported
from translution.geometry import geometry
from translution.shares import num_groups, row_axes, share_of, shares, why_not_split
from translution.spec import Operator, PairTable, PerDisplacement, Shared, parse_spec, presets

TRANSLUTION = "translution2d:height=7,width=7,dim=8,num_heads=2,registers=1"


def links(steps):
    return [
        (int(i), int(j), step.value_class, step.key_class)
        for step in steps
        for i, j in zip(step.query_index, step.key_index, strict=True)
    ]


def dealt_out(operator, world):
    found = shares(operator, world)
    every = range(operator.layout.num_classes)
    assert sorted(row for share in found for row in share.value_rows) == list(every)
    assert sorted(row for share in found for row in share.key_rows) == list(every)
    own = [link for share in found for link in links(share.steps)]
    assert sorted(own) == sorted(links(geometry(operator.layout).steps))
    for share in found:
        assert {step.value_class for step in share.steps} <= set(share.value_rows)
        assert {step.key_class for step in share.steps} <= set(share.key_rows)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_row_and_every_link_has_one_owner(seed):
    operator = random_operator(seed)
    for world in (1, 2, 3, 5):
        if not why_not_split(operator, world):
            dealt_out(operator, world)


def test_a_line_of_three_by_hand():
    # Displacements -2 to 2 have 1, 2, 3, 2 and 1 links.
    first, second = dealt_out(presets.translution((3,), 4, 2), 2)
    assert (first.value_rows, second.value_rows) == ((0, 2, 4), (1, 3))
    assert (first.num_links, second.num_links) == (5, 4)
    # The key sees the pair from its own side: its rows ascend in -delta.
    assert (first.key_rows, second.key_rows) == ((0, 2, 4), (1, 3))
    assert first.parameters["query.table"] == (3, 4, 4)
    assert second.parameters["key.table"] == (2, 4, 4)
    assert second.parameters["output.weight"] == (4, 4)


@pytest.mark.parametrize("world", [2, 3, 8, 16])
@pytest.mark.parametrize("spec", [TRANSLUTION, "translution1d:length=160,dim=8,num_heads=2,causal=true"])
def test_links_and_rows_are_balanced(spec, world):
    found = dealt_out(parse_spec(spec), world)
    rows, counts = [len(share.value_rows) for share in found], [share.num_links for share in found]
    assert max(rows) - min(rows) <= 1
    assert max(counts) <= 1.01 * sum(counts) / world + 1


def test_links_that_share_a_row_stay_together():
    # c(i, j) names classes 0 and 1, c(j, i) ties both to row 0 of the key table; class 2 stands alone.
    layout = PairTable(((0, 1), (2, -1)), 3, ((0, 0), (1, -1)))
    operator = Operator(layout, 4, 1, PerDisplacement(4), PerDisplacement(4), PerDisplacement(4))
    assert num_groups(layout) == 2
    first, second = dealt_out(operator, 2)
    assert (first.value_rows, first.key_rows) == ((0, 1), (0,))
    # Row 2 of the key table has no links: it goes to who has the fewest.
    assert (second.value_rows, second.key_rows) == ((2,), (1, 2))


def test_the_share_as_a_layout_has_its_links_and_its_rows():
    every = [operator for seed in range(60) if not why_not_split(operator := random_operator(seed), 2)]
    assert len(every) > 20
    for share in (share for operator in every for share in shares(operator, 2)):
        found = [(i, j, share.value_rows[v], share.key_rows[k]) for i, j, v, k in links(geometry(share.layout).steps)]
        assert sorted(found) == sorted(links(share.steps))


def test_parameters_are_the_rows_of_the_whole():
    operator = parse_spec("shaw_attention1d:length=5,dim=4,num_heads=2,max_distance=2")
    whole = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in operator.parameters.items()}
    for share in shares(operator, 2):
        own = share.take(whole)
        assert {name: value.shape for name, value in own.items()} == share.parameters
        for name, rows in row_axes(operator).items():
            kept = share.value_rows if rows.side == "value" else share.key_rows
            np.testing.assert_array_equal(own[name], np.take(whole[name], kept, rows.axis))


def test_a_bias_has_its_classes_last():
    operator = Operator(
        presets.translution((3,), 4, 2).layout, 4, 2, PerDisplacement(4), Shared(4), Shared(4),
        relevance=presets.swin_attention((3, 3), 4, 2).relevance,
    )  # fmt: skip
    first, second = shares(operator, 2)
    assert first.parameters["relevance.bias"] == (2, 3)
    assert second.parameters["relevance.bias"] == (2, 2)


@pytest.mark.parametrize(
    ("spec", "world", "words"),
    [
        ("self_attention1d:length=5,dim=4,num_heads=2", 2, "no role differs between displacements"),
        (
            "convolution1d:length=5,in_channels=2,out_channels=2,kernel_size=3,padding=1,padding_mode=reflect",
            2,
            "twice",
        ),
        ("translution1d:length=2,dim=4,num_heads=2", 4, "3 groups of classes for 4 devices"),
    ],
)
def test_what_can_not_be_dealt_out_says_why(spec, world, words):
    with pytest.raises(NotSupported, match=words):
        share_of(parse_spec(spec), 0, world)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_is_one_of_the_world(rank, world):
    with pytest.raises(ValueError, match="world"):
        share_of(parse_spec(TRANSLUTION), rank, world)
