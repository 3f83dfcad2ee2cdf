"""Bounds for a torch module and its operator, as running sums over whole tensors: they fit layers of any size.

:func:`translution.conformance.error_model.budget` bounds every operator but holds arrays of size links x features. A
window operator is one sum of products, so that two more runs of the module itself give its bound: one on absolute
values (the magnitude) and one on ones (the number of terms). Attention with shared weights needs no encoded pairs, only
its logits.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from translution.backends.torch.conversion import AveragePooling, describe
from translution.conformance.error_model import Budget
from translution.conformance.rounding import ARITHMETIC, Bounded, Segments, exact
from translution.spec import Operator, Softmax

FloatArray = npt.NDArray[np.float64]


def evaluate(
    module: nn.Module, arguments: Mapping[str, Any], cotangent: Tensor | None = None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Output, attention weights (None where there are none), and the gradients of <cotangent, output> by name.

    Gradients are taken for every argument that requires one and for every parameter; an argument given under several
    names counts once, under the first.
    """
    leaves: dict[str, Tensor] = {}
    for name, value in (*arguments.items(), *module.named_parameters()):
        if isinstance(value, Tensor) and value.requires_grad and all(value is not seen for seen in leaves.values()):
            leaves[name] = value
    result = module(**arguments)
    out, weights = result if isinstance(result, tuple) else (result, None)
    if cotangent is None or not leaves:
        return out.detach(), None if weights is None else weights.detach(), {}
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    return out.detach(), None if weights is None else weights.detach(), found


def window_bounds(
    module: nn.Module, arguments: Mapping[str, Any], cotangent: Tensor | None, dtype: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bounds of output and gradients of a float64 Conv*, ConvTranspose* or AvgPool* for arithmetic in ``dtype``.

    Without a cotangent there are no gradients. The bound is gamma(n) sum |a| |b| for sums of n products (Higham 2002,
    section 3.1), with n counted for each element.
    """
    arithmetic = ARITHMETIC[dtype]

    def rerun(change: Any) -> tuple[Tensor, dict[str, Tensor]]:
        changed = copy.deepcopy(module)
        changed._forward_hooks.clear()
        changed._forward_pre_hooks.clear()
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.copy_(change(parameter))
        given = {
            name: change(value.detach()).requires_grad_() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        out, _, gradients = evaluate(changed, given, None if cotangent is None else change(cotangent))
        return out, gradients

    out, gradients = rerun(torch.abs)
    terms, gradient_terms = rerun(torch.ones_like)
    if not list(module.parameters()):  # a pooling divides: at most the window, and two roundings
        description = describe(module)
        assert isinstance(description, AveragePooling)
        window = float(math.prod(description.kernel_size))
        terms = torch.full_like(terms, window)
        gradient_terms = {name: torch.full_like(count, window) for name, count in gradient_terms.items()}

    def bound(magnitude: Tensor, count: Tensor) -> Tensor:
        gamma = (count + 2) * arithmetic.unit / (1 - (count + 2) * arithmetic.unit)
        return (gamma + 2 * arithmetic.storage) * magnitude + count * arithmetic.tiny * (magnitude > 0)

    return bound(out, terms), {name: bound(value, gradient_terms[name]) for name, value in gradients.items()}


def attention_bounds(
    operator: Operator,
    params: Mapping[str, npt.ArrayLike],
    x: npt.ArrayLike,
    y: npt.ArrayLike | None,
    mask: npt.ArrayLike | None,
    cotangent: npt.ArrayLike | None,
    dtype: str,
) -> Budget:
    """:func:`budget` for attention with shared weights and every pair in the support; tokens [B, N, C].

    The rules are those of :mod:`translution.conformance.rounding`, applied to whole matrices.
    """
    assert isinstance(operator.relevance, Softmax)
    calculate, heads, scale = ARITHMETIC[dtype], operator.num_heads, operator.scale_of(operator.relevance)
    own = {name: exact(value) for name, value in params.items()}
    queries = exact(x)
    keys = queries if y is None else exact(y)
    batch, length, sources = queries.shape[0], queries.shape[1], keys.shape[1]
    gradients: dict[str, Bounded] = {}

    def encode(role: str, tokens: Bounded) -> Bounded:
        weight = own[f"{role}.weight"]
        result = calculate.contract("bnc,ce->bne", tokens, weight, weight.shape[0])
        if f"{role}.bias" in own:
            result = calculate.add(result, own[f"{role}.bias"])
        return calculate.stored(result)

    def pull(role: str, tokens: Bounded, back: Bounded) -> Bounded:
        weight = own[f"{role}.weight"]
        count = tokens.shape[0] * tokens.shape[1]
        gradients[f"{role}.weight"] = calculate.contract("bnc,bne->ce", tokens, back, count)
        if f"{role}.bias" in own:
            gradients[f"{role}.bias"] = calculate.total(back, (0, 1))
        return calculate.stored(calculate.contract("bne,ce->bnc", back, weight, weight.shape[1]))

    def split(tokens: Bounded) -> Bounded:
        return tokens.reshape(batch, tokens.shape[1], heads, -1)

    q, k, v = split(encode("query", queries)), split(encode("key", keys)), split(encode("value", keys))
    width = q.shape[3]
    logits = calculate.scale(calculate.contract("blhd,bshd->blsh", q, k, width), scale)
    number = np.zeros((1, 1, 1, 1)) if mask is None else np.asarray(mask)
    if number.dtype == np.bool_:
        number = np.where(number, 0.0, -np.inf)
    added = np.broadcast_to(number.astype(np.float64), (batch, heads, length, sources)).transpose(0, 2, 3, 1)
    live = added != -np.inf
    logits = calculate.stored(calculate.add(logits, exact(np.where(live, added, 0))))
    rows = Segments(np.repeat(np.arange(length), sources), length)
    flat = (batch, length * sources, heads)
    p = calculate.softmax(logits.reshape(*flat), live.reshape(flat), rows).reshape(batch, length, sources, heads)
    summed = calculate.stored(calculate.contract("blsh,bshd->blhd", p, v, sources))
    heads_out = summed.reshape(batch, length, -1)
    out = encode("output", heads_out)

    found = (out.value, out.error, p.value.transpose(0, 3, 1, 2), p.error.transpose(0, 3, 1, 2))
    if cotangent is None:
        return Budget(*found)
    back = split(pull("output", heads_out, exact(cotangent)))
    dp = calculate.contract("blhd,bshd->blsh", back, v, width)
    dv = calculate.stored(calculate.contract("blsh,blhd->bshd", p, back, length))
    # sum_s p dp, or <back, summed> as fused kernels have it: terms for both.
    shift = calculate.contract("blsh,blsh->blh", p, dp, sources + width)
    moved = calculate.add(dp, -shift.reshape(batch, length, 1, heads))
    ds = calculate.stored(calculate.scale(calculate.multiply(p, moved), scale)).where(live)
    dq = calculate.stored(calculate.contract("blsh,bshd->blhd", ds, k, sources))
    dk = calculate.stored(calculate.contract("blsh,blhd->bshd", ds, q, length))
    joined = [part.reshape(batch, part.shape[1], -1) for part in (dq, dk, dv)]
    dx = pull("query", queries, joined[0])
    dy = calculate.add(pull("key", keys, joined[1]), pull("value", keys, joined[2]))
    if y is None:
        dx = calculate.add(dx, dy)
    gradients |= {"x": dx, "y": dy}
    stored = {name: calculate.stored(gradient) for name, gradient in gradients.items()}
    return Budget(
        *found,
        {name: gradient.error for name, gradient in stored.items()},
        {name: gradient.value for name, gradient in stored.items()},
    )
