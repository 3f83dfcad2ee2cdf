"""Numbers at their limits: huge logits, dtypes, accumulation, overflow inside, and the smallest questions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.error_model import budget
from translution.conformance.exam.law import HALVES, Trial, law
from translution.conformance.exam.question import FloatArray, Question, rounded
from translution.conformance.laws.sight import BATCHES, NO_LINKS, flat, gradients, link_counts, seen
from translution.conformance.rounding import ARITHMETIC
from translution.conformance.strategies import draw_question
from translution.spec import (
    BiasTable,
    Clip,
    Identity,
    Lattice,
    Mean,
    Mixture,
    Ones,
    Operator,
    PerDisplacement,
    Relevance,
    Shared,
    Softmax,
)

# Binary digits of each dtype's numbers.
DIGITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


@law("SATURATE", clauses=("M5", "R1"), kills=("no-max-subtraction",), dtypes=("float64", "float32"))
def saturate(trial: Trial) -> None:
    """Logits of up to 6e4 on either side, from content, bias or mask, leave the result finite, within its bound, and
    inside the hull of the values that a row sees.
    """
    draws = trial.draws
    layouts = (Lattice((2, 3)), Lattice((5,), causal=True), Lattice((3, 2), kernel_size=3), Lattice((4,), registers=1))
    layout, kind = draws.walk(layouts), draws.walk(("plain", "bias", "relative", "mask", "plain"))
    encoder = PerDisplacement(4) if kind == "relative" else Shared(4)
    content = kind in ("plain", "relative")
    relevance = Softmax(scale=600.0) if content else Softmax(content=False, bias=BiasTable())
    sides: dict[str, Any] = {"query": encoder, "key": encoder} if content else {}
    operator = Operator(layout, 4, 2, Identity(), relevance=relevance, **sides)
    question = draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,))
    generator, params, mask = draws.generator(), dict(question.params), None
    if content:
        # Queries and keys pick one coordinate per feature, so that an inner product is at most 2 * 7 * 7.
        sides_given = {"x": question.x} if question.y is None else {"x": question.x, "y": question.y}
        tokens = {name: generator.integers(-7, 8, value.shape).astype(float) for name, value in sides_given.items()}
        picks = {name: generator.integers(0, 4, shape[:-1]) for name, shape in operator.parameters.items()}
        chosen = {name: np.eye(4)[pick].swapaxes(-1, -2) for name, pick in picks.items()}
        question = question.but(params=chosen, **tokens)
    else:
        params["relevance.bias"] = 1000.0 * generator.integers(-60, 61, params["relevance.bias"].shape)
        if kind == "mask":
            params["relevance.bias"] *= 0
            mask = 1000.0 * generator.integers(-60, 61, question.weights_shape)
            mask[generator.random(mask.shape) < 0.2] = -np.inf
        question = question.but(params=params, mask=mask)
    out, exact = trial.run(question).out, trial.budget(question)
    trial.within("saturated softmax", out, exact.value, exact.out)
    sight = seen(question)[..., :-1].transpose(0, 2, 1, 3)[..., None]
    values = flat(question.x if question.y is None else question.y)
    by_head = values.reshape(len(values), 1, layout.num_keys, 2, 2).swapaxes(2, 3)
    live = sight.any(axis=3)
    low = np.where(live, np.where(sight, by_head, np.inf).min(axis=3), 0)
    high = np.where(live, np.where(sight, by_head, -np.inf).max(axis=3), 0)
    # The weights of a row add up to 1 but for their roundings, and so do the terms of its sum.
    slack = ARITHMETIC[trial.subject.arithmetic].gamma(6 * layout.num_keys + 16) * np.abs(values).max()
    found = out.reshape(low.shape)
    outside = np.maximum(np.maximum(low - found, found - high), 0)
    trial.within("distance from the hull of the values", outside, np.zeros_like(outside), slack)


def _digits(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> FloatArray:
    """Numbers from -1 to 1 of which 16 have a sum that the dtype holds, and the next narrower one does not."""
    top = 2 ** (DIGITS[dtype] - 5)
    return np.asarray(generator.integers(-top, top + 1, shape) / top)


@law("DTYPE", clauses=("D1", "D3"), kills=("float64-in-float32", "returns-float32"))
def dtype(trial: Trial) -> None:
    """Results, weights and gradients have the dtype and shape of the call, and as many digits as the dtype: sums that
    it holds come out exactly, softmaxes and gradients within its bound.
    """
    draws = trial.draws
    kind = draws.walk(("sum", "softmax", "convolution", "attention", "weights"))
    layout = draws.pick((Lattice((2, 3), kernel_size=3), Lattice((5,), kernel_size=3, dilation=2)))
    if kind in ("sum", "convolution"):
        value = PerDisplacement(2) if kind == "convolution" else Identity()
        operator = Operator(layout, 2, 2, value, relevance=Ones())
        question = draw_question(draws, trial.dtype, operator=operator, masked=False, batch=(2,))
        params = {name: np.broadcast_to(np.eye(2), v.shape).copy() for name, v in question.params.items()}
        tokens = _digits(draws.generator(), (2, layout.num_keys, 2), trial.dtype)
        question = question.but(x=tokens, y=None, params=params)
        want = link_counts(layout)[:, :-1].astype(float) @ tokens
        trial.same("sums that the dtype holds", trial.run(question).out, want)
        return
    encoder = Shared(4) if kind == "attention" else PerDisplacement(4)
    operator = Operator(layout, 3, 2, PerDisplacement(4) if kind != "attention" else Shared(4), encoder, encoder)
    question = draw_question(
        draws,
        trial.dtype,
        operator=operator,
        batch=draws.pick(BATCHES),
        cotangent=True,
        return_weights=kind == "weights",
    )
    exact, found = trial.budget(question), trial.run(question)
    trial.within("out", found.out, exact.value, exact.out)
    if found.weights is not None:
        trial.within("weights", found.weights, exact.weights, exact.weights_bound)
    pulled = gradients(trial, question.but(return_weights=False))
    for name, gradient in () if pulled is None else pulled.gradients.items():
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])


def _sum_of_keys(native: bool, tokens: FloatArray) -> Question:
    """One row that adds up keys [B, N], two heads alike."""
    count = tokens.shape[-1]
    window: dict[str, Any] = {"kernel_size": count, "padding": 0} if native else {}
    value = PerDisplacement(2) if native else Identity()
    operator = Operator(Lattice((1,), key_grid=(count,), **window), 2, 2, value, relevance=Ones())
    params = {name: np.broadcast_to(np.eye(2), shape).copy() for name, shape in operator.parameters.items()}
    return Question(operator, params, np.zeros((len(tokens), 1, 2)), np.repeat(tokens[..., None], 2, axis=-1))


def _sum_of_channels(native: bool, tokens: FloatArray) -> Question:
    """One token of channels [B, C] that matrices of ones add up."""
    value = PerDisplacement(2) if native else Shared(2)
    operator = Operator(Lattice((1,), kernel_size=1), tokens.shape[-1], 2, value, relevance=Ones())
    params = {name: np.ones(shape) for name, shape in operator.parameters.items()}
    return Question(operator, params, tokens[:, None, :])


def _sum_over_tokens(native: bool, tokens: FloatArray) -> Question:
    """Tokens [B, N] that see themselves alone, so that the gradient of the value matrix adds them all up."""
    value = PerDisplacement(2) if native else Shared(2)
    operator = Operator(Lattice((tokens.shape[-1],), kernel_size=1), 1, 2, value, relevance=Ones())
    params = {name: np.ones(shape) for name, shape in operator.parameters.items()}
    return Question(operator, params, tokens[..., None], cotangent=np.ones((*tokens.shape, 2)))


def _attention(query: FloatArray, keys: FloatArray, values: FloatArray, scale: float) -> Question:
    """Plain attention of one query [C] to keys [N, C] with values [N], in one class."""
    count, channels = keys.shape
    layout = Lattice((1,), key_grid=(count,), far=Clip(0))
    operator = Operator(layout, channels + 1, 1, Shared(1), Identity(), Identity(), Softmax(scale))
    x = np.append(query, 0.0).reshape(1, 1, -1)
    y = np.concatenate([keys, values[:, None]], axis=1)[None]
    return Question(operator, {"value.weight": np.eye(channels + 1)[:, -1:]}, x, y)


def _logits_in_single_precision(trial: Trial, name: str, question: Question) -> None:
    """``question`` has values from 0 to 1. Its logits and sums are those of float32; only the weights and the result
    may be stored in the dtype of the call.
    """
    q, own = question, ARITHMETIC[trial.subject.arithmetic]
    exact = budget(q.operator, q.params, q.x, q.y, q.mask, None, "float32")
    trial.within(name, trial.run(question).out, exact.value, exact.out + 2 * own.storage + own.tiny)


_NATIVE = (False, True, False)


@law(
    "ACCUMULATE",
    clauses=("D2",),
    kills=("accumulates-in-half", "logits-in-half", "output-summed-in-half"),
    dtypes=HALVES,
    quick=5,
)
def accumulate(trial: Trial) -> None:
    """In float16 and bfloat16 sums over keys, channels and tokens, logits, and denominators are those of float32: what
    a running sum of the dtype itself would lose is there.
    """
    kind = trial.draws.walk(("keys", "channels", "logits", "denominator", "gradient"))
    native, generator = trial.draws.walk(_NATIVE), trial.draws.generator()
    digits = DIGITS[trial.dtype]
    top = 2.0**digits
    # A running sum loses the ones from either end.
    run = np.array([top, 1, 1, -top, 1, 1, top])
    tokens = np.stack([run, generator.permutation(run), -run])
    total = run.sum() * np.array([1.0, 1.0, -1.0])
    if kind == "logits":
        odd = np.array([top, 1, 1, -top, 1, 0, top])  # top + 3, and numbers of that size have no odd ones
        keys = np.stack([odd, [top, 1, 0, 0, 0, 0, 0], [top, 1, 1, -top, -1, -1, top]])
        question = _attention(np.ones(7), keys, np.array([1.0, 0.0, 0.5]), 1.0)
        _logits_in_single_precision(trial, "logits beyond the digits of the dtype", question)
    elif kind == "denominator":
        count = 2 ** (digits + 1) + 64
        values = generator.integers(0, 2, count).astype(float)
        question = _attention(np.zeros(1), np.ones((count, 1)), values, 1.0)
        _logits_in_single_precision(trial, f"mean over {count} equal keys", question)
    elif kind == "gradient":
        question = _sum_over_tokens(native, tokens)
        found = trial.vjp(question)
        trial.same(
            "gradient that sums over tokens", found.gradients[next(iter(question.params))].ravel(), [total.sum()] * 2
        )
    else:
        question = (_sum_of_keys if kind == "keys" else _sum_of_channels)(native, tokens)
        trial.same(f"sum of {kind}", trial.run(question).out, np.broadcast_to(total[:, None, None], (3, 1, 2)))


@law("OVERFLOW", clauses=("D2",), kills=("overflow-in-half",), dtypes=("float16",))
def overflow(trial: Trial) -> None:
    """In float16 a sum or an inner product may exceed 65504 on its way to a result that fits."""
    kind = trial.draws.walk(("keys", "logits", "scale", "gradient"))
    native, large = trial.draws.walk(_NATIVE), 32.0 * trial.draws.integer(1400, 1900)
    run = np.array([[large, large, -large], [large, -large, large], [-large, -large, large]])
    if kind == "logits":
        keys = np.array([[1.0, 1.0], [0.5, 1.0], [0.0, 0.25]]) * 32 * trial.draws.integer(6, 12)
        question = _attention(np.full(2, 256.0), keys, np.array([1.0, 0.0, 0.5]), 2.0**-14)
        _logits_in_single_precision(trial, "softmax of inner products beyond 65504", question)
    elif kind == "gradient":
        question = _sum_over_tokens(native, run)
        found = trial.vjp(question).gradients[next(iter(question.params))]
        trial.same("gradient that sums over tokens", found.ravel(), [run.sum()] * 2)
    else:
        tokens = np.abs(run) if kind == "scale" else run
        question = _sum_of_keys(native, tokens)
        share = 2.0**-4 if kind == "scale" else 1.0
        question = question.but(operator=replace(question.operator, output_scale=share))
        want = rounded(share * tokens.sum(axis=1), trial.dtype)
        trial.same("sum", trial.run(question).out, np.broadcast_to(want[:, None, None], (3, 1, 2)))


_RELATIVE = PerDisplacement(4, bias=True)
_OUTPUT = Shared(3, bias=True)


@law("EMPTY", clauses=("D1", "L2", "M3"), kills=("empty-batch-fails", "dead-row-nan"), quick=12)
def empty(trial: Trial) -> None:
    """No items, no links, windows of one key and heads of one feature are questions like any other: results have their
    shapes, a row without links is the output bias, and gradients of nothing are exactly 0.
    """
    draws = trial.draws
    kind = draws.walk(("items", "links", "narrow"))
    if kind == "items":
        question = draw_question(draws, trial.dtype, batch=draws.pick(((0,), (2, 0))), cotangent=True)
        trial.run(question)
        found = gradients(trial, question)
        for name, gradient in () if found is None else found.gradients.items():
            trial.same(f"gradient of {name} from no items", gradient, np.zeros_like(gradient))
        return
    if kind == "links":
        plain = Operator(NO_LINKS, 3, 2, Shared(4), Shared(4), Shared(4), Softmax(), _OUTPUT)
        relative = Operator(NO_LINKS, 3, 2, _RELATIVE, _RELATIVE, _RELATIVE, Softmax(bias=BiasTable()), _OUTPUT)
        pooled = Operator(NO_LINKS, 3, 2, _RELATIVE, relevance=Mixture(Mean(), Ones()), output=_OUTPUT)
        bare = Operator(NO_LINKS, 3, 2, PerDisplacement(4), relevance=Ones())
        operator = draws.walk((plain, relative, draws.pick((pooled, bare)), bare))
    else:
        layout = draws.pick((Lattice((2, 3), kernel_size=1), Lattice((1, 3)), Lattice((4,), kernel_size=2)))
        plain = Operator(layout, 3, 3, Shared(3), Shared(3), Shared(3))
        relative = Operator(layout, 3, 3, PerDisplacement(3), PerDisplacement(3), PerDisplacement(3))
        operator = draws.pick((plain, relative, Operator(layout, 3, 3, PerDisplacement(3), relevance=Ones())))
    question = draw_question(
        draws, trial.dtype, operator=operator, masked=False, batch=draws.pick(((), (1,), (2,))), cotangent=True
    )
    exact, out = trial.budget(question), trial.run(question).out
    trial.within("out", out, exact.value, exact.out)
    if kind == "links":
        bias = question.params.get("output.bias", np.zeros(1))
        trial.same("rows without links", out, np.broadcast_to(bias, out.shape))
    found = gradients(trial, question)
    for name, gradient in () if found is None else found.gradients.items():
        trial.within(f"gradient of {name}", gradient, exact.gradient_values[name], exact.gradients[name])


@law("UNIT", clauses=("R1", "R3", "R4", "O2", "O3"), kills=("epsilon-in-denominator", "output-scale-after-bias"))
def unit(trial: Trial) -> None:
    """One site and one head: every weight is 1, and the result is the token through the value and output encoders."""
    draws = trial.draws
    kinds: tuple[Relevance, ...] = (
        Softmax(), Ones(), Mean(), Softmax(bias=BiasTable()), Mixture(Softmax(), Mean())
    )  # fmt: skip
    relevance = draws.walk(kinds)
    rank = draws.pick((1, 2, 3))
    layout = Lattice((1,) * rank, kernel_size=1 if isinstance(relevance, Ones) else None)
    plain = draws.walk((True, False, True, True))
    encoder = Shared(3) if plain else PerDisplacement(3)
    value = PerDisplacement(3) if isinstance(relevance, Ones) else encoder
    sides: dict[str, Any] = {"query": encoder, "key": encoder} if isinstance(relevance, (Softmax, Mixture)) else {}
    scale = draws.pick((1.0, -2.0))
    operator = Operator(
        layout, 3, 1, value, relevance=relevance, output=Shared(2, bias=True), output_scale=scale, **sides
    )
    question = draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,))
    params = {name: np.sign(number) for name, number in question.params.items()}
    if "relevance.gate" in params:
        params["relevance.gate"] *= 0  # halves of 1, without a rounding
    question = question.but(params=params)
    matrix = params["value.table"][0] if isinstance(value, PerDisplacement) else params["value.weight"]
    tokens = question.x if question.y is None else question.y
    want = scale * (tokens @ matrix) @ params["output.weight"] + params["output.bias"]
    trial.same("a token alone", trial.run(question).out, want)
