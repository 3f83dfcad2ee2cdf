"""An operator in a graph of ``torch.compile`` or ``torch.export``: one node, ``torch.ops.translution.run``.

Inside it everything is as outside, the choice of the algorithm included. Its backward is a node too, which computes the
result once more; a derivative of that is refused by torch. Imported where a graph is made, as it imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from translution.algorithms import Request, cost
from translution.errors import NotSupported
from translution.execution import run
from translution.spec import Operator, operator_from_json, operator_to_json

_operator = lru_cache(maxsize=256)(operator_from_json)


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """What is called while a graph is made, and whose result is a constant in it."""
    return torch.compiler.assume_constant_result(function)  # type: ignore[no-any-return, no-untyped-call]


@_outside
def _written(operator: Operator) -> str:
    return operator_to_json(operator)


def call(
    operator: Operator | str,
    params: Mapping[str, Any],
    x: Any,
    y: Any,
    mask: Any,
    backend: Any,
    algorithm: str | None,
    return_weights: bool,
) -> Any:
    """:func:`translution.run` as a node; differentiable once. The operator may be given as its JSON text.

    Raises:
        NotSupported: for a backend that is not given by name, and with ``return_weights``.
    """
    if not isinstance(backend, str):
        raise NotSupported(backend.name, algorithm, ["in a graph a backend is given by its name"])
    if return_weights:
        raise NotSupported(backend, algorithm, ["in a graph no weights are returned"])
    names = "\n".join(params)
    written = operator if isinstance(operator, str) else _written(operator)
    return torch.ops.translution.run(written, names, list(params.values()), x, y, mask, backend, algorithm or "")


def _result(
    spec: str, names: str, params: list[Tensor], x: Tensor, y: Tensor | None, mask: Tensor | None,
    backend: str, algorithm: str,
) -> Tensor:  # fmt: skip
    own = dict(zip(names.split("\n") if names else [], params, strict=True))
    out: Tensor = run(_operator(spec), own, x, y, mask=mask, backend=backend, algorithm=algorithm or None)
    return out


@torch.library.custom_op("translution::run", mutates_args=())
def node(
    spec: str,
    names: str,
    params: list[Tensor],
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    backend: str,
    algorithm: str,
) -> Tensor:
    """out [.., Nq, F] of the operator that ``spec`` writes, with parameters by ``names``, one in a line."""
    with torch.no_grad():
        return _result(spec, names, params, x, y, mask, backend, algorithm)


@node.register_fake
def _(spec: str, names: str, params: list[Tensor], x: Tensor, *others: Any) -> Tensor:  # noqa: ARG001 - torch's signature
    operator = _operator(spec)
    return x.new_empty((*x.shape[:-2], operator.layout.num_queries, operator.out_features))


@torch.library.custom_op("translution::run_backward", mutates_args=())
def node_backward(
    spec: str,
    names: str,
    params: list[Tensor],
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    backend: str,
    algorithm: str,
    cotangent: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients that are needed, of the parameters, x, y and mask in this order."""
    given = [*params, x, y, mask]
    own = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(given, needs, strict=True)]
    wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
    count = len(params)
    with _recording(), torch.enable_grad():
        if not all(t.view_as(t).requires_grad for t in wanted):
            raise RuntimeError("torch records nothing inside a node of its graph; its backward would be silently zero")
        own_params: Any = own[:count]
        own_x: Any = own[count]
        out = _result(spec, names, own_params, own_x, own[count + 1], own[count + 2], backend, algorithm)
    # Where a layout has no links, nothing reaches the result.
    found = (
        torch.autograd.grad(out, wanted, cotangent, allow_unused=True) if out.requires_grad else [None] * len(wanted)
    )
    return [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(wanted, found, strict=True)]


def _recording() -> Any:
    """A region in which autograd records what a node computes, which is no part of the graph around it."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradOther", "AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradXLA"):
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys)


@node_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    params, x, y, mask, needs = arguments[2], *arguments[3:6], arguments[9]
    return [
        t.new_empty(t.shape) for t, need in zip([*params, x, y, mask], needs, strict=True) if need and t is not None
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - torch's signature
    spec, names, params, x, y, mask, backend, algorithm = inputs
    ctx.texts, ctx.count = (spec, names, backend, algorithm), len(params)
    ctx.save_for_backward(*params, x, y, mask)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    spec, names, backend, algorithm = ctx.texts
    saved, count = ctx.saved_tensors, ctx.count
    needs_params, needs_others = ctx.needs_input_grad[2], ctx.needs_input_grad[3:6]
    needs = [*(needs_params if isinstance(needs_params, list | tuple) else [needs_params] * count), *needs_others]
    found = iter(
        torch.ops.translution.run_backward(
            spec, names, list(saved[:count]), *saved[count:], backend, algorithm, cotangent, needs
        )
    )
    own = [next(found) if need else None for need in needs]
    return None, None, own[:count], *own[count:], None, None


node.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.translution.run)
def _flops(spec: str, *shapes: Any, out_shape: Any = None, **_: Any) -> int:  # noqa: ARG001 - torch's signature
    return cost(Request(_operator(spec), math.prod(out_shape[:-2])), "stream").flops
