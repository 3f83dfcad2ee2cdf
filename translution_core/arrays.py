"""Arrays of either kind without importing either library that is not already there."""

import sys
from typing import Any, Literal

import numpy as np

from translution.errors import InputError

Array = Any
Kind = Literal["numpy", "torch"]

FLOATS = ("float64", "float32", "float16", "bfloat16")


def kind_of(name: str, value: Array) -> Kind:
    """``numpy`` or ``torch``; anything else is refused."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return "numpy"
    raise InputError(
        "D1", f"{name} is a {type(value).__name__}", "arrays are numpy.ndarray or torch.Tensor", "Convert it first"
    )


def dtype_name(value: Array) -> str:
    """``float32`` for either kind of array."""
    return str(value.dtype).removeprefix("torch.")


def needs_gradient(value: Array) -> bool:
    """Whether torch would record operations on this array."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def to_kind(name: str, value: Array, kind: Kind, device: Any = None) -> Array:
    """``value`` as the other kind of array; torch results land on ``device``. A gradient is never dropped silently."""
    own = kind_of(name, value)
    if own == kind:
        return value
    if kind == "torch":
        import torch

        return torch.from_numpy(np.array(value)).to(device)
    if needs_gradient(value):
        raise InputError(
            "B1",
            f"{name} requires a gradient",
            "this backend computes in NumPy and would lose it",
            "Use backend='torch', translution.vjp, or detach() first",
        )
    if dtype_name(value) == "bfloat16":
        raise InputError(
            "D1", f"{name} is bfloat16", "NumPy has no bfloat16", "Cast to float32, or use backend='torch'"
        )
    return value.detach().cpu().numpy()


def broadcast_to(value: Array, shape: tuple[int, ...]) -> Array:
    """A broadcast view of either kind of array."""
    return np.broadcast_to(value, shape) if isinstance(value, np.ndarray) else value.expand(shape)


def zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """A read-only view of one zero, of the kind, dtype and device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.broadcast_to(np.zeros((), like.dtype), shape)
    return like.new_zeros(()).expand(shape)
