"""What relates the tokens in a layer of the paper's models: attention and its relative forms, alpha, Translution."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

from translution.spec import LowRank, Operator, Shared, Sum, presets

Kind = Literal["attention", "rope", "swin", "shaw", "convit", "alpha", "full"]
Roles = presets.Roles
WITHOUT_ROLES: Mapping[str, Callable[..., Operator]] = {
    "attention": presets.self_attention,
    "rope": presets.rope_attention,
    "shaw": presets.shaw_attention,
    "convit": presets.convit_attention,
}


@lru_cache(maxsize=256)
def layer_operator(
    kind: Kind,
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    *,
    head_dim: int,
    registers: int,
    causal: bool,
    roles: Roles = "qkv",
    rank: int = 8,
    rotary: bool = False,
    output_projection: bool = True,
) -> Operator:
    """The operator of one layer, without biases but for the output's.

    Args:
        kind: ``attention`` without any position, ``rope`` (Su et al. 2021), ``swin`` (a bias for each displacement and
            head, Liu et al. 2021), ``shaw`` (vectors for each displacement, Shaw et al. 2018), ``convit`` (gated
            positional attention, d'Ascoli et al. 2021), ``alpha`` (the paper's low-rank form) or ``full`` Translution.
        grid: extents of the patches or tokens; ``registers`` tokens stand before them.
        roles: the relative ones of ``alpha`` and ``full``.
        rank: inner width per head of ``alpha``.
        rotary: turns the shared queries and keys of ``alpha``.
        output_projection: False leaves it out, as the authors do where one head has the model's width.
    """
    found = _projected(kind, grid, dim, num_heads, head_dim, registers, causal, roles, rank, rotary)
    if output_projection:
        return found
    # With one head it makes no difference whether the low-rank values are brought up before the weighting or after.
    value = found.value
    if kind == "alpha" and "v" in roles:
        value = Sum((Shared(num_heads * head_dim), LowRank(num_heads * rank, num_heads * head_dim)))
    return dataclasses.replace(found, value=value, output=None)


def _projected(
    kind: Kind,
    grid: tuple[int, ...],
    dim: int,
    num_heads: int,
    head_dim: int,
    registers: int,
    causal: bool,
    roles: Roles,
    rank: int,
    rotary: bool,
) -> Operator:
    shape: dict[str, Any] = {"head_dim": head_dim, "registers": registers, "causal": causal}
    match kind:
        case "full":
            return presets.translution(grid, dim, num_heads, roles=roles, **shape)
        case "alpha":
            return presets.alpha_translution(grid, dim, num_heads, roles=roles, rank=rank, rotary=rotary, **shape)
        case "swin":
            return presets.swin_attention(grid, dim, num_heads, qkv_bias=False, **shape)
    return WITHOUT_ROLES[kind](grid, dim, num_heads, **shape)


def unreached(operator: Operator) -> Mapping[str, int]:
    """How many numbers of each parameter have no influence on the one register before the grid.

    Where nothing but a class token is read, the last layer's only query is that token: of a table's T rows it and its
    keys take two, those of the token with itself and of the token with a patch. Positional scores by displacement
    (``convit``) are 0 for a register, so none of their weights is taken.
    """
    classes = operator.layout.num_classes
    found: dict[str, int] = {}
    for name, shape in operator.parameters.items():
        if name.endswith((".table", ".vectors")) or name == "relevance.bias":
            found[name] = math.prod(shape) // classes * (classes - 2)
        elif name == "relevance.second.weight":
            found[name] = math.prod(shape)
    return found
