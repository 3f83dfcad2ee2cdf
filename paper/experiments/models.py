"""The models that an experiment compares, by name; all but the CNN are the paper's with one thing changed."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from translution.errors import UnknownName
from translution.paper import ModelDescription, build_model
from translution.paper.operators import Kind

# Name -> kind of the operator, whether a position embedding is added, and what a reader should know.
MODELS: dict[str, tuple[Kind, bool, str]] = {
    "none": ("attention", False, "attention that knows no place"),
    "attention": ("attention", True, "attention with a position embedding"),
    "wide": ("attention", True, "as attention, its feed-forward nets widened until it has Translution's parameters"),
    "swin": ("swin", False, "a bias for each displacement and head"),
    "shaw": ("shaw", False, "a vector for each displacement"),
    "rope": ("rope", False, "rotary positions"),
    "convit": ("convit", False, "content and place mixed by a gate"),
    "alpha": ("alpha", False, "alpha-Translution"),
    "translution": ("full", False, "Translution"),
}
CNN = "cnn"
DEFAULT_MODELS = ("attention", "rope", "alpha", "translution")


def check_models(names: Sequence[str], known: Sequence[str] = (*MODELS, CNN)) -> None:
    """Raise :class:`translution.UnknownName` for a model that does not exist."""
    for name in names:
        if name not in known:
            raise UnknownName("model", name, known)


def describe(name: str, **fields: Any) -> ModelDescription:
    """The description of a model by its name; ``fields`` are those of :class:`translution.paper.ModelDescription`.

    ``rank`` is taken by alpha alone; a ``position_embedding`` in ``fields`` is for the ones that have none themselves.

    Raises:
        UnknownName: there is no such model.
    """
    check_models([name], tuple(MODELS))
    kind, embedding, _ = MODELS[name]
    rank = fields.pop("rank", None)
    given: dict[str, Any] = fields | {"position_embedding": embedding or fields.get("position_embedding", False)}
    if name == "wide":
        return widened(ModelDescription(kind="attention", **given), ModelDescription(kind="full", **fields))
    return ModelDescription(**given, kind=kind, rank=rank if kind == "alpha" else None)


def widened(description: ModelDescription, other: ModelDescription) -> ModelDescription:
    """``description`` with the smallest ``mlp_dim`` that gives it at least the parameters of ``other``."""
    size = description.size
    missing = other.num_parameters - description.num_parameters
    more = -(-missing // (size.depth * (2 * size.dim + 1)))
    return dataclasses.replace(description, size=dataclasses.replace(size, mlp_dim=size.mlp_dim + max(0, more)))


class ConvolutionalNetwork(nn.Module):
    """Three strided convolutions and a global mean: images [B, channels, height, width] to logits [B, num_classes]."""

    def __init__(self, channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        extents = [channels, width, 2 * width, 2 * width]
        self.layers = nn.Sequential()
        for narrow, wide in pairwise(extents):
            self.layers.append(nn.Conv2d(narrow, wide, 5, stride=2, padding=2))
            self.layers.append(nn.BatchNorm2d(wide))
            self.layers.append(nn.GELU())
        self.head = nn.Linear(extents[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.layers(images).mean((2, 3)))
        return logits


def build(name: str, **fields: Any) -> nn.Module:
    """A new model, initialised with torch's random numbers; ``cnn`` has half of ``dim`` channels in its first layer."""
    if name == CNN:
        return ConvolutionalNetwork(fields["channels"], fields["num_classes"], max(8, fields["size"].dim // 2))
    return build_model(describe(name, **fields))


def count_parameters(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters())
