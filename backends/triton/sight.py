"""Tokens that nothing sees. They are absent (clause M4), and products over all tokens, in torch, must not meet them.

The kernels load a token where a live pair needs it; but the gradient of a weight that every token meets once is a sum
over all of them, where 0 times NaN would be NaN.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from translution.backends.triton.operands import Box
from translution.spec import Lattice

BoolArray = npt.NDArray[np.bool_]


def _taps(box: Box, axis: int) -> npt.NDArray[np.int64]:
    """[grid, keys] of an axis: the tap at which a query meets a key, -1 for none."""
    queries, keys = np.arange(box.grid[axis])[:, None], np.arange(box.keys[axis])
    distance = queries * box.stride[axis] + box.shift[axis] - keys
    tap = distance // box.step[axis]
    return np.where((distance % box.step[axis] == 0) & (tap >= 0) & (tap < box.taps[axis]), tap, -1)


@lru_cache(maxsize=64)
def linked(layout: Lattice, box: Box) -> tuple[BoolArray, BoolArray]:
    """Queries [Nq] and keys [Nk] with some link, registers first."""
    taps, sides = [_taps(box, axis) for axis in range(3)], []
    for over in (1, 0):
        # The highest class that a site has: its highest tap on every axis.
        z, y, x = (tap.max(over) for tap in taps)
        number = (z[:, None, None] * box.taps[1] + y[:, None]) * box.taps[2] + x
        found = (z >= 0)[:, None, None] & (y >= 0)[:, None] & (x >= 0) & (number >= box.base)
        # A register links every query; a register that is a query links every key, unless that is later.
        every = layout.registers > 0 and (over == 1 or layout.causal is False)
        sides.append(np.concatenate([np.ones(layout.registers, bool), found.ravel() | every]))
    return sides[0], sides[1]


def support(layout: Lattice, box: Box) -> BoolArray:
    """[Nq, Nk]: which pairs are linked."""
    z, y, x = _taps(box, 0), _taps(box, 1), _taps(box, 2)  # [queries, keys] of [z, y, x, key z, key y, key x]
    z, y, x = z[:, None, None, :, None, None], y[None, :, None, None, :, None], x[None, None, :, None, None, :]
    number = (z * box.taps[1] + y) * box.taps[2] + x
    grid = ((z >= 0) & (y >= 0) & (x >= 0) & (number >= box.base)).reshape(box.num_queries, box.num_keys)
    count, causal = layout.registers, layout.causal is not False
    every = np.ones((layout.num_queries, layout.num_keys), bool)
    every[:count] = np.arange(layout.num_keys) <= np.arange(count)[:, None] if causal else True
    every[count:, count:] = grid
    return every


def without_unseen(x: Tensor, y: Tensor, layout: Lattice, box: Box, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B, Nq, C] and y [B, Nk, C] with zeros for queries that see nothing and keys that nothing sees."""
    if mask is None:
        found = linked(layout, box)
        if found[0].all() and found[1].all():
            return x, y
        sides = torch.from_numpy(found[0]).to(x.device)[None], torch.from_numpy(found[1]).to(x.device)[None]
    else:
        live = (mask != -torch.inf if mask.is_floating_point() else mask).any(1)
        pairs = live & torch.from_numpy(support(layout, box)).to(x.device)
        sides = pairs.any(2), pairs.any(1)
    return torch.where(sides[0][..., None], x, 0.0), torch.where(sides[1][..., None], y, 0.0)
