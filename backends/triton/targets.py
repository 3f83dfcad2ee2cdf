"""Block sizes per kernel and target from a table, and tile shapes from the problem.

There is no autotuning: it makes the first call slow, may choose differently in every run, and needs a device.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import triton

from translution.backends.triton.tiles import columns_of

Axes = tuple[int, int, int]

INTERPRETED = not isinstance(columns_of, triton.runtime.JITFunction)
MAX_OFFSET = 2**31 - 1
# The smallest side of a product of tiles.
LEAST = 1 if INTERPRETED else 16


def launching() -> AbstractContextManager[None]:
    """Where kernels are launched."""
    if not INTERPRETED:
        return nullcontext()
    from translution.backends.triton import interpreter

    return interpreter.launching()


@dataclass(frozen=True, slots=True)
class Target:
    """``interpreter``, ``cuda`` with 80, 90, .. or ``hip``."""

    backend: str
    capability: int = 0


@dataclass(frozen=True, slots=True)
class Blocks:
    """``rows`` of a tile or pairs at once, input ``channels`` per step, ``features`` of queries, keys or partners and
    columns of ``results`` (values, for their scores) held at once. ``turned``: tables' gradients are transposed.
    """

    rows: int
    channels: int
    features: int
    results: int
    warps: int
    stages: int
    turned: bool = False


INTERPRETER = Blocks(rows=128, channels=128, features=128, results=128, warps=1, stages=1)
_SMALL = Blocks(rows=32, channels=32, features=32, results=32, warps=4, stages=2)
_NARROW = replace(_SMALL, channels=16)  # with 32 channels float32 spills on 90
# Which number of stages does not spill, at 192 to 768 channels, is different for each kernel.
_LARGE = Blocks(rows=64, channels=64, features=64, results=64, warps=8, stages=2)
_SUMS = replace(_LARGE, results=128, stages=3)
# kernel -> (at least this capability, item size, blocks), first match; measured in tests/triton_ahead_of_time.
CUDA = {
    "forward": ((80, 2, _LARGE), (0, 2, _SMALL), (0, 4, _SMALL)),
    "weights": ((80, 2, replace(_LARGE, stages=3)), (0, 2, _SMALL), (90, 4, _NARROW), (0, 4, _SMALL)),
    "d_logits": ((80, 2, _LARGE), (0, 2, _SMALL), (90, 4, _NARROW), (0, 4, _SMALL)),
    "owners": ((80, 2, _SUMS), (0, 2, _SMALL), (90, 4, _NARROW), (0, 4, _SMALL)),
    # Turned, every load of the values' product is asynchronous on 80, and its products wait for one another on 90.
    "tables": ((90, 2, _SUMS), (80, 2, replace(_SUMS, turned=True)), (0, 2, _SMALL), (0, 4, _SMALL)),
}
_WAVES = Blocks(rows=64, channels=64, features=64, results=64, warps=4, stages=2)
HIP = {
    "forward": {2: _WAVES, 4: _SMALL},
    "weights": {2: _WAVES, 4: _SMALL},
    "d_logits": {2: _WAVES, 4: _SMALL},
    "owners": {2: _WAVES, 4: _SMALL},
    "tables": {2: _WAVES, 4: _SMALL},
}


def current_target() -> Target:
    """The target that triton would compile for."""
    if INTERPRETED:
        return Target("interpreter")
    found: Any = triton.runtime.driver.active.get_current_target()
    return Target(found.backend, found.arch if isinstance(found.arch, int) else 0)


def blocks_for(target: Target, item_size: int, kernel: str = "forward") -> Blocks:
    """The launcher table."""
    if target.backend == "interpreter":
        return INTERPRETER
    if target.backend == "hip":
        return HIP[kernel][item_size]
    return next(blocks for least, size, blocks in CUDA[kernel] if target.capability >= least and size == item_size)


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def block(most: int, n: int) -> int:
    """The side of a product of tiles that covers ``n``, or ``most``."""
    return min(most, power_of_two(n, LEAST))


def tile_for(rows: int, batch: int, grid: Axes, item_elements: int) -> tuple[int, int, int, int]:
    """TZ, TY, TX and batch items of a tile of ``rows`` rows: batch first, since its rows share every displacement.

    ``item_elements`` bounds what one batch item spans in any operand, so that offsets within a tile fit in 32 bits.
    """
    items = min(power_of_two(batch), rows)
    while items > 1 and items * item_elements > MAX_OFFSET:
        items //= 2
    extents, sites = [power_of_two(n) for n in grid], [1, 1, 1]
    while items * math.prod(sites) < rows:
        # The shortest side grows, the last axis first: a compact tile needs the fewest displacements.
        open_axes = [axis for axis in (2, 1, 0) if sites[axis] < extents[axis]]
        axis = min(open_axes, key=lambda a: sites[a]) if open_axes else 2
        sites[axis] *= 2
    return sites[0], sites[1], sites[2], items


def programs_for(tile: tuple[int, int, int, int], batch: int, grid: Axes) -> int:
    """How many tiles cover the grid and the batch."""
    return math.prod(-(-n // t) for n, t in zip((*grid, batch), tile, strict=True))


def interpreter_rows(batch: int, grid: Axes) -> int:
    """Rows that cover a small problem with one tile, since the interpreter's time is per program and step."""
    covering = power_of_two(batch) * math.prod(power_of_two(n) for n in grid)
    return min(max(covering, 16), INTERPRETER.rows)
