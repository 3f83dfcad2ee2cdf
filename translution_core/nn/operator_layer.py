"""Operators as modules: parameters under the names of the spec, values to start with, any grid up to the layer's."""

from typing import Any, cast

import torch
from torch import Tensor, nn

import translution
from translution.nn.cropping import Grid, extents
from translution.nn.decoding import Decoder, DecodingState
from translution.nn.grid_operator import GridOperator
from translution.nn.initialisation import initial_values
from translution.nn.resizing import resized
from translution.normal_form import normal_form
from translution.spec import Identity, Lattice, Ones, Operator


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
        self.backend, self.algorithm = backend, algorithm
        for name, shape in operator.parameters.items():
            *groups, last = name.split(".")
            group: nn.Module = self
            for part in groups:
                if part not in group._modules:
                    group.add_module(part, ParameterGroup())
                group = getattr(group, part)
            group.register_parameter(last, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self._put(operator)
        self.reset_parameters()

    def _put(self, operator: Operator) -> None:
        """Take the operator on, whose parameters are in place."""
        self.operator = operator
        self._whole = GridOperator(operator, self.backend, self.algorithm)
        self._output = GridOperator(_after_the_weighting(operator), self.backend)
        self._paths = {name: tuple(name.split(".")) for name in operator.parameters}
        self._decoder: Decoder | None = None

    def reset_parameters(self) -> None:
        """Start anew, with logits of ordinary attention's scale (:mod:`translution.nn.initialisation`)."""
        parameters = self.operator_parameters()
        for name, start in initial_values(self.operator).items():
            start.fill(parameters[name])

    def operator_parameters(self) -> dict[str, Tensor]:
        """Every parameter of the operator by name, as ``translution.run`` takes them."""
        return {name: self._parameter(path) for name, path in self._paths.items()}

    def _parameter(self, path: tuple[str, ...]) -> Tensor:
        found: Any = self
        for part in path:
            found = getattr(found, part)
        return cast("Tensor", found)

    def _compute(self, part: GridOperator, x: Tensor, y: Tensor | None = None, **named: Any) -> Any:
        params = {name: self._parameter(self._paths[name]) for name in part.names}
        return part.run(params, x, y, **named)

    def _projected(self, heads: Tensor) -> Tensor:
        """Scale and output encoder on heads that are weighted and added up, [.., N, H * D]."""
        out: Tensor = self._compute(self._output, heads.unsqueeze(-2)).squeeze(-2)
        return out

    def no_weight_decay(self) -> set[str]:
        """Names that AdamW should not decay: biases, vectors per displacement, bias tables, gates."""
        form = normal_form(self.operator)
        found = {constant.name for role in (*form.roles, form.output) if role for constant in role.constants}
        return found | {name for name in self.operator.parameters if name.startswith("relevance.")}

    @torch.no_grad()
    def set_input_size(self, grid: int | Grid, interpolate: bool = False) -> None:
        """Make ``grid`` the layer's own from now on.

        Where every displacement has its row it keeps it exactly: a smaller grid is a crop, and with a window or shared
        far classes a larger one may change no parameter. Parameters whose shape changes are new ones: give them to the
        optimiser. Rows of registers stay.

        Args:
            grid: the new extents, one per axis or one for all.
            interpolate: where a displacement has no row, stretch every axis that grows so that its farthest
                displacement stays the farthest, and read the tables in between (multilinear). False refuses that.

        Raises:
            InputError: ``grid`` has displacements without rows and ``interpolate`` is False, or the operator has no
                lattice, or keys of their own.
        """
        operator, found = resized(self.operator, self.operator_parameters(), extents(self.operator, grid), interpolate)
        for name, value in found.items():
            *groups, last = self._paths[name]
            setattr(
                self._parameter(tuple(groups)),
                last,
                nn.Parameter(value, self._parameter(self._paths[name]).requires_grad),
            )
        self._put(operator)

    def step(self, x: Tensor, state: DecodingState | None = None) -> tuple[Tensor, DecodingState]:
        """The next token of a causal sequence, equal to its row in the full forward to rounding.

        Args:
            x: [.., n, Cq]. Without a state the beginning: all registers, then at least one token. With one, one token.
            state: what the last call returned; it is not changed, so that several continuations may share it.

        Returns:
            out [.., n, F] of the tokens given, and the next state: of every token that a later one can see, its inputs
            where encoders differ between displacements, its encoded or brought-down features where they do not.

        Raises:
            InputError: the operator is not causal on one axis, or the sequence is longer than its tables.
        """
        if self._decoder is None:
            self._decoder = Decoder(self.operator)
        params = self.operator_parameters()
        if state is None:
            state = self._decoder.begin(params, x, self._encoded)
            return self(x), state
        heads, state = self._decoder.go_on(params, x, state, self._encoded)
        return self._projected(heads), state

    def _encoded(self, role: str, features: Tensor) -> Tensor:
        """What becomes of a role's features [.., heads, D] before they are multiplied; here nothing."""
        return features

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again."""
        return {**self.__dict__, "_decoder": None}

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
        grid: int | Grid | None = None,
        key_grid: int | Grid | None = None,
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
        out: Tensor = self._compute(self._whole, x, y, mask=mask, grid=grid, key_grid=key_grid)
        return out


def _after_the_weighting(operator: Operator) -> Operator:
    """An operator on one token, its heads side by side, that scales and projects them as the given one does."""
    width = operator.num_heads * operator.value_head_dim
    return Operator(
        Lattice((1,)),
        width,
        operator.num_heads,
        value=Identity(),
        relevance=Ones(),
        output=operator.output,
        output_scale=operator.output_scale,
    )
