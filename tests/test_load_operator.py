"""`load_operator` against the authors' formulas (arXiv 2510.10060 and their code), written out pair by pair.

Their tables are indexed by c(partner, self), self being the token that is projected; see `paper/weights.py`.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import translution
from translution.paper import load_operator
from translution.spec import LowRankOutput

Array = npt.NDArray[Any]

VARIANTS = ("qkv", "qk", "qv", "kv", "q", "k", "v")
PACKED = {"qkv": "to_qkv", "kv": "to_kv", "qv": "to_qv", "qk": "to_qk", "q": "to_q", "k": "to_k", "v": "to_v"}
GRID, LENGTH, DIM, HEADS, WIDTH, RANK = (2, 3), 5, 6, 2, 4, 3
PLACES: dict[str, dict[str, Any]] = {"vit": {"grid": GRID}, "gpt": {"length": LENGTH}}


def grid_row(partner: int, own: int) -> int:
    """c(partner, self) on the grid; token 0 is CLS."""
    rows, columns = GRID
    count = (2 * rows - 1) * (2 * columns - 1)
    if partner == 0 or own == 0:
        return count + (0 if partner == own else 1 if partner == 0 else 2)
    (r, c), (own_r, own_c) = divmod(partner - 1, columns), divmod(own - 1, columns)
    return (r - own_r + rows - 1) * (2 * columns - 1) + c - own_c + columns - 1


def row(family: str, role: str, i: int, j: int) -> int:
    if family == "vit":
        return grid_row(j, i) if role == "q" else grid_row(i, j)
    return LENGTH - 1 - (i - j) if role == "q" else i - j


def state_of(family: str, kind: str, variant: str, heads: int = HEADS, dim: int = DIM) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    rows = math.prod(2 * n - 1 for n in GRID) + 3 if family == "vit" else LENGTH
    inner, width = heads * RANK, heads * WIDTH
    shared = "".join(role for role in "qkv" if kind != "full" or role not in variant)
    shapes: dict[str, tuple[int, ...]] = {}
    if shared:
        shapes[f"{PACKED[shared]}.weight"] = (len(shared) * width, dim)
    if kind == "full":
        shapes |= {f"to_{role}.unique_params": (rows, dim, width) for role in variant}
    if kind == "alpha":
        second = ("qk" if set(variant) & set("qk") else "") + ("v" if "v" in variant else "")
        shapes |= {f"to_{role}1.weight": (inner, dim) for role in second}
        shapes |= {f"to_{role}2.unique_params": (rows, inner, inner) for role in variant}
        if "v" in variant:
            shapes["to_v3.weight"] = (width, inner)
    shapes |= {"to_out.0.weight": (dim, width), "to_out.0.bias": (dim,)}
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


def by_formula(state: dict[str, Array], family: str, kind: str, variant: str, x: Array) -> tuple[Array, Array]:
    """out [N, C] and weights [H, N, N] of one sequence, as their forward passes compute them."""
    tokens = len(x)
    shared = "".join(role for role in "qkv" if kind != "full" or role not in variant)
    heads = lambda vector: vector.reshape(HEADS, -1)  # noqa: E731

    def plain(role: str, token: Array) -> Array:
        weight = state[f"{PACKED[shared]}.weight"].reshape(len(shared), HEADS * WIDTH, DIM)
        return weight[shared.index(role)] @ token

    def first(role: str, token: Array, i: int, j: int) -> Array:
        if kind == "full" and role in variant:
            return token @ state[f"to_{role}.unique_params"][row(family, role, i, j)]
        return plain(role, token)

    def second(role: str, token: Array, i: int, j: int) -> Array:
        low = state[f"to_{role}1.weight"] @ token
        return low @ state[f"to_{role}2.unique_params"][row(family, role, i, j)] if role in variant else low

    pairs = [(i, j) for i in range(tokens) for j in range(tokens) if family == "vit" or j <= i]
    logits = np.full((HEADS, tokens, tokens), -np.inf)
    for i, j in pairs:
        found = (heads(first("q", x[i], i, j)) * heads(first("k", x[j], i, j))).sum(axis=1)
        if kind == "alpha" and set(variant) & set("qk"):
            found = (found + (heads(second("q", x[i], i, j)) * heads(second("k", x[j], i, j))).sum(axis=1)) / 2
        logits[:, i, j] = found * WIDTH**-0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    mixed, low = np.zeros((tokens, HEADS, WIDTH)), np.zeros((tokens, HEADS, RANK))
    for i, j in pairs:
        mixed[i] += weights[:, i, j, None] * heads(first("v", x[j], i, j))
        if kind == "alpha" and "v" in variant:
            low[i] += weights[:, i, j, None] * heads(second("v", x[j], i, j))
    joined = mixed.reshape(tokens, -1)
    if kind == "alpha" and "v" in variant:
        joined = (joined + low.reshape(tokens, -1) @ state["to_v3.weight"].T) / 2
    return joined @ state["to_out.0.weight"].T + state["to_out.0.bias"], weights


def load(state: Any, family: str, kind: str, variant: str | None, **options: Any) -> Any:
    settings = {"num_heads": HEADS, "head_dim": WIDTH} | ({"rank": RANK} if kind == "alpha" else {})
    return load_operator(
        state, **({"family": family, "kind": kind, "variant": variant} | PLACES[family] | settings | options)
    )


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize(
    ("kind", "variant"), [*((kind, v) for kind in ("full", "alpha") for v in VARIANTS), ("attention", "")]
)
def test_every_variant_is_its_formula(family: str, kind: str, variant: str) -> None:
    state = state_of(family, kind, variant)
    operator, params = load(state, family, kind, variant or None)
    x = np.random.default_rng(1).normal(size=(operator.layout.num_queries, DIM))
    out, weights = translution.run(operator, params, x, backend="reference", return_weights=True)
    expected, expected_weights = by_formula(state, family, kind, variant, x)
    assert np.abs(out - expected).max() <= 1e-9
    assert np.abs(weights - expected_weights).max() <= 1e-9
    numbers = [np.concatenate([value.ravel() for value in found.values()]) for found in (params, state)]
    assert np.array_equal(*(np.sort(found) for found in numbers))


def test_alpha_mixes_heads_after_the_weighting() -> None:
    operator, params = load(state_of("vit", "alpha", "v"), "vit", "alpha", "v")
    assert isinstance(operator.output, LowRankOutput)
    assert operator.output_scale == 0.5
    assert params["output.up"].shape == (HEADS * RANK, HEADS * WIDTH)


@pytest.mark.parametrize("kind", ["full", "alpha", "attention"])
def test_one_head_of_the_models_width_has_no_projection(kind: str) -> None:
    variant = None if kind == "attention" else "qkv"
    state = state_of("gpt", kind, variant or "", heads=1, dim=WIDTH)
    state |= {"to_out.0.weight": np.eye(WIDTH), "to_out.0.bias": np.zeros(WIDTH)}
    projected = load(state, "gpt", kind, variant, num_heads=1)
    del state["to_out.0.weight"], state["to_out.0.bias"]
    operator, params = load(state, "gpt", kind, variant, num_heads=1)
    assert operator.output is None
    x = np.random.default_rng(1).normal(size=(LENGTH, WIDTH))
    plain, same = (translution.run(*found, x, backend="reference") for found in ((operator, params), projected))
    assert np.abs(plain - same).max() <= 1e-9


def test_arrays_keep_their_kind_and_dtype_and_are_copies() -> None:
    state = {name: torch.from_numpy(value).float() for name, value in state_of("vit", "alpha", "qkv").items()}
    state |= {"norm.weight": torch.ones(DIM), "causal": torch.ones(1), "rope.cos_cached": torch.ones(1)}
    _, params = load(state, "vit", "alpha", "qkv")
    assert {(type(value), value.dtype) for value in params.values()} == {(torch.Tensor, torch.float32)}
    assert all(value.is_contiguous() for value in params.values())
    owners = {value.untyped_storage().data_ptr() for value in state.values()}
    assert owners.isdisjoint(value.untyped_storage().data_ptr() for value in params.values())


def test_rotary_is_built_into_full_v_and_never_applied() -> None:
    state = state_of("vit", "full", "v")
    assert load(state, "vit", "full", "v", rope=True)[0] == load(state, "vit", "full", "v")[0]
    state = state_of("vit", "alpha", "v")
    assert load(state, "vit", "alpha", "v", rope=True)[0] != load(state, "vit", "alpha", "v")[0]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"to_w.weight": np.zeros(1)}, {}, r"unknown \['to_w.weight'\]"),
        ({"to_q1.weight": None}, {}, r"misses \['to_q1.weight'\]"),
        ({"to_out.0.bias": np.zeros(DIM + 1)}, {}, r"to_out.0.bias has shape \(7,\)"),
        ({}, {"grid": (3, 3)}, "to_q2.unique_params has shape"),
        ({}, {"length": 6}, "vit takes grid"),
        ({}, {"grid": None}, "vit takes grid"),
        ({}, {"rank": None}, "rank is the inner width"),
        ({}, {"kind": "full"}, "rank is the inner width"),
        ({}, {"variant": "vk"}, "variant is one of"),
        ({}, {"variant": "none"}, "variant is one of"),
        ({}, {"family": "vgg"}, "family is one of"),
        ({}, {"kind": "beta"}, "kind is one of"),
        ({}, {"rope": True}, "only into attention and into the vit v-variants"),
        ({"to_out.0.bias": [0.0] * DIM}, {}, "to_out.0.bias is a list"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    state = {k: v for k, v in (state_of("vit", "alpha", "qkv") | change).items() if v is not None}
    family = options.get("family", "vit")
    settings: dict[str, Any] = {"grid": GRID, "rank": RANK, "num_heads": HEADS, "head_dim": WIDTH, "variant": "qkv"}
    with pytest.raises(translution.InputError, match=message):
        load_operator(state, **({"family": family, "kind": "alpha"} | settings | options))
