"""Laws that read the index arithmetic out of a result: tokens and tables carry names, and the result shows which met.

Everything is exact: small whole numbers, and logits so far apart that the highest takes all. What must be seen follows
from :mod:`translution.conformance.laws.positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import FloatArray, Question
from translution.conformance.laws.positions import links
from translution.conformance.strategies import draw_layout
from translution.spec import (
    BiasTable,
    Boundary,
    Encoder,
    Lattice,
    Layout,
    Ones,
    Operator,
    PerDisplacement,
    QuadraticBias,
    Shared,
    SlopeBias,
    Softmax,
    Vectors,
)

# exp(-STEP) is nothing beside 1/4, the smallest weight that is read, in any dtype, 400 times over.
STEP = 64.0
# Whole numbers up to here are exact in bfloat16.
EXACT = 256
GRIDS = ("grid", "window", "strided", "cross-grid", "transposed", "line", "dead-rows", "window-zeros")
BOUNDARIES = (
    "window-zeros", "window-circular", "window-reflect", "window-replicate", "shift", "circular", "window-wide-padding",
)  # fmt: skip


def trace_value(trial: Trial, layout: Layout, *, weights: bool = False, biased: bool | None = None) -> None:
    """Batch item n holds one token that is not 0, key n, and the row of every class holds a code: where query i sees
    key n, the result shows the codes of the classes of all their links. A bias counts the links of i, zero tokens too.
    """
    draws, seen = trial.draws, links(layout)
    heads, dim, added = draws.pick((2, 1, 3)), draws.pick((1, 2, 3)), draws.some(0.3)
    biased = added if biased is None else biased
    shown, alone, generator = weights and draws.some(0.3), draws.some(), draws.generator()
    features = 2 * heads
    codes = generator.integers(-9, 10, (layout.num_classes, dim, features)).astype(np.float64)
    for head in range(heads):  # one feature of each head tells every row from every other
        for channel in range(dim):
            order = generator.permutation(layout.num_classes) - layout.num_classes // 2
            codes[:, channel, 2 * head] = order + (order >= 0)
    params = {"value.table": codes}
    if biased:
        params["value.bias"] = generator.integers(1, 4, features).astype(np.float64)
    tokens = np.zeros((layout.num_keys, layout.num_keys, dim))
    each = np.arange(layout.num_keys)
    tokens[each, each, each % dim] = 1
    want = np.zeros((layout.num_keys, layout.num_queries, features))
    for link in seen:
        if link.key is not None:
            want[link.key, link.query] += codes[link.value_row, link.key % dim]
        want[:, link.query] += params.get("value.bias", 0)
    if np.abs(want).max() > EXACT:
        draws.reject("not exact in every dtype")
    operator = Operator(layout, dim, heads, PerDisplacement(features, bias=biased), relevance=Ones())
    x, y = (tokens, None) if alone else (np.ones((layout.num_keys, layout.num_queries, dim)), tokens)
    got = trial.run(Question(operator, params, x, y, return_weights=shown))
    trial.same("codes [key, query, feature]", got.out, want)
    if shown:
        counts = np.zeros((layout.num_queries, layout.num_keys))
        for link in seen:
            if link.key is not None:
                counts[link.query, link.key] += 1
        trial.same("number of links", got.weights, np.broadcast_to(counts, (layout.num_keys, heads, *counts.shape)))


def winners(logits: FloatArray, names: FloatArray, layout: Layout) -> FloatArray:
    """What each query reads [B, Nq, H] if the highest of the ``logits`` [L, H] takes all: the name of its key, the mean
    of 2 or 4; NaN where the mean is no short binary number. ``names`` [B, Nk + 1] ends with the zero token's.
    """
    seen = links(layout)
    found = np.zeros((len(names), layout.num_queries, logits.shape[1]))
    for i in range(layout.num_queries):
        own = [n for n, link in enumerate(seen) if link.query == i]
        if not own:
            continue
        read = names[:, [layout.num_keys if seen[n].key is None else int(seen[n].key or 0) for n in own]]
        for head in range(logits.shape[1]):
            best = logits[own, head] == logits[own, head].max()
            count = int(best.sum())
            found[:, i, head] = read[:, best].sum(1) / count if count in (1, 2, 4) else np.nan
    return found


def _read(trial: Trial, question: Question, logits: FloatArray, names: FloatArray) -> None:
    want = winners(logits, names, question.operator.layout)
    kept = ~np.isnan(want)
    trial.same("names [item, query, head]", np.where(kept, trial.run(question).out, 0), np.where(kept, want, 0))


def _names(generator: np.random.Generator, layout: Layout) -> tuple[FloatArray, FloatArray]:
    """Two items of tokens (1, name) [2, Nk, 2], and name + 1 of each and of the zero token [2, Nk + 1]."""
    count = layout.num_keys
    names: FloatArray = np.stack([generator.permutation(count) for _ in range(2)]).astype(np.float64) + 1
    tokens: FloatArray = np.stack([np.ones_like(names), names], axis=2)
    read: FloatArray = np.concatenate([names + 1, np.ones((2, 1))], axis=1)
    return tokens, read


def _ranks(generator: np.random.Generator, layout: Layout, heads: int) -> FloatArray:
    """For each head another order of the classes [T, H]: whole numbers around 0, without 0."""
    orders = np.stack([generator.permutation(layout.num_classes) for _ in range(heads)], axis=1)
    centred = orders - layout.num_classes // 2
    return np.asarray(centred + (centred >= 0), np.float64)


def trace_content(trial: Trial, layout: Layout, role: str) -> None:
    """Each class has a rank in the table of queries or of keys, far from the next: every query reads the name of the
    key whose class, seen from that role's side, ranks highest.
    """
    draws, seen = trial.draws, links(layout)
    heads, vectors, generator = draws.pick((2, 1, 3)), draws.some(0.3), draws.generator()
    ranks = _ranks(generator, layout, heads)
    tokens, names = _names(generator, layout)
    rows = [link.value_row if role == "query" else link.key_row for link in seen]  # queries share the values' rows
    logits = STEP * ranks[rows]
    if role == "key" and not vectors:
        logits[[link.key is None for link in seen]] = 0  # a matrix makes nothing of the zero token
    table: Encoder = Vectors(heads) if vectors else PerDisplacement(heads)
    told = {f"{role}.vectors": STEP * ranks} if vectors else {f"{role}.table": STEP * np.stack([ranks, 0 * ranks], 1)}
    other = "key" if role == "query" else "query"
    params = told | {
        f"{other}.weight": np.zeros((2, heads)),
        f"{other}.bias": np.ones(heads),
        "value.weight": np.stack([np.zeros(heads), np.ones(heads)]),
        "value.bias": np.ones(heads),
    }
    encoders = {role: table, other: Shared(heads, bias=True)}
    operator = Operator(
        layout, 2, heads, Shared(heads, bias=True), encoders["query"], encoders["key"], Softmax(scale=1.0)
    )
    alone = layout.is_self and draws.some()
    x = tokens if alone else np.ones((2, layout.num_queries, 2))
    _read(trial, Question(operator, params, x, None if alone else tokens), logits, names)


def trace_bias(trial: Trial, layout: Layout) -> None:
    """As :func:`trace_content`, with the ranks in the bias: a table, slopes, or a quadratic function of delta."""
    draws, seen = trial.draws, links(layout)
    kinds = (
        ("table", "table", "slopes", "quadratic") if isinstance(layout, Lattice) and layout.far is None else ("table",)
    )
    kind, heads, generator = draws.pick(kinds), draws.pick((2, 1, 3)), draws.generator()
    tokens, names = _names(generator, layout)
    rank = len(layout.grid) if isinstance(layout, Lattice) else 0
    params: dict[str, FloatArray] = {}
    deltas = np.array([link.delta or (0,) * rank for link in seen], np.float64).reshape(len(seen), rank)
    bias: BiasTable | SlopeBias | QuadraticBias
    if kind == "table":
        ranks = _ranks(generator, layout, heads)
        params["relevance.bias"] = STEP * ranks.T
        logits, bias = STEP * ranks[[link.value_row for link in seen]], BiasTable()
    elif kind == "slopes":
        slopes = np.array([-STEP, STEP, -2 * STEP])[:heads]
        logits, bias = -slopes * np.abs(deltas).sum(1, keepdims=True), SlopeBias(tuple(slopes.tolist()))
    else:
        weight = STEP * generator.integers(-1, 2, (heads, rank + 1)).astype(np.float64)
        params["relevance.weight"] = weight
        logits, bias = np.concatenate([-deltas, (deltas**2).sum(1, keepdims=True)], 1) @ weight.T, QuadraticBias()
    params["value.weight"] = np.stack([np.zeros(heads), np.ones(heads)])
    params["value.bias"] = np.ones(heads)
    relevance = Softmax(content=False, bias=bias)
    operator = Operator(layout, 2, heads, Shared(heads, bias=True), relevance=relevance)
    x, y = (tokens, None) if draws.some() else (np.ones((2, layout.num_queries, 2)), tokens)
    _read(trial, Question(operator, params, x, y), logits, names)


_ROLES: tuple[Callable[[Trial, Layout], None], ...] = (
    trace_value,
    lambda trial, layout: trace_content(trial, layout, "query"),
    lambda trial, layout: trace_content(trial, layout, "key"),
    trace_bias,
)


def _any_role(trial: Trial, kinds: Sequence[str], accepted: Callable[[Layout], bool] | None = None) -> None:
    role = trial.draws.walk(_ROLES)
    role(trial, _layout(trial.draws, kinds, accepted))


def _layout(draws: Draws, kinds: Sequence[str], accepted: Callable[[Layout], bool] | None = None) -> Layout:
    def readable(layout: Layout) -> bool:
        return layout.num_classes < 2 * EXACT // 4 and layout.num_keys < EXACT // 4

    return draw_layout(
        draws, kinds=kinds, accepted=lambda found: readable(found) and (accepted is None or accepted(found))
    )


def _causal_window(draws: Draws) -> Lattice:
    """A causal convolution."""
    size, step = draws.pick((2, 3, 4)), draws.pick((1, 2))
    offered: tuple[Boundary, ...] = ("absent", "zeros")
    boundary = draws.pick(offered)
    if draws.some():
        return Lattice((draws.pick((5, 7)),), causal=True, kernel_size=size, dilation=step, boundary=boundary)
    return Lattice((3, 4), causal=(True, False), kernel_size=(size, 3), dilation=(step, 1), boundary=boundary)


_VALUE_TRACER_KILLS = (
    "value-mirrored", "axes-swapped", "rows-descending", "row-wraps", "row-off-by-one", "registers-first",
    "register-blocks-swapped", "register-pairs-transposed", "registers-last", "tokens-column-major",
    "stride-phase", "stride-ignored", "key-stride-ignored", "offset-ignored", "padding-off-by-one",
    "padding-ignored", "window-one-short",
)  # fmt: skip


@law("VALUE-TRACER", clauses=("L1", "L2", "L3", "E5", "R2"), kills=_VALUE_TRACER_KILLS, quick=12, full=40)
def value_tracer(trial: Trial) -> None:
    """With weights 1, one token that is not 0 and a code in every row of the value table, each query's result is the
    code of p(query) - p(key), bit for bit.
    """
    trace_value(trial, _layout(trial.draws, GRIDS))


_QUERY_TRACER_KILLS = (
    "query-mirrored", "query-centre-only", "axes-swapped", "rows-descending", "row-wraps", "row-off-by-one",
    "registers-first", "register-blocks-swapped", "registers-last", "tokens-column-major", "dilation-ignored",
    "stride-phase", "key-stride-ignored", "offset-ignored", "padding-off-by-one", "padding-ignored",
    "window-one-short",
)  # fmt: skip


@law("QUERY-TRACER", clauses=("L1", "L2", "L3", "E5", "E7"), kills=_QUERY_TRACER_KILLS, quick=8, full=32)
def query_tracer(trial: Trial) -> None:
    """With codes in the query table so far apart that one logit takes all, each query reads, bit for bit, the key whose
    displacement p(query) - p(key) has the highest code.
    """
    trace_content(trial, _layout(trial.draws, GRIDS), "query")


_KEY_TRACER_KILLS = (
    "key-mirrored", "axes-swapped", "rows-descending", "row-wraps", "row-off-by-one", "registers-first",
    "register-blocks-swapped", "register-pairs-transposed", "registers-last", "tokens-column-major",
    "stride-phase", "stride-ignored", "key-stride-ignored", "offset-ignored", "padding-off-by-one",
    "padding-ignored", "window-one-short",
)  # fmt: skip


@law("KEY-TRACER", clauses=("L1", "L2", "L3", "E5", "E7"), kills=_KEY_TRACER_KILLS, quick=8, full=32)
def key_tracer(trial: Trial) -> None:
    """With codes in the key table so far apart that one logit takes all, each query reads, bit for bit, the key whose
    displacement p(key) - p(query) has the highest code.
    """
    trace_content(trial, _layout(trial.draws, GRIDS), "key")


_BIAS_TRACER_KILLS = (
    "bias-mirrored", "rows-descending", "bias-sign", "bias-first-head", "slopes-squared",
    "slope-distance-euclidean", "quadratic-sign",
)  # fmt: skip


@law("BIAS-TRACER", clauses=("L3", "R5", "R7"), kills=_BIAS_TRACER_KILLS, quick=12, full=32)
def bias_tracer(trial: Trial) -> None:
    """With biases so far apart that one logit takes all, each query reads, bit for bit, the key of the class with the
    highest bias: from a table, from slopes, from a quadratic function of p(query) - p(key).
    """
    trace_bias(trial, _layout(trial.draws, GRIDS))


_REGISTER_TRACER_KILLS = (
    "value-mirrored", "query-mirrored", "key-mirrored", "bias-mirrored", "registers-first",
    "register-blocks-swapped", "register-pairs-transposed", "registers-last", "registers-not-causal",
)  # fmt: skip


@law("REGISTER-TRACER", clauses=("L6",), kills=_REGISTER_TRACER_KILLS, quick=12, full=40)
def register_tracer(trial: Trial) -> None:
    """Registers stand before the grid; their rows follow those of the grid as (register, register), (grid, register),
    (register, grid), in the tables of every role.
    """
    kinds = ("registers", "causal-grid", "window", "causal-line", "window-zeros")
    _any_role(trial, kinds, lambda found: isinstance(found, Lattice) and found.registers >= 2)


_CAUSAL_TRACER_KILLS = (
    "offset-ignored", "causal-strict", "causal-ignored", "causal-reversed", "causal-by-index", "causal-per-axis",
    "registers-not-causal",
)  # fmt: skip


@law("CAUSAL-TRACER", clauses=("L4", "L6"), kills=_CAUSAL_TRACER_KILLS, quick=12, full=40)
def causal_tracer(trial: Trial) -> None:
    """In a causal layout a query sees exactly the keys that stand at or before it, by position: in raster order, or
    along the flagged axes; a register sees the registers up to itself.
    """
    shift = Lattice((6,), kernel_size=3, boundary="shift", causal=True)
    window = trial.draws.walk((None, _causal_window(trial.draws), None, shift))
    if window is not None:
        return trace_value(trial, window, biased=False)
    kinds = ("causal-grid", "causal-line", "causal-axes", "cross-grid", "shift", "window", "window-zeros")
    return _any_role(trial, kinds, lambda found: isinstance(found, Lattice) and found.causal is not False)


_BOUNDARY_TRACER_KILLS = (
    "circular-as-zeros", "zeros-as-absent", "boundary-clamped", "replicate-as-reflect",
    "boundary-first-axis-only", "reflect-repeats-edge", "circular-long-way", "double-links-once",
    "zero-token-without-bias", "weights-of-zero-tokens",
)  # fmt: skip


@law("BOUNDARY-TRACER", clauses=("L5", "B5"), kills=_BOUNDARY_TRACER_KILLS, quick=21, full=56)
def boundary_tracer(trial: Trial) -> None:
    """Beyond the key grid a query finds what the boundary puts there, with the class of the window position, once for
    each position: the zero token, the continued grid, or the keys of a window that has moved.
    """
    if trial.draws.some(0.6):
        trace_value(trial, _layout(trial.draws, BOUNDARIES), weights=True)
    else:
        _any_role(trial, BOUNDARIES)


@law("FAR-TRACER", clauses=("L7",), kills=("far-dropped", "far-clipped-early", "log-buckets-rounded"), quick=8, full=24)
def far_tracer(trial: Trial) -> None:
    """Displacements that share a label share a row in every table; all others have their own."""
    _any_role(trial, ("clip", "log-buckets"))


_PAIR_TRACER_KILLS = (
    "value-mirrored", "query-mirrored", "key-mirrored", "pair-table-transposed",
)  # fmt: skip


@law("PAIR-TRACER", clauses=("L8",), kills=_PAIR_TRACER_KILLS, quick=8, full=24)
def pair_tracer(trial: Trial) -> None:
    """Pair tables: queries, values and biases take the row classes[i][j], keys the row key_classes[i][j], or
    classes[j][i]; -1 is no link.
    """
    _any_role(trial, ("cross-graph", "graph"))
