"""The paper's models in PyTorch: a ViT and a GPT, built from a :class:`~translution.paper.ModelDescription`.

    x = x + operator(norm(x));  x = x + feed_forward(norm(x))        for each layer, one norm at the end

Linear layers, norms and embeddings start as PyTorch starts them, operators as `translution.nn` does. The class token
and the position embedding are standard normal, the scale of the patches after their norm and of `torch.nn.Embedding`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from translution.errors import InputError
from translution.nn import OperatorLayer
from translution.paper.description import Family, ModelDescription

Device = torch.device | str | None


class Block(nn.Module):
    """One layer: x + operator(norm(x)), then the feed-forward net of LayerNorm, Linear, GELU (erf) and Linear."""

    def __init__(
        self,
        description: ModelDescription,
        layer: int,
        *,
        backend: str = "torch",
        algorithm: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, mlp_dim = description.size.dim, description.size.mlp_dim
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.operator = OperatorLayer(
            description.operator(layer), backend=backend, algorithm=algorithm, device=device, dtype=dtype
        )
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim, device=device, dtype=dtype),
            nn.Linear(dim, mlp_dim, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(mlp_dim, dim, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, grid: tuple[int, ...] | None = None) -> Tensor:
        """[B, N, C] of x [B, N, C]; ``grid`` where it is not the model's own."""
        x = x + self.operator(self.norm(x), grid=grid)
        out: Tensor = x + self.feed_forward(x)
        return out


class PatchEmbedding(nn.Module):
    """Patches of images [B, channels, height, width], flattened with the channel fastest: [B, patches, C]."""

    def __init__(self, description: ModelDescription, device: Device = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.patch_size, self.channels = description.patch_extents, description.channels
        dim, patch_dim = description.size.dim, description.patch_dim
        self.norm = nn.LayerNorm(patch_dim, device=device, dtype=dtype)
        self.projection = nn.Linear(patch_dim, dim, device=device, dtype=dtype)
        self.output_norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """LayerNorm, Linear, LayerNorm of every patch, row by row."""
        batch, channels, *extents = images.shape
        (rows, columns), (height, width) = (
            (e // p for e, p in zip(extents, self.patch_size, strict=True)),
            self.patch_size,
        )
        patches = images.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 3, 5, 1)
        out: Tensor = self.output_norm(self.projection(self.norm(patches.reshape(batch, rows * columns, -1))))
        return out


class PaperModel(nn.Module):
    """What both models have: their description, layers and final norm.

    Args:
        description: of the class's own family.
        backend, algorithm: of every operator, as in :func:`translution.run`.
        device, dtype: of the parameters; ``device="meta"`` allocates nothing.
    """

    family: ClassVar[Family]
    position_embedding: nn.Parameter | None

    def __init__(
        self,
        description: ModelDescription,
        *,
        backend: str = "torch",
        algorithm: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if description.family != self.family:
            raise InputError(
                "P1",
                f"{type(self).__name__} of a {description.family!r} description",
                f"it is built from a description of family {self.family!r}",
                "Call build_model, which looks at the family",
            )
        self.description = description
        self.layers = nn.ModuleList(
            Block(description, layer, backend=backend, algorithm=algorithm, device=device, dtype=dtype)
            for layer in range(description.size.depth)
        )
        self.norm = nn.LayerNorm(description.size.dim, device=device, dtype=dtype)
        self._build(device, dtype)
        self._reset_own()

    def _build(self, device: Device, dtype: torch.dtype | None) -> None:
        """What comes before and after the layers."""
        raise NotImplementedError

    def _empty(self, *shape: int, device: Device, dtype: torch.dtype | None) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Start anew, every parameter; after ``to_empty`` on a model that was built on the meta device."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()
        self._reset_own()

    def _reset_own(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter)

    def extra_repr(self) -> str:
        """Which model, and what of it no gradient reaches."""
        about = self.description
        unreached = sum(about.unreached_parameters.values())
        shown = f"{about.kind}{f' {about.roles}' if about.roles else ''}, grid={about.grid}"
        return shown + (f", {unreached:,} parameters unreached" if unreached else "")


class VisionTransformer(PaperModel):
    """Images [B, channels, height, width] to logits [B, num_classes]. Arguments as in :class:`PaperModel`."""

    family = "vit"
    class_token: nn.Parameter | None

    def _build(self, device: Device, dtype: torch.dtype | None) -> None:
        description = self.description
        dim = description.size.dim
        self.patch_embedding = PatchEmbedding(description, device, dtype)
        token = self._empty(1, 1, dim, device=device, dtype=dtype) if description.class_token else None
        places = (1, description.num_tokens, dim)
        position = self._empty(*places, device=device, dtype=dtype) if description.position_embedding else None
        self.register_parameter("class_token", token)
        self.register_parameter("position_embedding", position)
        self.head = nn.Linear(dim, description.num_classes or 0, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images of the model's size, or of smaller ones where there is no position embedding.

        Raises:
            InputError: the images are of another kind or size.
        """
        grid = self._grid_of(images)
        x = self.patch_embedding(images)
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        if self.position_embedding is not None:
            x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x, grid)
        x = self.norm(x)
        out: Tensor = self.head(x[:, 0] if self.description.pooling == "cls" else x.mean(dim=1))
        return out

    def _grid_of(self, images: Tensor) -> tuple[int, ...] | None:
        """The grid of patches, None for the model's own."""
        about, patches = self.description, self.description.patch_extents
        extents = images.shape[2:]
        if images.dim() == 4 and images.shape[1] == about.channels:
            if tuple(extents) == about.image_size:
                return None
            if not about.position_embedding and all(
                e >= p and e % p == 0 for e, p in zip(extents, patches, strict=True)
            ):
                return tuple(e // p for e, p in zip(extents, patches, strict=True))
        raise InputError(
            "P1",
            f"images have shape {tuple(images.shape)}",
            f"the model takes [B, {about.channels}, height, width] of {about.image_size} pixels"
            + ("" if about.position_embedding else f", or fewer in whole patches of {patches}"),
            "Resize the images, or describe a model of their size",
        )


class GPT(PaperModel):
    """Tokens [B, N] (int64) to logits [B, N, vocabulary_size]; no logit looks at a later token. N up to ``length``.

    Embedding and head are not tied; two norms come before the head, as in the authors' models. Arguments as in
    :class:`PaperModel`.
    """

    family = "gpt"

    def _build(self, device: Device, dtype: torch.dtype | None) -> None:
        description = self.description
        dim, vocabulary_size = description.size.dim, description.vocabulary_size or 0
        self.token_embedding = nn.Embedding(vocabulary_size, dim, device=device, dtype=dtype)
        places = (description.num_tokens, dim)
        position = self._empty(*places, device=device, dtype=dtype) if description.position_embedding else None
        self.register_parameter("position_embedding", position)
        self.head_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.head = nn.Linear(dim, vocabulary_size, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each.

        Raises:
            InputError: more tokens than the model's length, or not [B, N].
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.description.num_tokens:
            raise InputError(
                "P1",
                f"tokens have shape {tuple(tokens.shape)}",
                f"the model takes [B, N] with N from 1 to {self.description.num_tokens}",
                "Give the last tokens only, or describe a longer model",
            )
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.head_norm(self.norm(x)))
        return out


def build_model(
    description: ModelDescription,
    *,
    backend: str = "torch",
    algorithm: str | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer | GPT:
    """The model that the description names, with new parameters.

    Args:
        backend, algorithm: of every operator, as in :func:`translution.run`.
        device, dtype: of the parameters; ``device="meta"`` allocates nothing.
    """
    build = VisionTransformer if description.family == "vit" else GPT
    return build(description, backend=backend, algorithm=algorithm, device=device, dtype=dtype)
