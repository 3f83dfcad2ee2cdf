"""A role's encoder split into what the kernel multiplies per displacement and what torch computes once per token.

r[h] = static[h] (once per token, float32)  +  tokens table[c] after  in the slice of the relative term
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from translution.geometry import geometry
from translution.normal_form import Constant, Linear, Role, Rotation
from translution.spec import Lattice

Params = Mapping[str, Tensor]


def relative_term(role: Role) -> Linear | None:
    """The term with a table. Claims allow one at most."""
    return next((term for term in role.linears if term.table is not None), None)


def static_terms(role: Role) -> list[Linear | Constant]:
    """The terms without a class."""
    linears: list[Linear | Constant] = [term for term in role.linears if term.table is None]
    return linears + [term for term in role.constants if not term.per_class]


def _linear(tokens: Tensor, term: Linear, params: Params) -> Tensor:
    if term.before is None:
        return tokens.float()
    weight = params[term.before].float()
    if weight.ndim == 2:
        return tokens.float() @ weight
    grouped = tokens.float().reshape(*tokens.shape[:-1], weight.shape[0], weight.shape[1])
    return torch.einsum("bngc,gce->bnge", grouped, weight).flatten(-2)


def _rotate(features: Tensor, rotation: Rotation, side: str, layout: Lattice) -> Tensor:
    """Features [B, N, H, D] turned by the token's own position (clause E10)."""
    positions = geometry(layout)
    angles = torch.from_numpy(positions.rotary_angles(side, rotation.width, rotation.base))
    cosine, sine = (f(angles).float().to(features.device)[:, None, :] for f in (torch.cos, torch.sin))
    half, lead, pairs = rotation.pairing == "half", features.shape[:-1], rotation.width // 2
    paired = features.reshape(*lead, 2, pairs) if half else features.reshape(*lead, pairs, 2).transpose(-1, -2)
    first, second = paired.unbind(-2)
    turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-2 if half else -1)
    return turned.flatten(-2)


@dataclass(frozen=True)
class Encoded:
    """One role of one call: all tokens [B, N, C], registers first."""

    role: Role
    side: str
    tokens: Tensor
    params: Params
    layout: Lattice

    @cached_property
    def relative(self) -> Linear | None:
        """The term with a table."""
        return relative_term(self.role)

    @cached_property
    def table(self) -> Tensor | None:
        """[T, R, E]."""
        if self.relative is None or self.relative.table is None:
            return None
        return self.params[self.relative.table].contiguous()

    @cached_property
    def narrowed(self) -> Tensor | None:
        """What meets the table, [B, N, R] in the dtype of the tokens: the tokens, or their down-projection."""
        if self.relative is None:
            return None
        if self.relative.before is None:
            return self.tokens.contiguous()
        return (self.tokens.float() @ self.params[self.relative.before].float()).to(self.tokens.dtype)

    @cached_property
    def after(self) -> Tensor | None:
        """[S, H, width] of a low-rank term that projects up again."""
        if self.relative is None or self.relative.after is None:
            return None
        matrix = self.params[self.relative.after].float()
        return matrix.reshape(matrix.shape[0], self.role.num_heads, -1)

    @cached_property
    def static(self) -> Tensor | None:
        """[B, N, H, D] float32 of everything without a class; None where there is nothing."""
        terms = static_terms(self.role)
        if not terms:
            return None
        heads = self.role.num_heads
        batch, count, _ = self.tokens.shape
        found = self.tokens.new_zeros((batch, count, heads, self.role.head_dim), dtype=torch.float32)
        for term in terms:
            where = slice(term.start, term.start + term.width)
            if isinstance(term, Linear):
                found[..., where] += _linear(self.tokens, term, self.params).reshape(batch, count, heads, term.width)
            else:
                found[..., where] += self.params[term.name].float().reshape(heads, -1)
        for turn in self.role.rotations:
            where = slice(turn.start, turn.start + turn.width)
            found[..., where] = _rotate(found[..., where].clone(), turn, self.side, self.layout)
        return found

    def raise_(self, narrow: Tensor) -> Tensor:
        """Products with the table, [B, N, H, S or width], as features of a head [B, N, H, width]."""
        return narrow if self.after is None else torch.einsum("bnhs,shw->bnhw", narrow, self.after)

    def at(self, row: int, tokens: slice) -> Tensor:
        """[B, n, H, D] float32 of some tokens for one row of the table."""
        heads, width = self.role.num_heads, self.role.head_dim
        batch, count, _ = self.tokens[:, tokens].shape
        found = self.tokens.new_zeros((batch, count, heads, width), dtype=torch.float32)
        if self.static is not None:
            found = found + self.static[:, tokens]
        if self.relative is not None and self.narrowed is not None and self.table is not None:
            product = self.narrowed[:, tokens].float() @ self.table[row].float()
            # Every head sees all features that an up-projection is still to mix.
            groups = heads if self.after is None else 1
            narrow = product.reshape(batch, count, groups, product.shape[-1] // groups)
            raised = self.raise_(narrow.expand(-1, -1, heads, -1))
            found[..., self.relative.start : self.relative.start + self.relative.width] += raised
        return found
