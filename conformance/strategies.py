"""Random operators and inputs, each a function of one integer seed.

Consecutive seeds walk through every layout kind (seed mod 23), relevance (mod 11), value encoder (mod 13) and mask
(mod 7): the moduli share no divisor, so a run of seeds meets all combinations in turn. Everything else is drawn from
``numpy.random.default_rng(seed)``. Sizes stay small (``MAX_LINKS``), so that the loops of the reference backend finish
in moments; a draw that the spec refuses, or that is larger, is drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from translution.geometry import count_links
from translution.spec import (
    BiasTable,
    Boundary,
    Clip,
    Concat,
    Encoder,
    Identity,
    Lattice,
    Layout,
    LogBuckets,
    LowRank,
    LowRankOutput,
    Mean,
    Mixture,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    QuadraticBias,
    Relevance,
    Rotary,
    Shared,
    SlopeBias,
    Softmax,
    SpecError,
    Sum,
    Vectors,
)
from translution.spec.encoders import Pairing

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Rng = np.random.Generator
Array = npt.NDArray[Any]
Drawn = TypeVar("Drawn")

MAX_LINKS = 400
MAX_CLASSES = 200


@dataclass(frozen=True, eq=False)
class Case:
    """One operator with float64 parameters and inputs: x [.., Nq, Cq], y [.., Nk, Ck] or None, mask or None."""

    operator: Operator
    params: dict[str, Array]
    x: Array
    y: Array | None
    mask: Array | None
    seed: int

    def __repr__(self) -> str:
        shown = None if self.mask is None else (self.mask.dtype.name, self.mask.shape)
        y = None if self.y is None else self.y.shape
        return f"random_case({self.seed}): {self.operator}, x {self.x.shape}, y {y}, mask {shown}"


def _pick(rng: Rng, options: Sequence[Drawn]) -> Drawn:
    return options[int(rng.integers(len(options)))]


def _some(rng: Rng, share: float = 0.5) -> bool:
    return bool(rng.random() < share)


def _grid(rng: Rng, rank: int | None = None) -> tuple[int, ...]:
    grids: dict[int, list[tuple[int, ...]]] = {
        1: [(1,), (2,), (5,), (7,), (11,)],
        2: [(1, 1), (1, 4), (2, 3), (3, 2), (3, 3), (4, 3), (5, 2)],
        3: [(2, 1, 2), (2, 3, 2), (1, 2, 3)],
    }
    return _pick(rng, grids[rank or _pick(rng, (1, 1, 2, 2, 2, 3))])


def _sizes(rng: Rng, rank: int, options: Sequence[int]) -> tuple[int, ...]:
    return tuple(_pick(rng, options) for _ in range(rank))


def _window(rng: Rng, boundary: Boundary, **more: Any) -> Lattice:
    """A window of any size, dilation and padding over key and query grids that may differ."""
    keys = _grid(rng)
    rank = len(keys)
    settings: dict[str, Any] = {
        "key_grid": keys if _some(rng) else None,
        "kernel_size": _sizes(rng, rank, (1, 2, 3, 3)),
        "dilation": _sizes(rng, rank, (1, 1, 2)),
        "padding": _sizes(rng, rank, (0, 1, 2)) if _some(rng, 0.7) else None,
        "registers": _pick(rng, (0, 0, 0, 1, 2)),
    }
    return Lattice(_grid(rng, rank) if settings["key_grid"] else keys, boundary=boundary, **(settings | more))


def _shift(rng: Rng) -> Lattice:
    size, step = _pick(rng, ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2)))
    extents = _sizes(rng, _pick(rng, (1, 2)), (size * step, size * step + 1, size * step + 2))
    causal = tuple(_some(rng, 0.3) for _ in extents)
    return Lattice(
        extents, kernel_size=size, dilation=step, boundary="shift", causal=causal, registers=_pick(rng, (0, 1))
    )


def _strided(rng: Rng) -> Lattice:
    rank = _pick(rng, (1, 2))
    return _window(
        rng,
        _pick(rng, ("absent", "zeros")),
        key_grid=_sizes(rng, rank, (3, 5)),
        kernel_size=_sizes(rng, rank, (1, 2, 3)),
        dilation=1,
        padding=_sizes(rng, rank, (0, 1)),
        stride=_sizes(rng, rank, (2, 3)),
    )


def _transposed(rng: Rng) -> Lattice:
    rank = _pick(rng, (1, 2))
    keys, step, size = _sizes(rng, rank, (2, 3)), _sizes(rng, rank, (1, 2, 3)), _sizes(rng, rank, (1, 2, 3))
    grid = tuple((n - 1) * s + k for n, s, k in zip(keys, step, size, strict=True))
    return Lattice(grid, key_grid=keys, key_stride=step, kernel_size=size, padding=tuple(k - 1 for k in size))


def _dead_rows(rng: Rng) -> Lattice:
    """A window that misses the keys of some queries, or of all."""
    offset = _pick(rng, (-9, -2, 2, 3, 40))
    return Lattice((5,), key_grid=(4,), kernel_size=3, offset=offset, registers=_pick(rng, (0, 0, 1)))


def _graph(rng: Rng) -> PairTable:
    """Classes of ordered pairs with a support that is its own mirror image; a token may be cut off."""
    n, count = _pick(rng, (1, 3, 5)), _pick(rng, (1, 2, 4))
    linked = rng.random((n, n)) < 0.7
    classes = np.where(linked | linked.T, rng.integers(0, count, (n, n)), -1)
    if n > 1 and _some(rng):
        classes[0, :] = classes[:, 0] = -1
    return PairTable(tuple(map(tuple, classes.tolist())), count)


def _cross_graph(rng: Rng) -> PairTable:
    n, m, count = _pick(rng, (1, 3, 4)), _pick(rng, (2, 5)), _pick(rng, (2, 3))
    linked = rng.random((n, m)) < 0.7
    first, second = (np.where(linked, rng.integers(0, count, (n, m)), -1) for _ in range(2))
    return PairTable(tuple(map(tuple, first.tolist())), count, tuple(map(tuple, second.tolist())))


def _cross_grid(rng: Rng) -> Lattice:
    rank = _pick(rng, (1, 2))
    return Lattice(
        _grid(rng, rank),
        key_grid=_grid(rng, rank),
        offset=_sizes(rng, rank, (-1, 0, 2)),
        stride=_sizes(rng, rank, (1, 2)),
        key_stride=_sizes(rng, rank, (1, 1, 3)),
        causal=_pick(rng, (False, True)),
        registers=_pick(rng, (0, 1)),
    )


_LAYOUTS: tuple[Callable[[Rng], Layout], ...] = (
    lambda rng: Lattice((1,) * _pick(rng, (1, 2, 3)), registers=_pick(rng, (0, 0, 1))),
    lambda rng: Lattice((_pick(rng, (2, 7, 11, 13)),)),
    lambda rng: Lattice(_grid(rng, 2)),
    lambda rng: Lattice(_grid(rng, 2), registers=_pick(rng, (1, 2, 3))),
    lambda rng: Lattice(_grid(rng, 1), causal=True, registers=_pick(rng, (0, 1, 2))),
    lambda rng: Lattice(_grid(rng, 2), causal=True, registers=_pick(rng, (0, 1, 2))),
    lambda rng: Lattice(_grid(rng, 2), causal=_pick(rng, ((True, False), (False, True), (True, True))), registers=1),
    lambda rng: _window(rng, "absent"),
    lambda rng: _window(rng, "zeros"),
    lambda rng: _window(rng, "zeros", kernel_size=2, padding=4, dilation=1),
    lambda rng: _window(rng, "circular"),
    lambda rng: _window(rng, "reflect", padding=1),
    lambda rng: _window(rng, "replicate"),
    _shift,
    lambda rng: Lattice(_grid(rng), boundary="circular", registers=_pick(rng, (0, 1))),
    lambda rng: Lattice(
        _grid(rng), far=Clip(_pick(rng, (0, 1, 2))), causal=_some(rng, 0.3), registers=_pick(rng, (0, 1))
    ),
    lambda rng: Lattice(
        (_pick(rng, (7, 11, 13)),), far=LogBuckets(*_pick(rng, ((2, 4), (4, 9)))), causal=_some(rng, 0.3)
    ),
    _graph,
    _cross_graph,
    _cross_grid,
    _strided,
    _transposed,
    _dead_rows,
)

_RELEVANCES: tuple[Relevance, ...] = (
    Softmax(),
    Softmax(scale=0.3),
    Softmax(bias=BiasTable()),
    Softmax(bias=SlopeBias()),
    Softmax(scale=-1.0, bias=QuadraticBias()),
    Softmax(content=False, bias=BiasTable()),
    Ones(),
    Mean(),
    Mixture(Softmax(), Softmax(content=False, bias=QuadraticBias())),
    Mixture(Softmax(scale=0.5, bias=BiasTable()), Softmax(bias=BiasTable())),
    Mixture(Ones(), Softmax()),
)

_KINDS = (
    "identity", "shared", "displacement", "low rank", "inner", "vectors", "head vectors",
    "sum", "concat", "grouped shared", "grouped displacement", "nested", "biased identity",
)  # fmt: skip


def _groups(rng: Rng, inputs: int, features: int) -> int:
    return _pick(rng, [g for g in range(1, inputs + 1) if inputs % g == 0 and features % g == 0][-2:])


def _encoder(rng: Rng, kind: str, features: int, inputs: int, heads: int) -> Encoder:
    """An encoder of that kind without rotation; where the kind can't have so many features, a Shared one."""
    match kind:
        case "identity" if inputs == features:
            return Identity()
        case "biased identity" if inputs == features:
            return Identity(bias=True)
        case "displacement":
            return PerDisplacement(features, bias=_some(rng))
        case "grouped shared":
            return Shared(features, bias=_some(rng), groups=_groups(rng, inputs, features))
        case "grouped displacement":
            return PerDisplacement(features, bias=_some(rng), groups=_groups(rng, inputs, features))
        case "low rank":
            return LowRank(_pick(rng, (1, 2, 5)), features)
        case "inner":
            return LowRank(features)
        case "vectors":
            return Vectors(features)
        case "head vectors":
            return Vectors(features, shared_heads=True)
        case "sum":
            chosen = (_pick(rng, _KINDS[:7]) for _ in range(_pick(rng, (1, 2, 3))))
            return Sum(tuple(_encoder(rng, part, features, inputs, heads) for part in chosen))
        case "concat" | "nested" if features > heads:
            kinds = (*_KINDS[:8], "concat") if kind == "nested" else _KINDS[:7]
            first = heads * int(rng.integers(1, features // heads))
            sizes = (first, features - first)
            return Concat(tuple(_encoder(rng, _pick(rng, kinds), size, inputs, heads) for size in sizes))
        case _:
            return Shared(features, bias=_some(rng))


def _rotated(rng: Rng, encoder: Encoder, features: int, inputs: int, heads: int, layout: Layout) -> Encoder:
    """The encoder rotated as a whole, or joined with a rotated part, where positions and widths allow it."""
    if not isinstance(layout, Lattice) or features % (2 * layout.rank * heads):
        return encoder
    base, pairing = _pick(rng, (10000.0, 3.0)), _pick(rng, get_args(Pairing))
    if _some(rng):
        return Rotary(encoder, base, pairing)
    part = _encoder(rng, _pick(rng, ("shared", "displacement", "sum")), 2 * layout.rank * heads, inputs, heads)
    rest = features - 2 * layout.rank * heads
    rotated = Rotary(part, base, pairing)
    return Concat((rotated, Shared(rest))) if rest else rotated


def _draw_operator(rng: Rng, seed: int) -> Operator:
    layout = _LAYOUTS[seed % len(_LAYOUTS)](rng)
    if layout.num_classes > MAX_CLASSES or count_links(layout) > MAX_LINKS:
        raise SpecError("L1", "a large layout", "random layouts are small", "Draw again")
    relevance = _RELEVANCES[seed % len(_RELEVANCES)]
    heads = _pick(rng, (1, 2, 3))
    dim = _pick(rng, (1, 2, 3, 4, 5, 6, 2 * heads))
    key_dim = None if layout.is_self and _some(rng, 0.7) else _pick(rng, (1, 3, 4, 2 * heads))
    inputs = dim if key_dim is None else key_dim
    kind = _KINDS[seed % len(_KINDS)]
    features = inputs if "identity" in kind and inputs % heads == 0 else heads * _pick(rng, (1, 2, 3))
    value = _encoder(rng, kind, features, inputs, heads)
    settings: dict[str, Any] = {}
    if any(isinstance(part, Softmax) and part.content for part in _parts(relevance)):
        width = heads * _pick(rng, (1, 2, 3, 4, 6))
        for role, channels in (("query", dim), ("key", inputs)):
            found = _encoder(rng, _pick(rng, _KINDS), width, channels, heads)
            settings[role] = _rotated(rng, found, width, channels, heads, layout) if _some(rng, 0.35) else found
    out = _pick(rng, (1, 3, features))
    grouped = Shared(out, groups=_groups(rng, features, out))
    plain = (None, Identity(), Identity(bias=True), Shared(out), Shared(out, bias=True), grouped)
    uplift = LowRankOutput(heads, out, bias=_some(rng))
    output = uplift if features > heads and _some(rng, 0.2) else _pick(rng, plain)
    return Operator(
        layout, dim, heads, value, relevance=relevance, output=output, key_dim=key_dim,
        output_scale=_pick(rng, (1.0, 1.0, 0.5, -2.0)), **settings,
    )  # fmt: skip


def _parts(relevance: Relevance) -> tuple[Softmax | Ones | Mean, ...]:
    return (relevance.first, relevance.second) if isinstance(relevance, Mixture) else (relevance,)


def _operator_from(rng: Rng, seed: int) -> Operator:
    while True:
        try:
            return _draw_operator(rng, seed)
        except SpecError:
            # A relevance that no draw of this layout kind can have (slopes on a graph) moves on to the next one.
            seed += len(_LAYOUTS) * len(_KINDS) * int(rng.integers(2))


def random_operator(seed: int) -> Operator:
    """An operator with at most ``MAX_LINKS`` links, the same for the same seed."""
    return _operator_from(np.random.default_rng(seed), seed)


def _random_mask(rng: Rng, operator: Operator, batch: tuple[int, ...], kind: int) -> Array | None:
    """No mask (three of seven kinds), key padding, bool per head, float with -inf, float over queries and keys."""
    layout = operator.layout
    queries, keys, heads = layout.num_queries, layout.num_keys, operator.num_heads
    softmax = all(isinstance(part, Softmax) for part in _parts(operator.relevance))
    if kind < 3:
        return None
    if kind == 3:
        return np.asarray(rng.random((*batch, 1, 1, keys)) < 0.6)
    shape = (
        *(_pick(rng, (1, n)) for n in batch),
        _pick(rng, (1, heads)),
        _pick(rng, (1, queries)),
        _pick(rng, (1, keys)),
    )
    if kind == 4:
        shape = (*batch, heads, queries, keys)
    elif kind == 5:
        shape = (queries, keys)
    live = rng.random(shape) < 0.6
    if shape[-2] == queries:
        live[..., -1, :] = False
    if not softmax or _some(rng, 0.4):
        return np.asarray(live)
    return np.where(live, rng.standard_normal(shape), -np.inf)


def random_case(seed: int, *, integers: bool = False) -> Case:
    """An operator, parameters, tokens and a mask, whose rows may be dead. ``integers`` draws values from -3 to 3."""
    rng = np.random.default_rng(seed)
    operator = _operator_from(rng, seed)
    batch = (0,) if _some(rng, 0.04) else _pick(rng, ((), (1,), (2,), (2,), (3,), (2, 2)))

    def values(shape: tuple[int, ...], size: float) -> Array:
        if integers:
            return rng.integers(-3, 4, shape).astype(np.float64)
        return size * rng.standard_normal(shape)

    def fan_in(name: str, shape: tuple[int, ...]) -> float:
        matrix = name.rsplit(".", 1)[-1] in ("weight", "table", "down", "up") and not name.startswith("relevance")
        return float(shape[-2]) ** -0.5 if matrix else 0.5

    params = {name: values(shape, fan_in(name, shape)) for name, shape in operator.parameters.items()}
    layout = operator.layout
    x = values((*batch, layout.num_queries, operator.dim), 1.0)
    alone = layout.is_self and operator.keys_dim == operator.dim and _some(rng, 0.8)
    y = None if alone else values((*batch, layout.num_keys, operator.keys_dim), 1.0)
    return Case(operator, params, x, y, _random_mask(rng, operator, batch, seed % 7), seed)


def cases(*, integers: bool = False) -> SearchStrategy[Case]:
    """Hypothesis strategy: any case, by its seed."""
    from hypothesis import strategies

    return strategies.integers(0, 2**32 - 1).map(lambda seed: random_case(seed, integers=integers))
