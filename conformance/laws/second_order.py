"""Derivatives of gradients by torch's autograd, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

from translution.conformance.comparison import as_numpy
from translution.conformance.exam.draws import Draws
from translution.conformance.exam.law import Trial, law
from translution.conformance.exam.question import Question
from translution.conformance.exam.subject import BackendFailure, NotClaimed
from translution.conformance.laws.sight import NO_LINKS, links_of
from translution.conformance.strategies import draw_question
from translution.execution import run
from translution.spec import BiasTable, Lattice, Mixture, Ones, Operator, PerDisplacement, Shared, Softmax

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
    query = torch.tensor([i for i, _ in links], dtype=torch.int64)
    key = torch.tensor([link.key for _, link in links], dtype=torch.int64)
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
            powers = powers * torch.from_numpy(live[:, :, query, key].swapaxes(1, 2).copy())
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
    second = torch.autograd.grad(total, own, allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), second, strict=True)}


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
    draws, live = trial.draws, trial.live()
    if live.backend.kind != "torch":
        raise NotClaimed(["NumPy arrays record no gradient to differentiate again"])
    kind, masked = draws.walk(_KINDS), draws.walk((False, False, False, True, True, False, False, False))
    layout = draws.pick(_LAYOUTS)
    if kind == "values":
        layout = draws.walk((layout, NO_LINKS, NO_LINKS))
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
    trial.asked.append(question)
    if reasons := live.reasons(question, gradient=True):
        raise NotClaimed(reasons)
    numbers = {**question.params, "x": question.x} | ({} if question.y is None else {"y": question.y})
    # Logits are 0, gates halve.
    still = ("query.weight", "query.table", "relevance.gate", "relevance.first.bias", "relevance.bias")
    numbers = {name: 0 * value if name in still else np.sign(value) for name, value in numbers.items()}
    generator = draws.generator()
    pull = generator.integers(-1, 2, question.out_shape).astype(float)
    direction = {name: generator.integers(-1, 2, value.shape).astype(float) for name, value in numbers.items()}
    import torch

    exact = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in numbers.items()}
    turned = {name: torch.from_numpy(value) for name, value in direction.items()}
    want = _second(_formula(question, exact), exact, torch.from_numpy(pull), turned)
    leaves = {name: live.native(value).requires_grad_() for name, value in numbers.items()}
    params = {name: leaves[name] for name in question.params}
    try:
        mask = None if question.mask is None else live.native(question.mask)
        out = run(
            operator, params, leaves["x"], leaves.get("y"), mask=mask, backend=live.backend, algorithm=live.algorithm
        )
        found = _second(out, leaves, live.native(pull), {name: live.native(v) for name, v in direction.items()})
    except Exception as error:
        if live.claims.gradient_order < 2:
            return
        raise BackendFailure(f"second derivatives are claimed, but raised {type(error).__name__}: {error}") from error
    for name, value in want.items():
        trial.same(f"second derivative for {name}", as_numpy(found[name]).astype(float), as_numpy(value))
