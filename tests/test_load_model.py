"""`load_model`: whole models of the authors by golden files, and by states with their names, computed layer by layer.

The files are not part of the repository. TRANSLUTION_GOLDEN names their folder; without it, ../shared/golden is tried.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

import translution
from translution.paper import GPT, VisionTransformer, load_model, load_operator

Array = npt.NDArray[Any]
Tensor = torch.Tensor

FOLDER = Path(os.environ.get("TRANSLUTION_GOLDEN") or Path(__file__).resolve().parents[1].parent / "shared" / "golden")
INDEX: dict[str, Any] = {}
if (FOLDER / "INDEX.json").is_file():
    INDEX = json.loads((FOLDER / "INDEX.json").read_text())["files"]
MODELS = sorted(name for name, entry in INDEX.items() if entry["kind"] == "whole model")

GRID, LENGTH, DIM, HEADS, WIDTH, RANK, MLP, DEPTH = (2, 3), 5, 6, 2, 4, 3, 7, 3
PLACES: dict[str, dict[str, Any]] = {"vit": {"grid": GRID}, "gpt": {"length": LENGTH}}
SHARED = {"qkv": "to_qkv", "kv": "to_kv", "qv": "to_qv", "qk": "to_qk", "q": "to_q", "k": "to_k", "v": "to_v"}
VARIANTS = [
    ("attention", None),
    *((kind, roles) for kind in ("full", "alpha") for roles in ("qkv", "qk", "qv", "kv", "q", "k", "v")),
]


def place_of(name: str) -> dict[str, Any]:
    """What `load_model` is told about a golden file: what its state doesn't say."""
    config = INDEX[name]["config"]
    told: dict[str, Any] = {"family": "gpt" if "vocab_size" in config else "vit", "num_heads": config["heads"]}
    if told["family"] == "vit":
        rows, columns = (extent // config["patch_size"] for extent in config["image_size"])
        told |= {"grid": (rows, columns), "pooling": config.get("pool", "cls")}
    else:
        told["length"] = config["seq_len"]
    return told


@pytest.mark.skipif(
    not MODELS and not os.environ.get("TRANSLUTION_GOLDEN"),
    reason=f"no golden files in {FOLDER}; set TRANSLUTION_GOLDEN to their folder",
)
@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_authors(name: str, record_property: Any) -> None:
    with np.load(FOLDER / name) as file:
        arrays = dict(file)
    under = lambda *folders: {k.partition("/")[2]: v for k, v in arrays.items() if k.split("/")[0] in folders}  # noqa: E731
    state = under("param", "buffer")
    # Rotary angles are float32 there.
    tolerance = 1e-6 if any("cos_cached" in key for key in state) else 1e-9
    model, gradients = (load_model(given, **place_of(name)) for given in (state, state | under("grad")))
    x = torch.from_numpy(arrays["x"])
    if x.is_floating_point():
        x.requires_grad_()
    out = model(x)
    out.square().sum().backward()
    errors = {"out": float((out.detach() - torch.from_numpy(arrays["out"])).abs().max())}
    if x.grad is not None:
        errors["grad_x"] = float((x.grad - torch.from_numpy(arrays["grad_x"])).abs().max())
    found = {key: p.grad for key, p in model.named_parameters()}
    expected = {key: p.detach() for key, p in gradients.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert gradient is not None
        errors[key] = float((gradient - expected[key]).abs().max())
    record_property("worst error", max(errors.values()))
    assert max(errors.values()) <= tolerance, errors


# States with the authors' names, and what their models compute, layer by layer


def layer_shapes(family: str, kind: str, roles: str, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    rows = math.prod(2 * n - 1 for n in GRID) + 3 if family == "vit" else LENGTH
    inner, width = heads * RANK, heads * head_dim
    shared = "".join(role for role in "qkv" if kind != "full" or role not in roles)
    shapes: dict[str, tuple[int, ...]] = {f"{SHARED[shared]}.weight": (len(shared) * width, DIM)} if shared else {}
    if kind == "full":
        shapes |= {f"to_{role}.unique_params": (rows, DIM, width) for role in roles}
    if kind == "alpha":
        second = ("qk" if set(roles) & set("qk") else "") + ("v" if "v" in roles else "")
        shapes |= {f"to_{role}1.weight": (inner, DIM) for role in second}
        shapes |= {f"to_{role}2.unique_params": (rows, inner, inner) for role in roles}
        shapes |= {"to_v3.weight": (width, inner)} if "v" in roles else {}
    shapes |= {} if (heads, head_dim) == (1, DIM) else {"to_out.0.weight": (DIM, width), "to_out.0.bias": (DIM,)}
    return shapes | {"norm.weight": (DIM,), "norm.bias": (DIM,)}


def state_of(
    family: str,
    kind: str,
    roles: str | None,
    relative_depth: int = DEPTH,
    position: bool = False,
    rotary: tuple[int, ...] = (),
    heads: int = HEADS,
    head_dim: int = WIDTH,
) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    body = "transformer" if kind == "attention" else "translution"
    shapes: dict[str, tuple[int, ...]] = {}
    angles: dict[str, Array] = {}
    for n in range(DEPTH):
        own = layer_shapes(family, kind if n < relative_depth else "attention", roles or "", heads, head_dim)
        shapes |= {f"{body}.layers.{n}.0.{name}": shape for name, shape in own.items()}
        feed = {"0.weight": (DIM,), "0.bias": (DIM,), "1.weight": (MLP, DIM), "1.bias": (MLP,), "4.bias": (DIM,)}
        shapes |= {
            f"{body}.layers.{n}.1.net.{name}": shape for name, shape in (feed | {"4.weight": (DIM, MLP)}).items()
        }
        if n in rotary:
            angles[f"{body}.layers.{n}.0.{'rope' if family == 'vit' else 'rotary_emb'}.cos_cached"] = np.zeros(
                (1, *GRID, WIDTH) if family == "vit" else (1, 1, LENGTH, WIDTH), np.float32
            )
        if family == "gpt" and n < relative_depth:
            angles[f"{body}.layers.{n}.0.causal"] = np.tril(np.ones((1, 1, LENGTH, LENGTH)))
    shapes |= {f"{body}.norm.weight": (DIM,), f"{body}.norm.bias": (DIM,)}
    if family == "vit":
        for n, shape in (("1.weight", (12,)), ("1.bias", (12,)), ("2.weight", (DIM, 12)), ("2.bias", (DIM,))):
            shapes[f"to_patch_embedding.{n}"] = shape
        shapes |= {"to_patch_embedding.3.weight": (DIM,), "to_patch_embedding.3.bias": (DIM,), "cls_token": (1, 1, DIM)}
        shapes |= {"mlp_head.weight": (4, DIM), "mlp_head.bias": (4,)}
        shapes |= {"pos_embedding": (1, math.prod(GRID) + 1, DIM)} if position else {}
    else:
        shapes |= {"wte.weight": (9, DIM), "norm.weight": (DIM,), "norm.bias": (DIM,), "output_head.weight": (9, DIM)}
        shapes |= {"wpe.weight": (LENGTH, DIM)} if position else {}
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()} | angles


def by_layers(
    state: dict[str, Array],
    family: str,
    x: Tensor,
    kinds: list[dict[str, Any]],
    pooling: str,
) -> Tensor:
    """What the authors' models compute, with every layer's operator from `load_operator`."""
    own = {name: torch.from_numpy(value) for name, value in state.items()}
    body = next(name.partition(".")[0] for name in own if ".layers." in name)

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"])

    if family == "vit":
        patches = [x[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] for r in range(GRID[0]) for c in range(GRID[1])]
        x = norm("to_patch_embedding.1", torch.stack([p.permute(0, 2, 3, 1).flatten(1) for p in patches], dim=1))
        x = x @ own["to_patch_embedding.2.weight"].T + own["to_patch_embedding.2.bias"]
        x = torch.cat((own["cls_token"].expand(len(x), 1, DIM), norm("to_patch_embedding.3", x)), dim=1)
        x = x + own.get("pos_embedding", torch.zeros(()))
    else:
        x = own["wte.weight"][x] + own.get("wpe.weight", torch.zeros(()))
    for n, told in enumerate(kinds):
        layer, feed = f"{body}.layers.{n}.0", f"{body}.layers.{n}.1.net"
        given = {name.removeprefix(f"{layer}."): value for name, value in own.items() if name.startswith(f"{layer}.")}
        settings = {"num_heads": HEADS, "head_dim": WIDTH, **PLACES[family], **told}
        operator, params = load_operator(given, family="vit" if family == "vit" else "gpt", **settings)
        x = x + translution.run(operator, params, norm(f"{layer}.norm", x), backend="torch")
        hidden = functional.gelu(norm(f"{feed}.0", x) @ own[f"{feed}.1.weight"].T + own[f"{feed}.1.bias"])
        x = x + hidden @ own[f"{feed}.4.weight"].T + own[f"{feed}.4.bias"]
    x = norm(f"{body}.norm", x)
    if family == "gpt":
        return norm("norm", x) @ own["output_head.weight"].T
    x = x[:, 0] if pooling == "cls" else x.mean(dim=1)
    return x @ own["mlp_head.weight"].T + own["mlp_head.bias"]


def input_of(family: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if family == "gpt":
        return torch.randint(9, (2, LENGTH), generator=generator)
    return torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator)


def told(kind: str, roles: str | None, rope: bool = False) -> dict[str, Any]:
    return {"kind": kind, "variant": roles, "rope": rope} | ({"rank": RANK} if kind == "alpha" else {})


def loaded(state: Any, family: str, **options: Any) -> VisionTransformer | GPT:
    place = {"grid": GRID} if family == "vit" else {}
    return load_model(state, **({"family": family, "num_heads": HEADS} | place | options))


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize(("kind", "roles"), VARIANTS)
def test_every_variant_and_its_hybrids(family: str, kind: str, roles: str | None) -> None:
    for depth in range(1, DEPTH + 1):
        state = state_of(family, kind, roles, depth, position=kind == "attention")
        model = loaded(state, family)
        about = model.description
        assert (about.kind, about.roles, about.size.depth) == (kind, roles, DEPTH)
        assert kind == "attention" or about.relative_depth == depth
        kinds = [told(kind, roles)] * depth + [told("attention", None)] * (DEPTH - depth)
        expected = by_layers(state, family, input_of(family), kinds, "cls")
        assert (model(input_of(family)) - expected).abs().max() <= 1e-12
        masks = [value.size for name, value in state.items() if name.endswith(".causal")]
        assert sum(p.numel() for p in model.parameters()) == sum(value.size for value in state.values()) - sum(masks)


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("from_state", [True, False])
def test_rope(family: str, from_state: bool) -> None:
    """Angles in the state say so, or the caller does."""
    state = state_of(family, "attention", None, position=family == "vit", rotary=(0, 1, 2) if from_state else ())
    model = loaded(state, family, **({} if from_state else {"rope": True, **PLACES[family]}))
    assert model.description.kind == "rope"
    expected = by_layers(state, family, input_of(family), [told("attention", None, rope=True)] * DEPTH, "cls")
    assert (model(input_of(family)) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("roles", "rotary", "ordinary"), [("v", (0,), "attention"), ("qkv", (1, 2), "rope")])
def test_hybrids_that_rotate(roles: str, rotary: tuple[int, ...], ordinary: str) -> None:
    state = state_of("vit", "alpha", roles, relative_depth=1, rotary=rotary)
    model = loaded(state, "vit")
    assert (model.description.rotary, model.description.ordinary) == (0 in rotary, ordinary)
    kinds = [told("alpha", roles, rope=0 in rotary)] + [told("attention", None, rope=1 in rotary)] * 2
    expected = by_layers(state, "vit", input_of("vit"), kinds, "cls")
    assert (model(input_of("vit")) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize(("kind", "roles"), [("attention", None), ("full", "kv")])
def test_mean_pooling_and_position_embedding(kind: str, roles: str | None) -> None:
    """Their mean is that of all tokens, the class token among them."""
    state = state_of("vit", kind, roles, position=True)
    model = loaded(state, "vit", pooling="mean")
    expected = by_layers(state, "vit", input_of("vit"), [told(kind, roles)] * DEPTH, "mean")
    assert (model(input_of("vit")) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["attention", "full", "alpha"])
def test_one_head_of_the_models_width_has_no_projection(kind: str) -> None:
    roles = None if kind == "attention" else "kv"
    state = state_of("gpt", kind, roles, position=True, heads=1, head_dim=DIM)
    model = loaded(state, "gpt", num_heads=1)
    assert not model.description.output_projection
    kinds = [told(kind, roles) | {"num_heads": 1, "head_dim": DIM}] * DEPTH
    expected = by_layers(state, "gpt", input_of("gpt"), kinds, "cls")
    assert (model(input_of("gpt")) - expected).abs().max() <= 1e-12


def test_numbers_are_copies_and_keep_their_dtype() -> None:
    state = {name: torch.from_numpy(value).float() for name, value in state_of("gpt", "alpha", "qkv").items()}
    model = loaded(state, "gpt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    owners = {value.untyped_storage().data_ptr() for value in state.values()}
    assert owners.isdisjoint(p.untyped_storage().data_ptr() for p in model.parameters())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"kind": "full"}, "kind='full': the state is that of a model with kind='alpha'"),
        ({}, {"variant": "qk"}, "variant='qk': the state is that of a model with variant='kv'"),
        ({}, {"head_dim": 8}, "head_dim=8: the state is that of a model with head_dim=4"),
        ({}, {"rank": 8}, "rank=8: the state is that of a model with rank=3"),
        ({}, {"relative_depth": 1}, "relative_depth=1: the state is that of a model with relative_depth=3"),
        ({}, {"num_heads": 3}, "num_heads=3: the heads of this state have 8 features"),
        ({}, {"grid": (3, 3)}, "to_k2.unique_params has shape"),
        ({}, {"grid": None}, "vit takes grid"),
        ({}, {"length": 5}, "vit takes grid"),
        ({}, {"family": "vgg"}, "family is one of"),
        ({}, {"family": "gpt", "grid": None}, "misses 'wte.weight'"),
        ({}, {"patch_size": 3}, "the patches of this state have 12 numbers"),
        ({}, {"channels": 1}, "the patches of this state have 12 numbers"),
        ({"cls_token": None}, {}, "misses 'cls_token'"),
        ({}, {"num_heads": 4, "head_dim": 2}, "num_heads=4: it divides the inner width 6"),
        ({"mlp_head.weight": np.zeros(4)}, {}, r"mlp_head.weight has shape \(4,\): it has 2 axes"),
        ({"cls_token": np.zeros((1, 2, DIM))}, {}, r"cls_token has shape \(1, 2, 6\)"),
        ({"mlp_head.bias": None}, {}, r"misses \['mlp_head.bias'\]"),
        ({"extra": np.zeros(1)}, {}, r"unknown \['extra'\]"),
        ({"translution.layers.5.0.norm.weight": np.zeros(DIM)}, {}, r"layers \[0, 1, 2, 5\]"),
        ({"transformer.layers.0.0.norm.weight": np.zeros(DIM)}, {}, "layers under"),
        ({"translution.layers.1.0.to_q2.unique_params": np.zeros(1)}, {}, "alpha kv, alpha qkv, alpha kv"),
        ({"translution.layers.1.0.to_w.weight": np.zeros(1)}, {}, r"unknown \['to_w.weight'\]"),
        ({"translution.layers.1.1.net.0.bias": np.zeros(1)}, {}, r"net.0.bias has shape \(1,\)"),
        ({"mlp_head.bias": [0.0]}, {}, "mlp_head.bias is a list"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    state = {k: v for k, v in (state_of("vit", "alpha", "kv") | change).items() if v is not None}
    with pytest.raises(translution.InputError, match=message):
        loaded(state, options.pop("family", "vit"), **options)


def test_a_hybrid_without_relative_layers_is_attention() -> None:
    state = state_of("vit", "full", "qkv", relative_depth=0)
    model = loaded(state, "vit", kind="full", variant="qkv", relative_depth=0)
    assert (model.description.kind, model.description.roles) == ("attention", None)
    with pytest.raises(translution.InputError, match="kind='full': the state is that of a model with kind='attention'"):
        loaded(state, "vit", kind="full")


def test_what_rotates_is_said_or_found() -> None:
    without = state_of("vit", "full", "qkv", relative_depth=1)
    assert loaded(without, "vit", ordinary="rope").description.ordinary == "rope"
    attention = state_of("vit", "attention", None, rotary=(0, 1, 2))
    assert loaded(attention, "vit", kind="attention", variant="none", rope=True).description.kind == "rope"
    with pytest.raises(translution.InputError, match="rope=False: the state is that of a model with rope=True"):
        loaded(attention, "vit", rope=False)


def test_lengths_that_differ_are_an_error() -> None:
    state = state_of("gpt", "full", "v")
    with pytest.raises(translution.InputError, match="length=6: the state is that of a model with length=5"):
        loaded(state, "gpt", length=6)
    with pytest.raises(translution.InputError, match="tell different lengths"):
        loaded(state | {"wpe.weight": np.zeros((7, DIM))}, "gpt")
    with pytest.raises(translution.InputError, match="tell none"):
        loaded(state_of("gpt", "full", "v", relative_depth=0), "gpt")
    with pytest.raises(translution.InputError, match="state is a list"):
        load_model([], family="gpt", num_heads=2)  # type: ignore[arg-type]
