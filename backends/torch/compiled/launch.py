"""Calls of compiled kernels by all threads of torch."""

import ctypes
import ctypes.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch.compiled.kernels import backward_module, forward_module
from translution.backends.torch.compiled.processor import Compiled, processor
from translution.backends.torch.compiled.sizes import Sizes
from translution.backends.torch.compiled.work import arguments


@cache
def _parallel() -> Any:
    """What calls a function by all threads of torch's own pool: another one would take the cores from it. None where
    torch has no OpenMP that is known."""
    folder = Path(torch.__file__).parent / "lib"
    names = [str(path) for pattern in ("libgomp*", "libomp*", "libiomp5*") for path in sorted(folder.glob(pattern))]
    names += [name for name in map(ctypes.util.find_library, ("gomp", "omp")) if name is not None]
    for name in names:
        try:
            return ctypes.CDLL(name).GOMP_parallel
        except (OSError, AttributeError):
            continue
    return None


def threads() -> int:
    """How many go through links at a time."""
    return torch.get_num_threads() if _parallel() is not None else 1


@cache
def _forward(sizes: Sizes) -> Compiled:
    own = processor()
    assert own is not None
    return Compiled(*forward_module(own, sizes))


@cache
def _backward(sizes: Sizes) -> Compiled:
    own = processor()
    assert own is not None
    return Compiled(*backward_module(own, sizes))


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Their addresses, as an array."""
    return (ctypes.c_int64 * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def integers(values: Sequence[int]) -> Any:
    """As an array."""
    return (ctypes.c_int64 * len(values))(*values)


def address(value: Any) -> int:
    """Of a tensor, an array of :func:`pointers` or :func:`integers`, or an integer as it is."""
    if isinstance(value, int):
        return value
    return value.data_ptr() if isinstance(value, Tensor) else ctypes.addressof(value)


def _call(function: int, names: Sequence[str], values: Mapping[str, Any]) -> None:
    given = integers([address(values[name]) for name in names])
    count, parallel = values["stretches"], _parallel()
    if count > 1 and parallel is not None:
        parallel(ctypes.c_void_p(function), ctypes.byref(given), ctypes.c_uint(count), ctypes.c_uint(0))
    else:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(ctypes.addressof(given))


def forward(sizes: Sizes, name: str, values: Mapping[str, Any]) -> None:
    """Call ``sums`` or ``highest``."""
    _call(_forward(sizes).addresses[name], arguments(sizes, False), values)


def backward(sizes: Sizes, values: Mapping[str, Any]) -> None:
    """Call ``gradients``."""
    _call(_backward(sizes).addresses["gradients"], arguments(sizes, True), values)


def lanes() -> int:
    """Numbers of a vector."""
    own = processor()
    assert own is not None
    return own.lanes
