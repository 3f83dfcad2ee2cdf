"""Encoders on arrays that carry their rounding error: forward, and the pullback of a cotangent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from translution.conformance.rounding import Arithmetic, Bounded, Segments, concatenate, exact, zeros
from translution.geometry import Geometry
from translution.normal_form import Linear, Role, Rotation

Pullback = Callable[[Bounded], Bounded]
Rows = list[tuple[slice, int]]


@dataclass(frozen=True, slots=True)
class EncoderBounds:
    """Encodes links: tokens [B, L, C] to features [B, L, H, D]. Pullbacks add to ``gradients`` of parameters."""

    arithmetic: Arithmetic
    links: Geometry
    params: Mapping[str, Bounded]
    gradients: dict[str, Bounded]

    def encode(self, role: Role, tokens: Bounded) -> tuple[Bounded, Pullback]:
        """The role's features, and the map from their cotangent to that of the tokens."""
        calculate, (batch, links, _), heads = self.arithmetic, tokens.shape, role.num_heads
        rows = self._rows_by_slice(role)
        row_of = np.zeros(links, np.int64)
        for part, row in rows:
            row_of[part] = row
        result = zeros(batch, links, heads, role.head_dim)
        pulls: list[tuple[slice, Pullback]] = []
        for term in role.linears:
            part = slice(term.start, term.start + term.width)
            value, pull = self._linear(term, rows, tokens)
            addend = value.reshape(batch, links, heads, term.width)
            result = calculate.add_at(result, (..., part), addend)
            pulls.append((part, pull))
        for constant in role.constants:
            part = slice(constant.start, constant.start + constant.width)
            given = self.params[constant.name]
            vector = given[row_of] if constant.per_class else given.reshape(1, -1)
            addend = vector.reshape(1, vector.shape[0], 1 if constant.shared_heads else heads, constant.width)
            result = calculate.add_at(result, (..., part), addend)
        result = calculate.stored(result)
        for turn in role.rotations:
            result = self._rotate(role.name, turn, result, 1.0)

        def pullback(cotangent: Bounded) -> Bounded:
            for turn in role.rotations:
                cotangent = self._rotate(role.name, turn, cotangent, -1.0)
            for constant in role.constants:
                own = cotangent[..., constant.start : constant.start + constant.width]
                if constant.shared_heads:
                    own = calculate.total(own, (2,))
                own = own.reshape(batch, links, (1 if constant.shared_heads else heads) * constant.width)
                if constant.per_class:
                    by_row = Segments(row_of, self.links.num_classes)
                    self.collect(constant.name, calculate.total(calculate.gather_sum(own, by_row), (0,)))
                else:
                    self.collect(constant.name, calculate.total(own, (0, 1)))
            back = zeros(*tokens.shape)
            for part, pull in pulls:
                own = cotangent[..., part]
                back = calculate.add(back, pull(own.reshape(batch, links, heads * own.shape[3])))
            return back

        return result, pullback

    def collect(self, name: str, gradient: Bounded, row: int | None = None) -> None:
        """Add to the gradient of a parameter, or of one row of a table."""
        before, add = self.gradients[name], self.arithmetic.add
        if row is None:
            self.gradients[name] = add(before, gradient)
        else:
            self.gradients[name] = before.rewritten(row, add(before[row], gradient))

    def _rows_by_slice(self, role: Role) -> Rows:
        found: Rows = []
        start = 0
        for step in self.links.steps if role.name != "output" else ():
            stop = start + len(step.query_index)
            found.append((slice(start, stop), step.key_class if role.name == "key" else step.value_class))
            start = stop
        return found

    def _linear(self, term: Linear, rows: Rows, tokens: Bounded) -> tuple[Bounded, Pullback]:
        pulls: list[Pullback] = []
        for name in (term.before, term.table, term.after):
            if name is None:
                continue
            if name == term.table:
                tokens, pull = self._by_row(name, rows, tokens)
            else:
                tokens, pull = self.product(name, None, tokens)
            pulls.append(pull)

        def pullback(cotangent: Bounded) -> Bounded:
            for pull in reversed(pulls):
                cotangent = pull(cotangent)
            return cotangent

        return tokens, pullback

    def _by_row(self, name: str, rows: Rows, tokens: Bounded) -> tuple[Bounded, Pullback]:
        matrix = self.params[name].shape[1:]  # there may be no row
        features = matrix[-1] * (matrix[0] if len(matrix) == 3 else 1)
        parts = [self.product(name, row, tokens[:, part]) for part, row in rows]
        result = concatenate([value for value, _ in parts], 1) if parts else zeros(tokens.shape[0], 0, features)

        def pullback(cotangent: Bounded) -> Bounded:
            backs = [pull(cotangent[:, part]) for (part, _), (_, pull) in zip(rows, parts, strict=True)]
            return concatenate(backs, 1) if backs else zeros(*tokens.shape)

        return result, pullback

    def product(self, name: str, row: int | None, tokens: Bounded) -> tuple[Bounded, Pullback]:
        """tokens [B, L, C] times a parameter, or times one row of a table: [B, L, E] and its pullback."""
        calculate, (batch, links, _) = self.arithmetic, tokens.shape
        matrix = self.params[name] if row is None else self.params[name][row]
        groups = matrix.shape[0] if matrix.value.ndim == 3 else 1
        inner, outer = matrix.shape[-2:]
        grouped, weight = tokens.reshape(batch, links, groups, inner), matrix.reshape(groups, inner, outer)
        result = calculate.stored(calculate.contract("blgc,gcr->blgr", grouped, weight, inner))

        def pullback(cotangent: Bounded) -> Bounded:
            own = cotangent.reshape(batch, links, groups, outer)
            gradient = calculate.contract("blgc,blgr->gcr", grouped, own, batch * links)
            self.collect(name, gradient.reshape(*matrix.shape), row)
            back = calculate.contract("blgr,gcr->blgc", own, weight, outer)
            return calculate.stored(back).reshape(batch, links, groups * inner)

        return result.reshape(batch, links, groups * outer), pullback

    def _rotate(self, role: str, turn: Rotation, features: Bounded, sign: float) -> Bounded:
        calculate = self.arithmetic
        angles = self.links.rotary_angles(role, turn.width, turn.base)
        index = self.links.query_index if role == "query" else self.links.key_index
        # The zero token has no position of its own.
        angle = np.concatenate([angles, np.zeros((1, angles.shape[1]))])[index][None, :, None, :]
        # An implementation may round the frequency, the angle and the function.
        unsure = calculate.unit * (2 + 4 * np.abs(angle))
        cosine, sine = (_uncertain(part, unsure) for part in (np.cos(angle), sign * np.sin(angle)))
        step = 2 if turn.pairing == "interleaved" else 1
        first: npt.NDArray[np.int64] = turn.start + step * np.arange(turn.width // 2)
        second = first + (1 if turn.pairing == "interleaved" else turn.width // 2)
        a, b = features[..., first], features[..., second]
        turned = calculate.add(calculate.multiply(a, cosine), -calculate.multiply(b, sine))
        result = features.replaced((..., first), turned)
        turned = calculate.add(calculate.multiply(a, sine), calculate.multiply(b, cosine))
        return calculate.stored(result.replaced((..., second), turned))


def _uncertain(value: npt.NDArray[np.float64], error: npt.NDArray[np.float64]) -> Bounded:
    found = exact(value)
    return Bounded(found.value, found.magnitude + error, found.error + error)
