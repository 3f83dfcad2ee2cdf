"""The paper's models: every variant computes, learns with every parameter, and looks at no later token."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from translution.errors import InputError
from translution.paper import GPT, ModelDescription, Size, VisionTransformer, build_model

SIZE = Size(dim=12, depth=2, num_heads=3, head_dim=4, mlp_dim=10)
VIT: dict[str, Any] = {"family": "vit", "image_size": (6, 8), "patch_size": 2, "channels": 2, "num_classes": 5}
GPT_OF_SIX: dict[str, Any] = {"family": "gpt", "length": 6, "vocabulary_size": 9}
ROLES = ("qkv", "qk", "qv", "kv", "q", "k", "v")
VARIANTS: dict[str, dict[str, Any]] = {
    "no position": {"kind": "attention"},
    "absolute": {"kind": "attention", "position_embedding": True},
    "swin": {"kind": "swin"},
    "shaw": {"kind": "shaw"},
    "rope": {"kind": "rope"},
    "rope and absolute": {"kind": "rope", "position_embedding": True},
    "convit": {"kind": "convit"},
    **{f"full {roles}": {"kind": "full", "roles": roles} for roles in ROLES},
    **{f"alpha {roles}": {"kind": "alpha", "roles": roles, "rank": 2} for roles in ROLES},
    "alpha v rotary": {"kind": "alpha", "roles": "v", "rank": 2, "rotary": True},
    "hybrid full": {"kind": "full", "relative_depth": 1},
    "hybrid alpha, rope": {"kind": "alpha", "rank": 2, "relative_depth": 1, "ordinary": "rope"},
    "hybrid convit": {"kind": "convit", "relative_depth": 1},
}
POOLINGS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "mean of patches": {"pooling": "mean", "class_token": False},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def model_of(description: ModelDescription) -> VisionTransformer | GPT:
    torch.manual_seed(0)
    return build_model(description, dtype=torch.float64)


def vit(variant: str, **fields: Any) -> ModelDescription:
    return ModelDescription(size=SIZE, **(VIT | VARIANTS[variant] | fields))


def gpt(variant: str) -> ModelDescription:
    return ModelDescription(size=SIZE, **(GPT_OF_SIX | VARIANTS[variant]))


def images() -> torch.Tensor:
    return torch.randn(3, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens() -> torch.Tensor:
    """Every token of the vocabulary occurs."""
    return torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 0, 1, 2], [5, 3, 1, 8, 6, 4]])


def without_gradient(model: torch.nn.Module) -> dict[str, int]:
    """Entries with gradient zero, of parameters that have such."""
    found = {name: int((p.grad == 0).sum()) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return {name: count for name, count in found.items() if count}


@each_variant
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vit_learns_with_every_parameter_that_is_not_declared_unreached(variant: str, pooling: str) -> None:
    description = vit(variant, **POOLINGS[pooling])
    model = model_of(description)
    assert sum(p.numel() for p in model.parameters()) == description.num_parameters
    out = model(images())
    assert out.shape == (3, 5)
    out.square().sum().backward()
    assert without_gradient(model) == description.unreached_parameters
    relative = description.kind in ("full", "alpha", "swin", "shaw", "convit") and not variant.startswith("hybrid")
    assert bool(description.unreached_parameters) == (relative and pooling == "cls")


@each_variant
def test_gpt_learns_with_every_parameter(variant: str) -> None:
    description = gpt(variant)
    model = model_of(description)
    assert sum(p.numel() for p in model.parameters()) == description.num_parameters
    out = model(tokens())
    assert out.shape == (3, 6, 9)
    out.square().sum().backward()
    assert without_gradient(model) == {}


@each_variant
def test_no_logit_of_a_gpt_looks_at_a_later_token(variant: str) -> None:
    model = model_of(gpt(variant))
    before = model(tokens())
    for place in range(1, 6):
        changed = tokens()
        changed[:, place] = (changed[:, place] + 1) % 9
        difference = (model(changed) - before).abs().amax(dim=(0, 2))
        assert difference[:place].max() <= 1e-13
        assert difference[place] > 1e-6


@each_variant
def test_a_gpt_takes_any_length_up_to_its_own(variant: str) -> None:
    model = model_of(gpt(variant))
    whole = model(tokens())
    for length in range(1, 6):
        assert (model(tokens()[:, :length]) - whole[:, :length]).abs().max() <= 1e-13
    with pytest.raises(InputError, match="N from 1 to 6"):
        model(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(InputError, match="N from 1 to 6"):
        model(torch.zeros(1, 0, dtype=torch.int64))


@pytest.mark.parametrize("variant", ["no position", "rope", "convit", "full qkv", "alpha v", "hybrid full"])
def test_a_vit_takes_smaller_images(variant: str) -> None:
    """Where there is no position embedding, which is for one size."""
    model = model_of(vit(variant))
    small = images()[:, :, :4, :6]
    assert model(small).shape == (3, 5)
    assert (model(small) - model(images())).abs().max() > 1e-6
    with pytest.raises(InputError, match="fewer in whole patches"):
        model(images()[:, :, :5])
    with pytest.raises(InputError, match=r"takes \[B, 2, height, width\]"):
        model(images()[:, :1])
    with pytest.raises(InputError, match=r"of \(6, 8\) pixels\. "):
        model_of(vit("absolute"))(small)


def test_patches_are_flattened_with_the_channel_fastest() -> None:
    model = model_of(vit("no position"))
    assert isinstance(model, VisionTransformer)
    pixels, found = images(), []
    for row in range(3):
        for column in range(4):
            patch = pixels[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            found.append(torch.stack([patch[:, c, r, k] for r in range(2) for k in range(2) for c in range(2)], dim=1))
    embedding = model.patch_embedding
    expected = embedding.output_norm(embedding.projection(embedding.norm(torch.stack(found, dim=1))))
    assert torch.equal(embedding(pixels), expected)


@pytest.mark.parametrize(
    "description",
    [vit("absolute"), vit("convit"), gpt("absolute"), gpt("alpha qkv")],
    ids=lambda d: f"{d.family} {d.kind}",
)
def test_meta_device_and_reset(description: ModelDescription) -> None:
    model = build_model(description, device="meta")
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert model(images().float() if description.family == "vit" else tokens()).isfinite().all()


@pytest.mark.parametrize(
    "description", [vit("full qkv"), vit("absolute"), gpt("alpha kv")], ids=lambda d: f"{d.family} {d.kind}"
)
def test_state_dict_round_trip(description: ModelDescription) -> None:
    model, other = model_of(description), build_model(description, dtype=torch.float64)
    assert not list(model.buffers())
    other.load_state_dict(model.state_dict())
    given = images() if description.family == "vit" else tokens()
    assert torch.equal(model(given), other(given))


@pytest.mark.parametrize("description", [vit("alpha qkv"), gpt("full v")], ids=lambda d: f"{d.family} {d.kind}")
def test_a_model_compiles_without_a_break(description: ModelDescription) -> None:
    model = model_of(description)
    given = images() if description.family == "vit" else tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert (compiled(given) - model(given)).abs().max() <= 1e-13


def test_autocast() -> None:
    """Norms and sums stay in float32."""
    model = build_model(vit("alpha qkv"))
    given = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(given)
    assert 0 < (out - model(given)).abs().max() < 0.05


def test_backend_and_algorithm_are_handed_on() -> None:
    torch.manual_seed(0)
    pairwise = build_model(vit("full qkv"), algorithm="pairwise", dtype=torch.float64)
    assert {layer.operator.algorithm for layer in pairwise.layers} == {"pairwise"}
    assert (pairwise(images()) - model_of(vit("full qkv"))(images())).abs().max() <= 1e-12


def test_a_description_of_the_other_family_is_refused() -> None:
    with pytest.raises(InputError, match="built from a description of family 'gpt'"):
        GPT(vit("rope"))


def test_what_a_model_shows() -> None:
    shown = repr(model_of(vit("full qkv")))
    assert f"full qkv, grid=(3, 4), {3 * 36 * 144:,} parameters unreached" in shown
    assert "unreached" not in repr(model_of(replace(vit("full qkv"), pooling="mean")))
