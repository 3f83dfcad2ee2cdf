"""What torch's autograd makes of a call: gradients, derivatives of them, and derivatives along a direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from translution.conformance.comparison import as_numpy
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Array, Question
from translution.conformance.exam.subject import BackendFailure, LiveSubject, NotClaimed, told
from translution.conformance.laws.sight import NO_LINKS, links_of
from translution.conformance.strategies import draw_question, draw_values
from translution.execution import run
from translution.spec import BiasTable, Lattice, Mixture, Ones, Operator, PairTable, PerDisplacement, Shared, Softmax

# Every query has 2 or 4 links: equal logits give weights without a rounding.
_LAYOUTS = (
    Lattice((2, 2)),
    Lattice((3,), kernel_size=2, boundary="circular"),
    Lattice((3,), kernel_size=4, padding=1, boundary="circular"),
)
_ATTENTION = (Lattice((2, 2)), Lattice((2,), causal=True))
_KINDS = ("relative", "attention", "convolution", "relative", "attention", "mixture", "attention", "values")
_SCALE = 0.5
_RELATIVE = PerDisplacement(4)
_PLAIN = Shared(4)


def _masked(draws: Draws, question: Question) -> Question:
    """One, two or four live keys for every head of every query, so that weights stay without a rounding."""
    generator, keys = draws.generator(), question.operator.layout.num_keys
    place = generator.random(question.weights_shape).argsort(-1)
    live = place < 2 ** generator.integers(0, keys.bit_length(), question.weights_shape[:-1])[..., None]
    return question.but(mask=live if draws.some() else np.where(live, 0.0, -np.inf))


def _formula(question: Question, leaves: dict[str, Any]) -> Any:
    """The result, as torch operations on the definition's links."""
    import torch

    operator = question.operator
    queries = operator.layout.num_queries
    links = [(i, link) for i, found in enumerate(links_of(operator.layout)) for link in found]
    pairs = np.array([(i, link.key) for i, link in links], np.int64).reshape(-1, 2).T
    query, key = torch.from_numpy(pairs)
    rows = [link.value_row for _, link in links]
    x, y = leaves["x"][:, query], leaves["y" if "y" in leaves else "x"][:, key]

    def encoded(role: str, tokens: Any) -> Any:
        if f"{role}.weight" in leaves:
            found = tokens @ leaves[f"{role}.weight"]
        else:
            own = [link.key_row for _, link in links] if role == "key" else rows
            found = torch.einsum("blc,lce->ble", tokens, leaves[f"{role}.table"][own])
        return found.unflatten(-1, (operator.num_heads, -1))

    def summed(terms: Any) -> Any:
        return terms.new_zeros((len(terms), queries, *terms.shape[2:])).index_add(1, query, terms)

    weights = torch.ones((len(x), len(links), operator.num_heads), dtype=x.dtype)
    if operator.uses_content:
        logits = _SCALE * (encoded("query", x) * encoded("key", y)).sum(-1)
        bias = next((value for name, value in leaves.items() if name.endswith("bias")), None)
        powers = (logits if bias is None else logits + bias[:, rows].T).exp()
        if question.mask is not None:
            live = question.mask if question.mask.dtype == np.bool_ else question.mask == 0
            powers = powers * torch.from_numpy(live[:, :, pairs[0], pairs[1]].swapaxes(1, 2).copy())
        softmax = powers / summed(powers)[:, query]
        gate = leaves["relevance.gate"].sigmoid() if "relevance.gate" in leaves else 0.0
        weights = (1 - gate) * softmax + gate * weights
    heads = summed(weights.unsqueeze(-1) * encoded("value", y)).flatten(-2)
    return heads @ leaves["output.weight"]


def _second(out: Any, leaves: dict[str, Any], cotangent: Any, direction: dict[str, Any]) -> dict[str, Any]:
    """Gradient of <gradient of <cotangent, out>, direction>."""
    import torch

    own = list(leaves.values())
    first = torch.autograd.grad(out, own, cotangent, create_graph=True, allow_unused=True)
    parts = [(g * direction[name]).sum() for name, g in zip(leaves, first, strict=True) if g is not None]
    total = torch.stack(parts).sum()
    # Where there is no link the first gradients are constants.
    second = torch.autograd.grad(total, own, allow_unused=True) if total.requires_grad else [None] * len(own)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), second, strict=True)}


def _recording(trial: Trial) -> LiveSubject:
    """The subject, whose arrays record operations."""
    live = trial.live()
    if live.backend.kind != "torch":
        raise NotClaimed(["NumPy arrays record no operations"])
    return live


def _drawn(trial: Trial) -> Question:
    """An operator in whole numbers on a few links, whose logits are 0 and whose gates halve."""
    _recording(trial)
    draws = trial.draws
    kind, masked = draws.walk(_KINDS), draws.walk((False, False, False, True, True, False, False, False))
    layout = draws.pick(_LAYOUTS)
    if kind == "values":
        kind, layout = draws.walk(((kind, layout), ("relative", NO_LINKS), ("convolution", NO_LINKS)))
    elif kind == "convolution":
        layout = _LAYOUTS[1]
    elif masked:
        layout = _LAYOUTS[0]
    softmax, output = Softmax(scale=_SCALE, bias=BiasTable()), Shared(2)
    operator = {
        "relative": Operator(layout, 2, 2, _RELATIVE, _RELATIVE, _RELATIVE, softmax, output),
        "attention": Operator(draws.walk(_ATTENTION), 2, 2, _PLAIN, _PLAIN, _PLAIN, Softmax(scale=_SCALE), output),
        "convolution": Operator(layout, 2, 2, _RELATIVE, relevance=Ones(), output=output),
        "mixture": Operator(layout, 2, 2, _PLAIN, _RELATIVE, _PLAIN, Mixture(softmax, Ones()), output),
        "values": Operator(layout, 2, 2, _RELATIVE, _PLAIN, _PLAIN, Softmax(scale=_SCALE), output),
    }[kind]
    question = draw_question(draws, trial.dtype, operator=operator, integers=True, masked=False, batch=(2,))
    if masked:
        question = _masked(draws, question)
    still = ("query.weight", "query.table", "relevance.gate", "relevance.first.bias", "relevance.bias")
    params = {name: 0 * value if name in still else np.sign(value) for name, value in question.params.items()}
    tokens = {"x": np.sign(question.x)} if question.y is None else {"x": np.sign(question.x), "y": np.sign(question.y)}
    question = question.but(params=params, **tokens)
    trial.asked.append(question)
    trial.require_claim(question, gradient=True)
    return question


def _numbers(question: Question) -> dict[str, Array]:
    return {**question.params, "x": question.x} | ({} if question.y is None else {"y": question.y})


def _call(trial: Trial, question: Question, leaves: dict[str, Any], mask: Any = None) -> Any:
    """The subject's result for these tensors; ``mask`` in place of the question's, where it requires a gradient."""
    live = trial.live()
    if mask is None and question.mask is not None:
        mask = live.native(question.mask)
    return run(
        question.operator,
        {name: leaves[name] for name in question.params},
        leaves["x"],
        leaves.get("y"),
        mask=mask,
        backend=live.backend,
        algorithm=live.algorithm,
    )


def _recorded(trial: Trial, question: Question, leaves: dict[str, Any], mask: Any = None) -> dict[str, Array]:
    """The gradients of <cotangent, out> for the leaves that require one, by torch's autograd through the call."""
    import torch

    live, wanted = trial.live(), {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    wanted |= {} if mask is None else {"mask": mask}
    try:
        out = _call(trial, question, leaves, mask)
        if not out.requires_grad:
            return {name: np.zeros(leaf.shape) for name, leaf in wanted.items()}
        pull, leaves_of = live.native(question.cotangent), list(wanted.values())
        torch.autograd.grad(out, leaves_of, pull, allow_unused=True, retain_graph=True)
        # A graph that is kept can be used again.
        found = torch.autograd.grad(out, leaves_of, pull, allow_unused=True)
    except Exception as error:
        raise BackendFailure(f"recording is claimed, but it raised {told(error)}") from error
    return {
        name: np.zeros(leaf.shape) if gradient is None else as_numpy(gradient).astype(float)
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def _with_mask(trial: Trial) -> tuple[Question, Question]:
    """Attention with a finite float mask; and the same numbers as a bias table with a row for every pair."""
    draws, pairs = trial.draws, _pairs(trial.draws)
    heads = draws.pick((1, 2))
    plain = Operator(pairs, 4, heads, Shared(4), Shared(4), Shared(4))
    question = draw_question(draws, trial.dtype, operator=plain, masked=False, batch=(1,), cotangent=True)
    mask = draw_values(draws.generator(), question.weights_shape, trial.dtype)
    biased = replace(plain, relevance=Softmax(bias=BiasTable()))
    params = {**question.params, "relevance.bias": mask.reshape(heads, pairs.num_classes)}
    return question.but(mask=mask), question.but(operator=biased, params=params)


def _pairs(draws: Draws) -> PairTable:
    """A class for every pair."""
    tokens = draws.pick((2, 3))
    return PairTable(tuple(tuple(range(q * tokens, q * tokens + tokens)) for q in range(tokens)), tokens**2)


@law(
    "AUTOGRAD",
    clauses=("B1", "M2"),
    kills=("autograd-detached", "autograd-halved", "mask-gradient-missing"),
    quick=8,
    full=40,
    live=True,
)
def autograd(trial: Trial) -> None:
    """A call with tensors that require a gradient records it: torch's autograd gives the gradients of tokens,
    parameters and a float mask, whichever of them are asked for, up to the error bound of each element.
    """
    draws, live = trial.draws, _recording(trial)
    kind = draws.walk(("all", "tokens", "mask", "parameters", "one"))
    if kind == "mask":
        question, known = _with_mask(trial)
    else:
        question = draw_question(draws, trial.dtype, batch=draws.pick(((2,), (2, 2))), cotangent=True)
        known = question
    trial.asked.append(question)
    trial.require_claim(question, gradient=True)
    numbers = _numbers(question)
    names = {
        "all": list(numbers), "tokens": ["x", "y"], "mask": [], "parameters": list(question.params),
        "one": [draws.pick(list(numbers))],
    }[kind]  # fmt: skip
    leaves = {name: live.native(value).requires_grad_(name in names) for name, value in numbers.items()}
    mask = live.native(question.mask).requires_grad_() if kind == "mask" else None
    found, exact = _recorded(trial, question, leaves, mask), trial.budget(known)
    for name, gradient in found.items():
        own = "relevance.bias" if name == "mask" else name
        want, bound = exact.gradient_values[own], exact.gradients[own]
        trial.within(f"recorded gradient of {name}", gradient.reshape(want.shape), want, bound)


@law(
    "SECOND-ORDER",
    clauses=("B1", "B2"),
    kills=("second-order-zero",),
    dtypes=("float64", "float32"),
    quick=8,
    full=24,
    live=True,
)
def second_order(trial: Trial) -> None:
    """The gradient of a gradient by torch's autograd is exact where the numbers are whole and the logits equal. A
    backend that claims first derivatives only raises instead; zeros are never made up.
    """
    question, live = _drawn(trial), trial.live()
    numbers, generator = _numbers(question), trial.draws.generator()
    pull = generator.integers(-1, 2, question.out_shape).astype(float)
    direction = {name: generator.integers(-1, 2, value.shape).astype(float) for name, value in numbers.items()}
    import torch

    exact = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in numbers.items()}
    turned = {name: torch.from_numpy(value) for name, value in direction.items()}
    want = _second(_formula(question, exact), exact, torch.from_numpy(pull), turned)
    leaves = {name: live.native(value).requires_grad_() for name, value in numbers.items()}
    try:
        out = _call(trial, question, leaves)
        found = _second(out, leaves, live.native(pull), {name: live.native(v) for name, v in direction.items()})
    except Exception as error:
        if live.claims.gradient_order < 2:
            return
        raise BackendFailure(f"second derivatives are claimed, but raised {told(error)}") from error
    for name, value in want.items():
        trial.same(f"second derivative for {name}", as_numpy(found[name]).astype(float), as_numpy(value))


def _along(way: str, function: Callable[[dict[str, Any]], Any], leaves: dict[str, Any], turned: dict[str, Any]) -> Any:
    """The derivative of ``function`` at ``leaves`` along ``turned``, None where torch has none."""
    import torch
    from torch.autograd import forward_ad

    with warnings.catch_warnings():
        # torch's own, when it loads what forward mode needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        if way == "torch.func.jvp":
            return torch.func.jvp(function, (leaves,), (turned,))[1]
        with forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(leaf, turned[n]) for n, leaf in leaves.items()}  # type: ignore[no-untyped-call]
            return forward_ad.unpack_dual(function(duals)).tangent  # type: ignore[no-untyped-call]


@law("FORWARD-MODE", clauses=("B1",), kills=("forward-mode-zero",), dtypes=("float64", "float32"), quick=8, live=True)
def forward_mode(trial: Trial) -> None:
    """A derivative along a direction by torch's forward mode is exact where the numbers are whole and the logits equal,
    or an error is raised; zeros are never made up.
    """
    question, live, way = _drawn(trial), trial.live(), trial.draws.pick(("torch.func.jvp", "dual numbers"))
    numbers, generator = _numbers(question), trial.draws.generator()
    direction = {name: generator.integers(-1, 2, value.shape).astype(float) for name, value in numbers.items()}
    import torch

    exact, turned = ({n: torch.from_numpy(v.copy()) for n, v in given.items()} for given in (numbers, direction))
    want = as_numpy(_along(way, lambda leaves: _formula(question, leaves), exact, turned))
    own, along = ({n: live.native(v) for n, v in given.items()} for given in (numbers, direction))
    try:
        found = _along(way, lambda leaves: _call(trial, question, leaves), own, along)
    except Exception:  # noqa: BLE001 - whatever it raises, nobody takes it for a number
        return
    got = np.zeros_like(want) if found is None else as_numpy(found).astype(float)
    trial.same(f"derivative along a direction by {way}", got, want)
