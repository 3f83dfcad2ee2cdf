"""Layouts of every kind, drawn small enough for the loops of the reference backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.geometry import count_links
from translution.spec import Boundary, Clip, Lattice, Layout, LogBuckets, PairTable, SpecError

Drawn = TypeVar("Drawn")

MAX_LINKS = 400
MAX_CLASSES = 200
TRIES = 40

_GRIDS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,), (2,), (5,), (7,), (11,)),
    2: ((1, 1), (1, 4), (2, 3), (3, 2), (3, 3), (4, 3), (5, 2)),
    3: ((2, 1, 2), (2, 3, 2), (1, 2, 3)),
    4: ((1, 2, 1, 2), (2, 1, 3, 1)),
}


def in_turn(options: Sequence[Drawn], modulus: int) -> tuple[Drawn, ...]:
    """The options, repeated to ``modulus`` entries: walks of moduli without a common divisor meet in all pairs."""
    return tuple(options[n % len(options)] for n in range(max(modulus, len(options))))


def _grid(draws: Draws, rank: int | None = None) -> tuple[int, ...]:
    return draws.pick(_GRIDS[rank or draws.pick((1, 1, 2, 2, 2, 2, 3))])


def _sizes(draws: Draws, rank: int, options: Sequence[int]) -> tuple[int, ...]:
    return tuple(draws.pick(options) for _ in range(rank))


def _single(draws: Draws) -> Layout:
    return Lattice((1,) * draws.pick((1, 2, 3)), registers=draws.pick((0, 0, 1)))


def _line(draws: Draws) -> Layout:
    return Lattice((draws.pick((2, 7, 11, 13)),))


def _any_grid(draws: Draws) -> Layout:
    return Lattice(_grid(draws, draws.pick((2, 2, 2, 2, 3, 4))))


def _registers(draws: Draws) -> Layout:
    return Lattice(_grid(draws, 2), registers=draws.pick((1, 2, 3)))


def _causal_line(draws: Draws) -> Layout:
    return Lattice(_grid(draws, 1), causal=True, registers=draws.pick((0, 1, 2)))


def _causal_grid(draws: Draws) -> Layout:
    return Lattice(_grid(draws, draws.pick((2, 2, 2, 3))), causal=True, registers=draws.pick((0, 1, 2)))


def _causal_axes(draws: Draws) -> Layout:
    flags = draws.pick(((True, False), (False, True), (True, True)))
    return Lattice(_grid(draws, 2), causal=flags, registers=draws.pick((0, 1)))


def _window(boundary: Boundary, **fixed: Any) -> Callable[[Draws], Layout]:
    """A window of any size, dilation and padding over key and query grids that may differ."""

    def draw(draws: Draws) -> Layout:
        keys = _grid(draws)
        rank = len(keys)
        settings: dict[str, Any] = {"boundary": boundary}
        across = draws.some()
        settings["key_grid"] = keys if across else None
        settings["kernel_size"] = _sizes(draws, rank, (1, 2, 3, 3))
        settings["dilation"] = _sizes(draws, rank, (1, 1, 2))
        settings["padding"] = _sizes(draws, rank, (0, 1, 1, 2, -1)) if draws.some(0.7) else None
        settings["registers"] = draws.pick((0, 0, 0, 1, 2))
        if boundary in ("absent", "zeros") and draws.some(0.2):
            settings["causal"] = draws.pick((True, tuple(axis == rank - 1 for axis in range(rank))))
        return Lattice(_grid(draws, rank) if across else keys, **(settings | fixed))

    return draw


def _shift(draws: Draws) -> Layout:
    size, step = draws.pick(((1, 1), (2, 1), (3, 1), (2, 2), (3, 2)))
    extents = _sizes(draws, draws.pick((1, 2, 2)), (size * step, size * step + 1, size * step + 2))
    causal = tuple(draws.some(0.3) for _ in extents)
    return Lattice(
        extents, kernel_size=size, dilation=step, boundary="shift", causal=causal, registers=draws.pick((0, 1))
    )


def _circular(draws: Draws) -> Layout:
    return Lattice(_grid(draws), boundary="circular", registers=draws.pick((0, 1)))


def _clip(draws: Draws) -> Layout:
    """Far displacements share a class; where windows with a stride of 2 do, that of their neighbours overlap."""
    kernel = 3 if draws.some(0.2) else None
    if draws.some(0.2):
        grid = _grid(draws, draws.pick((1, 2)))
        keys = tuple(2 * extent + 1 for extent in grid)
        return Lattice(grid, key_grid=keys, kernel_size=3, stride=2, padding=draws.pick((0, 1)), far=Clip(0))
    return Lattice(
        _grid(draws),
        far=Clip(draws.pick((0, 1, 2))),
        causal=draws.some(0.3),
        kernel_size=kernel,
        registers=draws.pick((0, 1)),
    )


def _log_buckets(draws: Draws) -> Layout:
    if draws.some(0.25):
        # Four buckets beyond the exact ones, each twice as far as the last, and displacements where they begin.
        return Lattice((2,), key_grid=(40,), far=LogBuckets(8, 64), offset=draws.pick((0, 39)))
    grid = draws.pick(((7,), (11,), (13,), (2, 7)))
    return Lattice(grid, far=LogBuckets(*draws.pick(((2, 4), (4, 9)))), causal=draws.some(0.3))


def _graph(draws: Draws) -> Layout:
    """Classes of ordered pairs with a support that is its own mirror image; a token may be cut off."""
    n, count = draws.pick((1, 3, 5)), draws.pick((1, 2, 4))
    cut, generator = n > 1 and draws.some(), draws.generator()
    linked = generator.random((n, n)) < 0.7
    classes = np.where(linked | linked.T, generator.integers(0, count, (n, n)), -1)
    if cut:
        classes[0, :] = classes[:, 0] = -1
    return PairTable(tuple(map(tuple, classes.tolist())), count)


def _cross_graph(draws: Draws) -> Layout:
    n, m, count = draws.pick((1, 3, 4)), draws.pick((2, 5)), draws.pick((2, 3))
    generator = draws.generator()
    linked = generator.random((n, m)) < 0.7
    first, second = (np.where(linked, generator.integers(0, count, (n, m)), -1) for _ in range(2))
    return PairTable(tuple(map(tuple, first.tolist())), count, tuple(map(tuple, second.tolist())))


def _cross_grid(draws: Draws) -> Layout:
    rank = draws.pick((1, 2, 2))
    return Lattice(
        _grid(draws, rank),
        key_grid=_grid(draws, rank),
        offset=_sizes(draws, rank, (0, -1, 2)),
        stride=_sizes(draws, rank, (1, 2)),
        key_stride=_sizes(draws, rank, (1, 1, 3)),
        causal=draws.pick((False, True)),
        registers=draws.pick((0, 1)),
    )


def _strided(draws: Draws) -> Layout:
    rank = draws.pick((1, 2, 2))
    return Lattice(
        _grid(draws, rank),
        boundary=draws.pick(("absent", "zeros")),
        key_grid=_sizes(draws, rank, (3, 5)),
        kernel_size=_sizes(draws, rank, (1, 2, 3)),
        padding=_sizes(draws, rank, (0, 1)),
        stride=_sizes(draws, rank, (2, 3)),
        registers=draws.pick((0, 0, 0, 1)),
    )


def _transposed(draws: Draws) -> Layout:
    rank = draws.pick((1, 2, 2))
    keys, step, size = (_sizes(draws, rank, options) for options in ((2, 3), (1, 2, 3), (1, 2, 3)))
    grid = tuple((n - 1) * s + k for n, s, k in zip(keys, step, size, strict=True))
    return Lattice(grid, key_grid=keys, key_stride=step, kernel_size=size, padding=tuple(k - 1 for k in size))


def _dead_rows(draws: Draws) -> Layout:
    """A window that misses the keys of some queries, or of all."""
    offset = draws.pick((2, 3, -2, -9, 40))
    return Lattice((5,), key_grid=(4,), kernel_size=3, offset=offset, registers=draws.pick((0, 0, 1)))


_KINDS: dict[str, Callable[[Draws], Layout]] = {
    "single": _single,
    "line": _line,
    "grid": _any_grid,
    "registers": _registers,
    "causal-line": _causal_line,
    "causal-grid": _causal_grid,
    "causal-axes": _causal_axes,
    "window": _window("absent"),
    "window-zeros": _window("zeros"),
    "window-wide-padding": _window("zeros", kernel_size=2, padding=4, dilation=1),
    "window-circular": _window("circular"),
    "window-reflect": _window("reflect", padding=1),
    "window-replicate": _window("replicate"),
    "shift": _shift,
    "circular": _circular,
    "clip": _clip,
    "log-buckets": _log_buckets,
    "graph": _graph,
    "cross-graph": _cross_graph,
    "cross-grid": _cross_grid,
    "strided": _strided,
    "transposed": _transposed,
    "dead-rows": _dead_rows,
}

LAYOUT_KINDS: tuple[str, ...] = tuple(_KINDS)
# Their queries and keys are never the same tokens, or seldom.
CROSS_KINDS = frozenset({"cross-graph", "cross-grid", "strided", "transposed", "dead-rows"})


def draw_layout(
    draws: Draws, *, kinds: Sequence[str] | None = None, accepted: Callable[[Layout], bool] | None = None
) -> Layout:
    """A layout of one of the kinds, taken in turn, with at most ``MAX_LINKS`` links, that is ``accepted``."""
    build = _KINDS[draws.walk(in_turn(kinds or LAYOUT_KINDS, len(LAYOUT_KINDS)))]
    for _ in range(TRIES):
        try:
            layout = build(draws)
        except SpecError:
            continue
        if layout.num_classes > MAX_CLASSES or count_links(layout) > MAX_LINKS:
            continue
        if accepted is None or accepted(layout):
            return layout
    return draws.reject(f"no such layout in {TRIES} tries")
