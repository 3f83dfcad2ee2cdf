"""Operators as modules: parameters under the names of the spec, values to start with, any grid up to the layer's."""

from typing import Any, cast

import torch
from torch import Tensor, nn

import translution
from translution.errors import InputError
from translution.nn.cropping import Crop, Grid, Rows, crop
from translution.nn.initialisation import initial_values
from translution.normal_form import normal_form
from translution.spec import Lattice, Operator, PairTable, operator_to_json


class ParameterGroup(nn.Module):
    """Parameters whose names go on after a dot."""

    def extra_repr(self) -> str:
        """Names and shapes."""
        return ", ".join(
            f"{name}={tuple(value.shape)}" for name, value in self._parameters.items() if value is not None
        )


class OperatorModule(nn.Module):
    """An operator and its parameters; what :class:`OperatorLayer` and the layers by name have in common.

    The keys of ``state_dict()`` are exactly the names in ``operator.parameters``, and there are no buffers: which row
    of a table belongs to which pair follows from the spec.
    """

    def __init__(
        self,
        operator: Operator,
        *,
        backend: str = "torch",
        algorithm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        translution.compile(operator, backend, algorithm)
        self.operator, self.backend, self.algorithm = operator, backend, algorithm
        self._crops: dict[tuple[Grid, Grid | None], Crop] = {}
        self._row_index: dict[tuple[Any, ...], Tensor] = {}
        for name, shape in operator.parameters.items():
            *groups, last = name.split(".")
            group: nn.Module = self
            for part in groups:
                if part not in group._modules:
                    group.add_module(part, ParameterGroup())
                group = getattr(group, part)
            group.register_parameter(last, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._paths = tuple((name, tuple(name.split("."))) for name in operator.parameters)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew, with logits of ordinary attention's scale (:mod:`translution.nn.initialisation`)."""
        parameters = self.operator_parameters()
        for name, start in initial_values(self.operator).items():
            start.fill(parameters[name])

    def operator_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the operator by name, as ``translution.run`` takes them."""
        return {name: self._parameter(path) for name, path in self._paths}

    def _parameter(self, path: tuple[str, ...]) -> Tensor:
        found: Any = self
        for part in path:
            found = getattr(found, part)
        return cast("Tensor", found)

    def no_weight_decay(self) -> set[str]:
        """Names that AdamW should not decay: biases, vectors per displacement, bias tables, gates."""
        form = normal_form(self.operator)
        found = {constant.name for role in (*form.roles, form.output) if role for constant in role.constants}
        return found | {name for name in self.operator.parameters if name.startswith("relevance.")}

    def _compute(
        self,
        x: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        grid: Grid | None,
        key_grid: Grid | None,
        return_weights: bool = False,
    ) -> Any:
        operator: Operator | str = self.operator
        params = self.operator_parameters()
        if grid is None and y is None:
            grid = self._grid_of(x)
        if grid is not None:
            key = tuple(grid), None if key_grid is None else tuple(key_grid)
            operator, found = self._on(key)
            for rows in found:
                params[rows.name] = self._selected(params[rows.name], rows, key)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
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
        """The grid that the number of tokens alone tells, None for the layer's own."""
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
        if own not in self._row_index:
            self._row_index[own] = torch.tensor(numbers, device=value.device)
        return value.index_select(rows.axis, self._row_index[own])

    def __getstate__(self) -> dict[str, Any]:
        """Without the indices of grids seen so far."""
        return {**self.__dict__, "_crops": {}, "_row_index": {}}

    def extra_repr(self) -> str:
        """The operator in a line."""
        operator, layout = self.operator, self.operator.layout
        where = f"grid={layout.grid}" if isinstance(layout, Lattice) else f"tokens={layout.num_queries}"
        parts = [where, f"dim={operator.dim}", f"num_heads={operator.num_heads}"]
        if isinstance(layout, Lattice):
            if layout.registers:
                parts.append(f"registers={layout.registers}")
            if layout.causal is not False:
                parts.append(f"causal={layout.causal}")
            if layout.kernel_size is not None:
                parts.append(f"kernel_size={layout.kernel_size}")
        parts.append(f"relative={', '.join(normal_form(operator).relative_roles) or 'none'}")
        parts.append(f"displacements={layout.num_classes}")
        if (self.backend, self.algorithm) != ("torch", None):
            parts += [f"backend={self.backend!r}", f"algorithm={self.algorithm!r}"]
        return ", ".join(parts)


class OperatorLayer(OperatorModule):
    """Any operator of the spec as a layer.

    Args:
        operator: what is computed; ``translution.run(layer.operator, layer.operator_parameters(), x)`` is the same.
        backend, algorithm: as in :func:`translution.run`; what is named runs or raises (clause B1).
        device, dtype: of the parameters. ``device="meta"`` allocates nothing; after ``to_empty`` call
            ``reset_parameters``.

    Under ``torch.autocast`` tokens and parameters are cast to its dtype as those of ``torch.nn.Linear`` are.
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        grid: Grid | None = None,
        key_grid: Grid | None = None,
    ) -> Tensor:
        """out [.., Nq, F] of x [.., Nq, Cq] and of y [.., Nk, Ck], which is x where it is not given.

        Args:
            mask: as in :func:`translution.run`, for the grid that is given.
            grid: the tokens' grid (of the queries) where it is not the layer's own: any grid whose displacements have
                rows in the layer's tables, such as every smaller one. In one dimension the number of tokens tells.
                Registers come first, and all of them.
            key_grid: grid of y, for operators that have one of their own.

        Raises:
            InputError: an array does not fit, or the grid has displacements without rows.
            NotSupported: backend and algorithm can't run this.
        """
        out: Tensor = self._compute(x, y, mask, grid, key_grid)
        return out


# What is called while torch.compile makes a graph, and whose result is a constant in it: text and numbers alone may be.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _written_crop(operator: Operator, grid: Grid, key_grid: Grid | None) -> str:
    return operator_to_json(crop(operator, grid, key_grid).operator)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rows(operator: Operator, grid: Grid, key_grid: Grid | None) -> tuple[Rows, ...]:
    return crop(operator, grid, key_grid).rows
