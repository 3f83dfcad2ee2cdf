"""Operators that know where the other token stands, against the formulas of their papers written out densely in torch.

Each formula does its own index arithmetic, from positions of rows and columns; none uses :mod:`translution.geometry`.
"""

import itertools
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from translution.conformance.reductions import Draw, Peer, Reduction, ReductionCase, Weights, walk
from translution.spec.encoders import Pairing
from translution.spec.presets import (
    Roles,
    alpha_translution,
    convit_attention,
    rope_attention,
    shaw_attention,
    translution,
)

ROLES: tuple[Roles, ...] = get_args(Roles)


def _by_head(features: Tensor, heads: int) -> Tensor:
    """[.., E] to [.., H, E / H]."""
    return features.reshape(*features.shape[:-1], heads, features.shape[-1] // heads)


def _split(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, E] to [B, H, N, E / H]."""
    return _by_head(tokens, heads).transpose(1, 2)


def _merge(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _key_minus_query(grid: tuple[int, ...]) -> Tensor:
    """p(j) - p(i) for every pair, [N, N, rank]."""
    places = torch.tensor(list(itertools.product(*(range(n) for n in grid))))
    return places[None, :, :] - places[:, None, :]


def _weights(draw: Draw, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: draw.tensor(*shape, size=shape[-2] ** -0.5 if len(shape) > 1 else 0.5) for name, shape in shapes.items()
    }


def _pair_number(grid: tuple[int, ...], sign: int) -> Tensor:
    """Row of the displacement sign * (query minus key) among all that occur, [N, N]."""
    number = torch.zeros(())
    for axis, extent in enumerate(grid):
        step = -sign * _key_minus_query(grid)[..., axis]
        number = number * (2 * extent - 1) + step + extent - 1
    return number.long()


def _relative(
    x: Tensor, tables: tuple[Tensor, Tensor, Tensor], grid: tuple[int, ...], heads: int, scale: float, causal: bool
) -> Tensor:
    """Attention with one matrix [C, E] per pair, gathered from tables [T, C, E]."""
    toward, back = _pair_number(grid, 1), _pair_number(grid, -1)
    query = _by_head(torch.einsum("bic,ijce->bije", x, tables[0][toward]), heads)
    key = _by_head(torch.einsum("bjc,ijce->bije", x, tables[1][back]), heads)
    value = _by_head(torch.einsum("bjc,ijce->bije", x, tables[2][toward]), heads)
    logits = scale * (query * key).sum(-1)
    if causal:
        count = x.shape[1]
        logits = logits.masked_fill(torch.ones(count, count).triu(1).bool()[None, :, :, None], -torch.inf)
    return torch.einsum("bijh,bijhe->bihe", logits.softmax(2), value).flatten(2)


def _grid_and_order(draw: Draw, seed: int) -> tuple[tuple[int, ...], bool]:
    """2-D without order, or 1-D with or without a causal order."""
    flat, causal = (bool(digit) for digit in walk(seed // 7, 2, 2))
    return ((draw.pick((1, 4, 6)),), causal) if flat else (draw.sizes(2, (2, 3)), False)


def _every_row(table: Tensor, grid: tuple[int, ...], causal: bool, key: bool) -> Tensor:
    """Table rows of all displacements; in a causal order the missing ones (never read) are zero."""
    if not causal:
        return table
    missing = table.new_zeros(grid[0] - 1, *table.shape[1:])
    return torch.cat([table, missing] if key else [missing, table])


def _full(draw: Draw, seed: int) -> ReductionCase:
    roles, (grid, causal) = ROLES[seed % 7], _grid_and_order(draw, seed)
    heads, each = draw.pick((1, 2)), draw.pick((1, 3))
    dim = heads * draw.pick((2, 3))
    operator = translution(grid, dim, heads, head_dim=each, roles=roles, causal=causal)
    weights = _weights(draw, dict(operator.parameters))

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        tables = []
        for role in ("query", "key", "value"):
            if role[0] in roles:
                tables.append(_every_row(own[f"{role}.table"], grid, causal, role == "key"))
            else:
                tables.append(own[f"{role}.weight"].expand(int(np.prod([2 * n - 1 for n in grid])), -1, -1))
        merged = _relative(x, (tables[0], tables[1], tables[2]), grid, heads, each**-0.5, causal)
        return merged @ own["output.weight"] + own["output.bias"]

    note = f"{grid=}, {roles=}, {causal=}, {heads} heads of {each}"
    return draw.case(operator, Peer(weights, forward, dict), alone=True, note=note)


def _low_rank(draw: Draw, seed: int) -> ReductionCase:
    roles, (grid, causal) = ROLES[seed % 7], _grid_and_order(draw, seed)
    heads, each, inner = draw.pick((1, 2)), draw.pick((2, 3)), draw.pick((1, 2))
    dim = heads * 2
    operator = alpha_translution(grid, dim, heads, head_dim=each, rank=inner, roles=roles, causal=causal)
    weights = _weights(draw, dict(operator.parameters))
    count = int(np.prod([2 * n - 1 for n in grid]))

    def composed(own: Weights, role: str) -> Tensor:
        """The role's full matrix per displacement, [T, C, E]."""

        def part(number: str) -> Tensor:
            name = f"{role}.{number}"
            if f"{name}.weight" in own:
                return own[f"{name}.weight"].expand(count, -1, -1)
            table = _every_row(own[f"{name}.table"], grid, causal, role == "key")
            return own[f"{name}.down"] @ table

        if f"{role}.weight" in own:
            return own[f"{role}.weight"].expand(count, -1, -1)
        by_head = torch.cat([_by_head(part(number), heads) for number in "01"], 3)
        return by_head.flatten(2)

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        tables = composed(own, "query"), composed(own, "key"), composed(own, "value")
        scale = each**-0.5 / (2 if "q" in roles or "k" in roles else 1)
        merged = _relative(x, tables, grid, heads, scale, causal)
        if "v" in roles:
            full, low = (part.flatten(2) for part in torch.split(_by_head(merged, heads), [each, inner], 3))
            merged = (full + low @ own["output.up"]) / 2
        return merged @ own["output.weight"] + own["output.bias"]

    note = f"{grid=}, {roles=}, {causal=}, {heads} heads of {each}, rank {inner}"
    return draw.case(operator, Peer(weights, forward, dict), alone=True, note=note)


def _rope(draw: Draw, seed: int) -> ReductionCase:
    interleaved, registers = walk(seed, 2, 3)
    pairing: Pairing = "interleaved" if interleaved else "half"
    grid, heads, base = draw.sizes(2, (2, 3)), draw.pick((1, 2)), float(draw.pick((10, 10000)))
    each = draw.pick((4, 8))
    operator = rope_attention(grid, heads * each, heads, base=base, pairing=pairing, registers=registers)
    weights = _weights(draw, dict(operator.parameters))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    rate = base ** (-torch.arange(each // 4, dtype=torch.float64) / (each // 4))
    angle = torch.cat([rows.reshape(-1, 1) * rate, columns.reshape(-1, 1) * rate], 1)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotated(features: Tensor) -> Tensor:
        still, moving = features[:, :, :registers], features[:, :, registers:]
        if pairing == "half":
            number = torch.complex(*moving.chunk(2, -1)) * turn
            moving = torch.cat([number.real, number.imag], -1)
        else:
            number = torch.complex(moving[..., ::2], moving[..., 1::2]) * turn
            moving = torch.view_as_real(number).flatten(-2)
        return torch.cat([still, moving], 2)

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        query, key, value = (_split(x @ own[f"{role}.weight"], heads) for role in ("query", "key", "value"))
        logits = rotated(query) @ rotated(key).mT * each**-0.5
        return _merge(logits.softmax(-1) @ value) @ own["output.weight"] + own["output.bias"]

    note = f"{grid=}, {pairing=}, {registers=}, {base=}, {heads} heads of {each}"
    return draw.case(operator, Peer(weights, forward, dict), alone=True, note=note)


def _shaw(draw: Draw, seed: int) -> ReductionCase:
    causal, together = (bool(digit) for digit in walk(seed, 2, 2))
    length, reach, heads = draw.pick((4, 6, 8)), draw.pick((1, 2, 3)), draw.pick((1, 2))
    width = heads * draw.pick((2, 3))
    operator = shaw_attention((length,), width, heads, max_distance=reach, shared_heads=together, causal=causal)
    each = width // heads if together else width
    shapes = {f"{role}": (width, width) for role in ("query", "key", "value", "output")}
    vectors = {"a_key": (2 * reach + 1, each), "a_value": (2 * reach + 1, each)}
    weights = _weights(draw, {**shapes, "bias": (width,), **vectors})
    index = (_key_minus_query((length,))[..., 0].clamp(-reach, reach)) + reach
    later = torch.ones(length, length).triu(1).bool() if causal else torch.zeros(length, length).bool()

    def per_head(table: Tensor) -> Tensor:
        """Vectors of every pair, [H, N, N, D]."""
        found = table[index]
        if together:
            return found.expand(heads, -1, -1, -1)
        return _by_head(found, heads).permute(2, 0, 1, 3)

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        query, key, value = (_split(x @ own[role], heads) for role in ("query", "key", "value"))
        relative = torch.einsum("bhid,hijd->bhij", query, per_head(own["a_key"]))
        logits = (query @ key.mT + relative) * (width // heads) ** -0.5
        attention = logits.masked_fill(later, -torch.inf).softmax(-1)
        result = attention @ value + torch.einsum("bhij,hijd->bhid", attention, per_head(own["a_value"]))
        return _merge(result) @ own["output"] + own["bias"]

    def relay(own: Weights) -> dict[str, Tensor]:
        # Key rows ascend in key minus query as the paper's do; value rows ascend in query minus key.
        seen = slice(0, reach + 1) if causal else slice(None)
        return {
            "query.weight": own["query"], "key.0.weight": own["key"], "value.0.weight": own["value"],
            "output.weight": own["output"], "output.bias": own["bias"],
            "key.1.vectors": own["a_key"][seen], "value.1.vectors": own["a_value"][seen].flip(0),
        }  # fmt: skip

    note = f"{length=}, {reach=}, {causal=}, shared heads {together}, {heads} heads"
    return draw.case(operator, Peer(weights, forward, relay), alone=True, note=note)


def _row_and_column(draw: Draw, _seed: int) -> ReductionCase:
    grid, heads = draw.sizes(2, (2, 3)), draw.pick((1, 2))
    width = heads * draw.pick((2, 3))
    operator = shaw_attention(grid, width, heads, values=False)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    vectors = {"rows": (2 * grid[0] - 1, width // heads), "columns": (2 * grid[1] - 1, width // heads)}
    weights = _weights(draw, {**shapes, "bias": (width,), **vectors})
    away = _key_minus_query(grid)

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        query, key, value = (_split(x @ own[role], heads) for role in ("query", "key", "value"))
        vertical = torch.einsum("bhid,ijd->bhij", query, own["rows"][away[..., 0] + grid[0] - 1])
        horizontal = torch.einsum("bhid,ijd->bhij", query, own["columns"][away[..., 1] + grid[1] - 1])
        logits = (query @ key.mT + vertical + horizontal) * (width // heads) ** -0.5
        return _merge(logits.softmax(-1) @ value) @ own["output"] + own["bias"]

    def relay(own: Weights) -> dict[str, Tensor]:
        return {
            "query.weight": own["query"], "key.0.weight": own["key"], "value.weight": own["value"],
            "output.weight": own["output"], "output.bias": own["bias"],
            "key.1.vectors": (own["rows"][:, None] + own["columns"][None]).flatten(0, 1),
        }  # fmt: skip

    return draw.case(
        operator, Peer(weights, forward, relay), alone=True, note=f"{grid=}, {heads} heads of {width // heads}"
    )


def _gated(draw: Draw, _seed: int) -> ReductionCase:
    grid, heads = draw.sizes(2, (2, 3)), draw.pick((1, 2, 3))
    width = heads * draw.pick((2, 3))
    operator = convit_attention(grid, width, heads)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    weights = _weights(draw, {**shapes, "bias": (width,), "position": (heads, 3), "gate": (heads,)})
    away = _key_minus_query(grid).double()
    # Column, row, squared distance.
    features = torch.stack([away[..., 1], away[..., 0], (away**2).sum(-1)], -1)

    def forward(own: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        query, key, value = (_split(x @ own[role], heads) for role in ("query", "key", "value"))
        content = (query @ key.mT * (width // heads) ** -0.5).softmax(-1)
        place = torch.einsum("ijf,hf->hij", features, own["position"]).softmax(-1)
        gate = own["gate"].sigmoid()[:, None, None]
        return _merge(((1 - gate) * content + gate * place) @ value) @ own["output"] + own["bias"]

    def relay(own: Weights) -> dict[str, Tensor]:
        return {
            "query.weight": own["query"], "key.weight": own["key"], "value.weight": own["value"],
            "output.weight": own["output"], "output.bias": own["bias"], "relevance.gate": own["gate"],
            "relevance.second.weight": own["position"][:, [1, 0, 2]],
        }  # fmt: skip

    return draw.case(
        operator, Peer(weights, forward, relay), alone=True, note=f"{grid=}, {heads} heads of {width // heads}"
    )


RELATIVE = (
    Reduction(
        "translution",
        "Translution, seven role sets",
        "formula, one matrix per pair (arXiv 2510.10060)",
        ("L1", "L3", "L4", "E4", "E5", "R1"),
        _full,
    ),
    Reduction(
        "alpha-translution",
        "alpha-Translution, down and table as one matrix",
        "formula, one matrix per pair (arXiv 2510.10060)",
        ("E6", "E8", "E9", "O3"),
        _low_rank,
    ),
    Reduction(
        "rope-2d",
        "RoPE 2-D, both pairings, registers",
        "formula in complex numbers (Su et al. 2021)",
        ("E10", "L6"),
        _rope,
        ("sdpa",),
    ),
    Reduction("shaw", "Shaw vectors on keys and values", "formula (Shaw et al. 2018)", ("E7", "E8", "L7"), _shaw),
    Reduction(
        "botnet",
        "BoTNet and HaloNet relative logits",
        "formula (Srinivas et al. 2021)",
        ("E7", "E8", "L3"),
        _row_and_column,
    ),
    Reduction("convit", "ConViT gated attention", "formula (d'Ascoli et al. 2021)", ("R4", "R5"), _gated),
)
