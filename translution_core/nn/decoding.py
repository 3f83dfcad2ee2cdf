"""Causal sequences token by token: the same sums as in the full forward, for one query.

Encoders differ between displacements, so keys and values can't be kept as such. Kept are, for every token that a later
one can see: what of its encoders does not change with the displacement (features of shared matrices, low-rank codes),
and its inputs for what does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from translution.errors import InputError
from translution.geometry import FloatArray, geometry
from translution.normal_form import Branch, Constant, Linear, Role, Rotation, normal_form
from translution.spec import Lattice, Operator, RegisterClass
from translution.spec.layout import Label

Hook = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class DecodingState:
    """What later tokens need of those so far; registers first, then grid tokens from ``first`` to ``length``.

    ``kept`` holds tensors [.., tokens, features] by what they are. Any operation on their batch dimensions gives a
    state of as many sequences (beam search: ``state.select(lambda kept: kept[order])``).
    """

    first: int
    length: int
    kept: Mapping[str, Tensor]

    def select(self, change: Callable[[Tensor], Tensor]) -> "DecodingState":
        """The state with ``change`` applied to every tensor."""
        return DecodingState(self.first, self.length, {name: change(value) for name, value in self.kept.items()})


class Decoder:
    """One causal operator, token by token."""

    def __init__(self, operator: Operator) -> None:
        layout = operator.layout
        if not isinstance(layout, Lattice) or not _is_a_sequence(layout):
            raise InputError(
                "L4",
                f"step() with {layout!r}",
                "tokens come one by one where each sees those before it: one causal axis, the same on both sides",
                "Build the layer with causal=True on a 1-D grid",
            )
        self._operator, self._form, self._layout = operator, normal_form(operator), layout
        self._geometry = geometry(layout)
        labels, mirrored = layout.labels(), layout.key_labels()
        self._rows = {label: row for row, label in enumerate(labels)}
        self._key_rows = {label: row for row, label in enumerate(mirrored)}
        # With a window these are all there are; without, as many as there are rows for.
        self._window = None if layout.kernel_size is None else layout.axis_displacements(0)

    def begin(self, params: Mapping[str, Tensor], x: Tensor, hook: Hook) -> DecodingState:
        """The state after a whole beginning [.., registers + n, C]."""
        length = x.shape[-2] - self._layout.registers if x.dim() > 1 else 0
        if length < 1:
            raise InputError(
                "D1",
                f"a beginning of shape {tuple(x.shape)}",
                f"without a state a step takes {self._layout.registers} registers and at least one token after them",
                "Give the beginning as [.., tokens, channels]",
            )
        with torch.autocast(x.device.type, enabled=False):
            return self._trimmed(DecodingState(0, length, self._kept(params, _wide(x), hook)))

    def go_on(
        self, params: Mapping[str, Tensor], x: Tensor, state: DecodingState, hook: Hook
    ) -> tuple[Tensor, DecodingState]:
        """Heads [.., 1, H * D] of the next token x [.., 1, C], before scale and output, and the next state."""
        if x.dim() < 2 or x.shape[-2:] != (1, self._operator.dim):
            raise InputError(
                "D1",
                f"x has shape {tuple(x.shape)}",
                f"after the beginning a step takes one token, [.., 1, {self._operator.dim}]",
                "Give tokens one by one, or the whole beginning without a state",
            )
        with torch.autocast(x.device.type, enabled=False):
            own = self._kept(params, _wide(x), hook)
            kept = {name: torch.cat((value, own[name]), -2) for name, value in state.kept.items()}
            after = DecodingState(state.first, state.length + 1, kept)
            heads = self._attended(params, _wide(x), after, hook)
        return heads.to(x.dtype).unsqueeze(-2), self._trimmed(after)

    def _trimmed(self, state: DecodingState) -> DecodingState:
        """Without the tokens that no later one sees."""
        if self._window is None:
            return state
        first, registers = max(state.first, state.length - self._window[-1]), self._layout.registers
        if first == state.first:
            return state
        gone = first - state.first

        def rest(value: Tensor) -> Tensor:
            return torch.cat((value[..., :registers, :], value[..., registers + gone :, :]), -2)

        return DecodingState(first, state.length, {name: rest(value) for name, value in state.kept.items()})

    def _kept(self, params: Mapping[str, Tensor], x: Tensor, hook: Hook) -> dict[str, Tensor]:
        """What is kept of tokens [.., n, C], in the dtype of sums."""
        found: dict[str, Tensor] = {}
        for role in (self._form.key, self._form.value):
            if role is None:
                continue
            base = _static(role, params, x)
            if base is not None:
                found[role.name] = hook(role.name, base).flatten(-2)
            for linear in role.linears:
                if linear.table is not None:
                    found[linear.before or "inputs"] = _codes(linear, params, x)
        return found

    def _attended(self, params: Mapping[str, Tensor], x: Tensor, state: DecodingState, hook: Hook) -> Tensor:
        """Heads [.., H * D] of the last token of the state."""
        form, registers = self._form, self._layout.registers
        place = state.length - 1
        deltas = [place - site for site in range(state.first, state.length)]
        if self._window is not None:
            deltas = [delta for delta in deltas if delta in self._window]
        labels = [self._layout.label((delta,)) for delta in deltas]
        missing = [label for label in labels if label not in self._rows]
        if missing:
            raise InputError(
                "L3",
                f"token {place} of the sequence, counted from 0",
                f"the layer's tables hold displacements up to {self._layout.grid[0] - 1}",
                "Begin anew with the last tokens, or use a window (kernel_size), far=Clip(...) or set_input_size",
            )
        seen: list[Label] = [RegisterClass(None, number) for number in range(registers)]
        rows = [self._rows[label] for label in [*seen, *labels]]
        seen_from: list[Label] = [RegisterClass(number, None) for number in range(registers)]
        key_labels = [self._layout.label((-delta,)) for delta in deltas]
        key_rows = [self._key_rows[label] for label in [*seen_from, *key_labels]]
        places = [*range(registers), *(registers + place - delta - state.first for delta in deltas)]
        kept = state.kept
        if len(places) < registers + state.length - state.first:
            index = torch.tensor(places, device=x.device)
            kept = {name: value.index_select(-2, index) for name, value in kept.items()}
        sites = [None] * registers + [place - delta for delta in deltas]
        value = self._features(form.value, params, kept, rows, sites, x.dtype)
        content = None
        if form.query is not None and form.key is not None:
            query_base = _static(form.query, params, x)
            own = {form.query.name: hook(form.query.name, query_base).flatten(-2)} if query_base is not None else {}
            own |= {t.before or "inputs": _codes(t, params, x) for t in form.query.linears if t.table is not None}
            query = self._features(form.query, params, own, rows, [place] * len(rows), x.dtype)
            key = self._features(form.key, params, kept, key_rows, sites, x.dtype)
            content = (query * key).sum(-1)
        weights = [self._weights(branch, content, params, rows, x) for branch in form.branches]
        mixed = weights[0]
        if form.gate is not None:
            gate = params[form.gate].to(x.dtype).sigmoid()
            mixed = (1 - gate) * weights[0] + gate * weights[1]
        heads = (mixed.unsqueeze(-1) * value).sum(-3).flatten(-2)
        return heads.expand(*x.shape[:-2], -1)

    def _features(
        self,
        role: Role,
        params: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        rows: Sequence[int],
        sites: Sequence[int | None],
        dtype: torch.dtype,
    ) -> Tensor:
        """The role for every pair, [.., pairs, H, D]; a kept tensor of one token serves every pair."""
        total: Tensor | None = None
        if role.name in kept:
            total = torch.unflatten(kept[role.name], -1, (role.num_heads, role.head_dim))
        for linear in role.linears:
            if linear.table is not None:
                part = _placed(_multiplied(kept[linear.before or "inputs"], linear, params, rows), role, linear)
                total = part if total is None else total + part
        for constant in role.constants:
            if constant.per_class:
                vectors = _rows_of(params[constant.name], rows).to(dtype)
                part = _placed(vectors.repeat(1, role.num_heads) if constant.shared_heads else vectors, role, constant)
                total = part if total is None else total + part
        assert total is not None
        total = total.expand(*total.shape[:-3], len(rows), *total.shape[-2:])
        for rotation in role.rotations:
            total = _turned(total, rotation, sites)
        return total

    def _weights(
        self, branch: Branch, content: Tensor | None, params: Mapping[str, Tensor], rows: Sequence[int], x: Tensor
    ) -> Tensor:
        """[.., pairs, H]."""
        ones = x.new_ones((len(rows), self._operator.num_heads))
        if branch.kind != "softmax":
            return ones / (len(rows) if branch.kind == "mean" else 1)
        logits = ones - 1
        if branch.content:
            assert content is not None
            logits = branch.scale * content
        if branch.bias is not None:
            logits = logits + self._bias(branch, params, rows, x)
        return logits.softmax(-2)

    def _bias(self, branch: Branch, params: Mapping[str, Tensor], rows: Sequence[int], x: Tensor) -> Tensor:
        """[pairs, H]."""
        bias = branch.bias
        assert bias is not None

        def at_rows(values: FloatArray) -> Tensor:
            return torch.from_numpy(values)[rows].to(x)

        if bias.kind == "slopes":
            slopes = torch.tensor(bias.slopes, dtype=torch.float64).to(x)
            return -at_rows(self._geometry.distances).unsqueeze(-1) * slopes
        assert bias.parameter is not None
        if bias.kind == "quadratic":
            return at_rows(self._geometry.quadratic_features) @ params[bias.parameter].to(x.dtype).mT
        return _rows_of(params[bias.parameter].mT, rows).to(x.dtype)


def _is_a_sequence(layout: Lattice) -> bool:
    """Whether tokens of one axis see those before them, and nothing stands beyond the border."""
    plain = Lattice(
        layout.grid,
        registers=layout.registers,
        causal=layout.causal,
        kernel_size=layout.kernel_size,
        dilation=layout.dilation,
        far=layout.far,
    )
    return layout.axis_causal == (True,) and layout == plain


def _wide(x: Tensor) -> Tensor:
    """In the dtype of sums (clause D2)."""
    return x if x.dtype == torch.float64 else x.float()


def _static(role: Role, params: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """What of the role does not depend on the displacement, [.., n, H, D]."""
    total: Tensor | None = None
    for linear in role.linears:
        if linear.table is None:
            weight = None if linear.before is None else params[linear.before].to(x.dtype)
            part = _placed(x if weight is None else _times(x, weight), role, linear)
            total = part if total is None else total + part
    for constant in role.constants:
        if not constant.per_class:
            part = _placed(params[constant.name].to(x.dtype), role, constant)
            total = part.expand(*x.shape[:-1], -1, -1) if total is None else total + part
    return total


def _codes(linear: Linear, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return x if linear.before is None else x @ params[linear.before].to(x.dtype)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., C] times [C, E], or block by block."""
    if weight.dim() == 2:
        return x @ weight
    blocks = torch.unflatten(x, -1, (weight.shape[0], weight.shape[1])).unsqueeze(-2)
    product: Tensor = blocks @ weight
    return product.squeeze(-2).flatten(-2)


def _placed(features: Tensor, role: Role, term: Linear | Constant) -> Tensor:
    by_head = torch.unflatten(features, -1, (role.num_heads, term.width))
    return functional.pad(by_head, (term.start, role.head_dim - term.start - term.width))


def _rows_of(table: Tensor, rows: Sequence[int]) -> Tensor:
    return table.index_select(0, torch.tensor(rows, device=table.device))


def _multiplied(codes: Tensor, linear: Linear, params: Mapping[str, Tensor], rows: Sequence[int]) -> Tensor:
    """codes [.., pairs or 1, R] times the matrix of each pair, [.., pairs, E]."""
    assert linear.table is not None
    table, found = params[linear.table], list[Tensor]()
    for start, stop, repeats in _runs(rows):
        own = codes if codes.shape[-2] == 1 else codes[..., start:stop, :]
        if repeats:
            product = _times(own, table[rows[start]].to(codes.dtype))
            found.append(product.expand(*product.shape[:-2], stop - start, -1))
            continue
        forward = rows[start] <= rows[stop - 1]
        matrices = table.narrow(0, min(rows[start], rows[stop - 1]), stop - start).to(codes.dtype)
        if not forward:
            own = own.flip(-2)
        if matrices.dim() == 3:
            product = torch.einsum("...pr,prs->...ps", own.expand(*own.shape[:-2], stop - start, -1), matrices)
        else:
            blocks = torch.unflatten(own, -1, matrices.shape[1:3]).expand(*own.shape[:-2], stop - start, -1, -1)
            product = torch.einsum("...pgr,pgrs->...pgs", blocks, matrices).flatten(-2)
        found.append(product if forward else product.flip(-2))
    product = torch.cat(found, -2)
    return product if linear.after is None else product @ params[linear.after].to(codes.dtype)


def _runs(rows: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Pieces (start, stop, repeats) in which rows go up by one, go down by one, or stay the same."""
    found, start = list[tuple[int, int, bool]](), 0
    while start < len(rows):
        stop = start + 1
        step = rows[stop] - rows[start] if stop < len(rows) else 0
        if abs(step) <= 1:
            while stop < len(rows) and rows[stop] - rows[stop - 1] == step:
                stop += 1
        found.append((start, stop, stop > start + 1 and step == 0))
        start = stop
    return found


def _turned(features: Tensor, rotation: Rotation, sites: Sequence[int | None]) -> Tensor:
    """The slice of every pair turned by the site of its token; registers, None, are not."""
    frequency = rotation.base ** (-2.0 * torch.arange(rotation.width // 2, dtype=torch.float64) / rotation.width)
    angles = torch.tensor([0.0 if s is None else s for s in sites], dtype=torch.float64).unsqueeze(-1) * frequency
    cos, sin = angles.cos().to(features).unsqueeze(-2), angles.sin().to(features).unsqueeze(-2)
    before, own, after = features.tensor_split((rotation.start, rotation.start + rotation.width), -1)
    if rotation.pairing == "interleaved":
        first, second = own[..., 0::2], own[..., 1::2]
        own = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = own.chunk(2, -1)
        own = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((before, own, after), -1)
