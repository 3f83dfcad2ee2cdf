"""What operations with a hand-written backward share: a gradient that has its own graph, and refusals."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from translution.errors import NotSupported

Results = tuple[Tensor | None, ...]


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """A region in which dtypes stay as they are."""
    if like.is_meta:  # for which torch has no autocast
        return nullcontext()
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


NO_TRANSFORMS = "stream, sdpa and compiled are no part of torch.func transforms; algorithm='pairwise' is"


class Operation(torch.autograd.Function):
    """A function with a hand-written backward, which forward-mode differentiation must not pass over in silence."""

    # The result, without a thought of gradients; every operation has its own arguments.
    compute: Callable[..., Tensor]

    @classmethod
    def call(cls, *arguments: Any) -> Tensor:
        """The result, recorded where anything may ask for a gradient.

        Raises:
            NotSupported: inside a transform of torch.func.
        """
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if not torch.compiler.is_compiling():
            if maybe_current_level() is not None:
                raise NotSupported("torch", None, [NO_TRANSFORMS])
            duals = [forward_ad.unpack_dual(t) for t in tensors]  # type: ignore[no-untyped-call]
            recorded = recorded or any(dual.tangent is not None for dual in duals)
        if not recorded:
            return cls.compute(*arguments)
        found: Tensor = cls.apply(*arguments)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> NoReturn:  # noqa: ARG004 - torch's signature
        """Always :class:`NotSupported`."""
        raise NotSupported("torch", None, ["stream and sdpa have no forward-mode derivative; algorithm='pairwise' has"])
