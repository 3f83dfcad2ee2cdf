"""Matrix products of the displacements of a visit; of many rows by oneDNN, where that beats what ``torch.mm`` calls.

torch's float32 products on a CPU are MKL's, which on AMD's processors uses half of their vector width: 0.20 TFLOP/s
where oneDNN gives 0.32 at 200 rows and 0.45 at 1600 (192 channels, two cores of Zen 5, torch 2.13). On Zen 4, which
takes two turns for the full width, oneDNN has nothing to gain. The operation is the one that torch.compile multiplies
with. It costs more to call, so that few rows stay with ``torch.bmm``.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from translution.backends.torch.bands import Scratch

# Multiplications from which it is faster: 96 rows of 192 x 192.
ENOUGH = 96 * 192 * 192
# Of AMD's processors with AVX-512, what those have that are as wide as its registers.
SINCE_ZEN_5 = ("avx512_vp2intersect", "avx_vnni")


@cache
def _linear() -> Callable[..., Tensor] | None:
    """rows, weight -> rows weight^T; None where torch.mm is as fast, or the operation is not there."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if "AMD" not in capabilities.get("cpu_name", "") or not capabilities.get("avx512_f", False):
        return None
    if not any(capabilities.get(name, False) for name in SINCE_ZEN_5):
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    operation: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operation


def uses_onednn() -> bool:
    """Whether some products are made by oneDNN."""
    return _linear() is not None


def is_for_onednn(rows: int, matrices: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``rows`` rows are better multiplied with one of the ``matrices`` [T, R, E] by oneDNN, in ``dtype``."""
    return (
        matrices.dim() == 3
        and rows * matrices.shape[1] * matrices.shape[2] >= ENOUGH
        and dtype == torch.float32
        and matrices.device.type in ("cpu", "meta")  # what is counted on meta tensors is what a CPU does
        and not torch.compiler.is_compiling()
        and uses_onednn()
    )


def by_onednn(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [P, R] times matrix [R, E], in memory of its own."""
    if rows.is_meta:  # counts as any other product
        return rows @ matrix
    linear = _linear()
    assert linear is not None
    return linear(rows, matrix.mT, None, "none", [], "")


def _blocks(rows: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """rows [n, P, groups * width] as [n, groups, P, width], the width of the matrix's ``axis``."""
    return torch.unflatten(rows, -1, (matrix.shape[1], matrix.shape[axis])).transpose(1, 2)


def multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Rows [n, P, R] times matrix [n, R, E] or [n, groups, R / groups, E / groups]."""
    if matrix.dim() == 3:
        return torch.bmm(rows, matrix, out=out)
    _blocks(out, matrix, 3).copy_(_blocks(rows, matrix, 2) @ matrix)
    return out


def outer(rows: Tensor, gradient: Tensor, total: Tensor, opens: bool, scratch: Scratch) -> None:
    """total (+)= rows^T gradient."""
    if total.dim() == 4:
        product = _blocks(rows, total, 2).mT @ _blocks(gradient, total, 3)
    elif total.is_contiguous():
        if opens:
            torch.bmm(rows.mT, gradient, out=total)
        else:
            total.baddbmm_(rows.mT, gradient)
        return
    else:  # of products that do not lie together each would be computed on its own, by one core
        product = torch.bmm(rows.mT, gradient, out=scratch(*total.shape))
    if opens:
        total.copy_(product)
    else:
        total.add_(product)
