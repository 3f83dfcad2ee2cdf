"""Tables for another grid: the same rows where there are such, others read in between them.

As for positional bias tables (Liu et al. 2021, section 4.1 interpolates them bi-cubically), a table is taken as samples
of a function of the displacement. An axis that grows is stretched: its farthest displacement keeps its matrix, and
displacement 0 is displacement 0.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from translution.errors import InputError
from translution.nn.cropping import Grid, class_axes, crop, on_grid
from translution.spec import Clip, Lattice, Operator, RegisterClass
from translution.spec.layout import Label


@dataclass(frozen=True, slots=True)
class Mix:
    """Rows of a new table: sums over corners of ``weights[r] * old[numbers[r]]``."""

    corners: tuple[tuple[Sequence[int], Sequence[float]], ...]

    def of(self, table: Tensor, axis: int) -> Tensor:
        """The new table, in the dtype of the old one."""
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        total = None
        for numbers, weights in self.corners:
            rows = table.index_select(axis, torch.tensor(numbers, device=table.device)).to(dtype)
            shape = [len(weights) if n == axis else 1 for n in range(table.dim())]
            part = rows * torch.tensor(weights, dtype=dtype, device=table.device).reshape(shape)
            total = part if total is None else total + part
        assert total is not None
        return total.to(table.dtype)


def resized(
    operator: Operator, params: Mapping[str, Tensor], grid: Grid, interpolate: bool
) -> tuple[Operator, dict[str, Tensor]]:
    """The operator on ``grid``, and its parameters that are not the same any more.

    Raises:
        InputError: see :meth:`translution.nn.OperatorLayer.set_input_size`.
    """
    larger = on_grid(operator, grid)
    old, new = operator.layout, larger.layout
    assert isinstance(old, Lattice)
    assert isinstance(new, Lattice)
    if old.key_grid is not None:
        raise InputError(
            "L1",
            f"grid={grid} for an operator with key_grid={old.key_grid}",
            "only an operator with one grid for both sides can be given another",
            "Build a new layer",
        )
    axes = class_axes(operator)
    if not axes or set(new.labels()) <= set(old.labels()) or not interpolate:
        found = crop(operator, grid)
        return larger, {
            rows.name: params[rows.name]
            .index_select(rows.axis, torch.tensor(tuple(rows.numbers), device=params[rows.name].device))
            for rows in found.rows
        }  # fmt: skip
    if not (old.far is None or isinstance(old.far, Clip)) or old.boundary == "circular":
        raise InputError(
            "L7",
            f"interpolation with far={old.far}, boundary={old.boundary!r}",
            "classes that stand for many displacements have no rows in between",
            "Use far=Clip(...), which needs no interpolation once it clips, or build a new layer",
        )
    mixes = {"query": _mix(old.labels(), new.labels()), "key": _mix(old.key_labels(), new.key_labels())}
    return larger, {name: mixes[at.seen_from].of(params[name], at.axis) for name, at in axes.items()}


def _mix(old: Sequence[Label], new: Sequence[Label]) -> Mix:
    """For every new label the old ones around it."""
    row_of = {label: row for row, label in enumerate(old)}
    known = [label for label in old if not isinstance(label, RegisterClass)]
    wanted = [label for label in new if not isinstance(label, RegisterClass)]
    rank = len(known[0])
    steps = [sorted({label[axis] for label in known}) for axis in range(rank)]
    ratios = [
        min(1.0, max(map(abs, steps[axis])) / max(1, *(abs(label[axis]) for label in wanted))) for axis in range(rank)
    ]
    numbers: list[list[int]] = [[] for _ in range(2**rank)]
    weights: list[list[float]] = [[] for _ in range(2**rank)]
    for label in new:
        if isinstance(label, RegisterClass):
            around = [(row_of[label], 1.0)]
        else:
            sides = [_around(steps[axis], label[axis] * ratios[axis]) for axis in range(rank)]
            corners = [(tuple(d for d, _ in c), math.prod(w for _, w in c)) for c in itertools.product(*sides)]
            # In raster order half a row of displacements does not occur: what is there is weighted anew.
            around = [(row_of[found], weight) for found, weight in corners if weight and found in row_of]
            total = sum(weight for _, weight in around)
            around = [(row, weight / total) for row, weight in around]
        around += [(around[0][0], 0.0)] * (2**rank - len(around))
        for corner, (row, weight) in enumerate(around):
            numbers[corner].append(row)
            weights[corner].append(weight)
    return Mix(tuple(zip(numbers, weights, strict=True)))


def _around(steps: Sequence[int], place: float) -> list[tuple[int, float]]:
    """The displacements of an axis below and above a place between them, with their weights."""
    above = next((n for n, step in enumerate(steps) if step >= place), len(steps) - 1)
    if steps[above] <= place or above == 0:
        return [(steps[above], 1.0)]
    low, high = steps[above - 1], steps[above]
    share = (place - low) / (high - low)
    return [(low, 1 - share), (high, share)]
