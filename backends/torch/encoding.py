"""The normal form's roles on position-major tokens: what is computed once per token, and the tables that are left.

Everything here is plain autograd, in the accumulation dtype (clause D2). ``pairwise`` and ``stream`` then add up

    r[link] = base[token] + sum over tables of z[token] table[c]

each in its slice of a head, and turn it (clause E10). Vectors per class are a table on a feature that is always 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from translution.geometry import Geometry
from translution.normal_form import Constant, Linear, NormalForm, Role, Rotation

Side = Literal["query", "key"]
Parameters = Mapping[str, Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32 (clauses D2, D3)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Table:
    """z [N, B, R] times matrices [T, R, S] or [T, groups, R / groups, S / groups].

    S is ``width`` features of every head, and belongs to head features ``start`` to ``start + width``.
    """

    z: Tensor
    matrices: Tensor
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A rotation of head features ``start`` to ``start + width`` by the token's angles, cos and sin [N, width / 2]."""

    cos: Tensor
    sin: Tensor
    start: int
    width: int
    interleaved: bool

    def apply(self, features: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``features`` [.., width] turned; cos and sin broadcast to [.., width / 2], and a negative sin turns back."""
        if self.interleaved:
            first, second = features[..., 0::2], features[..., 1::2]
        else:
            first, second = features.chunk(2, -1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(turned, -1).flatten(-2) if self.interleaved else torch.cat(turned, -1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """One role of one call: ``base`` [N, B, heads, head_dim] or None, tables, and turns that must wait for the tables.

    ``base`` is zero outside the head features ``base_start`` to ``base_stop``.
    The role ``key`` takes its tables' rows by c(j, i), the others by c(i, j).
    """

    name: str
    side: Side
    heads: int
    head_dim: int
    base: Tensor | None
    tables: tuple[Table, ...]
    turns: tuple[Turn, ...]
    base_start: int
    base_stop: int

    @property
    def tensors(self) -> list[Tensor]:
        """Everything a gradient can flow to, in the order of :meth:`with_tensors`."""
        found = [] if self.base is None else [self.base]
        return found + [t for table in self.tables for t in (table.z, table.matrices)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Encoded":
        """The same role with other tensors."""
        rest = list(tensors)
        base = None if self.base is None else rest.pop(0)
        tables = tuple(replace(table, z=rest[2 * n], matrices=rest[2 * n + 1]) for n, table in enumerate(self.tables))
        return replace(self, base=base, tables=tables)


def _project(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [N, B, C] times [C, E], or block by block [groups, C / groups, E / groups]."""
    if weight.dim() == 2:
        return tokens @ weight
    blocks = torch.unflatten(tokens, -1, (weight.shape[0], weight.shape[1]))
    return torch.einsum("nbgc,gce->nbge", blocks, weight).flatten(-2)


def _placed(features: Tensor, role: Role, term: Linear | Constant) -> Tensor:
    by_head = torch.unflatten(features, -1, (role.num_heads, term.width))
    after = role.head_dim - term.start - term.width
    return by_head if term.width == role.head_dim else functional.pad(by_head, (term.start, after))


def added_vector(role: Role | None, params: Parameters, dtype: torch.dtype) -> Tensor | None:
    """What the role adds whatever the token and the class are, [heads * head_dim]; None where that is nothing."""
    if role is None:
        return None
    total = None
    for constant in role.constants:
        if not constant.per_class:
            vector = _placed(params[constant.name].to(dtype), role, constant).flatten()
            total = vector if total is None else total + vector
    return total


def _static(role: Role, params: Parameters, tokens: Tensor) -> Tensor | None:
    """What does not depend on the class, [N, B, heads, head_dim]; tokens may be [B, N, C] as well."""
    dtype, total = tokens.dtype, None
    fixed = [linear for linear in role.linears if linear.table is None]
    vector = added_vector(role, params, dtype)
    if len(fixed) == 1 and fixed[0].before is not None and fixed[0].width == role.head_dim and vector is not None:
        weight = params[fixed[0].before].to(dtype)
        if weight.dim() == 2:  # one pass over the result instead of two
            return torch.unflatten(functional.linear(tokens, weight.mT, vector), -1, (role.num_heads, role.head_dim))
    for linear in fixed:
        part = tokens if linear.before is None else _project(tokens, params[linear.before].to(dtype))
        placed = _placed(part, role, linear)
        total = placed if total is None else total + placed
    if vector is not None:
        by_head = vector.view(role.num_heads, role.head_dim)
        total = by_head.expand(*tokens.shape[:2], -1, -1) if total is None else total + by_head
    return total


def _turn(rotation: Rotation, geometry: Geometry, side: Side, tokens: Tensor) -> Turn:
    angles = torch.from_numpy(geometry.rotary_angles(side, rotation.width, rotation.base)).to(tokens.device)
    missing = tokens.shape[0] - len(angles)
    angles = functional.pad(angles, (0, 0, 0, missing))
    cos, sin = angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)
    return Turn(cos, sin, rotation.start, rotation.width, rotation.pairing == "interleaved")


def _table(term: Linear, params: Parameters, tokens: Tensor, with_after: bool) -> Table:
    assert term.table is not None
    z = tokens if term.before is None else tokens @ params[term.before].to(tokens.dtype)
    matrices = params[term.table]
    if with_after and term.after is not None:
        matrices = matrices.to(tokens.dtype) @ params[term.after].to(tokens.dtype)
    return Table(z, matrices, term.start, term.width)


def _vectors(term: Constant, role: Role, params: Parameters, tokens: Tensor) -> Table:
    vectors = params[term.name]
    if term.shared_heads:
        vectors = vectors.repeat(1, role.num_heads)
    return Table(tokens.new_ones((*tokens.shape[:2], 1)), vectors.unsqueeze(1), term.start, term.width)


def _overlap(table: Table | Turn, turn: Turn | Table) -> bool:
    return table.start < turn.start + turn.width and turn.start < table.start + table.width


def _encoded(
    role: Role, base: Tensor | None, tables: list[Table], geometry: Geometry, side: Side, tokens: Tensor
) -> Encoded:
    waiting = []
    for rotation in role.rotations:
        turn = _turn(rotation, geometry, side, tokens)
        if any(_overlap(table, turn) for table in tables):
            waiting.append(turn)
        elif base is not None:
            before, own, after = base.tensor_split((turn.start, turn.start + turn.width), -1)
            own = turn.apply(own, turn.cos[:, None, None], turn.sin[:, None, None])
            base = torch.cat((before, own, after), -1)
    fixed = [(term.start, term.start + term.width) for term in role.linears if term.table is None]
    fixed += [(term.start, term.start + term.width) for term in role.constants if not term.per_class]
    start, stop = min((first for first, _ in fixed), default=0), max((last for _, last in fixed), default=0)
    return Encoded(role.name, side, role.num_heads, role.head_dim, base, tuple(tables), tuple(waiting), start, stop)


def encode_role(role: Role, params: Parameters, tokens: Tensor, geometry: Geometry, side: Side) -> Encoded:
    """A query or key role on tokens [N, B, C]. A low-rank ``up`` is folded into its table, T matrices of R x E."""
    tables = [_table(t, params, tokens, True) for t in role.linears if t.table is not None]
    tables += [_vectors(t, role, params, tokens) for t in role.constants if t.per_class]
    return _encoded(role, _static(role, params, tokens), tables, geometry, side, tokens)


@dataclass(frozen=True, slots=True)
class ValuePart:
    """A share of the values: ``encoded``, aggregated; then ``after`` [S, E] into its slice, where there is one."""

    encoded: Encoded
    after: Tensor | None
    start: int
    width: int


def encode_values(role: Role, params: Parameters, tokens: Tensor, geometry: Geometry) -> list[ValuePart]:
    """The value role on tokens [N, B, C], in parts that are aggregated one by one.

    A low-rank ``up`` is applied once, to what a head has aggregated: sum_j a_ij (z_j M[c] U) = (sum_j a_ij z_j M[c]) U.
    """
    plain = [_table(t, params, tokens, False) for t in role.linears if t.table is not None and t.after is None]
    plain += [_vectors(t, role, params, tokens) for t in role.constants if t.per_class]
    base = _static(role, params, tokens)
    parts = []
    if plain or base is not None:
        parts.append(ValuePart(_encoded(role, base, plain, geometry, "key", tokens), None, 0, role.head_dim))
    for term in role.linears:
        if term.table is not None and term.after is not None:
            table = replace(_table(term, params, tokens, False), start=0, width=params[term.after].shape[0])
            inner = Encoded(role.name, "key", 1, table.width, None, (table,), (), 0, 0)
            parts.append(ValuePart(inner, params[term.after].to(tokens.dtype), term.start, term.width))
    return parts


def join_values(parts: Sequence[ValuePart], aggregated: Sequence[Tensor], heads: int, head_dim: int) -> Tensor:
    """The heads' results [Nq, B, heads, head_dim] from what each part has aggregated, [Nq, B, heads, its width]."""
    total = None
    for part, found in zip(parts, aggregated, strict=True):
        if part.after is not None:
            up = torch.unflatten(part.after, -1, (heads, part.width))
            found = torch.einsum("nbhs,shw->nbhw", found, up)
            found = functional.pad(found, (part.start, head_dim - part.start - part.width))
        total = found if total is None else total + found
    assert total is not None
    return total


def project_output(form: NormalForm, params: Parameters, heads: Tensor) -> Tensor:
    """The output encoder on the heads' results [Nq, B, heads, head_dim], or [B, Nq, ..], scaled (clauses O1 to O4)."""
    if form.operator.output_scale != 1:
        heads = form.operator.output_scale * heads
    if form.uplift is None:
        joined = heads.flatten(-2)
    else:
        full, low = heads.tensor_split((heads.shape[-1] - form.uplift.width,), -1)
        joined = full.flatten(-2) + low.flatten(-2) @ params[form.uplift.name].to(heads.dtype)
    if form.output is None:
        return joined
    found = _static(form.output, params, joined)
    assert found is not None
    return found.flatten(-2)
