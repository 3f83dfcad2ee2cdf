"""From the authors' state dicts to an operator and its parameters (hehefan/Translution, commit 13730aa).

The numbers are transposed, split and put into our row order, nothing else. Their tables are indexed by *partner minus
self*, self being the token that is projected. On a grid, with delta = query - key:

    value   partner is the query: row order of delta, as ours
    key     partner is the query: row order of delta, ours is that of -delta
    query   partner is the key:   row order of -delta, ours is that of delta

Behind the grid stand CLS/CLS, (partner CLS, self a patch), (partner a patch, self CLS); ours are, as (query, key),
CLS/CLS, (patch, CLS), (CLS, patch). In causal 1-D key and value rows ascend in delta and query rows descend.
"""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from translution.arrays import Array, kind_of
from translution.errors import InputError
from translution.paper.description import Family
from translution.paper.operators import Roles, layer_operator
from translution.spec import Operator
from translution.spec.checks import is_whole

Kind = Literal["full", "alpha", "attention"]

# Beside the operator a state dict holds its LayerNorm, the causal mask and cached angles.
NOT_OF_THE_OPERATOR = ("norm.", "rope.", "rotary_emb.")
# One matrix for several shared roles, in this order.
PACKED = {"qkv": "to_qkv", "kv": "to_kv", "qv": "to_qv", "qk": "to_qk"}


def load_operator(
    state: Mapping[str, Array],
    *,
    family: Family,
    num_heads: int,
    head_dim: int,
    kind: Kind = "full",
    variant: Roles | Literal["none"] | None = None,
    grid: tuple[int, int] | None = None,
    length: int | None = None,
    rank: int | None = None,
    rope: bool = False,
) -> tuple[Operator, dict[str, Array]]:
    """The operator of one of the authors' layers, output projection included, and its parameters.

    Args:
        state: their parameter names to arrays, NumPy or torch. ``norm.*``, ``causal``, ``rope.*`` and ``rotary_emb.*``
            are left out: the caller applies the LayerNorm (epsilon 1e-5) to the operator's input.
        family: ``vit`` is a grid with one CLS token before it, ``gpt`` a causal sequence.
        kind: ``full`` Translution, ``alpha`` (their LoR classes), or ordinary ``attention``.
        variant: the relative roles; None is qkv. Attention has none: None, or their name for it, ``none``.
        grid: rows and columns of patches, for ``vit``.
        length: tokens of the sequence, for ``gpt``.
        rank: inner width per head of ``alpha``.
        rope: the classes with a rotary embedding: attention; ``full`` v, which builds it and never applies it;
            ``alpha`` v, which rotates the shared queries and keys. Their angles are float32.

    Returns:
        operator, and its parameters as copies of the authors' numbers: same kind of array, same dtype.

    Raises:
        InputError: an argument or a name or shape in ``state`` does not fit.
    """
    if not isinstance(state, Mapping):
        raise InputError("P1", f"state is a {type(state).__name__}", "state maps names to arrays", "Give a state dict")
    check_choice("family", family, get_args(Family))
    check_choice("kind", kind, get_args(Kind))
    chosen = _roles(kind, variant, rope, family)
    roles: str = chosen or ""
    sizes = check_sizes(family, kind, grid, length, rank)
    operator = _operator(state, family, kind, chosen, sizes, num_heads, head_dim, rank, rope)
    wanted = _wanted(kind, roles, operator, num_heads * head_dim, num_heads * (rank or 0))
    _check_state(state, wanted, operator, family, kind, roles)
    moved = {name: _rows_moved(family, name[3], sizes) for name in wanted if name.endswith(".unique_params")}
    return operator, _parameters(state, kind, roles, num_heads * head_dim, moved, operator.output is not None)


def check_choice(name: str, given: object, known: tuple[object, ...]) -> None:
    if given not in known:
        raise InputError(
            "P1", f"{name}={given!r}", f"{name} is one of {', '.join(map(str, known))}", "Choose one of these"
        )


def _roles(kind: Kind, variant: str | None, rope: bool, family: Family) -> Roles | None:
    """The relative roles; None for attention."""
    if kind == "attention":
        check_choice("variant", variant, (None, "none", "qkv"))
        return None
    roles = "qkv" if variant is None else variant
    check_choice("variant", roles, get_args(Roles))
    chosen: Roles = next(known for known in get_args(Roles) if known == roles)
    if rope and (roles != "v" or family == "gpt"):
        raise InputError(
            "P1",
            f"rope=True with family={family!r}, kind={kind!r}, variant={roles!r}",
            "the authors build a rotary embedding only into attention and into the vit v-variants",
            "Drop rope, or load kind='attention' or variant='v'",
        )
    return chosen


def check_sizes(
    family: Family, kind: Kind, grid: tuple[int, int] | None, length: int | None, rank: int | None
) -> tuple[int, ...]:
    sizes, unused = (grid, length) if family == "vit" else ((None if length is None else (length,)), grid)
    axes = 2 if family == "vit" else 1
    if not isinstance(sizes, (tuple, list)) or unused is not None or len(sizes) != axes:
        raise InputError(
            "P1",
            f"family={family!r} with grid={grid}, length={length}",
            "vit takes grid=(rows, columns), gpt takes length=tokens, and neither takes the other",
            "Give the one that belongs to the family",
        )
    if (rank is not None) != (kind == "alpha"):
        raise InputError(
            "P1",
            f"kind={kind!r} with rank={rank}",
            "rank is the inner width per head of alpha",
            "Give it to alpha only",
        )
    for what, size in (("grid" if family == "vit" else "length", n) for n in sizes):
        if not is_whole(size) or size < 1:
            raise InputError("P1", f"{what} with {size!r}", f"{what} holds whole numbers, at least 1", "Give ints")
    return tuple(sizes)


def _operator(
    state: Mapping[str, Array],
    family: Family,
    kind: Kind,
    roles: Roles | None,
    sizes: tuple[int, ...],
    num_heads: int,
    head_dim: int,
    rank: int | None,
    rope: bool,
) -> Operator:
    """The preset; their output projection is missing where one head already has the model's width."""
    projection = state.get("to_out.0.weight")
    projects = projection is not None or num_heads != 1
    dim = head_dim if projection is None or len(projection.shape) != 2 else len(projection)
    registers, causal = (1, False) if family == "vit" else (0, True)
    return layer_operator(
        ("rope" if rope else "attention") if roles is None else "full" if kind == "full" else "alpha",
        sizes,
        dim,
        num_heads,
        head_dim=head_dim,
        registers=registers,
        causal=causal,
        roles=roles or "qkv",
        rank=1 if rank is None else rank,
        rotary=rope,
        output_projection=projects,
    )


def _wanted(kind: Kind, roles: str, operator: Operator, width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Their names and shapes. A Linear's weight is [out, in], a table [rows, in, out]."""
    dim, rows = operator.dim, operator.layout.num_classes
    shapes: dict[str, tuple[int, ...]] = {}
    shared = "qkv" if kind != "full" else "".join(role for role in "qkv" if role not in roles)
    if shared:
        shapes[_shared_name(shared)] = (len(shared) * width, dim)
    if kind == "full":
        shapes |= {f"to_{role}.unique_params": (rows, dim, width) for role in roles}
    if kind == "alpha":
        for role in _low_rank_roles(roles):
            shapes[f"to_{role}1.weight"] = (inner, dim)
            if role in roles:
                shapes[f"to_{role}2.unique_params"] = (rows, inner, inner)
        if "v" in roles:
            shapes["to_v3.weight"] = (width, inner)
    if operator.output is not None:
        shapes |= {"to_out.0.weight": (dim, width), "to_out.0.bias": (dim,)}
    return shapes


def _low_rank_roles(roles: str) -> str:
    """Alpha's second branch: queries and keys together where either is relative, values where they are."""
    return ("qk" if "q" in roles or "k" in roles else "") + ("v" if "v" in roles else "")


def _shared_name(roles: str) -> str:
    return f"{PACKED.get(roles, f'to_{roles}')}.weight"


def _check_state(
    state: Mapping[str, Array],
    wanted: Mapping[str, tuple[int, ...]],
    operator: Operator,
    family: Family,
    kind: Kind,
    roles: str,
) -> None:
    own = {name for name in state if not name.startswith(NOT_OF_THE_OPERATOR) and name != "causal"}
    missing, unknown = sorted(wanted.keys() - own), sorted(own - wanted.keys())
    layer = f"{family} {kind} {roles}".strip()
    if missing or unknown:
        raise InputError(
            "P1",
            f"state misses {missing or 'nothing'} and has the unknown {unknown or 'nothing'}",
            f"the authors' {layer} layer has exactly {sorted(wanted)}, beside norm.*, causal, rope.* and rotary_emb.*",
            "Check family, kind and variant, and take the prefix of the layer off the names",
        )
    for name, shape in wanted.items():
        kind_of(name, state[name])
        if tuple(state[name].shape) != shape:
            raise InputError(
                "P1",
                f"{name} has shape {tuple(state[name].shape)}",
                f"a {layer} layer of {operator.num_heads} heads on {operator.layout.num_queries} tokens has {shape}",
                "Check grid or length, num_heads, head_dim and rank",
            )


def _rows_moved(family: Family, role: str, sizes: tuple[int, ...]) -> list[int]:
    """For each of our rows the row of theirs."""
    if family == "gpt":
        (length,) = sizes
        # Ours ascend in delta (query, value) and in -delta (key).
        return list(range(length)) if role == "v" else list(reversed(range(length)))
    count = math.prod(2 * n - 1 for n in sizes)
    grid = range(count) if role == "v" else reversed(range(count))
    both, partner_is_cls, self_is_cls = count, count + 1, count + 2
    # Ours: (patch, CLS), (CLS, patch) as (query, key). Self is the query in the query's table, the key in the others.
    mixed = [partner_is_cls, self_is_cls] if role == "q" else [self_is_cls, partner_is_cls]
    return [*grid, both, *mixed]


def _parameters(
    state: Mapping[str, Array], kind: Kind, roles: str, width: int, moved: Mapping[str, list[int]], projects: bool
) -> dict[str, Array]:
    found: dict[str, Array] = {}

    def table(name: str) -> Array:
        return state[name][moved[name]]

    def linear(name: str, first: int = 0, count: int | None = None) -> Array:
        return _copy(state[name][first : None if count is None else first + count].T)

    shared = "qkv" if kind != "full" else "".join(role for role in "qkv" if role not in roles)
    low_rank = _low_rank_roles(roles) if kind == "alpha" else ""
    for role, name in (("q", "query"), ("k", "key"), ("v", "value")):
        if role not in shared:
            found[f"{name}.table"] = table(f"to_{role}.unique_params")
            continue
        first = f"{name}.0" if role in low_rank else name
        found[f"{first}.weight"] = linear(_shared_name(shared), shared.index(role) * width, width)
        if role in low_rank and role not in roles:
            found[f"{name}.1.weight"] = linear(f"to_{role}1.weight")
        elif role in low_rank:
            found[f"{name}.1.down"] = linear(f"to_{role}1.weight")
            found[f"{name}.1.table"] = table(f"to_{role}2.unique_params")
    if "v" in low_rank:
        found["output.up" if projects else "value.1.up"] = linear("to_v3.weight")
    if projects:
        found |= {"output.weight": linear("to_out.0.weight"), "output.bias": _copy(state["to_out.0.bias"])}
    return found


def _copy(value: Array) -> Array:
    """A contiguous copy of either kind; torch keeps the graph."""
    return np.array(value, order="C") if isinstance(value, np.ndarray) else value.contiguous().clone()
