"""Laws on small whole numbers: every product and sum is exact in every dtype, so that results are equal bit by bit.

In half precision matrices pick single entries: each row and column has at most one entry, 1 or -1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Answer, FloatArray, Question
from translution.conformance.laws.definition import defined, defined_gradients
from translution.conformance.laws.oracle import spread
from translution.conformance.laws.positions import links
from translution.conformance.strategies import LAYOUT_KINDS, draw_layout, draw_question
from translution.spec import (
    Identity,
    Lattice,
    Layout,
    LowRank,
    Mean,
    Ones,
    Operator,
    PairTable,
    PerDisplacement,
    Relevance,
    Shared,
    Softmax,
)

# Whole numbers up to here are exact; intermediate results may be kept in the dtype, products of tf32 in 11 bits.
LARGEST = {"float64": 2.0**53, "float32": 2.0**24, "tf32": 2.0**11, "float16": 2.0**11, "bfloat16": 2.0**8}
_MATRICES = ("weight", "table", "down", "up")


def partial_permutation(generator: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    """Matrices [.., C, E] with at most one entry in each row and column, 1 or -1."""
    found = np.zeros(shape)
    for index in np.ndindex(shape[:-2]):
        count = min(shape[-2:])
        rows, columns = (generator.permutation(n)[:count] for n in shape[-2:])
        found[(*index, rows, columns)] = generator.choice((-1.0, 1.0), count)
    return found


def _small(generator: np.random.Generator, question: Question, dtype: str) -> Question:
    """The question with whole numbers: from -3 to 3, or fewer in half precision."""
    wide = dtype in ("float64", "float32")

    def numbers(shape: tuple[int, ...]) -> FloatArray:
        return generator.integers(-3 if wide else -1, 4 if wide else 2, shape).astype(np.float64)

    def parameter(name: str, value: FloatArray) -> FloatArray:
        if wide or name.rpartition(".")[2] not in _MATRICES:
            return numbers(value.shape)
        return partial_permutation(generator, value.shape)

    return question.but(
        params={name: parameter(name, np.asarray(value)) for name, value in question.params.items()},
        x=numbers(question.x.shape),
        y=None if question.y is None else numbers(question.y.shape),
        cotangent=None if question.cotangent is None else numbers(question.cotangent.shape),
    )


def _magnitudes(question: Question) -> Question:
    """Sums of absolute values: whatever a sum is made of, in any order, is no larger."""
    return question.but(
        params={name: np.abs(value) for name, value in question.params.items()},
        x=np.abs(question.x),
        y=None if question.y is None else np.abs(question.y),
        cotangent=None if question.cotangent is None else np.abs(question.cotangent),
    )


# Matrices of groups in rows that are met with several rows of the key table; one small matrix for all heads.
_PAIRS = PairTable(((0, 1, 0), (1, 0, 1), (0, 0, 1)), 2, ((0, 1, 1), (1, 0, 0), (1, 0, 1)))
_RARE = (
    Operator(_PAIRS, 4, 2, PerDisplacement(4, groups=2), relevance=Ones()),
    Operator(Lattice((2, 3)), 4, 2, LowRank(3, 4), relevance=Ones()),
)


def _draw(trial: Trial, *, cotangent: bool) -> Question:
    """A question on whole numbers under Ones, exact in the subject's dtype."""
    draws, largest = trial.draws, LARGEST[trial.subject.arithmetic]
    kinds, rare = spread(draws, LAYOUT_KINDS), draws.walk((None, None, None, None, *_RARE))
    drawn = draw_question(draws, trial.dtype, operator=rare, layouts=kinds, relevances=(Ones(),), cotangent=cotangent)
    trial.require_claim(drawn)
    question = _small(draws.generator(), drawn, "float16" if largest < 2.0**24 else trial.dtype)
    # A factor 1/2 costs one binary digit.
    room = largest * min(abs(question.operator.output_scale), 1.0) ** 2
    sums = defined_gradients(_magnitudes(question)) if cotangent else defined(_magnitudes(question))
    if max(float(np.abs(value).max(initial=0)) for value in (sums.out, *sums.gradients.values())) > room:
        draws.reject("not exact in this dtype")
    return question


def _same_gradients(trial: Trial, got: Mapping[str, FloatArray], want: Answer) -> None:
    for name, gradient in want.gradients.items():
        trial.same(f"gradient of {name}", got[name], gradient)


_INTEGERS_KILLS = (
    "ones-ignores-mask", "heads-interleaved", "heads-reversed", "heads-share-weights", "batch-shares-keys",
    "shared-heads-once", "vectors-missing", "sum-first-part-only", "concat-not-per-head", "concat-parts-reversed",
    "low-rank-transposed", "low-rank-first-class", "role-bias-missing", "output-scale-missing",
    "output-scale-after-bias", "output-bias-missing", "ones-normalised",
)  # fmt: skip


@law(
    "INTEGERS",
    clauses=("R2", "M1", "M3", "E1", "E3", "E4", "E5", "E6", "E7", "E8", "E9", "O1", "O2", "O3", "O4", "D2", "D3"),
    kills=_INTEGERS_KILLS,
    quick=12,
    full=40,
)
def integers(trial: Trial) -> None:
    """With weights 1 and small whole numbers for tokens and parameters, the result is the definition's bit for bit."""
    question = _draw(trial, cotangent=False)
    trial.same("out", trial.run(question).out, defined(question).out)


_GRADIENT_TIED_KILLS = (
    "value-detached", "tied-last-wins", "value-gradient-mirrored", "vectors-gradient-missing",
    "output-weight-gradient-missing", "gradient-batch-mean", "gradient-first-batch", "cotangent-ignored",
    "mask-ignored-backward", "dead-row-gradient-nan",
)  # fmt: skip


@law("GRADIENT-TIED", clauses=("M3", "D2", "D3", "B1"), kills=_GRADIENT_TIED_KILLS, quick=12, full=40)
def gradient_tied(trial: Trial) -> None:
    """With weights 1 and small whole numbers, all gradients are the definition's bit for bit: that of a table's row is
    the sum over all links of its class.
    """
    question = _draw(trial, cotangent=True)
    _same_gradients(trial, trial.vjp(question).gradients, defined_gradients(question))


AVERAGED = (
    "window-zeros", "window", "window-circular", "window-replicate", "window-zeros", "window-reflect", "grid", "graph",
    "strided", "registers", "window-wide-padding", "shift", "causal-grid",
)  # fmt: skip


_COUNT_KILLS = (
    "mean-ignores-mask", "mean-over-window", "mean-without-zero-tokens", "softmax-over-queries", "softmax-unnormalised",
    "mask-inverted", "bool-mask-added", "mask-first-head", "mask-first-batch", "mask-first-query", "mask-transposed",
    "mask-first-link-only", "mask-after-softmax", "zero-token-masked", "zeros-as-absent", "absent-as-zeros",
    "double-links-once", "shift-cut-at-border", "dead-row-nan", "dead-row-mean", "tail-keys-dropped",
    "tail-rows-dropped",
)  # fmt: skip


@law("COUNT", clauses=("R1", "R3", "L5", "M1", "M3"), kills=_COUNT_KILLS, quick=13, full=39)
def count(trial: Trial) -> None:
    """Where all logits are equal a query averages over its live links, zero tokens among them: with 1, 2, 4 or 8 links
    the average is exact, without any it is 0, with others it is within the error bound. Masked keys are not counted.
    """
    draws = trial.draws
    layout = draw_layout(draws, kinds=AVERAGED)
    offered: tuple[Relevance, ...] = (Mean(), Softmax(content=False))
    relevance, heads, generator = draws.walk(offered), draws.pick((2, 1, 3)), draws.generator()
    wide, batch = draws.some(), draws.pick((2, 1))
    features = 2 * heads
    y = generator.integers(-7, 8, (batch, layout.num_keys, features)).astype(np.float64)
    live = np.ones((batch, heads, layout.num_queries, layout.num_keys), bool)
    mask = None
    if draws.some(0.7):
        mask = generator.random((batch, heads if wide else 1, layout.num_queries, layout.num_keys)) < 0.6
        live &= mask
    value = Identity(bias=draws.some(0.3))
    bias = generator.integers(1, 4, features).astype(np.float64)
    operator = Operator(layout, features, heads, value, relevance=relevance)
    params = {"value.bias": bias} if value.bias else {}
    x, keys = (y, None) if draws.some() else (np.ones((batch, layout.num_queries, features)), y)
    want, short = _averages(layout, live, y + (bias if value.bias else 0), bias if value.bias else 0 * bias)
    question = Question(operator, params, x, keys, mask)
    got = trial.run(question).out
    trial.same("average", np.where(short, got, 0), np.where(short, want, 0))
    trial.within("average", got, want, trial.budget(question).out)


def _averages(
    layout: Layout, live: npt.NDArray[np.bool_], v: FloatArray, zero: FloatArray
) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Means [B, Nq, E] of the values v [B, Nk, E] of live links; whether their number is 0, 1, 2, 4, 8."""
    batch, heads, queries, _ = live.shape
    by_head = np.concatenate([v, np.broadcast_to(zero, (batch, 1, v.shape[2]))], 1).reshape(batch, -1, heads, 2)
    total, number = np.zeros((batch, queries, heads, 2)), np.zeros((batch, queries, heads, 1))
    for link in links(layout):
        key = layout.num_keys if link.key is None else link.key
        there = np.ones((batch, heads)) if link.key is None else live[:, :, link.query, link.key].astype(np.float64)
        total[:, link.query] += there[:, :, None] * by_head[:, key]
        number[:, link.query] += there[:, :, None]
    short = np.broadcast_to(np.isin(number, (0, 1, 2, 4, 8)), total.shape)
    return (total / np.maximum(number, 1)).reshape(batch, queries, -1), short.reshape(batch, queries, -1)


TILES = (4, 8, 16, 32)


def _sizes(draws: Draws) -> tuple[int, int]:
    """Numbers of queries and keys around the edges of a tile."""
    tile = draws.pick(TILES)
    near = (tile + 1, tile - 1, tile, 2 * tile + 1)
    return draws.pick(near), draws.pick(near)


_TILE_KILLS = (
    "tail-keys-dropped", "tail-rows-dropped", "ones-normalised", "softmax-over-queries", "no-max-subtraction",
)  # fmt: skip


@law("TILE", clauses=("L1", "R1", "R2"), kills=_TILE_KILLS, quick=8, full=32)
def tile(trial: Trial) -> None:
    """On lines a little shorter, just as long, and longer than 4, 8, 16 or 32 tokens nothing is lost at the end and
    nothing is added: sums of whole numbers, and the key with the highest logit, come out bit for bit.
    """
    draws = trial.draws
    queries, keys = _sizes(draws)
    kind, layout = draws.walk(("matrices", "attention", "shared")), Lattice((queries,), key_grid=(keys,))
    heads, generator = draws.pick((2, 1)), draws.generator()
    features = draws.pick((heads, 4 * heads, 16 * heads + heads))
    if kind == "attention":
        return _tail(trial, layout, generator)
    y = generator.integers(-1, 2, (2, keys, features)).astype(np.float64)
    shape = (layout.num_classes, features, features) if kind == "matrices" else (features, features)
    matrix = partial_permutation(generator, shape)
    apart = np.arange(queries)[:, None] - np.arange(keys) + keys - 1
    value = PerDisplacement(features) if kind == "matrices" else Shared(features)
    each = matrix[apart] if kind == "matrices" else np.broadcast_to(matrix, (queries, keys, features, features))
    operator = Operator(layout, features, heads, value, relevance=Ones())
    params = {"value.table" if kind == "matrices" else "value.weight": matrix}
    want = np.einsum("bjc,ijce->bie", y, each, optimize=True)
    return trial.same("sums", trial.run(Question(operator, params, y)).out, want)


def _tail(trial: Trial, layout: Lattice, generator: np.random.Generator) -> None:
    """Head 0 reads the key with the highest rank, head 1 that with the lowest; all ranks are negative, so that a key of
    zeros beyond the end would win over head 0. The last key is the one in every other case.
    """
    keys, queries, step = layout.num_keys, layout.num_queries, 64.0
    ranks = -1.0 - generator.permutation(keys)
    if trial.draws.some():
        last = int(np.argmax(ranks))
        ranks[[last, -1]] = ranks[[-1, last]]
    tokens = np.stack([ranks, generator.permutation(keys) + 1.0], axis=1)[None]
    params = {
        "query.weight": step * np.array([[1.0, -1.0], [0.0, 0.0]]),
        "key.weight": np.array([[1.0, 1.0], [0.0, 0.0]]),
        "value.weight": np.array([[0.0, 0.0], [1.0, 1.0]]),
    }
    operator = Operator(layout, 2, 2, Shared(2), Shared(2), Shared(2), Softmax(scale=1.0))
    x = np.broadcast_to([1.0, 0.0], (1, queries, 2))
    want = np.stack([tokens[0, np.argmax(ranks), 1], tokens[0, np.argmin(ranks), 1]])
    got = trial.run(Question(operator, params, np.array(x), tokens)).out
    trial.same("names", got, np.broadcast_to(want, (1, queries, 2)))
