"""Multi-head attention against ``torch.nn.MultiheadAttention`` and ``scaled_dot_product_attention``."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from translution.backends.torch.conversion import describe
from translution.conformance.reductions import Draw, Peer, Reduction, ReductionCase, Weights, walk
from translution.spec import Lattice, Operator, PerDisplacement, Shared, Softmax

Mask = npt.NDArray[Any] | None


def _attention_mask(draw: Draw, kind: int, batch: int, heads: int, queries: int, keys: int) -> Mask:
    """What may attend, as MultiheadAttention takes it with the opposite sense: 2-D or per head, bool or float."""
    shape = (queries, keys) if kind % 2 else (batch * heads, queries, keys)
    live = draw.rng.random(shape) < 0.6
    live[..., 0] = True  # the peer has no result for a query without keys
    return live if kind < 2 else np.where(live, draw.normal(*shape), -np.inf)


def _multihead(draw: Draw, seed: int, grid: tuple[int, ...], keys: tuple[int, ...], **settings: Any) -> ReductionCase:
    heads = draw.pick((1, 2, 3))
    width = heads * draw.pick((1, 2, 4))
    module = nn.MultiheadAttention(width, heads, batch_first=True, dtype=torch.float64, **settings).eval()
    described: Any = describe(module)
    separate = "kdim" in settings
    operator: Operator = described.operator(grid, keys, separate_values=separate)
    queries, many = operator.layout.num_queries, operator.layout.num_keys
    masked, padded, causal, wanted = (bool(digit) for digit in walk(seed, 2, 2, 2, 2))
    batch = 2
    padding: Mask = None
    if padded:
        padding = draw.rng.random((batch, many)) < 0.6
        padding[:, 0] = True
    allowed: Mask = None
    if causal and not masked and queries == many:
        operator = described.operator(grid, keys, causal=True, separate_values=separate)
        allowed = np.tril(np.ones((queries, many), bool))
    elif masked:
        allowed = _attention_mask(draw, draw.pick(range(4)), batch, heads, queries, many)
    # torch names the absent keys True, and wants both masks of one dtype.
    peer_padding, peer_allowed = (
        None if m is None else torch.from_numpy(_torch_mask(m, allowed)) for m in (padding, allowed)
    )

    def forward(weights: Weights, x: Tensor, y: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        tokens = x if y is None else y
        key, value = (tokens[..., : module.kdim], tokens[..., module.kdim :]) if separate else (tokens, tokens)
        out, attention = torch.func.functional_call(
            module,
            dict(weights),
            (x, key, value),
            {
                "key_padding_mask": peer_padding,
                "attn_mask": peer_allowed,
                "need_weights": wanted,
                "average_attn_weights": False,
            },
        )
        return (out, attention) if wanted else out

    def relay(weights: Weights) -> dict[str, Tensor]:
        found: dict[str, Tensor] = described.parameters(weights, separate_values=separate)
        return found

    uses_mask = masked or (allowed is not None and operator.layout.causal is False)  # type: ignore[union-attr]
    mask = _joined(padding, allowed if uses_mask else None, (batch, heads, queries, many))
    note = f"grid {grid}, keys {keys}, {heads} heads of {width // heads}, {settings}, {padded=}, {masked=}, {causal=}"
    peer = Peer(draw.weights(module), forward, relay)
    return draw.case(operator, peer, mask=mask, alone=keys == grid and not separate, batch=batch, note=note)


def _torch_mask(live: npt.NDArray[Any], allowed: Mask) -> npt.NDArray[Any]:
    if live.dtype != np.bool_:
        return live
    if allowed is not None and allowed.dtype != np.bool_:
        return np.where(live, 0.0, -np.inf)
    return ~live


def _joined(padding: Mask, allowed: Mask, shape: tuple[int, int, int, int]) -> Mask:
    """One mask of this library, [B, H, Nq, Nk]: True may attend, or a float that is added."""
    batch, heads, queries, keys = shape
    parts = []
    if padding is not None:
        parts.append(padding[:, None, None, :])
    if allowed is not None:
        parts.append(allowed.reshape((batch, heads, queries, keys) if allowed.ndim == 3 else (1, 1, queries, keys)))
    if len(parts) < 2:
        return parts[0] if parts else None
    if parts[1].dtype == np.bool_:
        return np.logical_and(*parts)
    return np.where(parts[0], parts[1], -np.inf)


def _self_attention(draw: Draw, seed: int) -> ReductionCase:
    grid = (draw.pick((1, 5, 7)),) if draw.pick((0, 1)) else draw.sizes(2, (2, 3))
    return _multihead(draw, seed, grid, grid, bias=bool(draw.pick((0, 1))))


def _cross_attention(draw: Draw, seed: int) -> ReductionCase:
    grid, keys = (draw.pick((1, 4, 5)),), (draw.pick((2, 5, 7)),)
    return _multihead(
        draw, seed, grid, keys, bias=bool(draw.pick((0, 1))), kdim=draw.pick((2, 3)), vdim=draw.pick((1, 4))
    )


def _dot_product(draw: Draw, seed: int) -> ReductionCase:
    kind, scaled = walk(seed, 4, 2)
    heads, batch = draw.pick((1, 2, 3)), 2
    width, dim, length = heads * draw.pick((1, 2, 4)), draw.pick((2, 5)), draw.pick((1, 5, 8))
    scale = 0.25 + float(draw.pick((0, 1))) if scaled else None
    operator = Operator(
        Lattice((length,), causal=kind == 1),
        dim,
        heads,
        Shared(width),
        Shared(width),
        Shared(width),
        Softmax(scale=scale),
    )
    mask: Mask = None
    if kind > 1:
        live = draw.rng.random((batch, heads, length, length)) < 0.6
        live[..., 0] = True
        mask = live if kind == 2 else np.where(live, draw.normal(*live.shape), -np.inf)

    def forward(weights: Weights, x: Tensor, _y: Tensor | None) -> Tensor:
        query, key, value = (
            (x @ weights[name]).reshape(batch, length, heads, width // heads).transpose(1, 2) for name in "qkv"
        )
        added = None if mask is None else torch.from_numpy(mask)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=added, is_causal=kind == 1, scale=scale
        )
        return out.transpose(1, 2).flatten(2)

    def relay(weights: Weights) -> dict[str, Tensor]:
        return {f"{role}.weight": weights[role[0]] for role in ("query", "key", "value")}

    peer = Peer({name: draw.tensor(dim, width, size=dim**-0.5) for name in "qkv"}, forward, relay)
    note = f"length {length}, {heads} heads of {width // heads}, mask kind {kind}, {scale=}"
    return draw.case(operator, peer, mask=mask, alone=True, batch=batch, note=note)


def _equal_tables(draw: Draw, seed: int) -> ReductionCase:
    """Translution with the same matrix for every displacement."""
    causal, bias = (bool(digit) for digit in walk(seed, 2, 2))
    rank = draw.pick((1, 2))
    grid, heads, registers = draw.sizes(rank, (3, 5) if rank == 1 else (2, 3)), draw.pick((1, 2)), draw.pick((0, 1, 2))
    width = heads * draw.pick((2, 4))
    layout = Lattice(grid, registers=registers, causal=causal)
    encoder = PerDisplacement(width, bias=bias)
    operator = Operator(layout, width, heads, encoder, encoder, encoder, output=Shared(width, bias=bias))
    module = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True, dtype=torch.float64)
    described: Any = describe(module)
    later = torch.ones(layout.num_queries, layout.num_queries).triu(1).bool() if causal else None

    def forward(weights: Weights, x: Tensor, _y: Tensor | None) -> tuple[Tensor, Tensor]:
        out, attention = torch.func.functional_call(
            module, dict(weights), (x, x, x), {"attn_mask": later, "average_attn_weights": False}
        )
        return out, attention

    def relay(weights: Weights) -> dict[str, Tensor]:
        found: dict[str, Tensor] = described.parameters(weights)
        for role in ("query", "key", "value"):
            found[f"{role}.table"] = found.pop(f"{role}.weight").expand(layout.num_classes, -1, -1)
        return found

    note = f"grid {grid}, {registers} registers, {heads} heads of {width // heads}, {causal=}, {bias=}"
    return draw.case(operator, Peer(draw.weights(module), forward, relay), alone=True, note=note)


ATTENTION = (
    Reduction(
        "multi-head-attention",
        "multi-head self-attention, masks and weights",
        "torch.nn.MultiheadAttention",
        ("E4", "R1", "M1", "M2", "L4", "O1", "O2"),
        _self_attention,
        ("sdpa",),
    ),
    Reduction(
        "cross-attention",
        "multi-head cross-attention, kdim and vdim",
        "torch.nn.MultiheadAttention",
        ("E4", "R1", "M1", "M2", "O1", "O2"),
        _cross_attention,
        ("sdpa",),
    ),
    Reduction(
        "dot-product-attention",
        "scaled dot-product attention",
        "torch.nn.functional.scaled_dot_product_attention",
        ("R1", "R6", "M1", "M2", "L4"),
        _dot_product,
        ("sdpa",),
    ),
    Reduction(
        "translution-equal-tables",
        "Translution with equal tables = self-attention",
        "torch.nn.MultiheadAttention",
        ("E5", "L3", "L6", "R1"),
        _equal_tables,
    ),
)
