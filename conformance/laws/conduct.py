"""What a call does beside its result: which memory it reads, writes, keeps and needs (clauses B3 and B4)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from translution.arrays import broadcast_to
from translution.conformance.comparison import as_numpy
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question, rounded
from translution.conformance.exam.subject import BackendFailure, LiveSubject, told
from translution.conformance.laws.sight import BATCHES
from translution.conformance.strategies import draw_question
from translution.execution import run, vjp
from translution.spec import Identity, Lattice, Ones, Operator, PerDisplacement

Results = dict[str, Any]
Arguments = dict[str, Any]


def _call(trial: Trial, question: Question, arguments: Arguments) -> Results:
    """The native results of one call by name; raises what :meth:`Subject.run` does."""
    trial.asked.append(question)
    trial.require_claim(question)
    try:
        found = run(**arguments, return_weights=question.return_weights)
    except Exception as error:
        raise BackendFailure(f"claimed, but raised {told(error)}") from error
    return {"out": found[0], "weights": found[1]} if question.return_weights else {"out": found}


def _pull(trial: Trial, question: Question, arguments: Arguments, cotangent: Any) -> Results:
    """Native out and gradients by name; nothing where no gradients are claimed."""
    live = trial.live()
    trial.asked.append(question)
    if live.claims.gradient_order < 1 or live.reasons(question, gradient=True):
        return {}
    try:
        out, found = vjp(**arguments, cotangent=cotangent)
    except Exception as error:
        raise BackendFailure(f"gradients are claimed, but raised {told(error)}") from error
    own = {"out of vjp": out, **found.params, "x": found.x}
    return own if found.y is None else own | {"y": found.y}


def _arrays(arguments: Arguments) -> dict[str, Any]:
    """Every array of a call by name."""
    tokens = {name: arguments[name] for name in ("x", "y", "mask") if arguments[name] is not None}
    return {**arguments["params"], **tokens}


def _bits(value: Any) -> Array:
    """A copy."""
    return np.array(as_numpy(value))


def _question(trial: Trial, **more: Any) -> Question:
    return draw_question(trial.draws, trial.dtype, batch=trial.draws.pick(BATCHES), cotangent=True, **more)


def _agree(trial: Trial, name: str, question: Question, got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Two calls on the same numbers: equal bits where the backend claims them, else within both bounds."""
    exact = trial.subject.deterministic
    for part, value in want.items():
        if exact:
            trial.same(f"{name}, {part}", _bits(got[part]), _bits(value))
        else:
            trial.within(f"{name}, {part}", got[part], value, 2 * _bound(trial, question, part))


def _bound(trial: Trial, question: Question, part: str) -> Array:
    found = trial.budget(question)
    return {"out": found.out, "out of vjp": found.out, "weights": found.weights_bound, **found.gradients}[part]


def _view(draws: Draws, live: LiveSubject, value: Array) -> Any:
    """The numbers of ``value`` in memory that is not contiguous, or not the view's own; other memory holds sevens."""
    kinds = ["strided", "offset"]
    kinds += ["transposed"] * (value.ndim > 1) + ["items"] * (value.ndim > 2)
    kinds += ["reversed"] * (live.backend.kind == "numpy" and value.ndim > 1)
    kind = draws.pick(kinds)
    sevens = 7 if value.dtype != np.bool_ else True
    if kind == "transposed":
        return live.native(np.ascontiguousarray(value.swapaxes(-1, -2))).swapaxes(-1, -2)
    if kind == "reversed":
        return live.native(np.ascontiguousarray(value[::-1]))[::-1]
    if kind == "offset":
        padded = np.concatenate([np.full(3, sevens, value.dtype), value.ravel(), np.full(2, sevens, value.dtype)])
        return live.native(padded)[3 : 3 + value.size].reshape(value.shape)
    if kind == "items":
        return live.native(np.repeat(value, 2, axis=0))[::2]
    wide = np.full((*value.shape[:-1], 2 * value.shape[-1]), sevens, value.dtype)
    wide[..., ::2] = value
    return live.native(wide)[..., ::2]


@law("STRIDES", clauses=("D1", "B4"), kills=("ignores-strides",), live=True)
def strides(trial: Trial) -> None:
    """Transposed, strided, offset and expanded views give what contiguous arrays of the same numbers give, in results
    and gradients.
    """
    draws, live = trial.draws, trial.live()
    question = _question(trial)
    expanded = draws.some() and question.x.ndim == 3
    if expanded:
        question = question.but(x=np.broadcast_to(question.x[:1], question.x.shape).copy())
    assert question.cotangent is not None
    plain = live.arguments(question)
    views = plain | {
        "params": {name: _view(draws, live, value) for name, value in question.params.items()},
        "x": broadcast_to(live.native(question.x[:1]), question.x.shape)
        if expanded
        else _view(draws, live, question.x),
        "y": None if question.y is None else _view(draws, live, question.y),
        "mask": None if question.mask is None else _view(draws, live, question.mask),
    }
    want, got = _call(trial, question, plain), _call(trial, question, views)
    want |= _pull(trial, question, plain, live.native(question.cotangent))
    got |= _pull(trial, question, views, _view(draws, live, question.cotangent))
    for part, value in want.items():
        trial.within(f"{part} of views", got[part], value, 2 * _bound(trial, question, part))


@law("REPEAT", clauses=("B2", "B4"), kills=("noise",), live=True)
def repeat(trial: Trial) -> None:
    """The same call three times gives the same bits where the backend claims to be deterministic, and else results
    within both bounds.
    """
    question, live = _question(trial), trial.live()
    first: Results = {}
    for _ in range(3):
        arguments = live.arguments(question)
        found = _call(trial, question, arguments)
        found |= _pull(trial, question, arguments, live.native(question.cotangent))
        if first:
            _agree(trial, "repeated call", question, found, first)
        first = first or found


@law("PURE", clauses=("B4",), kills=("writes-input", "output-aliases-input"), live=True)
def pure(trial: Trial) -> None:
    """A call writes to none of its arguments: parameters, tokens, mask and cotangent keep every bit, and may be
    read-only.
    """
    draws, live = trial.draws, trial.live()
    question = _question(trial)
    if draws.some(0.3):
        operator = Operator(Lattice((2, 3), kernel_size=1), 4, 2, Identity(), relevance=Ones())
        question = _question(trial, operator=operator, masked=False)
    arguments, cotangent = live.arguments(question), live.native(question.cotangent)
    every = {**_arrays(arguments), "cotangent": cotangent}
    if live.backend.kind == "numpy" and draws.some():
        for value in every.values():
            value.setflags(write=False)
    before = {name: _bits(value) for name, value in every.items()}
    versions = {name: getattr(value, "_version", 0) for name, value in every.items()}
    _call(trial, question, arguments)
    _pull(trial, question, arguments, cotangent)
    for name, value in every.items():
        trial.same(f"{name} after the call", _bits(value), before[name])
        written = getattr(value, "_version", 0) - versions[name]
        trial.require(written == 0, f"{name} was written to {written} times, if only to put its numbers back")


def _shares(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(np.shares_memory(one, other))
    return bool(one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr())


def _overwrite(value: Any, number: Array | float) -> None:
    """Other numbers in the same memory."""
    if isinstance(value, np.ndarray):
        value[...] = number
    else:
        import torch

        value.copy_(torch.as_tensor(number))


@law("OWNED", clauses=("B4",), kills=("output-reused-buffer", "output-aliases-input"), live=True)
def owned(trial: Trial) -> None:
    """Results own their memory: they share none with an argument, with each other or with earlier results, writing to
    one changes nothing else, and later calls leave them as they are.
    """
    draws, live = trial.draws, trial.live()
    operator = Operator(Lattice((2, 3), kernel_size=1), 4, 2, Identity(), relevance=Ones())
    native = Operator(Lattice((2, 3), kernel_size=1), 4, 2, PerDisplacement(4), relevance=Ones())
    question = _question(trial, operator=draws.walk((None, operator, None, native, None)))
    generator = draws.generator()
    other = question.but(x=rounded(generator.standard_normal(question.x.shape), trial.dtype))
    arguments, cotangent = live.arguments(question), live.native(question.cotangent)
    every = {**_arrays(arguments), "cotangent": cotangent}
    given = {name: _bits(value) for name, value in every.items()}
    results = _call(trial, question, arguments)
    results |= {f"gradient: {n}": v for n, v in _pull(trial, question, arguments, cotangent).items()}
    kept = {name: _bits(value) for name, value in results.items()}
    later = live.arguments(other)
    fresh = _call(trial, other, later)
    _pull(trial, other, later, cotangent)
    for number, (name, value) in enumerate(results.items()):
        beside = {**every, **{f"a later {n}": v for n, v in fresh.items()}, **dict(list(results.items())[:number])}
        for partner, memory in beside.items():
            trial.require(not _shares(value, memory), f"{name} shares memory with {partner}")
        trial.same(f"{name} after a later call", _bits(value), kept[name])
    for name, value in results.items():
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            continue  # nobody can spoil it
        numbers = rounded(generator.integers(-9, 10, value.shape), trial.dtype)
        _overwrite(value, numbers)
        trial.same(f"{name} after it was written to", _bits(value), numbers)
    for name, value in every.items():
        trial.same(f"{name} after results were written to", _bits(value), given[name])
    _agree(trial, "a call after results were written to", other, _call(trial, other, live.arguments(other)), fresh)


@law("FRESH", clauses=("B4",), kills=("caches-weights",), live=True)
def fresh_arguments(trial: Trial) -> None:
    """A call sees what its arguments hold now: after parameters, tokens and mask are edited in place, the same arrays
    give the results of the new numbers.
    """
    question, live = _question(trial), trial.live()
    arguments, cotangent = live.arguments(question), live.native(question.cotangent)
    _call(trial, question, arguments)
    _pull(trial, question, arguments, cotangent)
    generator = trial.draws.generator()
    changed = {name: rounded(generator.standard_normal(v.shape), trial.dtype) for name, v in question.params.items()}
    tokens = {name: rounded(generator.standard_normal(v.shape), trial.dtype)
              for name, v in (("x", question.x), ("y", question.y)) if v is not None}  # fmt: skip
    mask = question.mask
    if mask is not None:
        mask = ~mask if mask.dtype == np.bool_ else np.where(mask == -np.inf, 1.0, mask / 2)
    other = question.but(params=changed, mask=mask, **tokens)
    for name, value in _arrays(arguments).items():
        new = (changed | tokens).get(name, mask)
        assert new is not None
        _overwrite(value, new)
    exact = trial.budget(other)
    values = {"out": exact.value, "out of vjp": exact.value, **exact.gradient_values}
    found = _call(trial, other, arguments) | _pull(trial, other, arguments, cotangent)
    for part, value in found.items():
        trial.within(f"{part} after edits in place", value, values[part], _bound(trial, other, part))


@contextmanager
def _hurried() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@law("THREADS", clauses=("B4",), kills=("thread-shared-buffer",), quick=3, full=10, live=True)
def threads(trial: Trial) -> None:
    """Four threads that call at once get, each, what they get alone."""
    live, first = trial.live(), _question(trial)
    generator = trial.draws.generator()
    questions = [first.but(x=rounded(generator.standard_normal(first.x.shape), trial.dtype)) for _ in range(4)]

    def answer(question: Question) -> Results:
        arguments = live.arguments(question)
        found = _call(trial, question, arguments)
        return found | _pull(trial, question, arguments, live.native(question.cotangent))

    alone = [answer(question) for question in questions]
    together: list[Results | Exception] = [{} for _ in questions for _ in range(2)]
    start = threading.Barrier(len(questions))

    def work(number: int) -> None:
        try:
            start.wait(20)
            for turn in range(2):
                together[2 * number + turn] = answer(questions[number])
        except Exception as error:  # noqa: BLE001 - told by the thread that waits
            together[2 * number] = error

    with _hurried():
        every = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(questions))]
        for thread in every:
            thread.start()
        for thread in every:
            thread.join()
    for place, found in enumerate(together):
        question = questions[place // 2]
        if isinstance(found, Exception):
            raise BackendFailure(f"beside other threads it raised {type(found).__name__}: {found}") from found
        if found or not any(isinstance(other, Exception) for other in together):
            _agree(trial, "beside other threads", question, found, alone[place // 2])
