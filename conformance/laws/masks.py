"""What a mask means: polarity, shapes and numbers, and how it meets logits, zero tokens and borders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question, rounded
from translution.conformance.laws.sight import (
    TRACERS,
    apart,
    check_traced,
    flat,
    key_side,
    keys_of,
    link_counts,
    links_of,
    seen,
    tracer,
)  # fmt: skip
from translution.conformance.strategies import draw_layout, draw_question
from translution.spec import (
    BiasTable,
    Boundary,
    Encoder,
    Identity,
    Lattice,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Rotary,
    Shared,
    Softmax,
)
from translution.spec.relevance import branches

_SOFTMAXES = (
    Softmax(),
    Softmax(bias=BiasTable()),
    Softmax(content=False, bias=BiasTable()),
    Mixture(Softmax(scale=0.5, bias=BiasTable()), Softmax(bias=BiasTable())),
)
_BATCHES = ((2,), (3,), (2, 2))


def _within_budget(trial: Trial, name: str, question: Question, out: Array) -> None:
    exact = trial.budget(question)
    trial.within(name, out, exact.value, exact.out)


@law("FLOAT-MASK", clauses=("M2", "M5"), kills=("float-mask-as-bool", "float-mask-ignored", "mask-scaled"))
def float_mask(trial: Trial) -> None:
    """A mask of 0 and -inf does what False at the same places does. Any finite number in a mask, however low, is added
    to the logit of its item, head and pair.
    """
    draws = trial.draws
    question = draw_question(draws, trial.dtype, relevances=_SOFTMAXES, masked=False, batch=draws.pick(_BATCHES))
    generator = draws.generator()
    live = generator.random(question.weights_shape) < 0.6
    as_flags, as_numbers = question.but(mask=live), question.but(mask=np.where(live, 0.0, -np.inf))
    flags, numbers = trial.run(as_flags).out, trial.run(as_numbers).out
    bound = trial.budget(as_flags).out
    trial.within("0 and -inf against a bool mask", numbers, flags, 2 * bound)
    added = rounded(2 * generator.standard_normal(live.shape), trial.dtype)
    # The same low number for a whole row changes nothing; a key with such a number beside others is finite, not absent.
    added[..., -1, :] = -1024.0
    finite = question.but(mask=np.where(live, added, -np.inf) if draws.some() else added)
    _within_budget(trial, "finite numbers in a mask", finite, trial.run(finite).out)


def _shapes(draws: Draws, full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two shapes that broadcast to ``full``, the last without its leading dimensions of 1."""
    shapes = [tuple(1 if draws.some() else size for size in full) for _ in range(2)]
    last = shapes[-1]
    while len(last) > 1 and last[0] == 1:
        last = last[1:]
    return [*shapes[:1], last]


@law(
    "MASK-SHAPES", clauses=("M6",), kills=("mask-first-head", "mask-first-batch", "mask-transposed", "mask-first-query")
)
def mask_shapes(trial: Trial) -> None:
    """A mask of any shape that broadcasts to [.., H, Nq, Nk] does what the full mask does that it broadcasts to."""
    draws = trial.draws
    question = draw_question(draws, trial.dtype, masked=False, batch=draws.pick(_BATCHES))
    softmax = all(isinstance(branch, Softmax) for _, branch in branches(question.operator.relevance))
    generator = draws.generator()
    for shape in (question.weights_shape, *_shapes(draws, question.weights_shape)):
        live = generator.random(shape) < 0.6
        numbers = np.where(live, rounded(generator.standard_normal(shape), trial.dtype), -np.inf)
        small = question.but(mask=numbers if softmax and draws.some() else live)
        assert small.mask is not None
        full = small.but(mask=np.broadcast_to(small.mask, question.weights_shape).copy())
        exact, out = trial.budget(full), trial.run(small).out
        trial.within(f"mask of shape {shape}", out, exact.value, exact.out)
        if shape != question.weights_shape:
            trial.within(f"mask of shape {shape} against the full one", out, trial.run(full).out, 2 * exact.out)


@law("MASK-POLARITY", clauses=("M1",), kills=("mask-inverted", "mask-transposed", "mask-first-head", "bool-mask-added"))
def mask_polarity(trial: Trial) -> None:
    """True in a bool mask means that the query may attend to the key: every head of every row sees exactly the keys
    with True among those it is linked with.
    """
    kinds = ("line", "grid", "window", "registers", "cross-grid", "causal-grid", "window-circular")
    layout, kind = draw_layout(trial.draws, kinds=kinds), trial.draws.walk(TRACERS)
    generator = trial.draws.generator()
    question = tracer(layout, kind, generator, trial.dtype)
    shape = trial.draws.pick(("full", "full", "keys"))
    full = question.weights_shape
    live = generator.random(full if shape == "full" else (full[0], 1, 1, full[-1])) < 0.5
    question = question.but(mask=live)
    check_traced(trial, "bool mask", kind, question, trial.run(question).out)


@law(
    "MASK-RELEVANCE",
    clauses=("M1", "R2", "R3", "R4"),
    kills=("mean-ignores-mask", "ones-ignores-mask", "mean-over-window"),
)
def mask_relevance(trial: Trial) -> None:
    """Under Ones a bool mask takes keys out of the sum, under Mean out of the sum and of the number of keys that it is
    divided by; in a mixture, out of each part.
    """
    draws = trial.draws
    layout = draw_layout(draws, kinds=("grid", "window", "line", "window-circular", "window-zeros", "registers"))
    kinds: tuple[Relevance, ...] = (Mean(), Ones(), Mixture(Ones(), Mean()))
    relevance = draws.walk(kinds)
    operator = Operator(layout, 4, 2, Identity(), relevance=relevance)
    question = draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,))
    live = draws.generator().random(question.weights_shape) < 0.6
    if not (~live & (link_counts(layout)[:, :-1] > 0)).any():
        draws.reject("the mask takes nothing away")
    params = {name: np.zeros_like(value) for name, value in question.params.items()}  # a gate of 0 halves both parts
    question = question.but(mask=live, params=params)
    counts = np.where(seen(question), link_counts(layout), 0).astype(np.float64)
    tokens = flat(question.x if question.y is None else question.y)
    tokens = np.concatenate([tokens, np.zeros((len(tokens), 1, 4))], axis=1).reshape(len(tokens), -1, 2, 2)
    sums = np.einsum("bhij,bjhd->bihd", counts, tokens)
    means = sums / np.maximum(counts.sum(axis=-1).transpose(0, 2, 1)[..., None], 1)
    out, bound = trial.run(question).out, trial.budget(question).out
    if isinstance(relevance, Ones):
        trial.same("sum over the unmasked", out, sums.reshape(out.shape))
    else:
        want = means if isinstance(relevance, Mean) else (sums + means) / 2
        trial.within("mean over the unmasked", out, want.reshape(out.shape), bound)


@law("MASK-ABSOLUTE", clauses=("M5",), kills=("mask-sentinel", "mask-after-softmax"))
def mask_absolute(trial: Trial) -> None:
    """A masked key has weight 0 even where its logit is 3e4 and every live logit is -3e4, and so has a key outside the
    support: the result is that of equal logits.
    """
    draws = trial.draws
    layouts = (
        Lattice((2, 3)),
        Lattice((5,), causal=True),
        Lattice((3, 2), kernel_size=(3, 1), registers=1),
        Lattice((5,), kernel_size=3, boundary="circular"),
    )
    layout = draws.walk(layouts)
    content = draws.walk((True, False, True))
    sides: dict[str, Any] = {"query": Shared(4), "key": Shared(4)} if content else {}
    relevance = Softmax(content=content, bias=BiasTable())
    values: tuple[Encoder, ...] = (Identity(), Shared(4))
    operator = Operator(layout, 4, 2, draws.pick(values), relevance=relevance, **sides)
    question = draw_question(draws, trial.dtype, operator=operator, masked=False, batch=(2,))
    low = float(rounded(-3e4, trial.dtype))
    masked = draws.integer(0, layout.num_classes - 1)
    live = np.ones(question.weights_shape, bool)
    for query, links in enumerate(links_of(layout)):
        for link in links:
            live[..., query, link.key] &= link.value_row != masked
    # Queries of 0: equal logits however they are rounded.
    params = {name: np.zeros_like(v) if name == "query.weight" else v for name, v in question.params.items()}
    bias = np.full((2, layout.num_classes), low)
    bias[:, masked] = -low
    mask = live if draws.walk((True, False)) else np.where(live, 0.0, -np.inf)
    hard = question.but(mask=mask, params=params | {"relevance.bias": bias})
    exact = trial.budget(hard.but(params=params | {"relevance.bias": np.zeros_like(bias)}))
    out = trial.run(hard).out
    trial.within("live logits of -3e4 beside masked ones of 3e4", out, exact.value, exact.out)


@law("MASK-FINITE", clauses=("M2", "M5"), kills=("large-negative-mask-is-absent",))
def mask_finite(trial: Trial) -> None:
    """Only -inf takes a pair away: a row whose mask is a low finite number on all keys has weights that add up to 1 all
    the same, and so gives the value that all its keys have.
    """
    draws = trial.draws
    layout = draws.walk((Lattice((2, 3)), Lattice((5,), causal=True), Lattice((3,), key_grid=(4,)), Lattice((2, 2))))
    relevance = draws.walk((Softmax(), Softmax(scale=0.5), Softmax(bias=BiasTable())))
    values: tuple[Encoder, ...] = (Identity(), Shared(4))
    operator = Operator(layout, 4, 2, draws.pick(values), Shared(4), Shared(4), relevance)
    question = apart(draw_question(draws, trial.dtype, operator=operator, masked=False, batch=(2,)))
    keys = keys_of(question)
    question = question.but(**{key_side(question): np.broadcast_to(keys[..., :1, :], keys.shape).copy()})
    lowest = {"float16": -65504.0, "bfloat16": -(2.0**128 - 2.0**120)}.get(trial.dtype, float(np.finfo(np.float32).min))
    numbers = rounded([-1e4, -1e9 if trial.dtype != "float16" else -3e4, lowest, 0.0], trial.dtype)
    generator = draws.generator()
    mask = np.broadcast_to(numbers[generator.integers(0, 4, (*question.weights_shape[:-1], 1))], question.weights_shape)
    away = generator.random(mask.shape) < 0.3
    away[..., 0] = False
    exact = trial.budget(question)
    out = trial.run(question.but(mask=np.where(away, -np.inf, mask))).out
    trial.within("rows of one value under low masks", out, exact.value, 2 * exact.out)


def _zero_padded(draws: Draws) -> Lattice:
    size = draws.pick(((3, 2), (2, 3), (3, 3)))
    registers = draws.pick((0, 0, 1))
    return draws.walk(
        (
            Lattice((2, 3), kernel_size=size, padding=(1, 1), boundary="zeros"),
            Lattice((4,), kernel_size=3, padding=2, boundary="zeros", registers=registers),
            Lattice((3, 2), kernel_size=(3, 3), boundary="zeros", registers=registers),
        )
    )


@law(
    "ZERO-TOKEN",
    clauses=("L5", "E10", "M6", "R3"),
    kills=(
        "zero-token-without-bias",
        "zero-token-masked",
        "zero-token-rotated",
        "zeros-as-absent",
        "mean-without-zero-tokens",
    ),
    quick=5,
)
def zero_token(trial: Trial) -> None:
    """A position padded with zeros holds a token of zeros: encoder biases apply to it, no position turns it, no mask
    takes it away, and softmax and mean count it. Where nothing has a bias a sum does not see it.
    """
    draws = trial.draws
    layout, kind = _zero_padded(draws), draws.walk(("rotary", "ones", "convolution", "mean", "softmax"))
    if kind == "convolution":
        layout = replace(layout, registers=0)
        operator = Operator(layout, 3, 2, PerDisplacement(4), relevance=Ones())
        question = draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,))
        absent = question.but(operator=replace(operator, layout=replace(layout, boundary="absent")))
        trial.same("zeros against nothing under Ones", trial.run(question).out, trial.run(absent).out)
        return
    width = 2 * 2 * layout.rank
    inner = Shared(width, bias=True)
    encoder = Rotary(inner, 3.0) if kind == "rotary" else inner
    others: dict[str, Relevance] = {"ones": Ones(), "mean": Mean()}
    relevance = others.get(kind, Softmax())
    sides: dict[str, Any] = {"query": encoder, "key": encoder} if isinstance(relevance, Softmax) else {}
    operator = Operator(layout, 3, 2, Shared(4, bias=True), relevance=relevance, **sides)
    question = apart(draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,)))
    _within_budget(trial, "beside live keys", question, trial.run(question).out)
    some = question.but(mask=draws.generator().random(question.weights_shape) < 0.5)
    _within_budget(trial, "beside masked keys", some, trial.run(some).out)
    nothing = question.but(mask=np.zeros((layout.num_queries, layout.num_keys), bool))
    out, zeros = trial.run(nothing).out, link_counts(layout)[:, -1:]
    shares = zeros if kind == "ones" else np.minimum(zeros, 1)
    want = np.broadcast_to(shares * question.params["value.bias"], out.shape)
    if kind == "ones":
        trial.same("zero tokens alone", out, want)
    else:
        trial.within("zero tokens alone", out, want, trial.budget(nothing).out)


@law("DOUBLE-LINKS", clauses=("L5", "M6", "B5"), kills=("double-links-once", "mask-first-link-only"))
def double_links(trial: Trial) -> None:
    """A key that a continued border shows twice to a query counts twice, in sums, means and softmaxes, and a mask holds
    for each of its appearances. The weight of a pair is the sum over all of them.
    """
    draws = trial.draws
    boundary: Boundary = draws.walk(("circular", "replicate", "reflect"))
    kind = draws.walk(("ones", "convolution", "relative", "mean", "attention"))
    layout = draws.pick(
        (
            Lattice((2, 3), kernel_size=(3, 2), padding=(1, 0), boundary=boundary),
            Lattice((3,), kernel_size=4, padding=2, boundary=boundary),
            Lattice((3, 2), kernel_size=3, padding=1, boundary=boundary),
        )
    )
    if not (link_counts(layout) > 1).any():
        draws.reject("no pair is linked twice")
    generator = draws.generator()
    question = tracer(layout, kind, generator, trial.dtype)
    check_traced(trial, "twice linked", kind, question, trial.run(question).out)
    if kind == "convolution":
        return
    shown = draws.walk((False, False, True))
    masked = question.but(mask=generator.random(question.weights_shape) < 0.6, return_weights=shown)
    answer = trial.run(masked)
    check_traced(trial, "twice linked and masked", kind, masked, answer.out)
    if answer.weights is not None:
        exact = trial.budget(masked)
        trial.within("weights of pairs", answer.weights, exact.weights, exact.weights_bound)
