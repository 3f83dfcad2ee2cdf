"""An operator on whatever grid a call is on: which rows of which parameters, remembered, in a graph and outside."""

from typing import Any

import torch
from torch import Tensor

import translution
from translution.errors import InputError
from translution.nn.cropping import Crop, Grid, Rows, crop, extents
from translution.spec import Operator, PairTable, operator_to_json


class GridOperator:
    """An operator of a layer, run on the layer's parameters.

    ``names`` are the parameters that it takes. What is remembered of grids is neither copied nor pickled.
    """

    def __init__(self, operator: Operator, backend: str = "torch", algorithm: str | None = None) -> None:
        self.operator, self.backend, self.algorithm = operator, backend, algorithm
        self.names = tuple(operator.parameters)
        self._crops: dict[tuple[Grid, Grid | None], Crop] = {}
        self._index: dict[tuple[Any, ...], Tensor] = {}

    def __reduce__(self) -> tuple[type["GridOperator"], tuple[Operator, str, str | None]]:
        """By what it was made of."""
        return type(self), (self.operator, self.backend, self.algorithm)

    def run(
        self,
        params: dict[str, Tensor],
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        grid: int | Grid | None = None,
        key_grid: int | Grid | None = None,
        return_weights: bool = False,
    ) -> Any:
        """:func:`translution.run` on the tokens' grid. Under autocast tokens and parameters are cast as those of
        ``torch.nn.Linear`` are: all but float64.
        """
        operator: Operator | str = self.operator
        if grid is None and y is None:
            grid = self._grid_of(x)
        if grid is not None:
            key = extents(self.operator, grid), None if key_grid is None else extents(self.operator, key_grid)
            operator, every = self._on(key)
            params = dict(params)
            for rows in every:
                params[rows.name] = self._selected(params[rows.name], rows, key)
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            params = {name: value.to(dtype) for name, value in params.items()}
            x, y = x.to(dtype), None if y is None else y.to(dtype)
        if isinstance(operator, str):
            from translution.graph import call

            return call(operator, params, x, y, mask, self.backend, self.algorithm, return_weights)
        return translution.run(
            operator,
            params,
            x,
            y,
            mask=mask,
            backend=self.backend,
            algorithm=self.algorithm,
            return_weights=return_weights,
        )

    def _grid_of(self, x: Tensor) -> Grid | None:
        """The grid that the number of tokens alone tells, None for the operator's own."""
        layout = self.operator.layout
        tokens = x.shape[-2] if x.dim() > 1 else 0
        if tokens == (layout.num_queries if self.operator.uses_content else layout.num_keys):
            return None
        if isinstance(layout, PairTable) or layout.key_grid is not None or tokens <= layout.registers:
            return None
        if layout.rank == 1:
            return (tokens - layout.registers,)
        raise InputError(
            "L1",
            f"x has {tokens} tokens",
            f"the layer's grid is {layout.grid} with {layout.registers} registers, {layout.num_queries} tokens",
            f"Say which grid they are: grid=({', '.join(['...'] * layout.rank)})",
        )

    def _on(self, key: tuple[Grid, Grid | None]) -> tuple[Operator | str, tuple[Rows, ...]]:
        if torch.compiler.is_compiling():
            return _written_crop(self.operator, *key), _rows(self.operator, *key)
        if key not in self._crops:
            self._crops[key] = crop(self.operator, *key)
        return self._crops[key].operator, self._crops[key].rows

    def _selected(self, value: Tensor, rows: Rows, key: tuple[Any, ...]) -> Tensor:
        numbers = rows.numbers
        if isinstance(numbers, range):
            return value.narrow(rows.axis, numbers.start, len(numbers))
        if torch.compiler.is_compiling():
            return value.index_select(rows.axis, torch.tensor(numbers, device=value.device))
        own = (*key, rows.name, value.device)
        if own not in self._index:
            self._index[own] = torch.tensor(numbers, device=value.device)
        return value.index_select(rows.axis, self._index[own])


# What is called while torch.compile makes a graph, and whose result is a constant in it: text and numbers alone may be.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _written_crop(operator: Operator, grid: Grid, key_grid: Grid | None) -> str:
    return operator_to_json(crop(operator, grid, key_grid).operator)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rows(operator: Operator, grid: Grid, key_grid: Grid | None) -> tuple[Rows, ...]:
    return crop(operator, grid, key_grid).rows
