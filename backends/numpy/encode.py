"""One role of the normal form: its features for the links of a block, and the gradients of both (clauses E1 to E10)."""

from collections.abc import Mapping
from functools import cached_property
from types import EllipsisType
from typing import Literal

import numpy as np

from translution.backends.numpy.blocks import Array, Block, Groups
from translution.backends.numpy.products import matrix_vjp, product, product_vjp
from translution.geometry import Geometry, IntArray
from translution.normal_form import Constant, Linear, Role, Rotation

Turn = tuple[Array, Array]


def _rotated(features: Array, turn: Turn, pairing: str, sign: int) -> Array:
    """features [P, B, H, width] turned by ``sign`` times the angle; ``turn`` is cosine and sine, [P, width / 2]."""
    cosine, sine = turn[0][:, None, None, :], sign * turn[1][:, None, None, :]
    half = features.shape[-1] // 2
    cuts = (slice(None, half), slice(half, None)) if pairing == "half" else (slice(0, None, 2), slice(1, None, 2))
    first, second = (features[..., cut] for cut in cuts)
    result = np.empty_like(features)
    result[..., cuts[0]] = first * cosine - second * sine
    result[..., cuts[1]] = second * cosine + first * sine
    return result


class RoleEncoder:
    """A role with its parameters and the tokens [N, B, C] of one call.

    What does not depend on the class is computed once per token: ``base`` [N, B, H, D], and for every table the tokens
    that it multiplies, [N, B, R]. A rotation is linear, so ``base`` is rotated once too. ``deferred`` terms are left
    out of :meth:`links`: their last matrix is applied after the keys are summed up (values only).
    """

    def __init__(
        self, role: Role, params: Mapping[str, Array], tokens: Array, geometry: Geometry, *, defer: bool = False
    ) -> None:
        self.role, self.params, self.tokens = role, params, tokens
        self._side: Literal["query", "key"] = "query" if role.name == "query" else "key"
        self.deferred = tuple(t for t in role.linears if defer and t.after is not None)
        self._fixed = tuple(t for t in role.linears if t.table is None)
        self._tables = tuple(t for t in role.linears if t.table is not None and t not in self.deferred)
        self._vectors = tuple(c for c in role.constants if c.per_class)
        self._turns = {r: self._turn(geometry, r) for r in role.rotations}
        relative: tuple[Linear | Constant, ...] = (*self._tables, *self._vectors)
        self._link_rotations = tuple(
            r
            for r in role.rotations
            if any(t.start < r.start + r.width and r.start < t.start + t.width for t in relative)
        )
        self._inner = {
            t: tokens if t.before is None else product(tokens, params[t.before])
            for t in role.linears
            if t.table is not None
        }
        self._shape = (*tokens.shape[:2], role.num_heads, role.head_dim)
        self.base = self._base()

    @cached_property
    def gradients(self) -> dict[str, Array]:
        """Gradients of the role's parameters, by name; 0 until cotangents are taken in."""
        own = f"{self.role.name}."
        return {name: np.zeros_like(value) for name, value in self.params.items() if name.startswith(own)}

    @cached_property
    def _base_gradient(self) -> Array | None:
        return None if self.base is None else np.zeros_like(self.base)

    @cached_property
    def _inner_gradient(self) -> dict[Linear, Array]:
        return {term: np.zeros_like(inner) for term, inner in self._inner.items()}

    def _turn(self, geometry: Geometry, rotation: Rotation) -> Turn:
        angles = geometry.rotary_angles(self._side, rotation.width, rotation.base)
        if len(angles) < len(self.tokens):
            angles = np.concatenate([angles, np.zeros((1, angles.shape[1]))])
        return np.cos(angles).astype(self.tokens.dtype), np.sin(angles).astype(self.tokens.dtype)

    def _rotate(self, features: Array, rotation: Rotation, rows: IntArray | slice, sign: int) -> None:
        part = (..., slice(rotation.start, rotation.start + rotation.width))
        cosine, sine = self._turns[rotation]
        features[part] = _rotated(features[part], (cosine[rows], sine[rows]), rotation.pairing, sign)

    def _base(self) -> Array | None:
        constants = tuple(c for c in self.role.constants if not c.per_class)
        if not self._fixed and not constants and self.role.is_relative:
            return None
        total = np.zeros(self._shape, self.tokens.dtype)
        for term in self._fixed:
            features = self.tokens if term.before is None else product(self.tokens, self.params[term.before])
            total[self._part(term)] += features.reshape(*self._shape[:3], term.width)
        for constant in constants:
            total[self._part(constant)] += self.params[constant.name].reshape(-1, constant.width)
        for rotation in self.role.rotations:
            self._rotate(total, rotation, slice(None), 1)
        return total

    @staticmethod
    def _part(term: Linear | Constant) -> tuple[EllipsisType, slice]:
        return ..., slice(term.start, term.start + term.width)

    def _joined(self, features: Array, term: Linear) -> Array:
        """The term's slice of features [.., H, D] as [.., H * width]."""
        return features[self._part(term)].reshape(*features.shape[:-2], self.role.num_heads * term.width)

    def _class(self, block: Block) -> int:
        return block.key_class if self.role.name == "key" else block.value_class

    def _groups(self, block: Block) -> Groups:
        return block.query if self._side == "query" else block.key

    def inner(self, term: Linear, block: Block) -> Array:
        """The tokens of every link times the term's table: [P, B, S], before its last matrix."""
        assert term.table is not None
        return product(self._inner[term][self._groups(block).rows], self.params[term.table][self._class(block)])

    def inner_vjp(self, term: Linear, block: Block, cotangent: Array) -> None:
        """Take in the cotangent [P, B, S] of :meth:`inner`."""
        assert term.table is not None
        groups, row = self._groups(block), self._class(block)
        table = self.params[term.table][row]
        self.gradients[term.table][row] += matrix_vjp(self._inner[term][groups.rows], cotangent, table.shape)
        groups.add_to(self._inner_gradient[term], product_vjp(cotangent, table))

    def links(self, block: Block) -> Array:
        """The role for every link of the block, [P, B, H, D], read-only."""
        found = self.kept_links(block)
        assert found is not None
        return found

    def kept_links(self, block: Block) -> Array | None:
        """As :meth:`links`; None where all terms are deferred."""
        rows = self._groups(block).rows
        base = None if self.base is None else self.base[rows]
        if not self._tables and not self._vectors:
            return base
        count = block.links.stop - block.links.start
        relative: Array | None = None
        for term in self._tables:
            features = self.inner(term, block)
            if term.after is not None:
                features = product(features, self.params[term.after])
            features = features.reshape(count, *self._shape[1:3], term.width)
            if relative is None and term.width == self.role.head_dim:
                relative = features
            else:
                relative = np.zeros((count, *self._shape[1:]), features.dtype) if relative is None else relative
                relative[self._part(term)] += features
        if relative is None:
            relative = np.zeros((count, *self._shape[1:]), self.tokens.dtype)
        for constant in self._vectors:
            relative[self._part(constant)] += self.params[constant.name][self._class(block)].reshape(-1, constant.width)
        for rotation in self._link_rotations:
            self._rotate(relative, rotation, rows, 1)
        return relative if base is None else relative + base

    def links_vjp(self, block: Block, cotangent: Array) -> None:
        """Take in the cotangent [P, B, H, D] of :meth:`links`."""
        groups, row = self._groups(block), self._class(block)
        if self._base_gradient is not None:
            groups.add_to(self._base_gradient, cotangent)
        if self._link_rotations:
            cotangent = cotangent.copy()
            for rotation in reversed(self._link_rotations):
                self._rotate(cotangent, rotation, groups.rows, -1)
        for constant in self._vectors:
            part = cotangent[self._part(constant)].sum(axis=(0, 1))
            self.gradients[constant.name][row] += part.sum(axis=0) if constant.shared_heads else part.ravel()
        for term in self._tables:
            part = self._joined(cotangent, term)
            if term.after is not None:
                after = self.params[term.after]
                self.gradients[term.after] += matrix_vjp(self.inner(term, block), part, after.shape)
                part = product_vjp(part, after)
            self.inner_vjp(term, block, part)

    def base_vjp(self, cotangent: Array) -> None:
        """Take in the cotangent [N, B, H, D] of ``base``."""
        assert self._base_gradient is not None
        self._base_gradient += cotangent

    def token_gradient(self) -> Array:
        """Everything taken in, carried back to the tokens, [N, B, C]; completes ``gradients``. Call once, last."""
        total = np.zeros_like(self.tokens)
        if self._base_gradient is not None:
            for rotation in reversed(self.role.rotations):
                self._rotate(self._base_gradient, rotation, slice(None), -1)
            for constant in self.role.constants:
                if not constant.per_class:
                    part = self._base_gradient[self._part(constant)].sum(axis=(0, 1))
                    self.gradients[constant.name] += part.ravel()
            for term in self._fixed:
                self._back(term, self._joined(self._base_gradient, term), total)
        for term, inner_gradient in self._inner_gradient.items():
            self._back(term, inner_gradient, total)
        return total

    def _back(self, term: Linear, cotangent: Array, total: Array) -> None:
        if term.before is None:
            total += cotangent
            return
        before = self.params[term.before]
        self.gradients[term.before] += matrix_vjp(self.tokens, cotangent, before.shape)
        total += product_vjp(cotangent, before)
