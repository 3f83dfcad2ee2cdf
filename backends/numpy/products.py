"""Matrix products over the last axis, plain or block-diagonal, and their gradients."""

import math

import numpy as np

from translution.backends.numpy.blocks import Array


def product(tokens: Array, matrix: Array) -> Array:
    """tokens [.., C] times [C, E], or times [groups, C / groups, E / groups], group by group."""
    rows = math.prod(tokens.shape[:-1])
    if matrix.ndim == 2:
        return (tokens.reshape(rows, matrix.shape[0]) @ matrix).reshape(*tokens.shape[:-1], matrix.shape[1])
    groups, inputs, features = matrix.shape
    grouped = tokens.reshape(rows, groups, inputs).swapaxes(0, 1) @ matrix
    return grouped.swapaxes(0, 1).reshape(*tokens.shape[:-1], groups * features)


def product_vjp(cotangent: Array, matrix: Array) -> Array:
    """Gradient of :func:`product` for its tokens."""
    return product(cotangent, matrix.swapaxes(-1, -2))


def matrix_vjp(tokens: Array, cotangent: Array, shape: tuple[int, ...]) -> Array:
    """Gradient of :func:`product` for its matrix of that ``shape``: the sum over rows of tokens x cotangent.

    A cotangent of exactly 0 takes no part, whatever the token holds: a key that one head masks may be NaN (clause M4).
    """
    rows, groups = math.prod(tokens.shape[:-1]), shape[0] if len(shape) == 3 else 1
    left = tokens.reshape(rows, groups, shape[-2]).transpose(1, 2, 0)
    right = cotangent.reshape(rows, groups, shape[-1]).swapaxes(0, 1)
    found = left @ right
    if not np.isfinite(found).all():
        rough = ~np.isfinite(left).all(axis=(0, 1))
        found = np.where(rough, 0, left) @ right
        for row in np.flatnonzero(rough):
            outer = left[:, :, row, None] * right[:, row, None, :]
            found += np.where(right[:, row, None, :] != 0, outer, 0)
    return found.reshape(shape)
