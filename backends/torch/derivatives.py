"""What operations with a hand-written backward share: a gradient that has its own graph, and refusals."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from translution.errors import NotSupported

Results = tuple[Tensor | None, ...]


def no_autocast(like: Tensor) -> torch.autocast:
    """A region in which dtypes stay as they are."""
    return torch.autocast(like.device.type, enabled=False)


def without_autocast(backward: Callable[[Any, Tensor], Results]) -> Callable[..., Results]:
    """A backward that also keeps its dtypes where it is called under autocast."""

    @wraps(backward)
    def kept(ctx: Any, cotangent: Tensor) -> Results:
        with no_autocast(cotangent):
            return backward(ctx, cotangent)

    return kept


def gradients_with_graph(
    compute: Callable[..., Tensor], tensors: Sequence[Tensor | None], needs: Sequence[bool], cotangent: Tensor
) -> list[Tensor | None]:
    """The gradients of <cotangent, compute(*tensors)>, differentiable again; None where not needed."""
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in tensors]  # a tensor given twice gets two gradients
        wanted = [t for t, need in zip(own, needs, strict=True) if need and t is not None]
        out = compute(*own)
        if not out.requires_grad:  # a layout without links
            return [None] * len(own)
        found = iter(torch.autograd.grad(out, wanted, cotangent, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]


class Operation(torch.autograd.Function):
    """A function with a hand-written backward, which forward-mode differentiation must not pass over in silence."""

    @classmethod
    def call(cls, *arguments: Any) -> Tensor:
        """``apply`` with a type."""
        found: Tensor = cls.apply(*arguments)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:  # noqa: ARG004 - torch's signature
        """Always :class:`NotSupported`."""
        raise NotSupported("torch", None, ["stream and sdpa have no forward-mode derivative; algorithm='pairwise' has"])
