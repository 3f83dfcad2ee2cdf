"""``vjp`` of backends whose results torch records: what :class:`translution.Backend` asks for, by torch's autograd."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from translution.arrays import Array
from translution.inputs import Inputs
from translution.registry import Gradients


def recorded_vjp(
    forward: Callable[[Mapping[str, Any], Inputs], Any], params: Mapping[str, Any], inputs: Inputs, cotangent: Array
) -> tuple[Array, Gradients]:
    """Out, and the gradients of <cotangent, out>; x and y are leaves of their own. ``forward`` is called once."""
    import torch

    x, y = (tokens.detach().requires_grad_() for tokens in (inputs.x, inputs.y))
    own = {name: value.detach().requires_grad_() for name, value in params.items()}
    leaves = [x, y, *own.values()]
    with torch.enable_grad():
        out = forward(own, replace(inputs, x=x, y=y))
    # Where a layout has no links, nothing of x or y reaches the result.
    given: Any = [None] * len(leaves)
    if out.requires_grad:
        given = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, given, strict=True)]
    return out.detach(), Gradients(dict(zip(own, found[2:], strict=True)), found[0], found[1])
