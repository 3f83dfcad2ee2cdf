"""An operator on another grid: which rows of the tables it reads. Rows are found by what they mean, never by place."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from translution.errors import InputError
from translution.normal_form import normal_form
from translution.spec import Lattice, Operator

Grid = tuple[int, ...]


def extents(operator: Operator, grid: int | Grid) -> Grid:
    """One extent per axis; one number serves every axis."""
    if isinstance(grid, int):
        return (grid,) * (operator.layout.rank if isinstance(operator.layout, Lattice) else 1)
    return tuple(grid)


@dataclass(frozen=True, slots=True)
class ClassAxis:
    """Where a parameter has its rows, one per displacement class: ``axis`` of its shape, as the query or key sees a
    pair.
    """

    axis: int
    seen_from: Literal["query", "key"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the parameter ``name``, along ``axis``, in the order in which they are read; a range where they are
    one piece.
    """

    name: str
    axis: int
    numbers: range | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Crop:
    """The operator on another grid, and the rows of each table that it reads; a table of which it reads all in place is
    left out.
    """

    operator: Operator
    rows: tuple[Rows, ...]


@lru_cache(maxsize=256)
def class_axes(operator: Operator) -> Mapping[str, ClassAxis]:
    """Every parameter with a row per displacement class, by name."""
    form, found = normal_form(operator), dict[str, ClassAxis]()
    for role in form.roles:
        names = [linear.table for linear in role.linears if linear.table is not None]
        names += [constant.name for constant in role.constants if constant.per_class]
        found |= {name: ClassAxis(0, "key" if role.name == "key" else "query") for name in names}
    for branch in form.branches:
        if branch.bias is not None and branch.bias.kind == "table" and branch.bias.parameter is not None:
            found[branch.bias.parameter] = ClassAxis(1, "query")
    return found


def on_grid(operator: Operator, grid: Grid, key_grid: Grid | None = None) -> Operator:
    """The same operator on another grid; without ``key_grid`` on the same grid of keys where it has one of its own.

    Raises:
        InputError: the operator has no lattice, or the grid another number of axes.
        SpecError: the layout can't be had on that grid.
    """
    layout = operator.layout
    if not isinstance(layout, Lattice):
        raise InputError(
            "L8",
            f"grid={grid} for an operator on a {type(layout).__name__}",
            "a pair table says which pairs there are, for one number of tokens",
            "Leave grid out and give all tokens",
        )
    if key_grid is not None and layout.key_grid is None:
        raise InputError(
            "L1",
            f"key_grid={key_grid}",
            "this operator has the same tokens on both sides",
            "Give grid alone",
        )
    for name, given in (("grid", grid), ("key_grid", key_grid)):
        if given is not None and len(given) != layout.rank:
            raise InputError(
                "L1", f"{name}={given}", f"this operator has {layout.rank} axes", f"Give {layout.rank} extents"
            )
    return replace(operator, layout=replace(layout, grid=grid, key_grid=key_grid or layout.key_grid))


@lru_cache(maxsize=256)
def crop(operator: Operator, grid: Grid, key_grid: Grid | None = None) -> Crop:
    """The operator on a grid whose displacements all have rows in the operator's tables.

    That holds for every smaller grid, and with a window or shared far classes for larger ones too.

    Raises:
        InputError: a displacement of the grid has no row, or :func:`on_grid` refuses it.
    """
    smaller = on_grid(operator, grid, key_grid)
    layout, inner = operator.layout, smaller.layout
    assert isinstance(layout, Lattice)
    assert isinstance(inner, Lattice)
    axes = class_axes(operator)
    if not axes or layout == inner:
        return Crop(smaller, ())
    own = {label: row for row, label in enumerate(layout.labels())}
    wanted = inner.labels()
    missing = [label for label in wanted if label not in own]
    if missing:
        raise InputError(
            "L3",
            f"grid={grid}" + ("" if key_grid is None else f", key_grid={key_grid}"),
            f"this layer has rows for the displacements of {layout.grid}, and none for {missing[0]}",
            "Give a grid up to the layer's; a layer's set_input_size(..., interpolate=True) makes it a larger one",
        )
    key_own = {label: row for row, label in enumerate(layout.key_labels())}
    numbers = {
        "query": _piece([own[label] for label in wanted]),
        "key": _piece([key_own[label] for label in inner.key_labels()]),
    }
    everything = range(layout.num_classes)
    found = [Rows(name, at.axis, numbers[at.seen_from]) for name, at in axes.items()]
    return Crop(smaller, tuple(rows for rows in found if rows.numbers != everything))


def _piece(numbers: list[int]) -> range | tuple[int, ...]:
    piece = range(numbers[0], numbers[0] + len(numbers))
    return piece if numbers == list(piece) else tuple(numbers)
