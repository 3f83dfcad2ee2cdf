"""The links of a layout, derived twice: by the reference's loops and as index arrays by `translution.geometry`."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from translution.backends.reference.support import position, support
from translution.geometry import geometry
from translution.spec import Clip, Lattice, Layout, LogBuckets, PairTable, SpecError

WIDEST = {1: 9, 2: 4, 3: 3}


@st.composite
def lattices(draw: st.DrawFn) -> Lattice:
    rank = draw(st.integers(1, 3))
    axes = lambda least, most: st.tuples(*[st.integers(least, most)] * rank)  # noqa: E731
    window = draw(st.sampled_from(("none", "wrapped", "shift", "window", "window", "window")))
    grid = draw(axes(1, WIDEST[rank]))
    fields: dict[str, Any] = {"grid": grid, "registers": draw(st.integers(0, 2))}
    if draw(st.booleans()):
        fields["causal"] = draw(st.one_of(st.just(True), st.tuples(*[st.booleans()] * rank)))
    if draw(st.booleans()):
        fields["far"] = draw(st.sampled_from((Clip(0), Clip(1), LogBuckets(2, 3), LogBuckets(3, 4), LogBuckets(4, 9))))
    if window == "wrapped":
        return build({**fields, "boundary": "circular", "causal": False})
    if window == "shift":
        # Sizes that fit, so that even ones and dilated ones are seen often.
        dilation = tuple(draw(st.integers(1, n)) for n in grid)
        size = tuple(draw(st.integers(1, n // d)) for n, d in zip(grid, dilation, strict=True))
        causal = fields.get("causal", False)
        flags = (True,) * rank if causal is True else causal
        return build({**fields, "boundary": "shift", "kernel_size": size, "dilation": dilation, "causal": flags})
    if draw(st.booleans()):
        fields |= {"key_grid": draw(axes(1, WIDEST[rank])), "stride": draw(axes(1, 3)), "offset": draw(axes(-3, 3))}
    if window == "none":
        return build({**fields, "key_stride": draw(axes(1, 2))})
    boundary = draw(st.sampled_from(("absent", "absent", "zeros", "circular", "reflect", "replicate")))
    if boundary == "absent":
        fields["key_stride"] = draw(axes(1, 2))
    if boundary in ("circular", "reflect"):
        fields["causal"] = False
    fields |= {"boundary": boundary, "kernel_size": draw(axes(1, 4 if rank < 3 else 2)), "dilation": draw(axes(1, 3))}
    if draw(st.booleans()):
        fields["padding"] = draw(axes(-2, 7))
    return build(fields)


def build(fields: dict[str, Any]) -> Lattice:
    try:
        return Lattice(**fields)
    except SpecError:
        reject()


@st.composite
def pair_tables(draw: st.DrawFn) -> PairTable:
    queries, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    entries = lambda: [[draw(st.integers(0, 3)) for _ in range(keys)] for _ in range(queries)]  # noqa: E731
    absent = [[draw(st.booleans()) for _ in range(keys)] for _ in range(queries)]
    hide = lambda rows: tuple(  # noqa: E731
        tuple(-1 if gone else c for c, gone in zip(*pair, strict=True)) for pair in zip(rows, absent, strict=True)
    )
    return PairTable(hide(entries()), 4, hide(entries()))


def assert_same_links(layout: Layout) -> None:
    arrays = geometry(layout)
    theirs = Counter(
        zip(
            *(a.tolist() for a in (arrays.query_index, arrays.key_index, arrays.value_class, arrays.key_class)),
            strict=True,
        )
    )
    ours = Counter(
        (i, layout.num_keys if link.key is None else link.key, link.value_row, link.key_row)
        for i in range(layout.num_queries)
        for link in support(layout, i)
    )
    assert ours == theirs


@settings(max_examples=600, deadline=None)
@given(lattices())
def test_lattice_has_the_same_links(layout: Lattice) -> None:
    assert_same_links(layout)


@settings(max_examples=100, deadline=None)
@given(pair_tables())
def test_pair_table_has_the_same_links(layout: PairTable) -> None:
    assert_same_links(layout)


def test_pair_table_without_key_classes_is_seen_from_the_other_side() -> None:
    layout = PairTable(((0, 1), (2, -1)), 3)
    assert_same_links(layout)
    assert [(link.value_row, link.key_row) for link in support(layout, 0)] == [(0, 0), (1, 2)]


@settings(max_examples=200, deadline=None)
@given(lattices())
def test_displacements_and_positions_agree(layout: Lattice) -> None:
    arrays = geometry(layout)
    for i in range(layout.num_queries):
        for link in support(layout, i):
            delta = link.displacement
            if layout.far is not None and delta is not None:
                continue
            size, square = (0, 0) if delta is None else (sum(map(abs, delta)), sum(d * d for d in delta))
            assert arrays.distances[link.value_row] == size
            features = [0] * layout.rank if delta is None else [-d for d in delta]
            assert arrays.quadratic_features[link.value_row].tolist() == [*features, square]
    for side, count in (("query", layout.num_queries), ("key", layout.num_keys)):
        # One angle per axis with frequency 1: the angles are the positions.
        angles = arrays.rotary_angles(side, 2 * layout.rank, 10.0)
        ours = [position(layout, side, token) or (0,) * layout.rank for token in range(count)]
        assert np.array_equal(angles, np.array(ours))


@pytest.mark.parametrize(
    ("layout", "query", "keys"),
    [
        # delta = query - key; taps at displacements 1, 0, -1.
        (Lattice((4,), kernel_size=3), 0, {0: 0, 1: -1}),
        (Lattice((4,), kernel_size=3, boundary="circular"), 0, {3: 1, 0: 0, 1: -1}),
        (Lattice((5,), kernel_size=3, boundary="shift"), 0, {0: 0, 1: -1, 2: -2}),
        (Lattice((5,), kernel_size=3, boundary="shift"), 4, {2: 2, 3: 1, 4: 0}),
        # An even window has one more key before the query, and moves only where it would leave the grid.
        (Lattice((5,), kernel_size=2, boundary="shift"), 2, {1: 1, 2: 0}),
        (Lattice((5,), kernel_size=2, boundary="shift"), 0, {0: 0, 1: -1}),
        (Lattice((6,), kernel_size=3, dilation=2, boundary="shift"), 5, {1: 4, 3: 2, 5: 0}),
        (Lattice((6,), kernel_size=3, dilation=2, boundary="shift", causal=True), 2, {0: 2, 2: 0}),
        (Lattice((3,), causal=True), 1, {0: 1, 1: 0}),
        (Lattice((2,), key_grid=(4,), stride=2, kernel_size=2, padding=0), 1, {2: 0, 3: -1}),
        (Lattice((4,), key_grid=(2,), key_stride=2, kernel_size=3, padding=1), 1, {0: 1, 1: -1}),
        (Lattice((1,), key_grid=(3,), offset=2, causal=True), 0, {0: 2, 1: 1, 2: 0}),
        (Lattice((4,), boundary="circular"), 0, {0: 0, 1: -1, 2: -2, 3: 1}),
    ],
)
def test_small_layouts_by_hand(layout: Lattice, query: int, keys: dict[int, int]) -> None:
    found = {link.key: (link.displacement or (None,))[0] for link in support(layout, query)}
    assert found == keys


def test_padded_keys_by_hand() -> None:
    seen = {
        boundary: [link.key for link in support(Lattice((3,), kernel_size=5, boundary=boundary), 0)]
        for boundary in ("absent", "zeros", "reflect", "replicate", "circular")
    }
    assert seen == {
        "absent": [0, 1, 2],
        "zeros": [None, None, 0, 1, 2],
        "reflect": [2, 1, 0, 1, 2],
        "replicate": [0, 0, 0, 1, 2],
        "circular": [1, 2, 0, 1, 2],
    }


def test_raster_order_by_hand() -> None:
    # On 2 x 2 the key (0, 1) comes before the query (1, 0) though its column is larger.
    assert [link.key for link in support(Lattice((2, 2), causal=True), 2)] == [0, 1, 2]
    assert [link.key for link in support(Lattice((2, 2), causal=(True, True)), 2)] == [0, 2]


def test_register_rows_by_hand() -> None:
    # Rows of 1-D, 2 tokens: delta -1, 0, 1; then (query, key) = (reg, reg), (grid, reg), (reg, grid).
    layout = Lattice((2,), registers=1)
    rows = [[(link.key, link.value_row, link.key_row) for link in support(layout, i)] for i in range(3)]
    assert rows == [
        [(0, 3, 3), (1, 5, 5), (2, 5, 5)],
        [(0, 4, 4), (1, 1, 1), (2, 0, 2)],
        [(0, 4, 4), (1, 2, 0), (2, 1, 1)],
    ]
